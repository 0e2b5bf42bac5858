"""Every knob of the recipe, turned once in a config, changes what it should and nothing before it.

How exactly each works is tested where it is built (test_augment, test_policies, test_optim, test_losses, …); here
it is the way from the key to the training. A knob that is added to the schema must be added here.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill import config as config_module
from potstill.assemble import train_run
from potstill.data import batches
from potstill.data.prepare import prepare
from potstill.loop import Snapshot
from potstill.task import Task

STEPS = 3  # 48 training images, 20 a batch


@dataclass
class Outcome:
    rates: list[float]
    train_loss: list[float]
    val_loss: list[float]
    best: list[bool]
    attempt: dict[str, Any]
    weights: dict[str, torch.Tensor]
    epochs: list[dict[str, Any]]
    forwards: int
    """Forward passes of the training."""
    window_rows: int
    checkpointed: bool
    compiled: bool

    @property
    def channels_last(self) -> bool:
        """Whether the kernels lie so; one of 1 x 1 or of one channel lies both ways."""
        kernels = [w for w in self.weights.values() if w.ndim == 4 and min(w.shape[1:]) > 1]
        assert kernels
        return all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)


class Memory:
    """A session that keeps everything in memory."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.saved = 0

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def report(self, metrics: dict[str, Any], snapshot: Snapshot) -> None:
        self.saved += 1
        self.weights = {k: v.clone() for k, v in snapshot.model_state.items()}

    def resume_from(self) -> tuple[None, list[str]]:
        return None, []

    def asked(self) -> str:
        return ""


@pytest.fixture(scope="module")
def outcome(tiny_tree, cache_dir, ray_session, tmp_path_factory):
    from conftest import tiny_overrides

    known: dict[tuple[str, ...], Outcome] = {}
    folder = tmp_path_factory.mktemp("knobs")

    def run(*overrides: str) -> Outcome:
        if overrides in known:
            return known[overrides]
        base = tiny_overrides(tiny_tree, cache_dir, folder)
        config = config_module.compose("train", [*base, "loop.log_every_steps=1", *overrides])
        found = prepare(config.data, config.cache).cache_dir
        session = Memory()
        passes: list[Task] = []
        windows: list[int] = []
        forward, order = Task.forward, batches.epoch_order

        def ordered(shard_rows, seed, epoch, window_rows, counts=None):
            windows.append(window_rows)
            return order(shard_rows, seed, epoch, window_rows, counts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Task, "forward", lambda task, *b: passes.append(task) or forward(task, *b)
            )
            patch.setattr(batches, "epoch_order", ordered)
            train_run(config, found, session, torch.device("cpu"), 1, [])
        model = passes[0].model
        of = {k: [r for r in session.records if r["kind"] == k] for k in ("step", "epoch")}
        known[overrides] = Outcome(
            rates=[r["lr"] for r in of["step"]],
            train_loss=[r["train_loss"] for r in of["epoch"]],
            val_loss=[r["val_loss"] for r in of["epoch"]],
            best=[r["best"] for r in of["epoch"]],
            attempt=next(r for r in session.records if r["kind"] == "attempt"),
            weights=session.weights,
            epochs=of["epoch"],
            forwards=len(passes),
            window_rows=windows[0],
            checkpointed=any(getattr(m, "grad_checkpointing", False) for m in model.modules()),
            compiled=getattr(model, "_compiled_call_impl", None) is not None,
        )
        return known[overrides]

    return run


