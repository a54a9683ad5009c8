"""Command lines: options read from signatures and docstrings, errors in one line."""

from __future__ import annotations

import logging
import os
import sys
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import timm
import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from torch import Tensor

from ssl_gradmix.backbones import Backbone
from ssl_gradmix.data.augmentation import Augmentation, usual_augmentation
from ssl_gradmix.data.datasets import Data, ImageSet
from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.files import write_whole
from ssl_gradmix.gradmix import GradMix
from ssl_gradmix.training.optimizers import Optimizer
from ssl_gradmix.training.trainer import Training
from ssl_gradmix.version import __version__

# In a config file a section can name a class, which jsonargparse would import.
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[Data.__module__])

# --- What recipes and evaluations share


class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description."""


class Parser(ArgumentParser):
    """An argument parser that raises errors, and does not accept abbreviated options."""

    def __init__(self, **kwargs: Any) -> None:
        # jsonargparse makes further parsers of this class and sets some of these arguments.
        defaults = {"formatter_class": Formatter, "exit_on_error": False, "allow_abbrev": False}
        options: dict[str, Any] = {**defaults, **kwargs}
        super().__init__(**options)
        self.add_argument("--config", action="config", help="YAML file of these options.")


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Calls the main function of a script and prints errors of the user's input in one line.

    Returns:
        The exit status: 0, 2 for invalid input, 1 for a training that diverged, 130 for Ctrl-C.
    """
    is_main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ssl_gradmix").setLevel(logging.INFO if is_main_process else logging.ERROR)
    try:
        main(argv)
    except KeyboardInterrupt:
        return 130
    except (ArgumentError, ValueError, KeyError, OSError, FloatingPointError) as error:
        # An unreadable image can be the problem of one process only, hence on all of them.
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


# --- Recipes


def recipe_parser(
    method_class: type,
    recipe: str,
    description: str | None,
    defaults: Mapping[str, Any] | None = None,
) -> Parser:
    """The command line of a pretraining recipe.

    Args:
        method_class: The method, whose constructor's arguments become `--method.*`.
        recipe: Name of the recipe, recorded in config.yaml; the default run folder is
            `runs/<recipe>`.
        description: Shown above the options.
        defaults: Defaults that differ from those of the signatures, by option.
    """
    parser = Parser(description=description, usage="%(prog)s [options]")
    parser.add_argument("--recipe", type=Literal[recipe], default=recipe, help=SUPPRESS)  # type: ignore[valid-type]  # one value, known at run time
    parser.add_argument("--environment", type=dict | None, default=None, help=SUPPRESS)
    parser.add_argument(
        "--run",
        type=str,
        default=f"runs/{recipe}",
        help="Run folder. An unfinished run in it is resumed.",
    )
    parser.add_argument(
        "--extra_view",
        type=Literal["adaptive", "gradmix", "augmented", "none"],
        default="gradmix",
        help="Third view: GradMix's while the encoder relies on small regions, else a plain one "
        "(adaptive); always GradMix's; a plain augmentation (control); or none (plain method).",
    )
    parser.add_argument(
        "--expect_processes",
        type=int | None,
        default=None,
        help="Stop unless so many processes run.",
    )
    sections = {"data": Data, "augmentation": Augmentation, "backbone": Backbone}
    for name, settings in sections.items():
        parser.add_class_arguments(settings, name)
    inner: set[str | int] = {"backbone", "num_features", "gradmix", "adaptive"}
    parser.add_class_arguments(method_class, "method", skip=inner, instantiate=False)
    parser.add_class_arguments(Optimizer, "optimizer")
    parser.add_class_arguments(Training, "training")
    functions: set[str | int] = {"attribution", "generator"}  # for Python only
    parser.add_class_arguments(GradMix, "gradmix", skip=functions, instantiate=False)
    parser.set_defaults({**_usual(Data()), **(defaults or {})})
    return parser


def read(parser: Parser, argv: Sequence[str] | None = None) -> Namespace:
    """Reads a recipe's command line.

    Flip and blur default to what is usual for the data set, and `data.root` becomes absolute.

    Returns:
        Sections as dataclasses, except `method` and `gradmix`, which are namespaces of arguments.
    """
    first = parser.parse_args(argv)
    parser.set_defaults(_usual(parser.instantiate(first).data))
    config = parser.instantiate(parser.parse_args(argv))
    config.pop("config")
    if config.data.name != "digits":
        config.data.root = str(Path(config.data.root or "data").expanduser().absolute())
    return config


def _usual(data: Data) -> dict[str, Any]:
    usual = usual_augmentation(data.name, data.size)
    return {f"augmentation.{name}": value for name, value in usual.items()}


# --- Evaluations


