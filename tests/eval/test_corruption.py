from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from support import MEAN, SIZE, STD, load_script, make_run, only, records, tiny_encoder, write_images

from ssl_gradmix.data.corruption_sets import CorruptedImages
from ssl_gradmix.data.corruptions import COMMON, EXTRA, GROUPS, corrupt, frost_source
from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.data.open_set import random_split
from ssl_gradmix.evaluation import cli, rows
from ssl_gradmix.evaluation.probes import linear_probe
from ssl_gradmix.settings import Data

corruption = load_script("eval/corruption.py")
make_c = load_script("eval/make_c.py")


def call(run: Path, arguments: str, out: Path | None = None) -> int:
    folder = [] if out is None else ["--out", str(out)]
    return corruption.main([str(run), "--workers", "1", "--epochs", "5", *arguments.split(), *folder])


def evaluate(run: Path, arguments: str, out: Path | None = None) -> pd.DataFrame:
    assert call(run, arguments, out) == 0
    return rows.read((out or run / "eval") / "corruption.json")[0]


def alike(found: pd.DataFrame) -> list:
    """Rows in an order of their own, without the parameters that say where the images are from."""
    names = ("score", "metric", "value", "n")
    places = ("corruption", "severity", "group", "corruptions")
    return sorted([*(row[name] for name in names), *map(row["params"].get, places)] for row in records(found))


def by_text(found: pd.DataFrame) -> list[str]:
    return sorted(map(str, records(found)))


class ByHand:
    """The evaluation again, image by image: timm's model, weights from the file, preparation in NumPy."""

    def __init__(self, run: Path) -> None:
        self.model = tiny_encoder().eval()
        self.model.load_state_dict(load_file(run / "backbone" / "model.safetensors"))

    def images(self, split: str) -> tuple[list[np.ndarray], np.ndarray]:
        images = load(Data(), split)
        resized = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images.images]
        return [np.asarray(image) for image in resized], images.labels

    def features(self, images: list[np.ndarray]) -> torch.Tensor:
        prepared = [torch.from_numpy((image / 255 - MEAN) / STD).float().permute(2, 0, 1) for image in images]
        with torch.no_grad():
            return torch.cat([self.model(image[None]) for image in prepared])


def test_against_the_same_done_by_hand(run, capsys):
    found = evaluate(run, "--corruptions [gaussian_noise,contrast] --seed 4 --k 7")
    hand = ByHand(run)
    (train, labels), (test, targets) = hand.images("train"), hand.images("test")
    bank = hand.features(train)
    probe = linear_probe(bank, torch.from_numpy(labels), epochs=5, seed=4)
    weight, bias = probe.weight.double().numpy(), probe.bias.double().numpy()
    oracle = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    oracle.fit(bank.double(), labels)

    def check(images: list[np.ndarray], metric: str, **params) -> None:
        features = hand.features(images).double().numpy()
        guesses = {"linear": (features @ weight.T + bias).argmax(1), "knn": oracle.predict(features)}
        for score, guessed in guesses.items():  # features of batches round differently: two images may change sides
            value = only(found, score, metric, **params)["value"]
            assert value == pytest.approx((guessed == targets).mean(), abs=2.1 / len(targets))

    check(test, "clean_accuracy")
    for name, severity in (("gaussian_noise", 5), ("contrast", 3)):
        corrupted = [corrupt(image, name, severity, seed=4, index=i) for i, image in enumerate(test)]
        check(corrupted, "accuracy", corruption=name, severity=severity)

    assert only(found, "linear", "clean_accuracy")["value"] > 0.3  # chance is 0.1
    values = {s: only(found, "linear", "accuracy", corruption="contrast", severity=s) for s in range(1, 6)}
    assert values[5]["value"] < values[1]["value"]
    assert values[5]["params"] == {
        **{"corruption": "contrast", "severity": 5, "group": "digital", "learning_rate": probe.learning_rate},
        **{"source": "generated", "preset": "cifar", "seed": 4, "epochs": 5, "frost_source": frost_source()},
    }
    for name, value in (("task", "corruption"), ("dataset", "digits"), ("encoder", "mine"), ("n", len(targets))):
        assert set(found[name]) == {value}
    for row in (values[5], values[1], only(found, "knn", "clean_accuracy", k=7, temperature=0.07)):
        wilson = binomtest(round(row["value"] * row["n"]), row["n"]).proportion_ci(0.95, method="wilson")
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-9)
    assert len(found) == 2 * (1 + 2 * 5 + 1 + 2)
    accuracies = found[(found["score"] == "linear") & (found["metric"] == "accuracy")]["value"]
    overall = only(found, "linear", "mean_corruption_error", corruptions=2)
    assert overall["value"] == pytest.approx(1 - accuracies.mean(), abs=1e-12)

    printed = capsys.readouterr().out
    assert "mine on 359 images of digits/test" in printed
    assert "corruptions generated, preset cifar, seed 4" in printed
    assert re.search(rf"^mean corruption error \(2\) +{overall['value']:.4f} ", printed, re.MULTILINE)
    with Image.open(run / "eval" / "corruption.png") as picture:
        assert min(picture.size) > 400
    assert sorted(path.name for path in (run / "eval").glob("corruption*")) == ["corruption.json", "corruption.png"]


