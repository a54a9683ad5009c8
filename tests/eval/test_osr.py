from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from support import add_projector, load_script, make_run, only, records, write_images

from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.data.open_set import ALL_CLASSES, FURTHER_CLASSES, KNOWN_ONLY, Trial, split
from ssl_gradmix.evaluation import rows
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.probes import linear_probe
from ssl_gradmix.settings import Data

osr = load_script("eval/osr.py")

SCORES = [
    *("knn_distance", "top_k_cosine", "ncm", "ncm_euclidean", "mahalanobis", "rmd"),
    *("feature_norm", "vim", "msp", "max_logit", "energy"),
]
TEN = tuple("abcdefghij")


def call(run: Path, *arguments: str) -> int:
    return osr.main([str(run), "--epochs", "3", *arguments])


def evaluate(run: Path, *arguments: str, task: str = "osr", folder: Path | None = None):
    """Rows, what else the file says, and samples."""
    assert call(run, *arguments, *(["--out", str(folder)] if folder else [])) == 0
    found, about = rows.read((folder or run / "eval") / f"{task}.json")
    return found, about, load_file((folder or run / "eval") / f"{task}_samples.safetensors")


# From the command line


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Two trials on digits: the run, what was written, and what was printed."""
    run, printed = make_run(tmp_path_factory.mktemp("runs") / "mine"), io.StringIO()
    with redirect_stdout(printed):
        found, about, _ = evaluate(run, "--trials", "[random:6:0, random:6:3]", "--k", "7")
    arrays = osr.Samples.read(run / "eval" / "osr_samples.safetensors").arrays
    return run, found, about, arrays, printed.getvalue()


def test_a_trial_against_the_same_done_by_hand(digits):
    """What the known classes' training images alone say about all test images."""
    run, found, about, arrays, _ = digits
    known, samples = sorted(np.random.default_rng(0).permutation(10)[:6].tolist()), arrays["random:6:0"]
    encoder = load_encoder(run)
    (train, labels), (test, test_labels) = (extract(encoder, load(Data(), part)) for part in ("train", "test"))
    train, labels = train[np.isin(labels, known)], labels[np.isin(labels, known)]
    order = np.argsort(~np.isin(test_labels, known), kind="stable")
    test, test_labels = test[order], test_labels[order]
    is_known = np.isin(test_labels, known)
    assert samples["labels"].tolist() == test_labels.tolist()
    assert samples["is_known"].tolist() == is_known.tolist()
    unit = [each.double() / each.double().norm(dim=1, keepdim=True) for each in (train, test)]
    distance = NearestNeighbors(n_neighbors=7).fit(unit[0]).kneighbors(unit[1])[0][:, -1]
    np.testing.assert_allclose(samples["knn_distance"], -distance, atol=1e-9)
    probe = linear_probe(train, labels, epochs=3)
    logits = test @ probe.weight.T + probe.bias
    np.testing.assert_allclose(samples["max_logit"], logits.amax(1), atol=1e-5)
    correct = is_known & (probe.classes[logits.argmax(1)] == test_labels).numpy()
    assert samples["correct"].tolist() == correct.tolist()

    row = only(found, "linear", "accuracy", trial=0, learning_rate=probe.learning_rate, epochs=3, seed=0)
    assert (row["value"], row["n"]) == (pytest.approx(correct.sum() / is_known.sum()), is_known.sum())
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    accuracy = oracle.fit(train.double(), labels).score(test[is_known].double(), test_labels[is_known])
    row = only(found, "knn", "accuracy", trial=0, k=20, temperature=0.07)
    assert row["value"] == pytest.approx(accuracy, abs=1.1 / row["n"])
    assert about["groups"].keys() == {"random:6:0", "random:6:3"}
    assert about["groups"]["random:6:0"]["known"] == known
    assert about["encoder"]["fingerprint"] == encoder.fingerprint


