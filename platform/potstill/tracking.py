"""Aim, filled from a run's journal by a process of its own.

Aim in the driver's process could slow it or take it down: its migrations switch off every existing logger, it
prints, it catches Ctrl-C at exit, and a broken RocksDB aborts. So a follower starts `python -m potstill.tracking`,
which tails the journal at low priority; the training hears of it through `warn` alone. That child is the only writer
of an Aim run, and goes on to close it when the driver dies. What Aim holds is the journal and nothing else: at each
new attempt, and by `fill`, the run is emptied and told again under the same hash.

Names in Aim. Per epoch, as in training_history.json, with context {"subset": "train" | "val"}: loss, top1_acc,
top5_acc, macro_f1, the metrics that were chosen, lr, images_per_s, seconds, loss/<term>, weight/<term>, weighted_loss/<term>. Per
update: batch_loss, batch_lr, batch_images_per_s. Then warnings and course (texts: stages, levels), predictions (images), heatmaps (an image; of a
patch model), confusion_matrix (figure; not of a multi-label task); attributes config, dataset, git, teacher_run, teacher,
classes, versions, status, summary.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
INDEX_WAIT_S = 20.0
EXAMPLES = {"mistake": 8, "correct": 4}


# ------------------------------------------------------------------------------------ the driver's side
class AimFollower:
    """Keeps an Aim run up with the journal of `run_dir` while training goes on. `repo` is the folder of `.aim`.

    Start it once the run's folder holds config.yaml and run.json. Nothing here raises or waits for Aim; `warn` is
    called (from another thread) with one line for each thing that went wrong.
    """

    def __init__(self, run_dir: Path, repo: Path, warn: Callable[[str], None]) -> None:
        self._run_dir, self._repo, self._warn = run_dir, repo, warn
        self._hash: str | None = None
        self._failed = False
        self._child: subprocess.Popen[str] | None = None
        if importlib.util.find_spec("aim") is None:
            self._fail("Aim is not installed (it has wheels for Python up to 3.12)")
            return
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (read after the child has ended)
        source_root = str(Path(__file__).resolve().parents[1])
        paths = [source_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        try:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "potstill.tracking",
                    str(run_dir.absolute()),
                    str(repo.absolute()),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C stops the training; Aim is then told how it ended
            )
        except OSError as error:
            self._fail(str(error))
            return
        self._listener = threading.Thread(target=self._listen, name="potstill-aim", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        child = self._child
        assert child is not None
        assert child.stdout is not None
        for line in child.stdout:
            message = json.loads(line)
            if "warn" in message:
                self._warn(f"Aim: {message['warn']}")
            if "failed" in message:
                self._fail(message["failed"])
            self._hash = message.get("run", self._hash)
        status = child.wait()
        if self._hash is None and not self._failed:
            self._stderr.seek(0)
            last = (self._stderr.read().strip().splitlines() or ["no message"])[-1]
            self._fail(f"its process ended with status {status}: {last}")

    def _fail(self, reason: str) -> None:
        self._failed = True
        self._warn(
            f"Aim does not have all of this run ({reason}). The training is not affected; fill it in later with: "
            f"uv run jobs/report.py from_run={self._run_dir} tracking=aim tracking.repo={self._repo}"
        )

    def close(self, timeout_s: float = 60.0) -> str | None:
        """Let Aim have the journal's rest, the pictures and the summary; then close and index its run.

        Call it when summary.json stands. Waits at most `timeout_s`. Returns the Aim run's hash, or None (and `warn`
        has said why).
        """
        if self._child is None:
            return None
        assert self._child.stdin is not None
        with suppress(OSError, ValueError):  # it may have ended, or been closed, already
            self._child.stdin.write("over\n")
            self._child.stdin.close()
        self._listener.join(timeout_s)
        if self._listener.is_alive():
            reason = f"it was not done within {timeout_s:g} s"
            if not self._failed:
                self._fail(reason)
            self._child.kill()
            self._listener.join(5)
            return None
        self._stderr.close()
        return self._hash


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
class _AimRun:
    """One Aim run, open for writing. Every value carries the time of its record, not the time of its telling."""

    def __init__(self, run_dir: Path, repo_dir: Path) -> None:
        from aim.sdk.repo import Repo

        self.run_dir = run_dir
        self.about = runs.read_json(run_dir / "run.json")
        repo_dir.mkdir(parents=True, exist_ok=True)
        # not from Aim's pool: two runs of one process must not share containers
        self.repo: Any = Repo(str(repo_dir), init=not (repo_dir / ".aim" / "VERSION").exists())
        self.hash = self._known_hash() or self._new_hash()
        self.last_time: float = self.about["created"]
        self.run: Any = self._open()
        self._describe()

    def _chunk(self, run_hash: str) -> Path:
        return Path(self.repo.path) / "meta" / "chunks" / run_hash

    def _known_hash(self) -> str | None:
        try:
            known = runs.read_json(self.run_dir / "aim.json")["run"]
        except (OSError, ValueError, KeyError):
            return None
        return (
            known
            if self._chunk(known).is_dir() and self.repo.structured_db.find_run(known)
            else None
        )

    def _new_hash(self) -> str:
        run_hash = uuid.uuid4().hex[:24]
        runs.write_json(
            self.run_dir / "aim.json", {"run": run_hash, "repo": str(Path(self.repo.path).parent)}
        )
        # made by hand, because aim.Run dates a new run now and a journal may be filled in much later
        created = datetime.fromtimestamp(self.about["created"], UTC).replace(tzinfo=None)
        self.repo.request_tree("meta", run_hash, read_only=False)
        self.repo.request_props(run_hash, read_only=False, created_at=created)
        return run_hash

    def _open(self) -> Any:
        from aim.sdk.run import Run

        return Run(
            self.hash,
            repo=self.repo,
            force_resume=True,  # we hold the lock; Aim's own outlives a killed process
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )

    def _describe(self) -> None:
        import yaml

        about, run = self.about, self.run
        run.name = about["name"]
        run.experiment = about["experiment"] or "default"
        for tag in set(about["tags"]) - set(run.tags):
            run.add_tag(tag)
        run["config"] = yaml.safe_load((self.run_dir / "config.yaml").read_text())
        run["dataset"] = about["dataset"]
        run["git"] = {"commit": about["git_commit"], "dirty": about["git_dirty"]}
        run["teacher_run"] = about["teacher_run"]
        run["teacher"] = _lineage(about)
        run["init_from"] = about["init_from"]
        run["classes"] = len(about["classes"])
        run["versions"] = about["versions"]
        run["run_dir"] = str(self.run_dir)
        run["status"] = "running"

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
        from aim.sdk.objects.text import Text

        kind, self.last_time = record["kind"], record["time"]
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
        elif kind == "end":
            self.run["status"] = {key: record.get(key) for key in ("status", "reason", "best")}

    def _put(self, record: Record, name: str, value: Any, context: dict[str, str]) -> None:
        self.run._tracker._track(
            value, record["time"], name, record["step"], record.get("epoch"), context=context
        )

    def _metric(self, record: Record, name: str, value: float, subset: str) -> None:
        self._put(record, name, float(value), {"subset": subset})

    def _text(self, record: Record, warnings: list[dict[str, str]]) -> None:
        from aim.sdk.objects.text import Text

        if warnings:
            lines = "\n".join(f"{w['name']}: {w['message']}" for w in warnings)
            self._put(record, "warnings", Text(lines), {"kind": record["kind"]})

    def complete(self, records: list[Record], warn: Callable[[str], None]) -> None:
        """Add what is known at the end alone: the summary, images with predictions, the confusion matrix."""
        from potstill.predictions import confusion_counts
        from potstill.report import read_predictions

        summary = self.run_dir / "summary.json"
        if summary.exists():
            self.run["summary"] = runs.read_json(summary)
        if not any(r["kind"] == "end" for r in records):
            self.run["status"] = {"status": "interrupted", "reason": None, "best": None}
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

    def close(self) -> None:
        self.run.close()
        tree = self.repo.request_tree("meta", self.hash, read_only=False).subtree(
            ("meta", "chunks", self.hash)
        )
        tree["end_time"] = self.last_time  # Run.close() sets it to now

    def index(self, wait_s: float) -> bool:
        """Let a query by any process find what was tracked so far. False if the index stayed busy (`aim up`)."""
        import aimrocks.errors

        deadline = time.monotonic() + wait_s
        while True:
            try:
                self._index_now()
                return True
            except aimrocks.errors.RocksIOError:  # the index is one writer's at a time
                if time.monotonic() > deadline:
                    return False
            time.sleep(0.5)

    def _index_now(self) -> None:
        """As RepoIndexManager.index, which would pass over a busy index in silence."""
        from aim.sdk.index_manager import RepoIndexManager

        checksum = RepoIndexManager(self.repo)._get_run_checksum(self.hash)
        index = self.repo._get_index_tree("meta", 0).view(())
        chunk = self.repo.request_tree(
            "meta", self.hash, read_only=True, skip_read_optimization=True
        )
        chunk.subtree(("meta", "chunks", self.hash)).finalize(index=index)
        index["index_cache", self.hash] = checksum


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
    """An aim.Figure: the confusion matrix, or for many classes its largest confusions.

    aim.Figure takes plotly objects only, but what it keeps is their JSON: so plotly is not needed.
    """
    import numpy as np
    from aim.sdk.objects.figure import Figure
    from aim.storage.types import BLOB

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

    figure: Any = Figure.__new__(Figure)
    figure.storage["source"] = "plotly"
    figure.storage["version"] = "unknown"
    figure.storage["format"] = "raw_json"
    figure.storage["data"] = BLOB(data=json.dumps({"data": [trace], "layout": layout}))
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


@contextmanager
def _only_writer(run_dir: Path, wait_s: float = 60.0) -> Iterator[None]:
    """Keep a second writer out of this run's Aim run. The lock dies with its owner."""
    handle = os.open(run_dir / ".aim.lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        "another process is writing this run to Aim; wait for it to end"
                    ) from None
                time.sleep(0.2)
        yield
    finally:
        os.close(handle)


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
        records = []
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            if isinstance(record, dict) and "kind" in record:
                records.append(record)
        return records


