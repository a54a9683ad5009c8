"""The training loop: resumption, accumulation, divergence, and what a run leaves behind."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from training_support import TRAINING, before_step, create_method, final, log_of, newest, trainer

from ssl_gradmix.methods import BYOL, Method, SimCLR, SupCon
from ssl_gradmix.training import trainer as trainer_module
from ssl_gradmix.training.optimizers import Optimizer
from ssl_gradmix.training.trainer import all_finite, clock, line, warnings


class StoppedError(Exception):
    """Ends a training as a kill would."""


def stop() -> None:
    raise StoppedError


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are read, and a checkpoint is written, after every step."""
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0.0)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("kind", "decode", "accumulate", "update", "place"),
    [
        (SimCLR, "once", 1, "sgd", (1, 3)),
        (SimCLR, "threads", 1, "adamw", (2, 1)),
        (BYOL, "threads", 1, "lars", (1, 2)),
        (BYOL, "once", 2, "sgd", (1, 5)),
        (SupCon, "threads", 1, "sgd", (0, 1)),
    ],
)
def test_resumed_training_ends_with_the_same_state(
    tmp_path: Path,
    kind: type[Method],
    decode: str,
    accumulate: int,
    update: str,
    place: tuple[int, int],
) -> None:
    training = replace(TRAINING, decode=decode, accumulate=accumulate)
    arguments: dict[str, Any] = {"training": training, "optimizer": Optimizer(name=update)}
    trainer(tmp_path / "whole", kind, **arguments).run()

    stopped = trainer(tmp_path / "parts", kind, **arguments)
    before_step(stopped, place, stop)
    with pytest.raises(StoppedError):
        stopped.run()
    first = newest(tmp_path / "parts")
    assert first["epoch"] == place[0]
    assert first["batch"] == place[1] // accumulate * accumulate
    trainer(tmp_path / "parts", kind, **arguments).run()

    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    logs = log_of(tmp_path / "whole"), log_of(tmp_path / "parts")
    assert logs[0][place[0] + 1 :] == logs[1][place[0] + 1 :]
    assert [entry["lr"] for entry in logs[0]] == [entry["lr"] for entry in logs[1]]


def test_finished_run_is_left_alone(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("epoch-*")}
    again = trainer(tmp_path)
    before_step(again, (0, 0), stop)
    again.run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("epoch-*")} == before
    assert [entry["epoch"] for entry in log_of(tmp_path)] == [1, 2, 3]


def test_run_folder_holds_weights_pictures_and_log(tmp_path: Path) -> None:
    done = trainer(tmp_path, training=replace(TRAINING, samples_every=2))
    done.run()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), done.bare.backbone.eval()(images))
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 16, 16)
    pictures = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert pictures == ["epoch-00002.png", "epoch-00003.png"]
    assert [(entry["epoch"], entry["step"]) for entry in log_of(tmp_path)] == [
        (1, 4),
        (2, 8),
        (3, 12),
    ]


def test_epoch_means_are_those_of_the_steps(tmp_path: Path) -> None:
    done = trainer(tmp_path, training=replace(TRAINING, epochs=1))
    steps, step = [], done._step

    def watched(*batch: Any) -> dict[str, Tensor]:
        steps.append(step(*batch))
        return steps[-1]

    done._step = watched
    done.run()
    (entry,) = log_of(tmp_path)
    for name in ("loss", "loss_views", "loss_mixed", "lam", "embedding_std", "flat"):
        expected = math.fsum(float(values[name]) for values in steps) / len(steps)
        assert entry[name] == pytest.approx(expected, abs=1e-5)


def test_monitor_and_pictures_do_not_change_the_training(tmp_path: Path) -> None:
    def read(backbone: nn.Module, device: torch.device) -> dict[str, float]:
        torch.rand(3)
        return {"anything": 0.123456}

    training = replace(TRAINING, epochs=2)
    trainer(tmp_path / "blind", training=training).run()
    training = replace(training, knn_every=1, samples_every=1)
    trainer(tmp_path / "watched", training=training, monitor=read).run()
    torch.testing.assert_close(
        final(tmp_path / "watched"), final(tmp_path / "blind"), rtol=0, atol=0
    )
    assert [entry["anything"] for entry in log_of(tmp_path / "watched")] == [0.1235, 0.1235]