def test_metrics_equal_independent_ones(digits):
    _, found, _, arrays, _ = digits
    samples = arrays["random:6:0"]
    known = samples["is_known"]
    assert {*samples} - {"is_known", "correct", "labels"} == {*SCORES}
    for score in SCORES:
        s, u = samples[score][known], samples[score][~known]
        accepting = max(t for t in s if np.mean(s >= t) >= 0.95)
        rejecting = min(t for t in u if np.mean(u <= t) >= 0.95)
        pairs = (s[:, None] > u) + 0.5 * (s[:, None] == u)
        expected = {
            "auroc": roc_auc_score(known, samples[score]),
            "aupr_in": average_precision_score(known, samples[score]),
            "aupr_out": average_precision_score(~known, -samples[score]),
            "threshold_tpr95": accepting,
            "fpr95_id_pos": np.mean(u >= accepting),
            "fpr95_ood_pos": np.mean(s <= rejecting),
            "oscr": (pairs * samples["correct"][known][:, None]).mean(),
        }
        of_score = found[(found["score"] == score) & (found["trial"] == 0)]
        assert dict(zip(of_score["metric"], of_score["value"], strict=True)) == pytest.approx(expected, abs=1e-9)
        for row in records(of_score):
            if row["metric"] == "threshold_tpr95":
                assert (row["ci_low"], row["ci_high"], row["n"]) == (None, None, known.sum())
            else:
                assert row["ci_low"] <= row["value"] <= row["ci_high"]
                assert row["n"] == len(known)


def test_rows_say_what_they_depend_on(digits):
    _, found, _, _, printed = digits
    means = found[found["trial"].isna()]
    assert (len(found) - len(means), len(means)) == (2 * (2 + 11 * 7), 2 + 11 * 6)
    for name, value in (("task", "osr"), ("dataset", "digits"), ("split", "test"), ("encoder", "mine")):
        assert set(found[name]) == {value}
    setting = {"protocol": "random", "pretraining": ALL_CLASSES, "n_known": 6}
    of_probe = only(found, "linear", "accuracy", trial=0)["params"]
    training = {name: of_probe[name] for name in ("learning_rate", "epochs", "seed")}
    expected = {"knn_distance": {"k": 7}, "top_k_cosine": {"k": 3}, "max_logit": training, "mahalanobis": {}}
    for score, params in (expected | {"vim": {"dim": 16, **training}}).items():
        assert only(found, score, "auroc", trial=0)["params"] == params | setting
        assert only(found, score, "oscr", trial=0)["params"] == params | setting | training  # it asks the probe too

    for row in records(means):
        values = [only(found, row["score"], row["metric"], trial=trial)["value"] for trial in (0, 3)]
        assert row["value"] == pytest.approx(np.mean(values))
        assert row["params"]["std"] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
        assert row["params"]["trials"] == [0, 3]
        assert setting.items() <= row["params"].items()
    mean = only(found, "vim", "auroc", trial=None)
    assert re.search(rf"^vim +{mean['value']:.4f} ± {mean['params']['std']:.4f} ", printed, re.MULTILINE)
    assert "over trials [0, 3]" in printed
    assert "mine on digits/test, encoder pretrained on: all classes, unlabeled" in printed
    assert "random:6:0: known are 2, 3, 4, 5, 6, 7; unknown ones from digits/test" in printed


@pytest.mark.parametrize(
    ("data", "trial", "protocol", "known"),
    [
        ({"open_set": "random:4:2"}, 2, "random", np.random.default_rng(2).permutation(10)[:4].tolist()),
        ({"classes": [1, 3, 5, 7, 9]}, 0, "data.classes", [1, 3, 5, 7, 9]),
    ],
)
def test_a_run_of_known_classes_is_evaluated_on_its_own_trial(tmp_path, capsys, data, trial, protocol, known):
    run = make_run(tmp_path / "known", **data)
    found, about, _ = evaluate(run)
    assert set(found["trial"]) == {trial}
    assert {(params["protocol"], params["pretraining"]) for params in found["params"]} == {(protocol, KNOWN_ONLY)}
    (group,) = about["groups"].values()
    assert (set(group["known"]), set(group["unknown"])) == (set(known), set(range(10)) - set(known))
    assert len(list((run / "eval" / "features").iterdir())) == 2

    written = (run / "eval" / "osr.json").read_bytes()
    assert call(run, "--trials", "random:4") == 2
    assert "was pretrained on the classes" in capsys.readouterr().err
    assert (run / "eval" / "osr.json").read_bytes() == written


def test_a_repeated_trial_is_scored_once_and_said(run, capsys):
    found, about, samples = evaluate(run, "--trials", "[svhn:0, svhn:1, svhn:4]")
    assert "svhn:1 is left out, as it has the known classes of svhn:0" in capsys.readouterr().out
    assert set(found["trial"].dropna()) == {0, 4}
    assert about["groups"].keys() == {key.split("/")[0] for key in samples} == {"svhn:0", "svhn:4"}
    mean = only(found, "vim", "auroc", trial=None)
    assert mean["value"] == pytest.approx(np.mean([only(found, "vim", "auroc", trial=t)["value"] for t in (0, 4)]))
    of_trials = [only(found, "vim", "auroc", trial=trial)["n"] for trial in (0, 4)]
    assert min(of_trials) <= mean["n"] <= max(of_trials)


