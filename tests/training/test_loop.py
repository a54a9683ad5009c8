"""The loop: an interrupted training ends as an uninterrupted one, and what goes wrong is said."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from training_support import TIMED, TRAINING, before_step, final, image_set, trainer, tree

from ssl_gradmix import GradMix, backbones
from ssl_gradmix.data.planted import Stamps, name
from ssl_gradmix.evaluation.knn import knn_accuracy
from ssl_gradmix.evaluation.rank import rankme
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.losses import Losses
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.methods.supcon import SupCon
from ssl_gradmix.mixing import crop
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.settings import Optimizer
from ssl_gradmix.training import checkpoint, loop
from ssl_gradmix.training.loop import Trainer, all_finite
from ssl_gradmix.training.monitor import Monitor
from ssl_gradmix.training.processes import create_accelerator


@pytest.mark.parametrize(
    ("kind", "decode", "number"),
    [
        (SimCLR, "once", signal.SIGTERM),
        (SimCLR, "workers", signal.SIGINT),
        (BYOL, "once", signal.SIGINT),
        (BYOL, "workers", signal.SIGTERM),
        (SupCon, "workers", signal.SIGTERM),
    ],
)
def test_stopped_by_a_signal_mid_epoch_it_ends_with_the_same_weights(
    tmp_path: Path, kind: type, decode: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    training = replace(TRAINING, decode=decode)
    trainer(tmp_path / "whole", kind, training).run()

    stopped = trainer(tmp_path / "parts", kind, training)
    before_step(stopped, (1, 2), lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit_:
        stopped.run()
    assert exit_.value.code == 128 + number
    assert (
        f"stopped by {signal.Signals(number).name} and saved; the same command goes on from here"
        in capsys.readouterr().out
    )
    trainer(tmp_path / "parts", kind, training).run()
    assert "goes on after epoch 1 and 3 batches" in capsys.readouterr().out

    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [RunFolder(tmp_path / name).read_log() for name in ("whole", "parts")]
    for one, two in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if k not in TIMED} == {k: v for k, v in two.items() if k not in TIMED}


def test_stopped_in_the_last_step_of_an_epoch_it_reports_that_epoch_when_it_goes_on(tmp_path: Path) -> None:
    trainer(tmp_path / "whole").run()
    stopped = trainer(tmp_path / "parts")
    before_step(stopped, (1, 3), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        stopped.run()
    trainer(tmp_path / "parts").run()
    logs = [RunFolder(tmp_path / name).read_log() for name in ("whole", "parts")]
    assert [(entry["epoch"], entry["loss"], entry["lr"]) for entry in logs[0]] == [
        (entry["epoch"], entry["loss"], entry["lr"]) for entry in logs[1]
    ]
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_finished_run_is_reported_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path).run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    capsys.readouterr()
    trainer(tmp_path).run()
    assert f"{tmp_path} is finished: epoch 3/3  loss" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    (tmp_path / "log.jsonl").unlink()
    trainer(tmp_path).run()
    assert f"{tmp_path} is finished; --overwrite starts anew" in capsys.readouterr().out


def test_the_run_folder_holds_a_backbone_that_timm_loads(tmp_path: Path) -> None:
    import timm

    training = replace(TRAINING, knn_every=1, samples_every=3)
    done = trainer(tmp_path, training=training)
    done.run()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), done.bare.backbone.eval()(images))
    assert loaded.pretrained_cfg["input_size"] == (3, 16, 16) or loaded.pretrained_cfg["input_size"] == [3, 16, 16]
    assert [entry["epoch"] for entry in RunFolder(tmp_path).read_log()] == [1, 2, 3]
    assert all(0 <= entry["knn"] <= 1 for entry in RunFolder(tmp_path).read_log())
    assert (tmp_path / "samples" / "epoch-00003.png").read_bytes().startswith(b"\x89PNG")


def test_looking_at_the_run_does_not_change_it(tmp_path: Path) -> None:
    trainer(tmp_path / "blind", training=replace(TRAINING, epochs=2)).run()
    trainer(tmp_path / "watched", training=replace(TRAINING, epochs=2, knn_every=1, samples_every=1)).run()
    blind, watched = final(tmp_path / "blind"), final(tmp_path / "watched")
    assert all(torch.equal(blind[name], watched[name]) for name in blind)


def test_accumulating_takes_as_many_optimizer_steps(tmp_path: Path) -> None:
    done = trainer(tmp_path, BYOL, training=replace(TRAINING, accumulate=2, epochs=1))
    updates = []
    done.bare.update_target = lambda step, steps: updates.append((step, steps))
    done.run()
    assert updates == [(step, 4) for step in range(4)]


def test_the_monitor_reads_knn_and_leaves_the_backbone_alone() -> None:
    images = image_set(200)
    monitor = Monitor(images, 16, (0.5,) * 3, (0.5,) * 3, bank=120, queries=30)
    assert len(monitor.bank) == 120
    assert len(monitor.queries) == 30
    rows = {tuple(pixels.flatten().tolist()) for pixels in monitor.bank}
    assert not any(tuple(pixels.flatten().tolist()) in rows for pixels in monitor.queries)
    backbone = backbones.create("resnet10_tiny").train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    readings = monitor(backbone, torch.device("cpu"))
    assert backbone.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
    backbone.eval()
    with torch.inference_mode():
        features = [backbone((pixels / 255 - 0.5) / 0.5) for pixels in (monitor.queries, monitor.bank)]
    assert readings == {
        "knn": pytest.approx(knn_accuracy(features[0], monitor.query_labels, features[1], monitor.bank_labels)),
        "rankme": pytest.approx(rankme(torch.cat(features)), rel=1e-4),
    }
    images.labels[:] = -1
    assert Monitor(images, 16, (0.5,) * 3, (0.5,) * 3)(backbone, torch.device("cpu")).keys() == {"rankme"}


def test_a_collapse_is_noticed_and_a_healthy_encoder_is_not_accused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "healthy", BYOL, training=replace(TRAINING, knn_every=1)).run()
    assert "collapses" not in capsys.readouterr().out

    # Without a predictor and a slower teacher nothing keeps all embeddings from becoming one.
    training, optimizer = replace(TRAINING, epochs=8), Optimizer(lr=30, warmup_epochs=0.2)
    collapsing = trainer(tmp_path / "collapsing", BYOL, training=training, optimizer=optimizer)
    collapsing.bare.predictor, collapsing.bare.momentum, collapsing.bare.gradmix = torch.nn.Identity(), 0.0, None
    collapsing.run()
    last = RunFolder(tmp_path / "collapsing").read_log()[-1]
    assert last["embedding_std"] < 0.1
    told = f"the encoder collapses, it hardly tells images apart (embedding_std {last['embedding_std']:.3f}); a lower"
    assert told in capsys.readouterr().out


def poison(broken: Trainer, place: tuple[int, int], what: str) -> None:
    """At this (epoch, batch) all images are NaN, or a gradient overflows while the loss is finite."""
    parameter, views = next(broken.bare.projector.parameters()), broken.source.views

    def spoil() -> None:
        if what == "gradient":
            parameter.register_hook(lambda gradient: gradient * torch.inf)
        else:
            broken.source.views = lambda batch: [view * torch.nan for view in views(batch)]

    before_step(broken, place, spoil)


@pytest.mark.parametrize(
    ("what", "gradmix", "message"),
    [
        ("images", None, "loss is nan in epoch 2, batch 3"),
        ("images", GradMix(layers=["layer2"]), "loss is nan in epoch 2, batch 3"),
        ("gradient", None, "loss is nan in epoch 2, batch 4"),
    ],
)
@pytest.mark.parametrize("kind", [SimCLR, BYOL])
def test_what_is_not_finite_stops_the_training_and_is_never_saved(
    kind: type, what: str, gradmix: GradMix | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    broken = trainer(tmp_path, kind)
    broken.bare.gradmix = gradmix
    poison(broken, (1, 2), what)
    good = tmp_path / "checkpoint/epoch-00001-batch-0000000"
    with pytest.raises(FloatingPointError, match=f"{message}; the last good checkpoint is {good}. A lower --opt"):
        broken.run()
    assert max((tmp_path / "checkpoint").iterdir()) == good
    assert all(tensor.isfinite().all() for tensor in final(tmp_path).values())


def test_checkpoints_keep_their_distance_and_rates_are_of_steps_alone_and_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, places, save = [0.0], [], checkpoint.save

    def slow_save(folder: Path, state: checkpoint.State, run: str) -> None:
        clock[0] += 0.08
        places.append((state.epoch, state.batch))
        save(folder, state, run)

    monkeypatch.setattr(loop, "READ_EVERY", 1)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.6)
    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    watched = trainer(tmp_path)
    step = watched._step

    def slow_step(batch: object) -> Losses:
        clock[0] += 0.24
        return step(batch)

    watched._step = slow_step
    watched.run()
    assert places == [(0, 3), (1, 2), (2, 1), (3, 0)]  # every third of twelve steps, and at the end
    log = RunFolder(tmp_path).read_log()
    assert [entry["images_per_second"] for entry in log] == [33.3] * 3  # 8 / 0.24
    assert [entry["images_per_second_overall"] for entry in log] == [30.8] * 3  # 32 / (4 * 0.24 + 0.08)
    assert "finished in 00:00:03, 10.0% of it saving" in capsys.readouterr().out  # 0.32 of 3.2


def test_weights_that_the_last_step_of_an_epoch_spoilt_are_not_saved(tmp_path: Path) -> None:
    broken = trainer(tmp_path)
    poison(broken, (0, 3), "gradient")
    message = "weights, or the optimizer's state, are not finite after epoch 1, batch 4; there is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=message):
        broken.run()
    assert tree(tmp_path) == [".lock", "config.yaml", "log.jsonl"]
    assert RunFolder(tmp_path).read_log() == []


def test_all_finite_looks_at_every_floating_point_number() -> None:
    tensors = [torch.ones(3), torch.zeros(2, 2, dtype=torch.float16), torch.tensor(5), torch.full((2,), 1e18)]
    assert all_finite(tensors)
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite([*tensors, torch.tensor([1.0, bad])])


def test_it_says_what_it_trains_on_and_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path / "my run", optimizer=Optimizer(warmup_epochs=3)).run()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "noise: 36 images of 2 classes (dark, bright), decoded once"
    assert lines[1].startswith("warning: optimizer.warmup_epochs 3 is not below training.epochs 3: the learning rate ")
    assert lines[-1].endswith(f"Next: python eval/linear_probe.py '{tmp_path}/my run'")


def test_a_run_whose_images_changed_does_not_go_on(tmp_path: Path) -> None:
    """Not even where config.yaml is exchanged: the checkpoint itself is of other images."""
    stopped = trainer(tmp_path / "a")
    before_step(stopped, (1, 1), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        stopped.run()
    other = trainer(tmp_path / "b", images=image_set(44))
    shutil.copytree(tmp_path / "a/checkpoint", tmp_path / "b/checkpoint")
    with pytest.raises(ValueError, match="no readable checkpoint in .* of another run"):
        other.run()


def test_a_tracker_that_is_not_installed_is_refused() -> None:
    with pytest.raises(ValueError, match="training.trackers: nosuch not known to Accelerate or not installed"):
        create_accelerator(replace(TRAINING, trackers=["nosuch"]))


def test_trackers_get_name_settings_readings_and_pictures(tmp_path: Path) -> None:
    class Noted(GeneralTracker):
        name, requires_logging_directory = "wandb", True

        def __init__(self) -> None:
            super().__init__()
            self.got: list[tuple] = []

        @property
        def tracker(self) -> object:
            return self

        def store_init_configuration(self, values: dict) -> None:
            self.got.append(("settings", values))

        def log(self, values: dict, step: int, **kwargs: object) -> None:
            self.got.append(("log", step, set(values)))

        def log_images(self, values: dict, step: int) -> None:
            self.got.append(("images", step, values["mixed views"].shape[-1], values["mixed views"].dtype))

    training = replace(TRAINING, epochs=2, samples_every=2, trackers=["noted"])
    watched = trainer(tmp_path, training=replace(training, trackers=None))
    watched.training, noted = training, Noted()
    watched.folder.settings = {"optimizer": {"lr": 0.1}, "gradmix": {"layers": ["layer2"]}, "run": None}
    watched.accelerator.log_with = [noted]
    watched.run()
    (_, settings), *rest = noted.got
    assert settings == {"optimizer.lr": 0.1, "gradmix.layers": "['layer2']", "run": "None"}
    assert [entry[:2] for entry in rest] == [("log", 1), ("images", 2), ("log", 2)]
    assert {"loss", *Losses._fields[1:], "lr", *TIMED} - {"loss_supervised"} <= rest[0][2]
    assert rest[1][2:] == (3, np.uint8)


def test_stamps_of_the_images_are_in_the_views(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", images=replace(image_set(), stamps=Stamps(4)))
    pixels, _ = next(iter(made.source.epoch(0, 0)))
    views = made.source.views(pixels)
    boxes = Stamps(4).boxes(name(pixels), (16, 16))
    first, second = (crop(view, boxes, (2, 2)) for view in views)
    assert first.equal(second)
    assert len(first.unique()) == 2 * 3  # black and white, normalized by channel
