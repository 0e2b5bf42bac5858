"""Submitted jobs on an autoscaling cluster, whose nodes are processes of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clusters import BIN, Cluster, autoscaling_cluster, wait_for
from conftest import tiny_overrides, write_tree
from potstill import runs
from test_distil import STUDENT, TEACHER

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with autoscaling_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data") / "colours")


def asked(tree: Path, *further: str) -> list[str]:
    """A tiny training's settings; runs and caches are where POTSTILL_HOME says."""
    given = tiny_overrides(tree, Path("cache"), Path("runs"))
    gpu = ["scaling=gpu", "scaling.rehearse=true"]
    return [*given, *gpu, *further]


def kinds_until(cluster: Cluster, over: Callable[[], object], timeout_s: float = 240) -> set[str]:
    """The roles of all nodes that there were until `over`."""
    seen: set[str] = set()

    def look() -> object:
        seen.update(cluster.roles())
        return over()

    wait_for("what was watched", look, timeout_s)
    return seen


def home(cluster: Cluster) -> Path:
    return Path(cluster.head.env["POTSTILL_HOME"])


def test_data_brings_data_nodes_training_brings_gpus_and_both_go(cluster: Cluster, tree: Path):
    assert cluster.roles() == ["head"]
    decode = ["data.decode.image_px=32", "data.decode.fit=squash"]
    job = cluster.submit("prepare", f"data.root={tree}", "cache.dir=cache", *decode)
    seen = kinds_until(cluster, lambda: cluster.status(job) in ("SUCCEEDED", "FAILED"))
    assert cluster.status(job) == "SUCCEEDED", cluster.logs(job)
    assert seen == {"head", "data"}, "what decodes images must not buy a GPU"
    assert "64 images" in cluster.logs(job)

    job = cluster.submit("train", *asked(tree, "run.name=bought", "tracking=aim"))
    seen = kinds_until(cluster, lambda: cluster.status(job) in ("SUCCEEDED", "FAILED"))
    assert cluster.status(job) == "SUCCEEDED", cluster.logs(job)
    assert "train" in seen
    said = cluster.logs(job)
    assert "Epoch 2/2" in said, "progress must be readable in the job's log"
    assert "Val - Loss" in said

    folder = home(cluster) / "runs" / "bought"
    assert runs.read_json(folder / "summary.json")["status"] == "finished"
    assert (folder.parent / ".aim").is_dir(), "Aim's repository is on the head"
    wait_for("nodes to go when idle", lambda: cluster.roles() == ["head"], 240)


def test_a_stopped_job_saves_and_the_same_one_goes_on(cluster: Cluster, tree: Path):
    long = asked(tree, "run.name=stopped", "loop.epochs=60", "loop.steps_per_epoch=40")
    job = cluster.submit("train", *long)
    folder = home(cluster) / "runs" / "stopped"

    def epochs() -> int:
        return sum(r["kind"] == "epoch" for r in runs.read_journal(folder))

    wait_for("the second epoch", lambda: epochs() >= 2, 240)
    cluster.job("stop", "--no-wait", job)
    assert cluster.ended(job) == "STOPPED"
    assert "Saving, then stopping" in cluster.logs(job)
    records = runs.read_journal(folder)
    end = records[-1]
    assert (end["kind"], end["status"]) == ("end", "stopped"), "it must have ended by itself"
    kept, passed_over = runs.newest_checkpoint(folder)
    assert kept is not None
    assert not passed_over
    last = max(r["step"] for r in records if r["kind"] == "step")
    assert kept.step >= last, "all that was trained is kept"

    job = cluster.submit("train", *long)
    wait_for("the second attempt", lambda: runs.last_attempt(folder) == 2, 240)
    second = next(r for r in runs.read_journal(folder) if r.get("attempt") == 2)
    assert second["resumed_from"] == kept.folder.name
    assert second["step"] == kept.step
    wait_for(
        "another epoch", lambda: epochs() > len([r for r in records if r["kind"] == "epoch"]), 120
    )
    assert "Resumed from" in cluster.logs(job)
    cluster.job("stop", "--no-wait", job)
    assert cluster.ended(job) == "STOPPED"


def test_a_stopped_job_has_time_to_save(cluster: Cluster):
    """More than Ray's own 3 s, by the setting in runtime_env.yaml."""
    slow = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(8), print('saved'), sys.exit()))"
    job = cluster.submit_command("python", "-c", f"{slow}; print('at work'); time.sleep(300)")
    wait_for("its work", lambda: "at work" in cluster.logs(job), 60)
    cluster.job("stop", "--no-wait", job)
    assert cluster.ended(job) == "STOPPED"
    assert "saved" in cluster.logs(job)


