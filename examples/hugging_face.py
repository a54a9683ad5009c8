"""An encoder of Hugging Face's transformers, with GradMix's third view.

    python examples/hugging_face.py

GradMix needs a module from images to features and the names of its layers. The model here is small
and made from a configuration; `AutoModel.from_pretrained(...)` gives one with weights. Its class
token is read, so the observed layer is the last but one. Prints both losses, one line per epoch.
"""

from __future__ import annotations

import torch
from digits import Digits
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model

from ssl_gradmix import GradMix


class Encoder(nn.Module):
    """Class token of a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).last_hidden_state[:, 0]


def main(epochs: int = 3) -> None:
    torch.manual_seed(0)
    transform = SimCLRTransform(32, cj_strength=0.5, min_scale=0.3, hf_prob=0, gaussian_blur=0)
    loader = DataLoader(Digits(transform), batch_size=128, shuffle=True, drop_last=True)
    config = Dinov2Config(
        image_size=32, patch_size=4, hidden_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    encoder = Encoder(Dinov2Model(config))
    head = SimCLRProjectionHead(config.hidden_size, 128, 64)
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    gradmix = GradMix(layers=["model.encoder.layer.2"])  # the names are in named_modules()

    for epoch in range(epochs):
        losses = []
        for x0, x1 in loader:
            with gradmix.observe(encoder) as activations:
                z0, z1 = head(encoder(x0)), head(encoder(x1))
                pair = criterion(z0, z1)
            mixed = gradmix(x0, pair, activations, donors=x1)
            third = criterion(head(encoder(mixed.images)), z1)

            optimizer.zero_grad()
            (pair + mixed.lam * third).backward()
            optimizer.step()
            losses.append([pair.item(), third.item()])
        mean = torch.tensor(losses).mean(0)
        print(f"epoch {epoch + 1}: loss of the pair {mean[0]:.3f}, of mixed views {mean[1]:.3f}")


if __name__ == "__main__":
    main()
