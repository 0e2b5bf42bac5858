"""The loop without Ray: a local session, small models, milliseconds."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from potstill import runs
from potstill.config import Augment as AugmentConfig
from potstill.config import Loop, Optimizer, Schedule
from potstill.data.augment import Augment
from potstill.data.batches import Batches
from potstill.errors import Stopped, UserError
from potstill.loop import LossNotFinite, Stage, Training
from potstill.optim import LearningRate, build_optimizer
from potstill.task import Task, Teacher, build_terms

CLASSES = ["blue", "green", "red"]
CPU = torch.device("cpu")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICES = [CPU, pytest.param(torch.device("cuda:0"), marks=needs_gpu)]


class Colours:
    """A reader of 8 x 8 images, each of one noisy colour."""

    def __init__(self, n: int = 50, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.ids = np.arange(n, dtype=np.int64)
        self.labels = self.ids % 3
        self.weights = np.ones(n, np.float32)
        base = np.eye(3)[self.labels][:, ::-1] * 120 + 60
        self.images = np.clip(
            base[:, None, None, :] + rng.normal(0, 50, (n, 8, 8, 3)), 0, 255
        ).astype(np.uint8)
        self.shard_rows = [16] * (n // 16) + ([n % 16] if n % 16 else [])

    def read(self, rows):
        return self.images[rows]

    def targets(self, rows):
        return self.labels[rows]


class Net(nn.Module):
    def __init__(self, norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(8, 3)

    def forward(self, batch):
        features = self.norm(self.conv(batch["image"])).relu().mean((2, 3))
        return {"features": features, "logits": self.fc(self.drop(features))}


class LocalSession:
    rank, world_size = 0, 1

    def __init__(
        self,
        run_dir: Path,
        stop_at: int | None = None,
        die_at: int | None = None,
        save_at: int | None = None,
    ) -> None:
        run_dir.mkdir(exist_ok=True)
        self.run_dir, self.stop_at, self.die_at, self.step = run_dir, stop_at, die_at, 0
        self.save_at = save_at

    def log(self, record):
        runs.append_records(self.run_dir, [record])
        if self.die_at is not None and record["kind"] == "step" and record["step"] >= self.die_at:
            raise KeyboardInterrupt

    def report(self, metrics, snapshot):
        kept = runs.save_checkpoint(
            self.run_dir,
            snapshot.step,
            snapshot.model_state,
            snapshot.state,
            snapshot.meta,
            snapshot.files,
        )
        runs.prune_checkpoints(self.run_dir, kept)

    def resume_from(self):
        return runs.newest_checkpoint(self.run_dir)

    def asked(self):
        self.step += 1
        if self.step == self.save_at:
            return "save"
        return "stop" if self.stop_at is not None and self.step >= self.stop_at else ""


TERMS = {"task": {"loss": "cross_entropy", "inputs": ["logits", "label"], "weight": 1.0}}


def run(
    run_dir: Path,
    *,
    session=None,
    net=None,
    terms=None,
    teachers=(),
    optimizer=None,
    schedule=None,
    attempt=None,
    device=CPU,
    augment=None,
    val_batches=None,
    metrics=(),
    stages=None,
    **loop,
):
    cfg = Loop(
        **{
            "epochs": 3,
            "batch_size": 16,
            "log_every_steps": 1,
            "checkpoint_every_steps": 100,
            **loop,
        }
    )
    session = session or LocalSession(run_dir)
    torch.manual_seed(cfg.seed)
    task = Task((net or Net()).to(device), build_terms(terms or TERMS))
    batches = Batches(
        Colours(),
        cfg.batch_size,
        seed=cfg.seed,
        shuffle=True,
        sampler=cfg.sampler,
        steps_per_epoch=cfg.steps_per_epoch,
    )

    def begin():
        further = list(task.projections.parameters())
        opt = build_optimizer(
            task.model, {"fc.weight", "fc.bias"}, optimizer or Optimizer(lr=0.02), device, further
        )
        rising = cfg.monitor != "val_loss"
        return opt, LearningRate(opt, schedule or Schedule(), batches.steps, cfg.epochs, rising)

    augment = augment or Augment(AugmentConfig(flip=0.5, crop_scale=[0.7, 1.0]), 8, cfg.seed)
    one = Stage(cfg.epochs, task.terms, augment, begin, cfg.patience)
    progress = Training(
        task,
        teachers,
        stages(task, begin, augment) if stages else [one],
        batches,
        val_batches or (lambda size: Batches(Colours(30, seed=1), size, seed=0, shuffle=False)),
        cfg,
        session,
        device,
        CLASSES,
        metrics,
        attempt=attempt or 1 + runs.last_attempt(run_dir),
    ).run()
    return task, progress


def records(run_dir: Path, kind: str):
    return [r for r in runs.read_journal(run_dir) if r["kind"] == kind]


def weights(run_dir: Path):
    return runs.pick_checkpoint(run_dir, "last").model_state()


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_records_every_epoch(tmp_path):
    _, progress = run(tmp_path / "r", epochs=6)
    epochs = records(tmp_path / "r", "epoch")
    assert [e["epoch"] for e in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["train_loss"] < 0.7 * epochs[0]["train_loss"]
    assert epochs[-1]["val_top1_acc"] > 60
    assert progress.best is not None
    assert progress.best["value"] == max(e["val_top1_acc"] for e in epochs)
    assert all(e["val_top5_acc"] >= e["val_top1_acc"] for e in epochs)
    assert epochs[0]["top_k"] == 2
    lrs = [s["lr"] for s in records(tmp_path / "r", "step")]
    assert lrs[0] == 0.02
    assert all(a > b for a, b in itertools.pairwise(lrs))


def test_the_epochs_loss_is_the_mean_of_its_samples(tmp_path):
    """50 samples in batches of 16, 16, 16, 2: the mean of batch means would be another number."""
    frozen = Net(norm=False)
    run(tmp_path / "r", net=frozen, epochs=1, optimizer=Optimizer(lr=1e-30, weight_decay=0))
    whole = Colours()
    augment = Augment(AugmentConfig(flip=0.5, crop_scale=[0.7, 1.0]), 8, 0)
    batch = next(iter(Batches(whole, 50, seed=0, shuffle=True).epoch(0)))
    with torch.no_grad():
        logits = frozen({"image": augment.train(batch["image"], batch["id"], batch["view"])})[
            "logits"
        ]
    by_hand = nn.functional.cross_entropy(logits, batch["label"]).item()
    assert records(tmp_path / "r", "epoch")[0]["train_loss"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("parts", [{"micro_batch_size": 5}, {"accumulate": 3}])
def test_accumulation_changes_no_number(tmp_path, parts):
    run(tmp_path / "whole", net=_seeded(norm=False))
    run(tmp_path / "parts", net=_seeded(norm=False), **parts)
    for a, b in zip(
        records(tmp_path / "whole", "epoch"), records(tmp_path / "parts", "epoch"), strict=True
    ):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


def _seeded(**options) -> Net:
    torch.manual_seed(5)
    return Net(**options)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(tmp_path, precision, device):
    run(tmp_path / "r", net=_seeded(), precision=precision, epochs=6, device=device)
    losses = [e["train_loss"] for e in records(tmp_path / "r", "epoch")]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("die_at", [6, 8])
def test_a_run_that_died_ends_with_the_weights_of_one_that_did_not(tmp_path, precision, die_at):
    """Dropout, batch statistics, Adam and the gradient scaler's state included."""
    options = {"precision": precision, "checkpoint_every_steps": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, net=_seeded(dropout=0.3), **options)
    with pytest.raises(KeyboardInterrupt):
        run(
            broken, session=LocalSession(broken, die_at=die_at), net=_seeded(dropout=0.3), **options
        )
    run(broken, net=_seeded(dropout=0.3), **options)
    assert same(weights(whole), weights(broken))
    told = [[r["train_loss"] for r in records(d, "epoch")] for d in (whole, broken)]
    assert told[0] == pytest.approx(told[1], rel=1e-12)
    steps = [[r["step"] for r in records(d, "step")] for d in (whole, broken)]
    assert steps[0] == steps[1]
    assert (
        records(broken, "attempt")[1]["resumed_from"]
        == {6: "step-00000004", 8: "step-00000006"}[die_at]
    )


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    run(tmp_path / "r", epochs=2)
    newest = tmp_path / "r" / "checkpoints" / "step-00000008"
    (newest / "model.safetensors").write_bytes(b"torn")
    run(tmp_path / "r", epochs=3)
    second = records(tmp_path / "r", "attempt")[1]
    assert second["resumed_from"] == "step-00000004"
    assert second["passed_over"] == ["step-00000008"]
    assert [e["epoch"] for e in records(tmp_path / "r", "epoch")] == [1, 2, 3]


