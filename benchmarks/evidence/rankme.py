"""How many directions frozen features of the training images fill: RankMe, see `ssl_gradmix.evaluation.rank`.

python benchmarks/evidence/rankme.py runs/x
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssl_gradmix.evaluation import cli

if TYPE_CHECKING:
    from ssl_gradmix.evaluation.setup import Evaluation


@dataclass
class Options:
    """Nothing to choose."""


def evaluate(evaluation: Evaluation, options: Options) -> None:
    """Measures, and on the main process writes `rankme.json` and prints the number."""
    from ssl_gradmix.evaluation.rank import rankme
    from ssl_gradmix.evaluation.results import write_rows

    train = evaluation.load("train")
    features, _ = evaluation.features(train)
    if not evaluation.accelerator.is_main_process:
        return
    rank = rankme(features)
    row = evaluation.row("rankme", train, "rankme", "rankme", (rank, None, None), len(features))
    write_rows(evaluation.out / "rankme.json", [row], evaluation.describe())
    print(f"effective rank {rank:.1f} of {features.shape[1]}, {len(features)} images of {train.name}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
