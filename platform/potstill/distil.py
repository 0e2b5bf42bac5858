"""The whole path: teacher -> diagnose -> fine-tune if needed -> verify -> soft labels -> students -> compare.

A path has a folder of its own, <runs.dir>/<run.name, or distil-<experiment>>/:
    steps.json              {step: {key, status, result, seconds}}
    gate.json               the teacher's measurements, the verdicts on it, and what followed
    comparison.json, .png, .md

A step's key stands for its own settings, for the content of its data, and for what the steps before have handed on.
So it is done once, and again only where one of these has changed. Every training is a run of its own beside the
folder, <path>-<role>-<key>, and goes on from its checkpoint after a stop.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import console, fit, gate, metric_names, runs
from potstill.architecture import OF_THE_TRAINING
from potstill.compare import as_markdown, compared, comparison_rows, conclusion
from potstill.config import (
    Config,
    Data,
    Distil,
    EvaluateConfig,
    Fakes,
    Gate,
    MakeFakesConfig,
    TeacherConfig,
    checked,
    compose,
    identity,
    load_run_config,
    resolved,
    stage_configs,
    teacher_inputs,
    to_dict,
)
from potstill.data.cache import open_cache
from potstill.data.fakes import CLASSES
from potstill.data.prepare import Plan, check, prepared
from potstill.errors import Stopped, UserError
from potstill.models.published import weights_file
from potstill.registry import load_plugins
from potstill.replica import replicated
from potstill.storage import home, local_folder

if TYPE_CHECKING:
    from torch import nn

Result = dict[str, Any]
TO_COME = "the-run-to-come"
"""Stands for the teacher's run where a config is checked before that run is there."""

FEWEST_SEEDS = 3
LATENCY_BATCHES = (1, 32)
COMPARISON = ("comparison.json", "comparison.png", "comparison.md")


def distil(config: Config, config_dir: str | None = None) -> Result:
    """Walk the path, or go on with it. `config`: the student's, with its teacher terms; `config_dir` is searched for
    the experiments of the teacher, too.

    Returns what comparison.json holds. Raises UserError, for a mistake in any step before the first one begins, and
    Stopped.
    """
    path = _Path(config, config_dir)
    with runs.lock(path.folder), replicated(path.folder, config.runs.dir):
        return path.walk()


def show_steps(config: Config) -> None:
    """Print what has been done of this config's path."""
    folder = _folder(config)
    rows = [
        [name, step["status"], console.duration(step["seconds"]), step["key"]]
        for name, step in _read_steps(folder).items()
    ]
    if rows:
        console.table(["step", "status", "time", "key"], rows, title=str(folder))
    else:
        console.say(f"{folder}: nothing has been done yet")


# ------------------------------------------------------------------------------------------ the student
def without_teacher(config: Config) -> Config:
    """The very same training without the terms that take a teacher's output, in stages too.

    The weights of the others stay what they are, but for the complement of a term that is gone and for the only one
    that is left: these are 1. Raises UserError where no term is left.
    """
    alone = copy.deepcopy(config)
    owners = ("teacher", *config.teachers)
    every = [config.task["terms"], *(s.task["terms"] for s in stage_configs(config))]
    taught = {
        name
        for terms in every
        for name, term in terms.items()
        if any(c.partition(".")[0] in owners and "." in c for c in term["inputs"])
    }
    kept = {n: t for n, t in alone.task["terms"].items() if n not in taught}
    if not kept:
        raise UserError(
            "task.terms must have a term without a teacher, or no student can be trained alone, got only "
            f"{', '.join(taught)}; add task.terms.task={{loss: …, inputs: [logits, label]}}"
        )
    _mend_weights(kept, list(kept), taught)
    alone.task["terms"] = kept
    for stage in alone.stages:
        changes = {n: c for n, c in (stage.get("terms") or {}).items() if n not in taught}
        left = [n for n in {**kept, **changes} if changes.get(n, kept.get(n)) is not None]
        if not left:  # a stage on the teacher alone: without it the labels must do
            changes, left = {}, list(kept)
        changes = {n: c if c is None else dict(c) for n, c in changes.items()}
        if len(left) == 1:
            changes[left[0]] = changes.get(left[0]) or {}
        _mend_weights({n: c for n, c in changes.items() if c is not None}, left, taught)
        stage["terms"] = changes
    alone.teacher, alone.teachers = TeacherConfig(), {}
    if all("label" in term["inputs"] for term in kept.values()):
        alone.data.unlabeled = None
    return alone


def _mend_weights(terms: Mapping[str, dict[str, Any]], left: Sequence[str], gone: set[str]) -> None:
    for term in terms.values():
        weight = term.get("weight")
        if len(left) == 1 or (isinstance(weight, Mapping) and weight.get("of") in gone):
            term["weight"] = 1.0