def test_a_validation_loss_that_is_not_finite_stops_too(tmp_path):
    class BlindInEval(Net):
        def forward(self, batch):
            out = super().forward(batch)
            return out if self.training else {"logits": out["logits"] * float("nan")}

    with pytest.raises(LossNotFinite, match="the validation loss is nan at step 4"):
        run(tmp_path / "r", net=BlindInEval())
    assert records(tmp_path / "r", "epoch") == []


def test_progress_is_kept_where_newer_checkpoints_are_damaged(tmp_path):
    """What stands beyond the point that a run goes on from does not push its new checkpoints out."""
    run(tmp_path / "r", epochs=2, checkpoint_every_steps=3)
    folders = sorted((tmp_path / "r" / "checkpoints").glob("step-*"))
    for folder in folders[-2:]:
        (folder / "state.pt").write_bytes(b"torn")
    session = LocalSession(tmp_path / "r", stop_at=2)
    with pytest.raises(Stopped):
        run(tmp_path / "r", session=session, checkpoint_every_steps=1)
    newest, passed_over = runs.newest_checkpoint(tmp_path / "r")
    assert newest is not None
    assert newest.step == records(tmp_path / "r", "attempt")[1]["step"] + 2
    assert passed_over == []


@pytest.mark.parametrize("stop_at", [5, 8])
def test_stopping_saves_at_once_and_goes_on(tmp_path, stop_at):
    """In the middle of an epoch (4 updates) or at its end, whether or not that update is logged."""
    session = LocalSession(tmp_path / "r", stop_at=stop_at)
    with pytest.raises(Stopped, match=f"stopped at step {stop_at} and saved"):
        run(tmp_path / "r", session=session, net=_seeded(), log_every_steps=2)
    run(tmp_path / "r", net=_seeded(), log_every_steps=2)
    run(tmp_path / "whole", net=_seeded())
    assert same(weights(tmp_path / "r"), weights(tmp_path / "whole"))


