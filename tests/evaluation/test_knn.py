from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from ssl_gradmix.evaluation.knn import knn_accuracy, knn_predict, used_k


def naive_predictions(features, bank, labels, k, temperature):
    """Wu et al.'s rule in float64, one feature and one neighbor at a time."""
    predictions = []
    for feature in np.asarray(features, np.float64):
        cosines = [feature @ b / np.linalg.norm(feature) / np.linalg.norm(b) for b in np.asarray(bank, np.float64)]
        nearest = np.argsort(cosines)[::-1][:k]
        votes = {}
        for i in nearest:
            votes[labels[i]] = votes.get(labels[i], 0.0) + np.exp((cosines[i] - max(cosines)) / temperature)
        predictions.append(max(sorted(votes), key=votes.get))
    return np.array(predictions)


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(7, 16))
    classes = rng.integers(0, 7, 400)
    points = centers[classes] + 1.5 * rng.normal(size=(400, 16))
    names = np.array([3, -5, 100, 7, 2**40, 11, 0])[classes]  # labels need be neither contiguous nor small
    return points[:100], names[:100], points[100:], names[100:]


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_equals_scikit_learn_and_the_naive_loop(clouds, k, temperature):
    features, targets, bank, labels = clouds
    oracle = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / temperature)
    ).fit(bank, labels)
    found = knn_predict(*map(torch.from_numpy, (features, bank, labels)), k=k, temperature=temperature).numpy()

    assert (found == oracle.predict(features)).all()
    assert (found == naive_predictions(features, bank, labels, k, temperature)).all()
    accuracy = knn_accuracy(*map(torch.from_numpy, (features, targets, bank, labels)), k=k, temperature=temperature)
    assert accuracy == pytest.approx(oracle.score(features, targets), abs=1e-12)


def test_chunks_do_not_change_the_result(clouds, monkeypatch):
    features, _, bank, labels = map(torch.from_numpy, clouds)
    whole = knn_predict(features, bank, labels)
    monkeypatch.setattr("ssl_gradmix.evaluation.knn._SIMILARITIES_AT_ONCE", 7 * len(bank))
    assert torch.equal(knn_predict(features, bank, labels), whole)


def test_k_is_clamped_to_the_bank(clouds):
    features, _, bank, labels = clouds
    bank, labels = bank[:6], labels[:6]
    assert used_k(200, torch.from_numpy(bank)) == 6
    assert used_k(3, torch.from_numpy(bank)) == 3
    found = knn_predict(*map(torch.from_numpy, (features, bank, labels)), k=200).numpy()
    assert (found == naive_predictions(features, bank, labels, 6, 0.07)).all()


def test_equal_votes_go_to_the_smallest_label():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([9, 4, 9, 4])
    assert knn_predict(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), bank, labels, k=4).tolist() == [4, 4]


def test_small_temperatures_do_not_overflow():
    """In float32, exp(1 / 0.01) and exp(0.9 / 0.01) are both infinite."""
    bank = torch.tensor([[0.9, 0.19**0.5], [1.0, 0.0], [0.9, -(0.19**0.5)]])
    assert knn_predict(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([3, 8, 3]), temperature=0.01).item() == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(clouds, dtype):
    features, _, bank, labels = map(torch.from_numpy, clouds)
    features, bank = features.to(dtype), bank.to(dtype)
    found = knn_predict(features, bank, labels, temperature=0.01)
    assert torch.equal(found, knn_predict(features.double(), bank.double(), labels, temperature=0.01))


def test_scale_of_features_does_not_matter(clouds):
    features, _, bank, labels = map(torch.from_numpy, clouds)
    scaled = knn_predict(features * torch.rand(100, 1) * 1e6, bank * 1e-6, labels)
    assert torch.equal(scaled, knn_predict(features, bank, labels))


def test_arrays_one_class_one_feature_and_none(clouds):
    features, _, bank, labels = clouds
    assert knn_predict(features[:1], bank, np.full_like(labels, 5)).tolist() == [5]
    empty = knn_predict(features[:0], bank, labels.astype(np.int32))
    assert empty.shape == (0,)
    assert empty.dtype == torch.int32


def test_bad_input(clouds):
    features, targets, bank, labels = map(torch.from_numpy, clouds)
    for function, given, options, message in (
        (knn_predict, (features, bank, labels), {"k": 0}, "k must be at least 1, got 0"),
        (knn_predict, (features, bank, labels), {"temperature": 0}, "temperature must be above 0, got 0"),
        (knn_predict, (features[:, :15], bank, labels), {}, r"share D, got \(100, 15\) and \(300, 16\)"),
        (knn_predict, (features, bank[:0], labels[:0]), {}, "bank must hold features and a label"),
        (knn_predict, (features, bank, labels[1:]), {}, r"a label for each, got \(300, 16\) and \(299,\)"),
        (knn_predict, (features / 0, bank, labels), {}, "features must be finite, got 100 of 100 rows"),
        (knn_accuracy, (features[:0], targets[:0], bank, labels), {}, "at least one, got 0 for 0"),
        (knn_accuracy, (features, targets[1:], bank, labels), {}, "at least one, got 99 for 100"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*given, **options)