def test_a_spot_machine_that_is_taken_back_costs_nothing(cluster: Cluster, tree: Path):
    """The run saves when it hears of it, goes on, and is gone on with on the node that comes instead."""
    more = ["loop.epochs=100", "loop.steps_per_epoch=20000", "loop.checkpoint_every_steps=100000"]
    job = cluster.submit("train", *asked(tree, *more, "run.name=spot"))
    folder = home(cluster) / "runs" / "spot"

    def of(kind: str, attempt: int) -> list[runs.Record]:
        records = runs.read_journal(folder)
        return [r for r in records if r["kind"] == kind and r["attempt"] == attempt]

    def notices(attempt: int) -> list[runs.Record]:
        return [r for r in of("note", attempt) if "will soon be gone" in r["message"]]

    def about() -> str:
        told = ("attempt", "note", "warning", "end")
        seen = [r for r in runs.read_journal(folder) if r["kind"] in told]
        return f"{cluster.logs(job)[-3000:]}\n{seen}\n{cluster.nodes()}"

    def take_back(attempt: int) -> bool:
        """Tell the node at work that it will be gone. Whether the run has heard of it before it was."""
        wait_for("training", lambda: of("step", attempt), 300, about)
        (begun,) = of("attempt", attempt)
        node = wait_for("its node", lambda: cluster.node_of(begun["pid"]), 60, about)
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        deadline = ["--deadline-remaining-seconds", "60"]
        where = ["--address", "127.0.0.1:6379", "--node-id", node]
        cluster.head.run(str(BIN / "ray"), "drain-node", *where, *notice, *deadline)
        wait_for(
            f"a notice, or the end of {node}",
            lambda: notices(attempt) or runs.last_attempt(folder) > attempt,
            240,
            about,
        )
        return bool(notices(attempt))

    # Ray's watcher is an actor that must itself find a place first: it may say nothing before the node is gone
    first = next((n for n in (1, 2, 3) if take_back(n)), None)
    assert first is not None, about()
    told = notices(first)[0]
    wait_for("another node", lambda: runs.last_attempt(folder) == first + 1, 300, about)
    saved = [r for r in of("checkpoint", first) if not r["epoch_done"]]
    # a note has the step of the last line of figures, of which there is one every ten updates
    late = [r["step"] - told["step"] for r in saved]
    assert any(0 <= steps <= 10 for steps in late), "in mid-epoch, as it was told"
    (second,) = of("attempt", first + 1)
    assert second["step"] >= told["step"]
    cluster.job("stop", "--no-wait", job)
    assert cluster.ended(job) == "STOPPED"


def test_a_whole_path_trains_on_gpu_nodes_and_is_judged_on_the_head(
    cluster: Cluster, tree: Path, tmp_path: Path
):
    """The head has no GPU, whatever scaling says of the nodes that train."""
    (tmp_path / "experiment").mkdir()
    for name, text in (("teacher", TEACHER), ("student", STUDENT)):
        (tmp_path / "experiment" / f"tiny_{name}.yaml").write_text(text)
    chosen = ["--config-dir", str(tmp_path), "experiment=tiny_student", *asked(tree)]
    small = [
        "data.classes=[blue,red]",
        "loop.batch_size=8",
        "debug=true",
        "distil.seeds=[0]",
        "run.name=path",
    ]
    job = cluster.submit("distil", *chosen, *small, "gate.on_marginal=skip")
    assert cluster.ended(job, 900) == "SUCCEEDED", cluster.logs(job)
    folder = home(cluster) / "runs" / "path"
    steps = runs.read_json(folder / "steps.json")
    assert {step["status"] for step in steps.values()} == {"finished"}
    assert "diagnose-teacher" in steps
    assert "latency" in steps
    assert (folder / "comparison.md").exists()


def test_the_head_takes_no_training(cluster: Cluster, tree: Path):
    job = cluster.submit("train", *asked(tree, "scaling=local", "run.name=head"))
    said = cluster.ended(job)
    assert "FAILED" in said
    assert "scaling.num_workers must be >= 1 on a cluster's head" in said
    assert "Traceback" not in said
    assert not (home(cluster) / "runs" / "head").exists()


def test_a_price_that_is_not_there_is_said_and_stops_cleanly(cluster: Cluster, tree: Path):
    """No kind of node has this label: the job waits, says for what, and goes when it is told to."""
    job = cluster.submit(
        "train", *asked(tree, "run.name=never", "scaling.labels={ray.io/market-type: on-demand}")
    )
    said = "Waiting for 1 x (1 CPU, 1 GPU) on nodes of potstill.io/role=train, ray.io/market-type=on-demand"
    wait_for("what it waits for", lambda: said in cluster.logs(job), 120)
    wait_for("nodes of earlier tests to go", lambda: "train" not in cluster.roles(), 240)
    watched_until = time.monotonic() + 8  # the autoscaler decides every second
    assert "train" not in kinds_until(cluster, lambda: time.monotonic() > watched_until)
    began = time.monotonic()
    cluster.job("stop", "--no-wait", job)
    assert cluster.ended(job) == "STOPPED"
    assert time.monotonic() - began < 110, "Ray itself ends it after 120 s"