def test_a_warning_saves_within_the_epoch_and_changes_nothing_else(tmp_path):
    session = LocalSession(tmp_path / "r", save_at=6)
    run(tmp_path / "r", session=session, net=_seeded())
    saved = [(r["step"], r["epoch_done"]) for r in records(tmp_path / "r", "checkpoint")]
    assert (6, False) in saved
    run(tmp_path / "whole", net=_seeded())
    assert same(weights(tmp_path / "r"), weights(tmp_path / "whole"))


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(tmp_path):
    class Poisoned(Net):
        updates = 0

        def forward(self, batch):
            out = super().forward(batch)
            self.updates += self.training
            return {**out, "logits": out["logits"] * (float("nan") if self.updates > 6 else 1.0)}

    with pytest.raises(
        LossNotFinite,
        match=r"training loss is nan at step 7 \(epoch 2\); last good checkpoint: step-00000004",
    ):
        run(tmp_path / "r", net=Poisoned())
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "r").values())


def test_the_gradient_scaler_is_used(tmp_path):
    """Gradients that overflow in fp16 make it halve its scale and skip the update."""

    class Steep(Net):
        def forward(self, batch):
            return {"logits": super().forward(batch)["logits"] * 1000.0}

    run(tmp_path / "r", net=Steep(), precision="fp16", epochs=1)
    scales = [s["loss_scale"] for s in records(tmp_path / "r", "step")]
    assert scales[-1] < 65536
    run(tmp_path / "plain", epochs=1)
    assert "loss_scale" not in records(tmp_path / "plain", "step")[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_bounds_the_update_after_unscaling(tmp_path, precision):
    """Plain SGD at rate 1: the update is the gradient, and its norm is the limit."""
    net = _seeded(norm=False)
    before = [p.detach().clone() for p in net.parameters()]
    sgd = Optimizer(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    options = {"optimizer": sgd, "schedule": Schedule("constant"), "epochs": 1, "batch_size": 50}
    run(tmp_path / "r", net=net, precision=precision, clip_norm=1e-3, **options)
    moved = (
        torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), before, strict=True)])
        .norm()
        .item()
    )
    assert moved == pytest.approx(1e-3, rel=0.02)


