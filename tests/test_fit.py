"""Whole runs: Ray Train on workers and in this process, real checkpoints, a real Aim repository."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import tiny_overrides, write_tree
from potstill import runs
from potstill.config import compose
from potstill.errors import RunFailed, Stopped, UserError
from potstill.fit import fit


def history(config) -> dict:
    return runs.read_json(run_dir(config) / "training_history.json")


def run_dir(config) -> Path:
    return Path(config.runs.dir) / config.run.name


def test_one_and_two_workers_tell_the_same_story(tiny, capsys):
    """48 images in batches of 20: an uneven tail of 8; the two workers accumulate besides.

    History, journal, Aim and console hold the same floats.
    """
    from potstill.tracking import fill

    shared = ["optimizer.name=sgd", "optimizer.lr=0.05", "loop.epochs=3", "loop.log_every_steps=1"]
    alone = tiny(*shared, "run.name=alone")
    fit(alone)
    capsys.readouterr()
    pair = tiny(
        *shared,
        "run.name=pair",
        "scaling.num_workers=2",
        "scaling.cpus_per_worker=1",
        "loop.accumulate=2",
    )
    fit(pair)
    printed = capsys.readouterr().out
    one, two = history(alone), history(pair)
    assert one.keys() == two.keys() == set(runs.HISTORY_KEYS)
    for key in ("train_loss", "val_loss"):
        assert one[key] == pytest.approx(two[key], abs=1e-5), key
    assert one["train_loss"][-1] < one["train_loss"][0]

    records = runs.read_journal(run_dir(pair))
    steps = [
        [r["loss"] for r in runs.read_journal(run_dir(c)) if r["kind"] == "step"]
        for c in (alone, pair)
    ]
    assert steps[0] == pytest.approx(steps[1], abs=1e-5)
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [r["world_size"] for r in records if r["kind"] == "attempt"] == [2]
    assert {k: [e[k] for e in epochs] for k in runs.HISTORY_KEYS} == two
    for i in range(3):
        for subset in ("train", "val"):
            line = (
                f"{subset.capitalize()} - Loss: {two[f'{subset}_loss'][i]:.4f}, "
                f"Top-1: {two[f'{subset}_top1_acc'][i]:.2f}%, Top-3: {two[f'{subset}_top5_acc'][i]:.2f}%"
            )
            assert line in printed
    repo = run_dir(pair).parent
    assert aim_values(repo, fill(run_dir(pair), repo)) == {
        (name.removeprefix(f"{subset}_"), subset): two[name]
        for name in runs.HISTORY_KEYS
        for subset in (name.split("_")[0],)
        if subset in ("train", "val")
    }


@pytest.mark.slow
def test_one_and_two_workers_tell_the_same_story_of_a_whole_recipe(tiny, tmp_path):
    """Mixed pairs, class weights, images without labels and a teacher: 58 images in batches of 20."""
    from PIL import Image

    teacher = tiny("run.name=teacher", "loop.epochs=1")
    fit(teacher)
    more = tmp_path / "more"
    more.mkdir()
    rng = np.random.default_rng(3)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(more / f"{i}.png")
    shared = [
        "task=distil",
        f"teacher.run={run_dir(teacher)}",
        f"data.unlabeled={more}",
        "task.terms.task.class_weights=[1.0,3.0,0.5,2.0]",
        "task.terms.task.weight=0.5",
        "augment.mixup=0.4",
        "augment.cutmix=1.0",
        "optimizer.name=sgd",
        "optimizer.lr=0.05",
        "loop.epochs=1",
        "loop.log_every_steps=1",
    ]
    alone = tiny(*shared, "run.name=alone")
    pair = tiny(*shared, "run.name=pair", "scaling.num_workers=2", "scaling.cpus_per_worker=1")
    for config in (alone, pair):
        fit(config)
    told = [runs.read_journal(run_dir(config)) for config in (alone, pair)]
    assert [next(r["world_size"] for r in t if r["kind"] == "attempt") for t in told] == [1, 2]
    one, two = ([r for r in t if r["kind"] == "epoch"] for t in told)
    for a, b in zip(one, two, strict=True):
        for key in ("train_loss", "val_loss"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
        for name in ("task", "distil"):
            found = [e["terms"][name]["loss"] for e in (a, b)]
            assert found[0] == pytest.approx(found[1], abs=1e-5), name
    steps = [[r["loss"] for r in t if r["kind"] == "step"] for t in told]
    assert len(steps[0]) == 3
    assert steps[0] == pytest.approx(steps[1], abs=1e-5)


def test_sizes_that_a_model_or_its_teacher_does_not_take_are_told_before_training(tiny):
    """This vision transformer takes images of its own size alone; these grow from 16 px to 32."""
    own_size = ("model.name=test_vit", "model.kwargs={dynamic_img_size: false, img_size: 32}")
    grow = ("augment.image_px=32", "augment.start_px=16", "loop.epochs=3")
    refused = r"augment\.start_px must lead to sizes .* got 16, where images have 16 px .*"
    with pytest.raises(UserError, match=refused + "test_vit does not take them"):
        fit(tiny(*grow, *own_size, "run.name=student"))
    teacher = tiny(*own_size, "run.name=elder", "loop.epochs=1", "augment.image_px=32")
    fit(teacher)
    learn = ("task=distil", f"teacher.run={run_dir(teacher)}", "model.name=test_resnet")
    with pytest.raises(UserError, match=refused + "the teacher elder does not take them"):
        fit(tiny(*grow, *learn, "run.name=pupil"))


def test_every_size_that_images_grow_through_is_tried(tiny):
    """16, 32 and 48 px, of which the first and the last would do."""
    from potstill.assemble import _check_smaller_sizes

    class Odd(torch.nn.Module):
        def forward(self, batch):
            assert batch["image"].shape[-1] != 32, "no even number of patches"

    config = tiny("augment.image_px=64", "augment.start_px=16", "loop.epochs=4")
    model = Odd()
    with pytest.raises(UserError, match="images have 32 px in some epoch: odd does not take them"):
        _check_smaller_sizes(config, model, "odd", torch.device("cpu"))
    assert model.training


def aim_values(repo: Path, run_hash: str) -> dict[tuple[str, str], list[float]]:
    """What Aim's own query says of a run's epochs."""
    from aim import Repo

    names = ("loss", "top1_acc", "top5_acc", "macro_f1")
    found = {}
    for of_run in Repo(str(repo)).query_metrics(f"run.hash == '{run_hash}'").iter_runs():
        for metric in of_run:
            if metric.name in names:
                by_step = metric.dataframe().sort_values("step")
                found[metric.name, metric.context["subset"]] = by_step["value"].tolist()
    return found


def looked_at(monkeypatch, node: Path, sees: Callable[[int], bool]) -> None:
    """Let the workers of these ranks see the run's folder and the others not, as on nodes of which some mount it.

    `node`: where the others keep what they fetch.
    """
    from potstill import handover

    @contextlib.contextmanager
    def marked(folder: Path, real=handover.marked):
        if folder.parent.name != "runs":
            with real(folder) as mark:
                yield mark
            return

        class Mark:
            def seen(self) -> bool:
                import ray.train

                os.environ["POTSTILL_HOME"] = str(node)
                return sees(ray.train.get_context().get_world_rank())

        yield Mark()

    monkeypatch.setattr(handover, "marked", marked)


@pytest.mark.slow
def test_some_workers_see_the_runs_and_others_do_not(tiny, monkeypatch, tmp_path):
    """A head that trains, too, with another machine beside it: the same story as where all see them."""
    teacher = tiny("run.name=teacher", "loop.epochs=1")
    fit(teacher)
    shared = (
        *("task=distil", f"teacher.run={run_dir(teacher)}"),
        *("optimizer.name=sgd", "optimizer.lr=0.05", "loop.log_every_steps=1"),
    )
    alone = tiny(*shared, "run.name=alone")
    fit(alone)
    looked_at(monkeypatch, tmp_path / "node", lambda rank: rank == 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    apart = tiny(*shared, "run.name=apart", "scaling.num_workers=2", "scaling.cpus_per_worker=1")
    fit(apart)
    assert list((tmp_path / "node" / "copies").glob("fetched-*/teacher/config.yaml"))
    assert not list(tmp_path.glob("*ray-train*")), "what Ray keeps of a run goes with it"
    told = [runs.read_journal(run_dir(config)) for config in (alone, apart)]
    assert [next(r["world_size"] for r in t if r["kind"] == "attempt") for t in told] == [1, 2]
    for kind, key in (("step", "loss"), ("epoch", "val_loss")):
        one, two = ([r[key] for r in t if r["kind"] == kind] for t in told)
        assert len(one) >= 2
        assert one == pytest.approx(two, abs=1e-5), key


@pytest.mark.slow
def test_what_one_worker_cannot_do_ends_all_of_them(tiny, monkeypatch, tmp_path):
    """The first one's disk is full, and the second waits for it at the checkpoint; then the other way round, where
    the first one waits for the second's gradients. Ray would wait for hours, and start them again three times."""
    pair = ("scaling.num_workers=2", "scaling.cpus_per_worker=1", "scaling.max_failures=3")
    full = tiny("run.name=full", "loop.epochs=1", *pair)
    runs.atomic_write(Path(full.runs.dir) / "full" / "checkpoints", "a file is in the way")
    with pytest.raises(
        RunFailed, match=r"^runs\.dir: the checkpoint of step 3 could not be written"
    ):
        fit(full)
    (end,) = [r for r in runs.read_journal(run_dir(full)) if r["kind"] == "end"]
    assert (end["status"], end["reason"][:9]) == ("failed", "runs.dir:")

    teacher = tiny("run.name=teacher", "loop.epochs=1")
    fit(teacher)
    (tmp_path / "node").write_text("a file is in the way")
    looked_at(monkeypatch, tmp_path / "node", lambda rank: rank == 0)
    lone = tiny("run.name=lone", "task=distil", f"teacher.run={run_dir(teacher)}", *pair)
    with pytest.raises(UserError, match=r"^POTSTILL_HOME must be a folder that can be written"):
        fit(lone)
    assert runs.last_attempt(run_dir(lone)) == 0, "nobody has trained"
    assert runs.read_json(run_dir(lone) / "summary.json")["status"] == "failed"


