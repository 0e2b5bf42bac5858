"""Many trainings, to find the best for a budget: the driver's side (Ray Tune's part in it is search_tune.py).

The record is the search's own (search_plan.py), not Tune's: what Tune keeps of an experiment is thrown away, and a search
that goes on is a new Tune experiment, told what has ended. A trial of one worker runs the loop inside the Tune trial, whose
process goes on to the next one; a trial of several has a TorchTrainer of its own.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill import console, fit, metric_names, runs
from potstill.architecture import device_name
from potstill.config import (
    Config,
    checked,
    compose,
    has_teacher,
    resolve_paths,
    to_yaml,
)
from potstill.data.prepare import check, prepared
from potstill.errors import Stopped, UserError
from potstill.replica import refresh, replicated, with_local_runs
from potstill.search_plan import (
    ADOPT,
    AGAIN,
    MOST_DRAWS,
    Ledger,
    Proposer,
    Refused,
    SearchPlan,
    curve_of,
    data_key,
    trial_name,
)
from potstill.search_results import TrialResult, best_of, ranked, write_leaderboard, write_pictures
from potstill.storage import local_folder

POLL_S = 0.2
PICTURES_EVERY_S = 300.0
"""Drawing them takes seconds of a core, which the trials would miss."""
MOST_AGAIN = 50
"""Proposals in a row that were there before, after which one is taken again: a small space may be used up."""


# ------------------------------------------------------------------------------------------ the driver
def tune(config: Config, config_dir: str | None = None) -> dict[str, Any]:
    """Search, or go on with it. Returns what summary.json of the search holds. `config_dir` is searched for the
    teacher's experiment, too.

    Raises UserError, before the first trial wherever that is possible, and Stopped after Ctrl-C.
    """
    plan, teacher = _planned(config, config_dir)
    with runs.lock(plan.folder), replicated(plan.folder, config.runs.dir):
        if teacher is not None:
            console.say("Teacher", "bold underline")
            fit.fit(teacher)
        return _Search(plan).run()


def show_best(config: Config, config_dir: str | None = None) -> None:
    """Print what a search has found so far; nothing is started."""
    plan, _ = _planned(config, config_dir)
    refresh(plan.folder, plan.config.runs.dir)
    trials = list(Ledger.read(plan.folder).trials.values())
    order = [t for t in ranked(trials, plan.objectives) if t.state != "waiting"]
    rows = [
        [
            t.name,
            t.state,
            *(_shown(o.name, t.values.get(o.name)) for o in plan.objectives),
            str(t.epochs),
        ]
        for t in order[:20]
    ]
    if rows:
        columns = ["trial", "state", *(o.name for o in plan.objectives), "epochs"]
        console.table(columns, rows, title=str(plan.folder))
    else:
        console.say(f"{plan.folder}: no trial has ended yet")


def _planned(config: Config, config_dir: str | None) -> tuple[SearchPlan, Config | None]:
    """What is to be searched, and the teacher that must be trained first, if one must."""
    config = copy.deepcopy(config)
    if config.run.again:
        raise UserError(
            "run.again must be false here, got true: no trial is run twice; give the search another run.name"
        )
    resolve_paths(config)
    with_local_runs(
        config
    )  # what is not there is said now; what is kept and what a search is known by are the URIs
    teacher = _teacher_to_train(config, config_dir)
    if teacher is not None:
        config.teacher.run = str(fit.run_folder(teacher))
    return SearchPlan(config), teacher


def _teacher_to_train(config: Config, config_dir: str | None) -> Config | None:
    """The config of the teacher that distil.teacher names, where a term takes one and none is given."""
    takes = [c for node in (config.task, config.search.space) for c in _columns(node)]
    if has_teacher(config) or not config.distil.teacher:
        return None
    if not any(c.startswith("teacher.") for c in takes):
        return None
    given = [f"experiment={config.distil.teacher}", *(["debug=true"] if config.debug else [])]
    found: Config = compose("train", [*given, *config.distil.teacher_overrides], config_dir)
    if found.data.root is None:
        own = found.data
        for name in ("source", "root", "columns", "allow_outside"):
            setattr(own, name, copy.deepcopy(getattr(config.data, name)))
    for section in ("cache", "runs", "tracking", "scaling"):
        setattr(found, section, copy.deepcopy(getattr(config, section)))
    resolve_paths(found)
    return checked(found)


class _Search:
    def __init__(self, plan: SearchPlan) -> None:
        self.plan, self.search, self.folder = plan, plan.search, plan.folder
        self._configs = self._check_data()
        self.ledger = Ledger.read(self.folder)
        self.proposer = Proposer(plan)
        self.live: dict[int, dict[str, Any]] = {}
        """Trials under way: the last result of each."""
        self.has_begun = False
        self.stopping = ""
        """Why no more is to be done, though there is more to do."""
        self.broken: BaseException | None = None
        self.aim: Any = None
        self.began = time.time()
        self._rng = random.Random(f"{self.search.seed}/{self.ledger.attempt}")
        self._results = threading.Lock()
        self._written = time.monotonic()
        self._held: tuple[Any, ...] | None = None
        self._slots = 1
        self.of_worker: dict[str, Any] = {}

    # --------------------------------------------------------------------------- before the first trial
    def _check_data(self) -> dict[str, Config]:
        """A config for every set that trials train on; the refusals of a single run, for the first that is possible."""
        plan, found = self.plan, {}
        points = plan.space.finite(("data.",), 16)
        if points is None:
            raise UserError(
                "search.space may choose among at most 16 sets of data.*, and from lists: each is prepared before the "
                "first trial; search augment.* instead"
            )
        for point in points:
            config = plan.config_of(point)
            key = data_key(config)
            found[key] = config
            before = plan.known_data().get(key, {}).get("key")
            plan.sets[key] = check(config.data, config.cache, prefer=before)
        first = plan.config_of(plan.points[0]) if plan.points else plan.config_of(points[0])
        if self.search.soft_labels:
            self._refuse_soft_labels()
        fit.refuse_before_start(first, plan.folder, plan.sets[data_key(first)])
        fit.check_model(first)
        return found

    def _refuse_soft_labels(self) -> None:
        """Settings that would need soft labels of their own."""
        from potstill.soft_labels import refuse_recipe

        for key in sorted(self.plan.keys):
            if (
                key.startswith(("augment.", "data.", "teacher.", "teachers."))
                and key != "teacher.temperature"
            ):
                raise UserError(
                    f"search.space.{key} cannot be searched with search.soft_labels=true: they are of one teacher and one "
                    "augmentation; take it out, or set search.soft_labels=false"
                )
        refuse_recipe(self.plan.config)

    def _soft_labels(self) -> None:
        """The teacher's outputs, all that any trial takes; every trial then reads them."""
        from potstill.soft_labels import soft_labels

        plan = self.plan
        wanted = {
            c
            for node in [plan.base["task"]["terms"], plan.search.space]
            for c in _columns(node)
            if c.startswith("teacher.")
        }
        every = plan.config_of(plan.points[0] if plan.points else {})
        for column in sorted(wanted):
            term = {"loss": "feature_mse", "inputs": ["features", column], "weight": 0.0}
            every.task["terms"][f"kept_{column.partition('.')[2]}"] = term
        plan.read_soft_labels(str(soft_labels(every)))

    def _time_architectures(self) -> None:
        """Latency of all there may be, where they can be listed; else each is timed while no trial runs."""
        plan = self.plan
        if not plan.times():
            return
        device = self._latency_device()
        plan.read_timed(device)
        points = plan.architectures()
        wanted = [c for p in points or () if (c := plan.untimed(p)) is not None]
        unique = {plan.facts(c).key: c for c in wanted}
        if not unique:
            return
        with console.progress(f"Timing on {device_name(device)}", len(unique)) as update:
            for i, config in enumerate(unique.values()):
                plan.time(config, device)
                update(i + 1)

    def _latency_device(self) -> str:
        import torch

        wanted = self.search.latency_device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "search.latency_device must be cpu or null on a machine without a GPU, got cuda"
            )
        on_gpu = torch.cuda.is_available() and self.plan.config.scaling.use_gpu is not False
        return wanted or ("cuda" if on_gpu else "cpu")

    # ------------------------------------------------------------------------------------------- run
    def run(self) -> dict[str, Any]:
        plan, ledger = self.plan, self.ledger
        plan.write_identity(fit.about_code())
        console.say(f"Search: {self.folder}", "bold")
        if (done := self._finished()) is not None:
            return done
        self._say_space()
        with contextlib.ExitStack() as stack:
            caches = {
                key: stack.enter_context(
                    prepared(
                        one.data,
                        one.cache,
                        f"search {self.folder.name}",
                        prefer=plan.sets[key].key,
                    )
                ).cache_dir
                for key, one in self._configs.items()
            }
            if self.search.soft_labels:
                self._soft_labels()
            self._time_architectures()
            runs.mend_journal(self.folder)
            ledger.add("attempt", epochs=plan.epochs, num_samples=self.search.num_samples)
            self._mend_unheard()
            self._mend_exploits()
            for point in ledger.refusals:
                self.proposer.refused(point)
            for trial in ledger.ended():
                self.proposer.ended(trial, self._curve(trial))
            if ledger.trials:
                console.say(
                    f"Going on: {len(ledger.ended())} trials have ended, {len(ledger.unfinished())} are unfinished"
                )
            with self._aim():
                if self._more_to_do():
                    self._tune(caches)
                summary = self._finish()
                whole = not self.stopping and self.broken is None
                if whole and self.search.retrain_best and summary["best"]:
                    from potstill.search_winners import retrain

                    summary["winners"] = retrain(plan, self._trials())
                    runs.write_json(self.folder / "summary.json", summary)
        if self.broken is not None:
            raise self.broken
        if self.stopping:
            raise Stopped(f"{self.stopping}; the same command goes on from here")
        return summary

    def _say_space(self) -> None:
        plan, search = self.plan, self.search
        rows = [
            [name, v.shown(), "" if v.when is None else v.when.text]
            for name, v in plan.space.variables.items()
        ]
        console.table(["setting", "values", "where"], rows)
        sought = ", ".join(
            f"{o.name} {'up' if o.higher_is_better else 'down'}" for o in plan.objectives
        )
        console.say(
            f"{search.num_samples} trials of up to {plan.epochs} epochs, {search.algorithm}, {search.scheduler}; {sought}"
            + "".join(f"; {c.text}" for c in plan.constraints)
        )

    def _finished(self) -> dict[str, Any] | None:
        """The summary of a search in which nothing is left to do."""
        if self._more_to_do() or self.search.retrain_best:
            return None
        with contextlib.suppress(OSError, ValueError):
            summary = runs.read_json(self.folder / "summary.json")
            if summary["status"] == "finished" and summary["trials"] == len(self.ledger.trials):
                console.say("It has finished already; a higher search.num_samples goes on with it")
                self._say_best()
                return summary
        return None

    def _more_to_do(self) -> bool:
        return bool(self.ledger.unfinished()) or len(self.ledger.trials) < self.search.num_samples

    @contextlib.contextmanager
    def _aim(self) -> Iterator[None]:
        config = self.plan.config
        if config.tracking.name != "aim":
            yield
            return
        from potstill.tracking import AimWriter

        repo = local_folder(config.tracking.repo or config.runs.dir)
        self.aim = AimWriter(repo, console.warn)
        self.aim.follow(self.folder)
        try:
            yield
        finally:
            self.aim.close(timeout_s=300.0)

    # ------------------------------------------------------------------------------------------- Tune
    def _tune(self, caches: Mapping[str, Path]) -> None:
        from potstill.cluster import nodes_with, said_while_waiting, selector, shown, start_ray

        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_SYNCER"] = "1"
        os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "86400"  # our own record is the one that counts
        os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
        # these two compare all trials with each other; the others are drawn when there is room for them
        ahead = self.search.num_samples if self.search.scheduler in ("pbt", "hyperband") else 1
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(ahead)
        start_ray()
        import ray

        from potstill.search_tune import run_trials

        use_gpu = self._on_gpus(ray.cluster_resources().get("GPU", 0.0))
        labels = selector("train" if use_gpu else "data", self.plan.config.scaling.labels)
        # where a label is an expression of Ray's, the nodes of the role say what there is
        nodes = nodes_with(labels) or nodes_with(selector("train" if use_gpu else "data"))
        resources, at_once = self._resources([n["Resources"] for n in nodes], use_gpu)
        console.say(f"{at_once} at a time, each with {_said(resources)}")
        for name in ("ray.tune", "ray.air", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        outcome: list[BaseException] = []
        # where a cluster may grow, one trial more than there is room for asks for a node; there is always room for one
        # that only waits for its workers
        grows = (
            os.environ.get("RAY_ADDRESS")
            and not self.search.max_concurrent_trials
            and resources["cpu"]
        )
        at_a_time = None if ahead > 1 or grows else at_once
        self._slots = at_once
        storage = self.folder / ".tune"  # where all nodes see it, as they see the runs
        shutil.rmtree(storage, ignore_errors=True)

        def work() -> None:
            try:
                run_trials(self, caches, resources, at_a_time, storage)
            except BaseException as error:
                outcome.append(error)

        # in the main thread Tune would put its own handler in the place of ours
        thread = threading.Thread(target=work, name="ray-tune", daemon=True)
        what = f"the first trial ({_said(resources)}){shown(labels if resources['cpu'] else {})}"
        waiting = said_while_waiting(what, lambda: self.has_begun)
        try:
            with self._signals(), waiting, console.live(self._view) as show:
                thread.start()
                while thread.is_alive():
                    thread.join(POLL_S)
                    show()
                    hours = self.search.max_hours or math.inf
                    if not self.stopping and time.time() - self.began > 3600 * hours:
                        self.stopping = f"search.max_hours={hours:g} is over"
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        if outcome and not self.stopping:
            self.broken = outcome[0]

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, frame: object) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = "stopped"
            console.say("Stopping; press Ctrl-C again to stop at once")

        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_gpus(self, gpus_there: float) -> bool:
        """Whether trials train on GPUs, by the rule of a single training."""
        from potstill.cluster import gpus_by_default

        scaling, per_trial = self.plan.config.scaling, self.search.gpus_per_trial
        if per_trial is not None:
            return per_trial > 0
        if scaling.use_gpu is not None:
            return scaling.use_gpu
        return gpus_by_default(gpus_there, max(scaling.num_workers, 1))

    def _resources(
        self, nodes: Sequence[Mapping[str, float]], use_gpu: bool
    ) -> tuple[dict[str, float], int]:
        """Of one trial, and how many go at a time. `nodes`: what each has that takes trials; none where they are yet to
        come. Raises UserError for more than there is."""
        search, scaling = self.search, self.plan.config.scaling
        workers = max(scaling.num_workers, 1)
        cpus_there = sum(node.get("CPU", 0.0) for node in nodes)
        gpus_there = sum(node.get("GPU", 0.0) for node in nodes)
        gpus = (
            search.gpus_per_trial if search.gpus_per_trial is not None else float(use_gpu) * workers
        )
        if search.cpus_per_trial:
            cpus = search.cpus_per_trial
        elif scaling.cpus_per_worker:
            cpus = float(scaling.cpus_per_worker * workers)
        else:
            # the cores beside its GPUs, on whichever node it comes to
            with_gpus = [node for node in nodes if node.get("GPU")]
            shares = [node.get("CPU", 0.0) / node["GPU"] * gpus for node in with_gpus]
            cpus = max(1.0, math.floor(min(shares)) if gpus and shares else 1.0, float(workers))
        elsewhere = bool(os.environ.get("RAY_ADDRESS"))  # an autoscaling cluster may grow
        if not elsewhere and (cpus > cpus_there or gpus > gpus_there):
            raise UserError(
                f"search.cpus_per_trial and search.gpus_per_trial must be <= what there is ({cpus_there:g} cores, "
                f"{gpus_there:g} GPUs), got {cpus:g} and {gpus:g}"
            )

        def fit_in(cpus_in: float, gpus_in: float) -> int:
            return math.floor(min(cpus_in / cpus, gpus_in / gpus if gpus else math.inf))

        if workers > 1:  # a trial's workers may be on several nodes
            at_once = fit_in(cpus_there, gpus_there)
        else:
            at_once = sum(fit_in(n.get("CPU", 0.0), n.get("GPU", 0.0)) for n in nodes)
        at_once = max(1, at_once)
        if search.max_concurrent_trials:
            if elsewhere:
                at_once = search.max_concurrent_trials
            at_once = min(at_once, search.max_concurrent_trials)
            # all of their trials wait, so that the room must limit them
            if search.scheduler in ("pbt", "hyperband") and not elsewhere:
                cpus = max(cpus, math.floor(cpus_there / (at_once + 1)) + 1)
        of_worker: int | None = max(1, int(cpus // workers))
        if elsewhere and gpus and not (search.cpus_per_trial or scaling.cpus_per_worker):
            of_worker = None  # its share of whatever node it comes to
        self.of_worker = {"cpus": of_worker, "gpu": bool(gpus)}
        if workers > 1:  # its workers hold the cores and GPUs; the trial itself only waits for them
            return {"cpu": 0, "memory": 1e6}, at_once
        return {"cpu": cpus, **({"gpu": gpus} if gpus else {})}, at_once

    # ---------------------------------------------------------------------- what Tune asks and tells
    def next_trial(self, at_once: int | None) -> int | str:
        """The number of the next trial, "later", or "over". Whatever is proposed is on the disk before it starts."""
        if self.stopping:
            return "over"
        if at_once is not None and len(self.live) >= at_once + self._ahead():
            return "later"
        waiting = [t for t in self.ledger.unfinished() if t.number not in self.live]
        if waiting:
            trial = min(waiting, key=lambda t: t.number)
            return self._start(trial.number)
        if len(self.ledger.trials) >= self.search.num_samples:
            return "over"
        return self._propose()

    def _ahead(self) -> int:
        """Trials that may be ready before there is room for them: what depends on no result need not wait for one."""
        search = self.search
        limited = search.max_concurrent_trials or self.plan.config.scaling.num_workers > 1
        return int(search.algorithm == "random" and not limited)

    def _propose(self) -> int | str:
        plan, ledger = self.plan, self.ledger
        again = 0
        for _ in range(MOST_DRAWS):
            place = ledger.draws
            if self._held is not None:
                place, point, asked = self._held
            elif place < len(plan.points):
                point, asked = plan.points[place], None
            else:
                point, asked = self.proposer.draw(place)
            config = plan.untimed(point)
            if config is not None:
                if self.live:  # not while trials run
                    self._held = (place, point, asked)
                    return "later"
                plan.time(config, self._latency_device())
            self._held = None
            if self._known(point) and (again := again + 1) <= MOST_AGAIN:
                if asked is not None:
                    self.proposer.given_back(asked)
                ledger.add("refused", draw=place, point=point, why=AGAIN)
                continue
            try:
                _, measures = plan.admit(point)
            except Refused as refusal:
                if asked is not None:
                    self.proposer.given_back(asked)
                ledger.add("refused", draw=place, point=point, why=str(refusal))
                self.proposer.refused(point)
                continue
            return self._write_down(place, point, asked, measures)
        last = [r["why"] for r in runs.read_journal(self.folder) if r["kind"] == "refused"][-1]
        if ledger.trials:  # what was found is not thrown away
            console.warn(
                f"No further trial: {MOST_DRAWS} proposals in a row were refused, the last one for its {last}"
            )
            return "over"
        raise UserError(
            f"search.space has no trial that may be started: {MOST_DRAWS} proposals in a row were refused, the last one "
            f"for its {last}; widen search.space, or loosen search.conditions and search.constraints"
        )

    def _known(self, point: Any) -> bool:
        return any(t.point == point for t in self.ledger.trials.values())

    def _write_down(self, place: int, point: Any, asked: Any, measures: dict[str, float]) -> int:
        number = len(self.ledger.trials)
        config = self.plan.placed(self.plan.config_of(point), number)
        run_dir = self.folder / "trials" / trial_name(number)
        one = self.plan.sets[data_key(config)]
        about = {
            "id": self.folder.name,
            "number": number,
            "point": point,
            "dir": str(self.folder),
        }
        fit.write_identity(config, run_dir, one, {}, search=about)
        source = "given" if asked is None else self.search.algorithm
        self.ledger.add(
            "proposed", draw=place, number=number, point=point, source=source, measures=measures
        )
        if asked is not None:
            self.proposer.accepted(asked, number)
        return self._start(number)

    def _start(self, number: int) -> int:
        self.live[number] = {}
        if self.aim is not None:
            self.aim.follow(self.folder / "trials" / trial_name(number))
        return number

    def explored(self, number: int, donor: int, mark: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial goes on with from another's weights, which `mark` names: its settings, changed a little (pbt)."""
        plan, ledger = self.plan, self.ledger
        point = ledger.trials[donor].point
        _, measures = plan.admit(point)
        for _ in range(MOST_DRAWS):
            tried = plan.space.mutate(point, plan.mutable(), self._rng)
            with contextlib.suppress(Refused):
                _, measures = plan.admit(tried)
                point = tried
                break
        run_dir = self.folder / "trials" / trial_name(number)
        # in this order, so that a kill in between leaves either the old trial or all of the new one: _mend_exploits
        runs.write_json(run_dir / ADOPT, {**mark, "point": point})
        ledger.add("exploit", number=number, donor=donor, point=point, measures=measures)
        self._write_config(number)
        return {"number": number, "donor": donor}

    def _write_config(self, number: int) -> None:
        """config.yaml, and run.json's word for it, as the record has the trial."""
        run_dir = self.folder / "trials" / trial_name(number)
        point = self.ledger.trials[number].point
        config = self.plan.placed(self.plan.config_of(point), number)
        runs.atomic_write(run_dir / "config.yaml", to_yaml(config))
        about = runs.read_json(run_dir / "run.json")
        about["search"]["point"] = point
        runs.write_json(run_dir / "run.json", about)

    def _mend_exploits(self) -> None:
        """What a kill has cut off between a trial's new settings and its new weights."""
        if self.search.scheduler != "pbt":
            return
        for trial in self.ledger.unfinished():
            told = self.folder / "trials" / trial.name / ADOPT
            if told.exists() and runs.read_json(told)["point"] != trial.point:
                told.unlink()  # it was never decided
            self._write_config(trial.number)

    def heard(self, number: int, result: Mapping[str, Any]) -> None:
        """An epoch of a trial."""
        self.live.setdefault(number, {}).update(
            {k: v for k, v in result.items() if isinstance(v, int | float)}
        )

    def ended(self, number: int, error: str | None) -> None:
        """A trial has ended, by itself or not; one that was broken off by a stop of the search has not."""
        if self.ledger.trials[number].state not in ("waiting", "running"):
            return
        run_dir = self.folder / "trials" / trial_name(number)
        ends = [r for r in runs.read_journal(run_dir) if r["kind"] == "end"]
        by_itself = bool(ends) and ends[-1]["status"] != "stopped"
        self.live.pop(number, None)
        if self.stopping and not by_itself:
            return
        if not by_itself:
            _end_trial(run_dir, self.search.scheduler, self.plan.epochs, error)
        summary = fit.summarise(run_dir)
        runs.write_json(run_dir / "summary.json", summary)
        self._take(number, summary)
        if self.aim is not None:
            self.aim.follow(run_dir)
            self.aim.over(run_dir)

    def _take(self, number: int, summary: Mapping[str, Any]) -> None:
        """A trial's result from its run's, into the record."""
        trial = self.ledger.trials[number]
        state = (
            "failed" if summary["status"] == "failed" else "completed"
        )  # by its own patience, too
        ends = runs.read_journal(self.folder / "trials" / trial.name)
        if any(r["kind"] == "end" and r.get("by") == "scheduler" for r in ends):
            state = "stopped early"
        metrics = {k: v for k, v in (summary["best_metrics"] or {}).items() if k.startswith("val_")}
        values = {**trial.values, **metrics}
        feasible = state != "failed" and self.plan.broken(values) is None
        about = {
            "number": number,
            "name": trial.name,
            "state": state,
            "values": metrics,
            "epochs": summary["epochs"],
            "seconds": summary["seconds"],
            "why": summary["reason"],
            "feasible": feasible,
        }
        best = best_of([*self._trials(), _with(trial, about)], self.plan.objectives)
        shown = {o.name: best.values.get(o.name) for o in self.plan.objectives} if best else {}
        self.ledger.add("trial", **about, best=shown)
        self.proposer.ended(trial, self._curve(trial))
        self._say_trial(trial)
        self._write_results(at_once=False)

    def _mend_unheard(self) -> None:
        """Trials that have ended, but whose end nobody could write down."""
        for trial in self.ledger.unfinished():
            run_dir = self.folder / "trials" / trial.name
            ends = [r for r in runs.read_journal(run_dir) if r["kind"] == "end"]
            if ends and ends[-1]["status"] in ("finished", "failed", "stopped_early"):
                self.ended(trial.number, None)

    def _curve(self, trial: TrialResult) -> dict[int, float]:
        return curve_of(self.folder / "trials" / trial.name, self.plan.metric)

    def _trials(self) -> list[TrialResult]:
        return [self.ledger.trials[n] for n in sorted(self.ledger.trials)]

    # ------------------------------------------------------------------------------------- to be seen
    def _say_trial(self, trial: TrialResult) -> None:
        done = len(self.ledger.ended())
        values = ", ".join(
            f"{o.name} {_shown(o.name, trial.values.get(o.name))}" for o in self.plan.objectives
        )
        what = trial.why if trial.state == "failed" else values
        infeasible = "" if trial.feasible or trial.state == "failed" else ", beyond a constraint"
        console.say(
            f"{done}/{self.search.num_samples} {trial.name} {trial.state} after {trial.epochs} epochs: {what}{infeasible}"
        )

    def _view(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, columns and rows of what is shown while trials run."""
        ended = self.ledger.ended()
        best = best_of(ended, self.plan.objectives)
        metric = self.plan.metric
        rows = []
        for number, now in sorted(list(self.live.items())):  # noqa: C414 (another thread changes it)
            left = now.get("seconds_left")
            stage = "starting" if left is None else "training"
            if left is not None and (stages := self.plan.config.stages):
                stage = f"stage {int(now['stage'])}/{len(stages)}"
            point = self.ledger.trials[number].point.items()
            rows.append(
                [
                    trial_name(number),
                    stage,
                    f"{int(now.get('epoch', 0))}/{self.plan.epochs}",
                    _shown(metric, now.get(metric)),
                    "–" if left is None else console.duration(left),
                    ", ".join(f"{k.rpartition('.')[2]} {_short(v)}" for k, v in point),
                ]
            )
        said = f"{len(ended)} of {self.search.num_samples} trials have ended"
        if best is not None:
            said += f"; best {best.name}: {_shown(metric, best.values.get(metric))}"
        if (left := self._seconds_left()) is not None:
            said += f"; about {console.duration(left)} left"
        return said, ["trial", "stage", "epoch", metric, "left", "settings"], rows

    def _seconds_left(self) -> float | None:
        ours = [t for t in self.ledger.ended() if t.seconds]
        if not ours:
            return None
        mean = sum(t.seconds for t in ours) / len(ours)
        to_come = self.search.num_samples - len(self.ledger.ended())
        return mean * to_come / max(1, min(len(self.live), self._slots))

    def _write_results(self, at_once: bool) -> None:
        """The files of the search: the table whenever a trial ends, the pictures now and then, beside Tune's thread."""
        write_leaderboard(self.folder, self._trials(), self.plan.objectives)
        waited = time.monotonic() - self._written
        if not at_once and (waited < PICTURES_EVERY_S or self._results.locked()):
            return
        self._written = time.monotonic()
        trials = [_copy(t) for t in self._trials()]

        def write() -> None:
            with self._results:
                write_pictures(self.folder, trials, self.plan.objectives, self.folder.name)

        if at_once:
            write()
        else:
            threading.Thread(target=write, name="search-results", daemon=True).start()

    def _finish(self) -> dict[str, Any]:
        """Files, the summary, the best so far."""
        from potstill.search_winners import write_experiments

        self._write_results(at_once=True)
        trials, plan = self._trials(), self.plan
        experiments = write_experiments(plan, trials)
        best = best_of(trials, plan.objectives)
        count = {
            s: sum(t.state == s for t in trials) for s in ("completed", "stopped early", "failed")
        }
        whole = not self.stopping and self.broken is None
        summary = {
            "name": self.folder.name,
            "status": "finished" if whole else "stopped",
            "trials": len(trials),
            **{k.replace(" ", "_"): v for k, v in count.items()},
            "refused": self.ledger.refused,
            "epochs": sum(t.epochs for t in trials),
            "best": None
            if best is None
            else {"trial": best.name, "point": best.point, **best.values},
            "pareto": [t.name for t in experiments.values()],
            "seconds": sum(self.ledger.spent.values()),
        }
        runs.write_json(self.folder / "summary.json", summary)
        reason = self.stopping or (str(self.broken) if self.broken else "")
        told = {o.name: best.values.get(o.name) for o in plan.objectives} if best else {}
        status = "finished" if whole else "failed" if self.broken else "stopped"
        self.ledger.add("end", status=status, reason=reason, best=told)
        said = ", ".join(f"{n} {state}" for state, n in count.items() if n)
        refused = f"; {self.ledger.refused} proposals refused" if self.ledger.refused else ""
        console.say(
            f"{len(trials)} trials ({said or 'none ended'}){refused}, {summary['epochs']} epochs"
        )
        self._say_best()
        console.say(
            f"Written: {self.folder}  (leaderboard.csv, pareto.png, pareto.html, plots/, experiment/)"
        )
        return summary

    def _say_best(self) -> None:
        best = best_of(self._trials(), self.plan.objectives)
        if best is not None:
            values = ", ".join(
                f"{o.name} {_shown(o.name, best.values.get(o.name))}" for o in self.plan.objectives
            )
            console.say(f"Best: {best.name}, {values}", "bold")
            for name, value in best.point.items():
                console.say(f"  {name}: {_short(value)}")
            console.say(
                f"Train it: uv run jobs/train.py --config-dir {self.folder} experiment=best"
            )


def _columns(node: Any) -> Iterator[str]:
    """Every column that terms anywhere below name."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "inputs" and isinstance(value, list):
                yield from (c for c in value if isinstance(c, str))
            else:
                yield from _columns(value)
    elif isinstance(node, list):
        for item in node:
            yield from _columns(item)


def _copy(trial: TrialResult) -> TrialResult:
    return TrialResult(**{**vars(trial), "values": dict(trial.values), "point": dict(trial.point)})


def _with(trial: TrialResult, about: Mapping[str, Any]) -> TrialResult:
    changed = _copy(trial)
    changed.values |= about["values"]
    changed.state, changed.feasible = about["state"], about["feasible"]
    return changed


def _shown(name: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if name in ("parameters", "macs"):
        return f"{value:,.0f}"
    if name.startswith(("latency", "file")):
        return f"{value:.2f}"
    return metric_names.shown(name, value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _said(resources: Mapping[str, float]) -> str:
    if not resources["cpu"]:
        return "workers of its own"
    names = {"cpu": "core", "gpu": "GPU"}
    return " and ".join(f"{v:g} {names[k]}{'s' if v > 1 else ''}" for k, v in resources.items())


def _end_trial(run_dir: Path, scheduler: str, whole: int, error: str | None) -> None:
    """Write down what the trial's process could not: who stopped it, or that it was lost."""
    runs.mend_journal(run_dir)
    records = runs.read_journal(run_dir)
    epochs = [r for r in records if r["kind"] == "epoch"]
    step = max((r["step"] for r in records if r["kind"] in ("epoch", "checkpoint")), default=0)
    if error is not None:
        status, reason = "failed", error
    elif not epochs:
        status, reason = "failed", "it ended without a single epoch"
    elif len(epochs) >= whole:
        status, reason = "finished", ""  # it was about to say so
    else:
        status, reason = "stopped_early", f"{scheduler} stopped it after {len(epochs)} epochs"
    last = {"attempt": max(1, runs.last_attempt(run_dir)), "step": step, "time": time.time()}
    end = {"kind": "end", **last, "status": status, "reason": reason, "best": None}
    by = {"by": "scheduler"} if status == "stopped_early" else {}
    runs.append_records(run_dir, [{**end, **by}])
