"""Aim, filled from journals by a process of its own.

Aim in the driver's process could slow it or take it down: its migrations switch off every existing logger, it
prints, it catches Ctrl-C at exit, and a broken RocksDB aborts. So the driver starts `python -m potstill.tracking`,
which tails the journals of one run, or of a search and all its trials, at low priority; the training hears of it
through `warn` alone. That child is the only writer of these Aim runs, and goes on to close them when the driver dies.
What Aim holds is the journal and nothing else: at each new attempt, and by `fill`, a run is emptied and told again
under the same hash.

The child reads commands from stdin, a JSON object a line: {"follow": folder}, {"over": folder}; the end of stdin says
that all are over. It answers on stdout: {"run": hash, "of": folder}, {"warn": text, "of": folder}, and at last
{"done": folder} or {"failed": text, "of": folder}.

Names in Aim. Per epoch, as in training_history.json, with context {"subset": "train" | "val"}: loss, top1_acc,
top5_acc, macro_f1, the metrics that were chosen, lr, images_per_s, seconds, loss/<term>, weight/<term>, weighted_loss/<term>. Per
update: batch_loss, batch_lr, batch_images_per_s. Then warnings and course (texts: stages, levels), predictions (images), heatmaps (an image; of a
patch model), confusion_matrix (figure; not of a multi-label task); attributes config, dataset, git, teacher_run, teacher,
classes, versions, status, summary. A trial of a search has no pictures, the tag search:<name> and the attribute
search: id, number, point, state (running | completed | stopped early | failed | interrupted).

A search is a run of the experiment "search", with the same tag. Per trial that ends, at the step that counts them:
objective/<name>, best/<name>, trials/<state>; at the end the figures and the plots of its folder; attributes config,
git, versions, status, and search: id, state, objectives, settings.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import runs
from potstill.console import said_of
from potstill.errors import UserError
from potstill.metric_names import further, plain

if TYPE_CHECKING:
    from potstill.predictions import Predictions

Record = dict[str, Any]
POLL_S = 1.0
LOCK_WAIT_S = 60.0
INDEX_WAIT_S = 20.0
EXAMPLES = {"mistake": 8, "correct": 4}
# of a search and its trials, by the status of their journals' ends; without an end: interrupted
STATES = {"finished": "completed", "stopped_early": "stopped early", "failed": "failed"}


# ------------------------------------------------------------------------------------ the driver's side
class AimWriter:
    """One process that writes the Aim runs of several folders: of a search and its trials.

    `repo` is the folder of `.aim`. Nothing here raises or, but for `close`, waits; `warn` is called (from another thread) with one line for each
    thing that went wrong.
    """

    def __init__(self, repo: Path, warn: Callable[[str], None]) -> None:
        self._repo, self._warn = repo, warn
        self._folders: dict[str, Path] = {}  # by the name that the child has for it
        self._hashes: dict[str, str] = {}
        self._open: set[str] = set()  # neither told whole nor given up
        self._child: subprocess.Popen[str] | None = None
        self._ended = ""  # why there is no child, or none any more
        if importlib.util.find_spec("aim") is None:
            self._ended = "Aim is not installed (it has wheels for Python up to 3.12)"
            return
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (read after the child has ended)
        source_root = str(Path(__file__).resolve().parents[1])
        paths = [source_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "potstill.tracking", str(repo.absolute())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C stops the training; Aim is then told how it ended
            )
        except OSError as error:
            self._ended = str(error)
            return
        self._listener = threading.Thread(target=self._listen, name="potstill-aim", daemon=True)
        self._listener.start()

    def follow(self, run_dir: Path) -> None:
        """From now on tell Aim what stands in this folder's journal; the folder may be made later.

        After `over`, it goes on in the same Aim run.
        """
        first = not self._folders
        name = str(run_dir.absolute())
        self._folders[name] = run_dir
        self._open.add(name)
        self._send(follow=name)
        if self._child is None and first:  # what else comes is said when it closes
            self._give_up(self._ended)

    def over(self, run_dir: Path) -> None:
        """The folder's journal is complete and its summary.json stands: tell Aim the rest, close and index its run."""
        self._send(over=str(run_dir.absolute()))

    def close(self, timeout_s: float = 60.0) -> dict[Path, str]:
        """All is over: let Aim have what is left. Waits at most `timeout_s`.

        Returns the hashes of the Aim runs that are whole, by folder; for each other one, `warn` has said why.
        """
        if self._child is not None:
            assert self._child.stdin is not None
            with suppress(OSError, ValueError):  # it may have ended, or been closed, already
                self._child.stdin.close()
            self._listener.join(timeout_s)
            if self._listener.is_alive():
                self._ended = f"it was not done within {timeout_s:g} s"
                self._child.kill()
                self._listener.join(5)
            else:
                self._stderr.close()
        self._give_up(self._ended)
        return {folder: self._hashes[n] for n, folder in self._folders.items() if n in self._hashes}

    def _send(self, **command: str) -> None:
        if self._child is not None:
            assert self._child.stdin is not None
            with suppress(OSError, ValueError):  # the child has ended: the listener says so
                print(json.dumps(command), file=self._child.stdin, flush=True)

    def _listen(self) -> None:
        child = self._child
        assert child is not None
        assert child.stdout is not None
        for line in child.stdout:
            message = json.loads(line)
            name = message.get("of", message.get("done"))
            if "warn" in message:
                which = f"{self._folders[name].name}: " if len(self._folders) > 1 else ""
                self._warn(f"Aim: {which}{message['warn']}")
            if "run" in message:
                self._hashes[name] = message["run"]
                self._open.add(name)  # followed again while it was being closed
            if "failed" in message:
                self._give_up(message["failed"], {name})
            if "done" in message:
                self._open.discard(name)
        status = child.wait()
        self._stderr.seek(0)
        last = (self._stderr.read().strip().splitlines() or ["no message"])[-1]
        self._ended = self._ended or f"its process ended with status {status}: {last}"
        self._give_up(self._ended)

    def _give_up(self, reason: str, names: set[str] | None = None) -> None:
        """Say once that these, or all that are open, are not in Aim, and how to put them there."""
        lost = set(self._open) if names is None else names
        if not lost:
            return
        self._open -= lost
        for name in lost:
            self._hashes.pop(name, None)
        first = min(self._folders[name] for name in lost)
        which = "this run" if len(lost) == 1 else f"{len(lost)} runs, {first} the first of them"
        how = (
            f'python -c "from potstill.tracking import *; fill(Path({str(first)!r}), Path({str(self._repo)!r}))"'
            if (first / _SearchRun.ABOUT).exists()
            else f"jobs/report.py from_run={first} tracking=aim tracking.repo={self._repo}"
        )
        self._warn(
            f"Aim does not have all of {which} ({reason}). The training is not affected; "
            f"fill {'it' if len(lost) == 1 else 'each'} in later with: uv run {how}"
        )