class AtDesk:
    """What a worker's session asks the driver's actor at its start."""

    call = SimpleNamespace(remote=lambda kind, run_dir, name: ray_put(0))


def ray_put(value):
    import ray

    return ray.put(value)


def session_of(scribe, run_dir: Path):
    from potstill.fit import _RaySession

    about = {"scribe": scribe, "mark": SimpleNamespace(seen=lambda: True)}
    return _RaySession(run_dir, rank=0, world_size=1, payload=about)


def test_the_first_worker_is_heard_of_whatever_it_is_busy_with(tmp_path, monkeypatch, ray_session):
    from potstill import fit

    heard = threading.Semaphore(0)

    class Scribe(AtDesk):
        hear = SimpleNamespace(remote=heard.release)

    monkeypatch.setattr(fit, "ALIVE_S", 0.01)
    with session_of(Scribe, tmp_path).heard():  # it asks nothing
        assert all(heard.acquire(timeout=30) for _ in range(3))
        told = next(t for t in threading.enumerate() if t.name == "sign-of-life")
    told.join(30)
    assert not told.is_alive()


@pytest.mark.slow
def test_a_stop_in_a_long_validation_is_waited_for(tiny, monkeypatch, tmp_path):
    """The loop asks nobody meanwhile, and yet its worker is there."""
    from potstill import fit as driver

    begun = tmp_path / "begun"

    def slow(rank: int) -> bool:
        from potstill import loop

        def evaluate(*args, real=loop.evaluate, **options):
            begun.touch()
            time.sleep(14)
            return real(*args, **options)

        loop.evaluate = evaluate
        return True

    def stop() -> None:
        while not over.wait(0.1):
            if begun.exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    looked_at(monkeypatch, tmp_path, slow)
    monkeypatch.setattr(driver, "UNHEARD_S", 8)
    over = threading.Event()
    stopper = threading.Thread(target=stop)
    stopper.start()
    try:
        with pytest.raises(Stopped, match="stopped at step 4 and saved"):
            fit(tiny("run.name=stopped", "scaling.num_workers=1"))
    finally:
        over.set()
        stopper.join()