def test_early_stopping_and_its_absence(tmp_path):
    still = {"optimizer": Optimizer(lr=1e-30, weight_decay=0), "epochs": 6, "net": Net(norm=False)}
    _, progress = run(tmp_path / "patient", patience=2, **still)
    assert (progress.epoch, progress.bad_epochs) == (3, 2)
    _, progress = run(tmp_path / "off", patience=None, **still)
    assert progress.epoch == 6


def test_a_plateau_schedule_waits_for_the_monitor(tmp_path):
    still = {
        "optimizer": Optimizer(lr=1e-12, weight_decay=0),
        "net": Net(norm=False),
        "monitor": "val_loss",
    }
    run(tmp_path / "r", schedule=Schedule("plateau", factor=0.5, patience=0), epochs=4, **still)
    lrs = [e["lr"] for e in records(tmp_path / "r", "epoch")]
    assert lrs[0] == 1e-12
    assert lrs[-1] < lrs[0]


def test_distillation_moves_the_student_towards_its_teacher(tmp_path):
    torch.manual_seed(9)
    teacher = Teacher(Net(), "teacher", [0, 1, 2])
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    terms = {
        "distil": {
            "loss": "kl",
            "inputs": ["logits", "teacher.logits"],
            "weight": 1.0,
            "temperature": 4.0,
        }
    }
    run(
        tmp_path / "r",
        terms=terms,
        teachers=[teacher],
        epochs=8,
        optimizer=Optimizer(lr=0.02, weight_decay=0),
    )
    told = [e["terms"]["distil"]["loss"] for e in records(tmp_path / "r", "epoch")]
    assert told[-1] < 0.3 * told[0]
    assert same(before, teacher.state_dict())
    assert all(p.grad is None for p in teacher.parameters())


def test_predictions_are_kept_with_an_epochs_checkpoint(tmp_path):
    run(tmp_path / "r", epochs=1)
    kept = np.load(runs.pick_checkpoint(tmp_path / "r", "best").folder / "val_predictions.npz")
    assert kept["id"].tolist() == list(range(30))
    right = 100 * (kept["label"] == kept["prediction"]).mean()
    assert records(tmp_path / "r", "epoch")[0]["val_top1_acc"] == pytest.approx(right, rel=1e-5)


def test_collapse_is_named_in_the_epochs_record(tmp_path):
    class Constant(Net):
        def forward(self, batch):
            out = super().forward(batch)
            return {"logits": out["logits"] * 1e-6 + torch.tensor([0.0, 5.0, 0.0])}

    run(tmp_path / "r", net=Constant(), epochs=1)
    assert [w["name"] for w in records(tmp_path / "r", "epoch")[0]["warnings"]] == ["collapsed"]


