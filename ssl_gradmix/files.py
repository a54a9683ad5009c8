"""Files: read as plain data and never as instructions, written whole or not at all, and their names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, which has neither NaN nor infinity, is nested too deeply, or is no regular file.
    """
    try:
        content = json.loads(_text(path), parse_constant=_refuse)
        json.dumps(content, ensure_ascii=False).encode()  # "\\ud800" is half a character, which nobody can print
    except (ValueError, RecursionError) as error:  # Unicode and JSON errors are ValueErrors
        raise ValueError(f"{path} is damaged: {_one_line(error)}") from error
    return content


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings in a YAML file.

    What its tags ask for is not run, and aliases, by which a few lines can grow without bounds, are refused.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such YAML, holds no settings, is nested too deeply, or is no regular file.
    """
    try:
        settings = parse_yaml(_text(path))
        json.dumps(settings, ensure_ascii=False).encode()  # neither sets nor bytes, nor halves of characters
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {_one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    return settings


def parse_yaml(text: str) -> Any:
    """What YAML says, read as `read_yaml` reads it. Any JSON will do.

    Raises:
        yaml.YAMLError: It is no such YAML.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise yaml.YAMLError(_one_line(error)) from error


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Has `write(temporary path)` write a file in the same folder and renames it, so that no reader sees half of it.

    Several processes may write the same file, and the last one's stays. A process that is killed while it writes leaves
    `.<name>.<process>.tmp` behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # in a folder of strangers it may be a link to any file
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def printable(name: str) -> str:
    """A file's name as text: bytes in it that are no UTF-8, which nothing can print, become `\\xe9` and the like."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


class _PlainLoader(yaml.SafeLoader):
    """Builds numbers, texts, lists and dictionaries, each of what is written there.

    YAML 1.1 has numbers that do not look it, such as 010, which would be eight: they are texts here, as are dates.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it has an alias, *{self.peek_event().anchor}: write out what it stands for")
        return super().compose_node(parent, index)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for kind, form in (
    ("int", r"[-+]?(0|[1-9][0-9]*)"),
    ("sexagesimal", r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
    ("float", r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan"),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{form})$"), list("-+.0123456789"))


def _refuse_sexagesimal(loader: yaml.Loader, node: yaml.ScalarNode) -> None:
    raise yaml.YAMLError(f"{node.value} is a number to the base of 60 in YAML: put it in quotes where it is a text")


_PlainLoader.add_constructor("tag:yaml.org,2002:sexagesimal", _refuse_sexagesimal)


def _text(path: str | Path) -> str:
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("it is no regular file")  # a pipe would have the reader wait
    return Path(path).read_text(encoding="utf-8")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split()) or type(error).__name__
