"""The sweep against the same done image by image, its selection of images, and its means."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier
from support import MEAN, SIZE, STD, load_script, only, tiny_encoder

from ssl_gradmix.data.corruptions import COMMON, GROUP_OF, GROUPS, corrupt, frost_source
from ssl_gradmix.data.datasets import Data, ImageSet, load
from ssl_gradmix.evaluation import results
from ssl_gradmix.evaluation.probes import linear_probe

corruption = load_script("eval/corruption.py")


def evaluate(run, options, out=None) -> pd.DataFrame:
    folder = [] if out is None else ["--out", str(out)]
    corruption.main([str(run), "--workers", "1", "--epochs", "5", *options.split(), *folder])
    (path,) = (out or run / "eval").glob("corruption-digits*.json")
    return results.read(path)[0]


def images_of(split):
    """Images at the size of the encoder, and labels."""
    found = load(Data(), split)
    images = [Image.fromarray(image) for image in found.images]
    small = [image.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images]
    return [np.asarray(image) for image in small], found.labels


@torch.no_grad()
def features_of(run, images):
    """Features of timm's model with the weights from the file."""
    model = tiny_encoder().eval()
    model.load_state_dict(load_file(run / "backbone" / "model.safetensors"))
    prepared = np.stack([(image / 255 - MEAN) / STD for image in images])
    return model(torch.from_numpy(prepared).float().permute(0, 3, 1, 2))


def test_sweep_equals_one_by_hand(run, capsys):
    rows = evaluate(run, "--corruptions [gaussian_noise,contrast] --seed 4 --k 7")
    (train, labels), (test, targets) = images_of("train"), images_of("test")
    bank = features_of(run, train)
    probe = linear_probe(bank, torch.from_numpy(labels), epochs=5, seed=4)
    oracle = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07)
    )
    oracle.fit(bank.double(), labels)

    def check(images, metric, **params):
        features = features_of(run, images)
        linear = probe.classes[(features @ probe.weight.T + probe.bias).argmax(1)].numpy()
        for score, guessed in (("linear", linear), ("knn", oracle.predict(features.double()))):
            value = only(rows, score, metric, **params)["value"]
            expected = (guessed == targets).mean()
            assert value == pytest.approx(expected, abs=2.1 / len(targets))  # sums round

    check(test, "clean_accuracy")
    for name, severity in (("gaussian_noise", 5), ("contrast", 3)):
        images = [corrupt(image, name, severity, seed=4, index=i) for i, image in enumerate(test)]
        check(images, "accuracy", corruption=name, severity=severity)
    row = only(rows, "linear", "accuracy", corruption="contrast", severity=5)
    assert row["params"] == {
        **{"corruption": "contrast", "severity": 5, "group": "digital", "epochs": 5},
        **{"learning_rate": probe.learning_rate, "source": "generated", "preset": "cifar"},
        **{"seed": 4, "frost_source": frost_source()},
    }
    wilson = binomtest(round(row["value"] * row["n"]), row["n"])
    interval = wilson.proportion_ci(0.95, method="wilson")
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((interval.low, interval.high))
    assert set(rows["n"]) == {len(targets)}
    assert len(rows) == 2 * (1 + 2 * 5 + 1 + 2)
    accuracies = rows[(rows["score"] == "linear") & (rows["metric"] == "accuracy")]["value"]
    mean = only(rows, "linear", "mean_corruption_error", corruptions=2)["value"]
    assert mean == pytest.approx(1 - accuracies.mean())
    assert f"{mean:.4f}" in capsys.readouterr().out


def test_images_of_the_classes_are_drawn_and_batches_change_nothing(run, tmp_path):
    options = "--corruptions [fog,glass_blur] --images 60 --seed 2 --data.classes [1,2,3]"
    one = evaluate(run, options, tmp_path / "a")
    other = evaluate(run, f"{options} --batch_size 7", tmp_path / "b")
    values = ["value", "ci_low", "ci_high"]
    pd.testing.assert_frame_equal(one.drop(columns=values), other.drop(columns=values))
    assert ((one["value"] - other["value"]).abs() <= 1.1 / 60).all()
    assert set(one["n"]) == set(results.param(one, "images"))
    assert one["n"].max() == pytest.approx(60, abs=2)
    assert set(results.param(one, "classes")) == {"1, 2, 3"}