class Quadratic(Method):
    """A loss of the views' mean colors, without BatchNorm and random numbers."""

    def forward(
        self, views: list[Tensor], labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.projector(views[0].mean((2, 3))) - 1).square().mean()
        return loss, {"embedding_std": torch.ones(())}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_give_the_step_of_their_batch(tmp_path: Path, accumulate: int) -> None:
    """One SGD step with clipping, against the gradient of the whole batch by hand."""
    method = Quadratic(create_method(SimCLR).backbone, nn.Linear(3, 2, bias=False))
    weight = method.projector.weight.detach().clone()
    optimizer = Optimizer(lr=32.0, weight_decay=0.0, warmup_epochs=0.0, clip=0.1)
    training = replace(TRAINING, epochs=1, accumulate=accumulate)
    done = trainer(tmp_path, training=training, method=method, optimizer=optimizer)
    colors, views = [], done.batches.views

    def watched(images: Tensor) -> list[Tensor]:
        made = views(images)
        colors.append(made[0].mean((2, 3)))
        return made

    done.batches.views = watched
    before_step(done, (0, accumulate), stop)
    with pytest.raises(StoppedError):
        done.run()
    x = torch.cat(colors)
    gradient = 2 * (x @ weight.T - 1).T @ x / (len(x) * 2)
    assert gradient.norm() > 0.1
    step = 32.0 * 8 / 256 * gradient * 0.1 / gradient.norm()
    torch.testing.assert_close(method.projector.weight, weight - step)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("what", ["loss", "weight"])
def test_divergence_stops_and_is_not_saved(tmp_path: Path, what: str) -> None:
    broken = trainer(tmp_path)
    parameter, views = next(broken.bare.projector.parameters()), broken.batches.views

    def poison() -> None:
        if what == "loss":
            broken.batches.views = lambda images: [view * math.nan for view in views(images)]
        else:
            parameter.register_hook(lambda gradient: gradient * math.inf)

    before_step(broken, (1, 2), poison)
    with pytest.raises(FloatingPointError, match="epoch 2"):
        broken.run()
    state = newest(tmp_path)
    assert (state["epoch"], state["batch"]) == (1, 2)
    assert all_finite(state["method"].values())
    assert [entry["epoch"] for entry in log_of(tmp_path)] == [1]


def test_checkpoints_are_a_minute_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps of 25 s, a checkpoint is due after three of them and at the end."""
    clock = [0.0]
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: clock[0])
    watched, places = trainer(tmp_path), []
    step, save = watched._step, watched._save

    def slow_step(*batch: Any) -> dict[str, Tensor]:
        clock[0] += 25
        return step(*batch)

    def watched_save() -> None:
        places.append((watched.epoch, watched.batch))
        save()

    watched._step, watched._save = slow_step, watched_save
    watched.run()
    assert places == [(0, 3), (1, 2), (2, 1), (3, 0)]


def test_batch_larger_than_the_data_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        trainer(tmp_path, training=replace(TRAINING, batch_size=40))


def test_trackers_get_settings_and_readings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer(tmp_path, training=replace(TRAINING, epochs=1, trackers=["tensorboard"])).run()
    assert [path for path in tmp_path.rglob("events.out.tfevents.*") if path.stat().st_size > 0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, []),
        ({"embedding_std": 0.05}, ["embedding_std"]),
        ({"flat": 0.6}, ["gradmix.layers"]),
        ({"embedding_std": 0.05, "flat": 0.6}, ["embedding_std", "gradmix.layers"]),
    ],
)
def test_warnings_of_an_epoch(change: dict[str, float], named: list[str]) -> None:
    found = warnings({"embedding_std": 0.9, "flat": 0.1} | change)
    assert len(found) == len(named)
    assert all(name in warning for name, warning in zip(named, found, strict=True))


def test_console_line_shows_whatever_metrics_there_are() -> None:
    entry = {"epoch": 2, "step": 8, "loss": 1.23456, "hit": 0.5, "seconds_left": 90.0}
    shown = line(entry, 10)
    assert all(part in shown for part in ("2/10", "loss 1.235", "hit 0.5", "00:01:30"))
    assert clock(30 * 3600) == "30:00:00"
