"""What an open-set evaluation found of each test image, on disk: for curves, and to compare runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ssl_gradmix.files import write_whole

_K, _TOP_K = 50, 3  # the defaults of `scores.all_scores`


@dataclass(frozen=True)
class Settings:
    """How samples are scored.

    Args:
        k: Whose neighbor's distance `knn_distance` is. None takes 50, or as many as there are training images.
        top_k: Neighbors in each class of `top_k_cosine`. None takes 3, or the size of the smallest class.
        epochs: Of the linear probe.
        seed: Of the linear probe.
    """

    k: int | None = None
    top_k: int | None = None
    epochs: int = 100
    seed: int = 0

    @property
    def neighbors(self) -> tuple[int, int]:
        """`k` and `top_k` before they are clamped."""
        return _K if self.k is None else self.k, _TOP_K if self.top_k is None else self.top_k

    def check(self, labels: np.ndarray) -> None:
        """Refuses more neighbors than training images of the known classes, with labels (N,), can be.

        Raises:
            ValueError: If `k` is above N, `top_k` above the size of the smallest class, or one is below 1.
        """
        sizes = np.unique(labels, return_counts=True)[1]
        for name, value, most, what in (
            ("k", self.k, sizes.sum(), "the training images of all known classes"),
            ("top_k", self.top_k, sizes.min(), "those of the smallest known class"),
        ):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, {what}, got {value}")


@dataclass(eq=False)
class Samples:
    """What was found of each test image, for curves and for comparing runs.

    Args:
        encoder: Its name.
        settings: How they were scored.
        images: Fingerprint of the test images of each group (a trial, or a data set of unknown images), in their order.
        arrays: By group, as `detect` gives them.
    """

    encoder: str
    settings: Settings
    images: dict[str, str]
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes safetensors, whole or not at all: arrays as `<group>/<name>`, booleans as uint8, the rest as metadata.

        Scores stay float64: in float32 all confident softmaxes would be 1.
        """
        from safetensors.numpy import save

        tensors = {
            f"{group}/{name}": array.astype(np.uint8) if array.dtype == bool else array
            for group, arrays in self.arrays.items()
            for name, array in arrays.items()
        }
        header = {
            "encoder": self.encoder,
            "settings": json.dumps(asdict(self.settings)),
            "images": json.dumps(self.images),
        }
        write_whole(path, lambda temporary: temporary.write_bytes(save(tensors, header)))

    @classmethod
    def read(cls, path: Path) -> Samples:
        """Reads what `write` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else.
        """
        from safetensors import SafetensorError, safe_open

        arrays: dict[str, dict[str, np.ndarray]] = {}
        try:
            with safe_open(path, "numpy") as file:
                header, keys = file.metadata(), file.keys()
                for key in keys:
                    group, _, name = key.rpartition("/")
                    array = file.get_tensor(key)
                    arrays.setdefault(group, {})[name] = array.astype(bool) if array.dtype == np.uint8 else array
            settings, images = Settings(**json.loads(header["settings"])), json.loads(header["images"])
            _check(images, arrays)
            return cls(header["encoder"], settings, images, arrays)
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no file of open-set samples, or damaged: {error}") from error

    def check_comparable(self, other: Samples) -> None:
        """Refuses to compare with other samples.

        Raises:
            ValueError: If no group is in both, one has other images, or they were scored in another way.
        """
        shared = [group for group in self.images if group in other.images]
        if not shared:
            theirs, ours = ", ".join(other.images), ", ".join(self.images)
            raise ValueError(f"{other.encoder} has other samples: it was evaluated on {theirs}, not {ours}")
        different = [group for group in shared if self.images[group] != other.images[group]]
        if different:
            raise ValueError(f"{other.encoder} has other samples: the images of {', '.join(different)} differ")
        if self.settings != other.settings:
            raise ValueError(f"{other.encoder} was scored with {other.settings}, this with {self.settings}")


def _check(images: dict[str, str], arrays: dict[str, dict[str, np.ndarray]]) -> None:
    if images.keys() != arrays.keys():
        raise ValueError(f"it has arrays of {', '.join(arrays)}, but names {', '.join(images)}")
    for group, named in arrays.items():
        if not {"is_known", "correct"} <= named.keys() or len({array.shape for array in named.values()}) > 1:
            raise ValueError(f"{group} lacks is_known or correct, or its arrays differ in length")
