"""Command lines: options read from signatures and docstrings, errors in one line."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import sys
import warnings
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

import pandas as pd
import timm
import torch
import yaml
from accelerate import Accelerator
from jsonargparse import (
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_loader,
    set_parsing_settings,
)
from jsonargparse.typing import NotEmptyStr, PositiveInt
from matplotlib.figure import Figure
from torch import Tensor

from ssl_gradmix import console, model_card
from ssl_gradmix.backbones import Backbone
from ssl_gradmix.data.augmentation import Augmentation, usual_augmentation
from ssl_gradmix.data.datasets import Data, ImageSet
from ssl_gradmix.data.open_set import known_classes, load_known
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import count_copies, extract
from ssl_gradmix.files import parse_yaml, write_whole
from ssl_gradmix.gradmix import GradMix
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.training.optimizers import Optimizer
from ssl_gradmix.training.trainer import Training
from ssl_gradmix.version import __version__

logger = logging.getLogger("ssl_gradmix")

# In a config file a section can name a class, which jsonargparse would import.
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[Data.__module__])
set_loader("yaml", parse_yaml, (yaml.YAMLError, ValueError, TypeError, RecursionError))

# --- What recipes and evaluations share


class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description."""


class Parser(ArgumentParser):
    """An argument parser that raises errors, and does not accept abbreviated options.

    An error about an unknown option suggests the options that may be meant.
    """

    def __init__(self, **kwargs: Any) -> None:
        # jsonargparse makes further parsers of this class and sets some of these arguments.
        defaults = {
            "formatter_class": Formatter,
            "exit_on_error": False,
            "allow_abbrev": False,
            "version": __version__,
        }
        options: dict[str, Any] = {**defaults, **kwargs}
        super().__init__(**options)
        self.add_argument("--config", action="config", help="YAML file of these options.")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        found = re.search(r"unrecognized arguments: --([\w.]+)", message)
        near = self._near(found[1]) if found else []
        if near and not message.endswith("?"):  # jsonargparse passes an error on to this method
            message += f"; did you mean {' or '.join(near)}?"
        super().error(message, ex)
        raise AssertionError  # not reached

    def _near(self, name: str) -> list[str]:
        """Options of the same name in a section, or else with similar names."""
        options = {o[2:]: o for action in self._actions for o in action.option_strings}
        ends = {full: full.rpartition(".")[2] for full in options}
        last = name.rpartition(".")[2]
        near = {last} if last in ends.values() else difflib.get_close_matches(last, ends.values())
        return [options[full] for full, end in ends.items() if end in near]


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Calls the main function of a script and prints errors of the user's input in one line.

    Returns:
        The exit status: 0, 2 for invalid input, 1 for a training that diverged, 130 for Ctrl-C.
    """
    is_main_process = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler()
    handler.setFormatter(console.Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    warnings.showwarning = _show_warning
    logging.getLogger("ssl_gradmix").setLevel(logging.INFO if is_main_process else logging.ERROR)
    try:
        main(argv)
    except KeyboardInterrupt:
        return 130
    except (ArgumentError, ValueError, KeyError, OSError, FloatingPointError) as error:
        # An unreadable image can be the problem of one process only, hence on all of them.
        message = error.args[0] if isinstance(error, KeyError) else error
        console.show(f"error: {' '.join(str(message).split())}", sys.stderr)
        status = 1 if isinstance(error, FloatingPointError) else 2
        if torch.distributed.is_initialized():
            # Taking the process group down would wait for processes that have ended, or abort.
            sys.stdout.flush()
            os._exit(status)
        return status
    return 0


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    console.show(f"warning: {message}", file or sys.stderr)


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
        type=NotEmptyStr,
        default=f"runs/{recipe}",
        help="Run folder. An unfinished run in it is resumed. Of a finished one, checkpoint/ and "
        "samples/ may be deleted.",
    )
    parser.add_argument(
        "--init",
        type=NotEmptyStr | None,
        default=None,
        help="Weights to start from: a run folder (its projector, too, if it has the same shape), "
        "timm:NAME (published weights), local-dir:PATH (timm's layout), or the file of a "
        "checkpoint.",
    )
    parser.add_argument(
        "--extra_view",
        type=Literal["adaptive", "gradmix", "augmented", "none"],
        default="adaptive",
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
    argv = sys.argv[1:] if argv is None else argv
    # What is printed must have the defaults of the data set.
    first = parser.parse_args([each for each in argv if not each.startswith("--print_config")])
    parser.set_defaults(_usual(parser.instantiate(first).data))
    config = parser.instantiate(parser.parse_args(argv))
    config.pop("config")
    if config.data.name != "digits":
        config.data.root = _absolute(config.data.root or "data")
    if config.init is not None and not config.init.startswith("timm:"):
        folder = config.init.removeprefix("local-dir:")
        config.init = config.init.replace(folder, _absolute(folder))
    return config


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


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
        weights: Checkpoint for the architecture `timm:NAME`, instead of published weights:
            safetensors, or a file of torch.save. It can hold more than the encoder.
        prefix: Part of the checkpoint to read where it is not found alone, such as
            `module.encoder_k`.
        out: Folder for results. The default for a run is its `eval/`.
        batch_size: Images that each process encodes at once.
        cache: Keep features in `features/` in the folder for results, and reuse them.
        data: Settings of `Data`. The others are those of the run if it has the same data set.
        backbone: Settings of `Backbone`: `kwargs` of the architecture `timm:NAME`.
    """

    def __init__(
        self,
        encoder: str,
        feature: Literal["backbone", "projector"] = "backbone",
        weights: str | None = None,
        prefix: str | None = None,
        out: str | None = None,
        batch_size: PositiveInt = 256,
        cache: bool = True,
        data: Mapping[str, Any] | None = None,
        backbone: Mapping[str, Any] | None = None,
    ) -> None:
        given, kwargs = dict(data or {}), (backbone or {}).get("kwargs")
        self.encoder = load_encoder(encoder, weights, given.get("size"), feature, prefix, kwargs)
        if self.encoder.run is None and "name" not in given:
            raise ValueError(f"data.name: {self.encoder.name} is not a run, so it must be given")
        given |= {"size": self.encoder.size, "channels": len(self.encoder.mean)}
        self.data = Data(**{**self._of_run(given), **given})
        self.variant = selection(self.data) if given.keys() & {"classes", "open_set"} else ""
        if out is not None:
            self.out = Path(out).expanduser()
        elif self.encoder.run is not None:
            self.out = self.encoder.run / "eval"
        else:
            raise ValueError(f"out: {self.encoder.name} is not a run, so --out FOLDER is needed")
        self.out.mkdir(parents=True, exist_ok=True)  # fails now and not after the work
        if out is not None:
            self._check_out()
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

    def _check_out(self) -> None:
        """Raises if the folder has results of another encoder, which would be replaced."""
        for path in self.out.glob("*-*.json"):
            try:
                name = results.read(path)[1]["encoder"]["name"]
            except (KeyError, TypeError, ValueError):
                continue  # something else
            if name != self.encoder.name:
                raise ValueError(f"out: {self.out} has results of {name}; choose another --out")

    @property
    def classes(self) -> dict[str, str]:
        """The parameter `classes` of results, if the settings select classes."""
        chosen = selection(self.data)
        return {"classes": chosen} if chosen else {}

    @property
    def training_data(self) -> Data | None:
        """Settings of the images that the run was trained on; None if the encoder is not a run."""
        settings = self._of_run({})
        shared = {"size": self.data.size, "channels": self.data.channels}
        return Data(**{**settings, **shared}) if settings else None

    def load(
        self,
        split: Literal["train", "test"],
        data: Data | None = None,
        labeled: bool = True,
    ) -> ImageSet:
        """Loads images, of the data and classes of the settings or of other ones.

        Logs a warning if the training images of a run are not those it was trained on.

        Args:
            split: Part of the data set.
            data: Other settings.
            labeled: Load images with labels only, and for training those of at least two classes.

        Raises:
            ValueError: No image has a label, or training images are of one class.
        """
        data = data or self.data
        with self.accelerator.local_main_process_first():  # loading may download
            images = load_known(data, split)
        if split == "train" and self.accelerator.is_main_process:
            self._compare(images, data)
        if not labeled:
            return images
        images = images.subset(images.labels >= 0)
        if len(images) == 0:
            raise ValueError(f"data.root: {images.name} has no labels; use one folder per class")
        if split == "train" and len(set(images.labels)) < 2:
            raise ValueError(f"data: {images.name} must have labels of at least 2 classes")
        return images

    def _compare(self, images: ImageSet, data: Data) -> None:
        """Warns if the run's training images are not what they were when it was trained."""
        config, own = self.encoder.config or {}, self.training_data
        recorded = (config.get("environment") or {}).get("images_fingerprint")
        if own is None or recorded is None:
            return
        if replace(data, classes=own.classes, open_set=own.open_set) != own:
            return
        known = known_classes(own, images.classes)
        if known_classes(data, images.classes) not in (None, known):
            return
        if known is not None:
            images = images.only(known)
        if config.get("label_fraction", 1) != 1:
            images = images.with_few_labels(config["label_fraction"], config["training"]["seed"])
        if images.fingerprint() != recorded:
            before = config["environment"].get("images")
            logger.warning(
                "%s: data.root %s does not hold the images that the run was trained on: %s then, "
                "%s now in %s, with other names, sizes or labels",
                *(self.encoder.name, data.root, before, len(images), images.name),
            )

    def copies(self, images: ImageSet, features: Tensor, bank: Tensor) -> dict[str, int]:
        """Counts images whose features (M, D) equal one of a bank (N, D), and warns of them.

        Returns:
            The count by the name of the images, for the file of results.
        """
        count = count_copies(features, bank)
        if count:
            logger.warning(
                "%s: %d of %d images have the same features as a training image or a known one: "
                "are they copies?",
                *(images.name, count, len(features)),
            )
        return {images.name: count}

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
        variant: str = "",
        **about: Any,
    ) -> None:
        """Writes results, replacing earlier ones of the same task, data set and variant.

        Args:
            rows: The results.
            figure: Written next to them as PNG.
            images: The images that were used. The file is named after the last.
            samples: A line per image, written next to the results as CSV.
            variant: Names what was asked for besides the task's default, such as trials. Classes
                that were asked for are named, too.
            **about: Further entries of the file of results.
        """
        encoder = self.encoder
        dataset = images[-1].name.rpartition("/")[0].removeprefix("folder:")
        feature = "" if encoder.feature == "backbone" else encoder.feature
        parts = [rows["task"].iloc[0], dataset, _slug(variant), _slug(self.variant), feature]
        path = self.out / f"{'-'.join(filter(None, parts))}.json"
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
        console.show(f"Written: {path}")
        if encoder.run is not None and self.out == encoder.run / "eval":
            model_card.update(RunFolder(encoder.run))


