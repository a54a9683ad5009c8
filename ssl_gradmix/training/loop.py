"""The training loop, on Accelerate. All that is random is a function of seed, epoch, step and process."""

from __future__ import annotations

import copy
import logging
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from tqdm.auto import tqdm

from ssl_gradmix import backbones
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.methods.losses import Losses
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.settings import Augmentation, Optimizer, Training
from ssl_gradmix.training import batches, checkpoint, log, optimizers, samples, signals
from ssl_gradmix.training.monitor import Monitor

logger = logging.getLogger("ssl_gradmix")

READ_EVERY = 50
"""At most so many steps lie between two readings of the losses from the device, which the host has to wait for."""

READ_SECONDS = 5.0
"""About so long is between two readings where steps are slow: several processes agree on a signal only then."""

SAVE_SECONDS = 60.0
"""So long is between two checkpoints at least, signals and the end of the training apart."""

SAMPLED = 8
"""Images in a picture of mixed views."""


@torch.no_grad()
def check_images(method: nn.Module, size: int, device: torch.device) -> list[str]:
    """Runs a method once on noise, so that what does not fit is said before anything is written; says GradMix's layers.

    Returns:
        The layers at which GradMix attributes, none without it.

    Raises:
        ValueError: The backbone does not take such images.
        KeyError: GradMix's layers are not the backbone's.
    """
    method.to(device).eval()
    try:
        views = [torch.randn(4, 3, size, size, device=device) for _ in range(2)]
        with torch.enable_grad():
            labels = torch.arange(4, device=device) % 2
            method(views, labels)
            if method.gradmix is None:
                return []
            layers = list(method.mixed_views(views, labels).layers)
            logger.info("GradMix attributes at %s", ", ".join(layers))
            return layers
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"data.size, backbone.name: the method does not run on images of {size}x{size} ({error}); "
            f"a vision transformer is made for them by --backbone.kwargs '{{img_size: {size}}}'"
        ) from error
    finally:
        method.train()


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all floating-point numbers of some tensors are finite: a boolean scalar, on the device."""
    return torch.nn.utils.get_total_norm([tensor for tensor in tensors if tensor.is_floating_point()]).isfinite()


class Trainer:
    """Trains a method on images and leaves a run folder; goes on where an earlier training in that folder was stopped.

    Args:
        method: Module with `forward(views, labels) -> Losses`, a timm `backbone`, a `projector`, a `gradmix` (or None)
            and, where it has a target network, `update_target(step, steps)`.
        images: To train on; their labels serve the kNN reading, and methods that take labels.
        folder: Where everything is written, started by the main process.
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
        self.images, self.folder, self.accelerator, self.size = images, folder, accelerator, size
        self.training, self.settings = training, optimizer
        self.peak = optimizers.peak_rate(optimizer, training.batch_size)
        config = method.backbone.pretrained_cfg
        self.mean, self.std = config["mean"], config["std"]
        if len(images) < training.batch_size:
            raise ValueError(
                f"training.batch_size {training.batch_size} exceeds the {len(images)} images of {images.name}"
            )
        process, processes = accelerator.process_index, accelerator.num_processes
        indices = batches.BatchIndices(
            len(images), training.batch_size, training.seed, training.accumulate, process, processes
        )
        self.steps_per_epoch = len(indices) // training.accumulate
        self.steps = self.steps_per_epoch * training.epochs
        views = Views(augmentation, size, self.mean, self.std, process, processes, images.stamps)
        self.source = batches.Batches(
            images, views, indices, n_views, training.decode, training.workers, accelerator.device
        )
        self.monitor = None
        labeled = images.subset(images.labels >= 0)
        watched = labeled if len(labeled) >= 10 else images
        if accelerator.is_main_process and training.knn_every and len(watched) >= 10:
            self.monitor = Monitor(watched, size, self.mean, self.std, views=views)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            method = convert_sync_batchnorm(method)  # timm's: torch's drops what timm's norms hold, activations
        method.to(memory_format=torch.channels_last)
        self.method, self.optimizer = accelerator.prepare(method, optimizers.create(method, optimizer))
        self.bare = accelerator.unwrap_model(self.method)
        self.epoch, self.batch, self.totals = 0, 0, {}
        self.read_every, self.last_read = 1, 0.0
        self.saved: Path | None = None
        self.save_due, self.last_save, self.saving = False, 0.0, 0.0

    def run(self) -> None:
        """Trains from the last checkpoint, or from the start, to the end, and releases the folder.

        Raises:
            FloatingPointError: A loss, a weight or the optimizer's state is not finite; names the step and the last
                good checkpoint.
            OSError: The run folder cannot be written to, a full disk for instance; names the last good checkpoint.
            SystemExit: SIGTERM, SIGINT or SIGHUP came, or the launcher is gone, and the state is saved; the status is
                143, 130 or 129.
        """
        try:
            self._resume()
            if self.epoch == self.training.epochs:
                lines = [f": {log.line(entry, self.epoch)}" for entry in self.folder.read_log()]
                self._say(f"{self.folder.path} is finished{lines[-1] if lines else ''}; --overwrite starts anew")
                return
            self._say_what_begins()
            if self.training.trackers:
                log.start_trackers(self.accelerator, self.folder)
            began = self.last_save = time.perf_counter()
            first, seen = self.epoch, 0
            with signals.collected() as received:
                while self.epoch < self.training.epochs:
                    entry, images = self._one_epoch(received)
                    seen += images
                    self._look(entry)
                    passed = time.perf_counter() - began
                    left = self.training.epochs - self.epoch
                    entry["images_per_second_overall"] = round(seen / passed, 1)
                    entry["seconds_left"] = round(passed / (self.epoch - first) * left, 1)
                    self._report(entry)
                    if self.save_due or not left:
                        self._save()
                    if self.epoch < self.training.epochs:
                        self._stop_if_asked(received)
            if self.training.trackers:
                self.accelerator.end_training()
            path = shlex.quote(str(self.folder.path))
            passed = time.perf_counter() - began
            spent = f"{log.clock(passed)}, {self.saving / passed:.1%} of it saving"
            self._say(f"finished in {spent}; the results are in {path}. Next: python eval/linear_probe.py {path}")
        except (ValueError, OSError) as error:
            # What ends one process alone, such as a broken image in its share, is not known to the one that speaks.
            if not self.accelerator.is_main_process:
                logger.error("process %d: %s", self.accelerator.process_index, error)
            raise
        finally:
            self.folder.release()

    def _say_what_begins(self) -> None:
        decoded = "as they are needed" if self.source.resident is None else "once"
        self._say(f"{self.images.describe()}, decoded {decoded}")
        if self.epoch or self.batch:
            batch = f" and {self.batch} batches" if self.batch else ""
            self._say(f"{self.folder.path} goes on after epoch {self.epoch}{batch}")
            return
        self._say(
            f"{self.steps_per_epoch * self.training.batch_size:,} images an epoch in batches of "
            f"{self.training.batch_size}, learning rate {self.peak:.4g} (scaled by batch / "
            f"{optimizers.REFERENCE_BATCH}), {self.steps:,} steps"
        )
        if self.settings.warmup_epochs >= self.training.epochs:
            self._say(
                f"warning: optimizer.warmup_epochs {self.settings.warmup_epochs:g} is not below training.epochs "
                f"{self.training.epochs}: the learning rate rises to the end, and never gets to {self.peak:.4g}"
            )

    def _one_epoch(self, received: list[int]) -> tuple[dict[str, Any], int]:
        """Trains an epoch, or what is left of it; returns its entry in the log and the number of images."""
        self.method.train()
        began = self.last_read = time.perf_counter()
        saving, seen, unread = self.saving, 0, []
        bar = tqdm(
            total=len(self.source.indices),
            initial=self.batch,
            desc=f"epoch {self.epoch + 1}/{self.training.epochs}",
            disable=None if self.accelerator.is_main_process else True,
            leave=False,
        )
        for batch in self.source.epoch(self.epoch, self.batch):
            unread.append(torch.stack([value.detach() for value in self._step(batch) if value is not None]))
            self.batch += 1
            seen += self.source.indices.micro
            bar.update()
            if not received and signals.orphaned():
                received.append(SIGTERM)
            alone_and_asked = bool(received) and self.accelerator.num_processes == 1
            if self.accelerator.sync_gradients and (len(unread) >= self.read_every or alone_and_asked):
                self._read(unread)
                self._stop_if_asked(received)
                if self.save_due and self.batch < len(self.source.indices):
                    self._save()
        if unread:
            self._read(unread)
        bar.close()
        read = self.totals.pop("read")
        means = {name: round(total / read, 5) for name, total in self.totals.items()}
        self.epoch, self.batch, self.totals = self.epoch + 1, 0, {}
        step = self.epoch * self.steps_per_epoch
        entry = {"epoch": self.epoch, "step": step, **means, "lr": self._rate(step - 1)}
        if seen:  # none where an epoch was resumed after its last batch
            stepping = time.perf_counter() - began - (self.saving - saving)
            entry["images_per_second"] = round(seen / stepping, 1)
        return entry, seen

    def _step(self, batch: Any) -> Losses:
        """Trains on a (micro-)batch."""
        step = self.epoch * self.steps_per_epoch + self.batch // self.training.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        place = self.training.seed, self.epoch, self.batch
        batches.seed_step(*place)  # views are those of the whole batch, on every process
        images, labels = batch
        views = [view.contiguous(memory_format=torch.channels_last) for view in self.source.views(images)]
        batches.seed_step(*place, self.accelerator.process_index)  # donors, lam and dropout are each process's own
        with self.accelerator.accumulate(self.method):
            losses = self.method(views, labels)
            self.accelerator.backward(losses.total)
            if self.settings.clip is not None and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.method.parameters(), self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients and hasattr(self.bare, "update_target"):
            self.bare.update_target(step, self.steps)
        return losses

    def _rate(self, step: int) -> float:
        return optimizers.rate(step, self.steps, self.settings.warmup_epochs * self.steps_per_epoch, self.peak)

    def _read(self, unread: list[Tensor]) -> None:
        """Adds the losses of the last (micro-)batches, mean over processes, to the epoch's totals.

        Every checkpoint comes right after it, so that what is not finite is never saved.
        """
        values = self.accelerator.reduce(torch.stack(unread), "mean").cpu()
        finite = values.isfinite().all(1)
        if not finite.all():
            at = self.batch - len(unread) + int((~finite).nonzero()[0])
            self._diverged(f"loss is {values[~finite][0, 0]:g} in epoch {self.epoch + 1}, batch {at + 1}")
        # A gradient that overflows leaves its traces in both, for which the device need not be asked at every step.
        state = [value for each in self.optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
        sound = all_finite([*self.bare.state_dict().values(), *state]).float()
        now = time.perf_counter()
        waited, unsaved = sound.new_tensor([now - self.last_read, now - self.last_save])
        # Mean over processes in float32: the same on all of them, who have to agree on when they read and save.
        sound, waited, unsaved = self.accelerator.reduce(torch.stack([sound, waited, unsaved]), "mean").tolist()
        if sound < 1:
            self._diverged(
                f"weights, or the optimizer's state, are not finite after epoch {self.epoch + 1}, batch {self.batch}"
            )
        self.save_due = unsaved >= SAVE_SECONDS
        self.read_every = max(1, min(READ_EVERY, int(READ_SECONDS * len(unread) / max(waited, 1e-6))))
        names = "loss", *Losses._fields[1 : values.shape[1]], "read"
        sums = [*values.double().sum(0).tolist(), len(unread)]
        self.totals = {name: self.totals.get(name, 0) + total for name, total in zip(names, sums, strict=True)}
        unread.clear()
        self.last_read = time.perf_counter()

    def _diverged(self, what: str) -> None:
        raise FloatingPointError(
            f"{what}; {self._last_good()}. A lower --optimizer.lr or a longer --optimizer.warmup_epochs may help"
        )

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"

    def _stop_if_asked(self, received: list[int]) -> None:
        """Saves and stops where any process got a signal; all agree, or some would wait for the others for ever."""
        asked = torch.tensor(max(received, default=0), device=self.accelerator.device)
        number = int(self.accelerator.gather(asked).max())
        if number:
            self._save()
            self._say(f"stopped by {Signals(number).name} and saved; the same command goes on from here")
            raise SystemExit(128 + number)

    def _look(self, entry: dict[str, Any]) -> None:
        """Adds what is read now and then to an epoch's entry, and draws a picture where it is due."""
        if self.monitor and self._due(self.training.knn_every):
            readings = self.monitor(self.bare.backbone, self.accelerator.device)
            entry.update({name: round(value, 4) for name, value in readings.items()})
        if self.bare.gradmix is not None and self._due(self.training.samples_every):
            self._draw_samples()

    def _report(self, entry: dict[str, Any]) -> None:
        self.accelerator.log({name: value for name, value in entry.items() if name != "epoch"}, step=self.epoch)
        if self.accelerator.is_main_process:
            with self._writing():
                self.folder.append_log(entry)
        for line in (log.line(entry, self.training.epochs), *log.warnings(entry)):
            self._say(line)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.epoch % every == 0 or self.epoch == self.training.epochs)

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            log.say(line)

    def _draw_samples(self) -> None:
        """Mixes a few images with a copy of the method, on all processes because the loss gathers, and draws them."""
        batches.seed_step(self.training.seed, 0, 0)
        method = copy.deepcopy(self.bare)
        images, labels = next(iter(self.source.epoch(0, 0)))
        views = [view[:SAMPLED].clone() for view in self.source.views(images)[:2]]
        mixed = method.mixed_views(views, labels[:SAMPLED])
        if self.accelerator.is_main_process:
            path = self.folder.samples / f"epoch-{self.epoch:05d}.png"
            with self._writing():
                samples.draw(views[0], mixed, self.mean, self.std, path)
            log.show(self.accelerator, path, self.epoch)

    def _save(self) -> None:
        path = checkpoint.path_of(self.folder.checkpoint, self.epoch, self.batch)
        if path == self.saved:
            return
        began = time.perf_counter()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler and self.accelerator.scaler.state_dict()
            method, optimizer = self.bare.state_dict(), self.optimizer.state_dict()
            state = checkpoint.State(self.epoch, self.batch, self.totals, method, optimizer, scaler)
            # The checkpoint comes last: a run whose last one is there is finished, and all else has to be there too.
            with self._writing():
                backbones.save(self.bare.backbone, self.folder.backbone, self.size)
                backbones.write_weights(self.bare.projector, self.folder.projector)
                for written in (*self.folder.backbone.iterdir(), self.folder.projector, self.folder.path):
                    checkpoint.flush(written)
                checkpoint.save(self.folder.checkpoint, state, self.folder.identity)
        self.saved, self.save_due = path, False
        self.last_save = self.last_read = time.perf_counter()
        self.saving += self.last_save - began

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
        # One process reads for all: several machines need not share the folder, nor start from different checkpoints.
        state = None
        if self.accelerator.is_main_process:
            run, method = self.folder.identity, self.bare.state_dict()
            state = checkpoint.load(self.folder.checkpoint, run, method, self.optimizer)
        (state,) = broadcast_object_list([state])
        if state is not None:
            self.bare.load_state_dict(state.method)
            self.optimizer.load_state_dict(state.optimizer)
            if state.scaler and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state.scaler)
            self.epoch, self.batch, self.totals = state.epoch, state.batch, state.totals
            self.saved = checkpoint.path_of(self.folder.checkpoint, self.epoch, self.batch)
        if self.accelerator.is_main_process:
            with self._writing():
                self.folder.rewind_log(self.epoch)
