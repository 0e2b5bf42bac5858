"""A run's folder: identity, lock, journal, history, checkpoints. Every write is atomic or an append.

<runs.dir>/<name>/
    config.yaml             the config that the run was started with
    run.json                what it is: classes, dataset, teacher, git commit, versions
    journal.jsonl           append-only; history, console, plots and Aim are made from it
    training_history.json   one entry an epoch, in percent
    summary.json            written when the run ends
    checkpoints/step-*/     model.safetensors, state.pt, val_predictions.npz, meta.json (last: the commit)
    plots/  report.html

A number that is none (the AUC of a split that holds one class) is null in the JSON files, which others read; the
journal, which only Python reads, keeps it as NaN.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.errors import RunFailed, UserError
from potstill.metric_names import further
from potstill.storage import home, is_uri

if TYPE_CHECKING:
    import numpy as np
    import torch

HISTORY_KEYS = (
    "train_loss",
    "train_top1_acc",
    "train_top5_acc",
    "val_loss",
    "val_top1_acc",
    "val_top5_acc",
    "val_macro_f1",
    "lr",
)


# ------------------------------------------------------------------------------------------- writing
def atomic_write(path: Path, content: bytes | str) -> None:
    """Write beside `path`, sync, rename: a reader sees the old file or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise _about(error, path) from None
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _about(error: OSError, path: Path) -> OSError:
    """The same, with the file's name: what a write raises has none."""
    return error if error.filename else type(error)(error.errno, error.strerror, str(path))


def write_json(path: Path, value: Any) -> None:
    """NaN and infinities become null: JSON has no word for them."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=2, allow_nan=False)
    atomic_write(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def atomic_save(path: Path, array: np.ndarray) -> None:
    """`numpy.save`, all or nothing."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array)
    atomic_write(path, buffer.getvalue())


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------- journal
Record = dict[str, Any]


def append_records(run_dir: Path, records: list[Record]) -> None:
    """Append to the journal and flush it to the disk; one `write` a call, so that lines never mix."""
    text = "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records)
    path = run_dir / "journal.jsonl"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        data = text.encode()
        written = os.write(handle, data)
        try:
            while written < len(data):  # a disk that is nearly full takes a part, and then says why
                written += os.write(handle, data[written:])
        except OSError:  # a torn line would take the next record with it
            end = os.lseek(handle, 0, os.SEEK_CUR)
            if os.fstat(handle).st_size == end:
                os.ftruncate(handle, end - written)
            raise
        os.fsync(handle)
    except OSError as error:
        raise _about(error, path) from None
    finally:
        os.close(handle)


def mend_journal(run_dir: Path) -> None:
    """End a line that a crash has torn, so that the next record starts on one of its own."""
    path = run_dir / "journal.jsonl"
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def read_journal(run_dir: Path) -> list[Record]:
    """The run's records, in order, without torn lines and without what a later attempt took over.

    An attempt's first record says at which step it starts; records of earlier attempts past that step
    are superseded, wherever they stand in the file.
    """
    path = run_dir / "journal.jsonl"
    if not path.exists():
        return []
    records = parse_lines(path.read_bytes().splitlines())
    starts = {r["attempt"]: r["step"] for r in records if r["kind"] == "attempt"}
    taken_over: dict[int, float] = {}
    limit = math.inf
    for attempt in sorted(starts, reverse=True):
        taken_over[attempt] = limit
        limit = min(limit, starts[attempt])
    kept = [
        r
        for r in records
        if r["kind"] == "attempt" or r.get("step", 0) <= taken_over.get(r["attempt"], math.inf)
    ]
    # an earlier end (the attempt failed, or was stopped) is no longer how the run ended
    ends = [r for r in kept if r["kind"] == "end"]
    last = max(starts, default=0)
    superseded = ends[:-1] + [r for r in ends[-1:] if r["attempt"] < last]
    kept = [r for r in kept if not any(r is end for end in superseded)]
    # weights that were taken over bring their epoch's record with them
    epochs = sorted((r for r in kept if r["kind"] == "epoch"), key=lambda r: r["attempt"])
    last_of = {r["step"]: r for r in epochs}
    return [r for r in kept if r["kind"] != "epoch" or last_of[r["step"]] is r]


def parse_lines(lines: Iterable[bytes]) -> list[Record]:
    """The records of whole lines of a journal; a torn one is left out."""
    records = []
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "kind" in record:
                records.append(record)
    return records


def last_attempt(run_dir: Path) -> int:
    """How often the run was started so far."""
    return max((r["attempt"] for r in read_journal(run_dir) if r["kind"] == "attempt"), default=0)


def history(records: list[Record]) -> dict[str, list[float]]:
    """`training_history.json`: one entry an epoch under each of `history_keys`, straight from the journal."""
    epochs = [r for r in records if r["kind"] == "epoch"]
    return {key: [r[key] for r in epochs] for key in history_keys(epochs)}