def selection(data: Data) -> str:
    """The classes that settings select, in words; empty for all."""
    return data.open_set or ", ".join(map(str, data.classes or ()))


def _slug(text: str) -> str:
    """Text as a part of a file name, such as `random_6` for `random:6`."""
    name = re.sub(r"[^\w+]+", "_", text).strip("_")
    if len(name) <= 40:
        return name
    return f"{name[:31]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def evaluation(
    function: Callable[..., object],
    description: str | None,
    argv: Sequence[str] | None,
    data: Mapping[str, Any] | None = None,
) -> tuple[Evaluation, dict[str, Any]]:
    """Reads the command line of an evaluation.

    Args:
        function: Its keyword-only arguments become the options of this evaluation, with types,
            defaults and docstring.
        description: Shown above the options.
        argv: Arguments, by default those of the program.
        data: Settings of --data to use instead of the run's unless they are given.

    Returns:
        What is evaluated, and the options that were given, as arguments for `function`.
    """
    arguments = signature(function).parameters.values()
    positional: set[str | int] = {
        each.name for each in arguments if each.kind is not each.KEYWORD_ONLY
    }
    parser = Parser(description=description, usage="%(prog)s ENCODER [options]")
    parser.add_class_arguments(
        Evaluation, as_positional=True, skip={"data", "backbone"}, instantiate=False
    )
    parser.add_class_arguments(Data, "data", instantiate=False)
    only_kwargs: set[str | int] = {"name", "pretrained"}
    parser.add_class_arguments(Backbone, "backbone", skip=only_kwargs, instantiate=False)
    parser.add_function_arguments(function, as_positional=False, skip=positional)
    options = vars(parser.instantiate(parser.parse_args(argv, defaults=False)))
    options.pop("config", None)
    options["backbone"] = vars(options.get("backbone", Namespace()))
    options["data"] = {**(data or {}), **vars(options.get("data", Namespace()))}
    names = signature(Evaluation).parameters.keys() & options.keys()
    return Evaluation(**{name: options.pop(name) for name in names}), options
