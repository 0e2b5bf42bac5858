"""What a search is, before Ray has a part in it: which trials there may be, and the record of those that there were.

A search has a folder of its own, <runs.dir>/<run.name, or search-<name>-<hash>>/:
    search.json, config.yaml    what it is
    journal.jsonl               append-only: every trial when it is proposed, every one when it ends
    trials/trial-0007/          a run's folder, as any other
    leaderboard.csv, pareto.png, pareto.html, plots/, figures.json
    experiment/best.yaml, pareto-1.yaml, …      jobs/train.py --config-dir <folder> experiment=best

The journal is the search: whoever starts it again reads which trials have ended, takes up those that have not, and
proposes the rest. A trial is written down before it is started, and started under one number only.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import architecture, metric_names, runs
from potstill.architecture import MEASURES, TIMED, Facts
from potstill.config import (
    Config,
    checked,
    flatten,
    from_dict,
    identity,
    literal,
    load_run_config,
    resolve_paths,
    to_dict,
    to_yaml,
)
from potstill.data.prepare import Plan
from potstill.errors import UserError
from potstill.expressions import near
from potstill.fit import check_model, refuse_rows
from potstill.search_results import Objective, TrialResult
from potstill.search_space import Expression, Point, Space
from potstill.storage import local_folder

if TYPE_CHECKING:
    import optuna

LOGGED = ("loss", *metric_names.ALWAYS)
GOES_ON = frozenset(
    (
        *("num_samples", "max_hours", "max_concurrent_trials", "cpus_per_trial", "gpus_per_trial"),
        *("silent_minutes", "retrain_best"),
    )
)
"""Settings of a search that may differ when it is gone on with: what its trials are does not depend on them."""
ARCHITECTURE = ("model.", "augment.image_px", "data.decode.image_px")
MOST_ARCHITECTURES = 128
ADOPT = "adopt.json"
"""In a trial's folder: whose weights it is to go on from (pbt)."""
AGAIN = "it was proposed before"
MOST_DRAWS = 300
"""Proposals that may be refused in a row, before the space is called impossible."""


_DIVERGED = re.compile(r"the (training|validation) loss is |weights are NaN")
"""What loop.LossNotFinite says."""


class Refused(Exception):
    """A point that must not be started, and why."""


def trial_name(number: int) -> str:
    return f"trial-{number:04d}"


