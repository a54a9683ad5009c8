"""The parts a report is made of, and how they become one HTML page or one Markdown file.

Whatever is a plain string here is escaped: class names, run names and settings may come from anywhere. Only figures,
drawn by `report.figures`, are markup. The page has no script and may load nothing, which its content security policy
tells the browser too.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import ClassVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ssl_gradmix.version import __version__


@dataclass(frozen=True)
class Cell:
    """What stands in a table, in its head or below.

    Args:
        text: The value or the name.
        detail: Said smaller beside it, an interval for instance.
        best: Whether it is the best of its row or column.
        run: Index of the run that it names, shown by the run's line.
        bar: Share in [0, 1] drawn below the value.
    """

    text: str
    detail: str = ""
    best: bool = False
    run: int | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head; the first cell of each names it.

    Args:
        title: What is in it.
        head: A cell a column.
        rows: As many cells each.
        note: What its numbers mean.
        folded: Whether the page shows it on demand only.
    """

    kind: ClassVar[str] = "table"
    title: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: Said above it.
        picture: SVG markup, or the `data:` address of an image.
        run: Index of the run that it shows, if it is a single one.
        legend: Names with their colors, as CSS has them.
    """

    title: str
    picture: str
    run: int | None = None
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Figures:
    """Pictures side by side, as many as the page is wide.

    Args:
        title: What they show.
        panels: The pictures.
        note: How to read them.
        runs: Names of the runs for a key of lines, where one is needed.
        folded: Whether the page shows them on demand only.
        wide: Whether each takes the whole width.
    """

    kind: ClassVar[str] = "figures"
    title: str
    panels: Sequence[Panel]
    note: str = ""
    runs: Sequence[str] = ()
    folded: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Missing:
    """Says what is not there, and how to get it.

    Args:
        text: The reason.
        command: What to run.
    """

    kind: ClassVar[str] = "missing"
    text: str
    command: str = ""


Part = Table | Figures | Missing


@dataclass(frozen=True)
class Section:
    """A chapter of the report.

    Args:
        title: Its heading.
        parts: What it holds, in order.
        text: What it is about, and by which protocol it was measured.
    """

    title: str
    parts: Sequence[Part]
    text: str = ""

    @property
    def anchor(self) -> str:
        """Its address in the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def render_html(title: str, runs: Sequence[str], sections: Sequence[Section]) -> str:
    """One page with everything in it.

    Args:
        title: Its heading.
        runs: Names of the runs, in the order of their colors.
        sections: Its chapters.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = partial(_figure, count())
    return environment.from_string(_PAGE).render(title=title, runs=runs, sections=sections, version=__version__)


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """The tables and what is said about them; figures are in the page alone."""
    blocks = [f"# {_escaped(title)}"]
    for section in sections:
        blocks.append(f"## {_escaped(section.title)}")
        if section.text:
            blocks.append(_escaped(section.text))
        for part in section.parts:
            if isinstance(part, Table):
                blocks += [f"### {_escaped(part.title)}"] if part.title != section.title else []
                blocks.append(_markdown_table(part))
                blocks += [_escaped(part.note)] if part.note else []
            elif isinstance(part, Missing):
                command = f" {_code(part.command)}" if part.command else ""
                blocks.append(f"*{_escaped(part.text)}*{command}")
    return "\n\n".join(blocks) + "\n"


def _figure(numbers: Iterator[int], svg: str) -> Markup:
    """A figure as markup, the only one that passes as it is. Its ids become its own: figures may have the same."""
    return Markup(re.sub(r'( id="|url\(#|href="#)', rf"\g<1>f{next(numbers)}-", svg))


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


_PAGE = """\
{% macro swatch(run) %}
<svg class="swatch" viewBox="0 0 22 10" aria-hidden="true"><line x1="1" x2="21" y1="5" y2="5" class="line-{{ run }}"/>\
</svg>
{%- endmacro %}
{% macro name(text, run) %}
{% if run is not none %}{{ swatch(run) }} {% endif %}{{ text }}
{%- endmacro %}
{% macro cell(tag, it, scope="", column=none) %}
<{{ tag }}{% if scope %} scope="{{ scope }}"{% endif %}{% if it.best %} class="best"{% endif %}>\
{{ name(it.text, it.run) }}
{%- if it.detail %} <small>{{ it.detail }}</small>{% endif %}
{%- if it.bar is not none %}
<span class="bar" style="--share: {{ it.bar }}; --of: var(--run-{{ column.run % 6 }})"></span>
{%- endif %}
</{{ tag }}>
{%- endmacro %}
{% macro table(it) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ it.title }}">
<table>
<thead><tr>
{% for column in it.head %}
{{ cell("th", column, "col") }}
{% endfor %}
</tr></thead>
<tbody>
{% for row in it.rows %}
<tr>
{{ cell("th", row[0], "row") }}
{% for value in row[1:] %}
{{ cell("td", value, column=it.head[loop.index]) }}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if it.note %}<p class="note">{{ it.note }}</p>{% endif %}
{% endmacro %}
{% macro figures(it) %}
{% if it.runs %}
<p class="key">
{% for run in it.runs %}
<span>{{ name(run, loop.index0) }}</span>
{% endfor %}
</p>
{% endif %}
<div class="panels{% if it.wide %} wide{% endif %}">
{% for panel in it.panels %}
<figure>
<figcaption>{{ name(panel.title, panel.run) }}</figcaption>
{% if panel.picture.startswith("data:") %}
<img src="{{ panel.picture }}" alt="{{ it.title }}: {{ panel.title }}">
{% else %}
<div role="img" aria-label="{{ it.title }}: {{ panel.title }}">{{ panel.picture | figure }}</div>
{% endif %}
{% if panel.legend %}
<p class="legend">
{% for label, color in panel.legend %}
<span><i style="background: {{ color }}"></i>{{ label }}</span>
{% endfor %}
</p>
{% endif %}
</figure>
{% endfor %}
</div>
{% if it.note %}<p class="note">{{ it.note }}</p>{% endif %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  --paper: #fff; --ink: #1b1f27; --muted: #626a76; --rule: #dfe2e7; --soft: #f5f6f8; --best: #eaf3ea;
  --run-0: #0072b2; --run-1: #d55e00; --run-2: #009e73; --run-3: #b8559a; --run-4: #9a7500; --run-5: #5b5bd6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --ink: #e6e8ec; --muted: #9aa3af; --rule: #333942; --soft: #1c2026; --best: #1d3324;
    --run-0: #56a8e0; --run-1: #f08a4b; --run-2: #35c397; --run-3: #dd8fc4; --run-4: #d6b03c; --run-5: #9b9bff;
  }
}
{% for run in runs %}
.line-{{ loop.index0 }} { stroke: var(--run-{{ loop.index0 % 6 }});\
 stroke-dasharray: {{ ["none", "5 2", "2 2", "6 2 2 2"][loop.index0 // 6 % 4] }}; }
{% endfor %}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 4rem 1.5rem 6rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { margin: 0 0 .5rem; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 5rem 0 .5rem; font-size: 1.4rem; line-height: 1.3; letter-spacing: -.01em; }
h3 { margin: 2.5rem 0 .5rem; font-size: 1rem; }
h2 + h3 { margin-top: 1.25rem; }
p { max-width: 46rem; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
code { padding: .15em .4em; border-radius: .3em; background: var(--soft); overflow-wrap: anywhere;
  font: .875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.missing code { display: inline-block; max-width: 100%; overflow-x: auto; vertical-align: bottom; white-space: nowrap; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: .25em; }
a:hover { text-decoration-color: currentcolor; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9rem; }
.lead, .note, .missing { color: var(--muted); }
.note { font-size: .875rem; }
.missing { padding-left: .9rem; border-left: 3px solid var(--rule); }
.swatch { width: 1.4em; height: .6em; margin-right: .15em; vertical-align: .08em; overflow: visible; }
.swatch line { stroke-width: 2.5; }

.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top;
  min-width: 5.5rem; max-width: 22rem; overflow-wrap: break-word; }
th { font-weight: 500; }
thead th { min-width: 6.75rem; border-bottom: 2px solid var(--ink); vertical-align: bottom; text-wrap: balance; }
thead th:has(small) { min-width: 9rem; }
th:first-child { text-align: left; min-width: 9rem; }
td:first-child, th:first-child { padding-left: 0; }
small { display: block; color: var(--muted); font-size: .8em; font-weight: 400; line-height: 1.4; }
td small { white-space: nowrap; }
.best { background: var(--best); font-weight: 650; }
.bar { display: block; height: 3px; margin-top: .3rem; border-radius: 2px;
  background: linear-gradient(to right, var(--of) calc(var(--share) * 100%), var(--rule) 0); }

.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 2rem 2rem;
  margin: 1rem 0; }
.panels.wide { grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .35rem; font-size: .9rem; font-weight: 500; overflow-wrap: anywhere; }
figure svg:not(.swatch) { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
figure svg * { stroke-linejoin: round; }
img { max-width: 100%; border-radius: .3rem; background: #fff; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .35rem 0 0; color: var(--muted);
  font-size: .8rem; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; max-width: none; font-size: .9rem; }
.legend i { display: inline-block; width: .65em; height: .65em; margin-right: .35em; border-radius: 50%; }
details { margin: 1.5rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  body { padding: 2rem 1rem 4rem; }
  h2 { margin-top: 3.5rem; }
  th, td { padding: .45rem .4rem; }
  thead th { min-width: 5.5rem; }
  th:first-child { min-width: 7.5rem; }
}
footer { margin-top: 6rem; color: var(--muted); font-size: .875rem; }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<nav aria-label="Sections">
{% for section in sections %}
<a href="#{{ section.anchor }}">{{ section.title }}</a>
{% endfor %}
</nav>
</header>
<main>
{% for section in sections %}
<section id="{{ section.anchor }}">
<h2>{{ section.title }}</h2>
{% if section.text %}<p class="lead">{{ section.text }}</p>{% endif %}
{% for part in section.parts %}
{% if part.kind == "missing" %}
<p class="missing">{{ part.text }}{% if part.command %} <code>{{ part.command }}</code>{% endif %}</p>
{% else %}
{% set content = table(part) if part.kind == "table" else figures(part) %}
{% if part.folded %}
<details><summary>{{ part.title }}</summary>
{{ content }}</details>
{% else %}
{% if part.title != section.title %}<h3>{{ part.title }}</h3>{% endif %}
{{ content }}
{% endif %}
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
<footer>Written by eval/report.py of ssl_gradmix {{ version }} from the files of the run folders.</footer>
</body>
</html>
"""