def _serve(run_dir: Path, repo_dir: Path, driver: int, warn: Callable[[str], None]) -> str:
    """Follow the journal until the driver speaks or hangs up on the pipe `driver`. Returns the Aim run's hash."""
    import select

    with _only_writer(run_dir):
        aim_run, tail = _AimRun(run_dir, repo_dir), _Tail(run_dir)
        over = False
        while not over:
            over = bool(select.select([driver], [], [], POLL_S)[0])
            fresh = tail.read()
            if any(r["kind"] == "attempt" for r in fresh):
                # what an earlier attempt did past this one's first step is no longer true
                aim_run.tell_again(runs.read_journal(run_dir))
            else:
                for record in fresh:
                    aim_run.track(record)
            if not over and any(r["kind"] in ("attempt", "epoch") for r in fresh):
                aim_run.index(wait_s=0)
        aim_run.complete(runs.read_journal(run_dir), warn)
        aim_run.close()
        if not aim_run.index(INDEX_WAIT_S):
            warn(
                "its index is in use by another process; an open explorer (aim up) will index this run by itself"
            )
        return aim_run.hash


def main(arguments: list[str]) -> int:
    """The child: `python -m potstill.tracking <run folder> <folder of .aim>`. One JSON message a line on stdout."""
    os.nice(5)
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Aim prints

    def say(**message: str) -> None:
        try:
            print(json.dumps(message), file=messages, flush=True)
        except BrokenPipeError:  # the driver is gone; the journal is still there to be told
            os.dup2(os.open(os.devnull, os.O_WRONLY), messages.fileno())

    run_dir, repo_dir = map(Path, arguments)
    try:
        say(run=_serve(run_dir, repo_dir, 0, lambda text: say(warn=text)))
    except Exception as error:
        import traceback

        traceback.print_exc()
        say(
            failed=str(error)
            if isinstance(error, UserError)
            else f"{type(error).__name__}: {error}"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