# --------------------------------------------------------------------------------------------- the path
class _Path:
    """All of its configs are made and checked when it is built: what is wrong with the last step is said at once."""

    def __init__(self, config: Config, config_dir: str | None) -> None:
        self.folder = _folder(config)
        self.name = self.folder.name
        self.config = config = copy.deepcopy(config)
        self.config_dir = config_dir
        self.kind = config.task.get("kind", "single_label")
        self.gate_metric = config.gate.metric or gate.default_metric(self.kind)
        self.metric = metric_names.plain(config.distil.metric or config.loop.monitor)
        self._refuse()
        config.data.root = resolved(config.data.root)
        config.data.unlabeled = resolved(config.data.unlabeled)
        config.teacher.run = resolved(config.teacher.run)
        for one in config.teachers.values():
            one["run"] = resolved(one.get("run"))
        self.sets = _fake_sets(config.fakes, self._trains_a_teacher())
        if self.sets:
            config.data.root = self.sets["student"]["root"]
        self._open_given()
        self.teacher = self._experiment("teacher") if self._trains_a_teacher() else None
        self.finetune = self._experiment("finetune") if config.distil.finetune else None
        self.plans: dict[str, Plan] = {}
        student = self._of_the_path(config)
        self._count_steps(student)
        alone = without_teacher(student)
        self.alone = {s: checked(_seeded(alone, s)) for s in config.distil.seeds}
        pretended = self._taught(student, dict.fromkeys(self._names(), TO_COME), None)
        self.distilled = {s: checked(_seeded(pretended, s)) for s in config.distil.seeds}
        self._refuse_parts()
        if not self.sets:
            self._refuse_data()
        self._refuse_weights()
        self.steps: dict[str, Any] = {}
        self.walked: list[str] = []

    # ---------------------------------------------------------------------------------- what is refused
    def _refuse(self) -> None:
        config, seeds = self.config, self.config.distil.seeds
        fewest = 1 if config.debug else FEWEST_SEEDS
        if len(set(seeds)) != len(seeds) or len(seeds) < fewest:
            raise UserError(
                f"distil.seeds must be at least {fewest} different numbers, got {seeds}: a gain over fewer seeds cannot be "
                "told from chance; such as distil.seeds=[0,1,2]"
            )
        if config.run.again:
            raise UserError(
                "run.again must be false here, got true: every step is done once; give the path another run.name"
            )
        if not teacher_inputs(config):
            raise UserError(
                "task.terms must have a term that learns from a teacher, got "
                f"{', '.join(config.task['terms'])}; use task=distil"
            )
        if config.teacher.soft_labels:
            raise UserError(
                f"teacher.soft_labels must be null here, got {config.teacher.soft_labels}: the path makes them itself; set "
                "distil.soft_labels=true"
            )
        if not (
            config.distil.teacher or config.teacher.run or config.teacher.weights or config.teachers
        ):
            raise UserError(
                "distil.teacher must name the experiment that trains the teacher, got null; or give a trained one: "
                "teacher.run=runs/<name>, or teacher.weights"
            )
        if "student" in config.teachers:
            raise UserError(
                "teachers.student must have another name: in gate.json and comparison.json the student has it"
            )
        gate.check_metric(self.gate_metric, self.kind)
        gate.check_given(self.gate_metric, config.gate)
        if config.distil.finetune and config.teachers:
            raise UserError(
                f"distil.finetune must be null with teachers, got {config.distil.finetune}: fine-tune each by itself with "
                "jobs/train.py, and name the runs"
            )
        if self.metric not in ("loss", *metric_names.ALWAYS):
            metric_names.check(self.kind, [self.metric], key="distil.metric")
        if config.fakes.images and config.data.root:
            raise UserError(
                f"data.root must be null where fakes.images makes the data, got {config.data.root}; set one of them"
            )
        if config.distil.soft_labels:
            from potstill.soft_labels import refuse_recipe

            refuse_recipe(config)

    def _count_steps(self, student: Config) -> None:
        """As many updates alone as distilled, where unlabelled images teach nothing without a teacher."""
        if student.data.unlabeled and student.loop.steps_per_epoch is None and not self.sets:
            training = sum(s == "train" for s in self._plan(student).rows.split)
            student.loop.steps_per_epoch = math.ceil(training / student.loop.batch_size)

    def _refuse_data(self) -> None:
        """What a listing of the images is enough to refuse, for every training there will be."""
        config = self._of_the_path(self.config)
        plan, subset = self._plan(config), self.config.distil.subset
        have = [s for s in ("val", "test") if s in set(plan.rows.split)]
        if subset not in have:
            raise UserError(
                f"distil.subset must be one that {config.data.root} has ({', '.join(have)}), got {subset!r}"
            )
        alone = self.alone[self.config.distil.seeds[0]]
        for one in (self.teacher, self.finetune, alone, config):
            if one is None:
                continue
            one = copy.deepcopy(one)
            if one.model.get("init_from") == TO_COME:
                one.model["init_from"] = None
            fit.refuse_before_start(one, self.folder, self._plan(one))
        if self.teacher:
            from potstill.task import match_classes

            overlap, known = (
                config.teacher.classes == "overlap",
                self._plan(self.teacher).rows.classes,
            )
            match_classes(
                known, plan.rows.classes, f"the one of {self.teacher.experiment}", overlap
            )

    def _open_given(self) -> None:
        """Weights and runs that are not there."""
        for key, teacher in self._given().items():
            if teacher.get("weights"):
                teacher["weights"] = str(_file_of(teacher, key))
            else:
                runs.best_checkpoint(runs.open_run(teacher["run"], f"{key}.run"))

    def _refuse_parts(self) -> None:
        """Parts that are not there, or do not go together."""
        config = self.config
        first = config.distil.seeds[0]
        configs = {"distil.teacher": self.teacher, "distil.finetune": self.finetune}
        configs |= {"alone": self.alone[first], "distilled": self.distilled[first]}
        for key, one in configs.items():
            if one is None:
                continue
            kind = one.task.get("kind", "single_label")
            if kind != self.kind:
                raise UserError(
                    f"{key} must do the student's kind of task ({self.kind}), got {one.experiment}, which does {kind}"
                )
            fit.check_model(one)

    def _refuse_weights(self) -> None:
        """Files of weights that are not of their model, or of other classes."""
        for key, teacher in self._given().items():
            if teacher.get("weights"):
                file, student = Path(teacher["weights"]), self._imported(teacher)
                # sets of fakes are not there yet, but their classes are known
                classes = list(CLASSES) if self.sets else self._plan(student).rows.classes
                _model_of_weights(file, student, classes, f"{key}.weights")

    def _model_of_the_teacher(self, own: Mapping[str, Any], experiment: str | None) -> Result:
        """The model node of a fine-tuning: the teacher's, but for what is of the training. `own`: its experiment's."""
        given = self._given().get("teacher", {})
        if self.teacher:
            model = self.teacher.model
        elif given.get("run"):
            model = load_run_config(Path(given["run"])).model
        else:
            model = given["model"]
        differing = [k for k in ("_target_", "name") if model.get(k) != own.get(k)]
        if differing:
            key = differing[0]
            raise UserError(
                f"distil.finetune must be of the teacher's model, got {experiment}, where model.{key} is "
                f"{own.get(key)!r}, and a teacher where it is {model.get(key)!r}"
            )
        theirs = {k: v for k, v in model.items() if k not in OF_THE_TRAINING}
        ours = {k: v for k, v in own.items() if k in OF_THE_TRAINING}
        return copy.deepcopy({**theirs, **ours})

    # ------------------------------------------------------------------------------------- its configs
    def _trains_a_teacher(self) -> bool:
        config = self.config
        return not (config.teacher.run or config.teacher.weights or config.teachers)

    def _names(self) -> list[str]:
        """Of the teachers: `teacher`, or those of `teachers`."""
        return list(self.config.teachers) or ["teacher"]

    def _given(self) -> dict[str, dict[str, Any]]:
        """The teachers that need no training, by config key."""
        config = self.config
        if config.teachers:
            return {f"teachers.{name}": one for name, one in config.teachers.items()}
        return {} if self._trains_a_teacher() else {"teacher": vars(config.teacher)}

    def _experiment(self, role: str) -> Config:
        """The config of distil.teacher or distil.finetune, on the student's images where it names none itself."""
        config, key = self.config, f"distil.{role}"
        experiment, overrides = (
            getattr(config.distil, role),
            getattr(config.distil, f"{role}_overrides"),
        )
        given = [f"experiment={experiment}", *(["debug=true"] if config.debug else []), *overrides]
        try:
            found: Config = compose("train", given, self.config_dir)
        except UserError as error:
            raise UserError(f"{key}={experiment}: {error}") from None
        if found.data.root is None:
            own, blank = found.data, Data()
            for name in _SOURCE:
                if getattr(own, name) == getattr(blank, name):
                    setattr(own, name, copy.deepcopy(getattr(config.data, name)))
            if self.sets and role == "teacher":
                own.root = self.sets["teacher"]["root"]
        found.data.root = resolved(found.data.root)
        found.plugins = list(dict.fromkeys([*config.plugins, *found.plugins]))
        found = self._of_the_path(found)
        if role == "finetune":
            found.model = self._model_of_the_teacher(found.model, experiment)
            found.model["init_from"] = TO_COME
        try:
            return checked(found)
        except UserError as error:
            raise UserError(f"{key}={experiment}: {error}") from None

    def _of_the_path(self, config: Config) -> Config:
        """A step's config: where it runs and is written as the path does, and nothing of the path itself."""
        found = copy.deepcopy(config)
        found.model["init_from"] = resolved(found.model.get("init_from"))
        for section in ("cache", "runs", "tracking", "scaling"):
            setattr(found, section, copy.deepcopy(getattr(self.config, section)))
        subset = self.config.distil.subset
        found.distil, found.gate, found.fakes = Distil(subset=subset), Gate(), Fakes()
        return found

    def _taught(
        self, student: Config, teachers: Mapping[str, str], soft_labels: str | None
    ) -> Config:
        """The student's config with these runs as its teachers."""
        found = copy.deepcopy(student)
        if found.teachers:
            for name, one in found.teachers.items():
                one |= {"run": teachers[name], "weights": None}
                one.pop("model", None)
        else:
            found.teacher.run, found.teacher.weights = teachers["teacher"], None
            found.teacher.model = {}
        found.teacher.soft_labels = soft_labels
        return found

    def _plan(self, config: Config) -> Plan:
        key = json.dumps(to_dict(config)["data"], sort_keys=True)
        if key not in self.plans:
            self.plans[key] = check(config.data, config.cache)
        return self.plans[key]

    # ------------------------------------------------------------------------------------- its steps
    def walk(self) -> Result:
        began = time.monotonic()
        self.steps = _read_steps(self.folder)
        console.say(f"Path: {self.folder}", "bold")
        if self.sets:
            self._make_sets()
        teachers = self._teachers()
        teachers, judged = self._judge(teachers)
        passed = judged["distil"]
        soft_labels = (
            self._soft_labels(teachers) if passed and self.config.distil.soft_labels else {}
        )
        students: dict[str, dict[int, str]] = {"alone": {}, "distilled": {}}
        for seed, config in self.alone.items():
            students["alone"][seed] = self._train(f"alone-s{seed}", config)
        for seed, config in self.distilled.items() if passed else ():
            taught = self._taught(config, teachers, soft_labels.get(str(seed)))
            depends = [_weights_key(run) for run in teachers.values()]
            students["distilled"][seed] = self._train(f"distilled-s{seed}", taught, *depends)
        result = self._compare(teachers, judged, self._evaluate(students), students)
        self._forget_others()
        console.say(f"{console.duration(time.monotonic() - began)} in all. Written: {self.folder}")
        if self.config.tracking.name == "aim":
            console.say(
                f"Aim:    uv run jobs/explore.py --repo {self.config.tracking.repo or self.config.runs.dir}"
            )
        return result

    def _step(self, name: str, key: Any, work: Callable[[str], Result], title: str = "") -> Result:
        """Do it, unless it was done with this key and what it made is still there. `work` takes the key's digest."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
        self.walked.append(name)
        before = self.steps.get(name)
        if before and before["key"] == digest and _still_there(before):
            console.say(f"{name}: done before, in {console.duration(before['seconds'])}", "dim")
            return before["result"]
        console.say(f"\n{title or name}", "bold underline")
        if not before or before["key"] != digest:  # what was compared is of an earlier config
            for name_ in COMPARISON:
                (self.folder / name_).unlink(missing_ok=True)
        # a step that goes on adds to the time of its first part
        goes_on = before and before["key"] == digest and before["status"] != "finished"
        spent = before["seconds"] if before and goes_on else 0.0
        began = time.monotonic()

        def note(status: str, result: Result | None) -> None:
            seconds = spent + time.monotonic() - began
            entry = {"key": digest, "status": status, "result": result, "seconds": seconds}
            self.steps[name] = entry
            runs.write_json(self.folder / "steps.json", self.steps)

        note("running", None)
        try:
            result = work(digest)
        except (Stopped, KeyboardInterrupt):
            note("stopped", None)
            raise
        except Exception:
            note("failed", None)
            raise
        note("finished", result)
        return result

    def _forget_others(self) -> None:
        """Steps that the path no longer has, such as those of a seed that was taken out."""
        self.steps = {name: self.steps[name] for name in self.walked if name in self.steps}
        runs.write_json(self.folder / "steps.json", self.steps)

    def _make_sets(self) -> None:
        from potstill.data.fakes import make_fakes_shown

        def work(_: str) -> Result:
            made = []
            for one in self.sets.values():
                settings = {k: v for k, v in one.items() if k not in ("root", "content")}
                made.append(make_fakes_shown(MakeFakesConfig(output=one["root"], **settings)))
            return {"files": [str(root / "fakes.json") for root in made]}

        sets = "two sets" if len(self.sets) > 1 else "a set"
        self._step("fakes", self.sets, work, f"Fakes: {sets} of real and fake images")
        self._refuse_data()

    def _train(self, role: str, config: Config, *depends: str) -> str:
        """One run, by `fit`. Returns its folder."""
        config = copy.deepcopy(config)
        config.distil = Distil()
        source = config.model.get("init_from")
        key = [identity(config), self._plan(config).source_key, *depends]
        key += [_weights_key(source)] if source else []

        def work(digest: str) -> Result:
            config.run.name = f"{self.name}-{role}-{digest}"
            config.run.tags = list(dict.fromkeys([*config.run.tags, self.name, role.split("-")[0]]))
            summary = fit.fit(config)
            run_dir = local_folder(config.runs.dir) / summary["name"]
            found = {"run": str(run_dir), "status": summary["status"], "best": summary["best"]}
            return {**found, "files": [str(run_dir / "summary.json")]}

        words = {"alone": "Student alone, seed ", "distilled": "Student distilled, seed "}
        kind, _, seed = role.partition("-s")
        title = (
            words[kind] + seed
            if kind in words
            else {"teacher": "Teacher", "finetuned": "Fine-tune"}[kind]
        )
        return self._step(role, key, work, title)["run"]

    def _teachers(self) -> dict[str, str]:
        """The folder of each teacher's run, by name: trained now, given, or made of weights."""
        if self.teacher:
            return {"teacher": self._train("teacher", self.teacher)}
        found = {}
        for key, teacher in self._given().items():
            name = key.rpartition(".")[2]
            found[name] = resolved(teacher.get("run")) or self._import(name, teacher)
        return found

    def _import(self, name: str, teacher: Mapping[str, Any]) -> str:
        """A run's folder made of published weights, so that whatever reads a run reads these."""
        config = self._imported(teacher)
        file, plan = Path(teacher["weights"]), self._plan(config)
        key = [
            runs.file_sha256(file),
            config.model,
            plan.rows.classes,
            to_dict(config.data),
            to_dict(config.augment),
        ]

        def work(digest: str) -> Result:
            config.run.name = f"{self.name}-imported-{name}-{digest}"
            run_dir = import_weights(file, config, plan)
            return {"run": str(run_dir), "files": [str(run_dir / "run.json")]}

        return self._step(f"import-{name}", key, work, f"Import {file.name}")["run"]

    def _imported(self, teacher: Mapping[str, Any]) -> Config:
        """The config of a run that is made of this teacher's weights."""
        found = copy.deepcopy(self.alone[self.config.distil.seeds[0]])
        found.model, found.stages = {**copy.deepcopy(teacher["model"]), "init_from": None}, []
        return found

    # ------------------------------------------------------------------------------------- the gate
    def _judge(self, teachers: dict[str, str]) -> tuple[dict[str, str], Result]:
        """Diagnose, fine-tune if needed, verify. Returns the teachers to learn from, and gate.json."""
        told: dict[str, Result] = {name: {} for name in teachers}
        subset = self.config.distil.subset
        judged: Result = {
            "metric": self.gate_metric,
            "data": {"root": self.config.data.root, "diagnosed_on": "val", "verified_on": subset},
            "distil": None,
            "why": None,
            "teachers": told,
        }
        can_finetune = self.finetune is not None and not self.config.teachers
        for name, run in teachers.items():
            found, passed = self._diagnose(name, run, can_finetune)
            told[name]["diagnose"] = found
            runs.write_json(self.folder / "gate.json", judged)
            told[name]["finetuned"] = None
            if not passed and can_finetune:
                assert self.finetune is not None
                config = copy.deepcopy(self.finetune)
                config.model["init_from"] = run
                teachers = {**teachers, name: self._train("finetuned", config)}
                told[name]["finetuned"] = teachers[name]
        passed_all = True
        for name, run in teachers.items():
            measured = told[name]["diagnose"]
            if told[name]["finetuned"] or subset != "val":
                title = f"Verify {Path(run).name}"
                measured = self._measure(f"verify-{name}", run, title, subset)
            told[name]["verify"], passed = self._verdict(name, measured, verifying=True)
            passed_all &= passed
        judged["distil"] = passed_all
        judged["why"] = "; ".join(
            f"{n}: {t['verify']['title']}: {t['verify']['consequence']}" for n, t in told.items()
        )
        runs.write_json(self.folder / "gate.json", judged)
        return teachers, judged

    def _diagnose(self, name: str, run: str, can_finetune: bool) -> tuple[Result, bool]:
        measured = self._measure(f"diagnose-{name}", run, f"Diagnose {Path(run).name}", "val")
        return self._verdict(name, measured, can_finetune=can_finetune)

    def _verdict(self, name: str, measured: Result, **how: bool) -> tuple[Result, bool]:
        metric, config = self.gate_metric, self.config.gate
        by_chance = gate.chance(metric, measured["support"], measured["samples"], self.kind)
        limits = gate.thresholds(metric, by_chance, config)
        value = measured["metrics"][metric]
        found = gate.judge(metric, math.nan if value is None else value, limits, config, **how)
        stage = "verify" if how.get("verifying") else "diagnose"
        say = console.warn if found.loud else console.say
        say(f"Gate, {stage} {name}: {found.title}: {found.consequence}")
        kept = ("run", "checkpoint", "subset", "samples", "metrics", "support", "data_key")
        kept += ("warnings",)
        about = {k: measured[k] for k in kept}
        verdict = {"verdict": found.name, "title": found.title, "consequence": found.consequence}
        return {
            "value": value,
            **verdict,
            "thresholds": dataclasses.asdict(limits),
            **about,
        }, found.passed

    def _measure(self, step: str, run: str, title: str, subset: str) -> Result:
        """A run on the images of the path, in its own decoding and views, at its own thresholds."""
        config, run_dir = self.alone[self.config.distil.seeds[0]], Path(run)
        trained, metrics = identity(load_run_config(run_dir)), self._metrics()
        sums = runs.best_checkpoint(run_dir).meta["sha256"]
        key = [
            str(run_dir),
            {file: digest for file, digest in sums.items() if file != "state.pt"},
            runs.read_json(run_dir / "run.json")["classes"],
            *(trained["data"]["decode"], trained["augment"]),
            *(self._plan(config).source_key, subset, metrics),
        ]

        def work(_: str) -> Result:
            return measure(run_dir, config, subset, metrics)

        return self._step(step, key, work, title)

    def _metrics(self) -> list[str]:
        """What is measured besides what always is."""
        wanted = [*(self.config.task.get("metrics") or []), self.gate_metric, self.metric]
        further = [n for n in wanted if n in metric_names.METRICS and n not in metric_names.ALWAYS]
        return list(dict.fromkeys(further))

    # ------------------------------------------------------------------------------------- the students
    def _soft_labels(self, teachers: dict[str, str]) -> dict[str, str]:
        """The folder of each seed's soft labels: the seed is of the crops, too."""
        from potstill.soft_labels import key_of, soft_labels

        taught = {s: self._taught(c, teachers, None) for s, c in self.distilled.items()}
        plan = self._plan(next(iter(taught.values())))
        key = {s: key_of(config, plan, plan.rows.classes) for s, config in taught.items()}

        def work(_: str) -> Result:
            folders = {str(seed): str(soft_labels(config)) for seed, config in taught.items()}
            return {
                "folders": folders,
                "files": [f"{folder}/manifest.json" for folder in folders.values()],
            }

        return self._step("soft-labels", key, work, "Soft labels")["folders"]

    def _evaluate(self, students: dict[str, dict[int, str]]) -> dict[str, list[Result]]:
        found: dict[str, list[Result]] = {}
        subset = self.config.distil.subset
        for group, by_seed in students.items():
            found[group] = [
                {
                    "seed": seed,
                    **self._measure(
                        f"evaluate-{group}-s{seed}", run, f"Evaluate {Path(run).name}", subset
                    ),
                }
                for seed, run in by_seed.items()
            ]
        return found

    def _compare(
        self,
        teachers: dict[str, str],
        judged: Result,
        measured: dict[str, list[Result]],
        students: dict[str, dict[int, str]],
    ) -> Result:
        some_student = next(iter(students["alone"].values()))
        costs = self._costs({**teachers, "student": some_student})
        models: Result = {}
        for name in teachers:
            value = _number(judged["teachers"][name]["verify"]["metrics"][self.metric])
            about = {"run": teachers[name], "value": value, "seconds": _seconds(teachers[name])}
            models[name] = {**costs["models"][name], **about}
        times = {
            group: sum(filter(None, map(_seconds, by_seed.values()))) / len(by_seed)
            for group, by_seed in students.items()
            if by_seed
        }
        models["student"] = {**costs["models"]["student"], "seconds": times}
        values = {
            g: [_number(m["metrics"][self.metric]) for m in found] for g, found in measured.items()
        }
        only = models["teacher"]["value"] if "teacher" in models else None
        # of all seeds together; it may have found what another path has written
        soft_labels = self.steps["soft-labels"] if "soft-labels" in self.walked else None
        root, subset = self.config.data.root, self.config.distil.subset
        result = compared(
            self.folder,
            self.metric,
            only,
            values["alone"],
            values["distilled"],
            {
                "seeds": list(students["alone"]),
                "measured_on": {
                    "root": root,
                    "subset": subset,
                    "samples": measured["alone"][0]["samples"],
                },
                "gate": {k: judged[k] for k in ("metric", "distil", "why")},
                "models": models,
                "soft_labels_seconds": soft_labels and soft_labels["seconds"],
                "latency_on": costs["on"],
                "runs": {
                    g: {str(s): run for s, run in by_seed.items()}
                    for g, by_seed in students.items()
                },
                "metrics": {g: [m["metrics"] for m in found] for g, found in measured.items()},
            },
        )
        notes = [
            f"Gate: {judged['why']}.",
            f"Measured on {measured['alone'][0]['samples']} images ({subset}) of {root}; "
            "alone and distilled have the same augmentation, updates, optimizer and seeds.",
            f"Latency: one forward pass in fp32, median, on {costs['on']}.",
        ]
        if soft_labels:
            took = console.duration(soft_labels["seconds"])
            notes.append(f"Training: besides, the teacher's soft labels for all seeds took {took}.")
        runs.atomic_write(self.folder / "comparison.md", as_markdown(result, notes))
        console.say("")
        title = f"The student, alone and distilled; seeds: {', '.join(map(str, self.alone))}"
        console.table(*comparison_rows(result), title=title)
        for note in notes[2:]:
            console.say(note, "dim")
        if not judged["distil"]:
            console.warn(f"gate: {judged['why']}")
        console.say(conclusion(result), "bold")
        return result

    def _costs(self, by_name: dict[str, str]) -> Result:
        """Parameters, size and latency of each architecture, measured when nothing trains any more."""
        nodes = {name: _architecture(Path(run)) for name, run in by_name.items()}
        use_gpu = _gpu_here(self.config)

        def work(_: str) -> Result:
            found = costs({name: Path(run) for name, run in by_name.items()}, use_gpu)
            return {**found, "files": []}

        key = [nodes, use_gpu, os.cpu_count(), LATENCY_BATCHES]
        return self._step("latency", key, work, "Parameters, size, latency")


