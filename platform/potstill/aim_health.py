"""Whether Aim's repository can be read, and whether a query finds what stands in it. Nothing in it is changed.

A broken RocksDB may abort the process that opens it, and Aim's import meddles with logging: so `examine` lets a child
of ours look (`python -m potstill.aim_health <folder of .aim>`), which says what it is at before it goes there. Where
the child dies, that run is the broken one, and another child goes on behind it.

The child prints a JSON object a line: {"at": hash}, {"run": hash, …}, {"repository": {…}}.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import runpy
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INDEXED, OUTDATED, UNINDEXED, CORRUPT = "indexed", "outdated", "unindexed", "corrupt"
NAME = ".aim"


@dataclass(frozen=True)
class RunHealth:
    """One run of the repository."""

    hash: str
    state: str
    """indexed; outdated, unindexed: a query finds an older state of it, or nothing; corrupt: it cannot be read."""
    error: str = ""
    name: str | None = None
    """None: it is not in the repository's table of runs, and the explorer cannot show it."""
    writing: bool = False
    """A process has it open: that the index is behind is no fault."""
    abandoned: bool = False
    """Its writer died: the explorer shows it as in progress for ever."""


@dataclass(frozen=True)
class Health:
    """What `examine` found. Without `error` the repository can be opened."""

    repo: Path
    aim: str | None = None
    """The version of Aim; None where it is not installed."""
    exists: bool = False
    format: str = ""
    """Of the repository."""
    error: str = ""
    remedy: str = ""
    index_error: str = ""
    runs: dict[str, RunHealth] = field(default_factory=dict)
    stale_locks: tuple[str, ...] = ()
    """Files of locks, below the repository, whose owners are dead."""
    seconds: float = 0.0

    def having(self, *states: str) -> list[RunHealth]:
        """Runs in one of these states that nobody is writing; the broken ones in any case."""
        found = [r for r in self.runs.values() if r.state in states]
        return [r for r in found if r.state == CORRUPT or not r.writing]


def examine(repo: Path, timeout_s: float = 120.0) -> Health:
    """Look through the repository in `repo`/.aim, each run whole. Returns within about `timeout_s`.

    Never raises for what is wrong with the repository or with Aim: that is what it returns.
    """
    began = time.monotonic()
    repo = repo.absolute()
    runs: dict[str, RunHealth] = {}
    about: dict[str, Any] = {}
    while not about:
        left_s = timeout_s - (time.monotonic() - began)
        lines, ended = _ask_child(repo, sorted(runs), max(left_s, 0.1))
        at = None
        for line in lines:
            at = line.get("at", at)
            if "run" in line:
                run_hash = line.pop("run")
                runs[run_hash] = RunHealth(run_hash, **line)
                at = None
            about = line.get("repository", about)
        if about:
            break
        if at is None or ended.startswith("it did not"):
            where = f" at run {at}" if at else ""
            about = {"exists": (repo / NAME).exists(), "error": f"{ended}{where}"}
        elif at == _INDEX:
            about = {"exists": True, "error": f"its index cannot be opened: {ended}"}
        else:
            runs[at] = RunHealth(at, CORRUPT, ended)
    stale = tuple(about.pop("stale_locks", ()))
    took_s = time.monotonic() - began
    return Health(repo, runs=runs, stale_locks=stale, seconds=took_s, **about)


