"""What Ray Tune has to do with a search: when which trial runs, and the trial itself.

A trial of one worker runs the loop inside the Tune trial, whose process goes on to the next one; a trial of several has a
TorchTrainer of its own. Its folder is a run's: what Tune is given as a checkpoint only names one of ours.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Stopper
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from potstill import fit, metric_names, runs
from potstill.cluster import cores_of_gpu, selector
from potstill.config import Config, load_run_config, to_dict
from potstill.errors import UserError
from potstill.handover import Desk, FarFolder, brought, marked, open_desk
from potstill.registry import load_plugins
from potstill.replica import with_local_runs
from potstill.runs import Checkpoint, RunFolder
from potstill.search_plan import ADOPT, data_key, trial_name
from potstill.sessions import JournalSession

if TYPE_CHECKING:
    from potstill.search import _Search

DONORS_KEPT = 4
"""Checkpoints of a trial that others may go on from (pbt)."""
LOCK_WAIT_S = 60.0
"""A trial of a driver that was killed may still run for a moment."""
MARK = "potstill.json"
"""In what Tune takes for a checkpoint: which run's, and where it is."""


# Tune pickles its parts to restore them one day, which we never do: they name their owner instead of holding it
_OWNERS: dict[str, _Search] = {}


def run_trials(
    owner: _Search,
    caches: Mapping[str, Path],
    resources: dict[str, float],
    at_once: int | None,
    storage: Path,
) -> None:
    """Run trials until `owner.next_trial` has no more. `at_once`: how many, where Tune's room does not say it.

    storage: a folder for what Tune keeps, which nobody reads again.
    """
    search, metric = owner.search, owner.plan.metric
    mode = "max" if metric_names.higher_is_better(metric) else "min"
    key = str(owner.folder)
    _OWNERS[key] = owner
    payload = {
        "folder": key,
        "caches": {name: str(path) for name, path in caches.items()},
        "path": sys.path,
        "cpus": max(1, int(resources["cpu"])),
        "gpu": resources.get("gpu", 0),
        # nobody has said how many cores: those that are there for its GPU
        "whole_gpu": resources.get("gpu") == 1
        and not (search.cpus_per_trial or owner.plan.config.scaling.cpus_per_worker),
        "metric": metric,
        "silent_s": 60 * search.silent_minutes,
        "marks": search.scheduler in ("pbt", "hyperband"),
        "donates": search.scheduler == "pbt",
        "of_worker": owner.of_worker,
        "address": os.environ.get(
            "RAY_ADDRESS"
        ),  # that of the driver's, which its trials do not inherit
        # what a failed trial is told to have reached: pbt leaves NaN out, hyperband cannot sort it
        "failed": {"max": -math.inf, "min": math.inf}[mode]
        if search.scheduler == "hyperband"
        else math.nan,
    }
    scheduler = _scheduler(owner, metric, mode)
    _tell_scheduler(scheduler, owner)
    room = _room(resources, owner.plan.config.scaling.labels)
    seen = contextlib.ExitStack()
    try:
        payload["mark"] = seen.enter_context(marked(owner.folder))
        payload["desk"] = desk = open_desk(Desk)
        seen.callback(ray.kill, desk)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(_run_trial, payload=payload), room),
            tune_config=tune.TuneConfig(
                search_alg=_Proposals(key, at_once, metric, mode),
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            run_config=RunConfig(
                name="search",
                storage_path=str(storage),
                callbacks=[_Reporter(key)],
                stop=_WhenAsked(key),
                verbose=0,
                failure_config=FailureConfig(max_failures=owner.plan.config.scaling.max_failures),
                checkpoint_config=CheckpointConfig(),
            ),
        ).fit()
    finally:
        seen.close()
        del _OWNERS[key]
    if owner.broken is not None:
        raise owner.broken


def _room(resources: Mapping[str, float], labels: Mapping[str, str]) -> tune.PlacementGroupFactory:
    """Where a trial's own process goes: to nodes of its role, or beside the driver if it only waits for its workers."""
    if resources["cpu"]:
        bundle = {"CPU": resources["cpu"], "GPU": resources.get("gpu", 0)}
        where = selector("train" if resources.get("gpu") else "data", labels)
    else:  # Tune takes no bundle that asks for nothing; the driver's node sees the runs
        bundle = {"memory": resources["memory"]}
        where = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[where])