class AimFollower:
    """Keeps an Aim run up with the journal of `run_dir` while training goes on. `repo` is the folder of `.aim`.

    Start it once the run's folder holds config.yaml and run.json. Nothing here raises or waits for Aim; `warn` is
    called (from another thread) with one line for each thing that went wrong.
    """

    def __init__(self, run_dir: Path, repo: Path, warn: Callable[[str], None]) -> None:
        self._run_dir, self._writer = run_dir, AimWriter(repo, warn)
        self._writer.follow(run_dir)

    def close(self, timeout_s: float = 60.0) -> str | None:
        """Let Aim have the journal's rest, the pictures and the summary; then close and index its run.

        Call it when summary.json stands. Waits at most `timeout_s`. Returns the Aim run's hash, or None (and `warn`
        has said why).
        """
        return self._writer.close(timeout_s).get(self._run_dir)


def fill(
    run_dir: Path, repo: Path, warn: Callable[[str], None] | None = None, timeout_s: float = 600.0
) -> str:
    """Make the Aim run of a run from its journal; again under the same hash where there is one.

    Returns the hash. Raises UserError if Aim is missing, or its repository is locked or broken.
    """
    said: list[str] = []
    found = AimFollower(run_dir, repo, said.append).close(timeout_s)
    if found is None:
        raise UserError(said[-1])
    if warn:
        for line in said:
            warn(line)
    return found


