from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from ssl_gradmix.evaluation.results import Row, write_rows
from ssl_gradmix.evaluation.robustness import (
    ALEXNET,
    CLASSIFIERS,
    Baseline,
    Classifiers,
    CorruptedImages,
    Generated,
    Published,
    Selection,
    check_can_make,
    choose_corruptions,
    read_baseline,
    severity_table,
    summarize,
    summary_table,
)

from ssl_gradmix.data.corruption_sets import make_c
from ssl_gradmix.data.corruptions import COMMON, EXTRA, GROUPS, corrupt, frost_source
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation import robustness
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.probes import LinearProbe


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """12 images of three classes, one without label."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    labels = np.array([2, 0, 1, 0, 1, 2, -1, 0, 1, 0, 0, 0])
    return ImageSet(pixels, labels, ("ant", "bee", "cat"), "insects/test")


def one_by_one(images: ImageSet, numbers, name: str, severity: int, seed: int = 0) -> list[np.ndarray]:
    return [corrupt(images.images[i], name, severity, seed=seed, index=int(i)) for i in numbers]


def as_arrays(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).numpy()


# What is evaluated


def test_corruptions_come_in_the_benchmarks_order():
    assert choose_corruptions() == list(COMMON)
    assert choose_corruptions(extra=True) == [*COMMON, *EXTRA]
    assert choose_corruptions(["saturate", "fog", "shot_noise", "fog"]) == ["shot_noise", "fog", "saturate"]
    assert choose_corruptions(["fog"], extra=True) == ["fog", *EXTRA]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fog", "smog"], "unknown corruption 'smog'; there are gaussian_noise, .*, saturate$"),
        ([], "corruptions must name at least one; there are gaussian_noise, .*, saturate$"),
    ],
)
def test_corruptions_that_are_none(names, message):
    with pytest.raises(ValueError, match=message):
        choose_corruptions(names)


def test_a_corruption_whose_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    check_can_make(COMMON)
    with pytest.raises(ValueError, match="cannot make spatter: .* needs OpenCV: pip install"):
        check_can_make(["fog", "spatter"])


def test_selection_leaves_out_other_classes_and_unlabeled_images(images):
    assert Selection().numbers(images).tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert Selection(classes=[2, 1]).numbers(images).tolist() == [0, 2, 4, 5, 8]


def test_selection_of_a_part_is_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [100, 60, 40])[np.random.default_rng(1).permutation(200)]
    whole = ImageSet(np.zeros((200, 8, 8, 3), np.uint8), labels, ("a", "b", "c"), "x/test")
    drawn = Selection(count=50, seed=3).numbers(whole)
    assert np.bincount(labels[drawn]).tolist() == [25, 15, 10]
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert Selection(count=50, seed=3).numbers(whole).tolist() == drawn.tolist()
    assert Selection(count=50, seed=4).numbers(whole).tolist() != drawn.tolist()
    assert set(labels[Selection(count=1).numbers(whole)]) == {0, 1, 2}
    assert len(Selection(count=200).numbers(whole)) == 200


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(count=0), "images must be 1 to the 11 of insects/test, got 0"),
        (Selection(count=12), "images must be 1 to the 11 of insects/test, got 12"),
        (Selection(classes=[1], count=4), "images must be 1 to the 3 of insects/test, got 4"),
        (Selection(classes=[7]), r"insects/test has no image of the classes \[7\]"),
    ],
)
def test_selection_of_what_is_not_there(images, selection, message):
    with pytest.raises(ValueError, match=message):
        selection.numbers(images)


def test_selection_without_labels(images):
    with pytest.raises(ValueError, match="insects/test has no labels, this evaluation needs them"):
        Selection().numbers(replace(images, labels=np.full(12, -1)))


# Images corrupted here


def test_images_keep_their_noise_in_any_batch(images):
    whole = Generated(images, Selection(), size=16, seed=5).read("gaussian_noise", 4)
    expected = np.stack(one_by_one(images, [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11], "gaussian_noise", 4, seed=5))
    np.testing.assert_array_equal(as_arrays(whole.pixels(16)), expected)
    np.testing.assert_array_equal(as_arrays(whole.subset(np.array([9, 2])).pixels(16)), expected[[9, 2]])
    np.testing.assert_array_equal(as_arrays(whole.subset([9, 2]).subset([1]).pixels(16)), expected[[2]])
    assert whole.subset([9, 2]).labels.tolist() == [0, 1]
    assert (len(whole), len(whole.subset([9, 2]))) == (11, 2)

    part = Generated(images, Selection(classes=[1]), size=16, seed=5).read("gaussian_noise", 4)
    np.testing.assert_array_equal(as_arrays(part.pixels(16)), expected[images.labels[images.labels >= 0] == 1])


@pytest.mark.parametrize("at_most", [0, 2**30], ids=["files decoded each time", "decoded once"])
def test_files_are_corrupted_at_the_encoders_size(tmp_path, monkeypatch, at_most):
    monkeypatch.setattr(robustness, "_DECODED_AT_MOST", at_most)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    files = ImageSet([tmp_path / f"{i}.png" for i in range(3)], np.arange(3), ("a", "b", "c"), "x/test")
    made = Generated(files, Selection(classes=[1, 2]), size=12).read("contrast", 2).pixels(12)
    for number, image in zip((1, 2), as_arrays(made), strict=True):
        resized = Image.fromarray(pixels[number]).resize((12, 12), Image.Resampling.BILINEAR, (5, 0, 35, 30))
        np.testing.assert_array_equal(image, corrupt(np.asarray(resized), "contrast", 2, index=number))


def test_the_preset_fits_the_size(images):
    presets = {size: Generated(images, Selection(), size).origin()["preset"] for size in (16, 64, 224)}
    assert presets == {16: "cifar", 64: "imagenet64", 224: "imagenet"}
    given = Generated(images, Selection(), 16, preset="imagenet", seed=2)
    assert given.origin() == {"source": "generated", "preset": "imagenet", "seed": 2, "frost_source": frost_source()}
    expected = corrupt(images.images[0], "contrast", 1, preset="imagenet")
    np.testing.assert_array_equal(as_arrays(given.read("contrast", 1).pixels(16))[0], expected)


def test_features_are_those_of_corrupted_images_and_never_cached(images, tmp_path):
    encoder = Encoder(torch.nn.Flatten(), 16, (0.0,) * 3, (1.0,) * 3, "flatten")
    corrupted = Generated(images, Selection(), 16).read("fog", 3)
    features, labels = extract(encoder, corrupted, batch_size=4, progress=False)
    numbers = np.flatnonzero(images.labels >= 0)
    expected = np.stack(one_by_one(images, numbers, "fog", 3)).transpose(0, 3, 1, 2).reshape(len(numbers), -1) / 255
    np.testing.assert_allclose(features, expected, atol=1e-6)
    assert labels.tolist() == images.labels[numbers].tolist()
    with pytest.raises(AttributeError, match="images"):
        extract(encoder, corrupted, cache=tmp_path)
    assert isinstance(corrupted, CorruptedImages)


# Published sets


@pytest.fixture
def arrays(images, tmp_path) -> Path:
    labeled = images.subset(images.labels >= 0)
    make_c(labeled.images, labeled.labels, tmp_path / "c", "cifar", seed=7, names=["fog"], progress=False)
    return tmp_path / "c"


def test_published_arrays(images, arrays):
    labeled = images.subset(images.labels >= 0)
    published = Published(arrays, labeled, Selection(classes=[1]))
    read = published.read("fog", 4)
    assert read.labels.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(read.images, one_by_one(labeled, [2, 4, 7], "fog", 4, seed=7))
    assert published.origin() == {
        "source": "published",
        "preset": "cifar",
        "seed": 7,
        "frost_source": frost_source(),
    }


def test_published_arrays_in_another_order(images, arrays):
    (arrays / "meta.json").unlink()
    shuffled = images.subset(np.random.default_rng(0).permutation(12))
    published = Published(arrays, shuffled, Selection(count=6))
    assert published.origin() == {"source": "published"}
    assert np.bincount(published.read("fog", 1).labels).tolist() == [3, 2, 1]


def test_published_labels_that_do_not_fit(images, arrays):
    np.save(arrays / "labels.npy", np.tile([2, 0, 1, 0, 1, 2, 0, 1, 0, 0, 3], 5))
    with pytest.raises(ValueError, match="do not fit insects/test: it has 5 images of class 0, not 6; --data must be"):
        Published(arrays, images, Selection()).read("fog", 1)


def test_published_files_that_are_damaged_or_missing(images, arrays, tmp_path):
    published = Published(arrays, images, Selection())
    (arrays / "snow.npy").write_bytes((arrays / "fog.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"snow\.npy is damaged"):
        published.read("snow", 1)
    with pytest.raises(FileNotFoundError, match=r"frost\.npy'; corruptions there: fog, snow"):
        published.read("frost", 1)
    (arrays / "meta.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match=r"meta\.json is damaged, or not by make_c: KeyError\('preset'\)"):
        published.origin()
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere' of published corruptions"):
        Published(tmp_path / "nowhere", images, Selection())


def test_the_fingerprint_follows_the_files(images, arrays):
    published = Published(arrays, images, Selection())
    before = published.fingerprint()
    assert Published(str(arrays), images, Selection()).fingerprint() == before
    np.save(arrays / "fog.npy", np.zeros((55, 16, 16, 3), np.uint8))
    assert published.fingerprint() != before


def imagenet_c(root: Path, counts: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        folder = root / "fog" / "2" / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (number, i, 0)).save(folder / f"{i}.png")
    return root


def test_published_folders_are_matched_by_class_name(images, tmp_path):
    test = replace(images, classes=("wasp", "cat", "ant"))  # the order on disk is ant, cat, wasp
    root = imagenet_c(tmp_path / "c", {"ant": 2, "cat": 3, "wasp": 6})
    read = Published(root, test, Selection(classes=[0, 2])).read("fog", 2)
    assert sorted(zip(read.labels.tolist(), (path.parent.name for path in read.images), strict=True)) == [
        *[(0, "wasp")] * 6,
        *[(2, "ant")] * 2,
    ]
    assert read.pixels(16).shape == (8, 3, 16, 16)
    with pytest.raises(FileNotFoundError, match="no folder '.*fog/3'; ImageNet-C is <root>/<corruption>/<severity>/"):
        Published(root, test, Selection()).read("fog", 3)


def test_published_folders_of_other_classes(images, tmp_path):
    root = imagenet_c(tmp_path / "c", {"ant": 6, "bee": 3, "dog": 2})
    with pytest.raises(ValueError, match="has a class 'dog', which insects/test has not"):
        Published(root, images, Selection()).read("fog", 2)
    root = imagenet_c(tmp_path / "d", {"ant": 6, "bee": 3})
    with pytest.raises(ValueError, match="it has 0 images of class 2, not 2"):
        Published(root, images, Selection()).read("fog", 2)


# Measuring


@pytest.fixture(scope="module")
def classifiers() -> Classifiers:
    rng = np.random.default_rng(0)
    labels = torch.tensor([4, 7]).repeat(30)
    features = torch.from_numpy(rng.normal(size=(60, 5)) + labels[:, None].numpy() / 4).float()
    weight, bias = torch.from_numpy(rng.normal(size=(2, 5))).float(), torch.tensor([0.1, -0.2])
    probe = LinearProbe(torch.tensor([4, 7]), weight, bias, learning_rate=0.3, validation={})
    return Classifiers(probe, features, labels, k=9, temperature=0.1)


def test_accuracies_against_numpy_and_scikit_learn(classifiers):
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(40, 5)).astype(np.float32) + 1, rng.choice([4, 7], 40)
    linear, knn = classifiers.measure(torch.from_numpy(features), torch.from_numpy(labels))
    guesses = np.array([4, 7])[(features @ classifiers.probe.weight.numpy().T + [0.1, -0.2]).argmax(1)]
    oracle = KNeighborsClassifier(9, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.1))
    nearest = oracle.fit(classifiers.features.double(), classifiers.labels).predict(features.astype(np.float64))
    for measured, right in ((linear, guesses == labels), (knn, nearest == labels)):
        assert (measured.metric, measured.n) == ("accuracy", 40)
        assert measured.interval.value == right.mean()
        wilson = binomtest(int(right.sum()), 40).proportion_ci(0.95, method="wilson")
        assert measured.interval[1:] == pytest.approx((wilson.low, wilson.high), abs=1e-9)
    assert (linear.score, linear.params) == ("linear", {"learning_rate": 0.3})
    assert (knn.score, knn.params) == ("knn", {"k": 9, "temperature": 0.1})


def test_open_set_scores_against_scikit_learn(classifiers):
    rng = np.random.default_rng(2)
    labels = np.array([4, 7, 1, 2, 3] * 8)
    features = rng.normal(size=(40, 5)) + labels[:, None] / 4
    measured = replace(classifiers, open_set=True).measure(torch.from_numpy(features).float(), torch.from_numpy(labels))
    numbers = {number.score: number for number in measured}
    known = np.isin(labels, [4, 7])
    assert [numbers[score].n for score in ("linear", "knn")] == [16, 16]

    logits = features @ classifiers.probe.weight.double().numpy().T + [0.1, -0.2]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (classifiers.features.double().numpy(), features)]
    distance = NearestNeighbors(n_neighbors=50).fit(unit[0]).kneighbors(unit[1])[0][:, -1]
    for score, values in (("max_logit", logits.max(1)), ("knn_distance", -distance)):
        assert (numbers[score].metric, numbers[score].n) == ("auroc", 40)
        value, low, high = numbers[score].interval
        assert value == pytest.approx(roc_auc_score(known, values), abs=1e-9)
        assert 0 <= low < value < high <= 1
    assert numbers["knn_distance"].params == {"k": 50}


def test_a_class_that_was_not_trained_on_is_an_error_in_a_closed_set(classifiers):
    with pytest.raises(ValueError, match=r"labels must be among the classes of the training features, got \[5\]"):
        classifiers.measure(torch.zeros(2, 5), torch.tensor([4, 5]))


# Means


def make_rows(
    errors: dict[str, list[float]], clean_error: float = 0.1, scores=("linear", "knn"), **params
) -> list[Row]:
    """Rows in a shuffled order, of accuracy; `knn` errs half as often."""

    def row(score: str, metric: str, error: float, **params: object) -> Row:
        error = error / 2 if score == "knn" else error
        return Row("corruption", "x", "test", None, "mine", "backbone", score, metric, 1 - error, 0, 1, 50, params)

    rows = [row(score, "clean_accuracy", clean_error, **params) for score in CLASSIFIERS] + [
        row(score, "accuracy", error, corruption=name, severity=severity, group="any", **params)
        for score in CLASSIFIERS
        for name, values in errors.items()
        for severity, error in enumerate(values, start=1)
    ]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    return {name: rng.uniform(0.2, 0.9, 5).tolist() for name in COMMON + EXTRA}


def found(summary: list[Row], score: str, metric: str, **params) -> float:
    (row,) = [
        row for row in summary if (row.score, row.metric) == (score, metric) and params.items() <= row.params.items()
    ]
    return row.value


def test_means_against_loops(errors):
    summary, remarks = summarize(make_rows(errors, preset="cifar", seed=3))
    assert remarks == []
    for score, factor in (("linear", 1), ("knn", 0.5)):
        total = 0.0
        for name in COMMON:
            total += sum(errors[name]) / 5
        value = found(summary, score, "mean_corruption_error", corruptions=15, preset="cifar", seed=3)
        assert value == pytest.approx(factor * total / 15, abs=1e-12)
        for group, members in {**GROUPS, "extra": EXTRA}.items():
            expected = sum(sum(errors[name]) for name in members) / 5 / len(members)
            value = found(summary, score, "group_corruption_error", group=group, corruptions=len(members))
            assert value == pytest.approx(factor * expected, abs=1e-12)
    assert {row.metric for row in summary} == {"mean_corruption_error", "group_corruption_error"}
    assert all((row.ci_low, row.ci_high, row.n) == (None, None, 50) for row in summary)
    assert not any({"corruption", "severity"} & row.params.keys() for row in summary)


def test_a_part_of_the_corruptions(errors):
    summary, _ = summarize(make_rows({"fog": errors["fog"], "saturate": errors["saturate"]}))
    value = found(summary, "linear", "mean_corruption_error", corruptions=1)
    assert value == pytest.approx(np.mean(errors["fog"]), abs=1e-12)
    groups = [row.params["group"] for row in summary if (row.score, row.metric) == ("linear", "group_corruption_error")]
    assert groups == ["weather", "extra"]


def test_extra_corruptions_alone_have_no_overall_mean(errors):
    summary, _ = summarize(make_rows({"saturate": errors["saturate"]}), ALEXNET)
    assert [(row.metric, row.params["group"]) for row in summary] == [("group_corruption_error", "extra")] * 2


def test_ratios_to_alexnet_against_loops(errors):
    summary, remarks = summarize(make_rows(errors, clean_error=0.15), ALEXNET)
    mce, relative = [], []
    for name in COMMON:
        mce.append(sum(errors[name]) / (5 * ALEXNET.errors["linear"][name]))
        relative.append(sum(e - 0.15 for e in errors[name]) / (5 * (ALEXNET.errors["linear"][name] - 0.435)))
    assert found(summary, "linear", "mce", baseline="alexnet") == pytest.approx(np.mean(mce), abs=1e-12)
    assert found(summary, "linear", "relative_mce", baseline="alexnet") == pytest.approx(np.mean(relative), abs=1e-12)
    assert found(summary, "knn", "mce") == pytest.approx(np.mean(mce) / 2, abs=1e-12)
    assert remarks == []


def test_a_ratio_that_cannot_be_had_is_remarked(errors):
    some = {"fog": errors["fog"], "snow": errors["snow"]}
    faultless = {score: {"fog": [0.2] * 5, "snow": [0.0] * 5} for score in ("linear", "knn")}
    summary, remarks = summarize(make_rows(some), Baseline("y", faultless, {"linear": 0.2, "knn": 0.1}))
    assert not {"mce", "relative_mce"} & {row.metric for row in summary}
    assert [remark.partition(":")[0] for remark in remarks] == [
        *["no mce of linear against y", "no relative_mce of linear against y"],
        *["no mce of knn against y", "no relative_mce of knn against y"],
    ]
    assert "must be above 0 to divide by, got 0 for snow" in remarks[0]


def test_mean_auroc_counts_common_corruptions_alone(errors):
    rows = make_rows({name: errors[name] for name in ("fog", "glass_blur", "spatter")})
    rows += [
        replace(row, score="max_logit", metric=row.metric.replace("accuracy", "auroc"), value=row.value / 2, n=80)
        for row in rows
        if row.score == "linear"
    ]
    summary, _ = summarize(rows)
    expected = (10 - sum(errors["fog"]) - sum(errors["glass_blur"])) / 10 / 2
    assert found(summary, "max_logit", "mean_corruption_auroc", corruptions=2) == pytest.approx(expected, abs=1e-12)
    assert {row.n for row in summary if row.score == "max_logit"} == {80}


# The baseline


IMAGES = {"name": "x/test", "count": 50, "n_classes": 10, "preset": "cifar"}


def test_a_run_is_its_own_unit(errors, tmp_path):
    rows = make_rows(errors)
    written = [row for row in rows if row.params.get("corruption") not in EXTRA]
    write_rows(tmp_path / "eval" / "corruption.json", written, {"images": {**IMAGES, "more": 1}})
    for where in (tmp_path, tmp_path / "eval", tmp_path / "eval" / "corruption.json"):
        baseline = read_baseline(str(where), COMMON + EXTRA[:1], IMAGES)
        assert baseline.name == "mine"
        assert baseline.clean_error == pytest.approx({"linear": 0.1, "knn": 0.05})
        summary, _ = summarize(rows, baseline)
        for score in ("linear", "knn"):
            for metric in ("mce", "relative_mce"):
                assert found(summary, score, metric) == pytest.approx(1, abs=1e-12)


def test_baselines_that_will_not_do(errors, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the baseline has no '.*none/eval/corruption\.json': run eval/"):
        read_baseline(str(tmp_path / "none"), [], {})
    written = tmp_path / "corruption.json"
    write_rows(written, make_rows({"fog": errors["fog"]}), {"images": {**IMAGES, "preset": "imagenet", "count": 7}})
    with pytest.raises(ValueError, match=r"is of other images: count 7, not 50; preset 'imagenet', not 'cifar'"):
        read_baseline(str(tmp_path), ["fog"], IMAGES)
    write_rows(written, make_rows({"fog": errors["fog"]}), {"images": IMAGES})
    with pytest.raises(ValueError, match=r"corruption\.json lacks snow, frost: evaluate them there too, or not here"):
        read_baseline(str(tmp_path), ["snow", "frost", "fog"], IMAGES)
    written.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="is no file of result rows"):
        read_baseline(str(tmp_path), ["fog"], IMAGES)


def test_alexnet_is_for_imagenet():
    assert read_baseline("alexnet", COMMON, {"n_classes": 1000, "preset": "imagenet"}) is ALEXNET
    assert read_baseline("alexnet", COMMON, {"n_classes": 1000, "preset": None}) is ALEXNET
    for n_classes, preset in ((10, "imagenet"), (1000, "cifar")):
        with pytest.raises(ValueError, match=f"baseline alexnet is for .*, got {n_classes} classes and {preset}"):
            read_baseline("alexnet", COMMON, {"n_classes": n_classes, "preset": preset})
    with pytest.raises(ValueError, match="baseline alexnet is for .*, got some of 1000 classes and imagenet"):
        read_baseline("alexnet", COMMON, {"n_classes": 1000, "preset": "imagenet", "known_classes": [3, 5]})


# For a terminal


def test_tables(errors):
    rows = make_rows(errors)
    lines = severity_table(rows, "linear", "accuracy").splitlines()
    assert lines[0].split() == ["severity", "1", "2", "3", "4", "5", "mean"]
    assert lines[1].split() == ["clean", "images", "90.0"]
    assert [line.split()[0] for line in lines[2:]] == list(COMMON + EXTRA)
    fog = next(line for line in lines if line.startswith("fog")).split()
    assert [float(cell) for cell in fog[1:6]] == pytest.approx([100 * (1 - e) for e in errors["fog"]], abs=0.051)
    assert float(fog[6]) == pytest.approx(100 * (1 - np.mean(errors["fog"])), abs=0.051)
    assert len({len(line) for line in lines}) == 1, "columns must be aligned"

    summary, _ = summarize(rows, ALEXNET)
    lines = summary_table(summary).splitlines()
    assert lines[0].split() == ["linear", "knn"]
    expected = f"{found(summary, 'linear', 'mce'):.4f}", f"{found(summary, 'knn', 'mce'):.4f}"
    (line,) = [line for line in lines if line.startswith("mce against alexnet (15)")]
    assert tuple(line.split()[-2:]) == expected