def _name_of(trial: Any) -> str:
    return trial_name(trial.config["number"])


class _Proposals(Searcher):
    """Hands on what the search proposes."""

    def __init__(self, owner: str, at_once: int | None, metric: str, mode: str) -> None:
        super().__init__(metric=metric, mode=mode)
        self._owner, self._at_once = owner, at_once

    def suggest(self, trial_id: str) -> Any:
        owner = _OWNERS[self._owner]
        try:
            found = owner.next_trial(self._at_once)
        except UserError as error:  # Tune would tell it with its own traceback
            owner.broken = error
            return Searcher.FINISHED
        if isinstance(found, str):
            return None if found == "later" else Searcher.FINISHED
        return {"number": found}

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        pass  # _Reporter hears of it by the trial's number

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text("")

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("Tune restores nothing here: a search goes on by its own journal")


class _Reporter(Callback):
    """Tells the search what its trials do."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        _OWNERS[self._owner].has_begun = True

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        _OWNERS[self._owner].heard(trial.config["number"], result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        _OWNERS[self._owner].ended(trial.config["number"], None)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        owner = _OWNERS[self._owner]
        owner.ended(trial.config["number"], f"its process was lost: {_cause(trial)}")


def _cause(trial: Any) -> str:
    """The last line of what Tune knows."""
    with contextlib.suppress(Exception):
        lines = str(trial.get_error() or "").strip().splitlines()
        told = [line.strip() for line in lines if line.strip()]
        return told[-1][:300] if told else "no reason was given"
    return "no reason was given"


class _WhenAsked(Stopper):
    def __init__(self, owner: str) -> None:
        self._owner = owner

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        owner = _OWNERS[self._owner]
        return bool(owner.stopping) or owner.broken is not None


# ------------------------------------------------------------------------------------------ schedulers
def _scheduler(owner: _Search, metric: str, mode: str) -> TrialScheduler:
    """By epochs, not by Tune's iterations, which begin at 1 again whenever a trial is gone on with."""
    search, epochs = owner.search, owner.plan.epochs
    about: dict[str, Any] = {"time_attr": "epoch", "metric": metric, "mode": mode}
    if search.scheduler == "asha":
        return _Asha(
            **about,
            max_t=epochs + 1,  # a whole trial ends by itself
            grace_period=min(search.grace_epochs, epochs),
            reduction_factor=search.reduction,
        )
    if search.scheduler == "hyperband":
        return HyperBandScheduler(
            **about,
            max_t=epochs + 1,  # as above: one that has ended by itself must not be waited for
            reduction_factor=max(2, round(search.reduction)),
        )
    if search.scheduler == "median":
        return _Median(**about, grace_period=search.grace_epochs, min_samples_required=3)
    if search.scheduler == "pbt":
        return _Population(
            str(owner.folder),
            **about,
            perturbation_interval=search.grace_epochs,
            custom_explore_fn=_unchanged,
            log_config=False,
        )
    return FIFOScheduler()


def _unchanged(config: dict[str, Any]) -> dict[str, Any]:
    return config


class _Population(PopulationBasedTraining):
    """PBT over the search's own space, conditions kept (arXiv:1711.09846)."""

    def __init__(self, owner: str, **options: Any) -> None:
        super().__init__(**options)
        self._owner = owner

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # Tune refuses searchers here because it would change settings behind their back; ours hears of every change
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)  # type: ignore[arg-type]

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict, dict]:
        owner = _OWNERS[self._owner]
        given = self._trial_state[trial_to_clone].last_checkpoint
        assert isinstance(given, tune.Checkpoint)  # without one there is no exploit
        with given.as_directory() as folder:
            mark = runs.read_json(Path(folder) / MARK)
        numbers = trial.config["number"], trial_to_clone.config["number"]
        return owner.explored(*numbers, mark), {}


