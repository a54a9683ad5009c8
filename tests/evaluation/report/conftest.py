from __future__ import annotations

from pathlib import Path

import pytest
from reports import make_run


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two runs that were not evaluated."""
    return make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1)
