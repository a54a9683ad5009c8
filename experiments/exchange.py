"""What a run's encoder and projector know an image by, where all views bear stamps; written to the run's exchange.json.

Two views of each training image are embedded, and the second one's cosine similarity to the first is read with the
image's own stamp, with the bits or the place of another image's, and with its own stamp on another image. Beside those
stand linear probes of the class, and of the first bit, on whole images that bear their stamps.

    python benchmarks/evidence/exchange.py runs/x
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ssl_gradmix.data import planted
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation.encoders import Encoder, load_encoder
from ssl_gradmix.evaluation.probes import linear_probe
from ssl_gradmix.settings import Augmentation, Data

WHOLE = Augmentation(min_scale=1, flip=0, jitter=0, gray=0, blur=0, solarize=0)
IMAGES = 1024


@torch.inference_mode()
def features(encoder: Encoder, data: Data, split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Of whole images that bear their stamps, (N, D), and what probes read there, (N,) each."""
    images = load_known(data, split)
    views = Views(WHOLE, encoder.size, encoder.mean, encoder.std, stamps=images.stamps)
    pixels = images.originals(2**34)
    found = torch.cat([encoder.model(views(part, 1)[0]) for part in pixels.split(256)])
    labels = {"stamped_linear": torch.as_tensor(images.labels), "first_bit": planted.name(pixels)[:, 0] & 1}
    return found.clone(), {name: each.clone() for name, each in labels.items()}


def read_out(encoder: Encoder, data: Data) -> dict[str, float]:
    """Test accuracies of linear probes."""
    (train, labels), (test, right) = (features(encoder, data, split) for split in ("train", "test"))
    accurate = {name: linear_probe(train, labels[name]).accuracy(test, right[name]).top1 for name in labels}
    return {name: each.double().mean().item() for name, each in accurate.items()}


@torch.inference_mode()
def similarities(encoder: Encoder, data: Data, augmentation: Augmentation) -> dict[str, float]:
    """Mean cosine similarity to first views of second ones in which something was exchanged."""
    images, generator = load_known(data, "train"), torch.Generator().manual_seed(0)
    pixels = images.originals(2**34)
    pixels = pixels[torch.randperm(len(pixels), generator=generator)[:IMAGES]]
    views, other = (
        Views(augmentation, encoder.size, encoder.mean, encoder.std),
        torch.roll(torch.arange(len(pixels)), 1),
    )
    torch.manual_seed(0)
    first, second = views(pixels, 2)
    names, colors = planted.name(pixels), [(value - views.mean) / views.std for value in (0, 1)]

    def embed(view: Tensor, code: Tensor, place: Tensor) -> Tensor:
        stamped = images.stamps.plant(view, torch.cat([code, place], 1), *colors)
        return torch.cat([encoder.model(part) for part in stamped.split(256)])

    code, place = names[:, :1], names[:, 1:]
    anchor = embed(first, code, place)
    exchanged = {
        "same_stamp": (second, code, place),
        "other_bits": (second, code[other], place),
        "other_place": (second, code, place[other]),
        "other_image": (second[other], code, place),
    }
    return {name: cosine_similarity(anchor, embed(*given)).mean().item() for name, given in exchanged.items()}


def main(run: str) -> None:
    encoder = load_encoder(run)
    data, augmentation = Data(**encoder.config["data"]), Augmentation(**encoder.config["augmentation"])
    found = read_out(encoder, data)
    found |= similarities(load_encoder(run, feature="projector"), data, augmentation)
    Path(run, "exchange.json").write_text(json.dumps(found))
    print(", ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main(sys.argv[1])
