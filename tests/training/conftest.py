"""Accelerate keeps its state for the whole process; a test leaves none to the next."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