def augment_of(**keys) -> Augment:
    return Augment(AugmentConfig(**keys), 8, 0)


def trained_on(run_dir: Path) -> dict[str, torch.Tensor]:
    """The raw weights of the last checkpoint, where averaged ones are what is kept."""
    return runs.pick_checkpoint(run_dir, "last").state()["averager"]["tensors"]


def test_averaged_weights_are_what_is_measured_and_kept(tmp_path):
    """The average of the last two epochs' ends, worked out from a run that kept every epoch's weights."""
    ends = []

    class Keeping(LocalSession):
        def report(self, metrics, snapshot):
            super().report(metrics, snapshot)
            ends.append({k: v.clone() for k, v in snapshot.model_state.items()})

    run(tmp_path / "plain", session=Keeping(tmp_path / "plain"), net=_seeded(norm=False))
    run(tmp_path / "mean", net=_seeded(norm=False), average_last=2)
    mean = {k: (ends[1][k] + ends[2][k]) / 2 for k in ends[0]}
    for name, value in weights(tmp_path / "mean").items():
        assert torch.allclose(value, mean[name], atol=1e-6), name
    assert same(trained_on(tmp_path / "mean"), ends[2])
    measured = [records(tmp_path / d, "epoch")[-1] for d in ("plain", "mean")]
    assert measured[0]["train_loss"] == measured[1]["train_loss"]
    assert measured[0]["val_loss"] != measured[1]["val_loss"]


@pytest.mark.parametrize("average", [{"ema": 0.9}, {"average_last": 2}])
@pytest.mark.parametrize("die_at", [6, 10])
def test_an_average_goes_on_where_it_stopped(tmp_path, average, die_at):
    options = {"checkpoint_every_steps": 3, **average}
    run(tmp_path / "whole", net=_seeded(), **options)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(broken, session=LocalSession(broken, die_at=die_at), net=_seeded(), **options)
    run(broken, net=_seeded(), **options)
    assert same(weights(tmp_path / "whole"), weights(broken))
    assert same(trained_on(tmp_path / "whole"), trained_on(broken))


def test_an_average_leaves_the_training_alone(tmp_path):
    run(tmp_path / "plain", net=_seeded())
    run(tmp_path / "ema", net=_seeded(), ema=0.9)
    assert same(weights(tmp_path / "plain"), trained_on(tmp_path / "ema"))
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "ema"))


def test_an_epoch_may_be_so_many_steps(tmp_path):
    run(tmp_path / "r", steps_per_epoch=6, epochs=2)
    assert [e["step"] for e in records(tmp_path / "r", "epoch")] == [6, 12]
    assert records(tmp_path / "r", "attempt")[0]["total_steps"] == 12


@pytest.mark.parametrize("parts", [{"micro_batch_size": 6}, {"accumulate": 3}])
def test_mixing_does_not_depend_on_the_parts_of_an_update(tmp_path, parts):
    mixing = {"augment": augment_of(mixup=0.4, cutmix=1.0), "epochs": 2}
    run(tmp_path / "whole", net=_seeded(norm=False), **mixing)
    run(tmp_path / "parts", net=_seeded(norm=False), **mixing, **parts)
    run(tmp_path / "plain", net=_seeded(norm=False), augment=augment_of(), epochs=2)
    told = [[e["train_loss"] for e in records(tmp_path / d, "epoch")] for d in ("whole", "parts")]
    assert told[0] == pytest.approx(told[1], abs=1e-5)
    assert told[0][0] != pytest.approx(records(tmp_path / "plain", "epoch")[0]["train_loss"])


