from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pytorch_ood import detector
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax
from sklearn.covariance import EmpiricalCovariance

from ssl_gradmix.evaluation import scores
from ssl_gradmix.evaluation.scores import all_scores, knn_distance, mahalanobis, rmd, vim

D = 12


class Data(NamedTuple):
    """Training features of three classes, test features of them and of a fourth, and logits."""

    train: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    train_logits: np.ndarray
    test_logits: np.ndarray


@pytest.fixture(scope="module")
def data() -> Data:
    rng = np.random.default_rng(0)
    centers, scales = 2 * rng.normal(size=(4, D)), rng.uniform(0.3, 2, size=D)
    labels = rng.permutation(np.repeat([0, 1, 2], [70, 150, 30]))
    test_labels = np.repeat([0, 1, 2, 3], 20)
    train = (centers[labels] + scales * rng.normal(size=(250, D))).astype(np.float32)
    test = (centers[test_labels] + scales * rng.normal(size=(80, D))).astype(np.float32)
    weight, bias = rng.normal(size=(3, D)), rng.normal(size=3)
    logits = [(x @ weight.T + bias).astype(np.float32) for x in (train, test)]
    return Data(train, labels, test, *logits)


@pytest.fixture
def _float64() -> Iterator[None]:
    """pytorch-ood allocates covariances in the default dtype; float32 is too coarse here."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_pytorch_ood(fitted: object, data: Data) -> np.ndarray:
    train, test = (torch.from_numpy(x).double() for x in (data.train, data.test))
    return fitted.fit_features(train, torch.from_numpy(data.labels)).predict_features(test).numpy()


def unit(features: np.ndarray) -> np.ndarray:
    """L2-normalized in float64. Features of zeros stay as they are."""
    wide = features.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(lengths == 0, 1, lengths)


CHANGES = {
    "none": lambda x: x,
    "zeros": lambda x: x * (np.arange(len(x))[:, None] % 3 > 0),
    "nearly collapsed": lambda x: 1 + np.float32(1e-3) * x,
    "near duplicates": lambda x: x[:1] * (1 + 1e-7 * x.astype(np.float64)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_knn_distance_equals_brute_force(data: Data, change) -> None:
    train, test = change(data.train), change(data.test)
    pairs = np.linalg.norm(unit(test)[:, None] - unit(train), axis=2)
    found = [-knn_distance(train, data.labels, test, k) for k in (1, 7, 50, 250)]
    expected = np.sort(pairs, axis=1)[:, [0, 6, 49, 249]]
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(knn_distance(train, data.labels, train, k=1), 0)
    oracle = by_pytorch_ood(detector.KNN(None, k=7), data)
    np.testing.assert_allclose(-knn_distance(*data[:3], 7), oracle, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 30])
def test_top_k_cosine_equals_a_loop(data: Data, k: int) -> None:
    expected = []
    for x in unit(data.test):
        cosines = [sorted(t @ x for t in unit(data.train[data.labels == c])) for c in range(3)]
        expected.append(max(sum(of_class[-k:]) for of_class in cosines))
    np.testing.assert_allclose(scores.top_k_cosine(*data[:3], k), expected, rtol=1e-9)


def test_parameters_are_clamped_and_recorded(data: Data) -> None:
    used = scores.parameters_used(data.train, data.labels, k=1000, top_k=1000)
    assert used == {"knn_distance": {"k": 250}, "top_k_cosine": {"k": 30}, "vim": {"dim": 6}}
    for score, k in ((knn_distance, 250), (scores.top_k_cosine, 30)):
        np.testing.assert_array_equal(score(*data[:3], 1000), score(*data[:3], k))
    for n, d, dim in ((5000, 2048, 1000), (5000, 768, 512), (5000, 512, 256), (9, 512, 4)):
        used = scores.parameters_used(np.empty((n, d)), np.zeros(n, dtype=int))
        assert used["vim"] == {"dim": dim}


def test_ncm_equals_scipy(data: Data) -> None:
    means = np.stack([unit(data.train)[data.labels == c].mean(0) for c in range(3)])
    expected = 1 - cdist(data.test, means, metric="cosine").min(1)
    np.testing.assert_allclose(scores.ncm(*data[:3]), expected, atol=1e-6)


@pytest.mark.usefixtures("_float64")
def test_mahalanobis_equals_scikit_learn_and_pytorch_ood(data: Data) -> None:
    """pytorch-ood halves the distance and does not divide the covariance by N."""
    wide = data.train.astype(np.float64)
    means = np.stack([wide[data.labels == c].mean(0) for c in range(3)])
    fitted = EmpiricalCovariance(assume_centered=True).fit(wide - means[data.labels])
    expected = cdist(data.test, means, "mahalanobis", VI=fitted.precision_).min(1) ** 2
    score = mahalanobis(*data[:3])
    np.testing.assert_allclose(-score, expected, rtol=1e-9)
    oracle = 2 * len(data.train) * by_pytorch_ood(detector.Mahalanobis(None), data)
    np.testing.assert_allclose(-score, oracle, rtol=1e-5)


@pytest.mark.usefixtures("_float64")
def test_rmd_equals_pytorch_ood(data: Data) -> None:
    expected = -len(data.train) * by_pytorch_ood(detector.RMD(None), data)
    np.testing.assert_allclose(rmd(*data[:3]), expected, rtol=1e-5, atol=1e-5)
    one_class = np.zeros_like(data.labels)
    np.testing.assert_allclose(rmd(data.train, one_class, data.test), 0, atol=1e-6)


@pytest.mark.usefixtures("_float64")
def test_vim_equals_pytorch_ood(data: Data) -> None:
    """A classifier whose logits vanish at the mean has the paper's origin at the mean."""
    weight = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    mean = data.train.astype(np.float64).mean(0)
    bias = -weight @ mean
    train_logits, test_logits = data.train @ weight.T + bias, data.test @ weight.T + bias
    score = vim(*data[:3], train_logits, test_logits)
    w, b = torch.from_numpy(weight), torch.from_numpy(bias)
    oracle = by_pytorch_ood(detector.ViM(None, d=D // 2, w=w, b=b), data)
    np.testing.assert_allclose(-score, oracle, rtol=1e-5, atol=1e-5)


def test_logit_scores_equal_scipy_and_pytorch_ood(data: Data) -> None:
    wide = data.test_logits.astype(np.float64)
    for score, expected, oracle in (
        (scores.msp, softmax(wide, axis=1).max(1), detector.MaxSoftmax(None)),
        (scores.max_logit, wide.max(1), detector.MaxLogit(None)),
        (scores.energy, logsumexp(wide, axis=1), detector.EnergyBased(None)),
    ):
        found = score(data.test_logits)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        outlier = oracle.predict_logits(torch.from_numpy(data.test_logits)).numpy()
        np.testing.assert_allclose(-found, outlier, atol=1e-5)
    confident = np.array([[0.0, 20.0], [0.0, 25.0], [1000.0, 900.0]], dtype=np.float32)
    assert scores.msp(confident)[0] < scores.msp(confident)[1] < 1
    np.testing.assert_allclose(scores.energy(confident), [20.0, 25.0, 1000.0], atol=1e-6)


def test_all_scores_are_the_single_ones(data: Data) -> None:
    expected = {
        "knn_distance": knn_distance(*data[:3], k=9),
        "top_k_cosine": scores.top_k_cosine(*data[:3], k=4),
        "ncm": scores.ncm(*data[:3]),
        "mahalanobis": mahalanobis(*data[:3]),
        "rmd": rmd(*data[:3]),
        "vim": vim(*data),
        "msp": scores.msp(data.test_logits),
        "max_logit": scores.max_logit(data.test_logits),
        "energy": scores.energy(data.test_logits),
    }
    before = [array.copy() for array in data]
    found = all_scores(*data, k=9, top_k=4)
    assert list(found) == list(expected)
    for name, score in found.items():
        assert score.dtype == np.float64
        np.testing.assert_array_equal(score, expected[name], err_msg=name)
    assert all(map(np.array_equal, data, before))  # arguments are not modified


def assert_same_scores(found: dict[str, np.ndarray], data: Data, tolerance: float = 1e-5) -> None:
    for name, expected in all_scores(*data).items():
        np.testing.assert_allclose(found[name], expected, tolerance, tolerance, err_msg=name)


def test_neither_blocks_nor_order_nor_names_of_classes_matter(data: Data, monkeypatch) -> None:
    order = np.random.default_rng(1).permutation(len(data.train))
    labels = np.array([900, 7, 41])[data.labels[order]]
    monkeypatch.setattr(scores, "_SIMILARITIES_AT_ONCE", 7 * 250)
    monkeypatch.setattr(scores, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(scores, "_WHOLE_BANK", 0)
    monkeypatch.setattr(scores, "_ROWS_AT_ONCE", 13)
    found = all_scores(
        data.train[order], labels, data.test, data.train_logits[order], data.test_logits
    )
    monkeypatch.undo()
    assert_same_scores(found, data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_any_dtype_equal_arrays(data: Data, dtype: torch.dtype) -> None:
    tensors = [torch.from_numpy(array) for array in data]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    arrays = [t.double().numpy() if t.is_floating_point() else t.numpy() for t in tensors]
    tensors[2] = tensors[2].double()  # the dtypes of test and training features may differ
    assert_same_scores(all_scores(*tensors), Data(*arrays), 1e-4)


def test_batch_of_one(data: Data) -> None:
    whole = all_scores(*data)
    single = all_scores(*data[:2], data.test[5:6], data.train_logits, data.test_logits[5:6])
    for name, score in single.items():
        np.testing.assert_allclose(score, whole[name][5:6], rtol=1e-9, err_msg=name)


def test_constant_and_repeated_features_do_not_change_mahalanobis(data: Data) -> None:
    rng = np.random.default_rng(0)
    train, test = (
        np.hstack([x, np.full((len(x), 2), 3.7), x[:, :4]]).astype(np.float32)
        for x in (data.train, data.test)
    )
    test[:, D : D + 2] += rng.normal(size=(len(test), 2))
    for score in (mahalanobis, rmd):
        found = score(train, data.labels, test)
        np.testing.assert_allclose(found, score(*data[:3]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_more_dimensions_than_samples(n: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    train, test = rng.normal(size=(n, 64)) + labels[:, None], rng.normal(size=(30, 64))
    for name, score in all_scores(train, labels, test, train[:, :2], test[:, :2]).items():
        assert np.isfinite(score).all(), name
    # No training sample is farther from the mean than N samples allow.
    assert (mahalanobis(train, labels, train) >= -n - 1e-6).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_collapsed_features_give_finite_scores(value: float) -> None:
    train, labels = np.full((40, 8), value, dtype=np.float32), np.arange(40) % 2
    test = np.full((10, 8), value, dtype=np.float32)
    test[5:] += np.arange(8, dtype=np.float32) + 1
    logits = np.random.default_rng(0).normal(size=(50, 2))
    found = all_scores(train, labels, test, logits[:40], logits[40:])
    for name, score in found.items():
        assert np.isfinite(score).all(), name
    np.testing.assert_array_equal(found["mahalanobis"], 0)
    np.testing.assert_array_equal(found["vim"], found["energy"])


@pytest.mark.parametrize(
    ("score", "changes", "named"),
    [
        (knn_distance, {"k": 0}, "k"),
        (scores.top_k_cosine, {"k": 0}, "top_k"),
        (scores.ncm, {"labels": np.arange(249) % 3}, "labels"),
        (mahalanobis, {"labels": np.arange(250) % 3 - 1}, "labels"),
        (rmd, {"labels": np.zeros((250, 1), dtype=int)}, "labels"),
    ],
)
def test_invalid_inputs_raise(data: Data, score, changes: dict, named: str) -> None:
    arguments = {"train": data.train, "labels": data.labels, "test": data.test}
    with pytest.raises(ValueError, match=named):
        score(**arguments | changes)