# ------------------------------------------------------------------------------------- the child's side
class _Repository:
    """The Aim repository and its index, opened once for all runs of this process."""

    def __init__(self, folder: Path) -> None:
        from aim.sdk.repo import Repo

        folder.mkdir(parents=True, exist_ok=True)
        self.aim: Any = Repo(str(folder), init=not (folder / ".aim" / "VERSION").exists())
        self.folder = folder
        self.chunks_dir = folder / ".aim" / "meta" / "chunks"

    def holds(self, run_hash: str) -> bool:
        return (self.chunks_dir / run_hash).is_dir() and bool(
            self.aim.structured_db.find_run(run_hash)
        )

    def new_run(self, created: float) -> str:
        """The hash of a new run that was created then; aim.Run dates it now, and a journal may be filled in later."""
        run_hash = uuid.uuid4().hex[:24]
        self.aim.request_tree("meta", run_hash, read_only=False)
        at = datetime.fromtimestamp(created, UTC).replace(tzinfo=None)
        self.aim.request_props(run_hash, read_only=False, created_at=at)
        return run_hash

    def open(self, run_hash: str) -> Any:
        from aim.sdk.run import Run

        # it remembers for half a second which runs there are, and would not know one that was made since
        type(self.aim)._all_run_hashes.cache_clear()
        return Run(
            run_hash,
            repo=self.aim,
            force_resume=True,  # we hold the lock; Aim's own outlives a killed process
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )

    def index(self, run_hashes: set[str]) -> set[str]:
        """Let a query by any process find what was tracked so far. Returns those of which it cannot now.

        As RepoIndexManager.index, which would open the index for each, and pass over a busy one in silence.
        """
        from aim.sdk.index_manager import RepoIndexManager
        from aimrocks.errors import Corruption, RocksIOError

        left = set(run_hashes)
        # of a manager it takes chunks_dir alone, and to make one costs a thread and one of the user's 128 inotify
        # instances, which it keeps
        manager: Any = self
        with suppress(RocksIOError):  # the index is one writer's at a time: maybe of `aim up`
            index = self.aim._get_index_tree("meta", 0).view(())
            for run_hash in run_hashes:
                with suppress(RocksIOError, Corruption):  # one run's
                    checksum = RepoIndexManager._get_run_checksum(manager, run_hash)
                    chunk = self.aim.request_tree(
                        "meta", run_hash, read_only=True, skip_read_optimization=True
                    )
                    chunk.subtree(("meta", "chunks", run_hash)).finalize(index=index)
                    index["index_cache", run_hash] = checksum
                    left.remove(run_hash)
        return left


