"""What the command lines share: settings read by jsonargparse, and errors of one line."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_loader,
    set_parsing_settings,
)

from ssl_gradmix.files import parse_yaml, read_yaml
from ssl_gradmix.settings import Augmentation, Backbone, Data, Optimizer, Training

# Where a value stands for a dataclass, jsonargparse would import any module that it names, before it is refused.
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[Data.__module__])
set_loader("yaml", parse_yaml, exceptions=(yaml.YAMLError,))


class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of a description."""


class Parser(ArgumentParser):
    """Reads options, and settings of dataclasses. What is wrong with them is raised, and names are not cut short."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"formatter_class": Formatter, "exit_on_error": False, "allow_abbrev": False} | kwargs)

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        """Adds an option for each setting, but none for the whole section, which would read another file."""
        added = super().add_class_arguments(theclass, nested_key, **kwargs)
        if nested_key is not None:
            self._option_string_actions.pop(f"--{nested_key}").help = SUPPRESS
        return added

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """As jsonargparse's, which by itself lets null pass for a value of any type."""
        super().validate(*args, **kwargs)
        super().validate(*args, **kwargs | {"skip_unset": False})


class ConfigFile(ActionConfigFile):
    """`--config FILE`, where the file is plain settings: see `read_yaml`.

    Nothing in it, which somebody else may have written, empties a folder, downloads or has another file read.
    """

    def __call__(self, parser: ArgumentParser, cfg: Namespace, values: str, option_string: str | None = None) -> None:
        content = read_yaml(values)
        for name in sorted({"config", "overwrite"} & content.keys()):
            raise ValueError(f"{values}: {name} is for the command line alone, leave it out of the file")
        for section in sorted(parser.groups.keys() & content.keys()):
            if not isinstance(content[section], dict) or "class_path" in content[section]:
                raise ValueError(f"{values}: {section} must hold settings, got {_short(content[section])}")
        # As text, for jsonargparse would read the file again, and not as it is read here.
        super().__call__(parser, cfg, json.dumps(_without_downloads(content), ensure_ascii=False), option_string)


def _without_downloads(content: Any) -> Any:
    if isinstance(content, dict):
        kept = {name: value for name, value in content.items() if str(name).rpartition(".")[2] != "download"}
        return {name: _without_downloads(value) for name, value in kept.items()}
    return [_without_downloads(value) for value in content] if isinstance(content, list) else content


def recipe_parser(method_settings: type, description: str, recipe: str) -> ArgumentParser:
    """The settings of a pretraining recipe, read off their dataclasses; `recipe` names the run folder by default."""
    from ssl_gradmix.gradmix import GradMix  # with torch, which no other command line needs for its help

    parser = Parser(description=description, usage="%(prog)s [options]")
    parser.add_argument(
        "--config",
        action=ConfigFile,
        help="YAML file of settings, such as another run's config.yaml; what follows it wins.",
    )
    parser.add_argument("--run", type=str, default=f"runs/{recipe}", help="Run folder, where everything is written.")
    parser.add_argument(
        "--overwrite",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Start anew in a folder that holds another or a finished run; an unfinished one begun with it resumes.",
    )
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
    sections = {"data": Data, "augmentation": Augmentation, "backbone": Backbone, "method": method_settings}
    for name, settings in (sections | {"optimizer": Optimizer, "training": Training}).items():
        parser.add_class_arguments(settings, name)
    parser.set_defaults({"augmentation.flip": None, "augmentation.blur": None})  # settled by `read`
    parser.add_class_arguments(GradMix, "gradmix", skip={"generator", "attribution"})
    # A function is for Python alone: naming one would have a module imported.
    parser.groups["gradmix"].add_argument(
        "--gradmix.attribution",
        type=Literal["layercam", "gradcam"],
        default="layercam",
        help="`layercam` or `gradcam`.",
    )
    return parser


def read(parser: ArgumentParser, argv: Sequence[str] | None) -> tuple[Namespace, dict[str, Any]]:
    """Reads the command line to settings as dataclasses, and the same as plain values, for YAML."""
    parsed = parser.parse_args(argv)
    for name, value in usual_augmentation(parsed.data.name, parsed.data.size).items():
        if parsed.augmentation[name] is None:
            parsed.augmentation[name] = value
    plain = yaml.safe_load(parser.dump(parsed))
    plain.pop("environment", None)
    plain.pop("overwrite")  # a run that goes by another's settings must not take its place by them
    return parser.instantiate(parsed), plain


def usual_augmentation(data: str, size: int) -> dict[str, float]:
    """Settings of the augmentation that go by the data set's name and the size of its images, where nobody says."""
    return {"flip": 0.0 if data in ("digits", "mnist", "svhn") else 0.5, "blur": 0.5 if size >= 96 else 0.0}


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Calls a script's main function; what the user can mend is said in one line.

    Returns:
        The exit status: 0, 2 for input that will not do (ValueError, KeyError, OSError), 1 for a training that broke
        down, 130 for Ctrl-C.
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
    except KeyboardInterrupt:
        if speaks:
            print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _message(error: Exception) -> str:
    """One line, but for messages that are written in several, such as how to convert a checkpoint."""
    if isinstance(error, ArgumentError):
        return _of_jsonargparse(str(error))
    return str(error.args[0]) if isinstance(error, KeyError) else str(error) or type(error).__name__


def _of_jsonargparse(text: str) -> str:
    """Its messages name the setting, the value and the types that this may have, in many lines."""
    *_, last = re.split('Parser key "(.+?)":', text)
    key = ".".join(re.findall('Parser key "(.+?)":', text))
    if module := re.search("Importing '(.+?)' is not allowed", last):
        return f"{key}: {module[1]!r} names something to import, and settings are plain values"
    found = re.search(r"Subtypes: \[([^\n]+)\]\n.*Given value: (.*)", last, re.DOTALL)
    found = found or re.search(r"Expected an? (.+)\. Got value: (.*)", last)
    if not (key and found):
        return _short(text)
    kinds = found[1].replace(", <class 'NoneType'>", " or null")
    for kind, words in _KINDS.items():
        kinds = re.sub(kind, words, kinds)
    return f"{key} must be {kinds}, got {_short(found[2])}"


_KINDS = {
    r"<class 'int'>": "a whole number",
    r"<class 'float'>": "a number",
    r"<class 'bool'>": "true or false",
    r"<class 'str'>": "a text, in quotes where it looks like a number",
    r"<class 'dict'>": "settings such as {a: 1}",
    r"<class '(list|tuple)'>|list\[.*\]": "a list such as [a, b]",
    r"typing\.Literal\[(.*?)\]": r"one of \1",
}
"""How jsonargparse writes types, and what to call them."""


def _short(value: object, longest: int = 300) -> str:
    """A value in one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= longest else f"{text[:longest]} ..."
