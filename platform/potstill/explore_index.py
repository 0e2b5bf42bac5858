"""The process that brings Aim's index up to date, and keeps it so: a run that is not in it is empty to Aim.

`python -m potstill.explore_index`, started by explore.py, is told `repo`. It says `total` and `done` while it works; then
`ready`, with `runs`, `indexed`, `left` (and `why`), `broken` and `mended`; then `broken` when that changes. Where the
repository is none for it, it says `error` and ends.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.aim_health import NAME, format_of, reason
from potstill.explore_child import Parent, Record, run

POLL_S = 5.0
STALLED_S = 60.0
# the index is one writer's at a time: held for so long at most, and then left for so long, so that a training's turn comes
HOLD_S, LEAVE_S = 1.0, 0.3
BUSY_S = 30.0
CANNOT_BE_WRITTEN = (
    *("Permission denied", "Read-only", "No space left", "Disk quota exceeded"),
    *("Too many open files", "Stale file handle", "Cannot allocate memory"),
)
"""What RocksDB says of an index with which nothing is wrong."""


class _Busy(Exception):
    """The index cannot be written now, and why."""


class Indexer:
    """Keeps the index of one repository up to date, run by run, in turns with whoever else writes to it."""

    def __init__(self, folder: Path, say: Callable[..., None], over: threading.Event) -> None:
        from aim.sdk.run_status_manager import RunStatusManager

        from potstill.tracking import _Repository

        self._repository, self._say = _Repository(folder), say
        self._status, self._over = RunStatusManager(self._repository.aim), over
        self._chunks = folder / ".aim" / "meta" / "chunks"
        self._index = folder / ".aim" / "meta" / "index"
        # by hash: when the folder of a run changed that stood in the index as it was, and was over
        self._settled: dict[str, int] = {}
        self._identity = ""  # of the index in which they stood
        self.broken: dict[str, str] = {}  # runs that cannot be read, and the checksums they had
        self.mended = ""  # why the index was made again

    def count(self) -> int:
        return len(self._changed())

    def _changed(self) -> dict[str, int]:
        """When the folder of each run changed, in ns."""
        found: dict[str, int] = {}
        with suppress(FileNotFoundError):  # no runs yet
            for entry in os.scandir(self._chunks):
                with suppress(FileNotFoundError):  # deleted just now
                    if entry.is_dir():
                        found[entry.name] = entry.stat().st_mtime_ns
        return found

    def outdated(self) -> dict[str, str]:
        """The checksums of runs that are not in the index as they are, by hash.

        Of a run that is over, only the time of its folder is looked at: the folder changes when it is opened again.
        """
        changed = self._changed()
        # what was deleted, as was advised, is not broken any more
        self.broken = {h: checksum for h, checksum in self.broken.items() if h in changed}
        with suppress(OSError):
            identity = (self._index / "IDENTITY").read_text()
            if identity != self._identity:  # somebody has made another one
                self._identity = identity
                self._settled.clear()
        self._settled = {h: at for h, at in self._settled.items() if changed.get(h) == at}
        suspects = [h for h in changed if h not in self._settled]
        if not suspects:
            return {}
        found, indexed = {}, self._indexed(suspects)
        for run_hash in suspects:
            checksum, (in_index, ended) = self._checksum(run_hash), indexed[run_hash]
            if checksum == self.broken.get(run_hash) or (checksum == in_index and ended):
                self._settled[run_hash] = changed[run_hash]
            elif checksum != in_index:
                found[run_hash] = checksum
        return found

    def _checksum(self, run_hash: str) -> str:
        from aim.sdk.index_manager import RepoIndexManager

        manager: Any = self._repository  # of a manager it takes chunks_dir alone
        return RepoIndexManager._get_run_checksum(manager, run_hash)

    def _indexed(self, run_hashes: Sequence[str]) -> dict[str, tuple[str | None, bool]]:
        """By the index: the checksum of each run, and whether it is over. An index that cannot be read has none."""
        from aim.storage.rockscontainer import RocksContainer
        from aimrocks.errors import Corruption, RocksIOError

        found: dict[str, tuple[str | None, bool]] = dict.fromkeys(run_hashes, (None, False))
        with suppress(RocksIOError, Corruption):
            container = RocksContainer(
                str(self._index), read_only=True, skip_read_optimization=True
            )
            tree = container.tree()
            for run_hash in run_hashes:
                ended = tree.get(("meta", "chunks", run_hash, "end_time")) is not None
                found[run_hash] = (tree.get(("index_cache", run_hash)), ended)
            container.close()
        return found

    def bring_up_to_date(self, deadline: float) -> tuple[int, int, str]:
        """How many runs were indexed, how many are left, and why. Those that cannot be read do not count."""
        todo = self.outdated()
        total, done = len(todo), 0
        while todo and not self._over.is_set():
            self._say(total=total, done=done)
            try:
                held: Any = self._hold()
            except _Busy as busy:
                if time.monotonic() > deadline:
                    return done, len(todo), str(busy)
                self._over.wait(LEAVE_S)
                continue
            if held is None:  # made again: now it lacks all of them
                todo = self.outdated()
                total = done + len(todo)
                continue
            until = time.monotonic() + HOLD_S
            while todo and time.monotonic() < until:
                run_hash, checksum = todo.popitem()
                if not self._repository.index({run_hash}):  # into the index that is held
                    self.broken.pop(run_hash, None)
                    done += 1
                elif (self._chunks / run_hash).is_dir():
                    self.broken[run_hash] = checksum
            del held
            if todo:
                self._over.wait(LEAVE_S)
        (self._index / ".corrupted").unlink(missing_ok=True)
        return done, len(todo), ""

    def _hold(self) -> Any:
        """The index, open for writing for as long as this is kept.

        None: it was broken and is made again, since it holds nothing that the runs do not. Raises _Busy.
        """
        from aimrocks.errors import Corruption, RocksIOError

        try:
            return self._repository.aim._get_index_tree("meta", 0)
        except (RocksIOError, Corruption) as error:
            text = reason(error)
            if any(said in text for said in CANNOT_BE_WRITTEN):
                raise _Busy(f"the index cannot be written ({text})") from None
            if "/LOCK" in text:
                raise _Busy("another process holds the index") from None
            if self.mended:  # once is enough
                raise
            self._make_again(text)
            return None

    def _make_again(self, why: str) -> None:
        import shutil

        shutil.rmtree(self._index)
        self._index.mkdir()
        self.mended = why
        self._settled.clear()

    def end_abandoned(self) -> None:
        """Runs whose writer has died without a word do not count as running for ever."""
        self._status.check_and_terminate_stalled_runs()


def index(asked: Record, parent: Parent) -> None:
    folder = Path(asked["repo"])
    os.environ["__AIM_UI_MOUNT_REPO_PATH__"] = asked["repo"]
    from aim.sdk.data_version import DATA_VERSION

    if wrong := format_of(folder / NAME, DATA_VERSION).get("error"):
        parent.say(
            error=f"Aim's repository must be one that the installed Aim reads, got {folder / NAME}: {wrong}; "
            "install the Aim that has written it, or fill the runs into a new one (jobs/report.py)"
        )
        return
    over = threading.Event()
    indexer = Indexer(folder, parent.say, over)
    _upgrade_pages()
    parent.listen(over.set)
    done, left, why = indexer.bring_up_to_date(time.monotonic() + BUSY_S)
    parent.say(
        ready=True,
        runs=indexer.count(),
        indexed=done,
        left=left,
        why=why,
        broken=sorted(indexer.broken),
        mended=indexer.mended,
    )
    os.nice(5)  # from here on nobody waits for it
    looked, broken = 0.0, set(indexer.broken)
    while not over.wait(POLL_S):
        if time.monotonic() - looked > STALLED_S:
            indexer.end_abandoned()
            looked = time.monotonic()
        indexer.bring_up_to_date(time.monotonic() + POLL_S)
        if set(indexer.broken) != broken:
            broken = set(indexer.broken)
            parent.say(broken=sorted(broken))


def _upgrade_pages() -> None:
    """The tables of what the pages keep (bookmarks, reports), as `aim up` does before it serves."""
    import aim.web
    from alembic import command
    from alembic.config import Config

    ini = Path(aim.web.__file__).parent / "migrations" / "alembic.ini"
    command.upgrade(Config(str(ini)), "head")


if __name__ == "__main__":
    run(index)