class _Asha(AsyncHyperBandScheduler):
    """ASHA that knows what trials of earlier starts have reached (arXiv:1810.05934)."""

    def tell(self, name: str, curve: Mapping[int, float], ended: bool) -> None:
        """A trial's metric by epoch, under its name."""
        past: Any = SimpleNamespace(trial_id=name)
        assert self._metric_op is not None
        for epoch, value in sorted(curve.items()):
            self._brackets[0].on_result(past, epoch, self._metric_op * value)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for _, recorded in self._trial_info[trial.trial_id]._rungs:
            if (seen := recorded.pop(_name_of(trial), None)) is not None:
                recorded[trial.trial_id] = seen  # it goes on under Tune's new name for it


class _Median(MedianStoppingRule):
    """The median rule, over trials of earlier starts, too (doi:10.1145/3097983.3098043)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._unfinished: dict[str, list[dict[str, Any]]] = {}

    def tell(self, name: str, curve: Mapping[int, float], ended: bool) -> None:
        results = [{self._time_attr: e, self._metric: v} for e, v in sorted(curve.items())]
        if ended and results:
            self._results[name] = results
        else:
            self._unfinished[name] = results

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        if past := self._unfinished.pop(_name_of(trial), None):
            self._results[trial] = past


def _tell_scheduler(scheduler: TrialScheduler, owner: _Search) -> None:
    """Let a new scheduler know what trials of earlier starts have reached, so that it judges by them."""
    if isinstance(scheduler, _Asha | _Median):  # the others compare trials that are there together
        unfinished = {t.number for t in owner.ledger.unfinished()}
        for trial in owner.ledger.trials.values():
            curve = owner._curve(trial)
            scheduler.tell(trial.name, curve, trial.number not in unfinished)


# ------------------------------------------------------------------------------------------- the trial
def _run_trial(config: dict[str, Any], payload: dict[str, Any]) -> None:
    """One trial, in its process. Whatever it dies of is written down and ends it alone."""
    run_dir = Path(payload["folder"]) / "trials" / trial_name(config["number"])
    sys.path += [folder for folder in payload["path"] if folder not in sys.path]
    here = payload["mark"].seen()
    folder = _TrialFolder(run_dir) if here else _FarTrialFolder(payload["desk"], run_dir)
    told = False
    # a trial that nobody sees from here has its owner's lock; Ray ends it with its driver
    with _locked(run_dir) if here else contextlib.nullcontext():
        if not _has_ended(folder):
            told = _trained(folder, payload)
    _free_memory()
    if not told:  # schedulers must hear of a trial before it ends
        epochs = [r["epoch"] for r in folder.journal() if r["kind"] == "epoch"]
        tune.report({payload["metric"]: payload["failed"], "epoch": max(epochs, default=0)})


def _trained(folder: _TrialFolder, payload: dict[str, Any]) -> bool:
    """Train, or write down why not. Returns whether Tune has heard of an epoch."""
    session = _TrialSession(folder, payload)
    session.attempt = 1 + folder.last_attempt()
    try:
        if payload["marks"] and isinstance(folder, _FarTrialFolder):
            raise UserError(
                "search.scheduler must be asha, median or none where nodes do not see runs.dir, got pbt or hyperband, "
                f"and {os.uname().nodename} does not see {payload['folder']}; use storage that all nodes mount"
            )
        with _watched(session, payload["silent_s"]):
            trained = folder.config()
            load_plugins(trained.plugins)
            _adopt_if_told(session)
            if trained.scaling.num_workers > 1:
                _train_by_workers(trained, session, payload)
            else:
                _train_here(trained, session, payload)
    except Exception as error:
        folder.write_error(traceback.format_exc())
        session.fail(_reason(error))
    return session.told


class _TrialFolder(RunFolder):
    """What a trial asks of its run's folder."""

    def config(self) -> Config:
        return with_local_runs(load_run_config(self.run_dir))

    def write_error(self, text: str) -> None:
        (self.run_dir / "error.txt").write_text(text)

    def seen_before(self, config: Config, cache_dir: Path) -> list[dict[str, str]]:
        return fit.seen_before(config, self.run_dir, cache_dir)

    def donated(self, kept: Checkpoint, attempt: int) -> Path:
        """A second name for a checkpoint, under which the run itself does not remove it.

        By attempt: a trial that went on from another's weights comes by the same steps once more.
        """
        root = self.run_dir / "donated"
        folder = root / f"{attempt:04d}" / kept.folder.name
        if not folder.exists():
            beside = folder.with_name(f".{kept.folder.name}")
            shutil.rmtree(beside, ignore_errors=True)
            beside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(kept.folder, beside, copy_function=_link)
            beside.rename(folder)
        for old in sorted(root.glob("*/step-*"))[:-DONORS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def adopt(self) -> dict[str, Any] | None:
        """Take over the weights that adopt.json names; returns what it says, and "step". None: there is none."""
        told = self.run_dir / ADOPT
        if not told.exists():
            return None
        mark = runs.read_json(told)
        donor = runs.load_checkpoint(Path(mark["folder"]))
        runs.adopt_checkpoint(self.run_dir, donor, mark["run"], mark["value"])
        return {**mark, "step": donor.step}

    def adopted(self) -> None:
        (self.run_dir / ADOPT).unlink()


class _FarTrialFolder(FarFolder, _TrialFolder):
    """The same, of a folder on the driver's node."""

    def __init__(self, desk: Any, run_dir: Path) -> None:
        super().__init__(desk, run_dir, _TrialFolder)
        self.desk = desk

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        found, passed_over = super().newest()
        return (self.bring(found) if found else None), passed_over

    def config(self) -> Config:
        return self.ask("config")

    def write_error(self, text: str) -> None:
        self.ask("write_error", text)

    def seen_before(self, config: Config, cache_dir: Path) -> list[dict[str, str]]:
        return self.ask("seen_before", config, cache_dir)

    def donated(self, kept: Checkpoint, attempt: int) -> Path:
        return self.ask("donated", kept, attempt)

    def adopt(self) -> dict[str, Any] | None:
        return self.ask("adopt")

    def adopted(self) -> None:
        self.ask("adopted")


def _free_memory() -> None:
    """The process goes on to other trials, and may share its GPU."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    """In one line, what a trial died of."""
    first = (str(error).strip().splitlines() or ["?"])[0][:300]
    if isinstance(error, UserError):
        return first
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in first.lower():
        return f"it does not fit in memory: {first}"
    return f"{type(error).__name__}: {first}"


def _has_ended(folder: RunFolder) -> bool:
    ends = [r for r in folder.journal() if r["kind"] == "end"]
    return bool(ends) and ends[-1]["status"] != "stopped"


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """As runs.lock, but patient."""
    deadline = time.monotonic() + LOCK_WAIT_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(runs.lock(run_dir))
                break
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield


@contextlib.contextmanager
def _watched(session: _TrialSession, silent_s: float) -> Iterator[None]:
    """End the process if the trial says nothing for so long: nobody else can end what hangs."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(1.0, silent_s / 4)):
            if time.monotonic() - session.heard > silent_s:
                reason = f"it has not finished an epoch for {silent_s / 60:g} minutes (search.silent_minutes)"
                session.fail(reason)
                os._exit(1)

    threading.Thread(target=watch, name="trial-watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class _TrialSession(JournalSession):
    """`loop.Session` inside a Tune trial: every epoch is told to Tune, which may stop the trial there and then."""

    folder: _TrialFolder

    def __init__(self, folder: _TrialFolder, payload: Mapping[str, Any]) -> None:
        super().__init__(folder.run_dir, folder=folder)
        self._payload = payload
        self.heard = time.monotonic()
        self.told = False
        self._epoch: dict[str, Any] = {}

    def log(self, record: dict[str, Any]) -> None:
        super().log(record)
        if record["kind"] == "epoch":
            self._epoch = record

    def fail(self, reason: str) -> None:
        """The last word, whatever attempts others have begun meanwhile."""
        self.attempt = max(self.attempt, self.folder.last_attempt())
        self.end("failed", reason, None)

    def _told(self, metrics: dict[str, Any], kept: Checkpoint | None) -> None:
        if kept is None or not kept.meta["epoch_done"]:
            return  # within an epoch: kept, but nothing to judge by
        self.tell(self._epoch, kept)

    def tell(self, epoch: Mapping[str, Any], kept: Checkpoint) -> None:
        """Report an epoch's numbers. Does not return where Tune stops the trial."""
        self.heard, self.told = time.monotonic(), True
        numbers = {k: v for k, v in epoch.items() if isinstance(v, int | float)}
        if not self._payload["marks"]:
            tune.report(numbers)
            return
        folder = kept.folder
        if self._payload["donates"]:
            folder = self.folder.donated(kept, self.attempt)
        mark = {
            "run": self.run_dir.name,
            "folder": str(folder),
            "value": numbers.get(self._payload["metric"]),
            "epoch": dict(epoch),
        }
        with tempfile.TemporaryDirectory() as beside:
            runs.write_json(Path(beside) / MARK, mark)
            tune.report(numbers, checkpoint=tune.Checkpoint.from_directory(beside))
        self.heard = time.monotonic()


def _train_here(config: Config, session: _TrialSession, payload: Mapping[str, Any]) -> None:
    import torch

    from potstill.assemble import prepare_process, train_run

    prepare_process(max(payload["cpus"], cores_of_gpu() if payload["whole_gpu"] else 1))
    if config.scaling.use_gpu and not torch.cuda.is_available() and not config.scaling.rehearse:
        raise UserError(
            "scaling.use_gpu must be false or null on a machine without a GPU, got true"
        )
    device = torch.device("cuda:0" if payload["gpu"] and torch.cuda.is_available() else "cpu")
    cache_dir = Path(payload["caches"][data_key(config)])
    findings = session.folder.seen_before(config, cache_dir)
    if isinstance(session.folder, _FarTrialFolder):
        cache_dir = brought(config, cache_dir, session.folder.desk)
    progress, early = train_run(config, cache_dir, session, device, session.attempt, findings)
    why = f"{config.loop.monitor} has not improved for {progress.bad_epochs} epochs"
    session.end("stopped_early" if early else "finished", why if early else "", progress.best)


def _train_by_workers(config: Config, session: _TrialSession, payload: Mapping[str, Any]) -> None:
    """A TorchTrainer; its journal is read, and told to Tune epoch by epoch."""
    assert not isinstance(session.folder, _FarTrialFolder)  # it runs on the driver's node
    if payload["address"]:
        os.environ["RAY_ADDRESS"] = payload["address"]
    run_dir = session.run_dir
    cache_dir = Path(payload["caches"][data_key(config)])
    config.scaling.cpus_per_worker = payload["of_worker"]["cpus"]
    config.scaling.use_gpu = payload["of_worker"]["gpu"]
    task = {
        "config": to_dict(config),
        "run_dir": str(run_dir),
        "cache_dir": str(cache_dir),
        "findings": fit.seen_before(config, run_dir, cache_dir),
        "path": sys.path,
    }
    stop = threading.Event()
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            outcome.append(fit.train_on_workers(config, task, stop))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="trial-trainer", daemon=True)
    known = len([r for r in runs.read_journal(run_dir) if r["kind"] == "epoch"])
    thread.start()
    began = session.attempt
    try:
        while True:
            alive = thread.is_alive()
            if runs.last_attempt(run_dir) < began:
                session.heard = time.monotonic()  # its workers still wait for room
            kept, _ = runs.newest_checkpoint(run_dir)
            epochs = [r for r in runs.read_journal(run_dir) if r["kind"] == "epoch"]
            for record in epochs[known:]:
                if kept is None or kept.step < record["step"]:
                    break  # its checkpoint is about to be written
                known += 1
                session.tell(record, kept)
            if not alive:
                break
            thread.join(0.5)
    finally:  # Tune stops a trial by an exception out of `tell`
        stop.set()
        thread.join(LOCK_WAIT_S)
    if outcome and outcome[0] is not None and not _has_ended(session.folder):
        raise outcome[0]


# --------------------------------------------------------------------------- going on from another's weights
def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, target)


def _adopt_if_told(session: _TrialSession) -> None:
    """Take over the weights that adopt.json names; it stays until that is done."""
    if (mark := session.folder.adopt()) is None:
        return
    session.step = mark["step"]
    session.note(f"goes on from {mark['run']}'s weights of step {mark['step']} (pbt)")
    # what these weights were measured at is from now on this trial's, too
    epoch = {**mark["epoch"], "attempt": session.attempt, "time": time.time(), "best": True}
    session.log(epoch)
    session.folder.adopted()