def test_all_common_corruptions_by_default_and_the_extra_ones_apart(run):
    found = evaluate(run, "--images 10")
    assert list(dict.fromkeys(rows.param(found, "corruption").dropna())) == list(COMMON)
    more = evaluate(run, "--images 10 --extra true")
    assert only(more, "knn", "group_corruption_error", group="extra", corruptions=4)["n"] == 10
    for metric in ("mean_corruption_error", "clean_accuracy"):
        assert records(more).count(only(found, "knn", metric).where(pd.notna, None).to_dict()) == 1


def test_batches_change_nothing_and_batchnorm_stays_as_it_was(run, tmp_path, monkeypatch):
    loaded, original = [], cli.load_encoder
    monkeypatch.setattr(cli, "load_encoder", lambda *given: loaded.append(original(*given)) or loaded[-1])
    one = evaluate(run, "--corruptions [fog,glass_blur] --images 60 --seed 2", tmp_path / "a")
    other = evaluate(run, "--corruptions [fog,glass_blur] --images 60 --seed 2 --batch_size 7", tmp_path / "b")
    assert one.drop(columns=["value", "ci_low", "ci_high"]).equals(other.drop(columns=["value", "ci_low", "ci_high"]))
    assert ((one["value"] - other["value"]).abs() <= 1.1 / 60).all()
    assert set(one["n"]) == {*rows.param(one, "images")} == {60}
    assert set(rows.param(one, "draw_seed")) == {2}
    on_disk = load_file(run / "backbone" / "model.safetensors")
    assert any("running_mean" in name for name in on_disk)
    for encoder in loaded:
        assert all(torch.equal(value, on_disk[name]) for name, value in encoder.model.state_dict().items())


# Sweeps in parts


def count_passes(monkeypatch, stop_after: int | None = None) -> list[tuple[str, int]]:
    """Notes each corruption and severity made, once; interrupts after so many."""
    made: list[tuple[str, int]] = []
    original = CorruptedImages.pixels

    def pixels(self, *given, **options):
        if (self.corruption, self.severity) not in made:
            if len(made) == stop_after:
                raise KeyboardInterrupt("enough")
            made.append((self.corruption, self.severity))
        return original(self, *given, **options)

    monkeypatch.setattr(CorruptedImages, "pixels", pixels)
    return made


