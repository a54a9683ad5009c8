"""What a run folder accepts, who may train in it, and what it never touches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from training_support import file_size_limit, image_set, tree

from ssl_gradmix import run_folder
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.run_folder import RunFolder, flat

SETTINGS = {"run": "x", "extra_view": "gradmix", "optimizer": {"lr": 0.1}, "training": {"epochs": 3, "workers": 2}}


IMAGES = image_set()


def started(path: Path, settings: dict = SETTINGS, images: ImageSet = IMAGES, overwrite: bool = False) -> RunFolder:
    folder = RunFolder(path / "run")
    folder.start(settings, images, overwrite)
    folder.release()
    return folder


def test_the_config_holds_settings_and_what_they_ran_on(tmp_path: Path) -> None:
    config = yaml.safe_load(started(tmp_path).config.read_text())
    environment = config.pop("environment")
    assert config == SETTINGS
    assert {"torch", "lightly", "timm", "python", "commit"} <= environment.keys()
    assert (environment["images"], environment["images_fingerprint"]) == (36, IMAGES.fingerprint())


def test_the_same_run_may_go_on_and_free_settings_may_differ(tmp_path: Path) -> None:
    folder = started(tmp_path)
    moved = {**SETTINGS, "run": "elsewhere", "data": {"root": "/moved"}, "training": {"epochs": 3, "workers": 0}}
    again = started(tmp_path, moved)
    assert again.identity == folder.identity


def test_other_settings_and_other_images_are_refused(tmp_path: Path) -> None:
    folder = started(tmp_path)
    changed = {**SETTINGS, "extra_view": "none", "training": {"epochs": 4}, "optimizer": {"lr": 0.1, "clip": 1.0}}
    other = IMAGES.subset(range(30))
    with pytest.raises(
        ValueError,
        match="extra_view was 'gradmix', now 'none'; optimizer.clip was None, now 1.0; training.epochs was 3, now 4",
    ):
        folder.check(changed)
    with pytest.raises(ValueError, match=r"was started on other images \(36, now 30, in noise.* --overwrite"):
        started(tmp_path, images=other)
    before = folder.config.read_text()
    identities = {each.identity for each in (folder, started(tmp_path), started(tmp_path / "b", images=other))}
    assert folder.config.read_text() == before
    assert len({*identities, started(tmp_path / "c", changed).identity}) == 3


def test_overwriting_removes_what_a_run_wrote_alone(tmp_path: Path) -> None:
    folder = started(tmp_path)
    mine = ["notes.txt", "eval/script.py", "checkpoint/epoch-00001-batch-0000000/mine", "samples/cat.png"]
    written = [
        *("eval/osr.json", "eval/projector/osr.png", "samples/epoch-00001.png", "backbone/config.json", "log.jsonl"),
        *("checkpoint/epoch-00002-batch-0000000/progress.pt", "checkpoint/.unfinished/manifest.json"),
        *("trackers/ssl_gradmix/1/events", "projector.safetensors"),
    ]
    for name in (*mine, *written):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text("text")
    (folder.path / "trackers/latest").symlink_to(tmp_path)  # as wandb leaves one
    started(tmp_path, {**SETTINGS, "extra_view": "none"}, overwrite=True)
    assert tree(folder.path) == sorted([".lock", "config.yaml", *mine])
    assert not (folder.path / "trackers").exists()
    assert yaml.safe_load(folder.config.read_text())["extra_view"] == "none"


@pytest.mark.parametrize("name", ["checkpoint", "eval", "checkpoint/epoch-00001-batch-0000000"])
def test_overwriting_follows_no_links(tmp_path: Path, name: str) -> None:
    folder = started(tmp_path)
    folder.append_log({"epoch": 1})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in ("progress.pt", "osr.json"):
        (elsewhere / file).write_text("mine")
    (folder.path / name).parent.mkdir(exist_ok=True)
    (folder.path / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"run: .*/{name} is a link, behind which --overwrite removes nothing"):
        started(tmp_path, overwrite=True)
    assert tree(elsewhere) == ["osr.json", "progress.pt"]
    assert folder.read_log() == [{"epoch": 1}]


def test_an_unfinished_run_that_was_started_by_overwriting_goes_on_by_the_same_command(tmp_path: Path) -> None:
    folder = started(tmp_path)
    for overwritten in (True, False, False):  # the command is new to the folder, then it is the folder's own
        folder.append_log({"epoch": 1})
        started(tmp_path, overwrite=True)
        assert (folder.read_log() == []) == overwritten
    started(tmp_path, images=IMAGES.subset(range(30)), overwrite=True)
    assert folder.read_log() == []
    folder.append_log({"epoch": 3})
    (folder.checkpoint / "epoch-00003-batch-0000000").mkdir(parents=True)
    started(tmp_path, images=IMAGES.subset(range(30)), overwrite=True)
    assert folder.read_log() == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("config", [None, "site_name: x", "training: {}", "training: {}\nenvironment: [ssl_gradmix]"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, overwrite: bool, config: str | None) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("mine")
    if config is not None:
        (tmp_path / "run/config.yaml").write_text(config)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        started(tmp_path, overwrite=overwrite)
    with pytest.raises(ValueError, match="cannot be written to"):
        RunFolder(tmp_path / "run/thesis.tex/run").check(SETTINGS, overwrite)
    assert tree(tmp_path) == before


def test_one_training_at_a_time_and_a_killed_one_hinders_none(tmp_path: Path) -> None:
    code = (
        "import sys, test_run_folder; from pathlib import Path\n"
        "folder = test_run_folder.RunFolder(Path(sys.argv[1]) / 'run')\n"
        "folder.start(test_run_folder.SETTINGS, test_run_folder.IMAGES)\n"
        "print('held', flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=f"is being trained by process {holder.pid} on .*; stop that one, or"):
                started(tmp_path, overwrite=overwrite)
        holder.send_signal(signal.SIGKILL)
    mine = RunFolder(tmp_path / "run")
    mine.start(SETTINGS, IMAGES)
    if (child := os.fork()) == 0:  # a loader process, which is forked, gives up nothing when it ends
        os._exit(0)
    os.waitpid(child, 0)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert f"is being trained by process {os.getpid()} on" in done.stderr
    mine.release()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, input="\n", timeout=120)
    assert done.stdout == "held\n"


@pytest.mark.parametrize("last", [b'{"epoch": 4, "lo', b"[]", b'"epoch"', b'{"loss": 0.5}', b"\xff"])
def test_the_log_is_rewound_to_the_checkpoint_and_survives_a_line_that_is_no_entry(tmp_path: Path, last: bytes) -> None:
    folder = started(tmp_path)
    for epoch in (1, 2, 3):
        folder.append_log({"epoch": epoch, "loss": 0.5})
    with folder.log.open("ab") as file:
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
    started(tmp_path)
    assert sorted(folder.path.rglob("*")) == sorted([folder.path / ".lock", folder.config, mine, folder.samples])


def test_a_kill_at_the_very_start_does_not_lock_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.yaml.4711.tmp").write_text("run")
    (tmp_path / "run/.lock").write_text("process 4711 on here")
    started(tmp_path)
    assert tree(tmp_path) == ["run/.lock", "run/config.yaml"]

    changed = {**SETTINGS, "extra_view": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            started(tmp_path, changed, overwrite=True)
    folder = started(tmp_path, changed, overwrite=True)
    assert tree(tmp_path) == ["run/.lock", "run/config.yaml"]
    folder.check(changed)


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert RunFolder("~/runs/x").config == Path("/home/somebody/runs/x/config.yaml")


def test_flat_settings() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