_SOURCE = (
    *("source", "root", "columns", "allow_outside", "multi_label", "classes", "max_samples"),
    *("max_bad_fraction", "split"),
)
"""Of config.data: which images, and how they are split; not how they are decoded."""


def _folder(config: Config) -> Path:
    named = ["distil", *([config.experiment] if config.experiment else [])]
    name = config.run.name or "-".join([*named, *(["debug"] if config.debug else [])])
    if "/" in name or name.startswith("."):
        raise UserError(
            f"run.name must be a folder's name without '/' and not start with '.', got {name!r}"
        )
    return local_folder(config.runs.dir) / name


def _read_steps(folder: Path) -> dict[str, Any]:
    path = folder / "steps.json"
    return runs.read_json(path) if path.exists() else {}


def _still_there(step: Result) -> bool:
    """Whether a step has finished, and the files that it made have not been removed since."""
    result = step["result"] if step["status"] == "finished" else None
    return result is not None and all(Path(file).exists() for file in result["files"])


def _seeded(config: Config, seed: int) -> Config:
    found = copy.deepcopy(config)
    found.loop.seed = seed
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _seconds(run: str) -> float | None:
    """What its training took; None for weights that were given."""
    path = Path(run) / "summary.json"
    return runs.read_json(path)["seconds"] if path.exists() else None


