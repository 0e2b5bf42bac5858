"""Soft labels: a teacher's outputs for repeatable crops, written by Ray Data and read instead of a teacher."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import run_job, tiny_overrides, write_tree
from potstill import runs, soft_labels
from potstill.assemble import load_model
from potstill.config import Config, compose
from potstill.data.augment import Augment
from potstill.data.cache import Cache, open_cache
from potstill.data.prepare import check, prepare
from potstill.errors import UserError
from potstill.fit import fit
from potstill.handover import Mark, marked
from potstill.soft_labels import SoftLabels

TERMS = "task.terms.features={loss: feature_mse, inputs: [features, teacher.features], weight: 0.1}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soft")


@pytest.fixture(scope="module")
def overrides(place: Path, tiny_tree: Path, cache_dir: Path, ray_session) -> list[str]:
    return tiny_overrides(tiny_tree, cache_dir, place / "runs")


@pytest.fixture(scope="module")
def teacher(overrides: list[str]) -> Path:
    """A run of the same classes."""
    config = compose("train", [*overrides, "run.name=teacher"])
    fit(config)
    return Path(config.runs.dir) / "teacher"


@pytest.fixture(scope="module")
def make(place: Path, overrides: list[str], teacher: Path):
    """`make("augment.views=3", …)`: a student's config, whose set has five unlabelled images besides."""
    unlabelled = write_tree(place / "more", train=2, val=1, seed=7) / "train" / "red"

    def config_of(*more: str) -> Config:
        own = [
            f"soft_labels.dir={place / 'soft'}",
            f"teacher.run={teacher}",
            f"data.unlabeled={unlabelled}",
        ]
        return compose(
            "soft_labels", [*overrides, "task=distil", "augment.views=2", TERMS, *own, *more]
        )

    return config_of


@pytest.fixture(scope="module")
def written(make) -> Path:
    """Soft labels in shards of 16 images, written by Ray Data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soft_labels, "SMALL_SHARD_ROWS", 16)
        return soft_labels.soft_labels(make())


def cache_of(config: Config) -> Cache:
    return open_cache(prepare(config.data, config.cache).cache_dir)


def computed(config: Config, teacher: Path, cache: Cache, view: int) -> dict[str, torch.Tensor]:
    """What the teacher says of a view of every training image."""
    reader = cache.split("train")
    images = torch.from_numpy(reader.read(np.arange(len(reader)))).permute(0, 3, 1, 2)
    augment = Augment(config.augment, config.data.decode.image_px, config.loop.seed)
    ids = torch.from_numpy(reader.ids)
    model = load_model(teacher)[0].eval()
    with torch.no_grad():
        return model({"image": augment.train(images, ids, torch.full_like(ids, view))})


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process do what the actors do."""

    def run(config, job, shards):
        told = json.dumps({**job, "use_gpu": False, "cpus": 1, "path": []})
        with marked(Path(job["folder"])) as mark:
            for name, first, end in shards:
                row = {"name": name, "first": first, "end": end}
                written = soft_labels._write_row(row, told, mark, None)
                description = json.loads(written["description"])
                if "error" in description:
                    raise UserError(description["error"])
                yield description

    monkeypatch.setattr(soft_labels, "_run", run)


# --------------------------------------------------------------------------------------------- numbers
def test_what_is_read_is_what_the_teacher_says_of_that_crop(make, teacher, written):
    config = make()
    cache = cache_of(config)
    soft = SoftLabels.open(written, verify=True)
    soft.check(config, cache, cache.classes)
    ids = cache.split("train").ids
    assert (cache.split("train").labels < 0).sum() == 2  # unlabelled images have outputs, too
    assert len(soft.manifest["shards"]) == 4
    assert soft.views == 2
    both = [computed(config, teacher, cache, view) for view in (0, 1)]
    assert (both[0]["logits"] - both[1]["logits"]).abs().max() > 0.01  # crops do differ
    rng = np.random.default_rng(0)
    rows, views = rng.integers(len(ids), size=200), rng.integers(2, size=200)
    found = soft.columns(ids[rows], views)
    assert sorted(found) == ["teacher.features", "teacher.logits"]
    for name in ("logits", "features"):
        expected = torch.stack([both[v][name][r] for r, v in zip(rows, views, strict=True)])
        assert found[f"teacher.{name}"].dtype == torch.float32
        torch.testing.assert_close(found[f"teacher.{name}"], expected, atol=1e-3, rtol=1e-3)