def history_keys(epochs: Sequence[Record]) -> list[str]:
    """Those of HISTORY_KEYS that these epoch records have, then the metrics that were chosen."""
    kept = [key for key in HISTORY_KEYS if any(key in r for r in epochs)]
    return [*kept, *further(epochs[-1] if epochs else ())]


# -------------------------------------------------------------------------------------------- folder
class RunFolder:
    """What a training asks of its run's folder; one that lies on another node is asked through its desk (handover)."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def append(self, records: list[Record]) -> None:
        append_records(self.run_dir, records)

    def journal(self) -> list[Record]:
        return read_journal(self.run_dir)

    def last_attempt(self) -> int:
        return last_attempt(self.run_dir)

    def keep(self, step: int, contents: dict[str, bytes], meta: dict[str, Any]) -> Checkpoint:
        return keep_checkpoint(self.run_dir, step, contents, meta)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        return newest_checkpoint(self.run_dir)


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keep a second process out of the folder. The lock dies with its owner.

    Raises UserError if another process holds it.
    """
    while (handle := _locked(run_dir)) is None:
        pass
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _locked(run_dir: Path) -> int | None:
    """The lock's file, open and locked; None where it was taken away in this moment."""
    path = run_dir / ".lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"runs.dir must be a folder that can be written, got {str(run_dir.parent)!r} ({error.strerror})"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(handle, 64, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise UserError(
            f"run.name: {run_dir} is in use by process {owner}; wait for it, or give this run another run.name"
        ) from None
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    os.close(handle)
    return None


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "run.json").is_file()


def open_run(path: str | Path, key: str) -> Path:
    """The folder of an existing run. `key` is the config key that named it, for the error.

    Raises UserError if it is not a run.
    """
    if is_uri(str(path)):
        from potstill.replica import fetch_run

        folder = fetch_run(str(path), key)
    else:
        folder = (home() / Path(path).expanduser()).resolve()
    if is_run(folder):
        return folder
    if not folder.exists():
        raise UserError(
            f"{key} must be the folder of a run, got {path!s}, which does not exist; runs stand in runs.dir"
        )
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and is_run(p))[:5]
    remedy = (
        f"it holds the runs {', '.join(found)}: name one of them"
        if found
        else "start one with jobs/train.py"
    )
    raise UserError(
        f"{key} must be the folder of a run (config.yaml and run.json), got {path!s}; {remedy}"
    )


# --------------------------------------------------------------------------------------- checkpoints
@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]

    def model_state(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / "model.safetensors")

    def state(self) -> dict[str, Any]:
        """Optimizer, schedule, scaler and position."""
        import torch

        return torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(
    run_dir: Path,
    step: int,
    model_state: dict[str, torch.Tensor],
    state: dict[str, Any],
    meta: dict[str, Any],
    files: dict[str, bytes] | None = None,
) -> Checkpoint:
    """`write_checkpoint` of tensors that are here."""
    return write_checkpoint(run_dir, step, packed(model_state, state, files), meta)


def packed(
    model_state: dict[str, torch.Tensor],
    state: dict[str, Any],
    files: dict[str, bytes] | None = None,
) -> dict[str, bytes]:
    """A checkpoint's files but for meta.json, by name."""
    import torch
    from safetensors.torch import save

    buffer = io.BytesIO()
    torch.save(state, buffer)
    on_cpu = {k: v.detach().cpu().contiguous() for k, v in model_state.items()}
    return {"model.safetensors": save(on_cpu), "state.pt": buffer.getvalue(), **(files or {})}


def write_checkpoint(
    run_dir: Path, step: int, contents: dict[str, bytes], meta: dict[str, Any]
) -> Checkpoint:
    """Write a checkpoint beside its name, sync it, rename it. meta.json, written last, commits it.

    `meta["best"]` names the best checkpoint so far (maybe this one): together with the two newest it is
    what `prune_checkpoints` keeps.
    """
    folder = run_dir / "checkpoints" / checkpoint_name(step)
    if folder.exists():
        if (found := _valid(folder)) and found.meta.get("epoch_done") == meta.get("epoch_done"):
            return found  # an orphan of an earlier attempt has just written the same step
        shutil.rmtree(folder)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    beside.mkdir(parents=True)
    try:
        sums = {}
        for name, content in contents.items():
            atomic_write(beside / name, content)
            sums[name] = hashlib.sha256(content).hexdigest()
        meta = {**meta, "step": step, "time": time.time(), "sha256": sums}
        write_json(beside / "meta.json", meta)
    except OSError:  # on a full disk the journal wants the room, to say so
        shutil.rmtree(beside, ignore_errors=True)
        raise
    os.replace(beside, folder)
    _sync_folder(folder.parent)
    return Checkpoint(folder, meta)


