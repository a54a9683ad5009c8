"""The script that writes reports: what a user gets, and files of strangers, of which what is refused is named."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import load_script

from ssl_gradmix.evaluation import rows

script = load_script("eval/report.py")
ROW = rows.frame([rows.number("linear", "top1", (0.8771, 0.85, 0.9), 359)], "linear_probe", "digits/test", "x")


def run_script(*arguments: object) -> int:
    return script.command_line.run(script.main, [str(argument) for argument in arguments])


@pytest.fixture
def run(run, tmp_path, monkeypatch) -> Path:
    """A run with results, `runs/mine` in the working folder."""
    rows.write(run / "eval" / "linear_probe.json", ROW, {})
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def refusal(run, capsys):
    """Why the report is refused, in one line."""

    def call() -> str:
        assert run_script(run, "--map", "none") == 2
        assert not Path("report").exists()
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return call


def report(run: Path, *options: str) -> str:
    assert run_script(run, *options) == 0
    return Path("report", "report.html").read_text(encoding="utf-8")


def test_both_files_are_written_and_named(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_script(run, "--out", out, "--map", "none") == 0
    assert capsys.readouterr().out.split() == [str(out / "report.html"), str(out / "report.md")]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md"]
    for name in ("report.html", "report.md"):
        text = (out / name).read_text()
        assert "87.7" in text
        assert "85.0 to 90.0" in text
    assert sorted(path.name for path in run.iterdir()) == ["backbone", "config.yaml", "eval"]


def test_the_folder_is_report_by_default(run, tmp_path):
    assert run_script("runs/mine", "--map", "none") == 0
    assert "Report on mine" in (tmp_path / "report" / "report.html").read_text()
    assert "`python eval/osr.py runs/mine`" in (tmp_path / "report" / "report.md").read_text()


def test_images_are_read_for_a_map_alone(run, tmp_path):
    """A folder of results, which may be somebody else's, names images: none are looked at unless a map is asked for."""
    (run / "backbone" / "model.safetensors").unlink()
    assert run_script(run, "--out", tmp_path / "with", "--map", "pca") == 0
    assert "mine: no map, the run" in (tmp_path / "with" / "report.html").read_text()
    assert run_script(run, "--out", tmp_path / "without") == 0
    assert "no map" not in (tmp_path / "without" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/nowhere"], "no run folder '.*nowhere'"),
        (["{run}/.."], "is no run"),
        (["{run}/../empty"], "nothing to report: no evaluation in .*empty; run eval/linear_probe.py"),
        (["{run}", "{run}"], "given twice"),
        (["{run}", "--map", "umap"], "map must be one of .*, got umap"),
        (["{run}", "--out", "{run}/config.yaml"], "config.yaml"),
        (["{run}", "--lables", "3"], "lables"),
        ([], "runs"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(run, tmp_path, capsys, arguments, message):
    (run.parent / "empty").mkdir()
    (run.parent / "empty" / "config.yaml").write_text("extra_view: none\n")
    assert run_script(*(argument.format(run=run) for argument in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not [*tmp_path.rglob("report*")]


# Files of strangers


def test_settings_and_results(run, refusal):
    (run / "eval" / "linear_probe.json").write_text('{"rows": ' + "[" * 1_000_000)
    assert "linear_probe.json is no file of result rows" in refusal()
    rows.write(run / "eval" / "linear_probe.json", ROW, {})
    (run / "config.yaml").write_text("data: !!python/object/apply:os.mkdir ['obeyed']")
    assert "config.yaml is damaged: could not determine a constructor for the tag" in refusal()


@pytest.mark.parametrize(
    "scores",
    [torch.rand(4), torch.rand(3, 2), torch.rand(()), torch.full((3,), torch.inf), torch.rand(3).bfloat16(), None],
    ids=["other length", "matrix", "single", "infinite", "type that NumPy has not", "no file"],
)
def test_samples(run, scores, refusal):
    rows.write(run / "eval" / "osr.json", ROW, {})
    path = run / "eval" / "osr_samples.safetensors"
    if scores is None:
        path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    else:
        known = torch.tensor([1, 0, 1], dtype=torch.uint8)
        save_file({"random:6:0/is_known": known, "random:6:0/max_logit": scores}, path)
    assert re.search(r"osr_samples\.safetensors .*damaged", refusal())


def test_a_sample_picture_that_is_a_bomb_or_a_pipe(run, refusal):
    (run / "samples").mkdir()
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    bomb = content.getvalue()[:16] + struct.pack(">II", 60_000, 60_000) + content.getvalue()[24:29]
    bomb += struct.pack(">I", zlib.crc32(bomb[12:29])) + content.getvalue()[33:]
    (run / "samples" / "epoch-00001.png").write_bytes(bomb)
    os.mkfifo(run / "samples" / "epoch-00002.png")
    assert re.search(r"epoch-00001\.png is damaged: .*pixels", refusal())


@pytest.mark.parametrize("settings", ["data: {name: folder, root: 5}", "data: {size: x}", "data: {open_set: 3}"])
def test_a_map_whose_settings_are_of_other_types_is_missing(run, settings):
    (run / "config.yaml").write_text(settings)
    assert "mine: no map" in report(run, "--map", "pca")


def test_a_strange_log_ends_where_it_is_strange(run):
    entries = ['{"epoch": 1, "loss": 3.0}', '{"epoch": 2, "loss": NaN}', '{"epoch": 3, "loss": 1' + "0" * 400 + "}"]
    (run / "log.jsonl").write_text("\n".join([*entries, "[]", '"x"', "[" * 1_000_000, '{"epoch": 4, "loss": 1.0}']))
    assert "has no log" not in report(run, "--map", "none")
