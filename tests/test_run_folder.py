"""What a run folder accepts, and what it never touches."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from training_support import file_size_limit

from ssl_gradmix import run_folder
from ssl_gradmix.run_folder import RunFolder, flat

SETTINGS = {
    "run": "x",
    "extra_view": "gradmix",
    "optimizer": {"lr": 0.1},
    "training": {"epochs": 3, "workers": 2},
}


def started(path: Path) -> RunFolder:
    folder = RunFolder(path / "run")
    folder.check(SETTINGS, overwrite=False)
    folder.start(SETTINGS, overwrite=False)
    return folder


def test_the_config_holds_settings_and_what_they_ran_on(tmp_path: Path) -> None:
    config = yaml.safe_load(started(tmp_path).config.read_text())
    environment = config.pop("environment")
    assert config == SETTINGS
    assert {"torch", "lightly", "timm", "python", "commit"} <= environment.keys()


def test_the_same_settings_may_go_on_and_free_ones_may_differ(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.check(SETTINGS, overwrite=False)
    folder.check({**SETTINGS, "run": "elsewhere", "training": {"epochs": 3, "workers": 0}}, overwrite=False)


def test_changed_settings_are_listed(tmp_path: Path) -> None:
    folder = started(tmp_path)
    changed = {**SETTINGS, "extra_view": "none", "training": {"epochs": 4}, "optimizer": {"lr": 0.1, "clip": 1.0}}
    with pytest.raises(
        ValueError,
        match="extra_view was 'gradmix', now 'none'; optimizer.clip was None, now 1.0; training.epochs was 3, now 4",
    ):
        folder.check(changed, overwrite=False)
    folder.check(changed, overwrite=True)


def test_overwriting_removes_a_runs_parts_alone(tmp_path: Path) -> None:
    folder = started(tmp_path)
    (folder.checkpoint / "epoch-1").mkdir(parents=True)
    folder.append_log({"epoch": 1})
    (folder.path / "notes.txt").write_text("mine")
    folder.start({**SETTINGS, "extra_view": "none"}, overwrite=True)
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "notes.txt"]
    assert yaml.safe_load(folder.config.read_text())["extra_view"] == "none"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        RunFolder(tmp_path).check(SETTINGS, overwrite)
    with pytest.raises(ValueError, match="cannot be written to"):
        RunFolder(tmp_path / "thesis.tex" / "run").check(SETTINGS, overwrite)


@pytest.mark.parametrize("last", ['{"epoch": 4, "lo', "[]", '"epoch"', '{"loss": 0.5}'])
def test_the_log_is_rewound_to_the_checkpoint_and_survives_a_line_that_is_no_entry(tmp_path: Path, last: str) -> None:
    folder = started(tmp_path)
    for epoch in (1, 2, 3):
        folder.append_log({"epoch": epoch, "loss": 0.5})
    with folder.log.open("a") as file:
        file.write(last)
    assert [entry["epoch"] for entry in folder.read_log()] == [1, 2, 3]
    folder.rewind_log(2)
    assert folder.log.read_text() == '{"epoch": 1, "loss": 0.5}\n{"epoch": 2, "loss": 0.5}\n'


def test_a_line_that_did_not_fit_on_the_disk_is_an_error_and_no_entry(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.append_log({"epoch": 1, "loss": 0.5})
    with file_size_limit(folder.log.stat().st_size + 10), pytest.raises(OSError, match="File too large"):
        folder.append_log({"epoch": 2, "loss": 0.25})
    assert folder.log.read_text() == '{"epoch": 1, "loss": 0.5}\n{"epoch": '
    assert folder.read_log() == [{"epoch": 1, "loss": 0.5}]
    folder.rewind_log(1)
    assert folder.log.read_text() == '{"epoch": 1, "loss": 0.5}\n'


def test_what_kills_left_half_written_goes_and_all_else_stays(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.samples.mkdir()
    mine = folder.path / ".notes.tmp"
    for path in (folder.path / ".projector.safetensors.4711.tmp", folder.samples / ".epoch-00001.png.4711.tmp", mine):
        path.write_text("half")
    folder.start(SETTINGS, overwrite=False)
    assert sorted(folder.path.rglob("*")) == sorted([folder.config, mine, folder.samples])


def test_a_kill_at_the_very_start_does_not_lock_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / ".config.yaml.4711.tmp").write_text("run")
    folder.check(SETTINGS, overwrite=False)
    folder.start(SETTINGS, overwrite=False)
    assert list(folder.path.iterdir()) == [folder.config]

    changed = {**SETTINGS, "extra_view": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.start(changed, overwrite=True)
    folder.check(changed, overwrite=True)
    folder.start(changed, overwrite=True)
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml"]
    folder.check(changed, overwrite=False)


def test_flat_settings() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
