"""What a training says of an epoch."""

from __future__ import annotations

import pytest

from ssl_gradmix.training import log

LOSSES = {"loss": 1.5, "loss_views": 1.25, "loss_mixed": 0.0, "lam": 0.0, "embedding_std": 0.9, "flat": 0.0}
ENTRY = {"epoch": 7, "step": 77, **LOSSES, "lr": 0.1}


def test_a_line_shows_what_there_is() -> None:
    assert log.line(ENTRY, 100) == "epoch   7/100  loss 1.5000  views 1.2500  embedding_std 0.90  lr 0.1000"
    more = {
        **ENTRY,
        "loss_mixed": 2.0,
        "flat": 0.25,
        "seconds_left": 3.4,
        "images_per_second": 1234.5,
        "knn": 0.5,
        "rankme": 9,
    }
    assert log.line(more, 7) == (
        "epoch 7/7  loss 1.5000  views 1.2500  mixed 2.0000  embedding_std 0.90  flat 25%  lr 0.1000  1,234 images/s  "
        "00:00:03 left  rank 9.0  kNN 50.0%"
    )
    assert (
        log.line({"epoch": 7, "loss": "x", "embedding_std": None}, 7) == "epoch 7/7"
    )  # of a log that somebody changed


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(59.6, "00:01:00"), (86399, "23:59:59"), (108000, "30:00:00"), (3600 * 250 + 61, "250:01:01")],
)
def test_hours_are_counted_on_beyond_a_day(seconds: float, shown: str) -> None:
    assert log.clock(seconds) == shown


@pytest.mark.parametrize(
    ("entry", "warned"),
    [
        ({"embedding_std": 0.3}, ""),
        ({"embedding_std": 0.09}, "the encoder collapses"),
        ({"embedding_std": 0.8, "rankme": 1.26}, "the encoder collapses"),  # features on a line
        ({"embedding_std": 0.3, "rankme": 4.2}, ""),
        ({"embedding_std": 0.3, "flat": 0.5}, ""),
        ({"embedding_std": 0.3, "flat": 0.51}, "51% of the attribution maps are flat"),
    ],
)
def test_a_collapse_and_flat_maps_are_warned_of(entry: dict[str, float], warned: str) -> None:
    lines = log.warnings({"flat": 0.0, **entry})
    assert len(lines) == bool(warned)
    assert all(line.startswith(f"warning: {warned}") for line in lines)
