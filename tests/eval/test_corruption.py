from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from support import SIZE, add_projector, help_of, load_script

from ssl_gradmix.data.corruption_sets import read_cifar_c
from ssl_gradmix.data.corruptions import COMMON, corrupt
from ssl_gradmix.data.datasets import load
from ssl_gradmix.data.open_set import random_split
from ssl_gradmix.evaluation import encoders
from ssl_gradmix.evaluation.probes import linear_probe
from ssl_gradmix.evaluation.results import read_rows
from ssl_gradmix.evaluation.robustness import CorruptedImages
from ssl_gradmix.settings import Data

EVAL = Path(__file__).parents[1] / "eval"


main = load_script("eval/corruption.py").main
make_c = load_script("eval/make_c.py")


def make_run(folder: Path, seed: int = 0, **data) -> Path:
    """A run whose encoder has BatchNorm variances of its own."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=0, channels=(8, 16, 24, 32), stem_width=8, stem_type="")
    weights = model.state_dict()
    for name, value in weights.items():
        if "running_var" in name:
            value.uniform_(0.5, 1.5)
    described = {
        "architecture": "resnet10t",
        "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.2]},
        "model_args": {"channels": [8, 16, 24, 32], "stem_width": 8, "stem_type": ""},
    }
    (folder / "backbone").mkdir(parents=True)
    (folder / "backbone" / "config.json").write_text(json.dumps(described))
    save_file(weights, folder / "backbone" / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": asdict(Data(size=SIZE, **data)), "method": "byol"}))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "runs" / "mine")


def evaluate(run: Path, arguments: str, out: Path | None = None) -> tuple[list, dict]:
    folder = [] if out is None else ["--out", str(out)]
    assert main([str(run), "--workers", "1", "--epochs", "5", *arguments.split(), *folder]) == 0
    return read_rows((out or run / "eval") / "corruption.json")


def found(rows, score, metric, **params):
    (row,) = [
        row for row in rows if (row.score, row.metric) == (score, metric) and params.items() <= row.params.items()
    ]
    return row


def numbers(rows) -> list:
    """What rows say, but for where the images came from."""
    return [
        (row.score, row.metric, row.value, row.params.get("corruption"), row.params.get("severity")) for row in rows
    ]


class ByHand:
    """The evaluation again, image by image: timm's model, weights from the file, preparation in NumPy."""

    def __init__(self, run: Path) -> None:
        sizes = {"channels": (8, 16, 24, 32), "stem_width": 8, "stem_type": ""}
        self.model = timm.create_model("resnet10t", num_classes=0, **sizes).eval()
        self.model.load_state_dict(load_file(run / "backbone" / "model.safetensors"))

    def images(self, split: str) -> tuple[list[np.ndarray], np.ndarray]:
        images = load(Data(), split)
        resized = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images.images]
        return [np.asarray(image) for image in resized], images.labels

    def features(self, images: list[np.ndarray]) -> torch.Tensor:
        prepared = [(image / 255 - [0.5, 0.4, 0.3]) / [0.25, 0.3, 0.2] for image in images]
        with torch.no_grad():
            return torch.cat([self.model(torch.from_numpy(x).float().permute(2, 0, 1)[None]) for x in prepared])