def _weights_key(source: str) -> str:
    """The content of a run's best checkpoint, or of a weights file."""
    if Path(source).is_dir():
        return runs.best_checkpoint(Path(source)).meta["sha256"]["model.safetensors"]
    return runs.file_sha256(Path(source))


def _file_of(teacher: Mapping[str, Any], key: str) -> Path:
    folder, target = (
        teacher.get("weights_dir") or TeacherConfig().weights_dir,
        teacher["model"]["_target_"],
    )
    return weights_file(teacher["weights"], folder, target, key=f"{key}.weights").resolve()


def _gpu_here(config: Config) -> bool | None:
    """What scaling.use_gpu says of this process, which judges models: that workers must have GPUs, on a cluster, is
    nothing about it."""
    asked = config.scaling.use_gpu
    return None if asked and os.environ.get("RAY_ADDRESS") else asked


def _architecture(run_dir: Path) -> Result:
    config, about = load_run_config(run_dir), runs.read_json(run_dir / "run.json")
    model = {
        k: v for k, v in config.model.items() if k not in ("init_from", "pretrained", "freeze")
    }
    px = config.augment.image_px or config.data.decode.image_px
    return {"model": model, "px": px, "outputs": len(about.get("outputs") or about["classes"])}


def _fake_sets(fakes: Fakes, with_teacher: bool) -> dict[str, dict[str, Any]]:
    """The teacher's set, if one is trained, and the student's: what make_fakes takes, and where each is written; none
    without images."""
    if not fakes.images:
        return {}
    images = local_folder(fakes.images, "fakes.images").resolve()
    if not images.is_dir():
        raise UserError(
            f"fakes.images must be a folder of images, got {fakes.images}, which is none"
        )
    files = sorted(
        (str(p.relative_to(images)), p.stat().st_size) for p in images.rglob("*") if p.is_file()
    )
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    found = {}
    teachers = [("teacher", fakes.teacher_generator, fakes.teacher_images)] if with_teacher else []
    for role, generator, count in (*teachers, ("student", fakes.generator, fakes.max_images)):
        settings = {"generator": generator, "max_images": count, "px": fakes.px}
        settings |= {"jpeg_quality": fakes.jpeg_quality, "seed": fakes.seed}
        about = json.dumps([settings, str(images), content], sort_keys=True)
        name = f"{generator}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
        root = str((home() / Path(fakes.dir).expanduser()).resolve() / name)
        found[role] = {**settings, "images": str(images), "root": root, "content": content}
    return found