def test_mixing_ends_before_the_last_epochs(tmp_path):
    """Mixed images have a larger loss than their own plain ones: the last epoch's falls at once."""
    off = augment_of(mixup=5.0, mix_off_epochs=1)
    still = {"optimizer": Optimizer(lr=1e-30, weight_decay=0), "net": _seeded(norm=False)}
    run(tmp_path / "off", augment=off, epochs=2, **still)
    run(tmp_path / "plain", augment=augment_of(), epochs=2, **still)
    told = [[e["train_loss"] for e in records(tmp_path / d, "epoch")] for d in ("off", "plain")]
    assert told[0][0] != pytest.approx(told[1][0], rel=1e-5)
    assert told[0][1] == pytest.approx(told[1][1], rel=1e-5)


def test_images_grow_and_validation_sees_the_whole_size(tmp_path):
    seen = []

    class Looking(Net):
        def forward(self, batch):
            seen.append((self.training, batch["image"].shape[-1]))
            return super().forward(batch)

    grow = Augment(AugmentConfig(image_px=48, start_px=16, grow_until=0.5), 8, 0)
    run(tmp_path / "r", net=Looking(), augment=grow, epochs=4)
    training = [px for train, px in seen if train][::4]
    assert training == [16, 32, 48, 48]
    assert {px for train, px in seen if not train} == {48}
    assert [e["image_px"] for e in records(tmp_path / "r", "epoch")] == training