@pytest.mark.parametrize(("update_s", "updates"), [(0.01, 10), (0.5, 4), (13.0, 1)])
def test_workers_ask_every_few_seconds_whether_to_stop(
    tmp_path, monkeypatch, ray_session, update_s, updates
):
    """`ray job stop` leaves two minutes: ten updates may be longer."""
    import ray.train

    from potstill import fit

    update, asked_at = 0, []

    class Scribe(AtDesk):
        asked_to_stop = SimpleNamespace(remote=lambda: ray_put(asked_at.append(update)))

    monkeypatch.setattr(fit, "time", SimpleNamespace(monotonic=lambda: update * update_s))
    session = session_of(Scribe, tmp_path)
    for update in range(1, 41):  # noqa: B007
        assert session.asked() == ""
    assert len(asked_at) > 3
    assert np.diff(asked_at)[1:].tolist() == [updates] * (len(asked_at) - 2)
    monkeypatch.setattr(ray.train, "report", lambda _: None)
    session._told({}, None)
    update += 1
    session.asked()
    assert asked_at[-1] == update, "who has just validated or saved must not first count to ten"


def cluster_of(monkeypatch, *nodes: tuple[str, int]) -> None:
    """A cluster of nodes of so many roles and cores; the last one is here."""
    import ray

    from potstill import cluster

    here = ray.get_runtime_context().get_node_id()
    told = [
        {"NodeID": str(i), "Labels": {cluster.ROLE: role}, "Resources": {"CPU": cores}}
        for i, (role, cores) in enumerate(nodes)
    ]
    told[-1]["NodeID"] = here
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(cluster, "alive_nodes", lambda: told)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": sum(c for _, c in nodes)})