class _AimRun:
    """One Aim run, open for writing. Every value carries the time of its record, not the time of its telling."""

    ABOUT: str  # the file that says what the folder is

    def __init__(self, run_dir: Path, repository: _Repository) -> None:
        import yaml

        self.run_dir, self.repository = run_dir, repository
        self.about = runs.read_json(run_dir / self.ABOUT)
        self.config = yaml.safe_load((run_dir / "config.yaml").read_text())
        self.last_time: float = self.about["created"]
        self._state = "running"
        self.hash = self._known_hash() or self._new_hash()
        self.run: Any = repository.open(self.hash)

    def _known_hash(self) -> str | None:
        try:
            known = runs.read_json(self.run_dir / "aim.json")["run"]
        except (OSError, ValueError, KeyError):
            return None
        return known if self.repository.holds(known) else None

    def _new_hash(self) -> str:
        run_hash = self.repository.new_run(self.about["created"])
        known = {"run": run_hash, "repo": str(self.repository.folder)}
        runs.write_json(self.run_dir / "aim.json", known)
        return run_hash

    def describe(self) -> None:
        """What is known before the first record."""
        about, run = self.about, self.run
        run.name = about["name"]
        run["config"] = self.config
        run["git"] = {"commit": about["git_commit"], "dirty": about["git_dirty"]}
        run["versions"] = about["versions"]
        run["run_dir"] = str(self.run_dir)
        run["status"] = "running"

    def _tag(self, tags: list[str]) -> None:
        for tag in set(tags) - set(self.run.tags):
            self.run.add_tag(tag)

    def tell_again(self, records: list[Record]) -> None:
        """Empty the run of all that was tracked, and track `records`."""
        for key in ("traces", "typed_traces"):
            del self.run.meta_run_tree[key]
        for tree in self.run.series_run_trees.values():
            del tree[...]
        self.run._tracker.sequence_infos.clear()
        for record in records:
            self.track(record)

    def track(self, record: Record) -> None:
        self.last_time = record["time"]
        if record["kind"] == "end":
            self.run["status"] = {key: record.get(key) for key in ("status", "reason", "best")}

    def complete(self, records: list[Record], warn: Callable[[str], None]) -> None:
        """Add what is known at the end alone."""
        ends = [r for r in records if r["kind"] == "end"]
        if not ends:
            self.run["status"] = {"status": "interrupted", "reason": None, "best": None}
        end = ends[-1] if ends else {"status": ""}
        self._state = STATES.get(end["status"], "interrupted")
        if end["status"] == "stopped_early" and end.get("by") != "scheduler":
            self._state = "completed"  # by its own patience

    def _put(self, record: Record, name: str, value: Any, context: dict[str, str]) -> None:
        self.run._tracker._track(
            value, record["time"], name, record["step"], record.get("epoch"), context=context
        )

    def _metric(self, record: Record, name: str, value: float, subset: str) -> None:
        self._put(record, name, float(value), {"subset": subset})

    def close(self) -> None:
        """Give back the files and threads that an open run holds."""
        if self.run is None:
            return
        run, self.run = self.run, None
        run.close()
        tree = self.repository.aim.request_tree("meta", self.hash, read_only=False)
        # Run.close() sets it to now
        tree.subtree(("meta", "chunks", self.hash))["end_time"] = self.last_time