class Evaluation:
    """A frozen encoder, the settings of its images, and the folder for results.

    Args:
        encoder: A run folder (`runs/x`), a published timm model (`timm:resnet18.a1_in1k`), or a
            folder in timm's layout (`local-dir:PATH`). A run is evaluated on its own data and
            classes unless --data says otherwise. Images are resized to the encoder's size unless
            --data.size is given.
        feature: Evaluate `backbone` features, or the embeddings of a run's `projector`.
        weights: Safetensors file for the architecture `timm:NAME`, instead of published weights.
        out: Folder for results. The default for a run is its `eval/`.
        batch_size: Images that each process encodes at once.
        cache: Keep features in `features/` in the folder for results, and reuse them.
        data: Settings of `Data`. The others are those of the run if it has the same data set.
    """

    def __init__(
        self,
        encoder: str,
        feature: Literal["backbone", "projector"] = "backbone",
        weights: str | None = None,
        out: str | None = None,
        batch_size: PositiveInt = 256,
        cache: bool = True,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        given = dict(data or {})
        self.encoder = load_encoder(encoder, weights, given.get("size"), feature)
        self.data = Data(**{**self._of_run(given), **given, "size": self.encoder.size})
        if out is not None:
            self.out = Path(out).expanduser()
        elif self.encoder.run is not None:
            self.out = self.encoder.run / "eval"
        else:
            raise ValueError(f"out: {self.encoder.name} is not a run, so --out FOLDER is needed")
        self.batch_size = batch_size
        self.cache = self.out / "features" if cache else None
        self.accelerator = Accelerator()

    def _of_run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the run's data that are not given, if it has the same data set."""
        settings = dict((self.encoder.config or {}).get("data", {}))
        if given.get("name", settings.get("name")) != settings.get("name"):
            return {}
        settings.pop("download", None)  # a run can be somebody else's
        if given.keys() & {"classes", "open_set"}:
            settings = {**settings, "classes": None, "open_set": None}
        return settings

    @property
    def classes(self) -> dict[str, str]:
        """The parameter `classes` of results, if the settings select classes."""
        chosen = self.data.open_set or ", ".join(map(str, self.data.classes or ()))
        return {"classes": chosen} if chosen else {}

    def load(self, split: Literal["train", "test"], data: Data | None = None) -> ImageSet:
        """Loads labeled images, of the data and classes of the settings or of other ones.

        Raises:
            ValueError: No image has a label.
        """
        with self.accelerator.local_main_process_first():  # loading may download
            images = load_known(data or self.data, split)
        labeled = images.subset(images.labels >= 0)
        if len(labeled) == 0:
            raise ValueError(f"data.root: {images.name} has no labels; use one folder per class")
        return labeled

    def features(self, images: ImageSet) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) on this process's device. All processes must call it."""
        features, labels = extract(
            self.encoder,
            images,
            self.batch_size,
            cache=self.cache,
            accelerator=self.accelerator,
        )
        device = self.accelerator.device
        # The memory of a cached file is not aligned, which changes last digits of products.
        return features.to(device, copy=True), labels.to(device)

    def frame(
        self,
        task: str,
        images: ImageSet,
        numbers: Iterable[results.Number],
        /,
        trial: int | None = None,
        **params: Any,
    ) -> pd.DataFrame:
        """A table of numbers about images, see `results.frame`."""
        names = (images.name, self.encoder.name, self.encoder.feature)
        return results.frame(numbers, task, *names, trial, **params)

    def write(
        self,
        rows: pd.DataFrame,
        figure: Figure,
        images: Sequence[ImageSet],
        samples: pd.DataFrame | None = None,
        **about: Any,
    ) -> None:
        """Writes results, replacing earlier ones of the same task and data set.

        Args:
            rows: The results.
            figure: Written next to them as PNG.
            images: The images that were used. The file is named after the last.
            samples: A line per image, written next to the results as CSV.
            **about: Further entries of the file of results.
        """
        encoder = self.encoder
        dataset = images[-1].name.rpartition("/")[0].removeprefix("folder:")
        suffix = "" if encoder.feature == "backbone" else f"-{encoder.feature}"
        path = self.out / f"{rows['task'].iloc[0]}-{dataset}{suffix}.json"
        identity = {name: getattr(encoder, name) for name in ("name", "feature", "fingerprint")}
        versions = {"ssl_gradmix": __version__, "torch": torch.__version__}
        shared = {
            "encoder": identity,
            "data": asdict(self.data),
            "images": {each.name: each.fingerprint() for each in images},
            "versions": {**versions, "timm": timm.__version__},
        }
        results.write(path, rows, {**shared, **about})
        plots.write(path.with_suffix(".png"), figure)
        if samples is not None:
            write_whole(path.with_suffix(".csv"), partial(samples.to_csv, index=False))
        print(f"Written: {path}")


def evaluation(
    function: Callable[..., object], description: str | None, argv: Sequence[str] | None
) -> tuple[Evaluation, dict[str, Any]]:
    """Reads the command line of an evaluation.

    Args:
        function: Its keyword-only arguments become the options of this evaluation, with types,
            defaults and docstring.
        description: Shown above the options.
        argv: Arguments, by default those of the program.

    Returns:
        What is evaluated, and the options that were given, as arguments for `function`.
    """
    arguments = signature(function).parameters.values()
    positional: set[str | int] = {
        each.name for each in arguments if each.kind is not each.KEYWORD_ONLY
    }
    parser = Parser(description=description, usage="%(prog)s ENCODER [options]")
    parser.add_class_arguments(Evaluation, as_positional=True, skip={"data"}, instantiate=False)
    parser.add_class_arguments(Data, "data", instantiate=False)
    parser.add_function_arguments(function, as_positional=False, skip=positional)
    options = vars(parser.instantiate(parser.parse_args(argv, defaults=False)))
    options.pop("config", None)
    options["data"] = vars(options.get("data", Namespace()))
    names = signature(Evaluation).parameters.keys() & options.keys()
    return Evaluation(**{name: options.pop(name) for name in names}), options
