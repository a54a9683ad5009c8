from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ssl_gradmix.evaluation import probes
from ssl_gradmix.evaluation.probes import LEARNING_RATES, LinearProbe, label_subset, linear_probe


def clouds(count=300, classes=4, spread=1.0, dimensions=12, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    of_centers = torch.Generator().manual_seed(99)
    centers = 3 * torch.randn(classes, dimensions, generator=of_centers)
    labels = torch.arange(count) % classes
    return centers[labels] + spread * torch.randn(count, dimensions, generator=generator), labels


def top1(probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
    return probe.accuracy(features, labels)[0].double().mean().item()


def plain_sgd(features, labels, kept, rate, epochs, seed=0) -> Tensor:
    """The usual training loop on the samples kept, scaled by scikit-learn: logits of all."""
    scaled = torch.from_numpy(StandardScaler().fit_transform(features)).float()
    classifier = nn.Linear(features.shape[1], len(labels.unique()))
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=0.9)
    order, step = torch.Generator().manual_seed(seed), 0
    steps = epochs * -(-len(kept) // 256)
    for _ in range(epochs):
        for batch in kept[torch.randperm(len(kept), generator=order)].split(256):
            optimizer.param_groups[0]["lr"] = rate * (1 + np.cos(np.pi * step / steps)) / 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(scaled[batch]), labels[batch]).backward()
            optimizer.step()
            step += 1
    return classifier(scaled).detach()


def test_digits_score_as_with_logistic_regression() -> None:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order] / 16, labels[order]
    oracle = LogisticRegression(max_iter=2000).fit(pixels[:1200], labels[:1200])
    expected = oracle.score(pixels[1200:], labels[1200:])
    features, targets = torch.from_numpy(pixels).float(), torch.from_numpy(labels)
    probe = linear_probe(features[:1200], targets[:1200])
    assert expected > 0.95
    assert top1(probe, features[1200:], targets[1200:]) == pytest.approx(expected, abs=0.03)


def test_single_rate_equals_plain_sgd() -> None:
    features, labels = clouds(count=600, spread=4.0)
    expected = plain_sgd(features, labels, torch.arange(600), rate=0.3, epochs=3, seed=5)
    probe = linear_probe(features, labels, learning_rates=[0.3], epochs=3, seed=5)
    assert torch.allclose(probe.logits(features), expected, atol=1e-4)


@pytest.mark.parametrize(("count", "n_folds", "epochs"), [(60, 10, 30), (5200, 1, 3)])
def test_chosen_rate_has_the_lowest_held_out_cross_entropy(
    count, n_folds, epochs, monkeypatch
) -> None:
    """Each of few samples is held out once; of many a tenth is."""
    trained_on = []
    train = probes._train

    def record(scaled, targets, kept, *rest):
        trained_on.append(kept)
        return train(scaled, targets, kept, *rest)

    monkeypatch.setattr(probes, "_train", record)
    features, labels = clouds(count=count, spread=7.0, classes=3, seed=1)
    rates = [0.003, 0.3, 30]
    probe = linear_probe(features, labels, learning_rates=rates, epochs=epochs)
    *folds, everything = trained_on
    assert everything.tolist() == list(range(count))
    assert len(folds) == n_folds
    held_out = [torch.from_numpy(np.setdiff1d(np.arange(count), kept)) for kept in folds]
    for fold in held_out:
        excess = labels[fold].bincount() - labels.bincount() / 10
        assert excess.abs().max() <= 1
    assert len(torch.cat(held_out).unique()) == sum(map(len, held_out)) >= min(count, 500)
    losses = {}
    for rate in rates:
        trained = [plain_sgd(features, labels, kept, rate, epochs) for kept in folds]
        judged = [p[fold].double() for p, fold in zip(trained, held_out, strict=True)]
        log_p = log_softmax(torch.cat(judged).numpy(), axis=1)
        losses[rate] = -log_p[np.arange(len(log_p)), labels[torch.cat(held_out)]].mean()
    assert probe.validation == pytest.approx(losses, rel=2e-2)
    assert probe.learning_rate == min(losses, key=lambda rate: losses[rate])


def test_scale_and_shift_of_features_do_not_matter() -> None:
    features, labels = clouds(spread=4.0)
    test, _ = clouds(spread=4.0, seed=1)
    scale, shift = torch.logspace(-3, 3, 12), torch.linspace(-5, 5, 12)
    plain = linear_probe(features, labels, [0.1], epochs=10)
    other = linear_probe(scale * (features + shift), labels, [0.1], epochs=10)
    assert torch.allclose(other.logits(scale * (test + shift)), plain.logits(test), atol=1e-3)


def test_constant_feature_gets_no_weight() -> None:
    features, labels = clouds()
    features[:, 3] = 7.0
    probe = linear_probe(features, labels, epochs=2)
    assert (probe.weight[:, 3] == 0).all()
    assert (probe.weight[:, 2] != 0).all()
    collapsed = linear_probe(torch.ones(20, 3), torch.arange(20) % 2, epochs=2)
    assert collapsed.weight.abs().max() == 0


