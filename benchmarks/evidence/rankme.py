"""RankMe of a run's training images (`ssl_gradmix.evaluation.rank`), written to its rankme.json.

python benchmarks/evidence/rankme.py runs/x
"""

import json
import sys
from pathlib import Path

from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.rank import rankme
from ssl_gradmix.settings import Data

if __name__ == "__main__":
    run = sys.argv[1]
    encoder = load_encoder(run)
    features, _ = extract(
        encoder, load_known(Data(**encoder.config["data"]), "train"), cache=Path(run, "eval/features")
    )
    rank = rankme(features)
    Path(run, "rankme.json").write_text(json.dumps({"rankme": rank, "images": len(features)}))
    print(f"RankMe {rank:.1f} of {features.shape[1]}, {len(features)} images")
