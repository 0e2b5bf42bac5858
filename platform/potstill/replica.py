"""Runs and sets that are kept in an object store: what `runs.dir=s3://…` and `cache.dir=s3://…` mean.

Work is done in a folder of this machine (storage.local_folder); its copy in the store (see copies) is kept up with it,
and it is made from that copy where this machine has none: a new head goes on with the runs of a lost one.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import console, runs
from potstill.claim import Claim, Overtaken
from potstill.copies import GoneApart, Replica
from potstill.data.files import explained, locate
from potstill.errors import RunFailed, Stopped, UserError
from potstill.storage import is_uri, local_folder

if TYPE_CHECKING:
    from potstill.config import Config

PUSH_S, LAST_TRIES_S = 5.0, 90.0


# ------------------------------------------------------------------------------------------- in use
def replica_of(folder: Path, directory: str, key: str) -> Replica | None:
    """Of a folder in `directory`, a config's value of `key`; None where that is no object store."""
    if not is_uri(directory):
        return None
    place = locate(directory, key)
    return None if place.local else Replica(folder, place.join(folder.name))


@contextmanager
def replicated(folder: Path, directory: str, key: str = "runs.dir") -> Iterator[None]:
    """Where `directory` is an object store: begin with what it has of the folder, and keep it up with what the block does.

    A store that fails meanwhile is said, and tried again; the work goes on. Raises UserError where it cannot be
    reached at the start, or another machine is at work in it; Overtaken where another one has taken it over, for which
    the block is stopped as by Ctrl-C; RunFailed where the block is done, but the store lacks its end.
    """
    replica = replica_of(folder, directory, key)
    if replica is None:
        yield
        return
    claim = Claim(replica.place, key)
    with explained(replica.place, key):
        claim.take()
    lacks = f"{key}: the copy in {replica.place} lacks the end"
    remedy = f"all of it is in {folder}, and the same command sends it"
    try:
        with claim.renewed():
            with explained(replica.place, key):
                replica.pull()
            try:
                with _kept_up(replica, claim, key), claim.stopping():
                    yield
            except BaseException as error:
                if claim.lost and isinstance(error, Stopped | KeyboardInterrupt | Overtaken):
                    raise claim.lost from None
                if folder.is_dir() and (fault := _last_push(replica, claim, lacks)):
                    console.warn(f"{lacks} ({fault}); {remedy}")
                raise
            if fault := _last_push(replica, claim, lacks):
                raise claim.lost or RunFailed(f"{lacks} ({fault}); {remedy}")
    finally:
        _tried(claim.release)


@contextmanager
def _kept_up(replica: Replica, claim: Claim, key: str) -> Iterator[None]:
    """Push every PUSH_S, until the block ends; what keeps it from that is said once."""
    over, said = threading.Event(), False

    def push() -> None:
        claim.check()
        replica.push(unhurried=True)

    def keep() -> None:
        nonlocal said
        while not over.wait(PUSH_S):
            fault = _tried(push)
            if fault and not said and not claim.lost:
                console.warn(
                    f"{key}: the copy in {replica.place} is behind ({fault}); it is tried again"
                )
            said = bool(fault)

    thread = threading.Thread(target=keep, name="replica", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _last_push(replica: Replica, claim: Claim, lacks: str) -> str | None:
    """Why the copy still lacks something, if it does, after trying for LAST_TRIES_S."""
    until, wait_s = time.monotonic() + LAST_TRIES_S, 1.0
    while True:
        try:
            claim.check()
            replica.push()
            return None
        except UserError as error:  # trying again would not mend it
            return str(error)
        except Exception as error:  # whatever a store's library raises
            fault = _in_a_line(error)
        if time.monotonic() + wait_s > until:
            return fault
        if wait_s == 1.0:
            console.warn(f"{lacks} ({fault}); trying for {console.duration(LAST_TRIES_S)}")
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 15.0)


def _tried(action: Callable[[], Any]) -> str | None:
    """Why it did not work, if so."""
    try:
        action()
    except Exception as error:  # whatever a store's library raises
        return _in_a_line(error)
    return None


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# ---------------------------------------------------------------------------------- runs that are named by URI
_said: set[str] = set()


def fetch_run(uri: str, key: str) -> Path:
    """The folder here of a run in an object store, brought up to date. Raises UserError.

    Where that cannot be done, but it has been here before, it is said once, and used as it is.
    """
    replica = _named_by(uri, key)
    if replica is None:
        return Path(locate(uri, key).path)
    folder, place = replica.folder, replica.place
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_looking(folder))
        except UserError:
            if not runs.is_run(folder):
                raise
            return folder  # a process of this machine is at work in it
        try:
            with explained(place, key):
                found = replica.pull()
        except GoneApart:
            raise
        except UserError as error:
            if not runs.is_run(folder):
                raise
            if str(place) not in _said:
                _said.add(str(place))
                console.warn(f"{error}. Taken as it was here {_age(folder)} ago: {folder}")
            return folder
    if not found:
        raise UserError(
            f"{key} must be the folder of a run, got {str(place)!r}, where there is none; check the path"
        )
    return folder


@contextlib.contextmanager
def _looking(folder: Path) -> Iterator[None]:
    """The lock of a folder that is to be read. Where nothing has come, nothing is left: it would pass for a run that died."""
    with runs.lock(folder):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # another job may look there, too
                if [path.name for path in folder.iterdir()] == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()


def refresh(folder: Path, directory: str, key: str = "runs.dir") -> None:
    """Let a folder that is only to be read have what the store has of it. Raises UserError where there is neither."""
    if (replica := replica_of(folder, directory, key)) is None:
        return
    try:
        with _looking(folder), explained(replica.place, key):
            replica.pull()
    except GoneApart:
        raise
    except UserError:  # a process of this machine is at work in it, or the store is away
        if not (folder / "journal.jsonl").exists():
            raise


def send_back(uri: str | Path, key: str, written: Sequence[Path]) -> None:
    """Let a run that was named by URI have what a job has written in its folder here. Raises UserError.

    Who trains it meanwhile is not in the way: these files are none of its own.
    """
    replica = _named_by(str(uri), key) if is_uri(str(uri)) else None
    if replica is None:
        return
    try:
        replica.send([path.relative_to(replica.folder).as_posix() for path in written])
    except OSError as error:
        raise UserError(
            f"{key}: what was written is in {replica.folder}, but not in {replica.place} ({_in_a_line(error)}); "
            "the same command sends it"
        ) from None
    console.say(f"Sent to {replica.place}")


def _named_by(uri: str, key: str) -> Replica | None:
    path, _, query = uri.partition("?")
    parent, _, name = path.rstrip("/").rpartition("/")
    directory = f"{parent}?{query}" if query else parent
    return replica_of(local_folder(directory, key) / name, directory, key)


def _age(folder: Path) -> str:
    """How long ago the run, as it is here, wrote its last record."""
    last = max((r.get("time", 0.0) for r in runs.read_journal(folder)), default=0.0)
    return console.duration(time.time() - last)


def with_local_runs(config: Config) -> Config:
    """The same, with the folders here of teachers and of init_from that are named by URI."""
    local = copy.deepcopy(config)
    for key, one in {"teacher": vars(local.teacher), **local.teachers}.items():
        if one.get("run") and is_uri(one["run"]):
            name = key if key == "teacher" else f"teachers.{key}"
            one["run"] = str(runs.open_run(one["run"], f"{name}.run"))
    source = local.model.get("init_from")
    if source and is_uri(source):
        local.model["init_from"] = str(runs.open_run(source, "model.init_from"))
    return local
