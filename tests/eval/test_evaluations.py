"""What the scripts share: options, the data of a run, files of results, several processes."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml
from support import SIZE, add_projector, load_script, make_run, write_images

from ssl_gradmix import cli
from ssl_gradmix.data.datasets import Data, load
from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation import results
from ssl_gradmix.evaluation.encoders import load_encoder

SCRIPTS = ("linear_probe", "osr", "ood", "corruption", "reliance", "predict")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_options_of_signatures(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        load_script(f"eval/{script}.py").main(["--help"])
    text = capsys.readouterr().out
    assert f"python eval/{script}.py" in text
    for option in ("--data.name", "--feature", "--out", "--config", "--seed"):
        assert option in text


INVALID = [
    ("linear_probe", "", "encoder"),
    ("linear_probe", "{run}/nowhere", "nowhere"),
    ("linear_probe", "local-dir:{run}/backbone --out {run}/y", "data.name"),
    ("linear_probe", "local-dir:{run}/backbone --data.name digits", "out"),
    ("linear_probe", "{run} --lables 3", "lables"),
    ("linear_probe", "{run} --seed -1", "seed"),
    ("linear_probe", "{run} --batch_size 0", "batch_size"),
    ("linear_probe", "{run} --epochs 0", "epochs"),
    ("linear_probe", "{run} --k 0", "k"),
    ("linear_probe", "{run} --label_fractions [2]", "label_fractions"),
    ("linear_probe", "{run} --label_fractions [0.1,0]", "label_fractions"),
    ("linear_probe", "{run} --data.classes [3]", "data"),
    ("linear_probe", "{run} --out {run}/config.yaml", "config.yaml"),
    ("osr", "{run} --epochs 0", "epochs"),
    ("osr", "{run} --top_k 0", "top_k"),
    ("linear_probe", "{run} --feature projector", "projector"),
    ("osr", "{run} --data.name folder --data.root {run}/x", "data.root"),
    ("osr", "{run} --trials cifar10", "cifar10"),
    ("ood", "{run}", "unknown"),
    ("ood", "{run} --unknown.name digits", "unknown"),
    ("ood", "{run} --unknown.name foldr", "name"),
    ("ood", "{run} --unknown.name folder --unknown.root {run}/empty", "data.root"),
    ("corruption", "{run} --corruptions [smog]", "corruptions"),
    ("corruption", "{run} --workers 0", "workers"),
    ("corruption", "{run} --images 100000", "images"),
    ("corruption", "{run} --published {run}", "gaussian_noise"),
    ("corruption", "{run} --published {run}/nowhere", "nowhere"),
    ("predict", "{run}", "data.root"),
    ("predict", "{run} --data.root {run} --tpr 1", "tpr"),
    ("predict", "{run} --data.root {run} --score cosine", "score"),
    ("predict", "local-dir:{run}/backbone --data.root {run} --out {run}/out", "known"),
    ("reliance", "{run} --images 1", "images"),
    ("reliance", "{run} --part 1", "part"),
    ("reliance", "{run} --fill noise", "fill"),
    ("reliance", "{run} --layers [layer9]", "layer9"),
    ("reliance", "{run} --images 9 --layers [global_pool]", "global_pool"),
]


@pytest.mark.parametrize(("script", "options", "argument"), INVALID)
def test_invalid_input_is_one_line_and_writes_no_results(run, capsys, script, options, argument):
    main = load_script(f"eval/{script}.py").main
    assert cli.run(main, options.format(run=run).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert argument in line
    assert not list(run.glob("eval/**/*.*"))  # neither results nor features


def options_of(function, *argv):
    """The evaluation and its own options, as a script reads them."""
    return cli.evaluation(function, None, [str(each) for each in argv])


def evaluate(evaluation, *, k: int = 5, layers: list[str] | None = None) -> None:
    """Stands for the function of a script."""


def test_options_are_those_that_were_given(run, tmp_path):
    (tmp_path / "options.yaml").write_text("k: 3\nbatch_size: 7\ndata:\n  classes: [1, 2, 8]\n")
    evaluation, options = options_of(evaluate, run, "--config", tmp_path / "options.yaml")
    assert options == {"k": 3}
    assert evaluation.batch_size == 7
    assert evaluation.data.classes == ["1", "2", "8"]
    _, options = options_of(evaluate, run, "--layers", "[layer1]")
    assert options == {"layers": ["layer1"]}


def test_data_of_a_run_is_the_default(tmp_path):
    run = make_run(tmp_path / "known", classes=["3", "7"])
    evaluation, _ = options_of(evaluate, run)
    assert evaluation.data == Data(size=SIZE, classes=["3", "7"])
    assert evaluation.classes == {"classes": "3, 7"}
    assert set(evaluation.load("test").labels) == {3, 7}
    assert len(evaluation.load("test", Data())) == len(load(Data(), "test"))
    evaluation, _ = options_of(evaluate, run, "--data.open_set", "random:4:0")
    assert evaluation.data == Data(size=SIZE, open_set="random:4:0")
    assert evaluation.classes == {"classes": "random:4:0"}


def test_other_data_does_not_take_settings_of_the_run(tmp_path):
    run = make_run(tmp_path / "known", classes=["3", "7"])
    write_images(tmp_path / "pets" / "train", "ab", 3)
    folder = ["--data.name", "folder", "--data.root", tmp_path / "pets"]
    evaluation, _ = options_of(evaluate, run, *folder)
    assert evaluation.data == Data("folder", str(tmp_path / "pets"), SIZE)
    assert len(evaluation.load("train")) == 6


def test_images_without_labels_raise(run, tmp_path):
    write_images(tmp_path, ["flat"], 3)
    folder = ["--data.name", "folder", "--data.root", tmp_path / "flat"]
    evaluation, _ = options_of(evaluate, run, *folder)
    with pytest.raises(ValueError, match="data.root"):
        evaluation.load("train")


def test_files_are_named_by_task_data_set_and_feature(tmp_path):
    run = add_projector(make_run(tmp_path / "mine"))
    linear_probe = load_script("eval/linear_probe.py")
    for part in ("train", "test"):
        write_images(tmp_path / "pets" / part, "ab", 4)
    folder = ["--data.name", "folder", "--data.root", str(tmp_path / "pets")]
    given = [str(run), *folder, "--epochs", "2"]
    for feature in ("backbone", "projector"):
        linear_probe.main([*given, "--feature", feature])
    linear_probe.main([*given, "--data.classes", "[b, a]"])
    files = {path.name for path in (run / "eval").iterdir() if path.is_file()}
    assert files == {
        *("linear_probe-pets.json", "linear_probe-pets.png"),
        *("linear_probe-pets-projector.json", "linear_probe-pets-projector.png"),
        *("linear_probe-pets-b_a.json", "linear_probe-pets-b_a.png"),
    }
    rows, about = results.read(run / "eval" / "linear_probe-pets-projector.json")
    assert set(rows["dataset"]) == {"folder:pets"}
    assert set(rows["feature"]) == {about["encoder"]["feature"]} == {"projector"}
    encoder = load_encoder(run, feature="projector")
    assert about["encoder"]["fingerprint"] == encoder.fingerprint
    data = Data("folder", str(tmp_path / "pets"), SIZE)
    assert about["data"] == asdict(data)
    assert about["images"] == {
        f"folder:pets/{part}": load(data, part).fingerprint() for part in ("train", "test")
    }


def test_results_of_another_encoder_are_not_replaced(run, tmp_path, capsys):
    other = make_run(tmp_path / "other")
    linear_probe = load_script("eval/linear_probe.py")
    given = ["--epochs", "1", "--out", str(tmp_path / "out")]
    assert cli.run(linear_probe.main, [str(run), *given]) == 0
    assert cli.run(linear_probe.main, [str(run), *given]) == 0
    assert cli.run(linear_probe.main, [str(other), *given]) == 2
    assert "out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({}, {}),
        ({"classes": ["b", "a"]}, {}),
        ({}, {"label_fraction": 0.5, "training": {"seed": 3}, "recipe": "supcon"}),
    ],
)
def test_other_images_than_in_training_are_named(tmp_path, caplog, settings, recorded):
    """Even where all classes are read, as for osr; classes asked for are not compared."""
    for part in ("train", "test"):
        write_images(tmp_path / "pets" / part, "abc", 4)
    data = Data("folder", str(tmp_path / "pets"), SIZE, **settings)
    images = load_known(data, "train")
    if recorded:
        images = images.with_few_labels(0.5, 3)
    run = make_run(tmp_path / "run", name="folder", root=data.root, **settings)
    config = {**yaml.safe_load((run / "config.yaml").read_text()), **recorded}
    config["environment"] = {"images_fingerprint": images.fingerprint(), "images": len(images)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    def warnings(*options) -> list[str]:
        caplog.clear()
        evaluation, _ = options_of(evaluate, run, *options)
        evaluation.load("train")
        evaluation.load("test")
        evaluation.load("train", replace(evaluation.data, classes=None))
        return caplog.messages

    assert warnings() == []
    (tmp_path / "pets" / "train" / "a" / "0.png").rename(
        tmp_path / "pets" / "train" / "b" / "9.png"
    )
    assert all(str(tmp_path / "pets") in message for message in warnings())
    assert len(warnings()) == 2
    assert len(warnings("--data.classes", "[c, a]")) == 1  # of all classes, not of these


def test_copies_of_training_images_are_counted(tmp_path, caplog):
    for part in ("train", "test"):
        write_images(tmp_path / "pets" / part, "ab", 4)  # the same images
    run = make_run(tmp_path / "run", name="folder", root=str(tmp_path / "pets"))
    load_script("eval/linear_probe.py").main([str(run), "--epochs", "1"])
    _, about = results.read(run / "eval" / "linear_probe-pets.json")
    assert about["copies"] == {"folder:pets/test": 8}
    assert any("8 of 8" in message for message in caplog.messages)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "options", "images"),
    [
        ("linear_probe", "--epochs 2", 2),
        ("osr", "--epochs 3 --trials random:6:1", 5),
        ("corruption", "--epochs 5 --corruptions [glass_blur,fog] --images 61 --workers 1", 2),
    ],
)
def test_two_processes_equal_one(run, tmp_path, script, name, options, images):
    """Up to a few images, because sums of other batches round differently."""
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = script(
            f"eval/{name}.py", str(run), *options.split(), "--out", str(out), processes=processes
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written: ") == 1
        (path,) = out.glob(f"{name}-digits*.json")
        found[processes] = results.read(path)[0]
    one, two = found[1], found[2]
    for column in ("score", "metric", "trial", "n"):
        assert two[column].equals(one[column])
    rates = one["metric"] != "threshold_tpr95"  # in units of the score
    difference = (two["value"] - one["value"]).abs()
    assert np.all((difference <= (images + 0.1) / one["n"])[rates])
