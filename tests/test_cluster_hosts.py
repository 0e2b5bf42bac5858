"""Several hosts with addresses of their own, no folder in common but the data's, and no code but what a job brings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from clusters import QUICK, Hosts, several_hosts, wait_for
from conftest import tiny_overrides, write_tree
from potstill import runs
from potstill.config import compose
from potstill.fit import fit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with several_hosts(workers=3) as started:
        yield started


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data") / "colours")


SHARED = ["optimizer.name=sgd", "optimizer.lr=0.05", "loop.epochs=3", "loop.log_every_steps=1"]
PAIR = ["scaling=cpu", "scaling.num_workers=2", "scaling.cpus_per_worker=1"]
LONG = ["loop.epochs=4", "loop.steps_per_epoch=60", "loop.checkpoint_every_steps=20"]


def alone(tree: Path, folder: Path, *overrides: str) -> Path:
    """The same training on one host, in this process. Returns the run's folder."""
    config = compose(
        "train", [*tiny_overrides(tree, folder / "cache", folder / "runs"), *SHARED, *overrides]
    )
    return folder / "runs" / fit(config)["name"]


def submitted(tree: Path, *overrides: str) -> list[str]:
    return [*tiny_overrides(tree, Path("cache"), Path("runs")), *SHARED, *PAIR, *overrides]


def losses(folder: Path) -> dict[str, list[float]]:
    told = runs.history(runs.read_journal(folder))
    return {key: told[key] for key in ("train_loss", "val_loss")}


def same(one: dict[str, list[float]], two: dict[str, list[float]]) -> None:
    assert one.keys() == two.keys()
    for key, values in one.items():
        assert values == pytest.approx(two[key], abs=1e-5), key


def test_two_hosts_tell_the_story_of_one(hosts: Hosts, tree: Path, tmp_path: Path):
    """The set is built on hosts that do not see the cache, and read on hosts that do not either."""
    job = hosts.submit("train", *submitted(tree, "run.name=pair", "tracking=aim"))
    seen: set[int] = set()

    def over() -> bool:
        seen.update(hosts.training_on())
        return hosts.status(job) in ("SUCCEEDED", "FAILED")

    wait_for("the training", over, 300)
    assert hosts.status(job) == "SUCCEEDED", hosts.logs(job)
    assert len(seen) == 2, "the two workers must have been on two hosts"
    assert 1 not in seen, "the head takes no work"

    folder = hosts.home_of(1) / "runs" / "pair"
    same(losses(folder), losses(alone(tree, tmp_path, "run.name=alone")))
    begun = next(r for r in runs.read_journal(folder) if r["kind"] == "attempt")
    assert begun["world_size"] == 2
    kept, _ = runs.newest_checkpoint(folder)
    assert kept is not None, "checkpoints come to the head"
    assert (folder / "report.html").exists()
    assert (folder.parent / ".aim").is_dir()
    for i in seen:
        assert not (hosts.home_of(i) / "runs").exists(), "a worker's host keeps no run"
        copies = list((hosts.home_of(i) / "copies" / "cache").glob("*/manifest.json"))
        assert len(copies) == 1, "it has a copy of the set"


def test_a_teacher_on_the_head_teaches_on_other_hosts(hosts: Hosts, tree: Path, tmp_path: Path):
    teacher = alone(tree, tmp_path, "run.name=teacher", "loop.epochs=1")
    there = hosts.home_of(1) / "runs" / "teacher"
    there.parent.mkdir(exist_ok=True)
    teacher.rename(there)
    job = hosts.submit(
        "train", *submitted(tree, "run.name=student", "task=distil", "teacher.run=runs/teacher")
    )
    assert hosts.ended(job, 300) == "SUCCEEDED"
    student = hosts.home_of(1) / "runs" / "student"
    there.rename(teacher)
    same(
        losses(student),
        losses(alone(tree, tmp_path, "run.name=one", "task=distil", f"teacher.run={teacher}")),
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_searchs_trials_run_on_other_hosts(
    hosts: Hosts, tree: Path, tmp_path: Path, workers: int
):
    """A trial trains on a host that does not see the runs; one of two workers waits for them on the head, which does."""
    about = {"space": {"optimizer.lr": [0.03]}, "num_samples": 1, "algorithm": "random"}
    own = tmp_path / "conf" / "search" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(f"# @package _global_\n{yaml.safe_dump({'search': about})}")
    given = submitted(tree, f"scaling.num_workers={workers}", f"run.name=search{workers}")
    job = hosts.submit("tune", "--config-dir", str(own.parents[1]), "search=own", *given)
    seen: set[int] = set()

    def over() -> bool:
        seen.update(hosts.training_on())
        return hosts.status(job) in ("SUCCEEDED", "FAILED")

    wait_for("the search", over, 300)
    assert hosts.status(job) == "SUCCEEDED", hosts.logs(job)
    assert len(seen) == (2 if workers == 2 else 0), (
        "a trial of one worker trains in its own process"
    )
    folder = hosts.home_of(1) / "runs" / f"search{workers}"
    assert runs.read_json(folder / "summary.json")["completed"] == 1, hosts.logs(job)
    trial = folder / "trials" / "trial-0000"
    begun = next(r for r in runs.read_journal(trial) if r["kind"] == "attempt")
    assert begun["world_size"] == workers
    same(losses(trial), losses(alone(tree, tmp_path, "optimizer.lr=0.03", "run.name=one")))


def test_a_host_is_cut_off_in_mid_epoch_and_the_run_recovers(
    hosts: Hosts, tree: Path, tmp_path: Path
):
    job = hosts.submit("train", *submitted(tree, *LONG, "run.name=cut"), env=QUICK)
    folder = hosts.home_of(1) / "runs" / "cut"

    def in_mid_epoch() -> bool:
        steps = [r["step"] for r in runs.read_journal(folder) if r["kind"] == "step"]
        return bool(steps) and steps[-1] % 60 > 25

    wait_for("the middle of an epoch", in_mid_epoch, 240)
    victim = max(hosts.training_on())
    assert victim > 1
    hosts.cut_off(victim)
    wait_for("the second attempt", lambda: runs.last_attempt(folder) == 2, 400)
    assert victim not in hosts.training_on()
    assert hosts.ended(job, 400) == "SUCCEEDED"
    records = runs.read_journal(folder)
    begun = [r for r in records if r["kind"] == "attempt"]
    assert begun[-1]["step"] >= 20, "from a checkpoint"
    assert runs.read_json(folder / "summary.json")["status"] == "finished"
    same(losses(folder), losses(alone(tree, tmp_path, *LONG, "run.name=whole")))