class SearchPlan:
    """A search's config, checked."""

    def __init__(self, config: Config) -> None:
        self.config = config = copy.deepcopy(config)
        resolve_paths(config)
        self.search = search = config.search
        if config.stages and search.epochs:
            raise UserError(
                f"search.epochs must be null with stages, got {search.epochs}: their epochs are their own"
            )
        if not search.space:
            raise UserError(
                "search.space must have at least one key, got none; use search=quickstart, or a file of your own beside "
                "conf/search/template.yaml"
            )
        self.objectives = [self._objective(n, "search.objectives") for n in search.objectives]
        if not any(o.name not in MEASURES for o in self.objectives):
            raise UserError(
                "search.objectives must have a metric of validation, such as val_top1_acc, got "
                f"{', '.join(search.objectives)}: what needs no training needs no search"
            )
        self.constraints = _expressions(search.constraints, "search.constraints")
        for constraint in self.constraints:
            for name in sorted(constraint.names):
                self._objective(name, constraint.key)
        self.base = to_dict(config)  # with the metrics that are sought
        self.base.pop("search")
        self.space = Space.parse(search.space, dict(flatten(self.base)))
        self.keys = self.space.keys()
        self.conditions = _expressions(search.conditions, "search.conditions")
        # what is kept of a trial is its best epoch by what the search decides by
        self.metric = next(o.name for o in self.objectives if o.name not in MEASURES)
        self._check_names()
        self.points = [
            self.space.complete(p, f"search.points[{i}]") for i, p in enumerate(search.points)
        ]
        self.folder = self._folder()
        self.epochs = search.epochs or config.loop.epochs
        self.sets: dict[str, Plan] = {}
        """What there is to train on, by data_key; known once the data are looked at."""
        self._facts: dict[str, Facts] = {}
        self._last: tuple[str, Config] = ("", config)
        self.timed: dict[str, dict[str, Any]] = {}
        """By the key of an architecture: what architecture.timed has said."""

    def classes_of(self, config: Config) -> Sequence[str]:
        return self.sets[data_key(config)].rows.classes

    def _folder(self) -> Path:
        name = self.config.run.name
        if name is None:
            digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
            name = f"search-{self.search.name or 'own'}-{digest.hexdigest()[:8]}"
        if "/" in name or name.startswith("."):
            raise UserError(
                f"run.name must be a folder's name without '/' and not start with '.', got {name!r}"
            )
        return local_folder(self.config.runs.dir) / name

    def identity(self) -> dict[str, Any]:
        """What its trials depend on."""
        settings = {k: v for k, v in vars(self.search).items() if k not in GOES_ON}
        return {"search": settings, "base": identity(self.config)}

    # --------------------------------------------------------------------------------- what is refused
    def _objective(self, name: str, key: str) -> Objective:
        """`key`: who names it, for errors. A metric that is sought is measured."""
        if name in MEASURES:
            return Objective(name, higher_is_better=False)
        plain = name.removeprefix("val_")
        kind = self.config.task.get("kind", "single_label")
        if name == plain:
            known = [*MEASURES, "val_loss", *(f"val_{m}" for m in metric_names.ALWAYS)]
            raise UserError(
                f"{key} must be of {', '.join(known)} or another metric of validation (val_auc, …), got {name!r}; "
                f"{near(name, known)}"
            )
        if plain not in LOGGED:
            metric_names.check(kind, [plain], key=key)
            chosen = self.config.task.setdefault("metrics", [])
            if plain not in chosen:  # it is logged because it is sought
                chosen.append(plain)
        return Objective(name, metric_names.higher_is_better(name))

    def _check_names(self) -> None:
        """Keys of the space that no config has, and names in conditions that nothing gives."""
        import difflib

        known = dict(flatten(self.base))
        for condition in self.conditions:
            there = {*self.space.values({}), *self._leaves(), "outputs", *MEASURES}
            for name in sorted(condition.names - there):
                raise UserError(
                    f"{condition.key} must be over keys of the config, names of search.space, outputs, {', '.join(MEASURES)}, "
                    f"got {name}; {near(name, there)}"
                )
        for key in sorted(self.keys):
            free = ("task.terms.", "model.", "optimizer.kwargs.", "optimizer.lrs.", "teachers.")
            nodes = {k[:i] for k in known for i, c in enumerate(k) if c == "."}
            if key not in known and key not in nodes and not key.startswith(free):
                close = difflib.get_close_matches(key, known, n=1)
                remedy = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"search.space.{key} is not a key of a training's config{remedy}")
            if key.startswith(
                ("run.", "runs.", "tracking.", "scaling.", "cache.", "plugins", "search.")
            ):
                raise UserError(
                    f"search.space.{key} must be a key that a result depends on, got one of where it runs or is written"
                )
            if key in ("loop.epochs", "loop.monitor"):
                raise UserError(
                    f"search.space.{key} cannot be searched: trials are compared by it; set search.epochs, or search.objectives"
                )
        workers, scheduler = self.config.scaling.num_workers, self.search.scheduler
        if workers > 1 and scheduler in ("pbt", "hyperband"):
            raise UserError(
                f"search.scheduler={scheduler} needs trials of one worker, which it can pause, got scaling.num_workers={workers}; use "
                "asha, median or none, or scaling=local"
            )
        pbt = self.search.scheduler == "pbt"
        if pbt and not self.mutable():
            raise UserError(
                "search.scheduler=pbt needs numbers that may change while a model trains (optimizer.*, task.terms.*, "
                f"augment.*) in search.space, got {', '.join(self.space.variables)}; use search.scheduler=asha"
            )

    def _leaves(self) -> set[str]:
        """All keys that any choice of the space sets, below mappings too."""
        return {
            leaf
            for variable in self.space.variables.values()
            for key, values in variable.settings().items()
            for value in values
            for leaf, _ in flatten({key: value})
        }

    def mutable(self) -> list[str]:
        """Variables that a trial may change when it goes on from another's weights."""
        fixed = ("augment.image_px", "augment.views", "augment.seed", "optimizer.name")
        names = []
        for name, variable in self.space.variables.items():
            keys = variable.keys()
            if variable.kind in ("float", "int") and all(
                k.startswith(("optimizer.", "task.terms.", "augment.")) and not k.startswith(fixed)
                for k in keys
            ):
                names.append(name)
        return names

    # ----------------------------------------------------------------------------------- one trial
    def config_of(self, point: Point) -> Config:
        """The training's config at a point. Raises UserError for one that is none."""
        key = json.dumps(point, sort_keys=True)
        if key != self._last[0]:
            self._last = (key, self._config_of(point))
        return copy.deepcopy(self._last[1])

    def _config_of(self, point: Point) -> Config:
        values = copy.deepcopy(self.base)
        for name, value in self.space.overrides(point).items():
            _put(values, name, copy.deepcopy(value))
        config = from_dict(Config, values)
        config.search.name = None
        config.loop.monitor = self.metric
        if not config.stages:
            config.loop.epochs = self.epochs
        if self.search.epochs:  # what is meant for more epochs must fit into these
            config.schedule.warmup_epochs = min(config.schedule.warmup_epochs, self.epochs / 2)
            last = config.loop.average_last
            config.loop.average_last = None if last is None else max(2, min(last, self.epochs))
        config.tracking.name = "none"
        config.experiment = self.config.experiment
        config.run.tags = list(dict.fromkeys([*config.run.tags, f"search:{self.folder.name}"]))
        return checked(config)

    def full_length(self, config: Config) -> Config:
        """A trial's config for all of loop.epochs."""
        whole, full = copy.deepcopy(config), self.config
        if not whole.stages:
            whole.loop.epochs = full.loop.epochs
        if self.search.epochs:
            searched = {k for k in self.keys if k.startswith(("schedule", "loop"))}
            if not searched & {"schedule", "schedule.warmup_epochs"}:
                whole.schedule.warmup_epochs = full.schedule.warmup_epochs
            if not searched & {"loop", "loop.average_last"}:
                whole.loop.average_last = full.loop.average_last
        return whole

    def read_soft_labels(self, folder: str) -> None:
        """From now on no trial runs a teacher."""
        self.base["teacher"]["soft_labels"] = folder
        self._last = ("", self.config)

    def placed(self, config: Config, number: int) -> Config:
        """The config as that of a trial, in its own folder."""
        config.run.name = trial_name(number)
        config.runs.dir = str(self.folder / "trials")
        return config

    def admit(self, point: Point) -> tuple[Config, dict[str, float]]:
        """A point's config, and the measures of its architecture. Raises Refused for a trial that must not be started."""
        values = self.space.values(point)
        later = {"outputs", *MEASURES}
        for condition in self.conditions:
            if not condition.names & later and not condition.holds(values):
                raise Refused(f"condition: {condition.text}")
        try:
            config = self.config_of(point)
            refuse_rows(config, self.sets[data_key(config)])
            check_model(config)
            facts = self.facts(config)
        except UserError as error:
            raise Refused(str(error)) from None
        self._refuse_columns(config, facts)
        measures = {**facts.measures(), **self._timed(facts.key)}
        values |= {**measures, "outputs": list(facts.outputs)}
        for condition in self.conditions:
            if condition.names & later and not condition.holds(values):
                raise Refused(f"condition: {condition.text}")
        if (broken := self.broken(measures)) is not None:
            raise Refused(f"constraint: {broken}")
        return config, measures

    def broken(self, known: Mapping[str, float | None]) -> str | None:
        """The first constraint that these values break; those that name others are left for later."""
        for constraint in self.constraints:
            if constraint.names <= known.keys():
                finite = all(
                    v is not None and math.isfinite(v) for v in (known[n] for n in constraint.names)
                )
                if not finite or not constraint.holds(known):
                    return constraint.text
        return None

    def facts(self, config: Config) -> Facts:
        classes = self.classes_of(config)
        key = architecture.key_of(config, classes)
        if key not in self._facts:
            self._facts[key] = architecture.facts_of(config, classes)
        return self._facts[key]

    def _refuse_columns(self, config: Config, facts: Facts) -> None:
        """A term on what this student does not return."""
        for name, term in config.task["terms"].items():
            for column in term["inputs"]:
                if "." not in column and column not in ("label", *facts.outputs):
                    shown = config.model.get("name") or config.model["_target_"]
                    raise Refused(
                        f"task.terms.{name} takes {column}, which {shown} does not return"
                    )

    # ------------------------------------------------------------------------------------ latency
    def times(self) -> bool:
        """Whether latency is sought or limited."""
        named = {o.name for o in self.objectives}.union(
            *(c.names for c in self.constraints + self.conditions)
        )
        return bool(named & set(TIMED))

    def _timed(self, key: str) -> dict[str, float]:
        found = self.timed.get(key, {})
        return {name: found[name] for name in TIMED if name in found}

    def untimed(self, point: Point) -> Config | None:
        """The config of a point whose architecture must be timed first; None where it is, or need not be."""
        if not self.times():
            return None
        try:
            values = self.space.values(point)
            later = {"outputs", *MEASURES}
            if any(not c.names & later and not c.holds(values) for c in self.conditions):
                return None  # it is not started anyway
            config = self.config_of(point)
            return None if self.facts(config).key in self.timed else config
        except UserError:
            return None

    def time(self, config: Config, device: str) -> None:
        """Measure a config's latency; a search that goes on remembers it."""
        key = self.facts(config).key
        self.timed[key] = architecture.timed(
            config, self.classes_of(config), device, self.search.latency_batch
        )
        self.write_timed()

    def write_timed(self) -> None:
        runs.write_json(self.folder / "latency.json", self.timed)

    def read_timed(self, device: str) -> None:
        """What was timed before, on this device: another's numbers would not compare."""
        with suppress(OSError, ValueError):
            found = runs.read_json(self.folder / "latency.json")
            name = architecture.device_name(device)
            self.timed = {k: v for k, v in found.items() if v["latency_device"] == name}

    def architectures(self) -> list[Point] | None:
        """Every combination of what makes an architecture, with the base config's values for the rest; None: too many."""
        return self.space.finite(ARCHITECTURE, MOST_ARCHITECTURES)

    # -------------------------------------------------------------------------------- its identity
    def write_identity(self, about: Mapping[str, Any]) -> None:
        """search.json and config.yaml, once. Raises UserError where the folder is another search's."""
        path = self.folder / "search.json"
        ours = json.loads(json.dumps(self.identity()))
        if path.exists():
            before = runs.read_json(path)
            self._refuse_other_data(before["data"])
            if differing := _differing(before["identity"], ours):
                raise UserError(
                    f"run.name: {self.folder.name} is another search ({'; '.join(differing[:8])}); give this one another "
                    "run.name, or the old values"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        runs.atomic_write(self.folder / "config.yaml", to_yaml(self.config))
        record = {
            "name": self.folder.name,
            "created": time.time(),
            "search": self.search.name,
            "objectives": [vars(o) for o in self.objectives],
            "settings": json.loads(json.dumps(vars(self.search))),
            "identity": ours,
            "data": self._data(),
            "tags": self.config.run.tags,
            **about,
        }
        runs.write_json(path, record)

    def known_data(self) -> dict[str, dict[str, str]]:
        """What the search has begun with, if it has."""
        with suppress(OSError, ValueError, KeyError):
            return runs.read_json(self.folder / "search.json")["data"]
        return {}

    def _data(self) -> dict[str, dict[str, str]]:
        return {k: {"key": p.key, "source_key": p.source_key} for k, p in self.sets.items()}

    def _refuse_other_data(self, before: Mapping[str, Mapping[str, str]]) -> None:
        """Trials on other images, or other pixels of them, would not compare."""
        for name, now in self._data().items():
            if name in before and before[name] != now:
                root = self.sets[name].rows.root
                what = (
                    "cache.format"
                    if before[name]["source_key"] == now["source_key"]
                    else "data.root"
                )
                raise UserError(
                    f"{what}: {root} is not what {self.folder.name} began with (key {before[name]['key']}, now {now['key']}); "
                    "restore it, or give this search another run.name"
                )

    # ---------------------------------------------------------------------------------- its winners
    def experiment_of(self, config: Config, title: str) -> str:
        """An experiment file that trains this config as it is, for all of loop.epochs."""
        import yaml

        values = to_dict(self.full_length(config))
        values["scaling"] = {"sync_batchnorm": config.scaling.sync_batchnorm}
        if config.stages:
            del values["loop"]["epochs"]  # what the stages make together
        for key in (
            "run",
            "runs",
            "tracking",
            "cache",
            "search",
            "gate",
            "distil",
            "fakes",
        ):
            values.pop(key)
        for key in ("experiment", "debug", "soft_labels"):
            values.pop(key)
        values["cache"] = {"format": config.cache.format, "jpeg_quality": config.cache.jpeg_quality}
        groups = ("data", "model", "teacher", "task", "optimizer", "schedule")
        lines = "".join(f"  - override /{group}: null\n" for group in groups)
        body = yaml.safe_dump(literal(values), sort_keys=False, allow_unicode=True)
        return f"# @package _global_\n{title}\ndefaults:\n{lines}  - _self_\n\n{body}"


def _expressions(texts: Sequence[str], key: str) -> list[Expression]:
    return [Expression(text, f"{key}[{i}]") for i, text in enumerate(texts)]


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; null takes a term out."""
    *path, last = key.split(".")
    node = values
    for part in path:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    if value is None and path == ["task", "terms"]:
        node.pop(last, None)
    else:
        node[last] = value


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    left, right = dict(flatten(dict(a))), dict(flatten(dict(b)))
    keys = sorted(left.keys() | right.keys())
    return [
        f"{k}: {left.get(k)!r} -> {right.get(k)!r}" for k in keys if left.get(k) != right.get(k)
    ]


# -------------------------------------------------------------------------------------------- record
@dataclass
class Ledger:
    """The search's journal, and what it says: every trial, by number."""

    folder: Path
    trials: dict[int, TrialResult] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    draws: int = 0
    """Proposals so far, refused ones too: the next one's place in the sequence of random numbers."""
    refused: int = 0
    refusals: list[Point] = field(default_factory=list)
    """Points that must not be started, in order; without those that were merely there before."""
    attempt: int = 1
    _since: float = 0.0
    spent: dict[int, float] = field(default_factory=dict)
    """Seconds from each start's first record to its last one."""

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """What was written, by however many starts."""
        found = cls(folder)
        for record in runs.parse_lines(_lines(folder / "journal.jsonl")):
            found._take(record)
        return found

    def _take(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "attempt":
            self.attempt = record["attempt"] + 1
            self._since = record["time"]
        self.spent[record["attempt"]] = record["time"] - self._since
        if kind == "proposed":
            n = record["number"]
            self.trials[n] = TrialResult(
                number=n,
                name=trial_name(n),
                state="waiting",
                point=record["point"],
                values=dict(record["measures"]),
                epochs=0,
                seconds=0.0,
            )
            self.sources[n] = record["source"]
            self.draws = max(self.draws, record["draw"] + 1)
        elif kind == "refused":
            self.draws, self.refused = max(self.draws, record["draw"] + 1), self.refused + 1
            if record["why"] != AGAIN:
                self.refusals.append(record["point"])
        elif kind == "exploit":
            trial = self.trials[record["number"]]
            trial.point = record["point"]
            trial.values |= record["measures"]
        elif kind == "trial":
            trial = self.trials[record["number"]]
            trial.state, trial.why = record["state"], record["why"]
            trial.values |= record["values"]
            trial.epochs, trial.seconds = record["epochs"], record["seconds"]
            trial.feasible = record["feasible"]

    def add(self, kind: str, **values: Any) -> None:
        """Write a record, then believe it."""
        record = {
            "kind": kind,
            "attempt": self.attempt,
            "step": len(self.ended()) + (kind == "trial"),
            "time": time.time(),
            **values,
        }
        runs.append_records(self.folder, [record])
        attempt = self.attempt
        self._take(record)
        self.attempt = attempt  # ours goes on

    def ended(self) -> list[TrialResult]:
        return [t for t in list(self.trials.values()) if t.state not in ("waiting", "running")]

    def unfinished(self) -> list[TrialResult]:
        return [t for t in list(self.trials.values()) if t.state in ("waiting", "running")]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


# ----------------------------------------------------------------------------------------- proposals
class Proposer:
    """Optuna's choice of points: what it knows of ended trials can be told again after a stop.

    The random numbers of a draw are a function of (search.seed, its place), so that a search that goes on does not begin
    its draws again.
    """

    def __init__(self, plan: SearchPlan) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.plan = plan
        way = optuna.study.StudyDirection
        directions = [way.MAXIMIZE if o.higher_is_better else way.MINIMIZE for o in plan.objectives]
        self._asked: dict[int, optuna.trial.Trial] = {}
        self._learned = 0
        self.study = optuna.create_study(directions=directions, sampler=self._sampler(0))

    def _sampler(self, draw: int) -> optuna.samplers.BaseSampler:
        import optuna

        search = self.plan.search
        digest = hashlib.blake2b(f"{search.seed}/{draw}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest)
        # what was refused is no experience: Optuna would count it
        beginning = self._learned < max(4, min(10, search.num_samples // 4))
        if search.algorithm == "random" or (search.algorithm == "tpe" and beginning):
            return optuna.samplers.RandomSampler(seed=seed)
        if search.algorithm == "nsga2":
            size = max(4, min(50, search.num_samples // 4))
            return optuna.samplers.NSGAIISampler(population_size=size, seed=seed)
        # trials that run count as bad for now, so that those beside them look elsewhere
        return optuna.samplers.TPESampler(n_startup_trials=0, constant_liar=True, seed=seed)

    def draw(self, place: int) -> tuple[Point, Any]:
        """A point, and what `accepted` or `given_back` takes of it."""
        self.study.sampler = self._sampler(place)
        asked = self.study.ask()
        return self.plan.space.suggest(asked), asked

    def accepted(self, asked: Any, number: int) -> None:
        self._asked[number] = asked

    def given_back(self, asked: Any) -> None:
        """It is not tried."""
        import optuna

        self.study.tell(asked, state=optuna.trial.TrialState.FAIL)

    def refused(self, point: Point) -> None:
        """Learn that nothing is to be found here; else the same would be proposed again and again."""
        self._add(point, "PRUNED", infeasible=True)

    def ended(self, trial: TrialResult, curve: Mapping[int, float]) -> None:
        """Learn from a trial. `curve`: the first objective by epoch.

        One that was stopped early counts for how far it came, one that diverged or breaks a constraint as bad, one that
        broke teaches nothing.
        """
        asked = self._asked.pop(trial.number, None)
        values = [trial.values.get(o.name) for o in self.plan.objectives]
        told = [float(v) for v in values if v is not None and math.isfinite(v)]
        whole = len(told) == len(values) and trial.state != "failed"
        diverged = trial.state == "failed" and bool(_DIVERGED.match(trial.why))
        if not (whole or diverged):
            if asked is not None:
                self.given_back(asked)
            return
        self._learned += 1
        seen: dict[int, float] = {}
        state = "COMPLETE" if whole else "PRUNED"
        if whole and trial.state == "stopped early" and len(values) == 1:
            # Optuna compares what was stopped at the epoch where it was stopped; it does so for one objective alone
            state, seen = "PRUNED", {e: v for e, v in curve.items() if math.isfinite(v)}
        if asked is not None:
            self.given_back(asked)  # from now on it is what became of it that counts
        self._add(trial.point, state, told, seen, infeasible=diverged or not trial.feasible)

    def _add(
        self,
        point: Point,
        state: str,
        values: Sequence[float] = (),
        seen: Mapping[int, float] | None = None,
        infeasible: bool = False,
    ) -> None:
        import optuna

        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[state],
                values=list(values) if state == "COMPLETE" else None,
                params=self.plan.space.params(point),
                distributions=self.plan.space.distributions(point),
                intermediate_values=dict(seen or {}),
                constraints={"feasible": 1.0} if infeasible else None,
            )
        )


def curve_of(run_dir: Path, metric: str) -> dict[int, float]:
    """A metric by epoch (from 1), from the trial's journal."""
    epochs = [r for r in runs.read_journal(run_dir) if r["kind"] == "epoch"]
    return {r["epoch"]: r[metric] for r in epochs if r.get(metric) is not None}


def data_key(config: Config) -> str:
    """The same for configs that train on the same set."""
    return json.dumps(to_dict(config)["data"], sort_keys=True)


def config_of_trial(folder: Path, number: int) -> Config:
    return load_run_config(folder / "trials" / trial_name(number))