def test_another_trial_and_other_options_are_added(run, tmp_path):
    first, about, samples = evaluate(run, "--trials", "random:6:0")
    evaluate(run, "--trials", "random:6:1")
    found, about, after = evaluate(run, "--trials", "random:6:0", "--top_k", "2")
    assert all(row in records(found) for row in records(first))
    assert set(found["trial"]) == {0, 1}
    assert only(found, "top_k_cosine", "auroc", trial=0, k=2)["n"] == 359
    assert about["groups"].keys() == {"random:6:0", "random:6:1"}
    assert after.keys() == samples.keys(), "samples of other options are replaced"
    _, _, both = evaluate(run, "--trials", "random:6:1", "--top_k", "2")
    assert {key.split("/")[0] for key in both} == {"random:6:0", "random:6:1"}
    assert all(np.array_equal(both[key], after[key]) for key in after)


def test_cifar_plus_n_takes_unknown_classes_from_another_folder(run, tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / "ten" / part, [f"class{i}" for i in range(10)], count=4)
        write_images(tmp_path / "hundred" / part, [f"class{i:02}" for i in range(100)])
    data = f"--data.name folder --data.root {tmp_path / 'ten'} --trials cifar+10:4 "
    data += f"--unknown.name folder --unknown.root {tmp_path / 'hundred'}"
    found, _, samples = evaluate(run, *data.split(), folder=tmp_path / "out")
    known, unknown = split("cifar+10", 4)
    labels, is_known = samples["cifar+10:4/labels"], samples["cifar+10:4/is_known"].astype(bool)
    assert sorted(labels[is_known]) == sorted(known * 4)
    assert sorted(labels[~is_known]) == sorted(unknown * 2)
    assert set(found["dataset"]) == {"folder:ten"}
    assert set(rows.param(found, "unknown")) == {"folder:hundred/test"}
    assert set(rows.param(found, "pretraining")) == {"other data (digits)"}


def test_other_data_sets_together_and_one_by_one(run, tmp_path, capsys):
    write_images(tmp_path / "noise", ["one", "two"], count=6)
    write_images(tmp_path, ["plain"], count=5)
    sets = [{"name": "folder", "root": str(tmp_path / name)} for name in ("noise", "plain")]
    found, about, samples = evaluate(run, "--unknown", json.dumps(sets), task="ood")
    n_known = len(load(Data(), "test"))
    for name, count in (("folder:noise", 12), ("folder:plain", 5)):
        is_known = samples[f"{name}/is_known"].astype(bool)
        assert (is_known.sum(), (~is_known).sum()) == (n_known, count)
        row = only(found, "mahalanobis", "auroc", dataset=name, trial=None)
        assert row["value"] == pytest.approx(roc_auc_score(is_known, samples[f"{name}/mahalanobis"]), abs=1e-9)
        assert (row["task"], row["split"], row["n"]) == ("ood", "all", n_known + count)
        assert row["params"] == {"known": "digits/test", "pretraining": KNOWN_ONLY, "n_known": 10}
    accuracies = found[found["metric"] == "accuracy"]
    assert [*accuracies["score"], *accuracies["dataset"], *accuracies["n"]] == [
        *("linear", "knn", "digits", "digits", n_known, n_known)
    ]
    assert {group["unknown_from"] for group in about["groups"].values()} == {"folder:noise/all", "folder:plain/all"}
    assert sorted(path.name for path in (run / "eval").glob("o*")) == ["ood.json", "ood.png", "ood_samples.safetensors"]
    assert "folder:plain, with 95% intervals" in capsys.readouterr().out

    out = tmp_path / "out"
    for each in sets:
        alone, about_alone, samples_alone = evaluate(run, "--unknown", json.dumps([each]), task="ood", folder=out)
    assert sorted(map(str, records(alone))) == sorted(map(str, records(found)))
    assert about_alone["groups"] == about["groups"]
    assert samples_alone.keys() == samples.keys()
    Image.new("RGB", (9, 9)).save(tmp_path / "noise" / "one" / "more.png")
    again, about_again, samples_again = evaluate(run, "--unknown", json.dumps(sets[:1]), task="ood", folder=out)
    assert only(again, "vim", "auroc", dataset="folder:noise")["n"] == n_known + 13
    assert only(again, "vim", "auroc", dataset="folder:plain")["n"] == n_known + 5
    assert about_again["groups"].keys() == about["groups"].keys()
    assert samples_again.keys() == samples.keys()