def keep_checkpoint(
    run_dir: Path, step: int, contents: dict[str, bytes], meta: dict[str, Any]
) -> Checkpoint:
    """Write a checkpoint, and remove those that it makes needless. Raises RunFailed where it cannot be written."""
    try:
        kept = write_checkpoint(run_dir, step, contents, meta)
    except OSError as error:
        raise RunFailed(
            f"runs.dir: the checkpoint of step {step} could not be written to {run_dir} "
            f"({error.strerror}); make room there, and the same command goes on from the one before"
        ) from None
    prune_checkpoints(run_dir, kept)
    return kept


def _valid(folder: Path) -> Checkpoint | None:
    try:
        meta = read_json(folder / "meta.json")
        if all(file_sha256(folder / name) == digest for name, digest in meta["sha256"].items()):
            return Checkpoint(folder, meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Raises UserError for what is none, or is damaged."""
    if (found := _valid(folder)) is None:
        raise UserError(
            f"{folder} is not a checkpoint, or it is damaged (its SHA-256 does not match)"
        )
    return found


def adopt_checkpoint(
    run_dir: Path, donor: Checkpoint, name: str, value: float | None
) -> Checkpoint:
    """Let a run go on from another's checkpoint instead of its own, which are removed.

    Its best epoch is from now on the one that the donor had just finished, whose monitored metric is `value`. `adopted`
    in meta.json tells the loop that its settings are not the donor's.
    """
    state = donor.state()
    best = state["progress"]["best"]
    best = {
        **best,
        "folder": donor.folder.name,
        "step": donor.step,
        "epoch": donor.meta["epoch"],
        "value": value,
    }
    state["progress"]["best"] = best
    meta = {**donor.meta, "best": best, "adopted": name}
    others = [n for n in donor.meta["sha256"] if n not in ("model.safetensors", "state.pt")]
    files = {n: (donor.folder / n).read_bytes() for n in others}
    # beside the old ones first: a kill in between must not leave the run without any
    beside, aside = run_dir / "adopting", run_dir / "given_up"
    for folder in (beside, aside):
        shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(beside, donor.step, donor.model_state(), state, meta, files)
    if (run_dir / "checkpoints").exists():
        (run_dir / "checkpoints").rename(aside)
    (beside / "checkpoints").rename(run_dir / "checkpoints")
    for folder in (beside, aside):
        shutil.rmtree(folder, ignore_errors=True)
    return Checkpoint(run_dir / "checkpoints" / donor.folder.name, meta)


def newest_checkpoint(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and the names of newer ones that were passed over as damaged."""
    passed_over = []
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        if found := _valid(folder):
            return found, passed_over
        passed_over.append(folder.name)
    return None, passed_over


def best_checkpoint(run_dir: Path) -> Checkpoint:
    """The best checkpoint by `loop.monitor`, as the newest valid one names it.

    Raises UserError if the run has none, or if the best one is damaged.
    """
    newest, _ = newest_checkpoint(run_dir)
    if newest is None or not newest.meta.get("best"):
        raise UserError(
            f"{run_dir} has no finished epoch yet; start its command again and let it train"
        )
    name = newest.meta["best"]["folder"]
    if name == newest.folder.name:
        return newest
    if found := _valid(run_dir / "checkpoints" / name):
        return found
    raise UserError(
        f"{run_dir / 'checkpoints' / name} is damaged (its SHA-256 does not match); use checkpoint=last"
    )


def pick_checkpoint(run_dir: Path, which: str) -> Checkpoint:
    """`which`: best | last. Raises UserError where there is none."""
    if which == "best":
        return best_checkpoint(run_dir)
    found, _ = newest_checkpoint(run_dir)
    if which != "last":
        raise UserError(f"checkpoint must be best or last, got {which!r}")
    if found is None:
        raise UserError(
            f"{run_dir} has no valid checkpoint; start its command again and let it train"
        )
    return found


def prune_checkpoints(run_dir: Path, newest: Checkpoint, keep_newest: int = 2) -> None:
    """Remove all but `newest`, the one before it, and the best one that it names.

    What stands beyond `newest` is damaged, or of a future that was given up: it goes too, and so do
    leftovers of interrupted writes.
    """
    root = run_dir / "checkpoints"
    folders = sorted((f for f in root.glob("step-*") if f.name <= newest.folder.name), reverse=True)
    keep = {f.name for f in folders[:keep_newest]}
    if best := newest.meta.get("best"):
        keep.add(best["folder"])
    for folder in root.glob("step-*"):
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)
    for leftover in root.glob(".step-*.tmp"):
        if leftover.stat().st_mtime < time.time() - 600:
            shutil.rmtree(leftover, ignore_errors=True)
