"""A map of test features in the plane."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ssl_gradmix.settings import Data

if TYPE_CHECKING:
    from accelerate import Accelerator

POINTS = 2000
"""A map shows so many test images at most, drawn at random."""


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Where the features of test images lie in the plane.

    Args:
        points: (N, 2).
        labels: (N,), -1 where unlabeled.
        known: Labels that the data settings of the run name, all where they name none.
        classes: Label k is `classes[k]`.
        axes: Names of the two axes.
        images: What is shown, for instance `digits/test`.
        total: Of so many test images.
    """

    points: np.ndarray
    labels: np.ndarray
    known: list[int]
    classes: tuple[str, ...]
    axes: tuple[str, str]
    images: str
    total: int


def feature_map(
    run: str, data: dict[str, Any], method: Literal["pca", "tsne"], accelerator: Accelerator, seed: int = 0
) -> FeatureMap:
    """Lays the test features of a run out in the plane.

    The features are those of `evaluation.features`, L2-normalized, because nearest neighbors and most open-set scores
    compare their directions; kept ones in the run's `eval/features` are used. Test images of all classes are shown,
    also of those a run was not trained on.

    Args:
        run: Its folder, with a backbone.
        data: Settings of the data, as in a run's config.
        method: `pca` keeps the two directions of largest variance. `tsne` keeps neighbors together; distances between
            groups mean little.
        accelerator: Says where the encoder runs.
        seed: Of the draw of `POINTS` test images, and of t-SNE.

    Raises:
        FileNotFoundError: If there is no backbone, or the images are not there (nothing is downloaded).
        ValueError: If a file is damaged, or there are fewer than three test images.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    from ssl_gradmix.data.datasets import known_classes, load
    from ssl_gradmix.evaluation.encoders import load_encoder
    from ssl_gradmix.evaluation.setup import Evaluation

    encoder = load_encoder(run)
    given = {field.name: data[field.name] for field in fields(Data) if field.name in data}
    settings = replace(Data(**given), size=encoder.size, download=False)
    images = load(settings, "test")
    known = known_classes(settings, images.classes)
    evaluation = Evaluation(encoder, settings, Path(run, "eval"), 256, Path(run, "eval", "features"), accelerator)
    features, _ = evaluation.features(images)

    drawn = np.sort(np.random.default_rng(seed).permutation(len(images))[:POINTS])
    if len(drawn) < 3:
        raise ValueError(f"a map needs at least 3 test images, {images.name} has {len(drawn)}")
    directions = normalize(features.cpu().double().numpy()[drawn])
    if method == "pca":
        pca = PCA(2, svd_solver="full")
        points = pca.fit_transform(directions)
        axes = tuple(f"component {i + 1}, {share:.0%} of variance" for i, share in enumerate(_shares(pca)))
    else:
        perplexity = min(30.0, (len(drawn) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(directions)
        axes = ("", "")
    return FeatureMap(
        points,
        images.labels[drawn],
        list(range(len(images.classes))) if known is None else list(known),
        images.classes,
        axes,
        images.name,
        len(images),
    )


def _shares(pca: Any) -> np.ndarray:
    """Shares of the variance; 0 where there is none, as of a collapsed encoder."""
    return np.nan_to_num(pca.explained_variance_ratio_)
