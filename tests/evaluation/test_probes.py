from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from sklearn.preprocessing import StandardScaler
from torch import nn

from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.probes import (
    LinearProbe,
    augmented_probe,
    label_subset,
    linear_probe,
    logistic_regression,
)
from ssl_gradmix.settings import Augmentation


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


class TestLinearProbe:
    def test_separable_classes(self):
        probe = linear_probe(*clouds(spread=0.1), epochs=20)
        assert share(probe.accuracy(*clouds(spread=0.1, seed=1)).top1) == 1

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
        """The usual training loop, one rate at a time, on features scaled by scikit-learn."""
        features, labels = clouds(count=600, spread=4.0)
        epochs, rate, seed = 3, 0.3, 5
        scaler = StandardScaler().fit(features)
        scaled = torch.from_numpy(scaler.transform(features)).float()
        classifier = nn.Linear(12, 4)
        nn.init.zeros_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=0.9)
        order, step = torch.Generator().manual_seed(seed), 0
        for _ in range(epochs):
            for batch in torch.randperm(600, generator=order).split(256):
                optimizer.param_groups[0]["lr"] = rate * (1 + np.cos(np.pi * step / (3 * epochs))) / 2
                optimizer.zero_grad()
                nn.functional.cross_entropy(classifier(scaled[batch]), labels[batch]).backward()
                optimizer.step()
                step += 1
        expected = classifier(torch.from_numpy(scaler.transform(features[:50])).float())

        probe = linear_probe(features, labels, learning_rates=[rate], epochs=epochs, seed=seed)
        assert torch.allclose(probe.logits(features[:50]), expected, atol=1e-4)

    def test_rates_trained_together_do_not_touch_each_other(self):
        data = clouds(spread=6.0)
        together = linear_probe(*data, learning_rates=[0.001, 0.1, 10.0, 1e5], epochs=5)
        alone = {rate: linear_probe(*data, learning_rates=[rate], epochs=5) for rate in together.validation}
        assert together.validation == {rate: probe.validation[rate] for rate, probe in alone.items()}
        assert len(set(together.validation.values())) > 1
        chosen = together.learning_rate
        assert together.validation[chosen] == max(together.validation.values())
        assert torch.allclose(together.weight, alone[chosen].weight, atol=1e-5)

    def test_rate_is_chosen_on_samples_that_were_not_trained_on(self):
        """With a feature a sample and random labels, training accuracy is 1 and held-out accuracy is chance."""
        labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
        probe = linear_probe(torch.eye(200), labels, learning_rates=[1.0], epochs=50)
        assert share(probe.accuracy(torch.eye(200), labels).top1) == 1
        assert probe.validation[1.0] < 0.7

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
        with pytest.raises(ValueError, match=r"at least two classes, got \[1\]"):
            linear_probe(features, torch.ones(300, dtype=torch.long))
        with pytest.raises(ValueError, match=r"got 75 of 300 samples without \(-1\)"):
            linear_probe(features, labels - 1)
        with pytest.raises(ValueError, match=r"got \(300, 12\), \(299,\)"):
            linear_probe(features, labels[1:])
        with pytest.raises(ValueError, match="features must be finite"):
            linear_probe(features / 0, labels)
        with pytest.raises(ValueError, match=r"learning_rates must be at least one, all above 0, got \(\)"):
            linear_probe(features, labels, learning_rates=[])
        with pytest.raises(ValueError, match=r"all above 0, got \(0.1, -1.0\)"):
            linear_probe(features, labels, learning_rates=[0.1, -1.0])
        with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
            linear_probe(features, labels, epochs=0)
        with pytest.raises(ValueError, match=r"held_out must be between 0 and 1, got 1\.0"):
            linear_probe(features, labels, held_out=1.0)


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


class TestLogisticRegression:
    @pytest.mark.parametrize("classes", [2, 3])
    def test_equals_scikit_learn_on_scaled_features(self, classes):
        features, labels = clouds(classes=classes, spread=6.0)
        features = features * torch.logspace(-2, 2, 12) + 3
        probe = logistic_regression(features, 10 * labels, C=0.5)
        scaler = StandardScaler().fit(features.double())
        oracle = LogisticRegression(C=0.5, max_iter=1000).fit(scaler.transform(features.double()), labels)
        expected = oracle.predict_proba(scaler.transform(features.double()))
        assert np.abs(probe.logits(features).softmax(1).numpy() - expected).max() < 1e-4
        assert probe.classes.tolist() == [10 * label for label in range(classes)]

    def test_agrees_with_the_linear_probe_on_digits(self, digits):
        train, test = digits
        by_sgd = share(linear_probe(*train).accuracy(*test).top1)
        assert share(logistic_regression(*train).accuracy(*test).top1) == pytest.approx(by_sgd, abs=0.03)

    def test_bad_input(self):
        features, labels = clouds()
        with pytest.raises(ValueError, match="at least two classes"):
            logistic_regression(features, 0 * labels)


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


class TestAugmentedProbe:
    """Images whose class is the color of their left half."""

    @pytest.fixture
    def images(self):
        rng = np.random.default_rng(0)
        labels = np.arange(60) % 3
        pixels = rng.integers(0, 120, (60, 8, 8, 3), dtype=np.uint8)
        pixels[np.arange(60), :, :4, labels] += 60
        return ImageSet(pixels, labels, ("red", "green", "blue"), "colors/train")

    @pytest.fixture
    def encoder(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return Encoder(model, 8, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2), "mine")

    def test_without_change_equals_the_linear_probe(self, encoder, images):
        features, labels = extract(encoder, images)
        whole = Augmentation(min_scale=1.0, flip=0.0, jitter=0.0, gray=0.0)  # no other crop of that area fits
        augmented = augmented_probe(encoder, images, features, whole, epochs=4)
        plain = linear_probe(features, labels, epochs=4)
        assert augmented.validation == plain.validation
        assert torch.allclose(augmented.logits(features), plain.logits(features), atol=1e-3)

    def test_crops_change_the_classifier_and_follow_the_seed(self, encoder, images):
        features, labels = extract(encoder, images)
        first, same, other = (augmented_probe(encoder, images, features, epochs=3, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first.weight, same.weight)
        assert not torch.allclose(first.weight, other.weight, atol=1e-3)
        assert not torch.allclose(first.weight, linear_probe(features, labels, epochs=3).weight, atol=1e-3)

    def test_leaves_the_encoder_and_the_global_generator_alone(self, encoder, images):
        features, _ = extract(encoder, images)
        before, generator = copy.deepcopy(encoder.model.state_dict()), torch.get_rng_state()
        encoder.model.train()
        augmented_probe(encoder, images, features, epochs=1)
        after = encoder.model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert torch.equal(torch.get_rng_state(), generator)
        assert not encoder.model.training

    def test_unlabeled_images(self, encoder, images):
        features, _ = extract(encoder, images)
        images.labels[:2] = -1
        with pytest.raises(ValueError, match=r"got 2 of 60 samples without \(-1\)"):
            augmented_probe(encoder, images, features)