def test_two_runs_compare_on_the_same_samples(run, tmp_path, capsys):
    other = make_run(tmp_path / "runs" / "other", seed=1)
    theirs, _, _ = evaluate(other, "--trials", "[random:6:0, random:6:1]")
    found, _, _ = evaluate(run, "--trials", "[random:6:0, random:6:1, random:6:2]", "--compare", str(other))
    assert "this run minus the other, mean ± standard deviation over trials [0, 1]" in capsys.readouterr().out
    compared = found[found["metric"].str.endswith("_difference")]
    differences = records(compared[compared["trial"].notna()])
    assert len(differences) == 2 * 11 * 2
    for row in differences:
        metric = row["metric"].removesuffix("_difference")
        ours, others = (only(of, row["score"], metric, trial=row["trial"])["value"] for of in (found, theirs))
        assert row["value"] == pytest.approx(ours - others, abs=1e-9)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert 0 < row["params"]["p_value"] <= 1
        assert row["params"]["compared_with"] == "other"
    mean = only(found, "vim", "auroc_difference", trial=None)
    assert mean["params"]["trials"] == [0, 1]
    assert "p_value" not in mean["params"]

    evaluate(run, "--trials", "[random:6:1, random:6:2]", "--compare", str(other))
    assert "this run minus the other, with 95% intervals" in capsys.readouterr().out


def test_projectors_compare_with_projectors(run, tmp_path, capsys):
    other = add_projector(make_run(tmp_path / "runs" / "other", seed=1))
    of_projector = ["--trials", "random:6:0", "--feature", "projector"]
    evaluate(other, "--trials", "random:6:0")
    assert call(add_projector(run), *of_projector, "--compare", str(other)) == 2
    assert "there is no" in capsys.readouterr().err
    assert not (run / "eval").exists()
    for each, compare in ((other, []), (run, ["--compare", str(other)])):
        assert call(each, *of_projector, *compare) == 0
    found, theirs = (rows.read(each / "eval" / "projector" / "osr.json")[0] for each in (run, other))
    assert {*found["feature"], *theirs["feature"]} == {"projector"}
    expected = only(found, "vim", "auroc")["value"] - only(theirs, "vim", "auroc")["value"]
    assert only(found, "vim", "auroc_difference")["value"] == pytest.approx(expected, abs=1e-9)
    assert "mine (projector) on digits/test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "[random:6:0, random:4:1]"], "trials must be of one split, .* got random:4 and random:6"),
        (["--trials", "cifar10"], "digits does not number its classes as cifar10 does"),
        (["--unknown.name", "digits"], "unknown: digits/test has images of the known classes"),
        (["--unknown.name", "mnist", "--unknown.root", "{run}"], "unknown: mnist is not in data.root"),
        (["--unknown.name", "folder", "--unknown.root", "{empty}"], "unknown: no image in the folder '.*empty'"),
        (["--unknown.name", "digits", "--trials", "random"], "unknown goes with the trials cifar.10 or cifar.50"),
        (["--compare", "{run}"], "there is no .*/eval/osr_samples.safetensors: evaluate that run in the same"),
        (["--data.name", "folder", "--data.root", "{flat}"], "has no labels"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, message):
    write_images(tmp_path, ["flat"], count=3)
    (tmp_path / "empty").mkdir()
    filled = [argument.format(run=run, flat=tmp_path / "flat", empty=tmp_path / "empty") for argument in arguments]
    assert call(run, *filled) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{message}", line)
    assert not [path for path in run.glob("eval/*") if path.name != "features"]


