"""Ray Train: one run on N workers, or in this process. The driver's side and the workers' session."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill import console, report, runs
from potstill.config import (
    Config,
    config_hash,
    differing_keys,
    from_dict,
    load_run_config,
    to_dict,
    to_yaml,
)
from potstill.console import EpochPrinter
from potstill.data.prepare import Plan, check, prepare_shown
from potstill.errors import UserError

if TYPE_CHECKING:
    from potstill.loop import Snapshot
    from potstill.runs import Checkpoint

FLUSH_S = 0.5
POLL_S = 0.1


# ------------------------------------------------------------------------------------------ the driver
def fit(config: Config) -> dict[str, Any]:
    """Train one run, or go on with it, or only read it if it has finished. Returns its summary.

    Raises UserError, before anything expensive starts wherever that is possible.
    """
    run_dir = _run_folder(config)
    if (done := _finished(run_dir)) is not None:
        _refuse_other_config(config, run_dir)
        console.say(f"{run_dir.name} has finished already; run.again=true starts another")
        _say_summary(done, run_dir)
        return done
    plan = check(config.data, config.cache)
    _refuse_before_start(config, plan)
    _refuse_other_config(config, run_dir)
    _check_model(config, plan)
    with runs.lock(run_dir):
        prepared = prepare_shown(config.data, config.cache)
        _write_identity(config, run_dir, plan, prepared.report["counts"])
        findings = _seen_before(config, run_dir, prepared.cache_dir)
        return _train(config, run_dir, prepared.cache_dir, findings)


def _run_folder(config: Config) -> Path:
    base = (
        config.run.name
        or f"{config.experiment or 'run'}{'-debug' if config.debug else ''}-{config_hash(config)}"
    )
    if "/" in base or base.startswith("."):
        raise UserError(
            f"run.name must be a folder's name without '/' and not start with '.', got {base!r}"
        )
    root = Path(config.runs.dir).expanduser().absolute()
    folder, n = root / base, 1
    while config.run.again and (folder / "run.json").exists():
        n += 1
        folder = root / f"{base}-{n}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"runs.dir must be a folder that can be written, got {config.runs.dir!r} ({error.strerror})"
        ) from None
    return folder


def _finished(run_dir: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        summary = runs.read_json(run_dir / "summary.json")
        if summary["status"] in ("finished", "stopped_early"):
            return summary
    return None


def _refuse_other_config(config: Config, run_dir: Path) -> None:
    if not (run_dir / "config.yaml").exists():
        return
    if differing := differing_keys(load_run_config(run_dir), config):
        raise UserError(
            f"run.name: {run_dir.name} was started with another config ({'; '.join(differing[:8])}); "
            "give this one another run.name, or the old values"
        )


def _refuse_before_start(config: Config, plan: Plan) -> None:
    """What the listing of the data is enough to refuse; no torch is imported here."""
    split = np.asarray(plan.rows.split)
    training = int((split == "train").sum())
    if config.loop.batch_size > training:
        raise UserError(
            f"loop.batch_size must be <= the number of training images, got {config.loop.batch_size} for {training} "
            f"images in {plan.rows.root}; set loop.batch_size={min(16, training)} or use more data"
        )
    source = config.model.get("init_from")
    if source and not Path(source).expanduser().exists():
        raise UserError(
            f"model.init_from must be a run's folder or a weights file, got {source!r}, which does not exist"
        )
    if config.teacher.run:
        teacher = runs.open_run(config.teacher.run, "teacher.run")
        from potstill.task import match_classes

        match_classes(
            runs.read_json(teacher / "run.json")["classes"], plan.rows.classes, config.teacher.run
        )
        runs.best_checkpoint(teacher)


def _check_model(config: Config, plan: Plan) -> None:
    """Name, terms and constructor of the model; imports timm, which takes seconds."""
    from potstill.models.images import check_name
    from potstill.task import build_terms

    build_terms(config.task["terms"])
    check_name(config.model["name"])


def _write_identity(config: Config, run_dir: Path, plan: Plan, counts: dict[str, int]) -> None:
    """config.yaml and run.json: once, when the run starts."""
    if (run_dir / "run.json").exists():
        return
    config.run.name = run_dir.name
    config.data.root = str(plan.rows.root)
    runs.atomic_write(run_dir / "config.yaml", to_yaml(config))
    commit, dirty = _git()
    about = {
        "name": run_dir.name,
        "experiment": config.experiment,
        "created": time.time(),
        "classes": plan.rows.classes,
        "dataset": {
            "key": plan.key,
            "dir": str(plan.folder),
            "root": str(plan.rows.root),
            "counts": counts,
        },
        "git_commit": commit,
        "git_dirty": dirty,
        "teacher_run": config.teacher.run and str(Path(config.teacher.run).expanduser().resolve()),
        "init_from": config.model.get("init_from"),
        "tags": config.run.tags,
        "config_hash": config_hash(config),
        "versions": {
            p: importlib.metadata.version(p) for p in ("potstill", "torch", "timm", "ray")
        },
    }
    runs.write_json(run_dir / "run.json", about)


def _git() -> tuple[str | None, bool]:
    """The commit that this code is of, and whether it was changed since."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None, False
    return commit, bool(status)


