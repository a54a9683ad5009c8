"""What a report is made of, and how it becomes an HTML page or a Markdown file.

Whatever is a plain string here is escaped: names of classes and runs, and settings, may come from anywhere. The page
has no script and may load nothing, which its content security policy tells the browser too.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import ClassVar, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ssl_gradmix.version import __version__


class Cell(NamedTuple):
    """What stands in a table: a value or a name, and what is said smaller beside it."""

    text: str
    detail: str = ""
    best: bool = False  # whether it is marked
    run: int | None = None  # number of the run that it names, shown by the run's line
    bar: float | None = None  # share in [0, 1] drawn below the value


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head; the first cell of each names it."""

    kind: ClassVar[str] = "table"
    title: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False


class Panel(NamedTuple):
    """One picture: SVG markup, or the `data:` address of an image; a legend is of names and CSS colors."""

    title: str
    picture: str
    run: int | None = None
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Figures:
    """Pictures side by side; `runs` names the lines in them."""

    kind: ClassVar[str] = "figures"
    title: str
    panels: Sequence[Panel]
    note: str = ""
    runs: Sequence[str] = ()
    folded: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Missing:
    """Says what is not there, and what to run to get it."""

    kind: ClassVar[str] = "missing"
    text: str
    command: str = ""


Part = Table | Figures | Missing


class Section(NamedTuple):
    """A chapter of the report."""

    title: str
    parts: Sequence[Part]
    text: str = ""

    @property
    def anchor(self) -> str:
        """Its address in the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def render_html(title: str, runs: Sequence[str], sections: Sequence[Section]) -> str:
    """One page with everything in it; `runs` are named in the order of their colors."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    numbers = count()
    # A figure is the only markup that passes as it is. Its ids become its own: figures may have the same.
    environment.filters["figure"] = lambda svg: Markup(
        re.sub(r'( id="|url\(#|href="#)', rf"\g<1>f{next(numbers)}-", svg)
    )
    page = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return page.render(title=title, runs=runs, sections=sections, version=__version__)


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """The tables and what is said about them; figures are in the page alone."""
    blocks = [f"# {_escaped(title)}"]
    for section in sections:
        parts = [part for part in section.parts if not isinstance(part, Figures)]
        if not parts and not section.text:
            continue
        blocks += [f"## {_escaped(section.title)}", *([_escaped(section.text)] if section.text else [])]
        for part in parts:
            if isinstance(part, Table):
                blocks += [f"### {_escaped(part.title)}"] if part.title != section.title else []
                blocks.append(_markdown_table(part))
                blocks += [_escaped(part.note)] if part.note else []
            else:
                blocks.append(f"*{_escaped(part.text)}*" + (f" {_code(part.command)}" if part.command else ""))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    align = ["---"] + ["---:"] * (len(table.head) - 1)
    lines = [[_markdown_cell(cell) for cell in row] for row in (table.head, *table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], align, *lines[1:]))


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_escaped(cell.text)}**" if cell.best else _escaped(cell.text)
    return f"{text} ({_escaped(cell.detail)})" if cell.detail else text


def _escaped(text: str) -> str:
    """Plain text in Markdown: on one line, neither HTML nor marks of its own."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    """Text in a span of code, which ends only at a longer row of backticks than any inside."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"
