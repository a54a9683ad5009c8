from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from support import load_script, make_run, only, write_images

from ssl_gradmix.data.datasets import Data, load
from ssl_gradmix.data.open_set import ALL_CLASSES, KNOWN_ONLY
from ssl_gradmix.evaluation import results

ood = load_script("eval/ood.py")


def evaluate(run, *options):
    ood.main([str(run), "--epochs", "3", *options])


def test_each_unknown_data_set_has_its_files(run, tmp_path):
    write_images(tmp_path / "noise", ["one", "two"], count=6)
    write_images(tmp_path, ["plain"], count=5)
    sets = [{"name": "folder", "root": str(tmp_path / name)} for name in ("noise", "plain")]
    evaluate(run, "--unknown", json.dumps(sets))
    n_known = len(load(Data(), "test"))
    for name, count in (("noise", 12), ("plain", 5)):
        rows, about = results.read(run / "eval" / f"ood-{name}.json")
        samples = pd.read_csv(run / "eval" / f"ood-{name}.csv")
        is_known = samples["known"]
        assert (is_known.sum(), (~is_known).sum()) == (n_known, count)
        row = only(rows, "mahalanobis", "auroc", dataset=f"folder:{name}", split="all", trial=None)
        assert row["value"] == pytest.approx(roc_auc_score(is_known, samples["mahalanobis"]))
        assert row["n"] == n_known + count
        setting = {"known": "digits/test", "pretraining": KNOWN_ONLY, "n_known": 10}
        assert row["params"] == setting
        assert only(rows, "linear", "accuracy", dataset="digits")["n"] == n_known
        assert f"folder:{name}/all" in about["images"]
        assert (run / "eval" / f"ood-{name}.png").exists()


def test_unknown_classes_of_the_same_data_set(run):
    evaluate(
        run,
        "--data.classes",
        "[1, 2, 3]",
        "--unknown.name",
        "digits",
        "--unknown.classes",
        "['8', '9']",
    )
    rows, _ = results.read(run / "eval" / "ood-digits-8_9-1_2_3.json")
    samples = pd.read_csv(run / "eval" / "ood-digits-8_9-1_2_3.csv")
    assert set(samples["label"][samples["known"]]) == {1, 2, 3}
    assert set(samples["label"][~samples["known"]]) == {8, 9}
    assert set(samples["prediction"]) <= {1, 2, 3}
    assert set(results.param(rows, "classes")) == {"1, 2, 3"}
    assert set(results.param(rows, "pretraining")) == {ALL_CLASSES}


def test_copies_of_known_images_and_classes_of_both_sets_are_named(tmp_path, caplog):
    """Unknown images are two known test images, one known training image, and others."""
    for part in ("train", "test"):
        write_images(tmp_path / "known" / part, ["cat", "dog"], count=12, seed=len(part))
    write_images(tmp_path / "unknown", ["cat", "fish"], count=3, seed=9)
    for i, copied in enumerate(("test/cat/0.png", "test/dog/1.png", "train/dog/2.png")):
        shutil.copy(tmp_path / "known" / copied, tmp_path / "unknown" / "fish" / f"copy{i}.png")
    run = make_run(tmp_path / "run", name="folder", root=str(tmp_path / "known"))
    evaluate(run, "--unknown.name", "folder", "--unknown.root", str(tmp_path / "unknown"))
    _, about = results.read(run / "eval" / "ood-unknown.json")
    assert about["copies"] == {"folder:known/test": 0, "folder:unknown/all": 3}
    assert about["shared_classes"] == ["cat"]
    assert any("cat" in message for message in caplog.messages)
    assert any("3 of 9" in message for message in caplog.messages)