class _TrainingRun(_AimRun):
    """The run of one training, which may be a trial of a search."""

    ABOUT = "run.json"

    def describe(self) -> None:
        super().describe()
        about, run, search = self.about, self.run, self.about.get("search")
        run.experiment = about["experiment"] or "default"
        self._tag(about["tags"] + ([f"search:{search['id']}"] if search else []))
        run["dataset"] = about["dataset"]
        run["teacher_run"] = about["teacher_run"]
        run["teacher"] = _lineage(about)
        run["init_from"] = about["init_from"]
        run["classes"] = len(about["classes"])
        if search:
            which = {key: search[key] for key in ("id", "number", "point")}
            run["search"] = {**which, "state": self._state}

    def track(self, record: Record) -> None:
        from aim.sdk.objects.text import Text

        super().track(record)
        kind = record["kind"]
        if kind == "step":
            for key in ("loss", "lr", "images_per_s"):
                self._metric(record, f"batch_{key}", record[key], "train")
        elif kind == "epoch":
            for subset in ("train", "val"):
                for key in ("loss", "top1_acc", "top5_acc", "macro_f1"):
                    if f"{subset}_{key}" in record:
                        self._metric(record, key, record[f"{subset}_{key}"], subset)
            for key in further(record):
                self._metric(record, plain(key), record[key], "val")
            for key in ("lr", "images_per_s", "seconds"):
                self._metric(record, key, record[key], "train")
            for term, values in record.get("terms", {}).items():
                self._metric(record, f"loss/{term}", values["loss"], "train")
                self._metric(record, f"weighted_loss/{term}", values["weighted"], "train")
                if "weight" in values:
                    self._metric(record, f"weight/{term}", values["weight"], "train")
            self._text(record, record.get("warnings", []))
        elif kind == "warning":
            self._text(record, [record])
        elif kind in ("level", "stage"):
            self._put(record, "course", Text(said_of(record)), {"kind": kind})

    def _text(self, record: Record, warnings: list[dict[str, str]]) -> None:
        from aim.sdk.objects.text import Text

        if warnings:
            lines = "\n".join(f"{w['name']}: {w['message']}" for w in warnings)
            self._put(record, "warnings", Text(lines), {"kind": record["kind"]})

    def complete(self, records: list[Record], warn: Callable[[str], None]) -> None:
        """The summary; then images with predictions and the confusion matrix, which take seconds: not of a trial."""
        from potstill.predictions import confusion_counts
        from potstill.report import read_predictions

        super().complete(records, warn)
        summary = self.run_dir / "summary.json"
        if summary.exists():
            self.run["summary"] = runs.read_json(summary)
        if self.about.get("search"):
            self.run["search", "state"] = self._state
            return
        if not any(r["kind"] == "epoch" for r in records):
            return
        try:
            meta, found = read_predictions(self.run_dir)
        except UserError as error:
            warn(f"no confusion matrix and no images: {error}")
            return
        at = {"step": meta["step"], "epoch": meta.get("epoch"), "time": self.last_time}
        classes = self.about["classes"]
        if found.targets is None:
            counts = confusion_counts(found, len(classes))
            self._put(at, "confusion_matrix", _heatmap(counts, classes), {"subset": "val"})
        try:
            for kind, images in _examples(self.about, found).items():
                if images:
                    self._put(at, "predictions", images, {"subset": "val", "kind": kind})
        except (OSError, ValueError, KeyError) as error:
            warn(f"no images with predictions, because the cache cannot be read ({error})")
        self._heatmaps(at)

    def _heatmaps(self, at: Record) -> None:
        """What report.py has drawn, as it stands in report.html."""
        from aim.sdk.objects.image import Image

        path = self.run_dir / "plots" / "heatmaps.png"
        if path.exists():
            image = Image(str(path), caption="patch logits of validation images")
            self._put(at, "heatmaps", [image], {"subset": "val"})


class _SearchRun(_AimRun):
    """The run of a search: how its trials ended, one after the other."""

    ABOUT = "search.json"

    def __init__(self, run_dir: Path, repository: _Repository) -> None:
        super().__init__(run_dir, repository)
        self._ended: dict[int, str] = {}  # the states of the trials that have ended, by number

    def describe(self) -> None:
        super().describe()
        about, run = self.about, self.run
        run.experiment = "search"
        self._tag([*about["tags"], f"search:{about['name']}"])
        what = {key: about[key] for key in ("objectives", "settings")}
        run["search"] = {"id": about["name"], **what, "state": self._state}

    def tell_again(self, records: list[Record]) -> None:
        self._ended.clear()
        super().tell_again(records)

    def track(self, record: Record) -> None:
        super().track(record)
        if record["kind"] != "trial":
            return
        for title, values in (("objective", record["values"]), ("best", record["best"])):
            for name, value in (values or {}).items():
                if value is not None:
                    self._metric(record, f"{title}/{name}", value, "val")
        self._ended[record["number"]] = record["state"]
        for state, count in Counter(self._ended.values()).items():
            self._metric(record, f"trials/{state}", count, "val")

    def complete(self, records: list[Record], warn: Callable[[str], None]) -> None:
        super().complete(records, warn)
        self.run["search", "state"] = self._state
        at = {"step": max((r["step"] for r in records), default=0), "time": self.last_time}
        try:
            self._drawings(at)
        except (OSError, ValueError, KeyError) as error:
            warn(f"not all figures of the search, because one cannot be read ({error})")

    def _drawings(self, at: Record) -> None:
        """A figure and an image may have one name: Aim keeps them apart by their context."""
        from aim.sdk.objects.image import Image

        for path in sorted((self.run_dir / "plots").glob("*.png")):
            image = Image(str(path), caption=path.stem)
            self._put(at, path.stem, [image], {"kind": "image"})
        path = self.run_dir / "figures.json"
        for name, plotly in (runs.read_json(path) if path.exists() else {}).items():
            if plotly:
                self._put(at, name, _figure(plotly), {"kind": "figure"})