def _seen_before(config: Config, run_dir: Path, cache_dir: Path) -> list[dict[str, str]]:
    """Warn of validation images that a teacher or an init_from was trained on; notes our own training images."""
    from potstill.data.cache import open_cache

    cache = open_cache(cache_dir)
    np.save(run_dir / "train_hashes.npy", np.unique(_prefixes(cache.split("train").hashes)))
    validation = _prefixes(cache.split("val").hashes)
    found = []
    for key, source in (
        ("teacher.run", config.teacher.run),
        ("model.init_from", config.model.get("init_from")),
    ):
        hashes = Path(source or "").expanduser() / "train_hashes.npy"
        if source and hashes.exists():
            seen = int(np.isin(validation, np.load(hashes)).sum())
            if seen:
                message = f"{key} was trained on {seen} of the {len(validation)} validation images: its part in the result is flattered"
                found.append({"name": "validation_seen", "message": message})
    return found


def _prefixes(hashes: np.ndarray) -> np.ndarray:
    """The first 8 bytes of each SHA-256 as a number [N]."""
    return np.frombuffer(hashes.astype("S32").tobytes(), dtype=np.uint64)[::4]


def _train(
    config: Config, run_dir: Path, cache_dir: Path, findings: list[dict[str, str]]
) -> dict[str, Any]:
    from potstill.tracking import AimFollower

    runs.mend_journal(run_dir)
    repo = Path(config.tracking.repo or config.runs.dir).expanduser().absolute()
    printer = EpochPrinter(run_dir.name)
    aim = AimFollower(run_dir, repo, console.warn) if config.tracking.name == "aim" else None
    payload = {
        "config": to_dict(config),
        "run_dir": str(run_dir),
        "cache_dir": str(cache_dir),
        "findings": findings,
    }
    with _follow(run_dir, printer):
        error = (
            _train_here(payload)
            if config.scaling.num_workers == 0
            else _train_on_workers(config, payload)
        )
        _end_journal(run_dir, error)
    summary = _summarise(run_dir)
    runs.write_json(run_dir / "summary.json", summary)
    if summary["epochs"]:
        report.report(run_dir)
    if aim is not None:
        aim.close()
    if error is not None:
        raise error
    _say_summary(summary, run_dir)
    return summary


def _train_here(payload: dict[str, Any]) -> BaseException | None:
    """Ray Train's local mode: the trainer calls the function in this process.

    The first SIGINT or SIGTERM asks the loop to save and stop; a second one interrupts it.
    """
    stop = threading.Event()

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        console.say("Saving, then stopping; press Ctrl-C again to stop without saving")

    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            before = {
                number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
            }
        _trainer({**payload, "stop": stop}, {"num_workers": 0}, max_failures=0).fit()
    except (UserError, KeyboardInterrupt) as error:
        return error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return None


def _train_on_workers(config: Config, payload: dict[str, Any]) -> BaseException | None:
    from potstill.cluster import start_ray

    start_ray()
    import ray
    import ray.train
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    scaling = _scaling(config, ray.cluster_resources())
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    scribe: Any = (
        ray.remote(_Scribe).options(num_cpus=0, scheduling_strategy=here).remote(payload["run_dir"])
    )
    try:
        _trainer({**payload, "scribe": scribe}, scaling, config.scaling.max_failures).fit()
    except KeyboardInterrupt as error:
        return error
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", None) or {}
        lines = [
            f"worker {rank}: {str(cause).strip().splitlines()[-1]}"
            for rank, cause in sorted(causes.items())
        ]
        return RunFailed(
            f"{'; '.join(lines) or error}. The same command goes on from the last checkpoint; "
            "Ray's logs are in /tmp/ray/session_latest/logs/train"
        )
    finally:
        ray.kill(scribe)
    refused = [
        r
        for r in runs.read_journal(Path(payload["run_dir"]))
        if r["kind"] == "end" and r["status"] == "failed"
    ]
    return UserError(refused[-1]["reason"]) if refused else None