def test_an_interrupted_sweep_goes_on_and_fewer_corruptions_keep_the_others(run, tmp_path, monkeypatch, capsys):
    arguments = "--corruptions [fog,contrast,shot_noise] --images 60"
    expected = evaluate(run, arguments, tmp_path / "whole")
    with monkeypatch.context() as patch:
        count_passes(patch, stop_after=8)
        assert call(run, arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by Ctrl-C"
    assert set(rows.param(rows.read(run / "eval" / "corruption.json")[0], "corruption")) == {"shot_noise"}

    for names, new in (
        ("[fog,contrast,shot_noise]", {"fog", "contrast"}),
        ("[fog]", set()),
        ("[spatter]", {"spatter"}),
    ):
        with monkeypatch.context() as patch:
            made = count_passes(patch)
            found = evaluate(run, f"--corruptions {names} --images 60")
        assert set(made) == {(name, severity) for name in new for severity in range(1, 6)}
        if names != "[spatter]":
            assert by_text(found) == by_text(expected)
    kept = [row for row in records(found) if row["params"].get("corruption") not in (None, "spatter")]
    assert sorted(map(str, kept)) == by_text(expected[rows.param(expected, "corruption").notna()])
    assert "mean corruption error (3)" in capsys.readouterr().out.rpartition("means")[2]


@pytest.mark.parametrize("changed", ["--seed 1", "--k 3", "--images 40", "--preset imagenet64", "--data.classes [1,2]"])
def test_other_settings_are_measured_beside_the_first(run, monkeypatch, changed):
    first = evaluate(run, "--corruptions [contrast] --images 60")
    made = count_passes(monkeypatch)
    second = evaluate(run, f"--corruptions [contrast] --images 60 {changed}")
    assert len(made) == 5
    assert set(by_text(first)) < set(by_text(second))


def test_rows_of_another_encoder_or_in_a_damaged_file_are_written_anew(run, tmp_path, monkeypatch):
    expected = evaluate(run, "--corruptions [contrast] --images 60", tmp_path / "out")
    other = make_run(tmp_path / "other" / "mine", seed=1)
    for damage in (
        lambda file: evaluate(other, "--corruptions [fog] --images 60", file.parent),
        lambda file: file.write_text('{"rows": ['),
    ):
        damage(tmp_path / "out" / "corruption.json")
        assert by_text(evaluate(run, "--corruptions [contrast] --images 60", tmp_path / "out")) == by_text(expected)


# Published sets, baselines, open set


def test_what_make_c_writes_gives_what_is_made_on_the_fly(run, tmp_path, capsys):
    made = f"--out {tmp_path / 'c'} --data.size {SIZE} --corruptions [fog,impulse_noise] --seed 6 --workers 1"
    make_c.main(made.split())
    arguments = "--corruptions [fog,impulse_noise] --seed 6 --data.open_set random:5:1 --images 80"
    generated = evaluate(run, arguments, tmp_path / "a")
    published = evaluate(run, f"{arguments} --published {tmp_path / 'c'}", tmp_path / "b")
    assert alike(published) == alike(generated)
    assert set(rows.param(published, "source")) == {"published"}
    assert "corruptions published, preset cifar, seed 6" in capsys.readouterr().out


def test_a_changed_published_set_is_read_anew(run, tmp_path):
    images, labels = load(Data(), "test").images, load(Data(), "test").labels
    np.save(tmp_path / "labels.npy", np.tile(labels, 5))
    np.save(tmp_path / "fog.npy", np.tile(images, (5, 1, 1, 1)))
    before = evaluate(run, f"--corruptions [fog] --published {tmp_path}")
    clean = only(before, "linear", "clean_accuracy")["value"]
    assert {only(before, "linear", "accuracy", severity=s)["value"] for s in range(1, 6)} == {clean}
    np.save(tmp_path / "fog.npy", np.zeros((5 * len(labels), 32, 32, 3), np.uint8))
    after = evaluate(run, f"--corruptions [fog] --published {tmp_path}")
    (files,) = {*rows.param(after, "files")} - {*rows.param(before, "files")}
    shares = np.bincount(labels) / len(labels)
    value = only(after, "linear", "accuracy", severity=3, files=files)["value"]
    assert min(abs(shares - value)) < 1e-9, "black images are one class"


def test_against_another_run(run, tmp_path, capsys):
    theirs, arguments = tmp_path / "runs" / "theirs", "--corruptions [fog,contrast,spatter] --images 60"
    baseline = evaluate(make_run(theirs, seed=1), arguments)
    found = evaluate(run, f"{arguments} --baseline {theirs}")
    ours, others = (
        [[1 - only(of, "knn", "accuracy", corruption=name, severity=s)["value"] for s in range(1, 6)] for name in names]
        for of in (found, baseline)
        for names in [("fog", "contrast")]
    )
    ratios = [sum(mine) / sum(other) for mine, other in zip(ours, others, strict=True)]
    value = only(found, "knn", "mce", baseline="theirs", corruptions=2)["value"]
    assert value == pytest.approx(np.mean(ratios), abs=1e-9)
    assert only(found, "knn", "relative_mce", baseline="theirs")["n"] == 60


def test_open_set_recognition_under_corruption(run, capsys):
    found = evaluate(run, "--corruptions [contrast] --osr true --data.open_set random:6:3")
    known, _ = random_split(10, 6, seed=3)
    hand = ByHand(run)
    (train, labels), (test, targets) = hand.images("train"), hand.images("test")
    bank = hand.features([image for image, label in zip(train, labels, strict=True) if label in known])
    probe = linear_probe(bank, torch.from_numpy(labels[np.isin(labels, known)]), epochs=5)
    features = hand.features([corrupt(image, "contrast", 2, index=i) for i, image in enumerate(test)])
    unit = features / features.norm(dim=1, keepdim=True)
    distance = torch.cdist(unit.double(), (bank / bank.norm(dim=1, keepdim=True)).double()).sort(1).values[:, 49]
    is_known = np.isin(targets, known)
    for score, values in {"knn_distance": -distance, "max_logit": probe.logits(features).amax(1)}.items():
        row = only(found, score, "auroc", corruption="contrast", severity=2, trial=3, n_known=6, protocol="random")
        assert row["value"] == pytest.approx(roc_auc_score(is_known, values), abs=1e-3)
        assert row["ci_low"] < row["value"] < row["ci_high"]
        assert (row["n"], row["params"]["pretraining"]) == (len(targets), "all classes, unlabeled")
        assert only(found, score, "clean_auroc")["n"] == len(targets)
        values = [only(found, score, "auroc", severity=s)["value"] for s in range(1, 6)]
        mean = only(found, score, "mean_corruption_auroc")["value"]
        assert mean == pytest.approx(np.mean(values), abs=1e-12)
    assert only(found, "linear", "accuracy", severity=2)["n"] == is_known.sum()
    assert "AUROC of known against unknown, maximum logit, in %" in capsys.readouterr().out
    assert (run / "eval" / "corruption_osr.png").exists()


def test_a_run_of_an_open_set_trial_is_evaluated_on_it(tmp_path):
    run = make_run(tmp_path / "known", open_set="random:6:3")
    row = only(evaluate(run, "--corruptions [contrast] --osr true"), "max_logit", "clean_auroc")
    assert (row["trial"], row["params"]["pretraining"]) == (3, "known classes only")


# Bad input


def test_a_missing_library_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert call(run, "--corruptions [spatter]") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("error: cannot make spatter: .* needs OpenCV", line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--corruptions [smog]", "unknown corruption 'smog'; there are gaussian_noise, .*saturate$"),
        ("--workers 0", "workers must be at least 1 or null, got 0"),
        ("--data.classes [4]", r"digits/train must have images of at least two classes, got \['4'\]"),
        ("--preset cifar --published {c}", "preset is how corruptions are made here, so it cannot be given with"),
        ("--published {c}", r"no file '.*shot_noise\.npy'; corruptions there: gaussian_noise"),
        ("--published {c} --corruptions [gaussian_noise] --data.name folder --data.root {c}/f", "do not fit folder:f"),
        ("--published {c}/f", "no folder '.*gaussian_noise/5'; ImageNet-C is"),
        ("--baseline {c}", r"the baseline has no '.*eval/corruption\.json': run eval/corruption\.py on it first"),
        ("--osr true", "osr needs known classes: give --data.open_set, such as random:6:0, or --data.classes"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, message):
    published = tmp_path / "c"
    for split in ("train", "test"):
        write_images(published / "f" / split, "01", size=20)
    labels = np.tile(load(Data(), "test").labels, 5)
    np.save(published / "labels.npy", labels)
    np.save(published / "gaussian_noise.npy", np.zeros((len(labels), 8, 8, 3), np.uint8))
    assert call(run, arguments.format(c=published)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not list(run.glob("eval/corruption*"))


# Selecting


def test_selection_is_labeled_stratified_and_seeded():
    few = ImageSet(
        np.zeros((12, 8, 8, 3), np.uint8), np.array([2, 0, 1, 0, 1, 2, -1, 0, 1, 0, 0, 0]), tuple("abc"), "x"
    )
    assert corruption.selected(few).tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert corruption.selected(few, classes=[2, 1]).tolist() == [0, 2, 4, 5, 8]

    labels = np.repeat([0, 1, 2], [100, 60, 40])[np.random.default_rng(1).permutation(200)]
    whole = ImageSet(np.zeros((200, 8, 8, 3), np.uint8), labels, tuple("abc"), "x")
    drawn = corruption.selected(whole, count=50, seed=3).tolist()
    assert np.bincount(labels[drawn]).tolist() == [25, 15, 10]
    assert drawn == sorted(set(drawn)) == corruption.selected(whole, count=50, seed=3).tolist()
    assert corruption.selected(whole, count=50, seed=4).tolist() != drawn
    assert set(labels[corruption.selected(whole, count=1)]) == {0, 1, 2}
    assert len(corruption.selected(whole, count=200)) == 200

    for options, message in (
        ({"count": 0}, "images must be 1 to the 11 of x, got 0"),
        ({"count": 12}, "images must be 1 to the 11 of x, got 12"),
        ({"classes": [1], "count": 4}, "images must be 1 to the 3 of x, got 4"),
        ({"classes": [7]}, r"x has no image of the classes \[7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            corruption.selected(few, **options)
    with pytest.raises(ValueError, match="x has no labels, this evaluation needs them"):
        corruption.selected(few.subset([6]))


# Means


def make_rows(errors: dict[str, list[float]], clean_error: float = 0.1, **params) -> pd.DataFrame:
    """Rows in a shuffled order, of accuracy; `knn` errs half as often."""

    def each(score: str, metric: str, error: float, **where: object) -> dict:
        error = error / 2 if score == "knn" else error
        return rows.number(score, metric, (1 - error, 0, 1), 50, **where, **params)

    numbers = [each(score, "clean_accuracy", clean_error) for score in corruption.CLASSIFIERS] + [
        each(score, "accuracy", error, corruption=name, severity=severity, group="any")
        for score in corruption.CLASSIFIERS
        for name, values in errors.items()
        for severity, error in enumerate(values, start=1)
    ]
    found = rows.frame(numbers, "corruption", "x/test", "mine")
    return found.iloc[np.random.default_rng(0).permutation(len(found))]


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    return {name: rng.uniform(0.2, 0.9, 5).tolist() for name in COMMON + EXTRA}


def test_means_against_loops(errors):
    means, remarks = corruption.summarize(make_rows(errors, preset="cifar", seed=3))
    assert remarks == []
    for score, factor in (("linear", 1), ("knn", 0.5)):
        total = sum(sum(errors[name]) / 5 for name in COMMON)
        value = only(means, score, "mean_corruption_error", corruptions=15, preset="cifar", seed=3)["value"]
        assert value == pytest.approx(factor * total / 15, abs=1e-12)
        for group, members in {**GROUPS, "extra": EXTRA}.items():
            expected = sum(sum(errors[name]) for name in members) / 5 / len(members)
            value = only(means, score, "group_corruption_error", group=group, corruptions=len(members))["value"]
            assert value == pytest.approx(factor * expected, abs=1e-12)
    assert set(means["metric"]) == {"mean_corruption_error", "group_corruption_error"}
    assert set(means["n"]) == {50}
    assert means["ci_low"].isna().all()
    assert not any({"corruption", "severity"} & params.keys() for params in means["params"])


def test_a_part_of_the_corruptions(errors):
    means, _ = corruption.summarize(make_rows({name: errors[name] for name in ("fog", "saturate")}))
    value = only(means, "linear", "mean_corruption_error", corruptions=1)["value"]
    assert value == pytest.approx(np.mean(errors["fog"]), abs=1e-12)
    assert list(rows.param(means[means["score"] == "linear"], "group").dropna()) == ["weather", "extra"]
    means, _ = corruption.summarize(make_rows({"saturate": errors["saturate"]}), corruption.ALEXNET)
    assert list(means["metric"]) == ["group_corruption_error"] * 2, "extra ones alone have no overall mean"


def test_ratios_to_alexnet_against_loops(errors):
    means, remarks = corruption.summarize(make_rows(errors, clean_error=0.15), corruption.ALEXNET)
    theirs = corruption.ALEXNET.errors["linear"]
    mce = np.mean([sum(errors[name]) / (5 * theirs[name]) for name in COMMON])
    relative = np.mean([sum(e - 0.15 for e in errors[name]) / (5 * (theirs[name] - 0.435)) for name in COMMON])
    assert only(means, "linear", "mce", baseline="alexnet")["value"] == pytest.approx(mce, abs=1e-12)
    assert only(means, "linear", "relative_mce")["value"] == pytest.approx(relative, abs=1e-12)
    assert only(means, "knn", "mce")["value"] == pytest.approx(mce / 2, abs=1e-12)
    assert remarks == []


def test_a_ratio_that_cannot_be_had_is_remarked(errors):
    some = {"fog": errors["fog"], "snow": errors["snow"]}
    faultless = {score: {"fog": [0.2] * 5, "snow": [0.0] * 5} for score in ("linear", "knn")}
    baseline = corruption.Baseline("y", faultless, {"linear": 0.2, "knn": 0.1})
    means, remarks = corruption.summarize(make_rows(some), baseline)
    assert not {"mce", "relative_mce"} & set(means["metric"])
    assert [remark.partition(":")[0] for remark in remarks] == [
        *["no mce of linear against y", "no relative_mce of linear against y"],
        *["no mce of knn against y", "no relative_mce of knn against y"],
    ]
    assert "must be above 0 to divide by, got 0 for snow" in remarks[0]


def test_mean_auroc_counts_common_corruptions_alone(errors):
    found = make_rows({name: errors[name] for name in ("fog", "glass_blur", "spatter")})
    linear = found[found["score"] == "linear"]
    metric = linear["metric"].str.replace("accuracy", "auroc")
    osr = linear.assign(score="max_logit", metric=metric, value=linear["value"] / 2, n=80)
    row = only(corruption.summarize(rows.joined([found, osr]))[0], "max_logit", "mean_corruption_auroc", corruptions=2)
    expected = (10 - sum(errors["fog"]) - sum(errors["glass_blur"])) / 10 / 2
    assert (row["value"], row["n"]) == (pytest.approx(expected, abs=1e-12), 80)


# The baseline

SHARED = {"preset": "cifar"}
ABOUT = {"images": {"x/train": "abc", "x/test": "def"}}


def test_a_run_is_its_own_unit(errors, tmp_path):
    found = make_rows(errors, **SHARED)
    written = found[~rows.param(found, "corruption").isin(EXTRA)]
    rows.write(tmp_path / "eval" / "corruption.json", written, ABOUT)
    for where in (tmp_path, tmp_path / "eval", tmp_path / "eval" / "corruption.json"):
        baseline = corruption.read_baseline(str(where), COMMON + EXTRA[:1], SHARED, ABOUT, 10)
        assert baseline.name == "mine"
        assert baseline.clean_error == pytest.approx({"linear": 0.1, "knn": 0.05})
        means, _ = corruption.summarize(found, baseline)
        for score in ("linear", "knn"):
            for metric in ("mce", "relative_mce"):
                assert only(means, score, metric)["value"] == pytest.approx(1, abs=1e-12)


def test_baselines_that_will_not_do(errors, tmp_path):
    def read(where=tmp_path, names=("fog",), shared=SHARED, about=ABOUT, feature="backbone"):
        return corruption.read_baseline(str(where), names, shared, about, 10, feature)

    with pytest.raises(FileNotFoundError, match=r"the baseline has no '.*none/eval/corruption\.json': run eval/"):
        read(tmp_path / "none")
    path = tmp_path / "corruption.json"
    rows.write(path, make_rows({"fog": errors["fog"]}, preset="imagenet", images=7), ABOUT)
    with pytest.raises(ValueError, match=r"is of other images: images 7, not None; preset 'imagenet', not 'cifar'"):
        read()
    rows.write(path, make_rows({"fog": errors["fog"]}, **SHARED), ABOUT)
    with pytest.raises(ValueError, match=r"is of other images: it has x/train, x/test, this y/test"):
        read(about={"images": {"y/test": "def"}})
    with pytest.raises(ValueError, match=r"is of other images"):
        read(about={"images": {"x/test": "changed"}})
    with pytest.raises(ValueError, match=r"corruption\.json lacks snow, frost: evaluate them there too, or not here"):
        read(names=["snow", "frost", "fog"])
    twice = [make_rows({"fog": errors["fog"]}, **SHARED, seed=seed) for seed in (0, 1)]
    rows.write(path, rows.joined(twice), ABOUT)
    with pytest.raises(ValueError, match=r"corruption\.json has several evaluations of the same images"):
        read()
    rows.write(path, twice[0][twice[0]["metric"] == "accuracy"], ABOUT)  # interrupted
    with pytest.raises(ValueError, match=r"corruption\.json lacks clean images: evaluate them there too"):
        read()
    with pytest.raises(ValueError, match=r"corruption\.json is of backbone features, not of projector features"):
        read(path, feature="projector")
    with pytest.raises(FileNotFoundError, match=r"has no '.*/eval/projector/corruption\.json'"):
        read(feature="projector")


def test_alexnet_is_for_imagenet():
    for shared in ({"preset": "imagenet"}, {}):
        assert corruption.read_baseline("alexnet", COMMON, shared, {}, 1000) is corruption.ALEXNET
    for n_classes, preset, said in (
        (10, "imagenet", "10 classes and imagenet"),
        (1000, "cifar", "1000 classes and cifar"),
        (None, "imagenet", "some of the classes and imagenet"),
    ):
        with pytest.raises(ValueError, match=f"baseline alexnet is for .*, got {said}"):
            corruption.read_baseline("alexnet", COMMON, {"preset": preset}, {}, n_classes)


# For a terminal


def test_tables(errors):
    found = make_rows(errors)
    lines = corruption.severity_table(corruption.by_corruption(found, "linear", "accuracy"), 0.9).splitlines()
    assert lines[0].split() == ["severity", "1", "2", "3", "4", "5", "mean"]
    assert lines[1].split() == ["clean", "images", "90.0"]
    assert [line.split()[0] for line in lines[2:]] == list(COMMON + EXTRA)
    fog = next(line for line in lines if line.startswith("fog")).split()
    expected = [100 * (1 - e) for e in (*errors["fog"], np.mean(errors["fog"]))]
    assert [float(cell) for cell in fog[1:]] == pytest.approx(expected, abs=0.051)
    assert len({len(line) for line in lines}) == 1, "columns must be aligned"

    means, _ = corruption.summarize(found, corruption.ALEXNET)
    lines = corruption.summary_table(means).splitlines()
    assert lines[0].split() == ["linear", "knn"]
    (line,) = [line for line in lines if line.startswith("mce against alexnet (15)")]
    assert line.split()[-2:] == [f"{only(means, score, 'mce')['value']:.4f}" for score in ("linear", "knn")]