def _lineage(about: Record) -> Record:
    """Whom a run has learned from: `run.teacher.run == "<name>"` finds its students."""
    soft = about.get("soft_labels")
    of = about.get("teacher_run") or (about.get("teachers") or {}).get("teacher")
    known: Record = {}
    with suppress(OSError, ValueError):
        known = runs.read_json(Path(of) / "aim.json") if of else {}
    several = {name: Path(run).name for name, run in (about.get("teachers") or {}).items() if run}
    names = [*several.values(), Path(soft).name if soft else None, about["name"]]
    return {
        "run": Path(of).name if of else None,
        "dir": of,
        "aim_run": known.get("run"),
        "soft_labels": soft,
        "several": several,
        "lineage": " -> ".join(name for name in names if name),
    }


def _heatmap(counts: Any, classes: list[str], max_classes: int = 100) -> Any:
    """An aim.Figure: the confusion matrix, or for many classes its largest confusions."""
    import numpy as np

    from potstill.predictions import most_confused

    layout: dict[str, Any] = {"margin": {"l": 120, "b": 120, "t": 40, "r": 20}}
    if len(classes) <= max_classes:
        counts = counts.toarray()
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        trace = {
            "type": "heatmap",
            "x": classes,
            "y": classes,
            "z": share.round(4).tolist(),
            "customdata": counts.tolist(),
            "colorscale": [[0, "#f7fbff"], [0.5, "#6baed6"], [1, "#08306b"]],
            "zmin": 0,
            "zmax": 1,
            "hovertemplate": "true %{y}<br>predicted %{x}<br>%{customdata} (%{z:.1%})<extra></extra>",
        }
        layout |= {
            "title": {"text": "Share of each true class (row)"},
            "xaxis": {"title": {"text": "predicted"}, "type": "category"},
            "yaxis": {"title": {"text": "true"}, "type": "category", "autorange": "reversed"},
        }
    else:
        pairs = most_confused(counts, 30)
        names = [f"{classes[t]} → {classes[p]}" for t, p, _ in pairs]
        trace = {"type": "bar", "orientation": "h", "x": [n for _, _, n in pairs], "y": names}
        layout |= {
            "title": {"text": "Most confused pairs"},
            "yaxis": {"autorange": "reversed", "automargin": True},
        }

    return _figure({"data": [trace], "layout": layout})


def _figure(plotly: dict[str, Any]) -> Any:
    """An aim.Figure, which takes plotly objects only; but what it keeps is their JSON: so plotly is not needed."""
    from aim.sdk.objects.figure import Figure
    from aim.storage.types import BLOB

    figure: Any = Figure.__new__(Figure)
    figure.storage["source"] = "plotly"
    figure.storage["version"] = "unknown"
    figure.storage["format"] = "raw_json"
    figure.storage["data"] = BLOB(data=json.dumps({key: plotly[key] for key in ("data", "layout")}))
    return figure


def _examples(about: Record, found: Predictions) -> dict[str, list[Any]]:
    """The most confident mistakes, and right answers from all over the set, as captioned images.

    Of several labels a mistake is a best-scored class that is not true.
    """
    import numpy as np
    from aim.sdk.objects.image import Image
    from PIL import Image as PILImage

    from potstill.data.cache import open_cache

    split = open_cache(Path(about["dataset"]["dir"])).split("val")
    hit = found.label == found.prediction
    if found.targets is not None:
        hit = found.targets[np.arange(len(hit)), found.prediction]
    wrong, right = np.flatnonzero(~hit), np.flatnonzero(hit)
    picks = {
        "mistake": wrong[np.argsort(-found.confidence[wrong], kind="stable")][
            : EXAMPLES["mistake"]
        ],
        "correct": right[np.unique(np.linspace(0, len(right) - 1, EXAMPLES["correct"]).astype(int))]
        if len(right)
        else right,
    }
    return {
        kind: [
            Image(
                PILImage.fromarray(split.image(split.row_of(int(found.id[at])))),
                caption=_caption(found, int(at), about["classes"]),
            )
            for at in chosen
        ]
        for kind, chosen in picks.items()
    }