def test_more_neighbors_than_there_are_may_not_be_asked_for():
    labels = np.array([3, 3, 8, 8, 8])
    osr.Options().check(labels)  # 50 and 3, to be clamped
    osr.Options(k=5, top_k=2).check(labels)
    for options, message in (
        ({"k": 6}, "k must be from 1 to 5, the training images of all known classes, got 6"),
        ({"top_k": 3}, "top_k must be from 1 to 2, those of the smallest known class, got 3"),
        ({"k": 0}, "k must be from 1 to 5, .* got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            osr.Options(**options).check(labels)


# What is told apart


def image_set(labels, name="toy/test", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (len(labels), 4, 4, 3), dtype=np.uint8)
    return ImageSet(pixels, np.asarray(labels, np.int64), TEN, name)


def group_of(trial, images):
    return osr.trial_group(trial, Data("folder", "toy"), images, images, None)


@pytest.mark.parametrize("same", [True, False])
def test_a_trial_picks_what_a_loop_picks(same):
    rng = np.random.default_rng(0)
    test = image_set(rng.integers(0, 6, 30))
    images = test if same else image_set(rng.integers(0, 9, 20), "cifar100/test")
    name = "random:2:3" if same else "cifar+10:3"
    group = osr.trial_group(Trial(name, (4, 1), (0, 5)), Data("folder", "toy"), test, images, None)
    assert (group.name, group.trial, group.params["n_known"]) == (name, 3, 2)
    assert group.params.get("unknown") == (None if same else "cifar100/test")

    def labeled(part, offset):
        return torch.arange(len(part)).float()[:, None] + offset, torch.from_numpy(part.labels)

    offset = 100 if same else 200
    (tested, labels), is_known = group.select(labeled(test, 100), labeled(images, offset))
    known = [(100 + i, label, True) for i, label in enumerate(test.labels) if label in (1, 4)]
    unknown = [(offset + i, label, False) for i, label in enumerate(images.labels) if label in (0, 5)]
    assert list(zip(tested[:, 0].tolist(), labels.tolist(), is_known.tolist(), strict=True)) == known + unknown


@pytest.mark.parametrize(
    ("known", "unknown", "message"),
    [
        ((0, 1), (5,), "random:2:0: toy/test has no image of an unknown class"),
        ((0, 2), (1,), r"toy/train has no image of the known classes \[2\]"),
        ((3, 4), (2,), r"toy/test has no image of the known classes \[3, 4\]"),
    ],
)
def test_missing_images_are_refused(known, unknown, message):
    train, test = image_set([0, 0, 1, 3, 4], "toy/train"), image_set([0, 1, 2])
    group_of(Trial("random:2:0", (0, 1), (2,)), test).check(train, test)
    with pytest.raises(ValueError, match=message):
        group_of(Trial("random:2:0", known, unknown), test).check(train, test)


def test_fingerprint_tells_samples_apart():
    test, trial = image_set([0, 1, 2, 2]), Trial("random:2:0", (0, 1), (2,))
    alike, other = ([image_set([0, 1, 2, 2])], [image_set([0, 1, 2, 2], seed=1), test.subset([1, 0, 2, 3])])
    first, *alike, edited, turned = (group_of(trial, each).fingerprint(each) for each in (test, *alike, *other))
    another_trial = group_of(Trial("random:2:0", (0, 2), (1,)), test).fingerprint(test)
    assert alike == [first]
    assert len({first, edited, turned, another_trial}) == 4


def test_unknown_images_are_the_test_images_or_all_where_there_are_none(tmp_path):
    folder = write_images(tmp_path / "classes", "abc", count=5)
    everything = osr.load_unknown(Data("folder", str(folder)))
    assert sorted(everything.images) == sorted(folder.rglob("*.png"))
    assert [path.parent.name for path in everything.images] == ["abc"[label] for label in everything.labels]
    assert len(osr.load_unknown(Data("folder", str(folder), classes=["b"]))) == 5
    for part, count in (("train", 4), ("test", 3)):
        write_images(tmp_path / "split" / part, "ab", count)
    held_out = osr.load_unknown(Data("folder", str(tmp_path / "split")))
    assert (len(held_out), held_out.name) == (6, "folder:split/test")


def test_what_an_encoder_saw_of_other_sets(tmp_path):
    noise = Data("folder", str(write_images(tmp_path / "noise", "ab")))
    others, config = [noise, Data(classes=[8, 9])], {"data": {"name": "digits"}}
    first, second = osr.set_groups(Data(classes=[1, 2, 3]), load(Data(), "test"), config, others)
    assert (first.params["pretraining"], first.params["classes"]) == (FURTHER_CLASSES, "1, 2, 3")
    assert (second.name, second.params["pretraining"]) == ("digits", ALL_CLASSES)
    assert set(second.images.labels) == {8, 9}


@pytest.mark.parametrize(
    ("data", "others", "message"),
    [
        (Data(), [], r"at least one data set, and none twice, got \[\]"),
        (Data(), [Data("folder", "x/a"), Data("folder", "y/a")], "none twice, got"),
        (Data(classes=[1, 2]), [Data(classes=[2, 3])], "has images of the known classes"),
        (Data(classes=[1]), [Data(classes=[2])], r"at least two known classes are needed, digits/test has \['1'\]"),
    ],
)
def test_other_sets_that_make_no_sense_are_refused(data, others, message):
    with pytest.raises(ValueError, match=message):
        osr.set_groups(data, load(Data(), "test"), None, others)


def test_cifar100_must_be_told_and_have_its_classes(tmp_path):
    for data, others, message in (
        (Data("folder", "x"), None, "say where it is, as --unknown.name cifar100"),
        (Data("folder", "x"), [Data()], "digits/test has 10 classes, and CIFAR-100"),
        (Data("cifar10", str(tmp_path)), None, re.escape(f"unknown: cifar100 is not in data.root {str(tmp_path)!r}")),
    ):
        with pytest.raises(ValueError, match=message):
            osr.load_cifar100(data, others)


# Measuring


def trial_rows(metric, values, trials, **params):
    """A row a trial, of 10 images and as many more as its number."""
    return [
        rows.frame([rows.number("vim", metric, (v, v, v), 10 + t, **params)], "osr", "x/test", "e", "backbone", t)
        for v, t in zip(values, trials, strict=True)
    ]


def test_mean_and_spread_over_trials():
    shared = {"protocol": "cifar10", "k": 50}
    found = trial_rows("auroc", (0.5, 0.6, 0.9), (0, 2, 3), **shared)
    found += trial_rows("oscr", (0.3, 0.1, 0.2), (0, 2, 3), **shared)
    found += trial_rows("threshold_tpr95", (1.0, 2.0, 3.0), (0, 2, 3), **shared)
    found[1]["params"][0]["learning_rate"] = 0.1
    first, second = records(osr.over_trials(rows.joined(found)))
    assert [first[name] for name in ("trial", "metric", "ci_low", "ci_high")] == [None, "auroc", None, None]
    assert first["n"] == 12, "that of one trial: 10, 12 and 13 images"
    assert first["value"] == pytest.approx(np.mean([0.5, 0.6, 0.9]))
    std = np.sqrt(sum((v - 2 / 3) ** 2 for v in (0.5, 0.6, 0.9)) / 2)
    assert first["params"] == {**shared, "over": "trials", "std": pytest.approx(std), "trials": [0, 2, 3]}
    assert (second["metric"], second["value"]) == ("oscr", pytest.approx(0.2))


def test_p_values_are_not_averaged_nor_what_one_trial_has():
    found = trial_rows("auroc_difference", (0.1, 0.3), (0, 2), compared_with="other", p_value=0.002)
    (mean,) = records(osr.over_trials(rows.joined(found)))
    assert mean["value"] == pytest.approx(0.2)
    spread = {"over": "trials", "std": pytest.approx(np.sqrt(0.02)), "trials": [0, 2]}
    assert mean["params"] == {"compared_with": "other", **spread}
    assert osr.over_trials(found[0]).empty


def test_comparison_with_itself_and_with_a_worse_run(digits):
    arrays = digits[3]["random:6:0"]
    for same in osr.compare(arrays, arrays, "twin"):
        assert (same["value"], same["ci_low"], same["ci_high"], same["params"]["p_value"]) == (0, 0, 0, 1)

    known, rng = arrays["is_known"], np.random.default_rng(0)
    better = {**arrays, "vim": known + 0.5 * rng.normal(size=len(known))}
    worse = {
        **arrays,
        "vim": rng.normal(size=len(known)),
        "correct": arrays["correct"] & (rng.random(len(known)) < 0.5),
    }
    del worse["energy"]
    found = rows.frame(osr.compare(better, worse, "worse"))
    assert set(found["score"]) == {*SCORES} - {"energy"}
    difference = only(found, "vim", "auroc_difference")
    expected = roc_auc_score(known, better["vim"]) - roc_auc_score(known, worse["vim"])
    assert difference["value"] == pytest.approx(expected, abs=1e-9)
    assert difference["ci_low"] > 0.1
    assert difference["params"] == {"compared_with": "worse", "p_value": pytest.approx(2 / 1001)}
    ours, theirs = (
        ((arrays["vim"][known][:, None] > arrays["vim"][~known]) * arrays["correct"][known][:, None]).mean()
        for arrays in (better, worse)
    )
    assert only(found, "vim", "oscr_difference")["value"] == pytest.approx(ours - theirs, abs=1e-9)


def test_table_has_a_line_a_score():
    found = rows.frame(
        [
            rows.number("vim", "auroc", (0.75, 0.65, 0.85), 9),
            rows.number("vim", "oscr", (0.5, 0.4, 0.6), 9),
            rows.number("energy", "auroc", (0.25, 0.15, 0.35), 9, p_value=0.0421),
            rows.number("energy", "oscr", 0.5, 9, std=0.25),
            rows.number("msp", "auroc", (0.25, 0.15, 0.35), 9, p_value=2 / 1001),
            rows.number("msp", "oscr", 0.5, 9, std=0.25),
        ]
    )
    assert osr.score_table(found, {"auroc": "AUROC", "oscr": "OSCR"}).splitlines() == [
        "score   AUROC                                OSCR",
        "vim     0.7500 (0.6500 to 0.8500)            0.5000 (0.4000 to 0.6000)",
        "energy  0.2500 (0.1500 to 0.3500) p = 0.042  0.5000 ± 0.2500",
        "msp     0.2500 (0.1500 to 0.3500) p ≤ 0.002  0.5000 ± 0.2500",
    ]


# Samples on disk

ARRAYS = {
    "is_known": np.array([True, True, False]),
    "correct": np.array([True, False, False]),
    "labels": np.array([3, 1, 40]),
    "msp": np.array([1.0, 1 - 1e-12, 0.3]),
    "vim": np.array([0.1, -2.5, 1e-30]),
}
SETTINGS = {"k": 4, "top_k": None, "epochs": 5, "seed": 0}


@pytest.fixture
def samples():
    arrays = {"random:6:0": ARRAYS, "folder:x": {name: array[:2] for name, array in ARRAYS.items()}}
    return osr.Samples("mine", SETTINGS, {"random:6:0": "abc", "folder:x": "def"}, arrays)


def test_samples_survive_the_disk_exactly(samples, tmp_path):
    path = tmp_path / "deep" / "osr_samples.safetensors"
    samples.write(path)
    stored = load_file(path)
    assert sorted(stored) == sorted(f"{group}/{name}" for group in samples.arrays for name in ARRAYS)
    assert (stored["random:6:0/is_known"].dtype, stored["random:6:0/labels"].dtype) == (np.uint8, np.int64)
    read = osr.Samples.read(path)
    assert (read.encoder, read.settings, read.images) == (samples.encoder, samples.settings, samples.images)
    for name, array in samples.arrays["random:6:0"].items():
        assert read.arrays["random:6:0"][name].dtype == array.dtype
        assert np.array_equal(read.arrays["random:6:0"][name], array)


@pytest.mark.parametrize(
    ("images", "arrays", "message"),
    [
        ({"a": "abc", "b": "x"}, {"a": ARRAYS}, "it has arrays of a, but names a, b"),
        ({"a": "abc"}, {"a": ARRAYS | {"vim": np.zeros(2)}}, "a .* its arrays differ in length"),
        (["a"], {"a": ARRAYS}, "'list' object|dictionary update sequence"),
    ],
)
def test_samples_that_do_not_fit_together_are_refused(tmp_path, images, arrays, message):
    osr.Samples("theirs", SETTINGS, images, arrays).write(tmp_path / "osr_samples.safetensors")
    with pytest.raises(ValueError, match=f"is no file of open-set samples, or damaged: ({message})"):
        osr.Samples.read(tmp_path / "osr_samples.safetensors")


def test_other_samples_are_not_compared(samples):
    samples.check_comparable(osr.Samples("theirs", SETTINGS, {"random:6:0": "abc", "random:6:4": "ghi"}))
    for images, settings, message in (
        ({"random:6:1": "abc"}, SETTINGS, "evaluated on random:6:1, not random:6:0, folder:x"),
        ({"random:6:0": "other"}, SETTINGS, "the images of random:6:0 differ"),
        ({"random:6:0": "abc"}, SETTINGS | {"k": 5}, "was scored with .*'k': 5.*this with .*'k': 4"),
    ):
        with pytest.raises(ValueError, match=f"theirs .*{message}"):
            samples.check_comparable(osr.Samples("theirs", settings, images))
