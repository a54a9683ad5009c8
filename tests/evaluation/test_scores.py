from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_ood import detector
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax
from sklearn.covariance import EmpiricalCovariance

from ssl_gradmix.evaluation import scores as module
from ssl_gradmix.evaluation.metrics import auroc
from ssl_gradmix.evaluation.scores import (
    all_scores,
    energy,
    knn_distance,
    mahalanobis,
    max_logit,
    msp,
    ncm,
    parameters_used,
    rmd,
    top_k_cosine,
    vim,
)

D = 12


@pytest.fixture(scope="module")
def cloud():
    """Training features of three classes of unequal size, test features of them and of a fourth, and a classifier."""
    rng = np.random.default_rng(0)
    centers, scales = 2 * rng.normal(size=(4, D)), rng.uniform(0.3, 2, size=D)
    labels = rng.permutation(np.repeat([0, 1, 2], [70, 150, 30]))
    test_labels = np.repeat([0, 1, 2, 3], 20)
    train = (centers[labels] + scales * rng.normal(size=(250, D))).astype(np.float32)
    test = (centers[test_labels] + scales * rng.normal(size=(80, D))).astype(np.float32)
    weight, bias = rng.normal(size=(3, D)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    return {
        "data": (train, labels, test),
        "logits": (train @ weight.T + bias, test @ weight.T + bias),
        "classifier": (weight, bias),
        "is_known": test_labels < 3,
    }


@pytest.fixture
def float64_oracle():
    """pytorch-ood allocates covariances in the default dtype; in float32 its own rounding exceeds 1e-5."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def outlier_scores(fitted, test):
    return fitted.predict_features(torch.from_numpy(test).double()).numpy()


@pytest.mark.parametrize("k", [1, 7, 50, 250])
def test_knn_distance(cloud, k):
    train, labels, test = cloud["data"]
    score = knn_distance(train, labels, test, k)
    oracle = detector.KNN(None, k=k).fit_features(torch.from_numpy(train), torch.from_numpy(labels))
    np.testing.assert_allclose(-score, outlier_scores(oracle, test), atol=1e-5)
    np.testing.assert_allclose(-score, brute_force(train, test)[:, k - 1], atol=1e-12)


def brute_force(train, test):
    """Distances in float64 to all training features, nearest first; a feature of zeros has no direction and stays."""
    wide = [features.astype(np.float64) for features in (train, test)]
    lengths = [np.linalg.norm(features, axis=1, keepdims=True) for features in wide]
    train, test = (features / np.where(length == 0, 1, length) for features, length in zip(wide, lengths, strict=True))
    return np.sort(np.linalg.norm(test[:, None] - train, axis=2), axis=1)


def with_zeros(features):
    return np.where(np.arange(len(features))[:, None] % 3 == 0, 0, features).astype(np.float32)


def nearly_collapsed(features):
    return (1 + 1e-3 * features).astype(np.float32)


def near_duplicates(features):
    return np.tile(features[:1], (len(features), 1)) * (1 + 1e-7 * features)


@pytest.mark.parametrize("change", [with_zeros, nearly_collapsed, near_duplicates])
def test_knn_distance_against_brute_force_where_digits_are_lost(cloud, change):
    train, labels, test = cloud["data"]
    train, test = change(train), change(test)
    expected = brute_force(train, test)
    distances = np.stack([-knn_distance(train, labels, test, k) for k in range(1, 251)], axis=1)
    np.testing.assert_allclose(distances, expected, rtol=1e-6, atol=1e-9)
    assert (np.diff(distances, axis=1) >= -1e-9 * distances.max()).all(), "farther with each neighbor"
    np.testing.assert_array_equal(knn_distance(train, labels, train, k=1), 0)


@pytest.mark.parametrize("k", [1, 3, 30])
@pytest.mark.parametrize("divided", [False, True])
def test_top_k_cosine(cloud, k, divided):
    train, labels, test = cloud["data"]
    sums = np.zeros((len(test), 3))
    for i, x in enumerate(test.astype(np.float64)):
        for c in range(3):
            cosines = [x @ t / np.linalg.norm(x) / np.linalg.norm(t) for t in train[labels == c].astype(np.float64)]
            sums[i, c] = sum(sorted(cosines)[-k:])
    expected = (sums / sums.sum(1, keepdims=True) if divided else sums).max(1)
    np.testing.assert_allclose(top_k_cosine(train, labels, test, k, divided), expected, rtol=1e-9)


def test_k_is_clamped_and_says_so(cloud):
    train, labels, test = cloud["data"]
    used = parameters_used(train, labels, k=1000, top_k=1000)
    assert used["knn_distance"] == {"k": 250}
    assert used["top_k_cosine"] == {"k": 30}
    np.testing.assert_array_equal(knn_distance(train, labels, test, 1000), knn_distance(train, labels, test, 250))
    np.testing.assert_array_equal(top_k_cosine(train, labels, test, 1000), top_k_cosine(train, labels, test, 30))
    assert parameters_used(train, labels, k=7, top_k=2)["knn_distance"] == {"k": 7}


def test_ncm(cloud):
    train, labels, test = cloud["data"]
    means = np.stack([train[labels == c].mean(0) for c in range(3)])
    directions = np.stack([unit(train)[labels == c].mean(0) for c in range(3)])
    cosine = ncm(train, labels, test)
    np.testing.assert_allclose(cosine, 1 - cdist(test, directions, metric="cosine").min(1), atol=1e-5)
    euclidean = ncm(train, labels, test, metric="euclidean")
    np.testing.assert_allclose(euclidean, -cdist(test, means).min(1), rtol=1e-5)


def test_mahalanobis(cloud, float64_oracle):
    train, labels, test = cloud["data"]
    score = mahalanobis(train, labels, test)
    centered = np.concatenate([train[labels == c] - train[labels == c].mean(0) for c in range(3)]).astype(np.float64)
    precision = EmpiricalCovariance(assume_centered=True).fit(centered).precision_
    means = np.stack([train[labels == c].mean(0) for c in range(3)])
    np.testing.assert_allclose(-score, cdist(test, means, "mahalanobis", VI=precision).min(1) ** 2, rtol=1e-5)
    # pytorch-ood halves the distance and does not divide the covariance by N.
    oracle = detector.Mahalanobis(None).fit_features(torch.from_numpy(train).double(), torch.from_numpy(labels))
    np.testing.assert_allclose(-score, 2 * len(train) * outlier_scores(oracle, test), rtol=1e-5)


def test_rmd(cloud, float64_oracle):
    train, labels, test = cloud["data"]
    oracle = detector.RMD(None).fit_features(torch.from_numpy(train).double(), torch.from_numpy(labels))
    expected = -len(train) * outlier_scores(oracle, test)
    np.testing.assert_allclose(rmd(train, labels, test), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rmd(train, np.zeros_like(labels), test), 0, atol=1e-6)  # one class


def test_vim_with_the_papers_origin(cloud, float64_oracle):
    (train, labels, test), (weight, bias) = cloud["data"], cloud["classifier"]
    origin = -np.linalg.pinv(weight.astype(np.float64)) @ bias
    score = vim(train, labels, test, *cloud["logits"], dim=5, origin=origin)
    oracle = detector.ViM(None, d=5, w=torch.from_numpy(weight), b=torch.from_numpy(bias))
    oracle.fit_features(torch.from_numpy(train), torch.from_numpy(labels))
    np.testing.assert_allclose(-score, oracle.predict_features(torch.from_numpy(test)).numpy(), rtol=1e-5, atol=1e-5)


def test_vim_about_the_mean_is_energy_less_the_pca_residual(cloud):
    train, labels, test = cloud["data"]
    train_logits, test_logits = cloud["logits"]
    center = train.astype(np.float64).mean(0)
    _, _, components = np.linalg.svd(train - center)

    def residual(features):
        centered = features - center
        return np.linalg.norm(centered - centered @ components[:6].T @ components[:6], axis=1)

    alpha = train_logits.max(1).mean() / residual(train).mean()
    expected = logsumexp(test_logits.astype(np.float64), axis=1) - alpha * residual(test)
    np.testing.assert_allclose(vim(train, labels, test, train_logits, test_logits), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dim"), [((5000, 2048), 1000), ((5000, 768), 512), ((5000, 512), 256), ((9, 512), 4)]
)
def test_vim_dimension(shape, dim):
    assert parameters_used(np.empty(shape), np.zeros(len(shape), dtype=int))["vim"] == {"dim": dim}


def test_logit_scores(cloud):
    logits = cloud["logits"][1]
    wide = logits.astype(np.float64)
    np.testing.assert_allclose(msp(logits), softmax(wide, axis=1).max(1), rtol=1e-9)
    np.testing.assert_array_equal(max_logit(logits), logits.max(1))
    np.testing.assert_allclose(energy(logits), logsumexp(wide, axis=1), rtol=1e-9)
    np.testing.assert_allclose(energy(logits, temperature=2.5), 2.5 * logsumexp(wide / 2.5, axis=1), rtol=1e-9)
    tensor = torch.from_numpy(logits)
    for score, oracle in (
        (msp(logits), detector.MaxSoftmax(None)),
        (max_logit(logits), detector.MaxLogit(None)),
        (energy(logits), detector.EnergyBased(None)),
    ):
        np.testing.assert_allclose(-score, oracle.predict_logits(tensor).numpy(), atol=1e-5)


def test_logit_scores_neither_saturate_nor_overflow():
    logits = np.array([[0.0, 20.0], [0.0, 25.0], [1000.0, 900.0]], dtype=np.float32)
    assert msp(logits)[0] < msp(logits)[1] < 1
    np.testing.assert_allclose(energy(logits), [20.0, 25.0, 1000.0], atol=1e-6)


def test_opposite_classes_divided_are_finite():
    train, labels = np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([0, 1])
    assert top_k_cosine(train, labels, np.array([[1.0, 0.0], [0.0, 1.0]]), k=1, divided=True).tolist() == [0, 0]


def test_all_scores_are_the_single_ones(cloud):
    data, logits = cloud["data"], cloud["logits"]
    scores = all_scores(*data, *logits, k=9, top_k=4)
    expected = {
        "knn_distance": knn_distance(*data, k=9),
        "top_k_cosine": top_k_cosine(*data, k=4),
        "ncm": ncm(*data),
        "ncm_euclidean": ncm(*data, metric="euclidean"),
        "mahalanobis": mahalanobis(*data),
        "rmd": rmd(*data),
        "feature_norm": np.linalg.norm(data[2], axis=1),
        "vim": vim(*data, *logits),
        "msp": msp(logits[1]),
        "max_logit": max_logit(logits[1]),
        "energy": energy(logits[1]),
    }
    assert list(scores) == list(expected)
    for name, score in scores.items():
        assert score.dtype == np.float64
        np.testing.assert_allclose(score, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_larger_is_more_known():
    """Classes on the axes, far from 0 for what is known; unknown samples near 0, between the axes, off their plane."""
    rng = np.random.default_rng(0)
    axes, labels = 5 * np.eye(3, 8), rng.integers(0, 3, 300)
    train = axes[labels] + 0.3 * rng.normal(size=(300, 8)) * (np.arange(8) < 5)
    test = np.concatenate([axes[rng.integers(0, 3, 50)], np.tile([1, 1, 1, 0, 0, 1, 1, 1], (50, 1))])
    test += 0.3 * rng.normal(size=test.shape) * (np.arange(8) < 5)
    scores = all_scores(train, labels, test, train[:, :3], test[:, :3])
    for name, score in scores.items():
        assert auroc(score, np.arange(100) < 50) > 0.99, name


def test_blocks_do_not_matter(cloud, monkeypatch):
    whole = all_scores(*cloud["data"], *cloud["logits"])
    monkeypatch.setattr(module, "_SIMILARITIES_AT_ONCE", 7 * 250)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 13)
    for name, score in all_scores(*cloud["data"], *cloud["logits"]).items():
        np.testing.assert_allclose(score, whole[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_neither_the_order_nor_the_names_of_classes_matter(cloud):
    (train, labels, test), (train_logits, test_logits) = cloud["data"], cloud["logits"]
    expected = all_scores(train, labels, test, train_logits, test_logits)
    order = np.random.default_rng(1).permutation(len(train))
    names = np.array([900, 7, 41])[labels]
    scores = all_scores(train[order], names[order], test, train_logits[order], test_logits)
    for name, score in scores.items():
        np.testing.assert_allclose(score, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_any_dtype(cloud, dtype):
    tensors = [torch.as_tensor(array) for array in (*cloud["data"], *cloud["logits"])]
    tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    expected = all_scores(*[t.double().numpy() if t.is_floating_point() else t.numpy() for t in tensors])
    tensors[2] = tensors[2].double()  # test features may differ in type from training features
    for name, score in all_scores(*tensors).items():
        np.testing.assert_allclose(score, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_features_that_do_not_vary_do_not_count(cloud):
    """Constant and repeated features leave Mahalanobis distances what they are without them."""
    train, labels, test = cloud["data"]
    rng = np.random.default_rng(0)
    wider = [np.hstack([x, np.full((len(x), 2), 3.7), x[:, :4]]).astype(np.float32) for x in (train, test)]
    wider[1][:, D : D + 2] += rng.normal(size=(len(test), 2))
    for score in (mahalanobis, rmd):
        expected = score(train, labels, test)
        np.testing.assert_allclose(score(wider[0], labels, wider[1]), expected, rtol=1e-4, atol=1e-4)


def test_vim_sees_test_samples_leave_the_space_of_the_training_features(cloud):
    train, labels, test = cloud["data"]
    flat, off = np.hstack([train, np.zeros((len(train), 1))]), np.zeros((len(test), 1))
    inside = vim(flat, labels, np.hstack([test, off]), *cloud["logits"])
    outside = vim(flat, labels, np.hstack([test, off + 5]), *cloud["logits"])
    assert (outside < inside - 1).all()


@pytest.mark.parametrize("n_samples", [2, 3, 20])
def test_more_dimensions_than_samples(n_samples):
    rng = np.random.default_rng(0)
    labels = np.arange(n_samples) % 2
    train, test = rng.normal(size=(n_samples, 64)) + labels[:, None], rng.normal(size=(30, 64))
    scores = all_scores(train, labels, test, train[:, :2], test[:, :2])
    for name, score in scores.items():
        assert np.isfinite(score).all(), name
    # Every training sample is within the distance that N samples can have from their mean.
    assert (mahalanobis(train, labels, train) >= -n_samples - 1e-6).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_collapsed_features(value):
    """An encoder that answers every training image alike: nothing to fit, no NaN, and distances still tell."""
    train, labels = np.full((40, 8), value, dtype=np.float32), np.arange(40) % 2
    test = np.full((10, 8), value, dtype=np.float32)
    test[5:] += np.arange(8, dtype=np.float32) + 1
    logits = np.random.default_rng(0).normal(size=(50, 2))
    scores = all_scores(train, labels, test, logits[:40], logits[40:])
    for name, score in scores.items():
        assert np.isfinite(score).all(), name
    np.testing.assert_array_equal(scores["mahalanobis"], 0)
    np.testing.assert_allclose(scores["vim"], scores["energy"])
    assert scores["ncm_euclidean"][:5].min() > scores["ncm_euclidean"][5:].max()


def test_arguments_are_left_as_they_are(cloud):
    before = [array.copy() for array in (*cloud["data"], *cloud["logits"])]
    all_scores(*cloud["data"], *cloud["logits"])
    for now, then in zip((*cloud["data"], *cloud["logits"]), before, strict=True):
        np.testing.assert_array_equal(now, then)


def broken(array, value):
    array = array.copy()
    array[3:5, 0] = value
    return array


@pytest.mark.parametrize("score", [knn_distance, top_k_cosine, ncm, mahalanobis, rmd])
def test_bad_features(cloud, score):
    train, labels, test = cloud["data"]
    for arguments, message in (
        ((broken(train, np.nan), labels, test), "train must be finite, got 2 of 250 rows"),
        ((train, labels, broken(test, np.inf)), "test must be finite, got 2 of 80 rows"),
        ((train[:0], labels[:0], test), r"train must have shape .* got \(0, 12\)"),
        ((train, labels, test[:, :5]), r"train and test must share D, got \(250, 12\) and \(80, 5\)"),
        ((train, labels[:9], test), r"labels must be integers of shape \(250,\), got torch.int64 of shape \(9,\)"),
        ((train, labels - 1, test), "labels must be known classes, 0 or above, got 70 negative"),
    ):
        with pytest.raises(ValueError, match=message):
            score(*arguments)


def test_bad_options(cloud):
    data, (train_logits, test_logits) = cloud["data"], cloud["logits"]
    for call, message in (
        (lambda: knn_distance(*data, k=0), "k must be at least 1, got 0"),
        (lambda: top_k_cosine(*data, k=0), "top_k must be at least 1, got 0"),
        (lambda: ncm(*data, metric="cos"), "metric must be 'cosine' or 'euclidean', got 'cos'"),
        (lambda: energy(test_logits, temperature=0), "temperature must be above 0, got 0"),
        (lambda: vim(*data, train_logits, test_logits, dim=12), "dim must be at least 0 and below the 12 features"),
        (lambda: vim(*data, train_logits, test_logits, origin=np.zeros(5)), r"origin must be 12 finite values, got \["),
        (lambda: vim(*data, test_logits, test_logits), "got 80 for 250 and 80 for 80"),
        (lambda: vim(*data, train_logits, broken(test_logits, np.nan)), "test_logits must be finite, got 2 of 80 rows"),
        (lambda: msp(broken(test_logits, np.nan)), "logits must be finite, got 2 of 80 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
