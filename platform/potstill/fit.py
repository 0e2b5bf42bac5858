"""Ray Train: one run on N workers, or in this process. The driver's side and the workers' session."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill import console, metric_names, report, runs
from potstill.config import (
    Config,
    config_hash,
    differing_keys,
    from_dict,
    has_teacher,
    load_run_config,
    reads_native_pixels,
    refuse_resampling,
    resolve_paths,
    stage_configs,
    teacher_specs,
    to_dict,
    to_yaml,
)
from potstill.console import EpochPrinter
from potstill.data.prepare import Plan, check, prepared
from potstill.errors import RunFailed, Stopped, UserError
from potstill.handover import Desk, FarFolder
from potstill.registry import load_plugins
from potstill.replica import replica_of, replicated, with_local_runs
from potstill.sessions import JournalSession
from potstill.storage import is_uri, local_folder

if TYPE_CHECKING:
    import torch

    from potstill.runs import Checkpoint

POLL_S = 0.1
SAVE_AGAIN_S = 30.0
ALIVE_S, UNHEARD_S = 1.0, 60.0
"""Between two signs of life of the first worker's process, and without one: then it is gone."""
AGREE_S, AGREE_UPDATES = 2.0, 10
"""How long, and for how many updates, workers go on before they ask once more whether to stop."""


# ------------------------------------------------------------------------------------------ the driver
def fit(config: Config) -> dict[str, Any]:
    """Train one run, or go on with it, or only read it if it has finished. Returns its summary.

    Raises UserError, before anything expensive starts wherever that is possible, and Stopped.
    """
    resolve_paths(config)
    run_dir = run_folder(config)
    with replicated(run_dir, config.runs.dir):
        return _fit(config, run_dir)


def _fit(config: Config, run_dir: Path) -> dict[str, Any]:
    if (done := _finished(run_dir)) is not None:
        _refuse_other_config(config, run_dir)
        console.say(f"{run_dir.name} has finished already; run.again=true starts another")
        _say_summary(done, run_dir)
        return done
    plan = check(config.data, config.cache, prefer=_began_with(run_dir).get("key"))
    refuse_before_start(config, run_dir, plan)
    _refuse_other_config(config, run_dir)
    check_model(config)
    user = f"run {run_dir.name}"
    with (
        runs.lock(run_dir),
        prepared(config.data, config.cache, user, prefer=plan.key) as found,
    ):
        _refuse_other_data(run_dir, plan, found.cache_dir)
        write_identity(config, run_dir, plan, found.report["counts"])
        findings = seen_before(config, run_dir, found.cache_dir)
        return _train(config, run_dir, found.cache_dir, findings)


def run_folder(config: Config) -> Path:
    """Where a config's run is written. Raises UserError for a name that is none."""
    base = config.run.name or "-".join(
        [config.experiment or "run", *(["debug"] if config.debug else []), config_hash(config)]
    )
    if "/" in base or base.startswith("."):
        raise UserError(
            f"run.name must be a folder's name without '/' and not start with '.', got {base!r}"
        )
    root = local_folder(config.runs.dir)
    folder, n = root / base, 1
    while config.run.again and (_finished(folder) or _finished_elsewhere(config, folder)):
        n += 1
        folder = root / f"{base}-{n}"
    return folder


_OVER = ("finished", "stopped_early")  # what is not gone on with


def _finished_elsewhere(config: Config, run_dir: Path) -> bool:
    """Whether a run of which this machine knows nothing has finished, by its copy in an object store."""
    from potstill.data.files import explained

    if (replica := replica_of(run_dir, config.runs.dir, "runs.dir")) is None:
        return False
    with explained(replica.place, "runs.dir"):
        summary = replica.place.join("summary.json")
        return summary.stat() is not None and json.loads(summary.read())["status"] in _OVER


