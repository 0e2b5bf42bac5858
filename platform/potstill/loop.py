"""The only training loop: plain PyTorch, no Ray.

A session (`fit.py` has Ray Train's, tests a local one) says which rank this is, keeps the journal and
the checkpoints; everything that is learned or measured happens here.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from potstill.averaging import Averager
from potstill.config import Loop
from potstill.data.augment import Augment
from potstill.data.batches import Batches, micro_batches
from potstill.errors import Stopped, UserError
from potstill.memory import largest_that_fits, workers_here
from potstill.metric_names import higher_is_better
from potstill.metrics import Meter, evaluate, over_views, top_k
from potstill.optim import LearningRate
from potstill.predictions import Predictions, thresholds_file
from potstill.runs import Checkpoint
from potstill.task import Batch, Relations, Task, Term
from potstill.term_weights import Event
from potstill.watch import check_epoch, check_monitor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Snapshot:
    """All that a run needs to go on: what a session writes as a checkpoint."""

    step: int
    model_state: dict[str, Tensor]
    state: dict[str, Any]
    meta: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


class Session(Protocol):
    rank: int
    world_size: int

    def log(self, record: dict[str, Any]) -> None:
        """Send a record to the journal: cheap, buffered, rank 0 only."""
        ...

    def report(self, metrics: dict[str, Any], snapshot: Snapshot) -> None:
        """Keep a checkpoint. Collective."""
        ...

    def resume_from(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid checkpoint, and the names of damaged ones that are newer."""
        ...

    def asked(self) -> str:
        """What is wanted after this update: "" (go on) | "save" (and go on: a machine will soon be gone) | "stop" (and
        save). Every rank gets the same answer. Collective."""
        ...


class LossNotFinite(UserError):
    """The loss became NaN or infinite."""


@dataclass
class Progress:
    """Where a run is. `step` counts updates since its start, `epoch_step` those of the epoch under way; `stage_epoch` and
    `stage_step` count epochs done and updates since the start of the stage."""

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    stage: int = 0
    stage_epoch: int = 0
    stage_step: int = 0
    bad_epochs: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list)


def autocast_of(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    if precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=DTYPES[precision])


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout and the like are a function of the position: there is no random state to save."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest())


@dataclass
class Stage:
    """A part of a training. `begin` frees and freezes what this stage trains, and makes its optimizer and learning rate;
    it is called when the stage begins or is gone on with."""

    epochs: int
    terms: Sequence[Term]
    augment: Augment
    begin: Callable[[], tuple[torch.optim.Optimizer, LearningRate]]
    patience: int | None = None
    name: str = ""


