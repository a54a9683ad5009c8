"""The training loop, on Accelerate. All randomness is a function of seed, epoch, step, process."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from jsonargparse.typing import NonNegativeInt, PositiveInt
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ssl_gradmix import backbones
from ssl_gradmix.console import progress, show
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.files import read_yaml
from ssl_gradmix.methods import Method
from ssl_gradmix.run_folder import RunFolder, flat
from ssl_gradmix.training import checkpoint, optimizers, samples
from ssl_gradmix.training.batches import Batches, BatchIndices, seed_step
from ssl_gradmix.training.optimizers import Optimizer

READ_EVERY = 50
"""Steps between two readings of the metrics, for which the host waits for the device."""

SAVE_SECONDS = 60.0
"""Smallest time between two checkpoints, except at the end."""

SAMPLES = 8
"""Images in a picture of mixed views."""

COLLAPSED_STD = 0.1
"""Below this `embedding_std` the encoder counts as collapsed. Healthy ones keep 0.7 to 1."""

FLAT = 0.5
"""Above this fraction of constant maps a warning is printed."""


@dataclass
class Training:
    """How long to train, on how many images at once, and what to log.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per global batch, over all processes.
        accumulate: Micro-batches per optimizer step, into which the batch is split (BYOL only: a
            contrastive loss needs the whole batch).
        seed: Seed of initialization, shuffling, augmentation and mixing.
        precision: `no` is float32, in which a GPU rounds convolutions to TF32 but not matrix
            products, so that transformers profit from `bf16`. `bf16` and `fp16` are mixed
            precision. Null takes what `accelerate launch` was given, or else `no`.
        decode: `once` keeps all images decoded on the device, `threads` decodes them when they are
            needed, `auto` chooses `once` up to 4 GiB or a quarter of a GPU's free memory. The views
            are the same.
        workers: Threads that decode.
        threads: CPU threads per process of a training on the CPU. Null leaves it to torch
            (OMP_NUM_THREADS).
        knn_every: Epochs between two readings of the features of training images: effective rank,
            reliance on a tenth of the image and, for labeled images, kNN accuracy on held-out ones.
            0 reads none.
        samples_every: Epochs between two pictures of mixed views in `samples/`; 0 draws none.
        trackers: Accelerate trackers to log to, for instance `[tensorboard]`.
    """

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    seed: NonNegativeInt = 0
    precision: Literal["no", "bf16", "fp16"] | None = None
    decode: Literal["auto", "once", "threads"] = "auto"
    workers: PositiveInt = 2
    threads: PositiveInt | None = None
    knn_every: NonNegativeInt = 10
    samples_every: NonNegativeInt = 10
    trackers: list[str] | None = None


class Trainer:
    """Trains a method on images and writes a run folder, or resumes the training in that folder.

    Args:
        method: The method. If it has `update_target(step, steps)`, it is called after each step.
        views: Makes the views of a batch.
        images: The training images. Their labels are passed to the method.
        folder: Run folder, started by the main process.
        accelerator: Device and processes.
        optimizer: How weights are updated.
        training: How long to train, and what to log.
        n_views: Views per image, 3 for a plain third one.
        monitor: Reads the backbone on a device and returns values to log, on the main process.

    Raises:
        ValueError: There are fewer images than a batch.
    """

    def __init__(
        self,
        method: Method,
        views: Views,
        images: ImageSet,
        folder: RunFolder,
        accelerator: Accelerator,
        optimizer: Optimizer,
        training: Training,
        n_views: int = 2,
        monitor: Callable[[nn.Module, torch.device], dict[str, float]] | None = None,
    ) -> None:
        if len(images) < training.batch_size:
            raise ValueError(
                f"training.batch_size {training.batch_size} exceeds the {len(images)} images of "
                f"{images.name}"
            )
        self.images, self.folder, self.accelerator = images, folder, accelerator
        self.settings, self.training, self.monitor = optimizer, training, monitor
        process, processes = accelerator.process_index, accelerator.num_processes
        indices = BatchIndices(
            len(images), training.batch_size, training.seed, training.accumulate, process, processes
        )
        self.steps_per_epoch = len(indices) // training.accumulate
        self.steps = self.steps_per_epoch * training.epochs
        self.batches = Batches(
            images,
            views,
            indices,
            n_views,
            training.decode,
            training.workers,
            accelerator.device,
        )
        module: nn.Module = method
        if processes > 1 and accelerator.device.type == "cuda":
            # timm's: torch's drops the activations that timm's norms contain.
            module = convert_sync_batchnorm(method)
        module.to(memory_format=torch.channels_last)
        created = optimizers.create(module, optimizer)
        self.method, self.optimizer = accelerator.prepare(module, created)
        self.bare = cast(Method, accelerator.unwrap_model(self.method))
        self.epoch = 0  # epochs completed
        self.batch = 0  # (micro-)batches completed of the next epoch
        self.began = self.last_save = 0.0
        self.save_due = False

    def run(self) -> None:
        """Trains from the last checkpoint, or from the start, to the end.

        Raises:
            FloatingPointError: The loss, a weight or the optimizer's state is not finite.
        """
        self._resume()
        path = self.folder.path
        if self.epoch == self.training.epochs:
            self._print(f"{path} is finished; to train again, choose another --run or remove it")
            return
        self._print_start()
        if self.training.trackers:
            config = flat(read_yaml(self.folder.config))
            settings = {name: str(value) for name, value in config.items()}  # some take no null
            self.accelerator.init_trackers("ssl_gradmix", settings)
        self.began = self.last_save = time.perf_counter()
        first_step = self._step_number()
        while self.epoch < self.training.epochs:
            entry = self._train_epoch()
            entry |= self._pace(first_step)
            entry |= self._read_monitor()
            if self.bare.gradmix is not None and self._due(self.training.samples_every):
                self._draw_samples()
            self._report(entry)
            if self.save_due or self.epoch == self.training.epochs:
                self._save()
        if self.training.trackers:
            self.accelerator.end_training()
        passed = clock(time.perf_counter() - self.began)
        self._print(f"finished in {passed}, results are in {path}")

    def _train_epoch(self) -> dict[str, Any]:
        """Trains an epoch, or the rest of one, and returns its entry of the log."""
        self.method.train()
        began, first = time.perf_counter(), self.batch
        unread: list[dict[str, Tensor]] = []
        read: list[Tensor] = []
        bar = progress(
            len(self.batches.indices),
            f"epoch {self.epoch + 1}/{self.training.epochs}",
            "batch",
            initial=first,
            silent=not self.accelerator.is_main_process,
        )
        for images, labels in self.batches.epoch(self.epoch, first):
            unread.append(self._step(images, labels))
            self.batch += 1
            bar.update()
            last = self.batch == len(self.batches.indices)
            if last or self.batch % (READ_EVERY * self.training.accumulate) == 0 or self._overdue():
                read.append(self._read(unread))
                names = list(unread[0])
                unread = []
                if self.save_due and not last:
                    self._save()
        bar.close()
        seen = (self.batch - first) * self.batches.indices.micro
        means = torch.cat(read).double().mean(0).tolist()
        self.epoch, self.batch = self.epoch + 1, 0
        step = self._step_number()
        return {
            "epoch": self.epoch,
            "step": step,
            **{name: round(mean, 5) for name, mean in zip(names, means, strict=True)},
            "lr": self._rate(step - 1),
            "images_per_second": round(seen / (time.perf_counter() - began), 1),
        }

    def _overdue(self) -> bool:
        """Whether a checkpoint is due before the next reading. Clocks of processes differ."""
        unsaved = time.perf_counter() - self.last_save
        alone = self.accelerator.num_processes == 1 and self.accelerator.sync_gradients
        return alone and unsaved >= SAVE_SECONDS

    def _step(self, images: Tensor | list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Trains on a (micro-)batch and returns the loss and the method's metrics."""
        step = self._step_number()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        place = self.training.seed, self.epoch, self.batch
        seed_step(*place)  # the same on all processes, which draw the views of the whole batch
        views = self.batches.views(images)
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        seed_step(*place, self.accelerator.process_index)  # donors, lam and dropout differ
        with self.accelerator.accumulate(self.method):
            loss, metrics = self.method(views, labels)
            self.accelerator.backward(loss)
            if self.settings.clip is not None and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.method.parameters(), self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients and hasattr(self.bare, "update_target"):
            cast(Any, self.bare).update_target(step, self.steps)
        return {"loss": loss.detach(), **metrics}

    def _step_number(self) -> int:
        return self.epoch * self.steps_per_epoch + self.batch // self.training.accumulate

    def _rate(self, step: int) -> float:
        warmup = self.settings.warmup_epochs * self.steps_per_epoch
        peak = optimizers.peak_rate(self.settings, self.training.batch_size)
        return optimizers.rate(step, self.steps, warmup, peak)

    def _read(self, unread: list[dict[str, Tensor]]) -> Tensor:
        """Metrics of the last batches (batches, metrics), mean over processes, on the CPU."""
        values = torch.stack([torch.stack(list(metrics.values())) for metrics in unread])
        values = self.accelerator.reduce(values, "mean").cpu()
        if not values[:, 0].isfinite().all():
            raise FloatingPointError(f"the loss is not finite{self._where()}")
        # Processes have to agree on when to save, hence the mean of their clocks.
        unsaved = torch.tensor(time.perf_counter() - self.last_save, device=self.accelerator.device)
        self.save_due = self.accelerator.reduce(unsaved, "mean").item() >= SAVE_SECONDS
        return values

    def _save(self) -> None:
        """Writes the weights for evaluations, then the checkpoint: a finished run is complete."""
        state = self._state()
        moments = [value for each in state.optimizer["state"].values() for value in each.values()]
        if not all_finite([*state.method.values(), *moments]):
            raise FloatingPointError(f"weights are not finite{self._where()}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            backbones.save(self.bare.backbone, self.folder.backbone, self.batches.make_views.size)
            backbones.write_weights(self.bare.projector, self.folder.projector)
            checkpoint.save(self.folder.checkpoint, state)
        self.save_due, self.last_save = False, time.perf_counter()

    def _state(self) -> checkpoint.State:
        scaler = self.accelerator.scaler and self.accelerator.scaler.state_dict()
        method, optimizer = self.bare.state_dict(), self.optimizer.state_dict()
        return checkpoint.State(self.epoch, self.batch, method, optimizer, scaler)

    def _where(self) -> str:
        place = f"in epoch {self.epoch + 1} up to batch {self.batch}"
        return f" {place}; a lower --optimizer.lr or longer --optimizer.warmup_epochs may help"

    def _resume(self) -> None:
        """Loads the last checkpoint. The main process reads it and sends it to the others."""
        state = None
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                state = checkpoint.load(self.folder.checkpoint)
        (state,) = broadcast_object_list([state])
        if state is not None:
            self.bare.load_state_dict(state.method)
            self.optimizer.load_state_dict(state.optimizer)
            if state.scaler and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state.scaler)
            self.epoch, self.batch = state.epoch, state.batch
        if self.accelerator.is_main_process:
            if state is None:  # before log and weights, which nobody trains over without one
                checkpoint.save(self.folder.checkpoint, self._state())
            self.folder.rewind_log(self.epoch)

    def _print_start(self) -> None:
        decoded = "as they are needed" if self.batches.resident is None else "once"
        self._print(f"{self.images.describe()}, decoded {decoded}")
        batch = self.training.batch_size
        peak = optimizers.peak_rate(self.settings, batch)
        self._print(
            f"{self.steps:,} steps with batches of {batch}, learning rate {peak:.4g} (scaled by "
            f"batch_size / {optimizers.REFERENCE_BATCH})"
        )
        if self.epoch or self.batch:
            self._print(f"resumed after {self.epoch} epochs and {self.batch} batches")

    def _pace(self, first_step: int) -> dict[str, float]:
        """Speed since the start, evaluations and checkpoints included, and the time left."""
        passed = time.perf_counter() - self.began
        done = self._step_number() - first_step
        speed = done * self.training.batch_size / passed
        left = passed / done * (self.steps - self._step_number())
        return {"images_per_second_overall": round(speed, 1), "seconds_left": round(left, 1)}

    def _read_monitor(self) -> dict[str, float]:
        if self.monitor is None or not self._due(self.training.knn_every):
            return {}
        readings = self.monitor(self.bare.backbone, self.accelerator.device)
        return {name: round(value, 4) for name, value in readings.items()}

    def _due(self, every: int) -> bool:
        return every > 0 and (self.epoch % every == 0 or self.epoch == self.training.epochs)

    def _draw_samples(self) -> None:
        """Draws mixed views of a few images. All processes run it, because losses gather."""
        seed_step(self.training.seed, 0, 0)
        method = copy.deepcopy(self.bare)
        images, labels = next(iter(self.batches.epoch(0, 0)))
        views = [view[:SAMPLES].clone() for view in self.batches.views(images)[:2]]
        mixed = method.mixed_views(views, labels[:SAMPLES])
        if self.accelerator.is_main_process:
            path = self.folder.samples / f"epoch-{self.epoch:05d}.png"
            made = self.batches.make_views
            samples.draw(views[0], mixed, made.mean, made.std, path)

    def _report(self, entry: dict[str, Any]) -> None:
        """Writes an epoch to log, trackers and console."""
        self.accelerator.log(entry, step=self.epoch)
        if self.accelerator.is_main_process:
            self.folder.append_log(entry)
        self._print(line(entry, self.training.epochs))
        for warning in warnings(entry):
            self._print(f"warning: {warning}")

    def _print(self, text: str) -> None:
        if self.accelerator.is_main_process:
            show(text)


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Raises an error of the block on all processes, and otherwise lets them wait for each other.

    Without this, an error on one process leaves the others waiting for it. The block must not
    communicate.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, KeyError, OSError) as caught:
        error = caught
    errors = gather_object([error and f"process {accelerator.process_index}: {error}"])
    if error is not None:
        raise error
    if found := [each for each in errors if each]:
        raise ValueError("; ".join(found))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all floating-point numbers of some tensors are finite, read in one go."""
    floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    return bool(torch.nn.utils.get_total_norm(floats).isfinite())


def line(entry: dict[str, Any], epochs: int) -> str:
    """An epoch's entry of the log for the console."""
    hidden = {"epoch", "step", "images_per_second_overall", "seconds_left"}
    values = {name: value for name, value in entry.items() if name not in hidden}
    parts = [f"{name} {value:.4g}" for name, value in values.items()]
    left = clock(entry["seconds_left"])
    return "  ".join([f"epoch {entry['epoch']}/{epochs}", *parts, f"{left} left"])


def warnings(entry: dict[str, Any]) -> list[str]:
    """Warnings about an epoch: a collapsed encoder, or mostly constant attribution maps."""
    found = []
    if entry["embedding_std"] < COLLAPSED_STD:
        found.append(
            f"the encoder collapses, embedding_std is {entry['embedding_std']:.3f}; a lower "
            "--optimizer.lr or --optimizer.weight_decay may help"
        )
    if entry.get("flat", 0) > FLAT:
        found.append(
            f"{entry['flat']:.0%} of the attribution maps are constant, and their boxes are "
            "random; other --gradmix.layers or --training.precision no may help"
        )
    return found


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: `30:00:00`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
