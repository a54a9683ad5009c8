from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from ssl_gradmix.evaluation import knn as module
from ssl_gradmix.evaluation.knn import knn_accuracy, knn_predict, used_k


def by_scikit_learn(features, bank, labels, k: int, temperature: float = 0.07) -> list[int]:
    def vote(distance: np.ndarray) -> np.ndarray:
        return np.exp(-distance / temperature)

    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=vote)
    return oracle.fit(bank, labels).predict(features).tolist()


@pytest.fixture
def clouds() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(7, 16))
    classes = rng.integers(0, 7, 400)
    points = torch.from_numpy(centers[classes] + 1.5 * rng.normal(size=(400, 16)))
    labels = torch.from_numpy(np.array([3, -5, 100, 7, 2**40, 11, 0])[classes])
    return points[:100], labels[:100], points[100:], labels[100:]


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_predictions_equal_scikit_learn(clouds, k, temperature) -> None:
    features, targets, bank, labels = clouds
    expected = by_scikit_learn(features, bank, labels, k, temperature)
    assert knn_predict(features, bank, labels, k, temperature).tolist() == expected
    accuracy = knn_accuracy(features, targets, bank, labels, k, temperature)
    assert accuracy == np.mean(expected == targets.numpy())


def test_neither_chunks_nor_scale_change_predictions(clouds, monkeypatch) -> None:
    features, _, bank, labels = clouds
    whole = knn_predict(features, bank, labels)
    scaled = knn_predict(features * torch.rand(100, 1) * 1e6, bank * 1e-6, labels)
    assert torch.equal(scaled, whole)
    monkeypatch.setattr(module, "_SIMILARITIES_AT_ONCE", 7 * len(bank))
    assert torch.equal(knn_predict(features, bank, labels), whole)


def test_k_is_clamped_to_the_bank(clouds) -> None:
    features, _, bank, labels = clouds
    assert (used_k(200, bank[:6]), used_k(3, bank)) == (6, 3)
    found = knn_predict(features, bank[:6], labels[:6], k=200)
    assert found.tolist() == by_scikit_learn(features, bank[:6], labels[:6], 6)


def test_equal_votes_go_to_the_smallest_label() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([9, 4, 9, 4])
    features = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    assert knn_predict(features, bank, labels, k=4).tolist() == [4, 4]


def test_small_temperature_does_not_overflow() -> None:
    """In float32, exp(1 / 0.01) and exp(0.9 / 0.01) are both infinite."""
    bank = torch.tensor([[0.9, 0.19**0.5], [1.0, 0.0], [0.9, -(0.19**0.5)]])
    labels = torch.tensor([3, 8, 3])
    assert knn_predict(torch.tensor([[1.0, 0.0]]), bank, labels, temperature=0.01).item() == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(clouds, dtype) -> None:
    features, _, bank, labels = clouds
    features, bank = features.to(dtype), bank.to(dtype)
    expected = knn_predict(features.double(), bank.double(), labels, temperature=0.01)
    assert torch.equal(knn_predict(features, bank, labels, temperature=0.01), expected)


def test_one_class_one_feature_and_none(clouds) -> None:
    features, _, bank, labels = clouds
    assert knn_predict(features[:1], bank, torch.full_like(labels, 5)).tolist() == [5]
    empty = knn_predict(features[:0], bank, labels.int())
    assert (empty.shape, empty.dtype) == ((0,), torch.int32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 0}, "k and"),
        ({"temperature": 0.0}, "temperature"),
        ({"labels": torch.zeros(299, dtype=torch.long)}, "labels"),
        ({"labels": torch.zeros(301, dtype=torch.long)}, "labels"),
    ],
)
def test_invalid_inputs_raise(clouds, changes, named) -> None:
    features, _, bank, labels = clouds
    with pytest.raises(ValueError, match=named):
        knn_predict(**{"features": features, "bank": bank, "labels": labels} | changes)