def test_validation_averages_the_views(tmp_path):
    still = {
        "optimizer": Optimizer(lr=1e-30, weight_decay=0),
        "epochs": 1,
        "net": _seeded(norm=False),
    }
    run(tmp_path / "one", augment=augment_of(), **still)
    run(tmp_path / "two", augment=augment_of(tta="flip"), **still)
    one, two = (records(tmp_path / d, "epoch")[0] for d in ("one", "two"))
    assert one["train_loss"] == two["train_loss"]
    assert one["val_loss"] != two["val_loss"]
    net = still["net"].eval()
    losses = []
    for batch in Batches(Colours(30, seed=1), 16, seed=0, shuffle=False).epoch(0):
        image = augment_of().eval(batch["image"])
        both = [net({"image": i})["logits"].softmax(1) for i in (image, image.flip(3))]
        mean = torch.stack(both).mean(0).log()
        losses += nn.functional.nll_loss(mean, batch["label"], reduction="none").tolist()
    assert two["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


class Validated(Net):
    """Keeps the sizes of the batches that it was measured on."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.sizes: list[int] = []

    def forward(self, batch):
        if not self.training:
            self.sizes.append(len(batch["image"]))
        return super().forward(batch)


@pytest.mark.parametrize("parts", [{}, {"micro_batch_size": 4}, {"accumulate": 4}])
def test_validation_takes_twice_a_forward_pass(tmp_path, parts):
    net = Validated()
    run(tmp_path / "r", net=net, epochs=1, **parts)
    assert net.sizes == ([8, 8, 8, 6] if parts else [30])


def test_views_are_seen_and_let_go_one_after_another(tmp_path):
    seen, alive = [], []

    class Looking(Net):
        def forward(self, batch):
            if not self.training:
                seen.append(weakref.ref(batch["image"]))
                alive.append(sum(view() is not None for view in seen))
            return super().forward(batch)

    run(tmp_path / "r", net=Looking(), augment=augment_of(tta="ten_crop"), epochs=1)
    assert len(seen) == 10
    assert max(alive) <= 2, "a view, and the one that it mirrors"


@pytest.mark.parametrize("die_at", [5, 8])
def test_a_recipe_that_died_within_an_epoch_ends_with_the_same_bits(tmp_path, die_at):
    """Epochs of 6 updates over passes of 4: what was drawn, seen and mixed is told by the position alone."""
    options = {"checkpoint_every_steps": 1, "steps_per_epoch": 6, "sampler": "class_balanced"}

    def go(folder: Path, session=None) -> None:
        recipe = augment_of(crop_scale=[0.7, 1.0], mixup=0.4, cutmix=1.0, erasing=0.5)
        run(folder, session=session, net=_seeded(dropout=0.3), augment=recipe, **options)

    go(tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        go(broken, LocalSession(broken, die_at=die_at))
    go(broken)
    assert records(broken, "attempt")[1]["resumed_from"] == f"step-{die_at - 1:08d}"
    assert same(weights(tmp_path / "whole"), weights(broken))
    told = [[r["train_loss"] for r in records(tmp_path / d, "epoch")] for d in ("whole", "broken")]
    assert told[0] == pytest.approx(told[1], rel=1e-12)


def test_an_undefined_monitor_is_named_and_any_number_is_better(tmp_path):
    """Validation of one class has no AUC: in the first, second and last of five epochs."""
    blue = Colours(30, seed=1)
    blue.labels = np.zeros_like(blue.labels)
    due = iter([blue, blue, Colours(30, seed=1), Colours(30, seed=1), blue])
    _, progress = run(
        tmp_path / "r",
        val_batches=lambda size: Batches(next(due), size, seed=0, shuffle=False),
        metrics=["auc"],
        monitor="val_auc",
        epochs=5,
        net=_seeded(norm=False),
        optimizer=Optimizer(lr=1e-12, weight_decay=0),
        schedule=Schedule("plateau", factor=0.5, patience=0),
    )
    epochs = records(tmp_path / "r", "epoch")
    assert [e["best"] for e in epochs] == [True, False, True, False, False]
    named = ["monitor_undefined" in [w["name"] for w in e["warnings"]] for e in epochs]
    assert named == [True, True, False, False, True]
    assert [e["lr"] for e in epochs] == [1e-12] * 4 + [5e-13], "the plateau waits for numbers alone"
    assert progress.best is not None
    assert progress.best["epoch"] == 3
    assert progress.best["value"] == epochs[2]["val_auc"]


def test_auto_takes_what_memory_holds_and_keeps_to_it(tmp_path, monkeypatch):
    from potstill import memory

    run(tmp_path / "roomy", net=_seeded(), micro_batch_size="auto", epochs=1)
    assert records(tmp_path / "roomy", "attempt")[0]["micro_batch_size"] == 16
    run(tmp_path / "plain", net=_seeded(), epochs=1)
    assert same(weights(tmp_path / "roomy"), weights(tmp_path / "plain")), "trying leaves no trace"
    needed = []
    saved = memory.saved_bytes
    monkeypatch.setattr(
        memory, "saved_bytes", lambda *a: needed.append((a[1], saved(*a))) or needed[-1][1]
    )
    run(tmp_path / "seen", net=_seeded(), micro_batch_size="auto", epochs=1)
    of_two, of_four = dict(needed)[2], dict(needed)[4]
    for_sixteen = 2 * (of_two + 14 * (of_four - of_two) / 2)
    of_adam = 2 * sum(p.nbytes for p in Net().parameters())
    for room, chosen in ((for_sixteen + of_adam + 1, 16), (for_sixteen + of_adam - 1, 8)):
        folder = tmp_path / f"room for {chosen}"
        monkeypatch.setattr(memory, "free_bytes", lambda room=room: room / memory.MARGIN)
        net = Validated()
        run(folder, net=net, micro_batch_size="auto", epochs=1)
        assert records(folder, "attempt")[0]["micro_batch_size"] == chosen
        assert net.sizes == ([30] if chosen == 16 else [16, 14]), "validation holds to it, too"
    monkeypatch.undo()
    run(tmp_path / "room for 8", net=_seeded(), micro_batch_size="auto", epochs=2)
    assert records(tmp_path / "room for 8", "attempt")[1]["micro_batch_size"] == 8
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    with pytest.raises(UserError, match="micro_batch_size=auto found no room for two samples"):
        run(tmp_path / "none", net=_seeded(), micro_batch_size="auto")
