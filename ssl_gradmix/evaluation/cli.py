"""What the command lines of `eval/` share: a frozen encoder, its images, and a folder for results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from jsonargparse import Namespace
from torch import Tensor

from ssl_gradmix import command_line
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation import rows
from ssl_gradmix.evaluation.encoders import Encoder, load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.settings import Data
from ssl_gradmix.version import __version__

Labeled = tuple[Tensor, Tensor]
"""Features (N, D) and labels (N,)."""


@dataclass
class Subject:
    """What is evaluated, and where results go.

    Args:
        encoder: A run folder (`runs/x`), a published timm model (`timm:resnet18.a1_in1k`), or a folder in timm's layout
            (`local-dir:PATH`). A run is evaluated on its own data, classes included, unless --data says otherwise.
            Images are resized to what the encoder was made for, unless --data.size is given.
        feature: What of the encoder is read: `backbone` features, or the embeddings of a run's `projector`, whose
            results go to `projector/` in the folder for results.
        weights: Safetensors file for the architecture `timm:NAME`, in place of the published weights.
        out: Folder for results; a run's is its `eval/`. Results of the same encoder that lie there are added to.
        batch_size: Images that the encoder sees at once, on each process.
        cache: Keep features in `features/` of the results' folder, and use those kept there.
    """

    encoder: str
    feature: Literal["backbone", "projector"] = "backbone"
    weights: str | None = None
    out: str | None = None
    batch_size: int = 256
    cache: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(eq=False)
class Evaluation:
    """What is evaluated, loaded, and where the results go."""

    encoder: Encoder  # frozen
    data: Data  # settings of its data
    out: Path  # folder for results
    batch_size: int  # images that the encoder sees at once, on each process
    cache: Path | None  # folder in which features are kept
    accelerator: Accelerator  # says on which device and on how many processes

    def load(self, split: str, data: Data | None = None) -> ImageSet:
        """Loads the labeled train or test images of the classes that the data settings ask for.

        Raises:
            ValueError: If no image is labeled, or all training images are of the same class.
        """
        with self.one_first():
            images = load_known(data or self.data, split)
        labeled = images.subset(images.labels >= 0)
        if len(labeled) == 0:
            raise ValueError(
                f"{images.name} has no labels, this evaluation needs them: a folder has one a class folder"
            )
        classes = [images.classes[label] for label in np.unique(labeled.labels)]
        if split == "train" and len(classes) < 2:
            raise ValueError(f"{images.name} must have images of at least two classes, got {classes}")
        return labeled

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Lets one process a machine go before the others, as loading a data set may download it."""
        with self.accelerator.main_process_first(), self.accelerator.local_main_process_first():
            yield

    def features(self, images: ImageSet) -> Labeled:
        """Frozen features (N, D) and labels (N,) of all images, on the accelerator's device."""
        features, labels = extract(
            self.encoder, images, self.batch_size, cache=self.cache, accelerator=self.accelerator
        )
        return features.to(self.accelerator.device), labels.to(self.accelerator.device)

    def frame(
        self, task: str, images: str, numbers: Sequence[rows.Number], trial: int | None = None, /, **params: object
    ) -> pd.DataFrame:
        """Rows of numbers about images of this name, see `rows.frame`."""
        return rows.frame(numbers, task, images, self.encoder.name, self.encoder.feature, trial, **params)

    def of_classes(self) -> dict[str, str]:
        """The parameter `classes` of rows, where the data settings name some of them."""
        classes = self.data.open_set or ", ".join(map(str, self.data.classes or ()))
        return {"classes": classes} if classes else {}

    def about(self, *images: ImageSet, classes: str = "") -> dict[str, Any]:
        """What a file of results says beside the rows, which are of these images, or of some of their classes."""
        of_classes = f" of {classes}" if classes else ""
        return {
            "encoder": {name: getattr(self.encoder, name) for name in ("name", "feature", "fingerprint")},
            "data": asdict(self.data),
            "images": {f"{each.name}{of_classes}": each.fingerprint() for each in images},
            "versions": {"ssl_gradmix": __version__, "torch": torch.__version__, "timm": timm.__version__},
        }


def main(evaluate: Callable[..., None], options: type, description: str, argv: Sequence[str] | None = None) -> int:
    """Runs `evaluate(evaluation, options)` from a command line and returns the exit status, see `command_line.run`.

    It runs on every process; the main one should write results. `options` is the dataclass of the evaluation's own
    settings, and its docstring is their help.
    """
    parser = command_line.Parser(description=description, usage="%(prog)s ENCODER [options]")
    parser.add_argument("--config", action=command_line.ConfigFile, help="YAML file of these options.")
    parser.add_class_arguments(Subject, as_positional=True)
    parser.add_class_arguments(Data, "data")
    parser.add_class_arguments(options)

    def parse_and_evaluate(argv: Sequence[str] | None) -> None:
        given = parser.parse_args(argv, defaults=False)
        evaluation, settings = _resolve(parser, given)
        evaluate(evaluation, _pick(options, settings))

    return command_line.run(parse_and_evaluate, argv)


def _resolve(parser: command_line.Parser, given: Namespace) -> tuple[Evaluation, Namespace]:
    """Fills in what was not given: the data from the run's config, the rest from the defaults."""
    wanted = given.get("data", Namespace())
    feature = given.get("feature", Subject.feature)
    encoder = load_encoder(given.encoder, given.get("weights"), wanted.get("size"), feature)
    given["data"] = Namespace(_data(wanted, (encoder.config or {}).get("data", {})) | {"size": encoder.size})
    settings = parser.parse_object(given.as_dict())
    subject = _pick(Subject, settings)
    if subject.out is None and encoder.run is None:
        raise ValueError(f"{encoder.name} is no run, so it has no folder for results: give one with --out")
    out = Path(subject.out).expanduser() if subject.out is not None else encoder.run / "eval"
    cache = out / "features" if subject.cache else None
    data = Data(**settings.data.as_dict())
    results = rows.results_folder(out, feature)
    # Others wait while one process fits classifiers, which NCCL would take for a failure after ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    return Evaluation(encoder, data, results, subject.batch_size, cache, accelerator), settings


def _pick(options: type, settings: Namespace) -> Any:
    return options(**{field.name: settings[field.name] for field in fields(options)})


def _data(given: Namespace, of_run: dict) -> dict:
    """The run's data settings where the data set is the same, with what was given on the command line instead."""
    given = vars(given)
    if given.get("name", of_run.get("name")) != of_run.get("name"):
        return given
    left_out = {"download"}  # a run, which may be somebody else's, starts none
    if of_run.get("name") == "digits":
        left_out |= {"root"}  # which earlier versions wrote, though digits have none
    if {"classes", "open_set"} & given.keys():
        left_out |= {"classes", "open_set"}
    return {name: value for name, value in of_run.items() if name not in left_out} | given
