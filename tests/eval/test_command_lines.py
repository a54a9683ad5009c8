"""What the four scripts share."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from support import ROOT, load_script, make_run

from ssl_gradmix.evaluation import rows

ENCODERS_ARE_READ_BY = ("linear_probe", "osr", "corruption")


@pytest.mark.parametrize("script", [*ENCODERS_ARE_READ_BY, "reliance", "make_c"])
def test_help_teaches(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        load_script(f"eval/{script}.py").main(["--help"])
    text = capsys.readouterr().out
    assert f"python eval/{script}.py" in text
    for option in ("--data.name", "--out", "--seed", *(["encoder "] if script != "make_c" else [])):
        assert option in text


@pytest.mark.parametrize("script", ENCODERS_ARE_READ_BY)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: encoder"),
        (["{run}/nowhere"], "no run folder"),
        (["{run}/.."], "is no run: it has no config.yaml"),
        (["local-dir:{run}/backbone"], "has no folder for results: give one with --out"),
        (["{run}", "--seed", "-1"], "seed must be 0 or larger, got -1"),
        (["{run}", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["{run}", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["{run}", "--feature", "projector"], "the run .*mine has no projector: .*projector.safetensors is missing"),
        (["{run}", "--data.name", "folder", "--data.root", "{run}/x"], "data.root '.*x' is not a folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, script, arguments, message):
    run = make_run(tmp_path / "runs" / "mine")
    assert load_script(f"eval/{script}.py").main([argument.format(run=run) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not [path for path in run.glob("eval/*") if path.name != "features"]


@pytest.mark.parametrize("script", [*ENCODERS_ARE_READ_BY, "reliance"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "the run .*mine has no backbone yet: .*model.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "model.safetensors is damaged: "),
        (lambda path: torch.save({}, path), "model.safetensors is a pickled checkpoint, .* convert it:"),
    ],
)
def test_a_backbone_that_cannot_be_read(tmp_path, capsys, script, damage, message):
    run = make_run(tmp_path / "runs" / "mine")
    damage(run / "backbone" / "model.safetensors")
    before = sorted(run.rglob("*"))
    assert load_script(f"eval/{script}.py").main([str(run)]) == 2
    first, *how_to_convert = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{message}", first)
    assert bool(how_to_convert) == ("pickled" in message)
    assert sorted(run.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("script", "options", "images"),
    [
        ("linear_probe", "--epochs 2", 2),
        ("osr", "--epochs 3 --trials random:6:1", 5),
        ("corruption", "--epochs 5 --corruptions [glass_blur,fog] --images 61 --workers 1", 2),
    ],
)
def test_two_processes_give_what_one_gives(tmp_path, script, options, images):
    """Up to so many images on another side, as sums of other batches round differently."""
    run, path = make_run(tmp_path / "runs" / "mine"), ROOT / "eval" / f"{script}.py"
    assert load_script(f"eval/{script}.py").main([str(run), *options.split(), "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(path), str(run), *options.split(), "--out", str(tmp_path / "two")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(re.findall("Written: |Rows, also by class: ", done.stdout)) == 1
    one, two = (rows.read(next((tmp_path / name).glob("*.json")))[0] for name in ("one", "two"))
    for column in ("score", "metric", "trial", "n"):
        assert two[column].equals(one[column])
    bounded = one["metric"] != "threshold_tpr95"  # in units of the score
    assert ((two["value"] - one["value"]).abs() <= (images + 0.1) / one["n"])[bounded].all()
