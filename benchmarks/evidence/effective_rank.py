"""How many directions frozen features of the training images fill: RankMe.

Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their
Rank", 2023 (arXiv 2210.02885): the exponential of the entropy of the singular values, divided by their sum.

    python benchmarks/evidence/effective_rank.py runs/x
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssl_gradmix.evaluation import cli

if TYPE_CHECKING:
    from torch import Tensor

    from ssl_gradmix.evaluation.setup import Evaluation


@dataclass
class Options:
    """Nothing to choose."""


def effective_rank(features: Tensor) -> float:
    """The effective rank of features (N, D), between 1 and min(N, D); they are not centred, as in RankMe.

    Raises:
        ValueError: All features are zero.
    """
    import torch

    values = torch.linalg.svdvals(features.double())
    if not values.sum() > 0:
        raise ValueError("the effective rank needs a feature that is not zero")
    return torch.special.entr(values / values.sum()).sum().exp().item()


def evaluate(evaluation: Evaluation, options: Options) -> None:
    """Measures, and on the main process writes `effective_rank.json` and prints the number."""
    from ssl_gradmix.evaluation.results import write_rows

    train = evaluation.load("train")
    features, _ = evaluation.features(train)
    if not evaluation.accelerator.is_main_process:
        return
    rank = effective_rank(features)
    row = evaluation.row("effective_rank", train, "rankme", "effective_rank", (rank, None, None), len(features))
    write_rows(evaluation.out / "effective_rank.json", [row], evaluation.describe())
    print(f"effective rank {rank:.1f} of {features.shape[1]}, {len(features)} images of {train.name}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