def test_a_batch_without_images_is_a_batch(written):
    found = SoftLabels.open(written).columns(np.empty(0, np.int64), np.empty(0, np.int64))
    assert found["teacher.logits"].shape == (0, 4)


def test_it_travels_as_its_folder(written):
    soft = SoftLabels.open(written)
    ids, views = soft.ids[5:9], np.array([0, 1, 1, 0])
    again = pickle.loads(pickle.dumps(soft))
    assert len(pickle.dumps(soft)) < 500
    torch.testing.assert_close(again.columns(ids, views), soft.columns(ids, views))


def test_an_image_that_is_not_there_is_named(written):
    soft = SoftLabels.open(written)
    with pytest.raises(UserError, match=r"has no outputs for image 12345; run jobs/soft_labels"):
        soft.columns(np.array([soft.ids[0], 12345]), np.array([0, 0]))


def test_the_top_k_keep_their_probabilities_and_the_rest_is_even():
    """Logits log(8, 4, 2, 1, 1): of 16 the two best have 8 and 4, the other three share 4."""
    logits = torch.tensor([[1.0, 8.0, 2.0, 4.0, 1.0]]).log() + 3
    packed = soft_labels._packed("teacher.logits", logits, 2)
    classes = packed["teacher.logits:class"]
    assert classes.tolist() == [[1, 3]]
    kept = packed["teacher.logits"]
    assert kept.dtype == torch.float16
    full = soft_labels.spread_rest(kept.float(), classes, 5).exp()
    expected = torch.tensor([[4 / 48, 8 / 16, 4 / 48, 4 / 16, 4 / 48]])
    torch.testing.assert_close(full, expected, atol=1e-3, rtol=0)


def test_top_k_of_many_classes_sums_to_one_at_every_temperature():
    torch.manual_seed(0)
    logits = torch.randn(50, 300) * 5
    packed = soft_labels._packed("teacher.logits", logits, 10)
    classes = packed["teacher.logits:class"]
    full = soft_labels.spread_rest(packed["teacher.logits"].float(), classes, 300)
    torch.testing.assert_close(full.exp().sum(dim=1), torch.ones(50), atol=2e-3, rtol=0)
    exact = logits.log_softmax(dim=1)
    torch.testing.assert_close(full.gather(1, classes), exact.gather(1, classes), atol=0.01, rtol=0)
    assert torch.equal(classes, logits.topk(10).indices)
    left_out = torch.ones(50, 300, dtype=torch.bool).scatter_(1, classes, False)
    rest = full[left_out].view(50, 290)
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest))
    # no class of the rest is above one that was kept
    assert (rest[:, 0] <= full.gather(1, classes).min(dim=1).values + 1e-3).all()


def test_a_sure_teacher_is_kept_without_infinities():
    packed = soft_labels._packed("teacher.logits", torch.tensor([[9e4, 0.0, 0.0, -math.inf]]), 2)
    classes = packed["teacher.logits:class"]
    full = soft_labels.spread_rest(packed["teacher.logits"].float(), classes, 4)
    assert full.isfinite().all()
    assert full.softmax(dim=1)[0].tolist() == [1, 0, 0, 0]


