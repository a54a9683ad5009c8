"""What the command lines share: settings read by jsonargparse, and errors of one line."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from ssl_gradmix.files import read_yaml
from ssl_gradmix.settings import Augmentation, Backbone, Data, Optimizer, Training


class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of a description."""


class ConfigFile(ActionConfigFile):
    """`--config FILE`, where the file is plain settings: see `read_yaml`."""

    def __call__(self, parser: ArgumentParser, cfg: Namespace, values: str, option_string: str | None = None) -> None:
        if os.path.isfile(values):
            read_yaml(values)
        super().__call__(parser, cfg, values, option_string)


def recipe_parser(method_settings: type, description: str, recipe: str) -> ArgumentParser:
    """The settings of a pretraining recipe, read off their dataclasses.

    Args:
        method_settings: Dataclass of the method's own settings.
        description: Shown by `--help`.
        recipe: Names the run folder where the user does not.
    """
    from ssl_gradmix.gradmix import GradMix  # with torch, which no other command line needs for its help

    parser = ArgumentParser(
        description=description, usage="%(prog)s [options]", formatter_class=Formatter, exit_on_error=False
    )
    parser.add_argument(
        "--config",
        action=ConfigFile,
        help="YAML file of settings, such as another run's config.yaml; what follows it wins.",
    )
    parser.add_argument("--run", type=str, default=f"runs/{recipe}", help="Run folder, where everything is written.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Start anew in a folder that holds a run.")
    parser.add_argument("--expect_processes", type=int | None, default=None, help="Stop unless so many processes run.")
    parser.add_argument(
        "--extra_view",
        type=Literal["gradmix", "augmented", "none"],
        default="gradmix",
        help="The third view: GradMix's, a plain augmentation (the control), or none (the plain method).",
    )
    parser.add_argument(
        "--environment", type=dict | None, default=None, help="In config.yaml: what the run ran on. Not read."
    )
    for name, settings in (
        ("data", Data),
        ("augmentation", Augmentation),
        ("backbone", Backbone),
        ("method", method_settings),
        ("optimizer", Optimizer),
        ("training", Training),
    ):
        parser.add_class_arguments(settings, name)
    parser.set_defaults({"augmentation.flip": None})  # settled by `read`
    parser.add_class_arguments(GradMix, "gradmix", skip={"generator", "attribution"})
    # A function is for Python alone: here its name would have any module imported that a file of settings names.
    parser.groups["gradmix"].add_argument(
        "--gradmix.attribution",
        type=Literal["layercam", "gradcam", "random", "center"],
        default="layercam",
        help="`layercam`, `gradcam`, or a control, the same mixing at another place: `random` or `center`.",
    )
    return parser


def read(parser: ArgumentParser, argv: Sequence[str] | None) -> tuple[Namespace, dict[str, Any]]:
    """Reads the command line.

    Returns:
        The settings as dataclasses, and the same as plain values, for YAML.
    """
    parsed = parser.parse_args(argv)
    if parsed.augmentation.flip is None:
        parsed.augmentation.flip = 0.0 if parsed.data.name in ("digits", "mnist", "svhn") else 0.5
    plain = yaml.safe_load(parser.dump(parsed))
    plain.pop("environment", None)
    plain.pop("overwrite")  # a run that goes by another's settings must not take its place by them
    return parser.instantiate(parsed), plain


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Calls a script's main function; what the user can mend is said in one line.

    Args:
        main: Takes the arguments, None for those of the process.
        argv: The arguments.

    Returns:
        The exit status: 0, 2 for input that will not do (ValueError, KeyError, OSError), 1 for a training that broke
        down.
    """
    # Every process says the same; one is enough.
    speaks = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ssl_gradmix").setLevel(logging.INFO if speaks else logging.ERROR)
    try:
        main(argv)
    except (ArgumentError, ValueError, KeyError, OSError, FloatingPointError) as error:
        if speaks:
            print(f"error: {_message(error)}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


def _message(error: Exception) -> str:
    """One line, but for messages that are written in several, such as how to convert a checkpoint."""
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error) or type(error).__name__
    return " ".join(text.split()) if isinstance(error, ArgumentError) else text