def _finished(run_dir: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        summary = runs.read_json(run_dir / "summary.json")
        if summary["status"] in _OVER:
            return summary
    return None


def _has_begun(run_dir: Path) -> bool:
    """Whether there is something to go on from: a start that failed before that binds nobody."""
    return (run_dir / "run.json").exists() and any((run_dir / "checkpoints").glob("step-*"))


def _refuse_other_config(config: Config, run_dir: Path) -> None:
    if _has_begun(run_dir) and (differing := differing_keys(load_run_config(run_dir), config)):
        raise UserError(
            f"run.name: {run_dir.name} was started with another config ({'; '.join(differing[:8])}); "
            "give this one another run.name, or the old values"
        )


def _refuse_other_data(run_dir: Path, plan: Plan, cache_dir: Path) -> None:
    if cache_dir.name != plan.key:
        raise UserError(f"data.root: {plan.rows.root} changed while it was prepared; start again")
    began = _began_with(run_dir)
    if not began or began["key"] == plan.key:
        return
    if began.get("source_key") == plan.source_key:
        raise UserError(
            f"cache.format and cache.jpeg_quality must be those that {run_dir.name} began with ({began['pixels']}), got "
            f"{plan.pixels}: its pixels would be others; set cache.format={began['pixels'].split()[0]}, or give this run "
            "another run.name"
        )
    raise UserError(
        f"data.root: the files of {plan.rows.root} are not those that {run_dir.name} began with (key "
        f"{began['key']}, now {plan.key}); restore them, or give this run another run.name"
    )


def _began_with(run_dir: Path) -> dict[str, Any]:
    """The set that a run has begun with; nothing where it has not."""
    return runs.read_json(run_dir / "run.json")["dataset"] if _has_begun(run_dir) else {}


def refuse_before_start(config: Config, run_dir: Path, plan: Plan) -> None:
    """What the listing of the data is enough to refuse; no torch is imported here."""
    refuse_rows(config, plan)
    _refuse_head(config)
    source = config.model.get("init_from")
    if source and is_uri(source):
        runs.open_run(source, "model.init_from")
    elif source and not _has_begun(run_dir) and not Path(source).exists():
        raise UserError(
            f"model.init_from must be a run's folder or a weights file, got {source!r}, which does not exist"
        )
    _refuse_teachers(config, plan.rows.classes)
    if config.teacher.soft_labels:
        from potstill.soft_labels import SoftLabels

        soft = SoftLabels.open(config.teacher.soft_labels, config.cache.verify)
        soft.check(config, plan, plan.rows.classes)


def _refuse_head(config: Config) -> None:
    """A cluster's head, on which a submitted job's command runs, takes no training."""
    if config.scaling.num_workers or not os.environ.get("RAY_ADDRESS"):
        return
    from potstill.cluster import role_here, start_ray

    start_ray()
    if role_here() == "head":
        raise UserError(
            "scaling.num_workers must be >= 1 on a cluster's head, which takes no work, got 0; use scaling=gpu, or "
            "scaling=cpu for the nodes without GPUs"
        )


def refuse_rows(config: Config, plan: Plan) -> None:
    """Too few images for a batch, or other classes than two for a binary task."""
    kind = config.task.get("kind", "single_label")
    if kind == "binary" and len(plan.rows.classes) != 2:
        raise UserError(
            f"task.kind=binary needs data of 2 classes, got {len(plan.rows.classes)}; choose two with data.classes, or use "
            "task=classify"
        )
    training = int((np.asarray(plan.rows.split) == "train").sum())
    if config.loop.batch_size > training:
        raise UserError(
            f"loop.batch_size must be <= the number of training images, got {config.loop.batch_size} for {training} "
            f"images in {plan.rows.root}; set loop.batch_size={min(16, training)} or use more data"
        )


def _refuse_teachers(config: Config, classes: Sequence[str]) -> None:
    """Teachers that are missing or damaged, do another kind of task, or do not know the classes."""
    kind = config.task.get("kind", "single_label")
    known: dict[str, list[int]] = {}
    for name, spec in teacher_specs(config).items():
        key = "teacher" if name == "teacher" else f"teachers.{name}"
        if spec["weights"]:
            from potstill.models.published import weights_file

            target = spec["model"]["_target_"]
            weights_file(spec["weights"], spec["weights_dir"], target, f"{key}.weights")
            known[name] = list(range(len(classes)))
            continue
        teacher = runs.open_run(spec["run"], f"{key}.run")
        try:
            runs.best_checkpoint(teacher)
        except UserError as error:
            raise UserError(f"{key}.run cannot be used: {error}") from None
        from potstill.task import match_classes

        theirs = load_run_config(teacher).task.get("kind", "single_label")
        if theirs != kind:
            raise UserError(
                f"{key}.run must do the student's kind of task ({kind}), got {spec['run']}, which does {theirs}"
            )
        if reads_native_pixels(load_run_config(teacher).model):
            refuse_resampling(config, f"{key}.run={teacher.name}")
        theirs = runs.read_json(teacher / "run.json")["classes"]
        overlap = spec["classes"] == "overlap"
        known[name] = match_classes(theirs, classes, spec["run"], overlap, key)
    if known:
        from potstill.task import refuse_gaps

        refuse_gaps(known, classes, kind)


def check_model(config: Config) -> None:
    """Terms, optimizer, policy and the model's name; imports timm, which takes seconds."""
    from potstill.data.policies import parse_policy
    from potstill.models.images import check_name
    from potstill.optim import check_optimizer
    from potstill.task import build_terms

    if config.augment.policy:
        parse_policy(config.augment.policy)
    for stage in stage_configs(config):
        build_terms(stage.task["terms"], stage.task.get("kind", "single_label"))
        check_optimizer(stage.optimizer)
    if config.model["_target_"] == "timm":
        check_name(config.model["name"])
    _check_columns(config)


OUTPUTS = {
    "timm": ("logits", "features", "map"),
    **dict.fromkeys(("ladeda9", "tiny_ladeda"), ("logits", "features", "map", "patch_logits")),
}
"""What our own models return; TimmModel's map and features where the family has them."""


def _check_columns(config: Config) -> None:
    """Whether every term's inputs will be there; what a plug-in's model or a teacher returns only it knows."""
    if config.model["_target_"] not in OUTPUTS:
        return
    there = ["label", *OUTPUTS[config.model["_target_"]]]
    owners = ["teacher"] if has_teacher(config) else []
    owners += list(config.teachers)
    every = [
        (f"stages.{i}: " if config.stages else "", s) for i, s in enumerate(stage_configs(config))
    ]
    terms = [(at, name, t) for at, stage in every for name, t in stage.task["terms"].items()]
    for at, name, term in terms:
        for column in term["inputs"]:
            owner, dot, _ = column.partition(".")
            if not (dot and owner in owners) and column not in there:
                known = there + [f"{owner}.logits" for owner in owners]
                near = difflib.get_close_matches(column, known, n=1)
                remedy = f"; did you mean {near[0]}?" if near else ""
                raise UserError(
                    f"{at}task.terms.{name}.inputs must be of {', '.join(known)}, got {column!r}{remedy}"
                )


def write_identity(
    config: Config, run_dir: Path, plan: Plan, counts: dict[str, int], **further: Any
) -> None:
    """config.yaml and run.json: once, when the run begins. `further`: what else run.json is to hold."""
    if _has_begun(run_dir):
        return
    config.run.name = run_dir.name
    runs.atomic_write(run_dir / "config.yaml", to_yaml(config))
    about = {
        "name": run_dir.name,
        "experiment": config.experiment,
        "created": time.time(),
        "classes": plan.rows.classes,
        "outputs": plan.rows.classes[1:]
        if config.task.get("kind") == "binary"
        else plan.rows.classes,
        "dataset": {
            "key": plan.key,
            "source_key": plan.source_key,
            "pixels": plan.pixels,
            "dir": str(plan.folder),
            "root": config.data.root,
            "counts": counts,
        },
        "teacher_run": config.teacher.run,
        "teachers": _teachers_of(config),
        "soft_labels": config.teacher.soft_labels,
        "init_from": config.model.get("init_from"),
        "tags": config.run.tags,
        "config_hash": config_hash(config),
        **about_code(),
        **further,
    }
    runs.write_json(run_dir / "run.json", about)


def about_code() -> dict[str, Any]:
    """What a result was made with."""
    commit, dirty = _git()
    parts = ("potstill", "torch", "timm", "ray")
    versions = {p: importlib.metadata.version(p) for p in parts}
    return {"git_commit": commit, "git_dirty": dirty, "versions": versions}


def _teachers_of(config: Config) -> dict[str, str]:
    """Every teacher's run or weights, by name: those that have written the soft labels, where no other is named."""
    named = {n: s["run"] or s["weights"] for n, s in teacher_specs(config).items()}
    if named or not config.teacher.soft_labels:
        return named
    return runs.read_json(Path(config.teacher.soft_labels) / "manifest.json").get("sources") or {}


@functools.cache
def _git() -> tuple[str | None, bool]:
    """The commit that this code is of, and whether it was changed since."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 5}
        return subprocess.run(command, check=True, **options).stdout.strip()

    try:
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, False


def seen_before(config: Config, run_dir: Path, cache_dir: Path) -> list[dict[str, str]]:
    """Warn of validation images that a teacher or an init_from was trained on; notes our own training images."""
    from potstill.data.cache import hash_prefixes, open_cache

    cache = open_cache(cache_dir)
    ours = np.unique(hash_prefixes(cache.split("train").hashes))
    runs.atomic_save(run_dir / "train_hashes.npy", ours)
    validation = hash_prefixes(cache.split("val").hashes)
    found = []
    config = with_local_runs(config)
    sources = {"model.init_from": config.model.get("init_from")}
    for name, spec in teacher_specs(config).items():
        key = "teacher.run" if name == "teacher" else f"teachers.{name}.run"
        sources[key] = spec["run"]
    for key, source in sources.items():
        hashes = Path(source or "") / "train_hashes.npy"
        if source and hashes.exists():
            seen = int(np.isin(validation, np.load(hashes)).sum())
            if seen:
                message = (
                    f"{key} was trained on {seen} of the {len(validation)} validation images: "
                    "its part in the result is flattered"
                )
                found.append({"name": "validation_seen", "message": message})
    return found


def _train(
    config: Config, run_dir: Path, cache_dir: Path, findings: list[dict[str, str]]
) -> dict[str, Any]:
    from potstill.tracking import AimFollower

    runs.mend_journal(run_dir)
    repo = local_folder(config.tracking.repo or config.runs.dir)
    printer = EpochPrinter(run_dir.name)
    aim = AimFollower(run_dir, repo, console.warn) if config.tracking.name == "aim" else None
    payload = {
        "config": to_dict(with_local_runs(config)),
        "run_dir": str(run_dir),
        "cache_dir": str(cache_dir),
        "findings": findings,
        "path": sys.path,  # plug-ins, the teacher's too, are found where the driver found them
    }
    with _follow(run_dir, printer):
        if config.scaling.num_workers == 0:
            error = _train_here(payload)
        else:
            error = train_on_workers(config, payload)
        try:
            _end_journal(run_dir, error)
        except OSError:
            if error is not None:  # what ended the run says more: the same disk, mostly
                raise error from None
            raise
    summary = summarise(run_dir)
    try:
        report.write_history(run_dir)
        if summary["epochs"]:
            report.report(run_dir, summary)
        # last: what is finished is not looked at again
        runs.write_json(run_dir / "summary.json", summary)
    except OSError as failure:
        if error is None:
            raise
        console.warn(f"no report of what there is ({failure})")
    if aim is not None:
        aim.close()
    if error is not None:
        raise error
    _say_summary(summary, run_dir)
    return summary


@contextlib.contextmanager
def _stop_on_signals(ask: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the loop to save and stop; a second one interrupts it."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.say("Saving, then stopping; press Ctrl-C again to stop without saving")
        ask()

    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train_here(payload: dict[str, Any]) -> BaseException | None:
    """Ray Train's local mode: the trainer calls the function in this process."""
    stop = threading.Event()
    try:
        with _stop_on_signals(stop.set):
            cpus = payload["config"]["scaling"]["cpus_per_worker"] or len(os.sched_getaffinity(0))
            _fit_by_ray({**payload, "stop": stop, "cpus": cpus}, {"num_workers": 0}, 0)
    except (UserError, Stopped, KeyboardInterrupt) as error:
        return error
    return None


def train_on_workers(
    config: Config, payload: dict[str, Any], stop: threading.Event | None = None
) -> BaseException | None:
    """Returns what ended it before its time. `stop`: asks it to save and stop, as a signal does."""
    from potstill.cluster import said_while_waiting, shown, start_ray

    start_ray()
    import ray

    from potstill.handover import marked, open_desk

    run_dir = Path(payload["run_dir"])
    scaling = _scaling(config)
    scribe = open_desk(_Scribe)
    each = scaling["resources_per_worker"]
    warned = bool(os.environ.get("RAY_ADDRESS"))  # of a spot machine's end
    payload = {**payload, "scribe": scribe, "warned": warned}
    payload |= {"cpus": each["CPU"], "gpu": "GPU" in each}
    outcome: list[BaseException | None] = []

    def train() -> None:
        try:
            with marked(run_dir) as mark:
                task = {**payload, "mark": mark}
                _fit_by_ray(task, scaling, config.scaling.max_failures)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    # in the main thread Ray would put its own handler in the place of ours, which ends the process
    thread = threading.Thread(target=train, name="ray-train", daemon=True)
    stop = stop or threading.Event()
    asked_at = 0.0
    known = runs.last_attempt(run_dir)

    def has_begun() -> bool:
        return runs.last_attempt(run_dir) > known

    what = f"{scaling['num_workers']} x ({', '.join(f'{v:g} {k}' for k, v in each.items())})"
    what += shown(scaling["label_selector"] or {})
    try:
        with _stop_on_signals(stop.set), said_while_waiting(what, has_begun):
            thread.start()
            while thread.is_alive():
                thread.join(POLL_S)
                if not stop.is_set():
                    continue
                if not has_begun():  # nobody there to save, or to hear of it
                    return Stopped(f"stopped while it waited for {what}")
                if not asked_at:
                    scribe.ask_to_stop.remote()
                    asked_at = time.monotonic()
                elif time.monotonic() - asked_at > UNHEARD_S and _silent(scribe) > UNHEARD_S:
                    return Stopped(
                        "stopped without an answer from its workers (a node may be gone): what they saved last counts"
                    )
    except KeyboardInterrupt as error:
        return error
    finally:
        ray.kill(scribe)
    if (error := outcome[0]) is not None:
        return _failure(error)
    end = [r for r in runs.read_journal(run_dir) if r["kind"] == "end"][-1]
    return Stopped(end["reason"]) if end["status"] == "stopped" else None


def _silent(scribe: Any) -> float:
    import ray

    return ray.get(scribe.silent_s.remote())


def _failure(error: BaseException) -> BaseException:
    """What is left of Ray's TrainingFailedError for a user; anything else stays as it is."""
    import ray.train

    if not isinstance(error, ray.train.TrainingFailedError):
        return error
    if isinstance(mistake := getattr(error, "controller_failure", None), UserError):
        return mistake
    causes = getattr(error, "worker_failures", None) or {}
    lines = [
        f"worker {r}: {(str(c).strip().splitlines() or ['?'])[-1]}"
        for r, c in sorted(causes.items())
    ]
    return RunFailed(
        f"training failed: {'; '.join(lines) or error}. The same command goes on from the last checkpoint; "
        "Ray's logs are in /tmp/ray/session_latest/logs/train"
    )


def _scaling(config: Config) -> dict[str, Any]:
    """ScalingConfig's arguments. Raises UserError for more than this machine has; a cluster may grow."""
    import ray

    from potstill.cluster import gpus_by_default, nodes_with, selector

    asked, n = config.scaling, config.scaling.num_workers
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0)
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    use_gpu = asked.use_gpu
    if use_gpu is None:
        use_gpu = gpus_by_default(gpus, n)
    if use_gpu and gpus < n and not on_cluster:
        raise UserError(
            f"scaling.num_workers must be <= the number of GPUs ({gpus:g}) with scaling.use_gpu=true, got {n}; "
            "use scaling=cpu or fewer workers"
        )
    labels = selector("train" if use_gpu else "data", asked.labels)
    cpus = asked.cpus_per_worker or max(1, cores // n)
    if on_cluster and not asked.cpus_per_worker:
        # no more than the smallest node has; where none is there yet, and with a GPU, a worker asks for one core and
        # then takes its share of whatever node comes: see _cores
        each = [c for node in nodes_with(labels) if (c := int(node["Resources"].get("CPU", 0)))]
        cpus = 1 if use_gpu or not each else max(1, min(sum(each) // n, *each))
    if n * cpus > cores and not on_cluster:
        raise UserError(
            f"scaling.num_workers x scaling.cpus_per_worker must be <= the machine's {cores} cores, got {n} x {cpus}; "
            "use fewer workers"
        )
    per_worker = {"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}
    return {
        "num_workers": n,
        "use_gpu": use_gpu,
        "resources_per_worker": per_worker,
        "label_selector": labels or None,
    }


def _fit_by_ray(payload: dict[str, Any], scaling: dict[str, Any], max_failures: int) -> None:
    """Let Ray Train call `_work` on its workers, or here. Raises what ended it."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    class EndAtMistakes(ray.train.UserCallback):
        """What a user must mend ends the run, on whichever worker it is found: the others may wait for that one, for
        hours, and Ray would start all of them again."""

        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, UserError):
                    raise error

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    rehearsal = payload["config"]["scaling"]["rehearse"]
    # Ray keeps a record of its own there, which nobody reads again
    with tempfile.TemporaryDirectory(
        prefix="potstill-ray-train-", ignore_cleanup_errors=True
    ) as storage:
        TorchTrainer(
            _work,
            train_loop_config=payload,
            # a rank may wait for another one's node to fetch its copy of the set
            torch_config=TorchConfig(backend="gloo" if rehearsal else None, timeout_s=4 * 3600),
            scaling_config=ray.train.ScalingConfig(**scaling),
            run_config=ray.train.RunConfig(
                # Ray is told of no checkpoint: its own record, damaged, would refuse to go on; ours is checked
                name=Path(payload["run_dir"]).name,
                storage_path=storage,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                callbacks=[EndAtMistakes()],
            ),
        ).fit()


@contextlib.contextmanager
def _follow(run_dir: Path, printer: EpochPrinter) -> Iterator[None]:
    """Let console and history follow the journal's file, until the block ends and all of it is told."""
    path = run_dir / "journal.jsonl"
    position = path.stat().st_size if path.exists() else 0
    over = threading.Event()

    def follow() -> None:
        nonlocal position
        rest = b""
        while True:
            last_look = over.is_set()
            if path.exists():
                with open(path, "rb") as file:
                    file.seek(position)
                    rest += file.read()
                    position = file.tell()
                *lines, rest = rest.split(b"\n")
                records = runs.parse_lines(lines)
                if any(r["kind"] in ("epoch", "attempt") for r in records):
                    # a full disk: who trains says so, and it is written again at the end
                    with contextlib.suppress(OSError):
                        report.write_history(run_dir)
                for record in records:
                    printer.handle(record)
            if last_look:
                return
            over.wait(POLL_S)

    thread = threading.Thread(target=follow, name="journal-follower", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        printer.close()


def _end_journal(run_dir: Path, error: BaseException | None) -> None:
    """The first worker writes how its run ended, but for what a user must mend, of which any one may be the first to
    know: that, and what they could not write, the driver does."""
    raw = runs.read_journal(run_dir)
    attempt = max((r["attempt"] for r in raw if r["kind"] == "attempt"), default=0)
    failed = error is not None and not isinstance(error, KeyboardInterrupt | Stopped)
    if not failed and (any(r["kind"] == "end" for r in raw) or not attempt):
        return
    step = max((r["step"] for r in raw if r["kind"] == "checkpoint"), default=0)
    about = {"kind": "end", "attempt": max(attempt, 1), "step": step, "time": time.time()}
    how = ("failed", str(error)) if failed else ("stopped", "")
    runs.append_records(run_dir, [{**about, "best": None, "status": how[0], "reason": how[1]}])


def summarise(run_dir: Path) -> dict[str, Any]:
    """summary.json: how the run ended and its best epoch, all from the journal."""
    records = runs.read_journal(run_dir)
    epochs = [r for r in records if r["kind"] == "epoch"]
    attempts = [r for r in records if r["kind"] == "attempt"]
    end = next(
        (r for r in records if r["kind"] == "end"),
        {"status": "stopped", "reason": "", "best": None},
    )
    best = max((r for r in epochs if r["best"]), key=lambda r: r["epoch"], default=None)
    summary: dict[str, Any] = {
        "name": run_dir.name,
        "status": end["status"],
        "reason": end["reason"],
        "epochs": len(epochs),
        "best": end["best"],
        "best_metrics": {k: best[k] for k in runs.history_keys(epochs)} if best else None,
        "parameters": attempts[-1]["parameters"] if attempts else None,
        "model_file_mb": None,
        "seconds": epochs[-1]["total_seconds"] if epochs else 0.0,
        "top_k": epochs[-1]["top_k"] if epochs else None,
        "warnings": _warnings(records),
    }
    if best:  # all checkpoints of a run hold the same tensors
        files = sorted((run_dir / "checkpoints").glob("step-*/model.safetensors"))
        summary["model_file_mb"] = files[-1].stat().st_size / 1e6 if files else 0.0
    return summary


def _warnings(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Every warning of the run, once: those about the data are said anew by each attempt and epoch."""
    said = [w for r in records for w in ([r] if r["kind"] == "warning" else r.get("warnings", ()))]
    found = [{k: w[k] for k in ("name", "message")} for w in said]
    return [w for i, w in enumerate(found) if w not in found[:i]]


def _say_summary(summary: dict[str, Any], run_dir: Path) -> None:
    if best := summary["best_metrics"]:
        chosen = "".join(
            f", {metric_names.title(key)} {metric_names.shown(key, best[key])}"
            for key in metric_names.further(best)
            if best[key] is not None
        )
        console.say(
            f"{summary['name']}: {summary['status'].replace('_', ' ')} after {summary['epochs']} epochs, "
            f"best val top-1 {best['val_top1_acc']:.2f}%, macro-F1 {best['val_macro_f1']:.2f}%{chosen}, loss {best['val_loss']:.4f}; "
            f"{summary['parameters']:,} parameters, {summary['model_file_mb']:.1f} MB"
        )
    console.say(f"Run: {run_dir}  (report.html, plots/, training_history.json)")


# ----------------------------------------------------------------------------------------- the workers
class _Scribe(Desk):
    """The one writer of a run's journal, on the driver's node; it also hands on the wish to stop."""

    def __init__(self) -> None:
        self.stopping = False
        self.heard = -math.inf
        """When a worker last was there."""

    def ask_to_stop(self) -> None:
        self.stopping = True

    def asked_to_stop(self) -> bool:
        return self.stopping

    def hear(self) -> None:
        self.heard = time.monotonic()

    def silent_s(self) -> float:
        return time.monotonic() - self.heard


def _work(payload: dict[str, Any]) -> None:
    """What every worker runs. UserError, of any one, ends all of them: see `_fit_by_ray`."""
    from ray.train import get_context

    config: Config = from_dict(Config, payload["config"])
    sys.path += [folder for folder in payload["path"] if folder not in sys.path]
    load_plugins(config.plugins)
    context = get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    session = _RaySession(Path(payload["run_dir"]), rank, world_size, payload)
    try:
        with session.heard():
            _train_worker(config, session, payload)
    except Stopped as error:
        session.end("stopped", str(error), None)
        if session.in_process:
            raise
    except UserError:
        session.flush()
        raise
    except Exception as error:
        if not session.in_process:  # Ray replaces the workers; nobody would hear why
            session.tell_failure(error)
        raise


def _train_worker(config: Config, session: _RaySession, payload: dict[str, Any]) -> None:
    from potstill.assemble import prepare_process, train_run

    prepare_process(_cores(config, session, payload))
    device = _device(config, session, payload)
    cache_dir = Path(payload["cache_dir"])
    if session.elsewhere:
        from potstill.handover import brought

        cache_dir = brought(config, cache_dir, payload["scribe"])
    progress, early = train_run(
        config, cache_dir, session, device, session.attempt, payload["findings"]
    )
    why = f"{config.loop.monitor} has not improved for {progress.bad_epochs} epochs"
    session.end("stopped_early" if early else "finished", why if early else "", progress.best)


def _cores(config: Config, session: _RaySession, payload: dict[str, Any]) -> int:
    """How many this worker computes with: what it was given or, where nobody has said how many, its share of the node."""
    if session.in_process or config.scaling.cpus_per_worker:
        return payload["cpus"]
    import ray
    from ray.train import get_context

    from potstill.cluster import alive_nodes, cores_of_gpu

    if payload["gpu"]:
        return max(payload["cpus"], cores_of_gpu())
    here = ray.get_runtime_context().get_node_id()
    cores = next(n["Resources"].get("CPU", 1) for n in alive_nodes() if n["NodeID"] == here)
    return max(payload["cpus"], int(cores) // get_context().get_local_world_size())


def _device(config: Config, session: _RaySession, payload: dict[str, Any]) -> torch.device:
    import torch

    if session.in_process:
        on_gpu = torch.cuda.is_available() and config.scaling.use_gpu is not False
        if config.scaling.use_gpu and not on_gpu:
            raise UserError(
                "scaling.use_gpu must be false or null on a machine without a GPU, got true"
            )
        return torch.device("cuda:0" if on_gpu else "cpu")
    if config.scaling.rehearse:
        return torch.device("cpu")
    from ray.train.torch import get_device

    if payload["gpu"] and get_device().type == "cpu":
        raise UserError(
            f"scaling.use_gpu must be false where PyTorch finds no GPU, got true, and none was found on "
            f"{os.uname().nodename} (jobs/doctor.py tells why); scaling.rehearse=true trains on its cores instead"
        )
    return get_device()


class _RaySession(JournalSession):
    """`loop.Session` over Ray Train: checkpoints by `runs`, journal by the driver's node."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, payload: dict[str, Any]) -> None:
        self._scribe: Any = payload.get("scribe")
        self._stop: threading.Event | None = payload.get("stop")
        self.in_process = self._scribe is None
        self.elsewhere = not self.in_process and not payload["mark"].seen()
        """Whether the run's folder is not seen from here."""
        self._saved = -math.inf
        self._every, self._left, self._agreed = 1, 1, -math.inf
        """So many updates from one agreement of the ranks to the next, until that, and when they last agreed."""
        self._warned = payload.get("warned", False)
        self._scribes = None if self.in_process else FarFolder(self._scribe, run_dir)
        super().__init__(run_dir, rank, world_size, self._scribes if self.elsewhere else None)
        self.attempt = 1 + (self._scribes or self.folder).last_attempt()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Let the driver know that this process is there, whatever the loop is busy with: that may take minutes."""
        over = threading.Event()

        def tell() -> None:
            while not over.wait(ALIVE_S):
                self._scribe.hear.remote()  # nobody waits for it

        if self.rank == 0 and not self.in_process:
            threading.Thread(target=tell, name="sign-of-life", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _write(self, records: list[dict[str, Any]]) -> None:
        (self._scribes or self.folder).append(records)  # one writer, whoever tells it

    def _told(self, metrics: dict[str, Any], kept: Checkpoint | None) -> None:
        import ray.train

        ray.train.report(metrics)
        # it has taken its time, and so had validation: the ranks agree after the next update
        self._every, self._left, self._agreed = 1, 1, time.monotonic()

    def resume_from(self) -> tuple[Checkpoint | None, list[str]]:
        """Rank 0 looks, so that all ranks start from the same one. Collective."""
        told: list[Any] = [self.folder.newest() if self.rank == 0 else (None, [])]
        if self.world_size > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(told)
        found, passed_over = told[0]
        if found is not None and isinstance(self.folder, FarFolder):
            found = self.folder.bring(found)
        return found, passed_over

    def asked(self) -> str:
        """Asked after every update; on workers, which must agree, the driver and Ray are asked less often."""
        if self._scribe is None:
            return "stop" if self._stop is not None and self._stop.is_set() else ""
        self._left -= 1
        if self._left > 0:
            return ""
        import ray
        import ray.train
        import torch.distributed as dist

        # a barrier, so only where anybody would warn of a node's end
        notice = self._warned and ray.train.get_preemption_info() is not None
        answer = ""
        if self.rank == 0 and ray.get(self._scribe.asked_to_stop.remote()):
            answer = "stop"
        elif self.rank == 0 and notice and time.monotonic() - self._saved > SAVE_AGAIN_S:
            self._saved = time.monotonic()
            self.note("a node of this run will soon be gone: saving, and going on")
            answer = "save"
        told = [answer, self._pace()]
        if self.world_size > 1:
            dist.broadcast_object_list(told)
        answer, self._every = told
        self._left = self._every
        return answer

    def _pace(self) -> int:
        """How many updates AGREE_S has room for: one may take a minute, and a machine be gone in two."""
        now = time.monotonic()
        each_s = max((now - self._agreed) / self._every, 1e-6)
        self._agreed = now
        return max(1, min(AGREE_UPDATES, int(AGREE_S / each_s)))