def test_against_the_same_done_by_hand(run, capsys):
    rows, extra = evaluate(run, "--corruptions [gaussian_noise,contrast] --seed 4 --k 7")
    hand = ByHand(run)
    train, labels = hand.images("train")
    test, targets = hand.images("test")
    bank = hand.features(train)
    probe = linear_probe(bank, torch.from_numpy(labels), epochs=5, seed=4)
    weight, bias = probe.weight.double().numpy(), probe.bias.double().numpy()
    oracle = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    oracle.fit(bank.double(), labels)

    def check(images: list[np.ndarray], metric: str, **params) -> None:
        features = hand.features(images).double().numpy()
        # Features of batches round differently: two images may change sides.
        linear = (features @ weight.T + bias).argmax(1) == targets
        assert found(rows, "linear", metric, **params).value == pytest.approx(linear.mean(), abs=2.1 / len(targets))
        nearest = oracle.predict(features) == targets
        assert found(rows, "knn", metric, **params).value == pytest.approx(nearest.mean(), abs=2.1 / len(targets))

    check(test, "clean_accuracy")
    for name, severity in (("gaussian_noise", 5), ("contrast", 3)):
        corrupted = [corrupt(image, name, severity, seed=4, index=i) for i, image in enumerate(test)]
        check(corrupted, "accuracy", corruption=name, severity=severity)

    assert found(rows, "linear", "clean_accuracy").value > 0.3  # chance is 0.1: a test of nothing would pass otherwise
    severe = found(rows, "linear", "accuracy", corruption="contrast", severity=5)
    assert severe.value < found(rows, "linear", "accuracy", corruption="contrast", severity=1).value
    assert severe.params == {
        **{"corruption": "contrast", "severity": 5, "group": "digital", "learning_rate": probe.learning_rate},
        **{"source": "generated", "preset": "cifar", "seed": 4, "frost_source": extra["corruptions"]["frost_source"]},
    }
    assert {(row.task, row.dataset, row.split, row.encoder, row.n) for row in rows} == {
        ("corruption", "digits", "test", "mine", len(targets))
    }
    errors = [
        1 - np.mean([found(rows, "linear", "accuracy", corruption=name, severity=s).value for s in range(1, 6)])
        for name in ("gaussian_noise", "contrast")
    ]
    overall = found(rows, "linear", "mean_corruption_error", corruptions=2)
    assert overall.value == pytest.approx(np.mean(errors), abs=1e-12)
    assert len(rows) == 2 * (1 + 2 * 5 + 1 + 2)

    printed = capsys.readouterr().out
    assert "mine on 359 images of digits/test" in printed
    assert "corruptions generated, preset cifar, seed 4" in printed
    assert re.search(rf"^mean corruption error \(2\) +{overall.value:.4f} ", printed, re.MULTILINE)
    assert f"Written: {run / 'eval' / 'corruption.json'}, {run / 'eval' / 'corruption.png'}" in printed
    with Image.open(run / "eval" / "corruption.png") as picture:
        assert min(picture.size) > 400
    assert sorted(path.name for path in (run / "eval").glob("corruption*")) == ["corruption.json", "corruption.png"]


def test_all_common_corruptions_by_default_and_the_extra_ones_apart(run):
    rows, _ = evaluate(run, "--images 10")
    assert list(dict.fromkeys(row.params["corruption"] for row in rows if "corruption" in row.params)) == list(COMMON)
    more, _ = evaluate(run, "--images 10 --extra true")
    assert found(more, "knn", "group_corruption_error", group="extra", corruptions=4)
    for metric in ("mean_corruption_error", "clean_accuracy"):
        assert found(more, "knn", metric) == found(rows, "knn", metric)
    assert found(more, "knn", "mean_corruption_error").params["corruptions"] == 15


def test_batches_change_nothing(run, tmp_path):
    one, _ = evaluate(run, "--corruptions [fog,glass_blur] --images 60", tmp_path / "a")
    other, _ = evaluate(run, "--corruptions [fog,glass_blur] --images 60 --batch_size 7", tmp_path / "b")
    for a, b in zip(one, other, strict=True):
        assert (a.score, a.metric, a.params, a.n) == (b.score, b.metric, b.params, b.n)
        assert a.value == pytest.approx(b.value, abs=1.1 / a.n)


def test_batchnorm_stays_as_it_was(run, tmp_path, monkeypatch):
    loaded = []
    original = encoders.load_encoder
    monkeypatch.setattr(encoders, "load_encoder", lambda *given: loaded.append(original(*given)) or loaded[-1])
    evaluate(run, "--corruptions [snow] --images 60")
    on_disk = load_file(run / "backbone" / "model.safetensors")
    (encoder,) = loaded
    assert any("running_mean" in name for name in on_disk)
    assert all(torch.equal(value, on_disk[name]) for name, value in encoder.model.state_dict().items())


