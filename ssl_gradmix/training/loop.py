"""The training loop, on Accelerate. All that is random is a function of seed, epoch, step and process."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save as to_bytes
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from tqdm.auto import tqdm

from ssl_gradmix import backbones
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.files import write_whole
from ssl_gradmix.methods.losses import Losses
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.settings import Augmentation, Optimizer, Training
from ssl_gradmix.training import batches, checkpoint, optimizers, samples, signals
from ssl_gradmix.training.monitor import Monitor
from ssl_gradmix.training.nonfinite import Undo, all_finite

logger = logging.getLogger("ssl_gradmix")

READ_EVERY = 50
"""At most so many steps lie between two readings of the losses from the device, which the host has to wait for."""

READ_SECONDS = 5.0
"""About so long is between two readings where steps are slow: several processes agree on a signal only then."""

COLLAPSED_STD = 0.1
COLLAPSED_RANK = 2.0
"""Below either an encoder counts as collapsed. Healthy ones keep an embedding_std of 0.7 to 1, and effective ranks
above 10; untrained ones have ranks above 4."""

SAMPLED = 8
"""Images in a picture of mixed views."""


@torch.no_grad()
def check_images(method: nn.Module, size: int, device: torch.device) -> None:
    """Runs a method once on noise, so that what does not fit is said before anything is written.

    Raises:
        ValueError: The backbone does not take such images.
        KeyError: GradMix's layers are not the backbone's.
    """
    method.to(device).eval()
    try:
        views = [torch.randn(4, 3, size, size, device=device) for _ in range(2)]
        with torch.enable_grad():
            method(views)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"data.size, backbone.name: the method does not run on images of {size}x{size} ({error}); "
            f"a vision transformer is made for them by --backbone.kwargs '{{img_size: {size}}}'"
        ) from error
    finally:
        method.train()


class Trainer:
    """Trains a method on images and leaves a run folder; goes on where an earlier training in that folder was stopped.

    Args:
        method: Module with `forward(views) -> Losses`, a timm `backbone`, a `projector`, a `gradmix` (or None) and,
            where it has a teacher, `update_target(step, steps)`.
        images: To train on; their labels serve the kNN reading alone.
        folder: Where everything is written, already started.
        accelerator: From `processes.create_accelerator`.
        size: Side of the views in pixels.
        augmentation: How views are made.
        optimizer: How weights are updated.
        training: How long, and what is noted on the way.
        n_views: Views a batch, 3 for a plain third one.

    Raises:
        ValueError: Fewer images than a batch.
    """

    def __init__(
        self,
        method: nn.Module,
        images: ImageSet,
        folder: RunFolder,
        accelerator: Accelerator,
        size: int,
        augmentation: Augmentation,
        optimizer: Optimizer,
        training: Training,
        n_views: int = 2,
    ) -> None:
        self.folder, self.accelerator, self.training = folder, accelerator, training
        self.size = size
        config = method.backbone.pretrained_cfg
        self.mean, self.std = config["mean"], config["std"]
        if len(images) < training.batch_size:
            raise ValueError(
                f"training.batch_size {training.batch_size} exceeds the {len(images)} images of {images.name}"
            )
        indices = batches.BatchIndices(
            len(images),
            training.batch_size,
            training.seed,
            training.accumulate,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.steps_per_epoch = len(indices) // training.accumulate
        self.steps = self.steps_per_epoch * training.epochs
        self.warmup = optimizer.warmup_epochs * self.steps_per_epoch
        self.peak = optimizers.peak_rate(optimizer, training.batch_size)
        self.clip = optimizer.clip
        self.source = batches.create(
            images, augmentation, indices, size, self.mean, self.std, n_views, training.workers, accelerator.device
        )
        self.monitor = None
        labeled = images.subset(images.labels >= 0)
        watched = labeled if len(labeled) >= 10 else images
        if accelerator.is_main_process and training.knn_every and len(watched) >= 10:
            self.monitor = Monitor(watched, size, self.mean, self.std)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            method = convert_sync_batchnorm(method)  # timm's: torch's drops what timm's norms hold, activations
        method.to(memory_format=torch.channels_last)
        self.method, self.optimizer = accelerator.prepare(method, optimizers.create(method, optimizer))
        self.bare = accelerator.unwrap_model(self.method)
        self.undo = Undo(self.bare, self.optimizer) if training.nonfinite == "skip" else None
        self.bad = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        self.epoch, self.batch, self.totals = 0, 0, {}
        self.read_every = 1
        self.saved: Path | None = None

    def run(self) -> None:
        """Trains from the last checkpoint, or from the start, to the end.

        Raises:
            FloatingPointError: A loss or a weight that is not finite; names the step and the last good checkpoint.
            OSError: The run folder cannot be written to, a full disk for instance; names the last good checkpoint.
            SystemExit: SIGTERM or SIGINT came and the state is saved; the status is 143 or 130.
        """
        try:
            self._run()
        except (ValueError, OSError) as error:
            # What ends one process alone, such as a broken image in its share, is not known to the one that speaks.
            if not self.accelerator.is_main_process:
                logger.error("process %d: %s", self.accelerator.process_index, error)
            raise

    def _run(self) -> None:
        self._resume()
        if self.epoch == self.training.epochs:
            if self.accelerator.is_main_process:
                lines = [f": {_line(entry, self.epoch)}" for entry in self.folder.read_log()]
                self._say(f"{self.folder.path} is finished{lines[-1] if lines else ''}; --overwrite true starts anew")
            return
        if self.training.trackers:
            self.accelerator.init_trackers("trackers")
        if self.epoch or self.batch:
            self._say(
                f"{self.folder.path} goes on after epoch {self.epoch}"
                + (f" and {self.batch} batches" if self.batch else "")
            )
        else:
            self._say(
                f"{self.steps_per_epoch * self.training.batch_size:,} images an epoch "
                f"in batches of {self.training.batch_size}, "
                f"learning rate {self.peak:.4g} (scaled by batch / {optimizers.REFERENCE_BATCH}), {self.steps:,} steps"
            )
        began, first = time.perf_counter(), self.epoch
        with signals.collected() as received:
            while self.epoch < self.training.epochs:
                entry = self._one_epoch(received)
                done = self.epoch - first
                entry["seconds_left"] = round(
                    (time.perf_counter() - began) / done * (self.training.epochs - self.epoch), 1
                )
                self._report(entry)
                if self.epoch % self.training.checkpoint_every == 0 or self.epoch == self.training.epochs:
                    self._save()
                if self.epoch < self.training.epochs:
                    self._stop_if_asked(received)
        if self.training.trackers:
            self.accelerator.end_training()

    def _one_epoch(self, received: list[int]) -> dict[str, Any]:
        self.method.train()
        began, seen, unread = time.perf_counter(), 0, []
        last_read = began
        bar = tqdm(
            total=len(self.source.indices),
            initial=self.batch,
            desc=f"epoch {self.epoch + 1}/{self.training.epochs}",
            disable=None if self.accelerator.is_main_process else True,
            leave=False,
        )
        for batch in self.source.epoch(self.epoch, self.batch):
            losses, skipped = self._step(batch)
            unread.append(torch.stack([losses.total.detach(), *losses[1:], skipped]))
            self.batch += 1
            seen += self.source.indices.micro
            bar.update()
            if self.accelerator.sync_gradients and (len(unread) >= self.read_every or self._alone_and_asked(received)):
                self._read(unread, time.perf_counter() - last_read)
                self._stop_if_asked(received)
                last_read = time.perf_counter()
        self._read(unread, time.perf_counter() - last_read)
        bar.close()
        seconds = time.perf_counter() - began
        entry = self._means()
        self.epoch, self.batch, self.totals = self.epoch + 1, 0, {}
        step = self.epoch * self.steps_per_epoch
        return {
            "epoch": self.epoch,
            "step": step,
            **entry,
            "lr": optimizers.rate(step - 1, self.steps, self.warmup, self.peak),
            "images_per_second": round(seen / seconds, 1),
        }

    def _step(self, batch: Any) -> tuple[Losses, Tensor]:
        """Losses of a (micro-)batch, and 1 where its optimizer step was skipped, 0 otherwise."""
        batches.seed_step(self.training.seed, self.epoch, self.batch, self.accelerator.process_index)
        step = self.epoch * self.steps_per_epoch + self.batch // self.training.accumulate
        rate = optimizers.rate(step, self.steps, self.warmup, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.undo is not None and self.batch % self.training.accumulate == 0:
            self.undo.remember()
        views = [view.contiguous(memory_format=torch.channels_last) for view in self.source.views(batch)]
        with self.accelerator.accumulate(self.method):
            losses = self.method(views)
            self.accelerator.backward(losses.total)
            if self.clip is not None and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.method.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients and hasattr(self.bare, "update_target"):
            self.bare.update_target(step, self.steps)
        return losses, self._skip_if_bad(losses)

    def _skip_if_bad(self, losses: Losses) -> Tensor:
        """Takes an optimizer step back, on all processes, if one of its losses or a weight after it is not finite."""
        skipped = torch.zeros_like(losses.loss_views)
        if self.undo is None:
            return skipped
        self.bad = self.bad | ~losses.total.detach().isfinite()
        if self.accelerator.sync_gradients:
            bad = self.bad | ~all_finite(self.bare.state_dict().values())
            skipped = (self.accelerator.reduce(bad.float(), "sum") > 0).to(skipped.dtype)
            self.undo.take_back(skipped > 0)
            self.bad = torch.zeros_like(self.bad)
        return skipped

    def _read(self, unread: list[Tensor], seconds: float) -> None:
        """Adds the losses of some steps, mean over processes, to the epoch's totals.

        Every checkpoint comes right after it, so that what is not finite is never saved.

        Args:
            unread: A row a (micro-)batch: its losses, and whether its optimizer step was skipped.
            seconds: Since the last reading.
        """
        if not unread:
            return
        values = self.accelerator.reduce(torch.stack(unread), "mean").cpu()
        finite = values.isfinite().all(1)
        if self.undo is None and not finite.all():
            at = self.batch - len(unread) + int((~finite).nonzero()[0])
            self._diverged(f"loss is {values[~finite][0, 0]:g} in epoch {self.epoch + 1}, batch {at + 1}")
        # Mean over processes in float32: the same on all of them, who have to agree on when they read.
        sound = all_finite(self.bare.state_dict().values()).float()
        sound, waited = self.accelerator.reduce(torch.stack([sound, sound.new_tensor(seconds)]), "mean").tolist()
        if sound < 1:
            self._diverged(f"weights are not finite after epoch {self.epoch + 1}, batch {self.batch}")
        self.read_every = max(1, min(READ_EVERY, int(READ_SECONDS * len(unread) / max(waited, 1e-6))))
        sums = {
            **dict(zip(("loss", *Losses._fields[1:]), values[finite, :-1].double().sum(0).tolist(), strict=True)),
            "read": int(finite.sum()),
            "skipped": round(float(values[:, -1].sum())),
        }
        self.totals = {name: self.totals.get(name, 0) + total for name, total in sums.items()}
        unread.clear()

    def _means(self) -> dict[str, float]:
        """The epoch's mean losses; of the batches that had finite ones, where others were skipped."""
        totals = dict(self.totals)
        read, skipped = totals.pop("read"), totals.pop("skipped")
        if skipped == self.steps_per_epoch:
            self._diverged(
                f"all {skipped} steps of epoch {self.epoch + 1} were skipped, with losses or weights not finite"
            )
        means = {name: round(total / read, 5) for name, total in totals.items()}
        return means if self.undo is None else {**means, "skipped": skipped}

    def _diverged(self, what: str) -> None:
        raise FloatingPointError(
            f"{what}; {self._last_good()}. A lower --optimizer.lr or a longer --optimizer.warmup_epochs may help"
        )

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"

    def _alone_and_asked(self, received: list[int]) -> bool:
        return bool(received) and self.accelerator.num_processes == 1

    def _stop_if_asked(self, received: list[int]) -> None:
        """Saves and stops where any process got a signal; all agree, or some would wait for the others for ever."""
        asked = torch.tensor(max(received, default=0), device=self.accelerator.device)
        number = int(self.accelerator.gather(asked).max())
        if number:
            self._save()
            self._say(f"stopped by {Signals(number).name} and saved; the same command goes on from here")
            raise SystemExit(128 + number)

    def _report(self, entry: dict[str, Any]) -> None:
        due = self.epoch == self.training.epochs
        if self.monitor and (due or self.epoch % self.training.knn_every == 0):
            readings = self.monitor(self.bare.backbone, self.accelerator.device)
            entry.update({name: round(value, 4) for name, value in readings.items()})
        if (
            self.bare.gradmix is not None
            and self.training.samples_every
            and (due or self.epoch % self.training.samples_every == 0)
        ):
            self._draw_samples()
        if self.training.trackers:
            self.accelerator.log({name: value for name, value in entry.items() if name != "epoch"}, step=self.epoch)
        if self.accelerator.is_main_process:
            with self._writing():
                self.folder.append_log(entry)
        self._say(_line(entry, self.training.epochs))
        self._warn_of_collapse(entry)

    def _warn_of_collapse(self, entry: dict[str, Any]) -> None:
        rank = entry.get("rankme")
        if entry["embedding_std"] < COLLAPSED_STD or (rank is not None and rank < COLLAPSED_RANK):
            self._say(
                "warning: the encoder collapses, it hardly tells images apart "
                f"(embedding_std {entry['embedding_std']:.3f}"
                + ("" if rank is None else f", effective rank {rank:.2f}")
                + "); a lower --optimizer.lr or --optimizer.weight_decay may help, for BYOL another --method.momentum"
            )

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def _draw_samples(self) -> None:
        """Mixes a few images with a copy of the method, on all processes because the loss gathers, and draws them."""
        batches.seed_step(self.training.seed, 0, 0, self.accelerator.process_index)
        method = copy.deepcopy(self.bare)
        views = [view[:SAMPLED].clone() for view in self.source.views(next(iter(self.source.epoch(0, 0))))[:2]]
        mixed = method.mixed_views(views)
        if self.accelerator.is_main_process:
            with self._writing():
                samples.draw(views[0], mixed, self.mean, self.std, self.folder.samples / f"epoch-{self.epoch:05d}.png")

    def _save(self) -> None:
        path = checkpoint.path_of(self.folder.checkpoint, self.epoch, self.batch)
        if path == self.saved:
            return
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = checkpoint.State(
                self.epoch,
                self.batch,
                self.totals,
                self.bare.state_dict(),
                self.optimizer.state_dict(),
                scaler.state_dict() if scaler is not None else None,
            )
            # The checkpoint comes last: a run whose last one is there is finished, and all else has to be there too.
            with self._writing():
                backbones.save(self.bare.backbone, self.folder.backbone, self.size)
                _save_projector(self.bare.projector, self.folder)
                for written in (*self.folder.backbone.iterdir(), self.folder.projector, self.folder.path):
                    checkpoint.flush(written)
                checkpoint.save(self.folder.checkpoint, state)
        self.saved = path

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"run: {self.folder.path} cannot be written to ({error.strerror or error}); "
                f"{self._last_good()}; with room to write, the same command goes on from there"
            ) from error

    def _resume(self) -> None:
        # One process reads for all: on several machines they need not share the folder, and never start from different
        # checkpoints.
        main = self.accelerator.is_main_process
        state = checkpoint.load(self.folder.checkpoint, self.bare.state_dict()) if main else None
        (state,) = broadcast_object_list([state])
        if state is not None:
            self.bare.load_state_dict(state.method)
            self.optimizer.load_state_dict(state.optimizer)
            if state.scaler is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state.scaler)
            self.epoch, self.batch, self.totals = state.epoch, state.batch, state.totals
            self.saved = checkpoint.path_of(self.folder.checkpoint, self.epoch, self.batch)
        if main:
            with self._writing():
                self.folder.rewind_log(self.epoch)


def _save_projector(projector: nn.Module, run: RunFolder) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in projector.state_dict().items()}
    write_whole(run.projector, lambda temporary: temporary.write_bytes(to_bytes(weights)))


def _line(entry: dict[str, Any], epochs: int) -> str:
    parts: Sequence[str] = [
        f"epoch {entry['epoch']:>{len(str(epochs))}}/{epochs}",
        f"loss {entry['loss']:.4f}",
        f"views {entry['loss_views']:.4f}",
        *([f"mixed {entry['loss_mixed']:.4f}"] if entry["loss_mixed"] else []),
        f"embedding_std {entry['embedding_std']:.2f}",
        f"lr {entry['lr']:.4f}",
        f"{entry['images_per_second']:,.0f} images/s",
        f"{time.strftime('%H:%M:%S', time.gmtime(entry['seconds_left']))} left",
        *([f"skipped {entry['skipped']}"] if entry.get("skipped") else []),
        *([f"rank {entry['rankme']:.1f}"] if "rankme" in entry else []),
        *([f"kNN {entry['knn']:.1%}"] if "knn" in entry else []),
    ]
    return "  ".join(parts)