def test_seed_alone_decides_the_classifier() -> None:
    data = clouds(spread=4.0)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, same, other = (linear_probe(*data, epochs=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_need_not_be_contiguous() -> None:
    features, labels = clouds(spread=3.0)
    names = torch.tensor([2, 5, 31, 70])
    plain = linear_probe(features, labels, epochs=5)
    named = linear_probe(features, names[labels], epochs=5)
    assert torch.equal(named.classes, names)
    assert torch.equal(named.weight, plain.weight)
    assert torch.equal(named.predict(features), names[plain.predict(features)])


def test_one_sample_a_class_in_half_precision() -> None:
    features, labels = clouds(count=4, spread=0.1)
    probe = linear_probe(features.half(), labels, epochs=50)
    assert top1(probe, *clouds(spread=0.1, seed=1)) == 1
    assert tuple(probe.validation) == LEARNING_RATES


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda features: linear_probe(features, torch.ones(300).long()), "labels"),
        (lambda features: linear_probe(features, torch.arange(300) % 4 - 1), "labels"),
        (lambda features: linear_probe(features, torch.arange(299) % 4), "labels"),
        (lambda features: label_subset(torch.arange(4), 0), "fraction"),
        (lambda features: label_subset(torch.arange(4), 1.1), "fraction"),
    ],
)
def test_invalid_inputs_raise(call, named) -> None:
    with pytest.raises(ValueError, match=named):
        call(clouds()[0])


@pytest.fixture
def probe() -> LinearProbe:
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([1, 2, 5, 6, 8, 11, 40])
    weight = torch.randn(7, 12, generator=generator)
    return LinearProbe(classes, weight, torch.randn(7, generator=generator), 0.1, {})


def test_accuracy_equals_scikit_learn(probe) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(200, 12, generator=generator)
    labels = probe.classes[torch.randint(0, 7, (200,), generator=generator)]
    logits = features.numpy() @ probe.weight.numpy().T + probe.bias.numpy()
    for k, hits in zip((1, 5), probe.accuracy(features, labels), strict=True):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=probe.classes)
        assert hits.double().mean().item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(probe.predict(features) == labels, probe.accuracy(features, labels)[0])
    first, five = probe.accuracy(features[:2], torch.tensor([3, -1]))  # of other classes
    assert not (first | five).any()
    five = LinearProbe(probe.classes[:5], probe.weight[:5], probe.bias[:5], 0.1, {})
    assert five.accuracy(features, labels)[1] is None


def test_parts_and_subset_are_drawn_class_by_class() -> None:
    """As a loop over the classes draws them; one class has a single sample."""
    labels = torch.randint(0, 40, (333,), generator=torch.Generator().manual_seed(0))
    labels[7] = 99
    of_parts, of_subset = (torch.Generator().manual_seed(3) for _ in range(2))
    fold, drawn = torch.full((333,), -1), []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        drawn += members[
            torch.randperm(len(members), generator=of_subset)[: round(0.5 * len(members)) or 1]
        ].tolist()
        if len(members) > 1:
            order = torch.randperm(len(members), generator=of_parts)
            fold[members[order]] = torch.arange(len(members)) % 10
    for i, (rest, held_out) in enumerate(probes.held_out_parts(labels, seed=3)):
        assert held_out.tolist() == (fold == i).nonzero().flatten().tolist()
        assert rest.tolist() == (fold != i).nonzero().flatten().tolist()
    assert label_subset(labels, 0.5, seed=3).tolist() == sorted(drawn)


def test_rate_for_few_samples_is_inside_the_grid() -> None:
    for count in (30, 60, 500):
        features, labels = clouds(count=count, spread=12.0, classes=10, dimensions=128)
        rate = linear_probe(features, labels).learning_rate
        assert LEARNING_RATES[0] < rate < LEARNING_RATES[-1]


def test_progress_counts_the_steps(monkeypatch) -> None:
    shown = []

    class Bar:
        def __init__(self, total, *given, **options) -> None:
            shown.append([total, 0])

        def update(self) -> None:
            shown[-1][1] += 1

        def close(self) -> None:
            pass

    monkeypatch.setattr(probes, "progress", Bar)
    linear_probe(*clouds(count=6000), epochs=2)
    assert shown == [[2 * 22, 2 * 22], [2 * 24, 2 * 24]]  # without a tenth, and with all


def test_label_subset_is_a_fraction_of_each_class() -> None:
    labels = torch.tensor([7] * 200 + [1] * 100 + [3] * 4)[torch.randperm(304)]
    drawn = label_subset(labels, 0.1)
    assert labels[drawn].bincount(minlength=8).tolist() == [0, 10, 0, 1, 0, 0, 0, 20]
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert label_subset(labels, 1.0).tolist() == list(range(304))
    assert set(label_subset(labels, 0.02).tolist()) < set(drawn.tolist())
    assert torch.equal(label_subset(labels, 0.1, seed=1), label_subset(labels, 0.1, seed=1))
    assert not torch.equal(label_subset(labels, 0.1, seed=1), drawn)
