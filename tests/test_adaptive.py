"""The adaptive third view: its reading against a loop, its probability, and what is mixed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_support import before_step, create_method, log_of, newest, trainer

from ssl_gradmix.adaptive import Adaptive, agreement_lost
from ssl_gradmix.gradmix import GradMix, MixedViews
from ssl_gradmix.methods import BYOL, Method, SimCLR
from ssl_gradmix.training import trainer as trainer_module
from ssl_gradmix.training.trainer import Trainer


def mixed_views(count: int = 64) -> tuple[MixedViews, Tensor]:
    """Mixed views without a zero, and plain ones of zeros."""
    images = torch.rand(count, 3, 16, 16) + 1
    return GradMix(region="center", lam_range=(0.75, 0.75))(images, None, {}), 0 * images


def naive_reading(z0: Tensor, z1: Tensor, third: Tensor, chosen: list[int], area: float) -> float:
    """As documented, image by image."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    count = len(z0)
    lost = [cosine(z0[i], z1[i]) - cosine(third[i], z1[i]) for i in chosen]
    whole = sum(cosine(z0[i], z1[i]) for i in range(count)) / count
    pairs = itertools.permutations(range(count), 2)
    chance = sum(cosine(z0[i], z1[j]) for i, j in pairs) / count / (count - 1)
    return sum(lost) / len(lost) / (whole - chance) / area


@pytest.mark.parametrize("chosen", [[0, 3, 4], list(range(6))])
def test_reading_equals_a_loop(chosen: list[int]) -> None:
    z0, z1, third = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(6, dtype=torch.bool)
    mask[chosen] = True
    given = None if len(chosen) == 6 else mask
    with torch.autocast("cpu", torch.bfloat16):
        reading, number, count = agreement_lost(z0, z1, third, torch.tensor(0.2), given)
    assert reading.item() == pytest.approx(naive_reading(z0, z1, third, chosen, 0.2), rel=1e-4)
    assert (number, count) == (len(chosen), 6)


def test_third_views_are_mixed_with_the_probability() -> None:
    torch.manual_seed(0)
    adaptive = Adaptive(low=1.0, high=2.0, floor=0.1)
    mixed, plain = mixed_views(2000)
    for reading, probability in [(5.0, 1.0), (1.7, 0.7), (1.0, 0.1), (-3.0, 0.1)]:
        adaptive.reading.fill_(reading)
        third, lam = adaptive.choose(mixed, plain)
        are_mixed = third.flatten(1).any(1)
        assert torch.equal(third[are_mixed], mixed.images[are_mixed])
        fraction = are_mixed.float().mean().item()
        assert fraction == pytest.approx(probability, abs=0.04)
        assert lam.item() == pytest.approx(1 - 0.25 * fraction, abs=1e-5)


def test_reading_is_a_moving_average_that_starts_with_mixing_all() -> None:
    adaptive = Adaptive(low=1.0, high=2.0, floor=0.1, momentum=0.9)
    assert adaptive.probability == 1
    mixed, plain = mixed_views()
    z = torch.eye(64)
    third = z.roll(1, 1)  # nothing is left: the reading is 1 / 0.25, clamped to twice `high`
    expected = 2.0
    for _ in range(3):
        adaptive.choose(mixed, plain)
        metrics = adaptive.update(z, z, third)
        assert metrics["agreement_lost"] == 4
        expected = 0.9 * expected + 0.1 * 4
        assert adaptive.reading.item() == pytest.approx(expected)
    for _ in range(60):
        adaptive.choose(mixed, plain)
        metrics = adaptive.update(z, z, z)  # nothing is lost
    assert metrics["mix_probability"].item() == pytest.approx(0.1)
    assert metrics["mixed"].item() < 0.3


@pytest.mark.parametrize("case", ["evaluation", "nothing mixed", "collapsed"])
def test_reading_stays_where_there_is_nothing_to_read(case: str) -> None:
    adaptive = Adaptive()
    adaptive.train(case != "evaluation")
    mixed, plain = mixed_views()
    adaptive.choose(mixed, plain)
    if case == "nothing mixed":
        adaptive._chosen = torch.zeros(64, dtype=torch.bool)
    z = torch.ones(64, 4) if case == "collapsed" else torch.eye(64)
    before = adaptive.reading.clone()
    adaptive.update(z, z, z)
    assert torch.equal(adaptive.reading, before)


def test_state_is_saved_with_the_module() -> None:
    first, second = Adaptive(), Adaptive()
    first.reading.fill_(1.23)
    second.load_state_dict(first.state_dict())
    assert second.probability == first.probability


@pytest.mark.parametrize("arguments", [{"low": 3.0}, {"floor": 0.0}, {"momentum": 1.0}])
def test_invalid_arguments_raise(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="low"):
        Adaptive(**arguments)


class StoppedError(Exception):
    """Ends a training as a kill would."""


@pytest.mark.parametrize("kind", [SimCLR, BYOL])
def test_training_stopped_while_the_probability_falls_ends_the_same(
    kind: type[Method], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0.0)  # a checkpoint after every step

    def create(name: str) -> Trainer:
        torch.manual_seed(0)
        method = create_method(kind)
        method.adaptive = Adaptive(low=0, high=8)
        return trainer(tmp_path / name, method=method, n_views=3)

    def stop() -> None:
        raise StoppedError

    create("whole").run()
    stopped = create("parts")
    before_step(stopped, (1, 2), stop)
    with pytest.raises(StoppedError):
        stopped.run()
    resumed = create("parts")
    seen: list[float] = []
    before_step(resumed, (1, 2), lambda: seen.append(float(resumed.bare.adaptive.probability)))
    resumed.run()
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert log_of(tmp_path / "parts")[2:] == log_of(tmp_path / "whole")[2:]
    chances = [1, *seen, float(whole["method"]["adaptive.reading"]) / 8]
    assert chances == sorted(set(chances), reverse=True)
    assert 0.1 < log_of(tmp_path / "whole")[-1]["mixed"] < 1
