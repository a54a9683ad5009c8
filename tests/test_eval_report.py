from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import load_script

from ssl_gradmix.evaluation import rows

script = load_script("eval/report.py")


def run_script(*arguments: object) -> int:
    return script.command_line.run(script.main, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("extra_view: gradmix\n")
    found = rows.frame([rows.number("linear", "top1", (0.8771, 0.85, 0.9), 359)], "linear_probe", "digits/test", "x")
    rows.write(folder / "eval" / "linear_probe.json", found, {})
    return folder


def test_both_files_are_written_and_named(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_script(run, "--out", out, "--map", "none") == 0
    assert capsys.readouterr().out.split() == [str(out / "report.html"), str(out / "report.md")]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md"]
    for name in ("report.html", "report.md"):
        text = (out / name).read_text()
        assert "87.7" in text
        assert "85.0 to 90.0" in text
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "eval"]


def test_the_folder_is_report_by_default(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_script("runs/mine", "--map", "none") == 0
    assert "Report on mine" in (tmp_path / "report" / "report.html").read_text()
    assert "`python eval/osr.py runs/mine`" in (tmp_path / "report" / "report.md").read_text()


def test_images_are_read_for_a_map_alone(run, tmp_path):
    """A folder of results, which may be somebody else's, names images: none are looked at unless a map is asked for."""
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
def test_bad_input_is_one_line_and_nothing_is_written(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (run.parent / "empty").mkdir()
    (run.parent / "empty" / "config.yaml").write_text("extra_view: none\n")
    assert run_script(*(argument.format(run=run) for argument in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not [*tmp_path.rglob("report*")]
