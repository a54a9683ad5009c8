"""What a training says of an epoch."""

from __future__ import annotations

import pytest

from ssl_gradmix.training import log

ENTRY = {"epoch": 7, "step": 77, "loss": 1.5, "pair": 1.25, "extra": 0.0, "lam": 0.0, "spread": 0.9, "lr": 0.1}


def test_a_line_shows_what_there_is() -> None:
    assert log.line(ENTRY, 100) == "epoch   7/100  loss 1.5000  pair 1.2500  spread 0.90  lr 0.1000"
    more = {
        **ENTRY,
        "extra": 2.0,
        "flat": 0.25,
        "seconds_left": 3.4,
        "images_per_second": 1234.5,
        "knn": 0.5,
        "rankme": 9,
    }
    assert log.line(more, 7) == (
        "epoch 7/7  loss 1.5000  pair 1.2500  extra 2.0000  spread 0.90  flat 25%  lr 0.1000  1,234 images/s  "
        "00:00:03 left  rank 9.0  kNN 50.0%"
    )
    assert log.line({"epoch": 7, "loss": "x", "spread": None}, 7) == "epoch 7/7"  # of a log that somebody changed


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(59.6, "00:01:00"), (86399, "23:59:59"), (108000, "30:00:00"), (3600 * 250 + 61, "250:01:01")],
)
def test_hours_are_counted_on_beyond_a_day(seconds: float, shown: str) -> None:
    assert log.clock(seconds) == shown


@pytest.mark.parametrize(
    ("entry", "warned"),
    [
        ({"spread": 0.3}, ""),
        ({"spread": 0.09}, "the encoder collapses"),
        ({"spread": 0.8, "rankme": 1.26}, "the encoder collapses"),  # features on a line
        ({"spread": 0.3, "rankme": 4.2}, ""),
        ({"spread": 0.3, "flat": 0.5}, ""),
        ({"spread": 0.3, "flat": 0.51}, "51% of the attribution maps are flat"),
    ],
)
def test_a_collapse_and_flat_maps_are_warned_of(entry: dict[str, float], warned: str) -> None:
    lines = log.warnings(entry)
    assert len(lines) == bool(warned)
    assert all(line.startswith(f"warning: {warned}") for line in lines)