def _ask_child(repo: Path, skip: list[str], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """The lines that a child has said, and how it ended."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "potstill.aim_health", str(repo)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            child.communicate("\n".join(skip), timeout=timeout_s)
            ended = f"its reader ended with status {child.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"it did not answer within {timeout_s:.0f} s"
        finally:
            child.kill()
            child.wait()
        said.seek(0)
        errors.seek(0)
        lines = []
        for line in said:
            with suppress(ValueError):  # the last one may be torn
                lines.append(json.loads(line))
        last = [text.strip() for text in errors if text.strip()][-1:]
        return lines, ": ".join([ended, *last])


# ------------------------------------------------------------------------------------- the child's side
_INDEX = "index"


def _look(repo: Path, skip: set[str]) -> Iterator[dict[str, Any]]:
    from importlib import metadata

    about: dict[str, Any] = {"aim": None, "exists": (repo / NAME).is_dir()}
    try:
        about["aim"] = metadata.version("aim")
        ours = _format_of_aim()
        import aimrocks  # noqa: F401  where this cannot be loaded, it is not the runs that are broken
    except (ImportError, OSError, KeyError) as error:
        why = str(error) if about["aim"] else ""
        yield {"repository": {**about, "error": why}}
        return
    folder = repo / NAME
    if not about["exists"]:
        in_the_way = "a file is in its place" if os.path.lexists(folder) else ""
        yield {"repository": {**about, "error": in_the_way}}
        return
    about |= format_of(folder, ours)
    if about.get("error"):
        yield {"repository": about}
        return
    names, error = _table(folder)
    if error:
        yield {"repository": {**about, "error": error}}
        return
    yield {"at": _INDEX}
    index, about["index_error"] = _open_index(folder)
    chunks = folder / "meta" / "chunks"
    for run_hash in sorted(os.listdir(chunks)) if chunks.is_dir() else ():
        if run_hash not in skip and (chunks / run_hash).is_dir():
            yield {"at": run_hash}
            yield {"run": run_hash, "name": names.get(run_hash), **_run(folder, run_hash, index)}
    yield {"repository": {**about, "stale_locks": _stale_locks(folder)}}


def _format_of_aim() -> tuple[int, ...]:
    """The format of repositories that the installed Aim writes, without the seconds that importing all of it takes.

    Raises ImportError where its files are missing, KeyError where the format no longer stands there.
    """
    package = importlib.util.find_spec("aim")
    if package is None or package.origin is None:
        raise ImportError("aim is listed as installed, and its files are missing")
    path = Path(package.origin).parent / "sdk" / "data_version.py"
    return runpy.run_path(str(path))["DATA_VERSION"]


def format_of(folder: Path, ours: tuple[int, ...]) -> dict[str, str]:
    """The `format` of the repository in `folder`, and where an Aim that knows `ours` cannot use it: `error` and `remedy`."""
    shown = ".".join(map(str, ours))
    try:
        text = (folder / "VERSION").read_text().strip()
        version = tuple(int(part) for part in text.split("."))
    except FileNotFoundError:
        return {"format": "", "error": "it has no VERSION: it was made by another Aim, or half"}
    except (OSError, ValueError) as error:
        return {"format": "", "error": f"its VERSION cannot be read ({error})"}
    if version > ours:
        return {
            "format": text,
            "error": f"it is of format {text}, and this Aim knows {shown}",
            "remedy": "install the Aim that wrote it, or a newer one",
        }
    if version[0] < ours[0]:
        return {
            "format": text,
            "error": f"it is of format {text}, and this Aim needs {shown}",
        }
    return {"format": text}


def _table(folder: Path) -> tuple[dict[str, str], str]:
    """The names of runs by their hashes, and what is wrong with the table."""
    path = folder / "run_metadata.sqlite"
    if not path.exists():
        return {}, f"{path.name} is missing"
    try:
        table = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)
        try:
            verdict = table.execute("PRAGMA quick_check").fetchone()[0]
            names = dict(table.execute("SELECT hash, coalesce(name, '') FROM run"))
        finally:
            table.close()
    except sqlite3.Error as error:
        return {}, f"{path.name} cannot be read ({error})"
    return names, "" if verdict == "ok" else f"{path.name} is damaged ({verdict})"


def _open_index(folder: Path) -> tuple[Any, str]:
    """The index, all of it read once, and what is wrong with it."""
    path = folder / "meta" / "index"
    if not (path / "CURRENT").exists():
        return None, "missing"
    try:
        index = _open(path)
        for _ in _items(index):
            pass
    except Exception as error:
        return None, reason(error)
    return index, ""


def _open(path: Path) -> Any:
    """A RocksDB to read from. Writes nothing, takes no lock, and sees what was there when it was opened."""
    import aimrocks

    options = aimrocks.Options(
        create_if_missing=False, paranoid_checks=True, max_open_files=-1, num_levels=4
    )
    return aimrocks.DB(str(path), options, read_only=True)


def _items(database: Any, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """In the order of their keys; to read a record is to compare the checksum of its block."""
    records = database.iteritems()
    records.seek(prefix)
    for key, value in records:
        if not key.startswith(prefix):
            return
        yield key, value


def reason(error: Exception) -> str:
    """What RocksDB says, which it says in bytes."""
    said = error.args[0] if error.args else ""
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    return text or type(error).__name__


def _run(folder: Path, run_hash: str, index: Any) -> dict[str, Any]:
    writing = any(_is_open(folder / part / "chunks" / run_hash) for part in ("meta", "seqs"))
    marks = [folder / part / "progress" / run_hash for part in ("meta", "seqs")]
    about = {"writing": writing, "abandoned": not writing and any(m.exists() for m in marks)}
    error = ""
    for attempt in range(3):
        try:
            state = _state(folder, run_hash, index)
            return {"state": state, **about}
        except Exception as failure:
            error = reason(failure)
        if not writing and attempt:
            break
        time.sleep(0.2)  # a writer may have moved a file under our hands
    return {"state": CORRUPT, "error": error, **about}


def _state(folder: Path, run_hash: str, index: Any) -> str:
    """Raises what RocksDB does where the run cannot be read to its end."""
    # what RepoIndexManager copies of a run: the index is up to date where it holds the same
    prefix = b"meta\xfechunks\xfe" + run_hash.encode() + b"\xfe"
    known = dict(_items(index, prefix)) if index is not None else {}
    records = _items(_open(folder / "meta" / "chunks" / run_hash))
    there = {key: value for key, value in records if key.startswith(prefix)}
    if (sequences := folder / "seqs" / "chunks" / run_hash).is_dir():
        for _ in _items(_open(sequences)):
            pass
    return INDEXED if there == known else OUTDATED if known else UNINDEXED


def _is_open(path: Path) -> bool:
    """Whether a process, on this machine or by a file system that knows of locks, has a RocksDB open for writing."""
    with suppress(OSError):
        # asks without taking it: a writer that starts in this moment must not be refused
        handle = os.open(path / "LOCK", os.O_RDONLY)
        try:
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(handle, fcntl.F_GETLK, asked)
            return struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK
        finally:
            os.close(handle)
    return False


def _stale_locks(folder: Path) -> list[str]:
    """Of locks that are files, those whose process on this machine is dead; of other machines' nothing is known."""
    import uuid

    import psutil

    stale = []
    for path in (folder / "locks").glob("*"):
        with suppress(OSError, ValueError):
            content = path.read_text(errors="replace")
            if path.name.endswith(".softlock"):  # a run's: machine-process-time
                machine, pid, *_ = content.split("-")
                ours = int(machine) == uuid.getnode()
            else:  # filelock's own: process, host, …
                pid, host, *_ = content.splitlines()
                ours = host == socket.gethostname()
            if ours and not psutil.pid_exists(int(pid)):
                stale.append(str(path.relative_to(folder)))
    return sorted(stale)


def main(arguments: list[str]) -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Aim prints
    for line in _look(Path(arguments[0]), set(sys.stdin.read().split())):
        print(json.dumps(line), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
