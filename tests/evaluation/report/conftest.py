from __future__ import annotations

from pathlib import Path

import pytest
import support
from reports import make_run


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two runs that were not evaluated."""
    return make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1)


@pytest.fixture
def encoder_run(tmp_path) -> Path:
    return support.make_run(make_run(tmp_path / "encoded"))