def _caption(found: Predictions, at: int, classes: list[str], most: int = 5) -> str:
    """`oak → ash (0.81)`; of several labels `oak + moss → oak (0.93) + ash (0.60)`, from the surest on."""
    if found.targets is None or found.scores is None:
        said = f"{classes[found.prediction[at]]} ({found.confidence[at]:.2f})"
        return f"{classes[found.label[at]]} → {said}"
    score_K = found.scores[at]
    assert found.thresholds is not None
    decided_K = score_K >= found.thresholds
    true = [classes[k] for k in found.targets[at].nonzero()[0]]
    said = [k for k in (-score_K).argsort(kind="stable") if decided_K[k]]
    said = [f"{classes[k]} ({score_K[k]:.2f})" for k in said]
    sides = (
        " + ".join(s[:most]) + (" + …" if len(s) > most else "") or "none" for s in (true, said)
    )
    return " → ".join(sides)


class _Tail:
    """The whole lines that the journal has gained since the last reading."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._offset = run_dir / "journal.jsonl", 0

    def read(self) -> list[Record]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return runs.parse_lines(whole.splitlines())


def _only_writer(run_dir: Path) -> int | None:
    """A lock that keeps a second writer out of this folder's Aim run; None while another has it.

    It is let go with `os.close`, and dies with its owner.
    """
    handle = os.open(run_dir / ".aim.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


class _Followed:
    """A folder that is followed: its journal, as far as it was told, its lock and its Aim run."""

    def __init__(self, run_dir: Path) -> None:
        self.over = False
        self.aim_run: _AimRun | None = None
        self._run_dir, self._tail = run_dir, _Tail(run_dir)
        self._lock: int | None = None
        self._wait_until: float | None = None

    def open(self, repository: Callable[[], _Repository]) -> bool:
        """Open its Aim run, once the folder says what it is and nobody else writes to it.

        Raises UserError if somebody does for too long, and whatever reading a broken folder raises.
        """
        kind = _SearchRun if (self._run_dir / _SearchRun.ABOUT).exists() else _TrainingRun
        if not all((self._run_dir / file).exists() for file in ("config.yaml", kind.ABOUT)):
            if self.over:
                raise UserError(f"its folder has no config.yaml or no {kind.ABOUT}")
            return False  # a trial makes its folder when it starts
        self._lock = _only_writer(self._run_dir)
        if self._lock is None:
            now = time.monotonic()
            self._wait_until = self._wait_until or now + LOCK_WAIT_S
            if now > self._wait_until:
                raise UserError("another process is writing this run to Aim; wait for it to end")
            return False
        self.aim_run = kind(self._run_dir, repository())
        self.aim_run.describe()
        return True

    def tell(self, warn: Callable[[str], None]) -> bool:
        """Tell Aim what the journal has gained, and all the rest if it is over. True: it is worth indexing."""
        assert self.aim_run is not None
        fresh = self._tail.read()
        if any(r["kind"] == "attempt" for r in fresh):
            # what an earlier attempt did past this one's first step is no longer true
            self.aim_run.tell_again(runs.read_journal(self._run_dir))
        else:
            for record in fresh:
                self.aim_run.track(record)
        if self.over:
            self.aim_run.complete(runs.read_journal(self._run_dir), warn)
        return self.over or any(r["kind"] in ("attempt", "epoch", "trial") for r in fresh)

    def close(self) -> None:
        try:
            if self.aim_run is not None:
                self.aim_run.close()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None


class _Writer:
    """The child: follows folders as it is told to, each by itself, so that a broken one costs the others nothing.

    Every run has a RocksDB of its own in the repository, so one process may hold several of them open.
    """

    def __init__(self, repo_dir: Path, say: Callable[..., None]) -> None:
        self._repo_dir, self._say = repo_dir, say
        self._repository: _Repository | None = None
        self._followed: dict[str, _Followed] = {}
        # by folder: the hash of what the index does not have as it is; what is closed, and until when to try
        self._outdated: dict[str, str] = {}
        self._closed: dict[str, float] = {}

    def serve(self, commands: queue.SimpleQueue[dict[str, str] | None]) -> None:
        """Until None comes, or the driver is gone, which is the same; and then until all is told."""
        hung_up = False
        while not hung_up or self._followed or self._closed:
            for command in _take(commands, 0.2 if hung_up else POLL_S):
                if command is None:
                    hung_up = True
                elif "follow" in command:
                    self._follow(command["follow"])
                elif command["over"] in self._followed:
                    self._followed[command["over"]].over = True
            for folder, followed in list(self._followed.items()):
                followed.over |= hung_up
                self._go_on(folder, followed)
            self._index()

    def _follow(self, folder: str) -> None:
        self._closed.pop(folder, None)
        self._followed.setdefault(folder, _Followed(Path(folder))).over = False

    def _open_repository(self) -> _Repository:
        """Once, and only when there is a run to write."""
        if self._repository is None:
            self._repository = _Repository(self._repo_dir)
        return self._repository

    def _go_on(self, folder: str, followed: _Followed) -> None:
        try:
            if followed.aim_run is None:
                if not followed.open(self._open_repository):
                    return
                assert followed.aim_run is not None
                self._say(run=followed.aim_run.hash, of=folder)
            if followed.tell(lambda text: self._say(warn=text, of=folder)):
                self._outdated[folder] = followed.aim_run.hash
            if followed.over:
                followed.close()
                del self._followed[folder]
                self._closed[folder] = time.monotonic() + INDEX_WAIT_S
        except Exception as error:
            import traceback

            traceback.print_exc()
            with suppress(Exception):  # it is broken already
                followed.close()
            del self._followed[folder]
            is_said = isinstance(error, UserError)
            self._say(
                failed=str(error) if is_said else f"{type(error).__name__}: {error}", of=folder
            )

    def _index(self) -> None:
        if self._outdated:
            left = self._open_repository().index(set(self._outdated.values()))
            self._outdated = {f: h for f, h in self._outdated.items() if h in left}
        for folder, until in list(self._closed.items()):
            if folder in self._outdated and time.monotonic() < until:
                continue
            if self._outdated.pop(folder, None):
                said = "its index is in use by another process; an open explorer (jobs/explore.py) will index this run by itself"
                self._say(warn=said, of=folder)
            del self._closed[folder]
            self._say(done=folder)


def _take(
    commands: queue.SimpleQueue[dict[str, str] | None], wait_s: float
) -> list[dict[str, str] | None]:
    """What has come, or comes within `wait_s`."""
    taken = []
    with suppress(queue.Empty):
        taken.append(commands.get(timeout=wait_s))
        while True:
            taken.append(commands.get_nowait())
    return taken


def main(arguments: list[str]) -> int:
    """The child: `python -m potstill.tracking <folder of .aim>`. One JSON message a line on stdin and on stdout."""
    os.nice(5)
    # `ray job stop` tells every process of the job: this one ends when the driver has no more to tell
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Aim prints

    def say(**message: str) -> None:
        try:
            print(json.dumps(message), file=messages, flush=True)
        except BrokenPipeError:  # the driver is gone; the journals are still there to be told
            os.dup2(os.open(os.devnull, os.O_WRONLY), messages.fileno())

    commands: queue.SimpleQueue[dict[str, str] | None] = queue.SimpleQueue()

    def listen() -> None:
        """Always at once, so that the driver never waits for a full pipe."""
        with suppress(ValueError):  # a line that the driver's death has torn
            for line in sys.stdin:
                commands.put(json.loads(line))
        commands.put(None)

    threading.Thread(target=listen, daemon=True).start()
    _Writer(Path(arguments[0]), say).serve(commands)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