def test_a_part_of_the_images_is_drawn_by_class_and_recorded(run, tmp_path):
    rows, extra = evaluate(run, "--corruptions [brightness] --images 50 --seed 2", tmp_path / "a")
    assert {row.n for row in rows} == {extra["images"]["count"]} == {50}
    assert extra["images"]["drawn_with_seed"] == 2
    again, _ = evaluate(run, "--corruptions [brightness] --images 50 --seed 2", tmp_path / "b")
    assert numbers(again) == numbers(rows)


# Interrupted sweeps


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


def test_an_interrupted_sweep_goes_on(run, tmp_path, monkeypatch, capsys):
    arguments = "--corruptions [fog,contrast,shot_noise] --images 60"
    expected = evaluate(run, arguments, tmp_path / "whole")[0]
    with monkeypatch.context() as patch:
        count_passes(patch, stop_after=8)
        assert main([str(run), "--workers", "1", "--epochs", "5", *arguments.split()]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by Ctrl-C"
    assert sorted(path.name for path in (run / "eval").glob("corruption*")) == ["corruption.partial.json"]

    with monkeypatch.context() as patch:
        made = count_passes(patch)
        rows, _ = evaluate(run, arguments)
    assert sorted(set(made)) == [(name, severity) for name in ("contrast", "fog") for severity in range(1, 6)]
    assert rows == expected
    assert not (run / "eval" / "corruption.partial.json").exists()

    with monkeypatch.context() as patch:
        made = count_passes(patch)
        more, _ = evaluate(run, "--corruptions [fog,contrast,shot_noise,spatter] --images 60")
    assert {name for name, _ in made} == {"spatter"}, "a longer sweep makes what is missing alone"
    assert [row for row in more if "corruption" in row.params and row.params["corruption"] != "spatter"] == [
        row for row in expected if "corruption" in row.params
    ]


@pytest.mark.parametrize("changed", ["--seed 1", "--k 3", "--images 40", "--preset imagenet64", "--data.classes [1,2]"])
def test_other_settings_start_anew(run, monkeypatch, changed):
    evaluate(run, "--corruptions [contrast] --images 60")
    made = count_passes(monkeypatch)
    evaluate(run, f"--corruptions [contrast] --images 60 {changed}")
    assert len(made) == 5


def test_another_encoder_starts_anew(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    evaluate(run, "--corruptions [contrast] --images 60", out)
    made = count_passes(monkeypatch)
    evaluate(make_run(tmp_path / "other" / "mine", seed=1), "--corruptions [contrast] --images 60", out)
    assert len(made) == 5


def test_a_damaged_file_of_results_is_written_anew(run):
    expected, _ = evaluate(run, "--corruptions [contrast] --images 60")
    (run / "eval" / "corruption.json").write_text('{"rows": [')
    assert evaluate(run, "--corruptions [contrast] --images 60")[0] == expected


# Published sets, baselines, open set


def test_what_make_c_writes_gives_what_is_made_on_the_fly(run, tmp_path, capsys):
    out = tmp_path / "digits-c"
    given = f"--out {out} --data.size {SIZE} --corruptions [fog,impulse_noise] --seed 6 --workers 1"
    make_c.main(given.split())
    assert "359 images of digits/test, 2 corruptions at 5 severities" in capsys.readouterr().out
    hand, labels = ByHand(run).images("test")
    images, written = read_cifar_c(out, "fog", 2)
    np.testing.assert_array_equal(images, [corrupt(image, "fog", 2, seed=6, index=i) for i, image in enumerate(hand)])
    assert written.tolist() == labels.tolist()
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["source"], meta["preset"], meta["seed"]) == ("digits/test", "cifar", 6)

    arguments = "--corruptions [fog,impulse_noise] --seed 6 --data.open_set random:5:1 --images 80"
    generated, _ = evaluate(run, arguments, tmp_path / "a")
    published, extra = evaluate(run, f"{arguments} --published {out}", tmp_path / "b")
    assert numbers(published) == numbers(generated)
    assert extra["corruptions"]["source"] == "published"
    assert {row.params["source"] for row in published} == {"published"}
    assert "corruptions published, preset cifar, seed 6" in capsys.readouterr().out


def test_a_changed_published_set_is_read_anew(run, tmp_path):
    images, labels = load(Data(), "test").images, load(Data(), "test").labels
    np.save(tmp_path / "labels.npy", np.tile(labels, 5))
    np.save(tmp_path / "fog.npy", np.tile(images, (5, 1, 1, 1)))
    before, _ = evaluate(run, f"--corruptions [fog] --published {tmp_path}")
    clean = found(before, "linear", "clean_accuracy").value
    assert {found(before, "linear", "accuracy", severity=s).value for s in range(1, 6)} == {clean}
    np.save(tmp_path / "fog.npy", np.zeros((5 * len(labels), 32, 32, 3), np.uint8))
    after, _ = evaluate(run, f"--corruptions [fog] --published {tmp_path}")
    shares = np.bincount(labels) / len(labels)
    assert min(abs(shares - found(after, "linear", "accuracy", severity=3).value)) < 1e-9, "black images are one class"


def test_against_another_run(run, tmp_path):
    arguments = "--corruptions [fog,contrast,spatter] --images 60"
    baseline, _ = evaluate(make_run(tmp_path / "runs" / "theirs", seed=1), arguments)
    rows, _ = evaluate(run, f"{arguments} --baseline {tmp_path / 'runs' / 'theirs'}")
    mce, relative = [], []
    for name in ("fog", "contrast"):
        ours, theirs = (
            [1 - found(of, "knn", "accuracy", corruption=name, severity=s).value for s in range(1, 6)]
            for of in (rows, baseline)
        )
        mce.append(sum(ours) / sum(theirs))
        clean = [1 - found(of, "knn", "clean_accuracy").value for of in (rows, baseline)]
        relative.append((sum(ours) - 5 * clean[0]) / (sum(theirs) - 5 * clean[1]))
    row = found(rows, "knn", "mce", baseline="theirs", corruptions=2)
    assert row.value == pytest.approx(np.mean(mce), abs=1e-9)
    assert found(rows, "knn", "relative_mce", baseline="theirs").value == pytest.approx(np.mean(relative), abs=1e-9)


def test_projector_features_against_those_of_another_run(run, tmp_path, capsys):
    arguments = "--corruptions [contrast] --images 60 --feature projector"
    other = add_projector(make_run(tmp_path / "runs" / "theirs", seed=1))
    evaluate(other, "--corruptions [contrast] --images 60")
    for run_or_file in (other, other / "eval" / "corruption.json"):
        capsys.readouterr()
        assert main([str(add_projector(run)), *arguments.split(), "--baseline", str(run_or_file)]) == 2
        assert re.search("has no .*/eval/projector/corr|is of backbone features, not of proj", capsys.readouterr().err)
    evaluate_projector = f"{arguments} --out {{}} --workers 1 --epochs 5"
    for each, more in ((other, []), (run, ["--baseline", str(other)])):
        assert main([str(each), *evaluate_projector.format(each / "eval").split(), *more]) == 0
    rows, _ = read_rows(run / "eval" / "projector" / "corruption.json")
    theirs, _ = read_rows(other / "eval" / "projector" / "corruption.json")
    assert {row.feature for row in rows} == {"projector"}
    ratio = found(rows, "knn", "mean_corruption_error").value / found(theirs, "knn", "mean_corruption_error").value
    assert found(rows, "knn", "mce", baseline="theirs").value == pytest.approx(ratio, abs=1e-9)


def test_open_set_recognition_under_corruption(run, capsys):
    rows, _ = evaluate(run, "--corruptions [contrast] --osr true --data.open_set random:6:3")
    known, _ = random_split(10, 6, seed=3)
    hand = ByHand(run)
    train, labels = hand.images("train")
    test, targets = hand.images("test")
    bank = hand.features([image for image, label in zip(train, labels, strict=True) if label in known])
    probe = linear_probe(bank, torch.from_numpy(labels[np.isin(labels, known)]), epochs=5)
    features = hand.features([corrupt(image, "contrast", 2, index=i) for i, image in enumerate(test)])
    unit = features / features.norm(dim=1, keepdim=True)
    distance = torch.cdist(unit.double(), (bank / bank.norm(dim=1, keepdim=True)).double()).sort(1).values[:, 49]
    scores = {"knn_distance": -distance, "max_logit": probe.logits(features).amax(1)}
    is_known = np.isin(targets, known)
    for score, values in scores.items():
        row = found(rows, score, "auroc", corruption="contrast", severity=2)
        assert row.value == pytest.approx(roc_auc_score(is_known, values), abs=1e-3)
        assert row.ci_low < row.value < row.ci_high
        assert (row.n, row.trial, row.params["n_known"]) == (len(targets), 3, 6)
        assert (row.params["protocol"], row.params["pretraining"]) == ("random", "all classes, unlabeled")
        assert found(rows, score, "clean_auroc").n == len(targets)
        values = [found(rows, score, "auroc", severity=s).value for s in range(1, 6)]
        assert found(rows, score, "mean_corruption_auroc").value == pytest.approx(np.mean(values), abs=1e-12)
    assert found(rows, "linear", "accuracy", severity=2).n == is_known.sum()
    printed = capsys.readouterr().out
    assert "AUROC of known against unknown, maximum logit, in %" in printed
    assert (run / "eval" / "corruption_osr.png").exists()


def test_a_run_of_an_open_set_trial_is_evaluated_on_it(tmp_path):
    run = make_run(tmp_path / "known", open_set="random:6:3")
    rows, extra = evaluate(run, "--corruptions [contrast] --osr true")
    assert found(rows, "max_logit", "clean_auroc").params["pretraining"] == "known classes only"
    assert extra["images"]["known_classes"] == random_split(10, 6, seed=3)[0]


# Bad input


def test_a_missing_library_matters_only_where_it_is_needed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main([str(run), "--corruptions", "[spatter]"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("error: cannot make spatter: .* needs OpenCV", line)
    labels = load(Data(), "test").labels
    np.save(tmp_path / "labels.npy", np.tile(labels, 5))
    np.save(tmp_path / "spatter.npy", np.zeros((5 * len(labels), 8, 8, 3), np.uint8))
    rows, _ = evaluate(run, f"--corruptions [spatter] --images 10 --published {tmp_path}")
    assert found(rows, "knn", "group_corruption_error").params["group"] == "extra"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--corruptions [smog]", "unknown corruption 'smog'; there are gaussian_noise, .*saturate$"),
        ("--corruptions []", "corruptions must name at least one; there are"),
        ("--images 0", "images must be 1 to the 359 of digits/test, got 0"),
        ("--workers 0", "workers must be at least 1 or null, got 0"),
        ("--data.classes [4]", r"digits/train must have images of at least two classes, got \['4'\]"),
        ("--seed -1", "seed must be 0 or larger, got -1"),
        ("--preset cifar32", "preset must be one of .* or null, got cifar32"),
        ("--preset cifar --published {c}", "preset is how corruptions are made here, so it cannot be given with"),
        ("--published {c}/nowhere", "no folder '.*nowhere' of published corruptions"),
        ("--published {c}", r"no file '.*shot_noise\.npy'; corruptions there: contrast, fog, gaussian_noise, snow"),
        ("--published {c} --corruptions [gaussian_noise,fog]", r"fog\.npy is damaged, or holds pickled objects"),
        ("--published {c} --corruptions [gaussian_noise,snow]", r"snow\.npy is damaged, or holds pickled objects"),
        ("--published {c} --corruptions [contrast]", r"labels\.npy must hold whole numbers, one for each"),
        ("--published {c} --corruptions [gaussian_noise] --data.name folder --data.root {c}/f", "do not fit folder:f"),
        ("--published {c}/f", "no folder '.*gaussian_noise/5'; ImageNet-C is"),
        ("--baseline {c}", r"the baseline has no '.*eval/corruption\.json': run eval/corruption\.py on it first"),
        ("--baseline alexnet", "baseline alexnet is for ImageNet's 1000 classes and the preset imagenet, got 10"),
        ("--osr true", "osr needs known classes: give --data.open_set, such as random:6:0, or --data.classes"),
        ("--osr true --data.open_set cifar10:0", "the split does not fit: digits"),
        ("--osr true --data.classes [0,1,2,3,4,5,6,7,8,9]", "10 known and 0 unknown classes"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, message):
    published = tmp_path / "c"
    for number in range(4):
        for split in ("train", "test"):
            (published / "f" / split / str(number // 2)).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20)).save(published / "f" / split / str(number // 2) / f"{number}.png")
    labels = np.tile(load(Data(), "test").labels, 5)
    np.save(published / "labels.npy", labels)
    np.save(published / "gaussian_noise.npy", np.zeros((len(labels), 8, 8, 3), np.uint8))
    np.save(published / "contrast.npy", np.zeros((len(labels) - 5, 8, 8, 3), np.uint8))
    np.save(published / "snow.npy", np.array([published] * 5, dtype=object), allow_pickle=True)
    (published / "fog.npy").write_bytes((published / "gaussian_noise.npy").read_bytes()[:-100])

    assert main([str(run), *arguments.format(c=published).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not list(run.glob("eval/corruption*"))


def test_a_baseline_of_other_images_or_corruptions(run, tmp_path, capsys):
    other = tmp_path / "other"
    evaluate(run, "--corruptions [fog] --images 60", other)
    for arguments, message in (
        ("--corruptions [fog]", "is of other images: count 60, not 359; drawn_with_seed 0, not None"),
        ("--corruptions [fog,snow] --images 60", r"corruption\.json lacks snow: evaluate them there too, or not here"),
        ("--corruptions [fog] --images 60 --preset imagenet", "preset 'cifar', not 'imagenet'"),
    ):
        capsys.readouterr()
        assert main([str(run), "--baseline", str(other), *arguments.split()]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(f"error: .*{message}", line)
        assert not list(run.glob("eval/corruption*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: out"),
        ("--out {new} --corruptions [smog]", "unknown corruption 'smog'"),
        ("--out {new} --seed -1", "seed must be 0 or larger, got -1"),
        ("--out {new} --workers 0", "workers must be at least 1 or null, got 0"),
        ("--out {new} --data.size 4", "data.size must be at least 8 and at most 4096, got 4"),
        ("--out {new} --data.name folder --data.root {full}", "images without label"),
        ("--out {full}", "must be a new or empty folder, or one that make_c wrote"),
    ],
)
def test_bad_input_to_make_c_writes_nothing(tmp_path, capsys, arguments, message):
    new, full = tmp_path / "new", tmp_path / "full"
    full.mkdir()
    for number in range(2):
        Image.new("RGB", (20, 20)).save(full / f"{number}.png")
    given = arguments.format(new=new, full=full).split()
    if "--data.root" in given:
        given += ["--split", "train"]
    assert make_c.command_line.run(make_c.main, given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not new.exists()
    assert sorted(path.name for path in full.iterdir()) == ["0.png", "1.png"]


# Processes and help


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_what_one_gives(run, tmp_path):
    arguments = "--corruptions [glass_blur,fog] --images 61 --workers 1 --epochs 5"
    rows, _ = evaluate(run, arguments, tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(EVAL / "corruption.py"), str(run), *arguments.split(), "--out", str(tmp_path / "two")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EVAL.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("Written: ") == 1
    for one, two in zip(rows, read_rows(tmp_path / "two" / "corruption.json")[0], strict=True):
        assert (two.score, two.metric, two.params, two.n) == (one.score, one.metric, one.params, one.n)
        assert two.value == pytest.approx(one.value, abs=1.1 / one.n)


@pytest.mark.parametrize("script", ["corruption", "make_c"])
def test_help_teaches_and_comes_before_heavy_imports(script):
    text = help_of(f"eval/{script}.py")
    assert f"python eval/{script}.py" in text
    for option in ("--corruptions", "--extra", "--preset", "--data.name", "--out", "--seed"):
        assert option in text