def test_workers_on_cores_take_what_their_kind_of_nodes_has(tiny, monkeypatch):
    import ray.train

    from potstill.fit import _cores, _scaling

    pair = tiny("scaling=cpu", "scaling.num_workers=2")
    cluster_of(monkeypatch, ("train", 4), ("data", 32), ("data", 24))
    assert _scaling(pair)["resources_per_worker"] == {"CPU": 24}
    cluster_of(
        monkeypatch, ("head", 0)
    )  # a node comes when it is asked for: who knows of how many cores
    asked = _scaling(pair)
    assert asked["resources_per_worker"] == {"CPU": 1}
    assert asked["label_selector"] == {"potstill.io/role": "data"}

    cluster_of(monkeypatch, ("head", 0), ("data", 32))
    both_here = SimpleNamespace(get_local_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: both_here)
    payload, session = {"cpus": 1, "gpu": False}, SimpleNamespace(in_process=False)
    assert _cores(pair, session, payload) == 16
    assert _cores(tiny("scaling.cpus_per_worker=1"), session, payload) == 1


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_run_ends_the_same(tiny):
    """Ray restarts the worker; the loop goes on from our checkpoint."""
    whole = tiny("run.name=whole", "loop.epochs=20", "loop.checkpoint_every_steps=2")
    fit(whole)
    config = tiny(
        "run.name=broken",
        "loop.epochs=20",
        "loop.checkpoint_every_steps=2",
        "scaling.num_workers=1",
    )
    killed = []

    def kill_at(step: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            records = runs.read_journal(run_dir(config))
            if any(r["kind"] == "step" and r["step"] >= step for r in records):
                killed.append(next(r["pid"] for r in records if r["kind"] == "attempt"))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_at, args=(20,))
    killer.start()
    fit(config)
    killer.join()
    assert killed
    assert killed[0] != os.getpid()
    attempts = [r for r in runs.read_journal(run_dir(config)) if r["kind"] == "attempt"]
    assert len(attempts) == 2
    assert attempts[1]["resumed_from"]
    assert history(config)["train_loss"] == pytest.approx(history(whole)["train_loss"], abs=1e-6)


def test_the_same_command_again_only_tells_what_is_there(tiny, capsys):
    first = fit(tiny())
    capsys.readouterr()
    again = fit(tiny())
    assert again == first
    assert "has finished already; run.again=true starts another" in capsys.readouterr().out
    assert fit(tiny("run.again=true"))["name"] == f"{first['name']}-2"


def test_another_config_under_the_same_name_is_refused_with_the_difference(tiny):
    fit(tiny("run.name=mine", "loop.epochs=1"))
    with pytest.raises(
        UserError, match=r"run\.name: mine was started with another config \(loop\.epochs: 1 -> 2\)"
    ):
        fit(tiny("run.name=mine", "loop.epochs=2"))


def test_a_start_that_failed_binds_nobody(tiny):
    with pytest.raises(UserError, match=r"model\.freeze\.all_but_last_blocks"):
        fit(tiny("run.name=t", "model.name=test_resnet", "model.freeze.all_but_last_blocks=99"))
    assert fit(tiny("run.name=t", "model.name=test_resnet"))["status"] == "finished"


