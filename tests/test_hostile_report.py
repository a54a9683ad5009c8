"""Files of strangers in the runs that a report compares: what is refused is named, and markup stays text."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import load_script, make_run

from ssl_gradmix import command_line
from ssl_gradmix.evaluation import rows

ROW = rows.frame([rows.number("linear", "top1", (0.5, 0.4, 0.6), 10)], "linear_probe", "digits/test", "x")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with results, in the folder above the working one."""
    run = make_run(tmp_path / "run")
    rows.write(run / "eval" / "linear_probe.json", ROW, {})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run


@pytest.fixture
def refusal(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Why the report is refused, in one line."""

    def call() -> str:
        assert command_line.run(load_script("eval/report.py").main, [str(run), "--map", "none"]) == 2
        assert not list(Path().iterdir())
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return call


def report(run: Path, *options: str) -> str:
    assert command_line.run(load_script("eval/report.py").main, [str(run), *options]) == 0
    return Path("report", "report.html").read_text(encoding="utf-8")


def test_settings_and_results(run: Path, refusal: Callable[[], str]) -> None:
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
def test_samples(run: Path, scores: torch.Tensor | None, refusal: Callable[[], str]) -> None:
    rows.write(run / "eval" / "osr.json", ROW, {})
    path = run / "eval" / "osr_samples.safetensors"
    if scores is None:
        path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    else:
        known = torch.tensor([1, 0, 1], dtype=torch.uint8)
        save_file({"random:6:0/is_known": known, "random:6:0/max_logit": scores}, path)
    assert re.search(r"osr_samples\.safetensors .*damaged", refusal())


def test_a_sample_picture_that_is_a_bomb_or_a_pipe(run: Path, refusal: Callable[[], str]) -> None:
    (run / "samples").mkdir()
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    bomb = content.getvalue()[:16] + struct.pack(">II", 60_000, 60_000) + content.getvalue()[24:29]
    bomb += struct.pack(">I", zlib.crc32(bomb[12:29])) + content.getvalue()[33:]
    (run / "samples" / "epoch-00001.png").write_bytes(bomb)
    os.mkfifo(run / "samples" / "epoch-00002.png")
    assert re.search(r"epoch-00001\.png is damaged: .*pixels", refusal())


@pytest.mark.parametrize("settings", ["data: {name: folder, root: 5}", "data: {size: x}", "data: {open_set: 3}"])
def test_a_map_whose_settings_are_of_other_types_is_missing(run: Path, settings: str) -> None:
    (run / "config.yaml").write_text(settings)
    assert "run: no map" in report(run, "--map", "pca")


def test_a_strange_log_ends_where_it_is_strange(run: Path) -> None:
    entries = ['{"epoch": 1, "loss": 3.0}', '{"epoch": 2, "loss": NaN}', '{"epoch": 3, "loss": 1' + "0" * 400 + "}"]
    (run / "log.jsonl").write_text("\n".join([*entries, "[]", '"x"', "[" * 1_000_000, '{"epoch": 4, "loss": 1.0}']))
    assert "has no log" not in report(run, "--map", "none")