def test_what_16_bits_do_not_hold_is_refused():
    with pytest.raises(UserError, match=r"teacher\.map must be within ±65504 .* got 70000"):
        soft_labels._packed("teacher.map", torch.tensor([[1.0, -7e4]]), None)
    with pytest.raises(UserError, match=r"teacher\.logits must be numbers, got NaN"):
        soft_labels._packed("teacher.logits", torch.tensor([[1.0, math.nan, 0]]), 1)


def test_top_k_is_written_and_read(make, teacher, written, monkeypatch, capsys):
    without_ray(monkeypatch)
    config = make("soft_labels.top_k=2")
    folder = soft_labels.soft_labels(config)
    assert folder != written
    printed = capsys.readouterr().out
    # 8 bytes of an id, and in each view 2 classes and 3 numbers, and 64 features
    width = SoftLabels.open(folder).manifest["columns"]["teacher.features"]["shape"][0]
    size = 50 * (8 + 2 * 2 * (2 + 3 + width)) / 1e6
    assert (
        f"50 images x 2 views x teacher.features ({width}), teacher.logits (4, the top 2)"
        in printed
    )
    assert f"{size:,.2f} MB in {folder}" in printed
    cache = cache_of(config)
    soft = SoftLabels.open(folder)
    soft.check(config, cache, cache.classes)
    exact = computed(config, teacher, cache, 1)["logits"].log_softmax(dim=1)
    found = soft.columns(cache.split("train").ids, np.ones(50, np.int64))["teacher.logits"]
    top = exact.topk(2).indices
    torch.testing.assert_close(found.gather(1, top), exact.gather(1, top), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(50), atol=2e-3, rtol=0)
    mse = "task.terms.more={loss: embedding_mse, inputs: [logits, teacher.logits], weight: 1}"
    with pytest.raises(UserError, match=r"task\.terms\.more\.loss .* only the top 2 of teacher"):
        soft.check(make(mse), cache, cache.classes)


def test_without_anything_random_there_is_one_view(make, teacher, monkeypatch):
    without_ray(monkeypatch)
    config = make("augment.crop_scale=[1.0,1.0]", "augment.flip=0", "augment.views=null")
    folder = soft_labels.soft_labels(config)
    soft, cache = SoftLabels.open(folder), cache_of(config)
    assert soft.views == 1
    config.loop.seed = 9  # which moves nothing
    soft.check(config, cache, cache.classes)
    ids = cache.split("train").ids
    found = soft.columns(ids, np.full(len(ids), 1 << 40))["teacher.logits"]
    expected = computed(config, teacher, cache, 0)["logits"]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_training_from_soft_labels_is_training_with_the_teacher(make, teacher, written):
    """Random crops and 2 views; unlabelled images learn from the teacher alone."""
    online = make("run.name=online")
    soft = ["teacher.run=null", f"teacher.soft_labels={written}"]
    cached = make("run.name=cached", *soft)
    losses = []
    for config in (online, cached):
        fit(config)
        history = runs.read_json(Path(config.runs.dir) / config.run.name / "training_history.json")
        losses.append(history["train_loss"] + history["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0][0] != losses[0][2]


# ------------------------------------------------------------------------------------- once, and whole
def test_only_what_is_missing_or_damaged_is_written_again(make, written, monkeypatch, capsys):
    without_ray(monkeypatch)
    monkeypatch.setattr(soft_labels, "SMALL_SHARD_ROWS", 16)
    soft = SoftLabels.open(written)
    ids, views = np.repeat(soft.ids, 2), np.tile([0, 1], len(soft.ids))
    said = soft.columns(ids, views)
    before = {f.name: f.read_bytes() for f in written.glob("shard-*.arrow")}
    (written / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"teacher\.soft_labels: .* is not finished: it has no man"):
        SoftLabels.open(written)
    times = {f.name: f.stat().st_mtime_ns for f in written.glob("shard-*.arrow")}
    (written / "shard-00001.arrow").unlink()
    damaged = bytearray(before["shard-00002.arrow"])
    damaged[len(damaged) // 2] ^= 1
    (written / "shard-00002.arrow").write_bytes(damaged)
    assert soft_labels.soft_labels(make()) == written
    assert "2 of 4 shards are there" in capsys.readouterr().out
    after = {f.name: f.stat().st_mtime_ns for f in written.glob("shard-*.arrow")}
    assert sorted(n for n in times if after[n] != times[n]) == [
        "shard-00001.arrow",
        "shard-00002.arrow",
    ]
    again = SoftLabels.open(written, verify=True).columns(ids, views)
    torch.testing.assert_close(again, said, atol=1e-3, rtol=1e-3)

    def never(*_):
        raise AssertionError("it is finished")

    monkeypatch.setattr(soft_labels, "_probe", never)
    assert soft_labels.soft_labels(make()) == written
    assert f"Soft labels are there already: {written}" in capsys.readouterr().out


def test_damage_is_named(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "copy")
    shard = folder / "shard-00003.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    SoftLabels.open(folder)
    with pytest.raises(UserError, match=r"is damaged: shard-00003\.arrow: its SHA-256 does not m"):
        SoftLabels.open(folder, verify=True)
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"is damaged: shard-00003\.arrow: \d+ bytes instead of"):
        SoftLabels.open(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"is damaged: shard-00003\.arrow: No such file"):
        SoftLabels.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"its manifest\.json cannot be read"):
        SoftLabels.open(folder)
    with pytest.raises(UserError, match="does not exist"):
        SoftLabels.open(tmp_path / "nowhere")


def test_too_little_space_is_said_before_anything_is_written(make, monkeypatch):
    monkeypatch.setattr(
        soft_labels.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000)
    )
    config = make("loop.seed=3")
    with pytest.raises(UserError, match=r"soft_labels\.dir must have .* MB free, got 0 MB"):
        soft_labels.soft_labels(config)
    assert not list(Path(config.soft_labels.dir).glob("*/shard-*.arrow.tmp"))