def unfinish(config) -> None:
    """As if the run had been killed before its last checkpoint."""
    (run_dir(config) / "summary.json").unlink()
    shutil.rmtree(sorted((run_dir(config) / "checkpoints").glob("step-*"))[-1])


def test_a_run_does_not_go_on_with_other_data(tmp_path, cache_dir, ray_session):
    tree = write_tree(tmp_path / "tree")
    config = compose("train", [*tiny_overrides(tree, cache_dir, tmp_path / "runs"), "run.name=run"])
    fit(config)
    unfinish(config)
    for split in ("train", "val"):
        (tree / split / "blue").rename(tree / split / "zzz")
    with pytest.raises(
        UserError, match=r"data\.root: the files of .* are not those that run began with"
    ):
        fit(config)


def test_going_on_needs_no_source_of_weights(tiny, tmp_path):
    source = tiny("run.name=source", "loop.epochs=1")
    fit(source)
    config = tiny("run.name=next", f"model.init_from={run_dir(source)}")
    fit(config)
    unfinish(config)
    run_dir(source).rename(tmp_path / "moved")
    assert fit(config)["epochs"] == 2


def test_a_failing_worker_says_why(tmp_path):
    from potstill.fit import _RaySession

    session = _RaySession(tmp_path, rank=1, world_size=2, payload={})
    session.tell_failure(ValueError("shapes differ\nand more"))
    assert "worker 1 failed: ValueError: shapes differ" in (tmp_path / "journal.jsonl").read_text()


def test_a_folder_in_use_is_refused(tiny):
    config = tiny("run.name=busy")
    with (
        runs.lock(Path(config.runs.dir) / "busy"),
        pytest.raises(UserError, match=r"busy is in use by process \d+"),
    ):
        fit(config)


