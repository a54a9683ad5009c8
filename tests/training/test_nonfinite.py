"""What is not finite never reaches a checkpoint: the run stops and says where, or the step is taken back."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from training_support import TRAINING, final, trainer

from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.losses import Losses
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.settings import Optimizer
from ssl_gradmix.training import optimizers
from ssl_gradmix.training.loop import Trainer
from ssl_gradmix.training.nonfinite import Undo, all_finite

SKIP = replace(TRAINING, nonfinite="skip")


def poison(broken: Trainer, places: list[tuple[int, int]], what: str) -> None:
    """At these (epoch, batch)es all images are NaN, or a gradient overflows while the loss is finite."""
    step, parameter = broken._step, next(broken.bare.projector.parameters())

    def poisoned(batch: torch.Tensor) -> object:
        if (broken.epoch, broken.batch) not in places:
            return step(batch)
        if what == "gradient":
            handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
            done = step(batch)
            handle.remove()
            return done
        with pytest.MonkeyPatch.context() as patch:
            views = broken.source.views
            patch.setattr(broken.source, "views", lambda batch: [view * torch.nan for view in views(batch)])
            return step(batch)

    broken._step = poisoned


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("images", "loss is nan in epoch 2, batch 3; "),
        ("gradient", "loss is nan in epoch 2, batch 4; "),
    ],
)
@pytest.mark.parametrize("kind", [SimCLR, BYOL])
def test_stops_and_names_the_first_bad_loss(kind: type, what: str, message: str, tmp_path: Path) -> None:
    broken = trainer(tmp_path, kind)
    poison(broken, [(1, 2)], what)
    checkpoint = tmp_path / "checkpoint/epoch-00001-batch-0000000"
    with pytest.raises(FloatingPointError, match=f"{message}the last good checkpoint is {checkpoint}. A lower --opt"):
        broken.run()
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [checkpoint.name]
    assert all(tensor.isfinite().all() for tensor in final(tmp_path).values())


def test_weights_that_the_last_step_of_an_epoch_spoilt_are_not_saved(tmp_path: Path) -> None:
    broken = trainer(tmp_path)
    poison(broken, [(0, 3)], "gradient")
    with pytest.raises(
        FloatingPointError, match="weights are not finite after epoch 1, batch 4; there is no checkpoint yet"
    ):
        broken.run()
    assert not (tmp_path / "checkpoint").exists()
    assert RunFolder(tmp_path).read_log() == []


@pytest.mark.parametrize(
    ("kind", "optimizer", "accumulate", "what"),
    [
        (SimCLR, "adamw", 1, "gradient"),
        (BYOL, "lars", 1, "images"),
        (BYOL, "sgd", 2, "images"),
    ],
)
def test_a_skipped_step_leaves_everything_as_it_was(
    kind: type, optimizer: str, accumulate: int, what: str, tmp_path: Path
) -> None:
    """As if nothing had been done at that step: weights, statistics, teacher and the optimizer's state."""
    training = replace(SKIP, epochs=2, accumulate=accumulate)
    settings = {"training": training, "optimizer": Optimizer(optimizer)}
    # Of two micro-batches the second is bad, and the first goes with it.
    places = [(0, accumulate - 1), (1, 2 * accumulate + accumulate - 1)]
    skipping = trainer(tmp_path / "skipping", kind, **settings)
    poison(skipping, places, what)
    skipping.run()

    idle = trainer(tmp_path / "idle", kind, **settings)
    step, nothing = idle._step, torch.zeros(())

    def unless_bad(batch: torch.Tensor) -> object:
        if any((idle.epoch, idle.batch // accumulate) == (epoch, at // accumulate) for epoch, at in places):
            idle.accelerator.gradient_state._set_sync_gradients((idle.batch + 1) % accumulate == 0)
            idle.accelerator.step += 1
            return Losses(*[nothing] * 6), nothing
        return step(batch)

    idle._step = unless_bad
    idle.run()
    expected, found = final(tmp_path / "idle"), final(tmp_path / "skipping")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    states = [each.optimizer.state_dict()["state"] for each in (skipping, idle)]
    for one, two in zip(*(state.values() for state in states), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    entries = RunFolder(tmp_path / "skipping").read_log()
    assert [entry["skipped"] for entry in entries] == [1, 1]
    assert all(0 < entry["loss"] < 20 for entry in entries)


def test_the_log_means_over_finite_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipping = trainer(tmp_path, training=replace(SKIP, epochs=1))
    poison(skipping, [(0, 1), (0, 3)], "images")
    step, losses = skipping._step, []

    def noted(batch: torch.Tensor) -> object:
        done = step(batch)
        losses.append(done[0].total.item())
        return done

    skipping._step = noted
    skipping.run()
    (entry,) = RunFolder(tmp_path).read_log()
    assert entry["loss"] == pytest.approx((losses[0] + losses[2]) / 2, abs=1e-5)
    assert entry["skipped"] == 2
    assert "skipped 2" in capsys.readouterr().out


def test_an_epoch_of_skipped_steps_alone_is_an_error(tmp_path: Path) -> None:
    broken = trainer(tmp_path, training=SKIP)
    poison(broken, [(1, batch) for batch in range(4)], "images")
    with pytest.raises(FloatingPointError, match="all 4 steps of epoch 2 were skipped.*the last good checkpoint is"):
        broken.run()
    assert [entry["skipped"] for entry in RunFolder(tmp_path).read_log()] == [0]


def test_skipping_changes_nothing_where_all_is_finite(tmp_path: Path) -> None:
    trainer(tmp_path / "stop", BYOL, training=replace(TRAINING, epochs=1)).run()
    trainer(tmp_path / "skip", BYOL, training=replace(SKIP, epochs=1)).run()
    stop, skip = final(tmp_path / "stop"), final(tmp_path / "skip")
    assert all(torch.equal(stop[name], skip[name]) for name in stop)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_first_step_taken_back_leaves_the_optimizer_as_new(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    other, batch = copy.deepcopy(net), torch.randn(6, 4)
    for each, scales in ((net, (torch.inf, 1, 2)), (other, (1, 2))):
        optimizer = optimizers.create(each, Optimizer(name))
        undo = Undo(each, optimizer)
        for scale in scales:
            undo.remember()
            (each(batch) * scale).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            undo.take_back(torch.tensor(scale == torch.inf))
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in net.state_dict().items())


def test_all_finite_looks_at_every_floating_point_number() -> None:
    tensors = [torch.ones(3), torch.zeros(2, 2, dtype=torch.float16), torch.tensor(5), torch.full((2,), 1e18)]
    assert all_finite(tensors)
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite([*tensors, torch.tensor([1.0, bad])])