# ---------------------------------------------------------------------------------------- measurements
def measure(run_dir: Path, config: Config, subset: str, metrics: Sequence[str]) -> Result:
    """A run on the images of `config.data`, split as `config` says and decoded as the run's own were.

    Of a run that knows some of the classes only, on those. Returns its metrics and how many samples each class has.
    """
    from potstill import evaluation

    trained = load_run_config(run_dir)
    load_plugins(trained.plugins)
    data, known = copy.deepcopy(config.data), runs.read_json(run_dir / "run.json")["classes"]
    if data.decode != trained.data.decode:
        data.decode, data.unlabeled = trained.data.decode, None
    names = check(data, config.cache).rows.classes
    if shared := [n for n in names if n in known]:
        data.classes = data.classes if len(shared) == len(names) else shared
    else:
        raise UserError(
            f"teacher.run must know classes of the data, got {run_dir}, which knows none"
        )
    asked = EvaluateConfig(subset=subset, use_gpu=_gpu_here(config))
    checkpoint = runs.best_checkpoint(run_dir)
    with prepared(data, config.cache, f"evaluation of {run_dir.name}") as found:
        cache = open_cache(
            found.cache_dir, local_dir=config.cache.local_dir, max_gb=config.cache.max_gb
        )
        warnings = evaluation.trained_on(run_dir, cache, subset)
        for warning in warnings:
            console.warn(f"{warning['name']}: {warning['message']}")
        measured, _ = evaluation.measure(asked, run_dir, checkpoint, cache, metrics)
    keys = [k for k in measured["metrics"] if k != "top5_acc" or measured["top_k"] > 1]
    said = (
        f"{metric_names.title(k, measured['kind'], measured['top_k'])} {metric_names.shown(k, measured['metrics'][k])}"
        for k in keys
    )
    console.say(f"{measured['samples']} images - {', '.join(said)}")
    return {
        "run": str(run_dir),
        "checkpoint": checkpoint.folder.name,
        "subset": subset,
        "samples": measured["samples"],
        "metrics": measured["metrics"],
        "support": [row["support"] for row in measured["per_class"]],
        "data_key": found.cache_dir.name,
        "warnings": warnings,
        "files": [str(run_dir / "run.json")],
    }


