"""The model card of a finished run, `backbone/README.md`, as model hubs show it.

Training writes it and evaluations of the run fill in what they measured, between two marks. What
its owner changes outside of them, such as the license, is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ssl_gradmix.evaluation import results
from ssl_gradmix.files import read_bytes, read_json, read_yaml, write_whole
from ssl_gradmix.run_folder import RunFolder

MARKS = "<!-- measured -->", "<!-- end of measured -->"

IN_THE_LOG = {
    "knn": "kNN accuracy on held-out training images",
    "reliance": "reliance, 128 training images",
    "rankme": "RankMe",
}

EVALUATED = {
    ("linear", "top1"): "linear probe, top 1",
    ("knn", "top1"): "kNN, top 1",
    ("largest", "reliance"): "reliance",
}
"""Names of numbers by score and metric."""

CARD = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
license: other  # fill in
tags: [self-supervised-learning, {method}, gradmix]
---
# {architecture}, trained by {method} on {name}

```python
import timm  # after `import ssl_gradmix.backbones`, if timm itself lacks {architecture}

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True, num_classes=0)
```

## Training

| | |
|---|---|
| method | {method}, third view: {extra_view}, layers {layers} |
| images | {images} of {name} at {size} px, {selected}, fingerprint {images_fingerprint} |
| length | {epochs} epochs, batch {batch_size}, seed {seed} |
| software | {software} |

```yaml
{settings}```

## Measured

{start}
{end}

Made with ssl_gradmix. GradMix: Xu, Kao, Keuper 2025, arXiv 2505.12803.
"""


def write(run: RunFolder) -> None:
    """Writes the card of a finished run, unless it is there, and fills in what was measured.

    Raises:
        FileNotFoundError: The folder holds no run.
    """
    path = _path(run)
    if not path.exists():
        text = _card(run)
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    update(run)


def update(run: RunFolder) -> None:
    """Replaces what was measured in the card of a run, if it has a card with both marks."""
    path = _path(run)
    if not path.exists():
        return
    start, end = MARKS
    lines = ["| number | images | value |", "|---|---|---|", *_measured(run)]
    section = "\n".join([start, *lines, end])
    text = read_bytes(path).decode()
    text = re.sub(f"(?s){start}.*?{end}", lambda _: section, text)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _path(run: RunFolder) -> Path:
    return run.backbone / "README.md"


def _card(run: RunFolder) -> str:
    config = read_yaml(run.config)
    environment, data, training = config["environment"], config["data"], config["training"]
    mixed = config["extra_view"] in ("adaptive", "gradmix")
    sections = ["method", *(["gradmix"] if mixed else []), "augmentation", "optimizer"]
    settings = {name: config[name] for name in sections}
    start, end = MARKS
    software = ("ssl_gradmix", "commit", "torch", "timm", "python", "device")
    return CARD.format(
        method=config["recipe"],
        architecture=read_json(run.backbone / "config.json")["architecture"],
        name=data["name"],
        size=data["size"],
        selected=data["open_set"] or data["classes"] or "all classes",
        extra_view=config["extra_view"],
        layers=", ".join(environment.get("layers") or ["no layer"]),
        software=", ".join(f"{name} {environment.get(name)}" for name in software),
        settings=yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=90),
        **{name: environment[name] for name in ("images", "images_fingerprint")},
        **{name: training[name] for name in ("epochs", "batch_size", "seed")},
        start=start,
        end=end,
    )


def _measured(run: RunFolder) -> Iterator[str]:
    """Lines of a table: the last values in the log, then the results of evaluations."""
    log = pd.DataFrame(run.read_log())
    for name, title in IN_THE_LOG.items():
        if name in log and log[name].notna().any():
            yield f"| {title} | in training | {log[name].dropna().iloc[-1]:.3g} |"
    for task in ("linear_probe", "reliance"):
        for path in sorted((run.path / "eval").glob(f"{task}-*.json")):
            rows = results.read(path)[0]
            of_labels = results.param(rows, "label_fraction").notna()
            rows = rows[(rows["feature"] == "backbone") & ~of_labels]
            for (score, metric), title in EVALUATED.items():
                found = rows[(rows["score"] == score) & (rows["metric"] == metric)]
                if not found.empty:
                    yield _line(title, found.iloc[0])


def _line(title: str, row: Any) -> str:
    layer = f" at {row['params']['at']}" if "at" in row["params"] else ""
    images = f"{row['n']:,} of {row['dataset']}/{row['split']}"
    interval = f"{100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f}"
    return f"| {title}{layer} | {images} | {100 * row['value']:.1f}% ({interval}) |"