def test_published_arrays_are_read(run, tmp_path):
    test = load(Data(), "test")
    np.save(tmp_path / "labels.npy", np.tile(test.labels, 5))
    dark = np.zeros((3 * len(test), 32, 32, 3), np.uint8)
    np.save(tmp_path / "fog.npy", np.concatenate([test.images, test.images, dark]))
    rows = evaluate(run, f"--corruptions [fog] --published {tmp_path}")
    clean = only(rows, "linear", "clean_accuracy")["value"]
    values = [only(rows, "linear", "accuracy", severity=s)["value"] for s in range(1, 6)]
    assert values[:2] == [clean, clean]
    fractions = np.bincount(test.labels) / len(test)
    assert min(abs(fractions - values[3])) < 1e-9  # black images are all one class
    assert set(results.param(rows, "source")) == {"published"}


def test_selection_is_labeled_stratified_and_seeded():
    few = ImageSet(
        np.zeros((8, 8, 8, 3), np.uint8), np.array([2, 0, 1, 0, 1, 2, -1, 0]), tuple("abc"), "x"
    )
    assert corruption.select(few, None, None, 0).tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert corruption.select(few, [2, 1], None, 0).tolist() == [0, 2, 4, 5]
    with pytest.raises(ValueError, match="data"):
        corruption.select(few, [7], None, 0)
    with pytest.raises(ValueError, match="images"):
        corruption.select(few, [1], 4, 0)

    labels = np.repeat([0, 1, 2], [100, 60, 40])[np.random.default_rng(1).permutation(200)]
    many = ImageSet(np.zeros((200, 8, 8, 3), np.uint8), labels, tuple("abc"), "x")
    drawn = corruption.select(many, None, 50, 3)
    assert np.bincount(labels[drawn]).tolist() == [25, 15, 10]
    assert drawn.tolist() == sorted(drawn) == corruption.select(many, None, 50, 3).tolist()
    assert drawn.tolist() != corruption.select(many, None, 50, 4).tolist()
    assert len(corruption.select(many, None, 200, 0)) == 200


@pytest.mark.parametrize("names", [COMMON, ("fog", "snow", "contrast")])
def test_means_equal_loops(names):
    rng = np.random.default_rng(0)
    errors = {name: rng.uniform(0.2, 0.9, 5) for name in names}
    numbers = [
        results.number(
            score,
            "accuracy",
            1 - error / factor,
            50,
            corruption=name,
            severity=severity,
            group="",
            seed=3,
        )
        for score, factor in (("linear", 1), ("knn", 2))
        for name, values in errors.items()
        for severity, error in enumerate(values, start=1)
    ]
    shuffled = [numbers[i] for i in rng.permutation(len(numbers))]
    rows = results.frame(shuffled, "corruption", "x/test", "mine")
    means = results.frame(corruption.summarize(rows), "corruption", "x/test", "mine")
    for score, factor in (("linear", 1), ("knn", 2)):
        expected = np.mean([values.mean() for values in errors.values()]) / factor
        mean = only(means, score, "mean_corruption_error", corruptions=len(names))
        assert mean["value"] == pytest.approx(expected)
        assert mean["params"] == {"corruptions": len(names), "seed": 3}
        for group in {GROUP_OF[name] for name in names}:
            members = [errors[name] for name in GROUPS[group] if name in names]
            mean = only(means, score, "group_corruption_error", group=group)
            assert mean["value"] == pytest.approx(np.mean(members) / factor)
            assert mean["n"] == 50
    assert len(means) == 2 * (1 + len({GROUP_OF[name] for name in names}))