def test_a_disk_that_fills_up_meanwhile_is_said(make, monkeypatch):
    without_ray(monkeypatch)
    config, replace = make("loop.seed=3"), os.replace

    def full(source, target):
        if str(target).endswith(".arrow"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"soft_labels\.dir must have room, .* No space left"):
        soft_labels.soft_labels(config)


# -------------------------------------------------------------------------------------------- refusals
OTHERS = {
    "a flip more": (["augment.vflip=0.5"], r"another crop or augm.* \(augment\.vflip: 0\.0, here 0\.5\)"),
    "another crop": (["augment.crop_scale=[0.5,1.0]"], r"augment\.crop_scale: \[0\.6, 1\.0\], here \[0\.5"),
    "more views": (["augment.views=3"], r"has 2 views, and augment\.views is 3"),
    "another seed": (["loop.seed=1"], r"of other crops \(augment\.seed or loop\.seed 0, here 1\)"),
    "another size": (["augment.image_px=24"], r"another augment\.image_px \(32, here 24\)"),
    "another term": (
        ["task.terms.emb={loss: embedding_mse, inputs: [features, teacher.embedding], weight: 1}"],
        r"lacks teacher\.embedding \(it has teacher\.features, teacher\.logits\)",
    ),
    "other data": (["data.max_samples=40"], r"of other images or another data\.decode \(\w+, here \w+\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_soft_labels_of_something_else_are_refused(name, make, written):
    more, reason = OTHERS[name]
    config = make(*more)
    plan = check(config.data, config.cache)  # nothing is decoded for it
    with pytest.raises(UserError, match=reason) as refused:
        SoftLabels.open(written).check(config, plan, plan.rows.classes)
    message = str(refused.value)
    assert message.startswith(f"teacher.soft_labels: {written} ")
    assert message.endswith("; run jobs/soft_labels.py with this config")


def test_what_changes_nothing_for_the_teacher_is_welcome(make, written):
    config = make("augment.views=1", "augment.tta=flip", "augment.eval_crop=0.9", "loop.epochs=7")
    plan = check(config.data, config.cache)
    soft = SoftLabels.open(written)
    soft.check(config, plan, plan.rows.classes)
    with pytest.raises(UserError, match="of other classes, or of another order of them"):
        soft.check(config, plan, plan.rows.classes[::-1])


def test_another_teacher_is_refused_and_none_is_no_other(make, overrides, written, place):
    fit(compose("train", [*overrides, "run.name=other", "loop.seed=5", "loop.epochs=1"]))
    config = make(f"teacher.run={place / 'runs' / 'other'}")
    plan = check(config.data, config.cache)
    soft = SoftLabels.open(written)
    with pytest.raises(UserError, match=r"holds the outputs of another teacher \(teacher: .*teach"):
        soft.check(config, plan, plan.rows.classes)
    config.teacher.run = None
    soft.check(config, plan, plan.rows.classes)


def test_a_moved_teacher_is_the_same_teacher(make, teacher, written, tmp_path):
    config = make()
    config.teacher.run = str(shutil.copytree(teacher, tmp_path / "moved"))
    plan = check(config.data, config.cache)
    SoftLabels.open(written).check(config, plan, plan.rows.classes)


def test_a_damaged_teacher_is_refused(make, teacher, tmp_path):
    config = make()
    moved = shutil.copytree(teacher, tmp_path / "moved")
    best = runs.best_checkpoint(moved).folder
    for folder in (moved / "checkpoints").iterdir():
        if folder != best:
            shutil.rmtree(folder)
    (best / "model.safetensors").write_bytes(b"0")
    config.teacher.run = str(moved)
    with pytest.raises(UserError, match="has no finished epoch yet"):
        soft_labels.soft_labels(config)


def refused_recipe(config: Config, reason: str) -> None:
    """At the writing and where they are read."""
    with pytest.raises(UserError, match=reason):
        soft_labels.refuse_recipe(config)
    with pytest.raises(UserError, match=reason):
        soft_labels.soft_labels(config)


def test_mixed_images_and_other_recipes_that_cannot_be_kept_are_refused(make):
    soft_labels.refuse_recipe(make())
    mixed = r"must be 0 with soft labels, got 0\.2: a teacher must see the mixed image"
    refused_recipe(make("augment.mixup=0.2"), rf"augment\.mixup {mixed}")
    refused_recipe(make("augment.cutmix=0.2"), rf"augment\.cutmix {mixed}")
    refused_recipe(make("augment.start_px=16"), r"augment\.start_px must be null with soft labels")
    views = (
        r"augment\.views must be a number with soft labels, got null: .*augment\.flip.*crop_scale"
    )
    refused_recipe(make("augment.views=null"), views)
    config = make()
    config.stages = [{"epochs": 1}, {"epochs": 1, "augment": {"flip": 0.0}}]
    refused_recipe(config, r"stages\.1\.augment must leave the augmentation as it is")
    config.stages[1]["augment"] = {"flip": 0.5}
    soft_labels.refuse_recipe(config)


def test_without_a_teacher_or_an_output_of_one_there_is_nothing_to_keep(make):
    config = make()
    config.teacher.run = None
    with pytest.raises(UserError, match=r"teacher\.run must name the teacher whose outputs"):
        soft_labels.soft_labels(config)
    config = make()
    config.task["terms"] = {"task": config.task["terms"]["task"]}
    with pytest.raises(UserError, match=r"task\.terms must name an output of the teacher"):
        soft_labels.soft_labels(config)


def test_an_output_that_the_teacher_lacks_is_named(make):
    config = make(*OTHERS["another term"][0])
    with pytest.raises(UserError, match=r"teacher\.embedding.* it has .*teacher\.logits"):
        soft_labels.soft_labels(config)


def test_top_k_is_for_one_class_of_several(make):
    config = make("soft_labels.top_k=2")
    config.task["kind"] = "binary"
    with pytest.raises(UserError, match=r"soft_labels\.top_k must be null for task\.kind=binary"):
        soft_labels.soft_labels(config)


def test_top_k_is_refused_before_anything_begins(make):
    """As jobs/distil.py asks: what cannot be kept is not found out after the teacher's training."""
    config = make("soft_labels.top_k=2")
    soft_labels.refuse_recipe(config)
    for kind in ("binary", "multi_label"):
        config.task["kind"] = kind
        with pytest.raises(UserError, match=rf"top_k must be null for task\.kind={kind}, got 2"):
            soft_labels.refuse_recipe(config)
    rkd = "task.terms.more={loss: rkd_distance, inputs: [logits, teacher.logits], weight: 1}"
    with pytest.raises(
        UserError, match=r"task\.terms\.more\.loss .*top 2 of teacher\.logits .*rkd"
    ):
        soft_labels.refuse_recipe(make(rkd, "soft_labels.top_k=2"))
    soft_labels.refuse_recipe(make(rkd))
    of_features = rkd.replace("logits", "features")
    soft_labels.refuse_recipe(make(of_features, "soft_labels.top_k=2"))
    config = make(rkd, "soft_labels.top_k=2")
    config.teacher.soft_labels = "somewhere"  # it says itself what it keeps
    soft_labels.refuse_recipe(config)


def test_the_key_is_the_folders_name(make, written):
    def key(config: Config) -> str:
        plan = check(config.data, config.cache)
        return soft_labels.key_of(config, plan, plan.rows.classes)

    same = make("optimizer.lr=0.5", "loop.epochs=9", "soft_labels.batch_size=7")
    assert key(make()) == key(same) == written.name
    assert key(make("loop.seed=1")) != written.name


def test_nodes_that_do_not_see_the_folders_write_the_same(make, written, monkeypatch, tmp_path):
    """Teacher and images come to them, shards go back: as on hosts with disks of their own."""
    import contextlib

    from potstill import handover

    unseen = contextlib.nullcontext(Mark("nowhere", ".seen"))
    monkeypatch.setattr(handover, "marked", lambda _: unseen)
    monkeypatch.setattr(soft_labels, "SMALL_SHARD_ROWS", 16)
    folder = soft_labels.soft_labels(make(f"soft_labels.dir={tmp_path / 'far'}"))
    assert folder.parent == tmp_path / "far"
    near, far = (SoftLabels.open(str(f), True) for f in (written, folder))
    ids, views = near.ids, np.zeros(len(near.ids), np.int64)
    ours, theirs = near.columns(ids, views), far.columns(ids, views)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert torch.equal(values, theirs[name]), name


def test_a_gpu_that_is_not_there_is_refused(make, ray_session):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="use_gpu must be false or null on a machine without a GPU"):
        soft_labels.soft_labels(make("scaling.use_gpu=true", "loop.seed=4"))


@pytest.mark.slow
def test_the_job_says_what_the_training_takes(overrides, teacher, place):
    """As a user runs both: what one prints is what the other is given."""
    recipe = [*overrides, "task=distil", "augment.views=2", f"soft_labels.dir={place / 'job'}"]
    done = run_job("soft_labels", *recipe, f"teacher.run={teacher}", cwd=place)
    assert done.returncode == 0, done.stderr
    given = "".join(
        done.stdout.split("teacher.soft_labels=")[1].split()
    )  # it may be broken in two lines
    assert Path(given).parent == place / "job"
    trained = run_job(
        "train", *recipe, f"teacher.soft_labels={given}", "run.name=by_job", cwd=place
    )
    assert trained.returncode == 0, trained.stderr
    about = runs.read_json(place / "runs" / "by_job" / "run.json")
    assert (about["soft_labels"], about["teacher_run"]) == (given, None)
    assert runs.read_json(place / "runs" / "by_job" / "summary.json")["status"] == "finished"
