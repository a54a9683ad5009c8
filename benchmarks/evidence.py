"""Does GradMix help? A grid of cells (method, variant, data, seed), each a training run and its evaluations.

    python benchmarks/evidence.py --data cifar10 --jobs 2                   runs it; stopped, it goes on where it was
    python benchmarks/evidence.py --data cifar10 --print                    its commands, such as anyone can repeat
    python benchmarks/evidence.py --report                                  tables and figures: results/evidence.md

On a GPU: --grid gpu --images 50000 --epochs 100 --backbone resnet18_small --batch 512 -- --training.precision bf16
What stands behind -- goes to the recipes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from evidence import command, page, rows
from evidence.cells import DATA, METHODS, VARIANTS, Cell

RESULTS = Path(__file__).parent / "results" / "evidence.jsonl"
USUAL = ("plain", "third-view", "random-box", "gradmix", "gradmix-loss")


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, RESULTS, ".cache/evidence", images=10_000, epochs=20, corrupted=2000)
    parser.epilog = f"variants: {', '.join(VARIANTS)}"
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=["simclr"])
    add("--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", default=USUAL, help=f"(default: {USUAL})")
    add("--kinds", nargs="+", choices=DATA, default=DATA, help="of data (default: all of them)")
    options = parser.parse_args(argv)
    if options.report:
        return print(*page.write(rows.read(options.results), options.results.with_suffix(".md")), sep="\n")
    # All variants of a seed before the next seed, so that what there is can be compared.
    chosen = itertools.product(options.methods, options.seeds, options.kinds, options.variants)
    command.run(options, [Cell(method, variant, kind, seed) for method, seed, kind, variant in chosen])


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"evidence.py: {error}")