# the knob, turned: and what it is compared with, where that is not the plain run
PIXELS = {  # another picture, and so another loss, from the first epoch on; the rates stay
    "augment.crop_scale": "augment.crop_scale=[0.3,0.5]",
    "augment.crop_ratio": "augment.crop_ratio=[1.0,1.0]",
    "augment.flip": "augment.flip=1.0",
    "augment.vflip": "augment.vflip=0.5",
    "augment.rotate": "augment.rotate=90",
    "augment.color": "augment.color=0.5",
    "augment.policy": "augment.policy=rand-m9-n2-mstd0.5",
    "augment.erasing": "augment.erasing=1.0",
    "augment.erasing_scale": "augment.erasing=1.0 augment.erasing_scale=[0.5,0.6] | augment.erasing=1.0",
    "augment.erasing_mode": "augment.erasing=1.0 augment.erasing_mode=const | augment.erasing=1.0",
    "augment.mixup": "augment.mixup=0.8",
    "augment.cutmix": "augment.cutmix=1.0",
    "augment.mix_prob": "augment.mixup=0.8 augment.mix_prob=0.3 | augment.mixup=0.8",
    "augment.mix_switch_prob": "augment.mixup=0.8 augment.cutmix=1.0 augment.mix_switch_prob=1.0 | "
    "augment.mixup=0.8 augment.cutmix=1.0 augment.mix_switch_prob=0.0",
    "augment.start_px": "model.name=test_resnet augment.start_px=16 | model.name=test_resnet",
    "augment.grow_until": "model.name=test_resnet augment.start_px=16 augment.grow_until=1.0 loop.epochs=4 | "
    "model.name=test_resnet augment.start_px=16 augment.grow_until=0.25 loop.epochs=4",
    "augment.mix_off_epochs": "augment.mixup=0.8 augment.mix_off_epochs=1 | augment.mixup=0.8",
    "augment.seed": "augment.seed=9",
    "augment.image_px": "model.name=test_resnet augment.image_px=24 | model.name=test_resnet",
}
ORDER = {  # other samples, or another order of them
    "loop.seed": "loop.seed=7",
    "loop.batch_size": "loop.batch_size=12",
    "loop.sampler": "data.max_samples=41 loop.sampler=class_balanced | data.max_samples=41",
    "loop.steps_per_epoch": "loop.steps_per_epoch=2",
}
GRADIENTS = {  # the same pictures and rates, another loss or another gradient
    "task.terms.<term>.label_smoothing": "task.terms.task.label_smoothing=0.3",
    "task.terms.<term>.class_weights": "task.terms.task.class_weights=[1,2,3,4]",
    "task.terms.<term>.loss": "task.terms.task.loss=focal",
    "task.terms.<term>.weight": "task.terms.task.weight=3.0 optimizer=sgd | optimizer=sgd",
    "task.terms.<term>.gamma": "task.terms.task.loss=focal task.terms.task.gamma=5 | task.terms.task.loss=focal",
    "task.terms.<term>.alpha": "task=binary data.classes=[blue,red] loop.batch_size=12 task.terms.task.loss=focal task.terms.task.alpha=0.9 | task=binary data.classes=[blue,red] loop.batch_size=12 task.terms.task.loss=focal",
    "task.terms.<term>.gamma_neg": "task=binary data.classes=[blue,red] loop.batch_size=12 task.terms.task.loss=asymmetric task.terms.task.gamma_neg=1 | task=binary data.classes=[blue,red] loop.batch_size=12 task.terms.task.loss=asymmetric",
    "task.terms.<term>.gamma_pos": "task=binary data.classes=[blue,red] loop.batch_size=12 task.terms.task.loss=asymmetric task.terms.task.gamma_pos=3 | task=binary data.classes=[blue,red] loop.batch_size=12 task.terms.task.loss=asymmetric",
    "task.terms.<term>.clip": "task=binary data.classes=[blue,red] loop.batch_size=12 task.terms.task.loss=asymmetric task.terms.task.clip=0.3 | task=binary data.classes=[blue,red] loop.batch_size=12 task.terms.task.loss=asymmetric",
    "task.terms.<term>.reduce_classes": "task.terms.task.loss=bce task.terms.task.reduce_classes=sum | task.terms.task.loss=bce",
    "loop.clip_norm": "loop.clip_norm=0.001 optimizer=sgd | optimizer=sgd",
    "loop.precision": "loop.precision=bf16",
    "model.drop_path": "model.drop_path=0.5",
    "optimizer.name": "optimizer.name=lamb",
    "optimizer.weight_decay": "optimizer.weight_decay=5.0",
    "optimizer.momentum": "optimizer=sgd optimizer.momentum=0.0 | optimizer=sgd",
    "optimizer.betas": "optimizer.betas=[0.5,0.6]",
    "optimizer.layer_decay": "optimizer.layer_decay=0.3",
    "optimizer.head_lr": "optimizer.head_lr=0.1",
    "optimizer.lrs": "optimizer.lrs={net.stages.*:0.1}",
    "optimizer.kwargs": "optimizer.kwargs={eps:0.1}",
    "model.freeze.all_but_last_blocks": "model.freeze.all_but_last_blocks=0",
    "model.name": "model.name=test_resnet",
    "model.kwargs": "model.name=test_resnet model.kwargs={channels:[8,8,8,8]} | model.name=test_resnet",
}
RATES = {  # the learning rate, and by it the weights
    "optimizer.lr": "optimizer.lr=2e-3",
    "schedule.name": "schedule.name=constant",
    "schedule.warmup_epochs": "schedule.warmup_epochs=1",
    "schedule.min_lr": "schedule.min_lr=5e-4",
    "schedule.cycle_epochs": "schedule=cosine_restarts schedule.cycle_epochs=1",
    "schedule.cycle_mult": "schedule=cosine_restarts schedule.cycle_epochs=0.34 schedule.cycle_mult=2 | "
    "schedule=cosine_restarts schedule.cycle_epochs=0.34 schedule.cycle_mult=1",
    "schedule.power": "schedule=polynomial schedule.power=3 | schedule=polynomial schedule.power=1",
    "schedule.milestones": "schedule=steps schedule.milestones=[1] | schedule=constant",
    "schedule.factor": "schedule=steps schedule.milestones=[1] schedule.factor=0.5 | "
    "schedule=steps schedule.milestones=[1] schedule.factor=0.1",
    "schedule.peak": "schedule=one_cycle schedule.peak=0.5 | schedule=one_cycle schedule.peak=0.2",
    "schedule.div_factor": "schedule=one_cycle schedule.div_factor=5 | schedule=one_cycle",
    "schedule.final_div_factor": "schedule=one_cycle schedule.final_div_factor=2 | schedule=one_cycle",
    "schedule.patience": "schedule=plateau schedule.patience=0 loop.epochs=4 loop.monitor=val_loss optimizer.lr=1e-3 schedule.factor=0.5 loop.monitor=val_macro_f1 | "
    "schedule=plateau schedule.patience=2 loop.epochs=4 loop.monitor=val_loss optimizer.lr=1e-3 schedule.factor=0.5 loop.monitor=val_macro_f1",
    "loop.epochs": "loop.epochs=3",
}
MEASURED = {  # the training is the same to the bit, what is measured is not
    "augment.eval_crop": "augment.eval_crop=0.6",
    "augment.tta": "augment.tta=ten_crop",
    "loop.ema": "loop.ema=0.9",
    "loop.ema_warmup": "loop.ema=0.999 loop.ema_warmup=false | loop.ema=0.999",
    "loop.average_last": "loop.average_last=2",
}
NOTHING = {  # how it is computed, not what: the numbers stay
    "loop.micro_batch_size": "loop.micro_batch_size=6",
    "loop.accumulate": "loop.accumulate=4",
    "loop.channels_last": "loop.channels_last=false",
    "model.grad_checkpointing": "model.grad_checkpointing=true",
    "loop.log_every_steps": "loop.log_every_steps=2",
    "data.shuffle_window_gb": "data.shuffle_window_gb=1e-4",
}
ARRIVED = {  # and that the key got there: what one sees of it, in the plain run and in the turned one
    "loop.micro_batch_size": (lambda o: o.forwards, 6, 2 * (4 + 4 + 2)),  # 20, 20 and 8 by 6
    "loop.accumulate": (lambda o: o.forwards, 6, 2 * 3 * 4),
    "loop.channels_last": (lambda o: o.channels_last, True, False),
    "model.grad_checkpointing": (lambda o: o.checkpointed, False, True),
    # after 2, 3 (the epoch's last), 4 and 6
    "loop.log_every_steps": (lambda o: len(o.rates), 6, 4),
    # in rows of 32 x 32 pixels; there is but one shard here, so that the order stays
    "data.shuffle_window_gb": (lambda o: o.window_rows, 2_000_000_000 // 3072, 100_000 // 3072),
}
# tested by themselves, where a run of three updates cannot show them: `file: function`, one or several
ELSEWHERE = {
    "augment.views": "test_batches: test_columns_belong_together; "
    "test_augment: test_views_limits_how_many_images_there_are",
    "loop.compile": "test_knobs: test_compile_gives_the_same_numbers",
    "loop.patience": "test_loop: test_early_stopping_and_its_absence",
    "loop.monitor": "test_knobs: test_the_monitor_decides_what_is_best",
    "loop.checkpoint_every_steps": "test_loop: "
    "test_a_run_that_died_ends_with_the_weights_of_one_that_did_not",
    "model._target_": "test_docs: test_the_python_page_runs",
    "model.pretrained": "test_models: test_weights_out_of_reach_name_the_remedy",
    "model.init_from": "test_fit: "
    "test_init_from_takes_over_classes_by_name_and_seen_images_are_named",
    "scaling.sync_batchnorm": "test_config: test_batchnorm_over_workers_needs_whole_updates",
    "task.kind": "test_evaluation: test_a_multi_label_run_from_manifest_to_table; "
    "test_evaluation: test_a_binary_run_is_measured_at_the_threshold_of_its_validation",
    "task.metrics": "test_knobs: test_the_monitor_decides_what_is_best",
    "task.threshold": "test_evaluation: "
    "test_a_binary_run_is_measured_at_the_threshold_of_its_validation",
    "task.terms.<term>.inputs": "test_task: test_rows_without_a_label_teach_by_the_teacher_alone",
    "task.terms.<term>.temperature": "test_knobs: test_the_teachers_temperature",
    "teacher.temperature": "test_knobs: test_the_teachers_temperature",
    "task.terms.<term>.beta": "test_knobs: test_how_a_teacher_teaches",
    "task.terms.<term>.p": "test_distil_losses: test_attention_by_hand_and_what_it_does_not_see",
    "task.terms.<term>.projection": "test_knobs: test_how_a_teacher_teaches",
    "model.preprocessing": "test_patches: test_npr_by_hand_and_of_an_odd_size; "
    "test_patches: test_the_right_diagonal_by_hand",
    "model.input_scale": "test_patches: test_the_scale_of_the_input_is_that_of_the_first_kernel",
    "model.stem_momentum": "test_patches: "
    "test_the_large_ones_names_are_resnets_and_three_kernels_look_around",
}


def turned(knob: str, table: dict[str, str]) -> tuple[list[str], list[str]]:
    changed, _, plain = table[knob].partition(" | ")
    return changed.split(), plain.split()


@pytest.mark.parametrize("knob", PIXELS)
def test_pixels(outcome, knob):
    changed, plain = (outcome(*o) for o in turned(knob, PIXELS))
    assert changed.rates == plain.rates
    assert changed.train_loss != pytest.approx(plain.train_loss, rel=1e-6)


@pytest.mark.parametrize("knob", ORDER)
def test_order(outcome, knob):
    changed, plain = (outcome(*o) for o in turned(knob, ORDER))
    assert changed.train_loss != pytest.approx(plain.train_loss, rel=1e-6)


@pytest.mark.parametrize("knob", GRADIENTS)
def test_gradients(outcome, knob):
    changed, plain = (outcome(*o) for o in turned(knob, GRADIENTS))
    assert changed.rates == plain.rates or knob in ("optimizer.head_lr", "optimizer.layer_decay")
    assert changed.val_loss != pytest.approx(plain.val_loss, rel=1e-6)


@pytest.mark.parametrize("knob", RATES)
def test_rates(outcome, knob):
    changed, plain = (outcome(*o) for o in turned(knob, RATES))
    assert changed.rates[: len(plain.rates)] != pytest.approx(plain.rates, rel=1e-6)


@pytest.mark.parametrize("knob", MEASURED)
def test_what_is_measured(outcome, knob):
    changed, plain = (outcome(*o) for o in turned(knob, MEASURED))
    assert changed.train_loss == plain.train_loss
    assert changed.val_loss != pytest.approx(plain.val_loss, rel=1e-6)


@pytest.mark.parametrize("knob", NOTHING)
def test_how_it_is_computed_changes_no_number(outcome, knob):
    changed, plain = (outcome(*o) for o in turned(knob, NOTHING))
    assert changed.train_loss == pytest.approx(plain.train_loss, abs=1e-4)
    assert changed.val_loss == pytest.approx(plain.val_loss, abs=1e-4)
    seen, before, after = ARRIVED[knob]
    assert (seen(plain), seen(changed)) == (before, after)


def test_the_monitor_decides_what_is_best(outcome):
    chosen = "task.metrics=[balanced_acc,calibration_error]"
    errors = outcome(chosen, "loop.monitor=val_calibration_error", "loop.epochs=4")
    values = [e["val_calibration_error"] for e in errors.epochs]
    assert errors.best == [v == min(values[: i + 1]) for i, v in enumerate(values)]
    recall = outcome(chosen, "loop.monitor=val_balanced_acc", "loop.epochs=4")
    values = [e["val_balanced_acc"] for e in recall.epochs]
    assert recall.best == [i == 0 or v > max(values[:i]) for i, v in enumerate(values)]


@pytest.fixture(scope="module")
def taught(tiny_tree, cache_dir, tmp_path_factory, ray_session) -> tuple[str, str]:
    """What makes a run a student of a teacher."""
    from conftest import tiny_overrides
    from potstill.fit import fit

    runs_dir = tmp_path_factory.mktemp("taught")
    base = tiny_overrides(tiny_tree, cache_dir, runs_dir)
    fit(config_module.compose("train", [*base, "run.name=teacher"]))
    return "task=distil", f"teacher.run={runs_dir / 'teacher'}"


def test_the_teachers_temperature(outcome, taught):
    changed, plain = outcome(*taught, "teacher.temperature=1.5"), outcome(*taught)
    assert changed.rates == plain.rates
    assert changed.val_loss != pytest.approx(plain.val_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("node", "option"),
    [
        ("{loss: dkd, inputs: [logits, teacher.logits, label]}", "beta=0.5"),
        ("{loss: dist, inputs: [logits, teacher.logits]}", "beta=9.0"),
        ("{loss: feature_mse, inputs: [features, teacher.features]}", "projection=mlp"),
    ],
)
def test_how_a_teacher_teaches(outcome, taught, node, option):
    term = f"task.terms.more={node}"
    changed = outcome(*taught, term, f"task.terms.more.{option}")
    plain = outcome(*taught, term)
    assert changed.rates == plain.rates
    assert changed.val_loss != pytest.approx(plain.val_loss, rel=1e-6)


@pytest.mark.slow
def test_compile_gives_the_same_numbers(outcome):
    """The compiler takes most of a minute, hence slow."""
    compiled, plain = outcome("loop.compile=true"), outcome()
    assert (plain.compiled, compiled.compiled) == (False, True)
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-3)
    assert compiled.val_loss == pytest.approx(plain.val_loss, rel=1e-3)


def test_every_knob_is_turned_here():
    tables = (PIXELS, ORDER, GRADIENTS, RATES, MEASURED, NOTHING, ELSEWHERE)
    turned_once = {knob for table in tables for knob in table}
    schema = config_module._documented(config_module.Config(), "train")
    groups = ("augment.", "optimizer.", "schedule.", "loop.", "model.", "task.")
    groups += ("teacher.temperature", "data.shuffle_window_gb", "scaling.sync_batchnorm")
    wanted = {key for key, _, _ in schema if key.startswith(groups)}
    assert turned_once == wanted
    assert set(ARRIVED) == set(NOTHING)


def test_what_is_tested_elsewhere_is_tested_there():
    for where in ELSEWHERE.values():
        for file, _, function in (part.partition(": ") for part in where.split("; ")):
            tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
            there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in there, f"{file}: {function}"
