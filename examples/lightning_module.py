"""SimCLR as a Lightning module, with GradMix's third view.

    python examples/lightning_module.py

On several GPUs nothing changes: the encoder is observed inside `training_step`. Lightning logs the
losses; here they are printed, one line per epoch.
"""

from __future__ import annotations

import pytorch_lightning as pl
import timm
import torch
from digits import Digits
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_gradmix import GradMix


class SimCLR(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("test_resnet", num_classes=0)
        self.head = SimCLRProjectionHead(self.encoder.num_features, 128, 64)
        self.criterion = NTXentLoss(temperature=0.2, gather_distributed=True)
        self.gradmix = GradMix(layers=["layer2"])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x0, x1 = batch
        with self.gradmix.observe(self.encoder) as activations:
            z0, z1 = self(x0), self(x1)
            pair = self.criterion(z0, z1)
        mixed = self.gradmix(x0, pair, activations, donors=x1)
        third = self.criterion(self(mixed.images), z1)
        losses = {"pair": pair, "mixed": third}
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True)
        return pair + mixed.lam * third

    def on_train_epoch_end(self) -> None:
        logged = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        epoch, pair, mixed = self.current_epoch + 1, logged["pair"], logged["mixed"]
        self.print(f"epoch {epoch}: loss of the pair {pair:.3f}, of mixed views {mixed:.3f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 5) -> None:
    pl.seed_everything(0, verbose=False)
    transform = SimCLRTransform(32, cj_strength=0.5, min_scale=0.3, hf_prob=0, gaussian_blur=0)
    loader = DataLoader(Digits(transform), batch_size=128, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(SimCLR(), loader)


if __name__ == "__main__":
    main()
