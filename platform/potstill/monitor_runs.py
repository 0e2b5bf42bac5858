"""The monitor's look at runs, searches and distillations: their folders, as the jobs write them, and nothing else.

A run's numbers are its journal's and no others. Nothing is written, and no run is kept waiting: whether one lives is
asked of its lock as seldom as can be.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill import runs
from potstill.errors import UserError
from potstill.storage import is_uri, local_folder

Told = dict[str, Any]
DAY_S = 86400.0
ENDED = ("finished", "stopped_early", "stopped", "failed")
ACTIVE = ("starting", "running", "finishing")
FRESH_S = 600.0
"""Whose lock cannot be seen lives if it has written within this time."""
IDLE_EVERY_S = 20.0
"""So often a run is looked at that is not under way: a thousand of them should cost little, on a network's disk too."""


# -------------------------------------------------------------------------------------------- journals
def number(value: Any, least: float = -math.inf) -> float | int | None:
    """A finite number; None for anything else, as JSON has no NaN and a damaged journal may hold anything."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) and value >= least else None


def count(value: Any) -> int | None:
    """A whole number from 0 on; None for anything else."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if whole else None


def one_line(value: Any, most: int = 300) -> str | None:
    """One line of what may be long."""
    if value is None:
        return None
    line = " ".join(str(value).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


class _Journal(ABC):
    """An append-only file of records, read on from where it was left: what is 100 MB long is read once.

    A line that is not whole yet waits for its end. A file that was replaced or cut is read anew.
    """

    CHUNK = 4 * 2**20

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None
        self._forget()

    def _forget(self) -> None:
        self._at, self._rest, self.unread = 0, b"", 0
        self.written = 0.0
        """When the file was last written to."""
        self._reset()

    @abstractmethod
    def _reset(self) -> None:
        """Forget what was kept: the file is read from its start."""

    def _take(self, lines: list[bytes]) -> None:
        for line in lines:
            self._try(line)

    @abstractmethod
    def _keep(self, record: Told) -> bool | None:
        """False: it says nothing that is kept."""

    def read(self) -> None:
        """Take what was added. Raises OSError where the file cannot be read."""
        try:
            info = self.path.stat()
        except FileNotFoundError:
            if self._file is not None:
                self._file = None
                self._forget()
            return
        if (info.st_dev, info.st_ino) != self._file or info.st_size < self._at:
            self._file = (info.st_dev, info.st_ino)
            self._forget()
        self.written = info.st_mtime
        if info.st_size == self._at:
            return
        with open(self.path, "rb") as file:
            file.seek(self._at)
            while chunk := file.read(self.CHUNK):
                self._at += len(chunk)
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                self._take(lines)

    def _try(self, line: bytes) -> bool:
        """Keep a line's record; a line that holds none, or one that lacks what it must have, is counted."""
        if not line:
            return False
        try:
            for record in runs.parse_lines([line]):
                return self._keep(record) is not False
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            pass
        self.unread += 1
        return False


class RunJournal(_Journal):
    """What a run's journal says, by the rules of runs.read_journal: what a later attempt took over does not count."""

    STEP = b'{"kind":"step"'

    def _reset(self) -> None:
        self._starts: dict[int, int] = {}
        self._ends: list[Told] = []
        self._warnings: list[Told] = []
        self._last_step_line = b""
        self._stages: list[Told] = []
        self.attempt: Told = {}
        self.epochs: dict[int, Told] = {}
        """By the step at which they ended."""
        self.step: Told = {}
        self.first_step: Told = {}
        """The last attempt's first."""
        self.last_time: float | None = None
        """The last attempt's newest, by the clock of the machine that trains."""

    def _take(self, lines: list[bytes]) -> None:
        # nearly all lines are steps, of which the last one that counts is all that is asked for
        steps = []
        for line in lines:
            if not line.startswith(self.STEP):
                self._try(line)
                continue
            self._last_step_line = line
            if self.first_step:
                steps.append(line)
            else:
                self._try(line)
        for line in reversed(steps):
            if self._try(line):
                return

    def _keep(self, record: Told) -> bool:
        """Returns whether it counts."""
        kind = record["kind"]
        if count(record["attempt"]) is None or count(record.get("step", 0)) is None:
            raise ValueError("no place among the records")
        if kind == "attempt":
            self._begin(record)
        elif not self._counts(record):
            return False
        elif kind == "step":
            self.step = record
            if not self.first_step and record["attempt"] == self.number:
                self.first_step = record
        elif kind == "epoch":
            self._end_epoch(record)
        elif kind == "warning":
            self._warnings.append(record)
        elif kind == "stage":
            self._stages.append(record)
        elif kind == "end":
            self._ends.append(record)
        if (when := number(record.get("time"))) is not None:
            self.last_time = max(when, self.last_time or 0.0)
        return True

    def _begin(self, record: Told) -> None:
        this = record["attempt"]
        self._starts[this] = record["step"]
        if this >= self.number:
            self.attempt, self.first_step, self.last_time = record, {}, None
        self.epochs = {step: r for step, r in self.epochs.items() if self._counts(r)}
        self._warnings = [r for r in self._warnings if self._counts(r)]
        self._stages = [r for r in self._stages if self._counts(r)]
        self._ends = [r for r in self._ends if self._counts(r)]
        self.step = self.step if self.step and self._counts(self.step) else {}

    def _counts(self, record: Told) -> bool:
        later = (s for number, s in self._starts.items() if number > record["attempt"])
        return record.get("step", 0) <= min(later, default=math.inf)

    def _end_epoch(self, record: Told) -> None:
        step, epoch = record["step"], int(record["epoch"])
        before = self.epochs.get(step)
        if before and before["attempt"] > record["attempt"]:
            return  # weights that were taken over bring their epoch's record with them
        values = {k: number(v) for k, v in record.items() if k.startswith(("train_", "val_"))}
        last = next(iter(runs.parse_lines([self._last_step_line])), {})
        of_it = last.get("epoch") == epoch and last.get("attempt") == record["attempt"]
        left, to_come = number(record.get("seconds_left")), (self.epochs_in_all or 0) - epoch
        self.epochs[step] = {
            "attempt": record["attempt"],
            "step": step,
            "epoch": epoch,
            "best": bool(record.get("best")),
            "values": values,
            "warnings": [w for w in record.get("warnings") or () if isinstance(w, dict)],
            "measuring_s": max(0.0, record["time"] - last["time"]) if of_it else 0.0,
            # of a whole one, wherever in it the attempt began
            "whole_s": left / to_come if left is not None and to_come > 0 else None,
            **{k: number(record.get(k)) for k in ("time", "total_seconds", "seconds")},
        }

    @property
    def number(self) -> int:
        """Of the last attempt; 0 where there was none."""
        return max(self._starts, default=0)

    @property
    def begun(self) -> bool:
        return bool(self._starts)

    @property
    def end(self) -> Told | None:
        """How the run ended; None as long as its last attempt has not."""
        last = self._ends[-1] if self._ends else None
        return last if last and last["attempt"] >= self.number else None

    @property
    def stage(self) -> int:
        """The one under way, from 1."""
        return self._stages[-1]["stage"] if self._stages else 1

    @property
    def stages(self) -> list[int]:
        """The epochs of each, as they were asked for."""
        return [count(stage["epochs"]) or 0 for stage in self.attempt.get("stages") or ()]

    @property
    def epochs_in_all(self) -> int | None:
        """As many as were asked for, without those that earlier stages, ended by their patience, have left out."""
        if not self._stages:
            return count(self.attempt.get("epochs"))
        began = self._stages[-1]
        return began["epoch"] + sum(self.stages[began["stage"] - 1 :])

    def position(self) -> tuple[int, int]:
        """Epochs done, and updates done of the one under way."""
        last, step = self.last_epoch, self.step
        done, since = (last["epoch"], last["step"]) if last else (0, 0)
        if step and step["step"] > since:
            return done, count(step.get("epoch_step")) or step["step"] - since
        return done, max(0, (count(self.attempt.get("step")) or 0) - since)

    def clock(self, now: float) -> float:
        """What `now`, of this machine's clock, is by the clock of the machine that trains, which may be another."""
        if self.last_time is None:
            return now
        return self.last_time + max(0.0, now - self.written)

    @property
    def last_epoch(self) -> Told | None:
        return self.epochs[max(self.epochs)] if self.epochs else None

    @property
    def best_epoch(self) -> Told | None:
        chosen = [step for step, r in self.epochs.items() if r["best"]]
        return self.epochs[max(chosen)] if chosen else None

    def warnings(self) -> list[Told]:
        """Each of them once, as summary.json counts them; the newest last."""
        found: dict[tuple[str, str], Told] = {}
        said = [(w, e["time"]) for e in self.epochs.values() for w in e["warnings"]]
        said += [(w, number(w.get("time"))) for w in self._warnings]
        for warning, when in sorted(said, key=lambda pair: pair[1] or 0.0):
            key = (str(warning.get("name")), str(warning.get("message")))
            found.pop(key, None)
            found[key] = {"name": key[0], "message": one_line(key[1]), "time": when}
        return list(found.values())


class SearchJournal(_Journal):
    """What a search's journal says: its trials, and how it stands."""

    def _reset(self) -> None:
        self.attempt: Told = {}
        self.trials: dict[int, str] = {}
        """The state of each, by number; waiting until it has ended."""
        self.refused = self.ended_now = 0
        self.best: dict[str, float] = {}
        self.end: Told | None = None
        self.last_time: float | None = None

    @property
    def begun(self) -> bool:
        return bool(self.attempt)

    def _keep(self, record: Told) -> None:
        kind = record["kind"]
        if kind == "attempt":
            self.attempt, self.end, self.ended_now = record, None, 0
        elif kind == "proposed":
            self.trials[int(record["number"])] = "waiting"
        elif kind == "refused":
            self.refused += 1
        elif kind == "trial":
            self.trials[int(record["number"])] = str(record["state"])
            self.ended_now += 1
            best = {str(k): number(v) for k, v in (record.get("best") or {}).items()}
            self.best = {k: v for k, v in best.items() if v is not None}
        elif kind == "end":
            self.end = record
        self.last_time = number(record.get("time")) or self.last_time


def seconds_left(journal: RunJournal, now: float) -> float | None:
    """Until the run has done all its epochs: what its journal said at the last epoch's end, mended by the pace since.

    `now`: by the journal's clock. The further an epoch has come, the more its own pace counts, and the less that of the
    epochs before. What measuring on validation images takes is taken from the last epoch. None before there is anything
    to go by.
    """
    attempt, step, last = journal.attempt, journal.step, journal.last_epoch
    per_epoch, epochs = count(attempt.get("steps_per_epoch")), journal.epochs_in_all
    if not per_epoch or not epochs:
        return None
    done, within = journal.position()
    if done >= epochs:
        return 0.0
    since_step, since = count(attempt.get("step")) or 0, number(attempt.get("time")) or now
    first = journal.first_step
    if first and step["step"] > first["step"] and number(first.get("time")):
        since_step, since = first["step"], first["time"]  # what came before was start-up
    if last and last["time"] is not None and last["time"] > since:
        since_step, since = last["step"], last["time"]
    updates, when = step["step"] - since_step if step else 0, number(step.get("time")) or now
    pace = (when - since) / updates if updates > 0 else None
    whole = last["whole_s"] if last else None
    if whole is None:
        if pace is None:
            return None
        return max(0.0, pace * (per_epoch * (epochs - done) - within) - (now - when))
    if pace is None:  # nothing of the next epoch is known yet
        return max(0.0, whole * (epochs - done - within / per_epoch) - (now - since))
    measuring = min(last["measuring_s"], whole) if last else 0.0
    share = min(1.0, updates / per_epoch)
    pace = share * pace + (1 - share) * (whole - measuring) / per_epoch
    of_epoch = pace * max(0, per_epoch - within) + measuring
    rest = of_epoch + (epochs - done - 1) * (pace * per_epoch + measuring) - (now - when)
    return max(0.0, rest)


# ----------------------------------------------------------------------------------------------- locks
class _Lock:
    """Whether a living process holds a folder. Asking takes the lock for a moment where nobody has it, in which a run
    that starts would be refused: so it is asked once, and again only when somebody has written to it since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._free: tuple[int, int] | None = None
        self.taken = 0.0
        """When it was last taken, in seconds since 1970."""

    def held(self) -> bool | None:
        """None where it cannot be told (another account's file)."""
        try:
            info = self.path.stat()
        except OSError:
            return False
        self.taken = info.st_mtime
        if self._free == (info.st_ino, info.st_mtime_ns):
            return False
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(handle)
        # who takes it writes its name into it, maybe within the same tick of the clock
        if info.st_size and time.time() - info.st_mtime > 1.0:
            self._free = (info.st_ino, info.st_mtime_ns)
        return False

    def owner(self) -> int | None:
        """The process that holds it, or did last."""
        with suppress(OSError, ValueError):
            return int(self.path.read_text())
        return None


def _state(held: bool | None, lock: _Lock, journal: RunJournal | SearchJournal) -> str:
    if held is None:  # who writes lives
        held = journal.end is None and time.time() - journal.written < FRESH_S
    if held:
        # both are times of files: whose clock they are of, they are of one
        if not journal.begun or lock.taken > journal.written:
            return "starting"
        return "finishing" if journal.end else "running"
    if journal.end:
        status = str(journal.end.get("status"))
        return status if status in ENDED else "failed"
    return "interrupted" if journal.begun else "not_started"


# -------------------------------------------------------------------------------- runs, searches, paths
class Watched(ABC):
    """A folder below a runs folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = _Lock(folder / ".lock")
        self.state = "not_started"
        self.changed = 0.0
        """When it last said anything."""
        self.trouble: str | None = None
        """Why it could not be looked at."""
        self.looked = -math.inf
        """When it last was, by time.monotonic."""

    @abstractmethod
    def look(self) -> None:
        """Read on in its files. Raises OSError where one cannot be read."""

    @abstractmethod
    def about(self, now: float) -> Told:
        """What monitor_schema.json says of it. `now`: seconds since 1970."""

    def order(self) -> tuple[int, float, str]:
        """What is under way comes first and keeps its place; then what broke off, then what has ended, the newest first."""
        group = 0 if self.state in ACTIVE else 2 if self.state in ENDED else 1
        return (group, -(self.changed if group else self.lock.taken), self.folder.name)


class Run(Watched):
    TAIL = 2**16

    def __init__(self, folder: Path, search: str | None = None) -> None:
        super().__init__(folder)
        self.search = search
        self.journal = RunJournal(folder / "journal.jsonl")
        self._seen: tuple[int, float] | None = None
        self._over: tuple[str, float] | None = None
        self._settings: tuple[float, Told] = (-1.0, {})

    def look(self) -> None:
        """The state; of a run that is over the end of its journal is enough."""
        held = self.lock.held()
        if held is False and (over := self._ended()) is not None:
            self.state, self.changed = over
            return
        self.journal.read()
        self.state = _state(held, self.lock, self.journal)
        self.changed = self.journal.last_time or self.lock.taken

    def _ended(self) -> tuple[str, float] | None:
        """How and when it ended, by its last lines; None where they do not show that it did."""
        path = self.journal.path
        try:
            info = path.stat()
        except OSError:
            return None
        if self._seen == (info.st_size, info.st_mtime):
            return self._over
        with open(path, "rb") as file:
            file.seek(max(0, info.st_size - self.TAIL))
            *lines, _ = file.read().split(b"\n")
        records = runs.parse_lines(lines)
        last = max((number(r.get("attempt")) or 0 for r in records), default=0)
        over = None
        for record in records:
            if record["kind"] == "attempt" and record.get("attempt") == last:
                over = None
            elif record["kind"] == "end" and record.get("attempt") == last:
                status = record.get("status")
                when = number(record.get("time")) or info.st_mtime
                over = (status if status in ENDED else "failed", when)
        self._seen, self._over = (info.st_size, info.st_mtime), over
        return over

    def settings(self) -> Told:
        """Of config.yaml and run.json, what is of use here; read again when they change."""
        path = self.folder / "run.json"
        with suppress(OSError):
            changed = max(path.stat().st_mtime, (self.folder / "config.yaml").stat().st_mtime)
            if changed != self._settings[0]:
                self._settings = (changed, _settings(self.folder))
        return self._settings[1]

    def about(self, now: float) -> Told:
        if self.state not in ACTIVE:  # its end was enough so far
            self.journal.read()
        j, attempt, step = self.journal, self.journal.attempt, self.journal.step
        last, best = j.last_epoch, j.best_epoch
        monitor = one_line(attempt.get("monitor"), 60)
        active = self.state in ACTIVE
        now = j.clock(now)
        done, within = j.position()
        epochs, per_epoch = j.epochs_in_all, count(attempt.get("steps_per_epoch"))
        total = epochs * per_epoch if epochs and per_epoch else None
        # the journal's own number counts those, too, that a guarded weight has taken back
        updates = done * per_epoch + within if per_epoch else step.get("step", 0)
        epoch = done + 1
        if done and not within and not (active and (epochs is None or done < epochs)):
            epoch, within = done, per_epoch or 0
        value = last["values"].get(monitor) if last and monitor else None
        warnings = j.warnings()
        device = one_line(attempt.get("device"), 40)
        return {
            "name": self.folder.name,
            "path": str(self.folder),
            "search": self.search,
            "state": self.state,
            "reason": one_line((j.end or {}).get("reason")) or None,
            "attempt": j.number or None,
            "started": number(attempt.get("time")),
            "ended": j.last_time if self.state in ENDED else None,
            "last_record": j.last_time,
            "silent": self._silent(now),
            "epoch": epoch if j.begun else None,
            "epochs": epochs,
            "epoch_step": within if j.begun else None,
            "steps_per_epoch": per_epoch,
            "step": updates if j.begun else None,
            "total_steps": total,
            "progress": min(1.0, updates / total) if total else None,
            "stage": j.stage if j.stages else None,
            "stages": len(j.stages) or None,
            "train_loss": number(step.get("loss")),
            "val_loss": last["values"].get("val_loss") if last else None,
            "monitor": monitor,
            "monitor_value": value,
            "best_value": best["values"].get(monitor) if best and monitor else None,
            "best_epoch": best["epoch"] if best else None,
            "lr": number(step.get("lr")),
            "images_per_s": number(step.get("images_per_s"), 0.0),
            "elapsed_s": self._elapsed(now if active else j.last_time),
            "left_s": seconds_left(j, now) if self.state == "running" else None,
            "model": one_line(self.settings().get("model"), 80),
            "device": device,
            "workers": count(attempt.get("world_size")),
            "host": one_line(attempt.get("host"), 80),
            "pid": count(attempt.get("pid")),
            "driver_pid": self.lock.owner() if active else None,
            "warnings": {"count": len(warnings), "newest": warnings[-1] if warnings else None},
            "unread_lines": j.unread,
        }

    def _elapsed(self, upto: float | None) -> float | None:
        """Training time, over all attempts. `upto`: by the journal's clock."""
        j, last = self.journal, self.journal.last_epoch
        began = number(j.attempt.get("time"))
        if began is None or upto is None:
            return None
        if not last or last["total_seconds"] is None or last["time"] is None:
            return max(0.0, upto - began)
        return max(0.0, last["total_seconds"] + upto - max(last["time"], began))

    def _silent(self, now: float) -> bool:
        """Whether it has said nothing for much longer than it usually does. `now`: by the journal's clock."""
        j = self.journal
        if self.state != "running" or j.last_time is None:
            return False
        last, step = j.last_epoch, j.step
        if last:
            pace, usual = last["seconds"] or 0.0, 2 * last["measuring_s"]
        else:  # the first epoch may well measure for as long as it has trained
            began = number(j.attempt.get("time")) or 0.0
            pace = (number(step.get("time")) or began) - began
            usual = 2 * pace
        lines = max(1, (count(j.attempt.get("steps_per_epoch")) or 1) // 10)
        return now - j.last_time > max(120.0 if step else 300.0, usual, 5 * pace / lines)


def _settings(folder: Path) -> Told:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: Told = {}
    with suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        config = yaml.load((folder / "config.yaml").read_text(), loader)
        found["model"] = (config.get("model") or {}).get("name")
        cache = config.get("cache") or {}
        found["max_gb"], found["local_dir"] = number(cache.get("max_gb")), cache.get("local_dir")
    with suppress(OSError, ValueError, TypeError, KeyError):
        # the config's cache.dir may be relative to a folder that is not ours
        found["cache"] = str(Path(runs.read_json(folder / "run.json")["dataset"]["dir"]).parent)
    return found


class Search(Watched):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.journal = SearchJournal(folder / "journal.jsonl")
        self.trials: dict[int, Run] = {}
        self._about: Told | None = None

    def look(self) -> None:
        self.journal.read()
        self.state = _state(self.lock.held(), self.lock, self.journal)
        self.changed = self.journal.last_time or self.lock.taken
        if self.state not in ACTIVE:
            self.trials = {}
            return
        waiting = [n for n, state in self.journal.trials.items() if state == "waiting"]
        kept = {n: self.trials.get(n) or self._trial(n) for n in waiting}
        self.trials = {n: t for n, t in kept.items() if t.folder.exists()}
        for trial in self.trials.values():
            trial.look()
            # a trial on another node holds its lock there
            fresh = time.time() - trial.journal.written < FRESH_S
            if trial.state == "interrupted" and fresh and _elsewhere(trial.journal):
                trial.state = "running"

    def _trial(self, n: int) -> Run:
        return Run(self.folder / "trials" / f"trial-{n:04d}", search=self.folder.name)

    def running(self) -> list[Run]:
        return [t for t in self.trials.values() if t.state in ACTIVE]

    def about(self, now: float) -> Told:
        j, states = self.journal, list(self.journal.trials.values())
        done = [s for s in states if s != "waiting"]
        planned = count(j.attempt.get("num_samples"))
        began = number(j.attempt.get("time"))
        active = self.state in ACTIVE
        left = None
        if self.state == "running" and began and j.ended_now and planned:
            left = (now - began) / j.ended_now * max(0, planned - len(done))
        known = self._known()
        upto = now if active else (j.last_time or now)
        return {
            "name": self.folder.name,
            "path": str(self.folder),
            "search": known.get("search"),
            "state": self.state,
            "reason": one_line((j.end or {}).get("reason")) or None,
            "attempt": count(j.attempt.get("attempt")),
            "started": began,
            "ended": j.last_time if self.state in ENDED else None,
            "last_record": j.last_time,
            "trials": {
                "planned": planned,
                "done": len(done),
                "completed": done.count("completed"),
                "stopped_early": done.count("stopped early"),
                "failed": done.count("failed"),
                "running": len(self.running()),
                "refused": j.refused,
            },
            "objectives": known.get("objectives", []),
            "best": j.best,
            "elapsed_s": max(0.0, upto - began) if began else None,
            "left_s": left,
            "driver_pid": self.lock.owner() if active else None,
            "unread_lines": j.unread,
        }

    def _known(self) -> Told:
        """Of search.json, which never changes."""
        if self._about is None:
            with suppress(OSError, ValueError, TypeError, KeyError):
                found = runs.read_json(self.folder / "search.json")
                objectives = [
                    {"name": str(o["name"]), "higher_is_better": bool(o["higher_is_better"])}
                    for o in found["objectives"]
                ]
                self._about = {"search": one_line(found["search"], 80), "objectives": objectives}
        return self._about or {}


def _elsewhere(journal: RunJournal) -> bool:
    host = journal.attempt.get("host")
    return bool(host) and host != socket.gethostname()


class Distillation(Watched):
    """A distillation's folder: the steps that jobs/distil.py takes, of which each training is a run of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._read = 0
        self.steps: list[Told] = []

    def look(self) -> None:
        path = self.folder / "steps.json"
        with suppress(OSError):
            info = path.stat()
            self.changed = info.st_mtime
            if info.st_mtime_ns != self._read:
                self.steps, self._read = self._steps(path), info.st_mtime_ns
        states = [s["status"] for s in self.steps]
        if self.lock.held():
            begun = self.changed >= self.lock.taken
            self.state = "running" if "running" in states or begun else "starting"
        elif "running" in states:
            self.state = "interrupted"
        else:
            ended = [s for s in ("failed", "stopped") if s in states]
            self.state = ended[0] if ended else "finished" if states else "not_started"

    def _steps(self, path: Path) -> list[Told]:
        return [
            {
                "name": str(name),
                "status": str(step["status"]),
                "seconds": number(step.get("seconds"), 0.0),
            }
            for name, step in runs.read_json(path).items()
        ]

    def about(self, now: float) -> Told:
        steps = [dict(step) for step in self.steps]
        for step in steps:  # what is written of a step that runs is what it took before
            if step["status"] == "running" and self.state in ACTIVE:
                step["seconds"] = (step["seconds"] or 0.0) + max(0.0, now - self.changed)
        seconds = [s["seconds"] for s in steps if s["seconds"] is not None]
        return {
            "name": self.folder.name,
            "path": str(self.folder),
            "state": self.state,
            "steps": steps,
            "elapsed_s": sum(seconds) if seconds else None,
            "last_record": self.changed or None,
            "driver_pid": self.lock.owner() if self.state in ACTIVE else None,
        }


class RunsFolder:
    """What is below one --runs folder; or a run, a search or a path that was named itself."""

    def __init__(self, given: str) -> None:
        """`given`: a folder, or the URI of one, of which the machine that drives its runs keeps a copy. Raises UserError
        for what cannot be read."""
        self.given, self.folder = given, local_folder(given)
        self.watched: dict[str, Watched] = {}
        self._classified: dict[str, int] = {}
        self.began = time.time()
        try:
            with os.scandir(self.folder):
                pass
        except FileNotFoundError:
            pass  # the first run makes it
        except OSError as error:
            raise UserError(
                f"--runs must be a folder that can be read, got {str(self.folder)!r} ({error.strerror}); give runs.dir of "
                "the runs to watch"
            ) from None

    def look(self) -> None:
        """Raises OSError where the folder cannot be read."""
        remote = is_uri(self.given) and not self.given.startswith("file:")
        if remote and not self.folder.exists():
            raise OSError(
                errno.ENOENT,
                f"{self.given} has no copy here: watch it where its runs are driven, as on a cluster's head",
            )
        found: dict[str, os.stat_result] = {}
        if any((self.folder / name).exists() for name in ("journal.jsonl", "steps.json")):
            found["."] = self.folder.stat()
        else:
            with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
                for entry in entries:
                    with suppress(OSError):
                        if not entry.name.startswith(".") and entry.is_dir():
                            found[entry.name] = entry.stat()
        now = time.monotonic()
        for name, info in found.items():
            # what a folder is shows by the files in it, and these come one by one
            if changed := self._classified.get(name) != info.st_mtime_ns:
                self._classified[name] = info.st_mtime_ns
                folder = self.folder / name
                kind = _kind(folder)
                if kind is None:
                    self.watched.pop(name, None)
                elif type(self.watched.get(name)) is not kind:
                    self.watched[name] = kind(folder)
            one = self.watched.get(name)
            if one and (changed or one.state in ACTIVE or now - one.looked >= IDLE_EVERY_S):
                self._look_at(one, now)
        for name in [n for n in self._classified if n not in found]:
            del self._classified[name]
            self.watched.pop(name, None)

    def _look_at(self, one: Watched, now: float) -> None:
        one.looked, one.trouble = now, None
        try:
            one.look()
        except OSError:
            pass  # removed in this moment
        except Exception as error:  # a journal may hold anything
            one.trouble = f"{type(error).__name__}: {one_line(error, 160)}"

    def chosen(self, now: float, everything: bool) -> Iterator[Watched]:
        """What is to be shown: what is under way, what went wrong within a day, and what ended while it was watched;
        `everything`: or within a day."""

        for one in self.watched.values():
            recent = everything or one.state in ("interrupted", "failed", "not_started")
            since = now - DAY_S if recent else self.began
            if one.trouble or one.state in ACTIVE or one.changed > since:
                yield one

    def counts(self) -> dict[str, int]:
        """Of all that is there, how many are in each state."""
        states = [one.state for one in self.watched.values()]
        return {s: states.count(s) for s in (*ACTIVE, "interrupted", *ENDED, "not_started")}


def _kind(folder: Path) -> type[Run] | type[Search] | type[Distillation] | None:
    with suppress(OSError):
        names = set(os.listdir(folder))
        if "search.json" in names:
            return Search
        if "steps.json" in names:
            return Distillation
        if names & {"journal.jsonl", "run.json", ".lock"} and "manifest.json" not in names:
            return Run
    return None