def import_weights(file: Path, config: Config, plan: Plan, key: str = "teacher.weights") -> Path:
    """Make a run's folder of a weights file: `config.model` with these weights, classes in the data's order.

    Where the file names its classes they are matched by name. Raises UserError, which names `key`, where a tensor is
    missing or does not fit, or where it knows other classes. Returns the folder.
    """
    config = copy.deepcopy(config)
    config.model["pretrained"] = False
    state = _model_of_weights(file, config, plan.rows.classes, key).state_dict()
    config.run.name = config.run.name or "imported"
    run_dir = local_folder(config.runs.dir) / config.run.name
    fit.write_identity(config, run_dir, plan, {})
    folder = runs.checkpoint_name(0)
    best = {"metric": None, "value": None, "epoch": 0, "folder": folder}
    runs.save_checkpoint(run_dir, 0, state, {}, {"epoch": 0, "epoch_done": True, "best": best})
    return run_dir


def _model_of_weights(file: Path, config: Config, classes: Sequence[str], key: str) -> nn.Module:
    """`config.model` with the weights of a file, on the CPU. Raises UserError as import_weights does."""
    from potstill.assemble import build_model, outputs_of
    from potstill.models.weights import init_from, load_file_state

    config = copy.deepcopy(config)
    config.model["pretrained"] = False
    outputs = outputs_of(config, classes)
    model = build_model(config, outputs)
    order = load_file_state(model, file, key, outputs)
    if order != sorted(order):
        init_from(model, file, outputs)
    return model


def costs(by_name: Mapping[str, Path], use_gpu: bool | None) -> Result:
    """Parameters, MB of the weights' file and ms of a forward pass, of runs by name; and what was measured on."""
    import torch

    from potstill.assemble import image_px, load_model, pick_device
    from potstill.compare import latency_ms

    device = pick_device(use_gpu)
    found: Result = {}
    measured: dict[
        str, dict[str, float]
    ] = {}  # by architecture: one that two runs have is measured once
    for name, run_dir in by_name.items():
        model, _, config = load_model(run_dir)
        like = json.dumps(_architecture(run_dir), sort_keys=True)
        if like not in measured:
            px = image_px(config)
            measured[like] = {str(b): latency_ms(model, px, b, device) for b in LATENCY_BATCHES}
        file = runs.best_checkpoint(run_dir).folder / "model.safetensors"
        found[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "file_mb": file.stat().st_size / 1e6,
            "latency_ms": measured[like],
        }
    threads = torch.get_num_threads()
    if device.type == "cuda":
        on = torch.cuda.get_device_name(device)
    else:
        on = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {"models": found, "on": on}


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "CPU")
