"""Small helpers to read and write files."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml


def open_regular(path: str | Path, mode: str = "rb") -> IO[Any]:
    """Opens a file of a folder that somebody else may have made, such as a run folder.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a regular file. A pipe or a device would block, or never end.
    """

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")

    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=opener)


def read_bytes(path: str | Path) -> bytes:
    """Reads a regular file as a whole; raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not regular, or not valid JSON.
    """
    content = read_bytes(path)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # Unicode and JSON errors are ValueErrors
        raise ValueError(f"{path} is damaged: {error}") from error


class _Loader(yaml.SafeLoader):
    """Plain values. Unlike YAML 1.1, `1e-3` is a number, and a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """Parses YAML to plain values. Names in a list `classes` are text, also `yes` and `01`.

    Raises:
        yaml.YAMLError: The text is not valid YAML, or a key is given twice, of which YAML would use
            the last; the message has the line.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _check_keys(node, "", {})
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node | None, prefix: str, seen: dict[object, yaml.Node]) -> None:
    """Rejects keys that are given twice, `a.b` beside `a: {b: 1}` included."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen[id(node)] = node  # nodes with a name, in YAML, can be in many places
    for i, item in enumerate(node.value):
        named = isinstance(node, yaml.MappingNode)
        key, value = item if named else (item, item)
        name = f"{prefix}{key.value if named else i}"
        if name in seen:
            line = key.start_mark.line + 1
            raise yaml.YAMLError(f"the key {name!r} is given twice, again in line {line}")
        seen[name] = value
        if name.rpartition(".")[2] == "classes" and isinstance(value, yaml.SequenceNode):
            for each in value.value:
                if isinstance(each, yaml.ScalarNode):
                    each.tag = "tag:yaml.org,2002:str"
        _check_keys(value, f"{name}.", seen)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of settings, see `parse_yaml`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not regular, not valid YAML, or does not hold a mapping.
    """
    content = read_bytes(path)
    try:
        settings = parse_yaml(content.decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it does not hold settings")
    return settings


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that a reader, or a crash, never sees half of it.

    Args:
        path: Where the file goes; missing parent folders are created.
        write: Called with a temporary path in the same folder. What it writes there is flushed to
            the disk and renamed to `path`. If it raises, an existing file at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two evaluations apart that write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # in a downloaded folder it could be a link to another file
    try:
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Waits until the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