def test_a_run_writes_everything_it_promises(tiny):
    config = tiny("loop.epochs=2", "run.tags=[one,two]")
    summary = fit(config)
    folder = Path(config.runs.dir) / summary["name"]
    assert re.fullmatch(r"run-[0-9a-f]{8}", summary["name"])
    for name in (
        "config.yaml",
        "run.json",
        "journal.jsonl",
        "training_history.json",
        "summary.json",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 0, name
    for name in (
        "loss_curves",
        "top1_accuracy",
        "top5_accuracy",
        "training_summary",
        "confusion_matrix",
    ):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert f"{summary['parameters']:,}" in (folder / "report.html").read_text()
    about = runs.read_json(folder / "run.json")
    assert about["classes"] == ["blue", "green", "red", "white"]
    assert about["dataset"]["counts"] == {"train": 48, "val": 16}
    assert about["tags"] == ["one", "two"]
    assert summary["status"] == "finished"
    assert summary["best_metrics"]["val_top1_acc"] == max(history(config)["val_top1_acc"])
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert len(kept) <= 3
    assert summary["best"]["folder"] in kept


def test_a_student_learns_from_a_run_and_class_lists_must_agree(tiny, tmp_path, cache_dir):
    teacher = tiny("run.name=teacher", "loop.epochs=1")
    fit(teacher)
    student = tiny(
        "run.name=student",
        "task=distil",
        f"teacher.run={run_dir(teacher)}",
        "model.name=test_resnet",
    )
    summary = fit(student)
    records = [r for r in runs.read_journal(run_dir(student)) if r["kind"] == "epoch"]
    assert set(records[0]["terms"]) == {"task", "distil"}
    assert records[0]["terms"]["distil"]["weighted"] == pytest.approx(
        0.9 * records[0]["terms"]["distil"]["loss"]
    )
    assert runs.read_json(run_dir(student) / "run.json")["teacher_run"] == str(run_dir(teacher))
    assert summary["status"] == "finished"

    other = write_tree(tmp_path / "other")
    (other / "train" / "white").rename(other / "train" / "pink")
    (other / "val" / "white").rename(other / "val" / "pink")
    overrides = tiny_overrides(other, cache_dir, tmp_path / "runs")
    with pytest.raises(
        UserError, match=r"does not know 1: pink; the data lacks 1 of the teacher's: white"
    ):
        fit(compose("train", [*overrides, "task=distil", f"teacher.run={run_dir(teacher)}"]))


def test_init_from_takes_over_classes_by_name_and_seen_images_are_named(
    tiny, tmp_path, cache_dir, tiny_tree, capsys
):
    source = tiny("run.name=source", "loop.epochs=1")
    fit(source)
    fewer = tmp_path / "fewer"
    shutil.copytree(tiny_tree, fewer)
    for split in ("train", "val"):
        shutil.rmtree(fewer / split / "white")
        (fewer / split / "red").rename(fewer / split / "pink")
    # an image that the source was trained on now validates
    shutil.copy(fewer / "train" / "blue" / "000.png", fewer / "val" / "blue" / "seen.png")
    capsys.readouterr()
    config = compose(
        "train",
        [
            *tiny_overrides(fewer, cache_dir, tmp_path / "runs"),
            "run.name=fewer",
            "loop.epochs=1",
            "loop.batch_size=16",
            f"model.init_from={run_dir(source)}",
        ],
    )
    summary = fit(config)
    printed = capsys.readouterr().out
    assert "kept 2, dropped 2, new 1" in printed
    seen = [w for w in summary["warnings"] if w["name"] == "validation_seen"]
    assert len(seen) == 1
    assert "1 of the 13 validation images" in seen[0]["message"]


def test_splits_with_other_labels_are_named(tmp_path, cache_dir, ray_session):
    tree = write_tree(tmp_path / "tree")
    shutil.rmtree(tree / "val" / "green")
    summary = fit(
        compose("train", [*tiny_overrides(tree, cache_dir, tmp_path / "runs"), "loop.epochs=1"])
    )
    found = [w for w in summary["warnings"] if w["name"] == "label_sets_differ"]
    assert found
    assert "in train and none in val: green" in found[0]["message"]


def test_only_the_head_of_a_frozen_model_moves(tiny):
    base = tiny("run.name=base", "loop.epochs=1", "model.name=test_resnet")
    fit(base)
    config = tiny(
        "run.name=frozen",
        "model.name=test_resnet",
        "model.freeze.all_but_last_blocks=0",
        f"model.init_from={run_dir(base)}",
    )
    fit(config)
    before, after = (runs.best_checkpoint(run_dir(c)).model_state() for c in (base, config))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    assert all("fc" in k or "head" in k for k in moved), moved


def test_without_aim_training_goes_on(tiny, monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "aim" else real(name, *a)
    )
    summary = fit(tiny("loop.epochs=1", "tracking=aim"))
    assert summary["status"] == "finished"
    assert "Aim is not installed" in capsys.readouterr().out
    assert not (Path(tiny().runs.dir) / ".aim").exists()


def test_lost_predictions_of_an_orphan_do_not_reach_the_history(tmp_path):
    """A process that outlives its driver may still write: its records are superseded."""
    folder = tmp_path / "r"
    folder.mkdir()
    base = {"time": 0.0}
    runs.append_records(
        folder,
        [
            {"kind": "attempt", "attempt": 1, "step": 0, **base},
            {"kind": "epoch", "attempt": 1, "step": 4, "train_loss": 1.0, **base},
            {"kind": "attempt", "attempt": 2, "step": 4, **base},
            {"kind": "epoch", "attempt": 1, "step": 8, "train_loss": 99.0, **base},
            {"kind": "epoch", "attempt": 2, "step": 8, "train_loss": 0.5, **base},
        ],
    )
    with open(folder / "journal.jsonl", "ab") as file:
        file.write(b'{"kind": "epoch", "attempt": 2, "step"')
    assert runs.history(runs.read_journal(folder))["train_loss"] == [1.0, 0.5]
    runs.mend_journal(folder)
    runs.append_records(
        folder, [{"kind": "epoch", "attempt": 2, "step": 12, "train_loss": 0.25, **base}]
    )
    assert runs.history(runs.read_journal(folder))["train_loss"] == [1.0, 0.5, 0.25]


def test_a_lock_whose_file_was_taken_away_is_taken_anew(tmp_path, monkeypatch):
    """By a job that has looked into the folder and found no run."""
    flock, taken = fcntl.flock, []

    def taken_away(handle: int, how: int) -> None:
        flock(handle, how)
        if not taken:
            taken.append((tmp_path / ".lock").unlink())

    monkeypatch.setattr(fcntl, "flock", taken_away)
    with runs.lock(tmp_path), pytest.raises(UserError, match="is in use by process"):  # noqa: SIM117
        with runs.lock(tmp_path):
            pytest.fail("two have it")


def test_a_disk_that_takes_half_a_record_takes_none(tmp_path, monkeypatch):
    """A torn line would take the next record with it, once there is room again."""
    first, second = {"kind": "note", "step": 1}, {"kind": "note", "step": 2}
    runs.append_records(tmp_path, [first])
    write, parts = os.write, []

    def nearly_full(handle: int, data: bytes) -> int:
        parts.append(data)
        if len(parts) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", nearly_full)
        with pytest.raises(OSError, match="No space left") as told:
            runs.append_records(tmp_path, [second])
    assert told.value.filename == str(tmp_path / "journal.jsonl")
    runs.append_records(tmp_path, [second])
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines()
    assert runs.parse_lines(lines) == [first, second]


def test_evaluation_of_the_runs_own_data_says_what_the_run_said(tiny, cache_dir):
    from potstill.config import EvaluateConfig
    from potstill.evaluation import evaluate_run

    config = tiny("run.name=run", "loop.epochs=2")
    summary = fit(config)
    asked = EvaluateConfig(from_run=str(run_dir(config)))
    asked.cache.dir = str(cache_dir)
    found = evaluate_run(asked)
    assert found["metrics"]["loss"] == pytest.approx(summary["best_metrics"]["val_loss"], rel=1e-5)
    assert found["metrics"]["top1_acc"] == pytest.approx(summary["best_metrics"]["val_top1_acc"])
    assert sum(row["support"] for row in found["per_class"]) == found["samples"] == 16


def test_evaluation_of_an_unseen_folder_matches_classes_by_name(
    tiny, tmp_path, cache_dir, ray_session
):
    from potstill.config import EvaluateConfig
    from potstill.evaluation import evaluate_run

    config = tiny("run.name=run", "loop.epochs=3")
    fit(config)
    tree = write_tree(tmp_path / "split", seed=7)
    unseen = (
        tmp_path / "unseen"
    )  # no splits, and two classes only: their indices differ from the run's
    for name in ("red", "white"):
        shutil.copytree(tree / "train" / name, unseen / name)
    asked = EvaluateConfig(from_run=str(run_dir(config)), output=str(tmp_path / "out"))
    asked.cache.dir, asked.data.root = str(cache_dir), str(unseen)
    found = evaluate_run(asked)
    assert found["samples"] == 24
    assert found["absent_classes"] == ["blue", "green"]
    assert [r["class"] for r in found["per_class"]] == ["red", "white"]
    assert found["metrics"]["top1_acc"] > 60, "matched by index, it would be near 0"
    assert runs.read_json(tmp_path / "out" / "evaluation.json")["metrics"] == found["metrics"]
    (unseen / "red").rename(unseen / "pink")
    with pytest.raises(
        UserError, match=r"got 1 it does not: pink; choose the others with data\.classes"
    ):
        evaluate_run(asked)


def test_a_set_with_bad_files_trains_and_counts_add_up(tmp_path, cache_dir, ray_session):
    """5 % of each kind of bad file: quarantined and listed, none replaced."""
    import pyarrow.parquet as pq

    tree = write_tree(tmp_path / "tree", train=25, val=10)
    images = sorted((tree / "train").rglob("*.png"))
    rng = np.random.default_rng(0)
    chosen = [images[i] for i in rng.permutation(len(images))[:15]]
    damage = {
        "empty": lambda b: b"",
        "truncated": lambda b: b[: len(b) // 2],
        "not an image": lambda b: b"<html>404 not found</html>",
    }
    expected = {}
    for i, path in enumerate(chosen):
        reason = list(damage)[i % 3]
        path.write_bytes(damage[reason](path.read_bytes()))
        expected[path.relative_to(tree).as_posix()] = reason
    config = compose(
        "train",
        [
            *tiny_overrides(tree, cache_dir, tmp_path / "runs"),
            "loop.epochs=1",
            "data.max_bad_fraction=0.2",
        ],
    )
    summary = fit(config)
    about = runs.read_json(Path(config.runs.dir) / summary["name"] / "run.json")
    folder = Path(about["dataset"]["dir"])
    listed = pq.read_table(folder / "quarantine.parquet").to_pylist()
    assert {row["path"]: row["reason"] for row in listed} == expected
    report = runs.read_json(folder / "report.json")
    assert report["counts"]["train"] == 100 - 15
    assert about["dataset"]["counts"] == {"train": 85, "val": 40}
