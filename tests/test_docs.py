"""Examples in docstrings and in the documentation run as they are printed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import ROOT, tiny_encoder
from torch import nn

from ssl_gradmix import GradMix
from ssl_gradmix.adaptive import Adaptive
from ssl_gradmix.evaluation.intervals import bootstrap_interval
from ssl_gradmix.evaluation.metrics import auroc

FORMULAS = {"SupCon"}  # whose indented lines happen to be Python
ELSEWHERE = {"your-own-encoder.md"}  # pushes to a hub


def in_docstrings() -> Iterator[tuple[str, str]]:
    """Names and indented blocks of Python in the docstrings of the package."""
    for path in (ROOT / "ssl_gradmix").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            name = getattr(node, "name", path.stem)
            for block in re.findall(r"\n\n((?: {4}.*\n?)+)", ast.get_docstring(node) or ""):
                if is_python(code := re.sub("^ {4}", "", block, flags=re.M)):
                    yield name, code


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def in_pages() -> Iterator[tuple[str, str]]:
    for path in (ROOT / "docs").glob("*.md"):
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
            yield path.name, block


EXAMPLES = {name: code for name, code in in_docstrings() if name not in FORMULAS}
PAGES = [each for each in in_pages() if each[0] not in ELSEWHERE]


@pytest.fixture
def names() -> dict[str, object]:
    """What examples take as given; the one of `GradMix` comes before the others."""
    torch.manual_seed(0)
    x0, x1, x2 = torch.rand(3, 4, 3, 64, 64)
    colors = torch.rand(32, 3, 1, 1)
    view0, view1 = colors + 0.1 * torch.rand(2, 32, 3, 64, 64)
    given = {
        **{"GradMix": GradMix, "Adaptive": Adaptive, "encoder": tiny_encoder()},
        **{"torch": torch, "head": nn.Identity(), "criterion": nn.functional.mse_loss},
        **{"x0": x0, "x1": x1, "x2": x2, "plain": x2},
        **{"view0": view0, "view1": view1},
        **{"bootstrap_interval": bootstrap_interval, "auroc": auroc},
        **{"scores": np.array([0.1, 0.4, 0.3, 0.8]), "is_known": np.array([False, True] * 2)},
    }
    exec(EXAMPLES["GradMix"], given)
    return given


def test_examples_are_found() -> None:
    assert {"GradMix", "Adaptive", "bootstrap_interval"} <= set(EXAMPLES)
    assert {"how-it-works.md", "torch-compile.md"} <= {name for name, _ in PAGES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_of_a_docstring_runs(name: str, names: dict[str, object]) -> None:
    exec(EXAMPLES[name], names)


@pytest.mark.parametrize(("page", "block"), PAGES)
def test_example_of_a_page_runs(page: str, block: str, names: dict[str, object]) -> None:
    if page != "torch-compile.md":
        exec(block, names)
        return
    compiler, graphs = torch._dynamo.config, torch._functorch.config
    if not hasattr(compiler, "recompile_limit"):
        pytest.skip("torch 2.6 calls it cache_size_limit")
    with compiler.patch(recompile_limit=8), graphs.patch(donated_buffer=True):  # restored after it
        exec(block, names)