class RunFailed(RuntimeError):
    """Workers were lost more often than scaling.max_failures allows, or raised what is no user's mistake."""


def _scaling(config: Config, resources: Mapping[str, float]) -> dict[str, Any]:
    """ScalingConfig's arguments. Raises UserError for more than the cluster has."""
    n, cpus_here, gpus_here = (
        config.scaling.num_workers,
        int(resources.get("CPU", 0)),
        resources.get("GPU", 0),
    )
    use_gpu = config.scaling.use_gpu if config.scaling.use_gpu is not None else gpus_here >= n
    if use_gpu and gpus_here < n and not os.environ.get("RAY_ADDRESS"):
        raise UserError(
            f"scaling.num_workers must be <= the number of GPUs ({gpus_here:g}) with scaling.use_gpu=true, got {n}; "
            "use scaling=cpu or fewer workers"
        )
    cpus = config.scaling.cpus_per_worker or max(1, cpus_here // n)
    if n * cpus > cpus_here and not os.environ.get("RAY_ADDRESS"):
        raise UserError(
            f"scaling.num_workers x scaling.cpus_per_worker must be <= the machine's {cpus_here} cores, got {n} x {cpus}; "
            "use fewer workers"
        )
    per_worker = {"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}
    return {"num_workers": n, "use_gpu": use_gpu, "resources_per_worker": per_worker}


def _trainer(payload: dict[str, Any], scaling: dict[str, Any], max_failures: int) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    run_dir = Path(payload["run_dir"])
    # Ray's own record of checkpoints is never read again: damaged, it would refuse to resume; ours is checked
    (run_dir / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    return TorchTrainer(
        _work,
        train_loop_config=payload,
        scaling_config=ray.train.ScalingConfig(**scaling),
        run_config=ray.train.RunConfig(
            name=run_dir.name,  # a checkpoint that Ray is told of, and does not copy, must stand in its own folder
            storage_path=str(run_dir.parent),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )


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
                records = [json.loads(line) for line in lines if line]
                if any(r["kind"] in ("epoch", "attempt") for r in records):
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
    """The worker writes how its run ended; where it could not, the driver does."""
    raw = runs.read_journal(run_dir)
    attempt = max((r["attempt"] for r in raw if r["kind"] == "attempt"), default=0)
    if any(r["kind"] == "end" for r in raw) or not attempt:
        return
    step = max((r["step"] for r in raw if r["kind"] == "checkpoint"), default=0)
    stopped = error is None or isinstance(error, KeyboardInterrupt)
    record = {"kind": "end", "attempt": attempt, "step": step, "time": time.time(), "best": None}
    record |= {
        "status": "stopped" if stopped else "failed",
        "reason": "" if stopped else str(error),
    }
    runs.append_records(run_dir, [record])


def _summarise(run_dir: Path) -> dict[str, Any]:
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
        "best_metrics": {k: best[k] for k in runs.HISTORY_KEYS} if best else None,
        "parameters": attempts[-1]["parameters"] if attempts else None,
        "model_file_mb": None,
        "seconds": sum(r["seconds"] for r in epochs),
        "top_k": epochs[-1]["top_k"] if epochs else None,
        "warnings": [w for r in epochs for w in r["warnings"]] + _data_warnings(records),
    }
    if best:
        with contextlib.suppress(UserError):
            checkpoint = runs.best_checkpoint(run_dir)
            summary["model_file_mb"] = (
                checkpoint.folder / "model.safetensors"
            ).stat().st_size / 1e6
    return summary


def _data_warnings(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    found = {
        r["name"]: {"name": r["name"], "message": r["message"]}
        for r in records
        if r["kind"] == "warning"
    }
    return list(found.values())


def _say_summary(summary: dict[str, Any], run_dir: Path) -> None:
    if best := summary["best_metrics"]:
        console.say(
            f"{summary['name']}: {summary['status'].replace('_', ' ')} after {summary['epochs']} epochs, "
            f"best val top-1 {best['val_top1_acc']:.2f}%, macro-F1 {best['val_macro_f1']:.2f}%, loss {best['val_loss']:.4f}; "
            f"{summary['parameters']:,} parameters, {summary['model_file_mb']:.1f} MB"
        )
    console.say(f"Run: {run_dir}  (report.html, plots/, training_history.json)")


# ----------------------------------------------------------------------------------------- the workers
class _Scribe:
    """The journal's one writer, on the driver's node."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    def append(self, records: list[dict[str, Any]]) -> None:
        runs.append_records(self.run_dir, records)


def _work(payload: dict[str, Any]) -> None:
    """What every worker runs. A user's mistake ends the run in the journal, not by a crash that Ray would retry."""
    import torch
    from ray.train import get_context

    from potstill.assemble import prepare_process, train_run
    from potstill.loop import Stopped

    config: Config = from_dict(Config, payload["config"])
    run_dir = Path(payload["run_dir"])
    context = get_context()
    session = _RaySession(run_dir, context.get_world_rank(), context.get_world_size(), payload)
    if session.in_process:
        on_gpu = torch.cuda.is_available() and config.scaling.use_gpu is not False
        if config.scaling.use_gpu and not on_gpu:
            raise UserError(
                "scaling.use_gpu must be false or null on a machine without a GPU, got true"
            )
        device = torch.device("cuda:0" if on_gpu else "cpu")
        prepare_process(config.scaling.cpus_per_worker, 1)
    else:
        from ray.train.torch import get_device

        device = get_device()
        prepare_process(config.scaling.cpus_per_worker, context.get_local_world_size())
    attempt = 1 + runs.last_attempt(run_dir)
    try:
        progress, _ = train_run(
            config, Path(payload["cache_dir"]), session, device, attempt, payload["findings"]
        )
        early = progress.epoch < config.loop.epochs
        why = (
            f"{config.loop.monitor} has not improved for {config.loop.patience} epochs"
            if early
            else ""
        )
        session.end(
            attempt, progress.step, "stopped_early" if early else "finished", why, progress.best
        )
    except Stopped as error:
        session.end(attempt, session.step, "stopped", str(error), None)
        if session.in_process:
            raise
    except UserError as error:
        session.end(attempt, session.step, "failed", str(error), None)
        if session.in_process:
            raise
    except Exception as error:
        if not session.in_process:  # Ray replaces the workers; nobody would hear why
            session.tell_failure(attempt, error)
        raise


class _RaySession:
    """`loop.Session` over Ray Train: checkpoints by `runs`, journal by the driver's node."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, payload: dict[str, Any]) -> None:
        self.run_dir, self.rank, self.world_size = run_dir, rank, world_size
        self.step = 0
        self._scribe = payload.get("scribe")
        self._stop: threading.Event | None = payload.get("stop")
        self.in_process = self._scribe is None
        self._records: list[dict[str, Any]] = []
        self._flushed = time.monotonic()

    def log(self, record: dict[str, Any]) -> None:
        self.step = record["step"]
        if self.rank:
            return
        self._records.append(record)
        if record["kind"] != "step" or time.monotonic() - self._flushed > FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        if self._scribe is None:
            runs.append_records(self.run_dir, self._records)
        else:
            import ray

            ray.get(self._scribe.append.remote(self._records))
        self._records, self._flushed = [], time.monotonic()

    def report(self, metrics: dict[str, Any], snapshot: Snapshot) -> None:
        import ray.train

        checkpoint = None
        if self.rank == 0:
            kept = runs.save_checkpoint(
                self.run_dir,
                snapshot.step,
                snapshot.model_state,
                snapshot.state,
                snapshot.meta,
                snapshot.files,
            )
            runs.prune_checkpoints(self.run_dir)
            checkpoint = ray.train.Checkpoint.from_directory(kept.folder)
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        ray.train.report(
            numbers, checkpoint, checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD
        )

    def resume_from(self) -> tuple[Checkpoint | None, list[str]]:
        return runs.newest_checkpoint(self.run_dir)

    def preempted(self) -> bool:
        return self._stop is not None and self._stop.is_set()

    def end(
        self, attempt: int, step: int, status: str, reason: str, best: dict[str, Any] | None
    ) -> None:
        self.log(
            {
                "kind": "end",
                "attempt": attempt,
                "step": step,
                "time": time.time(),
                "status": status,
                "reason": reason,
                "best": best,
            }
        )
