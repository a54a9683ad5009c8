from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import binom
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from sklearn.preprocessing import StandardScaler
from torch import nn

from ssl_gradmix.evaluation import probes
from ssl_gradmix.evaluation.probes import LinearProbe, label_subset, linear_probe


def clouds(count=300, classes=4, spread=1.0, dimensions=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(classes, dimensions, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centers[labels] + spread * torch.randn(count, dimensions, generator=generator), labels


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = torch.tensor(pixels[order]).float(), torch.tensor(labels[order])
    return (pixels[:1200], labels[:1200]), (pixels[1200:], labels[1200:])


def share(hits) -> float:
    return hits.double().mean().item()


def plain_sgd(features, labels, kept, rate, epochs, seed=0):
    """The usual training loop on the samples kept, on features scaled by scikit-learn: logits (N, C) of all."""
    scaled = torch.from_numpy(StandardScaler().fit_transform(features)).float()
    classifier = nn.Linear(features.shape[1], len(labels.unique()))
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=0.9)
    order, step, steps = torch.Generator().manual_seed(seed), 0, epochs * -(-len(kept) // 256)
    for _ in range(epochs):
        for batch in kept[torch.randperm(len(kept), generator=order)].split(256):
            optimizer.param_groups[0]["lr"] = rate * (1 + np.cos(np.pi * step / steps)) / 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(scaled[batch]), labels[batch]).backward()
            optimizer.step()
            step += 1
    return classifier(scaled).detach()


class TestLinearProbe:
    def test_random_labels_score_at_chance(self):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(1000, 16, generator=generator)
        labels = torch.randint(0, 5, (1000,), generator=generator)
        probe = linear_probe(features[:500], labels[:500], epochs=20)
        hits = probe.accuracy(features[500:], labels[500:]).top1.sum().item()
        assert binom.ppf(0.0005, 500, 0.2) <= hits <= binom.ppf(0.9995, 500, 0.2)

    def test_digits_as_good_as_logistic_regression(self, digits):
        train, test = digits
        oracle = LogisticRegression(max_iter=2000).fit(train[0] / 16, train[1]).score(test[0] / 16, test[1])
        assert share(linear_probe(*train).accuracy(*test).top1) == pytest.approx(oracle, abs=0.03)
        assert oracle > 0.95

    def test_equals_plain_sgd_of_one_classifier(self):
        features, labels = clouds(count=600, spread=4.0)
        expected = plain_sgd(features, labels, torch.arange(600), rate=0.3, epochs=3, seed=5)
        probe = linear_probe(features, labels, learning_rates=[0.3], epochs=3, seed=5)
        assert torch.allclose(probe.logits(features), expected, atol=1e-4)

    def test_rates_trained_together_do_not_touch_each_other(self):
        data = clouds(spread=6.0)
        together = linear_probe(*data, learning_rates=[0.001, 0.1, 10.0, 1e5], epochs=5)
        alone = {rate: linear_probe(*data, learning_rates=[rate], epochs=5) for rate in together.validation}
        assert together.validation == {rate: probe.validation[rate] for rate, probe in alone.items()}
        assert torch.allclose(together.weight, alone[together.learning_rate].weight, atol=1e-5)

    @pytest.mark.parametrize(("count", "judged"), [(60, 10), (5200, 1)])
    def test_the_rate_has_the_lowest_cross_entropy_on_samples_that_were_not_trained_on(
        self, count, judged, monkeypatch
    ):
        """Of few samples each is held out once; of many a tenth is."""
        trained = []
        train = probes._train
        monkeypatch.setattr(probes, "_train", lambda x, kept, *rest: trained.append(kept) or train(x, kept, *rest))
        features, labels = clouds(count=count, spread=7.0, classes=3, seed=1)
        probe = linear_probe(features, labels, learning_rates=[0.003, 0.3, 30], epochs=3 if judged == 1 else 30)
        *parts, everything = trained
        assert len(everything) == count
        assert len(parts) == judged
        held_out = [torch.from_numpy(np.setdiff1d(np.arange(count), kept)) for kept in parts]
        for part in held_out:  # a tenth of each class
            assert all(abs((labels[part] == c).sum() - (labels == c).sum() / 10) <= 1 for c in range(3))
        assert len(torch.cat(held_out).unique()) == sum(map(len, held_out)) >= min(count, 500)
        losses = {}
        for rate in probe.validation:
            found = []
            for kept, part in zip(parts, held_out, strict=True):
                epochs = 3 if judged == 1 else 30
                logits = plain_sgd(features, labels, kept, rate, epochs=epochs)[part].double().numpy()
                found += (logsumexp(logits, axis=1) - logits[np.arange(len(part)), labels[part].numpy()]).tolist()
            losses[rate] = np.mean(found)
        assert probe.validation == pytest.approx(losses, rel=2e-2)
        assert probe.learning_rate == min(losses, key=losses.get)

    def test_a_rate_at_an_end_of_the_grid_is_remarked(self):
        data = clouds(spread=6.0)
        best = linear_probe(*data, epochs=5).learning_rate
        for rates, remarked in (([best / 10, best, 10 * best], False), ([best, 10 * best], True), ([best], False)):
            probe = linear_probe(*data, learning_rates=rates, epochs=5)
            assert probe.learning_rate == best
            remark = f"the learning rate chosen, {best:g}, is at an end of the grid"
            assert probe.remark == (remark if remarked else None)

    def test_scale_and_shift_of_features_do_not_matter(self):
        features, labels = clouds(spread=4.0)
        test, _ = clouds(spread=4.0, seed=1)
        scale, shift = torch.logspace(-3, 3, 12), torch.linspace(-5, 5, 12)
        plain, other = (linear_probe(x, labels, [0.1], epochs=10) for x in (features, scale * (features + shift)))
        assert torch.allclose(other.logits(scale * (test + shift)), plain.logits(test), atol=1e-3)

    def test_a_feature_that_never_varies_has_no_weight(self):
        features, labels = clouds()
        features[:, 3] = 7.0
        probe = linear_probe(features, labels, epochs=2)
        assert (probe.weight[:, 3] == 0).all()
        assert (probe.weight[:, 2] != 0).all()
        assert linear_probe(torch.ones(20, 3), torch.arange(20) % 2, epochs=2).weight.abs().max() == 0

    def test_same_seed_same_classifier(self):
        data = clouds(spread=4.0)
        first, same, other = (linear_probe(*data, epochs=3, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.weight, same.weight)
        assert not torch.equal(first.weight, other.weight)

    def test_global_generators_are_left_alone(self):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        linear_probe(*clouds(), epochs=1)
        assert torch.equal(torch.get_rng_state(), before)

    def test_labels_need_not_be_contiguous(self):
        features, labels = clouds(spread=3.0)
        names = torch.tensor([2, 5, 31, 70])
        plain, named = linear_probe(features, labels, epochs=5), linear_probe(features, names[labels], epochs=5)
        assert named.classes.tolist() == [2, 5, 31, 70]
        assert torch.equal(named.weight, plain.weight)
        assert torch.equal(named.predict(features), names[plain.predict(features)])

    def test_one_sample_a_class(self):
        features, labels = clouds(count=4, spread=0.1)
        probe = linear_probe(features, labels, epochs=50)
        assert share(probe.accuracy(*clouds(spread=0.1, seed=1)).top1) == 1
        assert set(probe.validation) == {0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0}

    def test_features_in_half_precision(self):
        features, labels = clouds(spread=0.1)
        assert share(linear_probe(features.half(), labels, epochs=20).accuracy(features, labels).top1) == 1

    def test_bad_input(self):
        features, labels = clouds()
        for given, options, message in (
            ((features, torch.ones(300, dtype=torch.long)), {}, r"at least two classes, got \[1\]"),
            ((features, labels - 1), {}, r"got 75 of 300 samples without \(-1\)"),
            ((features, labels[1:]), {}, r"got \(300, 12\), \(299,\)"),
            ((features / 0, labels), {}, "features must be finite"),
            ((features, labels), {"learning_rates": [0.1, -1.0]}, r"all above 0, got \(0.1, -1.0\)"),
            ((features, labels), {"epochs": 0}, "epochs must be at least 1, got 0"),
            ((features, labels), {"folds": 1}, "folds must be at least 2, got 1"),
        ):
            with pytest.raises(ValueError, match=message):
                linear_probe(*given, **options)


class TestAccuracy:
    @pytest.fixture
    def probe(self):
        generator = torch.Generator().manual_seed(0)
        return LinearProbe(
            torch.tensor([1, 2, 5, 6, 8, 11, 40]),
            torch.randn(7, 12, generator=generator),
            torch.randn(7, generator=generator),
            None,
            {},
        )

    def test_equals_scikit_learn(self, probe):
        features = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
        labels = probe.classes[torch.randint(0, 7, (200,), generator=torch.Generator().manual_seed(2))]
        accuracy = probe.accuracy(features, labels)
        logits = features.numpy() @ probe.weight.numpy().T + probe.bias.numpy()
        assert share(accuracy.top1) == pytest.approx(accuracy_score(labels, probe.predict(features)), abs=1e-12)
        for k, hits in ((1, accuracy.top1), (5, accuracy.top5)):
            expected = top_k_accuracy_score(labels, logits, k=k, labels=probe.classes)
            assert share(hits) == pytest.approx(expected, abs=1e-12)

    def test_a_class_may_be_missing(self, probe):
        features = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
        expected = share(probe.predict(features) == 40)
        assert share(probe.accuracy(features, torch.full((20,), 40)).top1) == expected

    def test_top5_needs_more_than_five_classes(self, probe):
        five = LinearProbe(probe.classes[:5], probe.weight[:5], probe.bias[:5], None, {})
        assert five.accuracy(torch.zeros(3, 12), torch.tensor([1, 2, 5])).top5 is None

    def test_bad_input(self, probe):
        with pytest.raises(ValueError, match=r"among the classes of the training features, got \[-1, 3\] besides"):
            probe.accuracy(torch.zeros(3, 12), torch.tensor([1, -1, 3]))
        with pytest.raises(ValueError, match="at least one, got 0 for 0"):
            probe.accuracy(torch.zeros(0, 12), torch.zeros(0, dtype=torch.long))
        with pytest.raises(ValueError, match="one a feature and at least one, got 2 for 3"):
            probe.accuracy(torch.zeros(3, 12), torch.tensor([1, 2]))


class TestLabelSubset:
    def test_takes_that_share_of_each_class(self):
        labels = torch.tensor([7] * 200 + [1] * 100 + [3] * 4)[torch.randperm(304)]
        drawn = label_subset(labels, 0.1)
        assert labels[drawn].bincount(minlength=8).tolist() == [0, 10, 0, 1, 0, 0, 0, 20]
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        assert label_subset(labels, 1.0).tolist() == list(range(304))

    def test_seed_and_nesting(self):
        labels = torch.arange(1000) % 10
        assert torch.equal(label_subset(labels, 0.1, seed=1), label_subset(labels, 0.1, seed=1))
        assert not torch.equal(label_subset(labels, 0.1, seed=1), label_subset(labels, 0.1, seed=2))
        assert set(label_subset(labels, 0.01).tolist()) < set(label_subset(labels, 0.1).tolist())

    @pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
    def test_bad_fraction(self, fraction):
        with pytest.raises(ValueError, match=f"above 0 and at most 1, got {fraction}"):
            label_subset(torch.arange(4), fraction)
