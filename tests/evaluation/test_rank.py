"""Effective rank (RankMe) against its formula and in cases that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ssl_gradmix.evaluation.rank import rankme


def by_the_formula(features: np.ndarray) -> float:
    values = np.linalg.svd(features, compute_uv=False)
    shares = [value / values.sum() + 1e-7 for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (30, 30), (1, 5)])
def test_equals_the_formula(shape: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(size=shape) * np.linspace(0.1, 3, shape[1])
    assert rankme(features) == pytest.approx(by_the_formula(features), rel=1e-4)
    assert rankme(torch.from_numpy(7 * features)) == pytest.approx(by_the_formula(features), rel=1e-4)


def test_known_ranks() -> None:
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert rankme(torch.ones(100, 32)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.randn(100, 1) * torch.randn(32)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(5, 3)) == 0
    # Singular values 3 and 1: shares 3/4 and 1/4.
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3), r"features must be \(N, D\) and not empty, got \(3,\)"),
        (torch.zeros(0, 3), r"features must be \(N, D\) and not empty, got \(0, 3\)"),
        (torch.tensor([[1.0, torch.nan]]), "features must be finite"),
    ],
)
def test_refuses_what_has_no_rank(features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rankme(features)
