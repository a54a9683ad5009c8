"""Runs the SimCLR recipe with another loss of the mixed views, on one process.

    python benchmarks/evidence/mixed_loss.py donor recipes/simclr_gradmix.py --data.stamp_bits 9

`donor` counts the donor as a positive by its share, `lam NTX(u, z1) + (1 - lam) NTX(u, z1[donor])`, as i-Mix and
ResizeMix do. `attract` is that of GradMix's authors: mixed views attract, anchors and negatives are the views alone,
`lam mean_i(-z1_i u_i / T + log sum_k exp(z1_i z_k / T))` over the other embeddings z_k of both views.
"""

import runpy
import sys

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ssl_gradmix.methods.losses import Losses, embedding_std
from ssl_gradmix.methods.nt_xent import nt_xent
from ssl_gradmix.methods.simclr import SimCLR


def donor(u: Tensor, z0: Tensor, z1: Tensor, lam: Tensor, index: Tensor, temperature: float) -> Tensor:
    return lam * nt_xent(u, z1, temperature) + (1 - lam) * nt_xent(u, z1[index], temperature)


def attract(u: Tensor, z0: Tensor, z1: Tensor, lam: Tensor, index: Tensor, temperature: float) -> Tensor:
    u, z0, z1 = (normalize(each, dim=1) for each in (u, z0, z1))
    others = z1 @ torch.cat([z1, z0]).T / temperature
    itself = torch.eye(*others.shape, dtype=torch.bool, device=u.device)
    return lam * (others.masked_fill(itself, -torch.inf).logsumexp(1) - (z1 * u).sum(1) / temperature).mean()


def main() -> None:
    _, name, *sys.argv = sys.argv
    chosen = {"donor": donor, "attract": attract}[name]

    def forward(self: SimCLR, views: list[Tensor], labels: Tensor) -> Losses:
        z, loss_views, mixed = self._mix(views)
        third = chosen(self._embed(mixed.images), *z, mixed.lam, mixed.donor_index, self.temperature)
        losses = (loss_views + self.weight * third, loss_views.detach(), third.detach(), mixed.lam.detach())
        return Losses(*losses, embedding_std(z[0]), mixed.flat.float().mean())

    SimCLR.forward = forward
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
