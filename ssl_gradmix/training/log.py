"""What a training says: a line an epoch, warnings of what goes wrong in silence, and what trackers get."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ssl_gradmix.evaluation.reliance import RELIES
from ssl_gradmix.run_folder import RunFolder, flat

COLLAPSED_STD = 0.1
COLLAPSED_RANK = 2.0
"""Below either an encoder counts as collapsed. Healthy ones keep an embedding_std of 0.7 to 1, and effective ranks
above 10; untrained ones have ranks above 4."""

FLAT = 0.5
"""Above this share of flat maps, most boxes lie at random."""

READINGS = {
    "loss": "loss {:.4f}",
    "loss_views": "views {:.4f}",
    "loss_mixed": "mixed {:.4f}",
    "loss_supervised": "supervised {:.4f}",
    "embedding_std": "embedding_std {:.2f}",
    "flat": "flat {:.0%}",
    "lr": "lr {:.4f}",
    "images_per_second": "{:,.0f} images/s",
    "seconds_left": "{} left",
    "rankme": "rank {:.1f}",
    "knn": "kNN {:.1%}",
    "reliance": "reliance {:.0%}",
}
"""An epoch's readings in the log, and how they are shown; the rest is for log.jsonl alone."""


def say(line: str) -> None:
    """Prints a line above the progress bar. A terminal that was closed, or a full disk behind it, stops no training."""
    with suppress(OSError):
        tqdm.write(line)


def line(entry: dict[str, Any], epochs: int) -> str:
    """An epoch's entry of the log for the console; what it lacks, and third views or flat maps that are 0, left out."""
    parts = [f"epoch {entry['epoch']:>{len(str(epochs))}}/{epochs}"]
    for name, form in READINGS.items():
        value = entry.get(name)
        if isinstance(value, int | float) and (value or name not in ("loss_mixed", "flat")):
            parts.append(form.format(clock(value) if name == "seconds_left" else value))
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Hours, however many, minutes and seconds: `30:00:00`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"


def warnings(entry: dict[str, Any]) -> list[str]:
    """Lines on an epoch in which the encoder collapsed or came to live off a small part, or most maps were flat."""
    found = []
    std, rank = entry["embedding_std"], entry.get("rankme")
    if std < COLLAPSED_STD or (rank is not None and rank < COLLAPSED_RANK):
        ranked = "" if rank is None else f", effective rank {rank:.2f}"
        found.append(
            f"warning: the encoder collapses, it hardly tells images apart (embedding_std {std:.3f}{ranked}); a "
            "lower --optimizer.lr or --optimizer.weight_decay may help, for BYOL another --method.momentum"
        )
    if entry.get("reliance", 0) >= RELIES:
        found.append(
            f"warning: the encoder loses {min(entry['reliance'], 1):.0%} of its agreement with a tenth of the "
            "image: it may live off a stamp, a logo or the like; eval/reliance.py shows where, and "
            "--extra_view gradmix may help"
        )
    if entry["flat"] > FLAT:
        found.append(
            f"warning: {entry['flat']:.0%} of the attribution maps are flat, so that boxes lie at random; "
            "another layer in --gradmix.layers, or --training.precision no, may help"
        )
    return found


def start_trackers(accelerator: Accelerator, folder: RunFolder) -> None:
    """Opens the trackers of a training, with its name and settings; what they write lies in the run folder."""
    folder.trackers.mkdir(parents=True, exist_ok=True)
    # TensorBoard takes neither lists nor null.
    settings = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in flat(folder.settings).items()}
    wandb = {"name": folder.path.resolve().name, "dir": str(folder.trackers)}
    accelerator.init_trackers("ssl_gradmix", settings, {"wandb": wandb})


def show(accelerator: Accelerator, picture: Path, epoch: int) -> None:
    """Hands a picture of mixed views to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            with Image.open(picture) as opened:
                pixels = np.asarray(opened.convert("RGB"))[None]
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"mixed views": pixels}, step=epoch, **layout)