@dataclass
class Training:
    """Trains `task` through the `stages`, or goes on from the session's newest checkpoint: see `run`.

    Weights, batch statistics, averages and the best checkpoint go through all stages; each has its own optimizer.
    `val_batches`: makes validation's batches of so many samples; `micro_batch_size` says how many.
    `metrics`: what validation measures besides the usual, by name. `threshold`: how the thresholds of a
    binary or multi-label task are chosen on validation. `standing`: warnings about the data, said at once
    and in every epoch's record.
    """

    task: Task
    teachers: Sequence[Callable[[Batch], Batch]]
    stages: Sequence[Stage]
    batches: Batches
    val_batches: Callable[[int], Batches]
    cfg: Loop
    session: Session
    device: torch.device
    classes: Sequence[str]
    metrics: Sequence[str] = ()
    threshold: str | float = 0.5
    attempt: int = 1
    standing: Sequence[dict[str, str]] = ()

    def __post_init__(self) -> None:
        self.autocast = autocast_of(self.cfg.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.cfg.precision == "fp16")
        self.at = Progress()
        auto = self.cfg.micro_batch_size == "auto"
        self.micro_batch_size: int | None = None if auto else self.cfg.micro_batch_size
        self.optimizer: torch.optim.Optimizer
        self.learning_rate: LearningRate
        self._begin()
        self._px = self.augment.image_px
        self.averager = Averager(
            self.task.model,
            self.cfg.ema,
            self.cfg.ema_warmup,
            self.cfg.average_last,
            frozen_too=len(self.stages) > 1,
        )
        # what a guarded weight goes back to: model, projections and optimizer when each of its levels was taken
        self._restore_points: list[dict[str, Any]] = []
        # sum and weight of the loss since the last log
        self._window = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._clock = 0.0

    @property
    def stage(self) -> Stage:
        return self.stages[self.at.stage]

    @property
    def augment(self) -> Augment:
        return self.stage.augment

    def _begin(self) -> None:
        """Begin the stage that the run is in, or go on with it."""
        stage = self.stage
        self.task.terms = list(stage.terms)
        self.optimizer, self.learning_rate = stage.begin()
        self.guard = next((t.weight.guard for t in stage.terms if t.weight.guard), None)
        self.meter = self._new_meter()
        self.forward: nn.Module = self.task

    def _join_ranks(self) -> None:
        """Let gradients be summed over the ranks; anew in every stage, because what is trained differs."""
        if self.session.world_size > 1:
            # buffers are averaged when they are used (_share_buffers), not sent at every step
            ids = [self.device.index] if self.device.type == "cuda" else None
            # terms on features alone leave the head without a gradient
            whole = any("logits" in c for term in self.task.terms for c in term.inputs[:1])
            self.forward = DistributedDataParallel(
                self.task,
                device_ids=ids,
                broadcast_buffers=False,
                find_unused_parameters=not whole,
            )

    def _new_meter(self) -> Meter:
        terms = [t.name for t in self.task.terms]
        weighted = [f"{name}/weighted" for name in terms]
        return Meter(self.task.kind, len(self.classes), self.device, terms=[*terms, *weighted])

    def run(self, notes: Sequence[str] = (), facts: Mapping[str, Any] | None = None) -> Progress:
        """Train to the end. `notes` follow the attempt's first record, which also carries `facts`.

        Every epoch ends with an evaluation, a record and a checkpoint. Raises LossNotFinite (the last good
        checkpoint stands) and Stopped.
        """
        checkpoint, passed_over = self.session.resume_from()
        self.micro_batch_size = self._micro_batch_size(checkpoint)
        self._resume(checkpoint, passed_over, facts or {})
        for line in notes:
            self._log("note", message=line)
        for warning in self.standing:
            self._log("warning", **warning)
        self._join_ranks()
        while not self._stage_done() or self._next_stage():
            try:
                self._train_epoch()
            except LossNotFinite as error:
                if self.guard is None or not self.guard.level:
                    raise
                self._change_level(self.guard.fall_back(str(error).partition(" at step")[0]))
                self.at.stage_step -= self.at.epoch_step
                self.at.epoch_step = 0
                self._window.zero_()
                self.meter = self._new_meter()
        return self.at

    def _stage_done(self) -> bool:
        return self.at.stage_epoch >= self.stage.epochs or self._out_of_patience()

    def _next_stage(self) -> bool:
        """Begin the next stage; False where there is none."""
        if self.at.stage + 1 == len(self.stages):
            return False
        at = self.at
        at.stage, at.stage_epoch, at.stage_step, at.bad_epochs = at.stage + 1, 0, 0, 0
        before = self.guard
        self._begin()
        self._join_ranks()
        if before and self.guard and self.guard.go_on_from(before):
            for point in self._restore_points:
                point["optimizer"] = copy.deepcopy(self.optimizer.state_dict())
        else:
            self._restore_points = []
        self._log("stage", **self._about_stage())
        return True

    def _about_stage(self) -> dict[str, Any]:
        return {
            "stage": self.at.stage + 1,
            "stages": len(self.stages),
            "stage_name": self.stage.name,
            "stage_epochs": self.stage.epochs,
            "epoch": self.at.epoch,
        }

    def _epochs_left(self) -> int:
        """After the epoch under way, if no stage ends before its time."""
        later = self.stages[self.at.stage + 1 :]
        return self.stage.epochs - self.at.stage_epoch - 1 + sum(s.epochs for s in later)

    @property
    def ended_early(self) -> bool:
        """Whether patience has ended the last stage."""
        last = self.at.stage + 1 == len(self.stages)
        return last and self.at.stage_epoch < self.stage.epochs

    def _out_of_patience(self) -> bool:
        patience = self.stage.patience
        return patience is not None and self.at.bad_epochs >= patience

    # ------------------------------------------------------------------------------------- one epoch
    def _train_epoch(self) -> None:
        at, cfg = self.at, self.cfg
        self.task.train()
        self._px = self.augment.px_at(at.stage_epoch, self.stage.epochs)
        lr, images, counted_from, stopping = 0.0, 0, at.epoch_step, False
        started = window_started = self._clock = time.perf_counter()
        window_images = 0
        for batch in self.batches.epoch(at.epoch, at.epoch_step):
            lr = self.learning_rate.before_step(at.stage_step)
            self.task.epoch = at.stage_step / self.batches.steps
            self._update(batch)
            at.step, at.epoch_step = at.step + 1, at.epoch_step + 1
            at.stage_step += 1
            n = int(batch["count"])
            images, window_images = images + n, window_images + n
            last = at.epoch_step == self.batches.steps
            if at.step % cfg.log_every_steps == 0 or last:
                values = {
                    "epoch": at.epoch + 1,
                    "epoch_step": at.epoch_step,
                    "loss": self._window_loss(),
                    "lr": lr,
                }
                now = time.perf_counter()
                values["images_per_s"] = window_images / (now - window_started)
                window_started, window_images = now, 0
                if self.scaler.is_enabled():
                    values["loss_scale"] = self.scaler.get_scale()
                self._log("step", **values)
            asked = self.session.asked()
            stopping = asked == "stop"
            if not last and (asked or at.step % cfg.checkpoint_every_steps == 0):
                self._save_within_epoch()
            if stopping and not last:
                self._stop()
        train_seconds = time.perf_counter() - started
        self._finish_epoch(lr, started, images / train_seconds, at.epoch_step - counted_from)
        if stopping and not (self._stage_done() and at.stage + 1 == len(self.stages)):
            self._stop()

    def _stop(self) -> NoReturn:
        raise Stopped(
            f"stopped at step {self.at.step} and saved; the same command goes on from here"
        )

    def _finish_epoch(
        self, lr: float, started: float, images_per_s: float, steps_done: int
    ) -> None:
        at, cfg = self.at, self.cfg
        trained = self.meter.compute()
        self._refuse_bad_weights()
        self.averager.after_epoch(at.epoch, cfg.epochs)
        measured, found = self._evaluate()
        guarding = self.guard is not None and self.guard.level > 0
        if not math.isfinite(measured["loss"]) and not guarding:
            self._refuse(f"the validation loss is {measured['loss']}")
        seconds = time.perf_counter() - started
        self._tick()
        record = {
            "epoch": at.epoch + 1,
            "train_loss": trained["loss"],
            "train_top1_acc": trained["top1_acc"],
            "train_top5_acc": trained["top5_acc"],
            **{f"val_{name}": value for name, value in measured.items()},
            "lr": lr,
            "image_px": self._px,
            "top_k": top_k(len(self.classes)),
            "terms": {
                name: {
                    "loss": trained[f"term/{name}"],
                    "weighted": trained[f"term/{name}/weighted"],
                    "weight": weight,
                }
                for name, weight in self.task.weights().items()
            },
            "stage": at.stage + 1,
            "seconds": seconds,
            "total_seconds": at.seconds,
            "images_per_s": images_per_s,
            "seconds_left": self._epochs_left() * seconds * self.batches.steps / max(steps_done, 1),
        }
        value = record[cfg.monitor]
        event = self._guarded(measured)
        # until an epoch has a value, the first one stands in: a run keeps something to predict with
        better = at.best is None or _is_better(value, at.best["value"], cfg.monitor)
        better = better and not (event and event.restored)
        if not (event and event.restored):  # what is taken back does not count
            at.bad_epochs = 0 if better else at.bad_epochs + 1
        if better:
            at.best = {
                "folder": f"step-{at.step:08d}",
                "step": at.step,
                "epoch": at.epoch + 1,
                "metric": cfg.monitor,
                "value": value,
            }
        record["best"] = better
        at.epochs.append(
            {k: record[k] for k in ("train_loss", "train_top1_acc", "val_loss", "val_top1_acc")}
        )
        record["warnings"] = [
            *check_epoch(at.epochs, found, self.classes),
            *check_monitor(cfg.monitor, value),
            *self.standing,
        ]
        left = event is not None and event.restored
        if not math.isnan(value) and not left:
            self.learning_rate.after_epoch(value)
        at.epoch, at.epoch_step, at.stage_epoch = at.epoch + 1, 0, at.stage_epoch + 1
        self.meter = self._new_meter()
        self._log("epoch", **record)
        if event is not None:
            self._change_level(event)
        files = {"val_predictions.npz": _npz(found)}
        if found.thresholds is not None:
            files["thresholds.json"] = thresholds_file(found, self.classes, self.threshold)
        # the weights that an epoch went back to are not those that were measured
        self._save(epoch_done=True, metrics=record, files={} if left else files)

    def _guarded(self, measured: Mapping[str, float]) -> Event | None:
        """What a guarded weight makes of an epoch's validation."""
        if self.guard is None:
            return None
        finite = math.isfinite(measured["loss"])
        return self.guard.after_epoch(
            measured[self.guard.metric.removeprefix("val_")] if finite else math.nan
        )

    def _change_level(self, event: Event) -> None:
        """What follows from a guarded weight's new level: a point to come back to, or the way back to one."""
        if event.restored:
            self._load_state(self._restore_points.pop())
        else:
            self._restore_points.append(_on_cpu(self._trained_state()))
        self._log(
            "level",
            epoch=self.at.epoch,
            term=event.term,
            level=event.level + 1,
            weight=event.weight,
            restored=event.restored,
            message=event.why,
        )

    def _trained_state(self) -> dict[str, Any]:
        """Weights and what their optimizer knows: all that an update changes."""
        return {
            "model": self.task.model.state_dict(),
            "projections": self.task.projections.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averager": self.averager.state_dict(),
            "scaler": self.scaler.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.task.model.load_state_dict(state["model"])
        self.task.projections.load_state_dict(state["projections"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.averager.load_state_dict(state["averager"])
        self.scaler.load_state_dict(state["scaler"])
        self.learning_rate.load_state_dict(state["learning_rate"])

    # ---------------------------------------------------------------------- how much memory holds
    def _micro_batch_size(self, checkpoint: Checkpoint | None) -> int | None:
        """`loop.micro_batch_size`, found out where it is auto. A run keeps what it began with: batch
        statistics depend on it. Collective."""
        if self.cfg.micro_batch_size != "auto":
            return self.cfg.micro_batch_size
        if checkpoint and (kept := checkpoint.state().get("micro_batch_size")):
            return kept
        world = self.session.world_size
        share = -(-self.cfg.batch_size // world)
        trained = [p for p in self.task.parameters() if p.requires_grad]
        # two numbers of Adam's for each weight, and between workers a copy of the gradients
        to_come = sum(p.nbytes for p in trained) * (2 + (world > 1))
        here = workers_here(world)
        size = largest_that_fits(self._try_update, share, self.device, to_come, here)
        if world > 1:
            least = torch.tensor(size, device=self.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            size = int(least)
        return size

    def _val_batch_size(self) -> int:
        """Samples of all ranks: no gradients are kept, so that it can be more than an update's forward pass takes."""
        forward = -(-self.cfg.batch_size // self.cfg.accumulate)
        if self.micro_batch_size is not None:
            forward = min(self.micro_batch_size * self.session.world_size, forward)
        return 2 * max(forward, self.session.world_size)

    def _try_update(self, size: int) -> None:
        """One forward and backward pass of `size` samples, which leaves no trace."""
        self._px = max(s.augment.px_at(e, s.epochs) for s in self.stages for e in range(s.epochs))
        first = next(iter(self.batches.epoch(0)))
        rows = torch.arange(size) % len(first["id"])
        part = {k: v[rows] if v.ndim else v for k, v in first.items()}
        buffers = {name: b.clone() for name, b in self.task.named_buffers()}
        meter, window = self.meter, self._window.clone()
        self.meter = self._new_meter()
        self.task.train()
        try:
            with self.autocast():
                taught = self._taught(part)
            # what compares samples over ranks is left out: each rank tries sizes of its own
            known = self.task.no_relations(taught)
            self.scaler.scale(self._loss(part, taught, known)).backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, buffer in self.task.named_buffers():
                    buffer.copy_(buffers[name])
            self.meter, self._window = meter, window

    # ------------------------------------------------------------------------------------ one update
    def _update(self, batch: dict[str, Tensor]) -> None:
        """One optimizer step from this rank's share of a global batch."""
        torch.manual_seed(_step_seed(self.cfg.seed, self.at.step, self.session.rank))
        parts = micro_batches(batch, self.micro_batch_size, self.cfg.accumulate)
        related = self._relations(parts) if self._in_parts(parts) else None
        for i, part in enumerate(parts):
            if related:  # the very pass that its representations are of
                self._seed_part(i)
            with self._no_sync() if i + 1 < len(parts) else contextlib.nullcontext():
                # DistributedDataParallel averages over ranks; the shares are meant to be added
                loss = self._loss(part, *related[i]) if related else self._loss(part)
                self.scaler.scale(loss * self.session.world_size).backward()
        if self.cfg.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.task.parameters(), self.cfg.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.averager.after_step(self.at.step)

    def _in_parts(self, parts: Sequence[Any]) -> bool:
        """Whether samples must be compared with each other that no forward pass holds together: of any rank, so that all
        go the same way."""
        if not self.task.relations or self.session.world_size == 1:
            return bool(self.task.relations) and len(parts) > 1
        most = torch.tensor(len(parts), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most) > 1

    def _relations(
        self, parts: Sequence[dict[str, Tensor]]
    ) -> list[tuple[dict[str, Tensor], Relations]]:
        """A pass over all parts that keeps their representations alone; returns the parts as they were seen, and of each
        representation the gradient. Collective."""
        buffers = {name: b.clone() for name, b in self.task.named_buffers()}
        taught, seen = [], []
        with torch.no_grad(), self.autocast():
            for i, part in enumerate(parts):
                self._seed_part(i)
                taught.append(self._taught(part))
                self._seed_part(i)
                seen.append(self.task.related_inputs(taught[i]))
            for name, buffer in self.task.named_buffers():
                buffer.copy_(buffers[name])
        with self.autocast():
            return list(zip(taught, self.task.relate(seen), strict=True))

    def _seed_part(self, part: int) -> None:
        """Dropout of a part that is run twice must be the same twice."""
        torch.manual_seed(_step_seed(self.cfg.seed, self.at.step, self.session.rank) + part)

    def _no_sync(self) -> AbstractContextManager:
        return (
            self.forward.no_sync()
            if isinstance(self.forward, DistributedDataParallel)
            else contextlib.nullcontext()
        )

    def _taught(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """A part on the device, augmented and mixed, with what the teachers say of the very same images."""
        batch = self._augmented(part)
        for teacher in self.teachers:
            batch = teacher(batch)
        return batch

    def _loss(
        self,
        part: dict[str, Tensor],
        taught: dict[str, Tensor] | None = None,
        known: Relations | None = None,
    ) -> Tensor:
        with self.autocast():
            batch = self._taught(part) if taught is None else taught
            loss, sums, outputs = self.forward(batch, known)
        weight = batch["weight"].sum()
        to_mean = batch["weight_total"] / weight.clamp(min=1e-12)
        self.meter.update_mean("loss", loss.detach() * to_mean, weight)
        self._window += torch.stack(
            [(loss.detach() * batch["weight_total"]).double(), weight.double()]
        )
        weights = self.task.weights()
        for name, (value, counted) in sums.items():
            mean = value / counted.clamp(min=1e-12)
            self.meter.update_mean(f"term/{name}", mean, counted)
            self.meter.update_mean(f"term/{name}/weighted", weights[name] * mean, counted)
        padded = not bool(part["label_weight"].all())
        self.meter.update_classified(
            outputs["logits"].detach(), _main_label(batch), batch["label_weight"], padded
        )
        return loss

    def _augmented(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = self._to_device(part)
        # ids and views from where they are: what is planned on the CPU need not wait for the device
        images = self.augment.train(batch["image"], part["id"], part["view"], self._px)
        mixing = self.at.stage_epoch < self.stage.epochs - self.augment.mix_off_epochs
        return self.augment.mix({**batch, "image": images}, mixing)

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    # ------------------------------------------------------------------------------------ evaluation
    def _evaluate(self) -> tuple[dict[str, float], Predictions]:
        self._share_buffers()
        with self._measured():
            self.task.eval()
            return evaluate(
                self._predict,
                self._val_batches(),
                self.task.kind,
                len(self.classes),
                self.device,
                self.autocast,
                self.metrics,
                self.threshold,
            )

    @contextlib.contextmanager
    def _measured(self) -> Iterator[None]:
        """The weights that are measured and kept: averaged ones, where there are any."""
        if not self.averager.active:
            yield
            return
        with self.averager.swapped():
            self._share_buffers()
            yield

    def _predict(self, batch: dict[str, Tensor]) -> Tensor:
        views = self.augment.eval_views(batch["image"])
        return over_views(self.task.model, batch, views, self.task.kind)

    def _val_batches(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        for batch in self.val_batches(self._val_batch_size()).epoch(0):
            padded = not bool(batch["label_weight"].all())
            yield self._to_device(batch), padded

    # ---------------------------------------------------------------------------- what must be finite
    def _window_loss(self) -> float:
        """The mean loss of all ranks since the last call. Collective; raises LossNotFinite on every rank alike."""
        total, weight = self._whole_window().tolist()
        self._window.zero_()
        loss = total / weight if weight else 0.0
        if not math.isfinite(loss):
            self._refuse(f"the training loss is {loss}")
        return loss

    def _whole_window(self) -> Tensor:
        window = self._window.clone()
        if self.session.world_size > 1:
            dist.all_reduce(window)
        return window

    def _refuse_bad_weights(self) -> None:
        state = self.task.state_dict().values()
        finite = torch.stack([v.isfinite().all() for v in state if v.is_floating_point()]).all()
        if self.session.world_size > 1:  # batch statistics are each rank's own
            dist.all_reduce(told := finite.float(), op=dist.ReduceOp.MIN)
            finite = told > 0
        if not bool(finite):
            self._refuse("weights are NaN or infinite")

    def _refuse(self, what: str) -> None:
        checkpoint, _ = self.session.resume_from()
        good = checkpoint.folder.name if checkpoint else "none yet"
        raise LossNotFinite(
            f"{what} at step {self.at.step} (epoch {self.at.epoch + 1}); last good checkpoint: {good}. Lower "
            "optimizer.lr, set loop.clip_norm, or use loop.precision=bf16 or fp32, and start again under another run.name"
        )

    # ----------------------------------------------------------------------------------- checkpoints
    def _share_buffers(self) -> None:
        """Let every rank have the mean of the batch statistics."""
        if self.session.world_size == 1:
            return
        for module in self.task.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                for statistic in (module.running_mean, module.running_var):
                    if statistic is not None:
                        dist.all_reduce(statistic)
                        statistic /= self.session.world_size

    def _tick(self) -> None:
        now = time.perf_counter()
        self.at.seconds, self._clock = self.at.seconds + now - self._clock, now

    def _save_within_epoch(self) -> None:
        self._refuse_bad_weights()
        self._tick()
        self._share_buffers()
        self._save(epoch_done=False, metrics={})

    def _save(
        self, epoch_done: bool, metrics: dict[str, Any], files: dict[str, bytes] | None = None
    ) -> None:
        at = self.at
        state = {
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": vars(at),
            "projections": self.task.projections.state_dict(),
            "guard": vars(self.guard) if self.guard else None,
            "restore_points": self._restore_points,
            "meter": self.meter.state(),
            "window": self._whole_window().cpu(),
            "micro_batch_size": self.micro_batch_size,
        }
        meta = {
            "epoch": at.epoch,
            "epoch_step": at.epoch_step,
            "epoch_done": epoch_done,
            "best": at.best,
        }
        with self._measured():
            # the averager now holds what is trained, and the model what is kept
            state["averager"] = self.averager.state_dict()
            snapshot = Snapshot(at.step, self.task.model.state_dict(), state, meta, files or {})
            self.session.report({**metrics, "step": at.step}, snapshot)
        self._log("checkpoint", folder=f"step-{at.step:08d}", epoch_done=epoch_done)

    def _resume(
        self, checkpoint: Checkpoint | None, passed_over: Sequence[str], facts: Mapping[str, Any]
    ) -> None:
        if checkpoint:
            state = checkpoint.state()
            kept = state["progress"]  # of before there were stages: the one that there is
            whole = {"stage_epoch": kept["epoch"], "stage_step": kept["step"]}
            self.at = Progress(**{**whole, **kept})
            self._begin()
            self.task.model.load_state_dict(checkpoint.model_state())
            if "averager" in state:
                self.averager.load_state_dict(state["averager"])
            self.task.projections.load_state_dict(state.get("projections", {}))
            self._load_optimizer(state, checkpoint.meta.get("adopted") is not None)
            self.scaler.load_state_dict(state["scaler"])
            if self.guard is not None:
                vars(self.guard).update(state["guard"])
                self._restore_points = state["restore_points"]
            self.meter.load_state(state["meter"], self.session.rank)
            if self.session.rank == 0:
                self._window.copy_(state["window"])
        self._log(
            "attempt",
            epoch=self.at.epoch,
            resumed_from=checkpoint.folder.name if checkpoint else None,
            passed_over=passed_over,
            total_steps=self.batches.steps * self.cfg.epochs,
            steps_per_epoch=self.batches.steps,
            epochs=self.cfg.epochs,
            world_size=self.session.world_size,
            micro_batch_size=self.micro_batch_size,
            task_kind=self.task.kind,
            metrics=list(self.metrics),
            monitor=self.cfg.monitor,
            stages=[{"name": s.name, "epochs": s.epochs} for s in self.stages],
            stage=self.at.stage + 1,
            device=str(self.device),
            host=socket.gethostname(),
            pid=os.getpid(),
            **facts,
        )

    def _load_optimizer(self, state: Mapping[str, Any], adopted: bool) -> None:
        """What the optimizer and the learning rate know. `adopted`: another run's, whose settings are not ours."""
        saved = state["optimizer"]
        if adopted:
            own = self.optimizer.state_dict()["param_groups"]
            saved = {"state": saved["state"], "param_groups": own}
        self.optimizer.load_state_dict(saved)
        if not adopted:
            self.learning_rate.load_state_dict(state["learning_rate"])

    def _log(self, kind: str, **values: Any) -> None:
        self.session.log(
            {
                "kind": kind,
                "attempt": self.attempt,
                "step": self.at.step,
                "time": time.time(),
                **values,
            }
        )


def _on_cpu(state: Any) -> Any:
    """A copy that no update touches, and that takes no room on the device."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_on_cpu(value) for value in state)
    return copy.deepcopy(state)


def _is_better(value: float, than: float, monitor: str) -> bool:
    """NaN, where a metric is undefined, is better than nothing and worse than any number."""
    if math.isnan(value) or math.isnan(than):
        return not math.isnan(value)
    return value > than if higher_is_better(monitor) else value < than


def _main_label(batch: Mapping[str, Tensor]) -> Tensor:
    """The label, and of a mixed image that of its larger share."""
    if "mix" not in batch:
        return batch["label"]
    own_B = batch["mix"] >= 0.5
    return torch.where(
        own_B if batch["label"].ndim == 1 else own_B[:, None], batch["label"], batch["label_mix"]
    )


def _npz(found: Predictions) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **found.arrays())
    return buffer.getvalue()
