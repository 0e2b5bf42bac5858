"""What the loop is given to keep its journal and checkpoints in a run's folder. No Ray here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import runs
from potstill.errors import RunFailed
from potstill.runs import Checkpoint, RunFolder

if TYPE_CHECKING:
    from potstill.loop import Snapshot

FLUSH_S = 0.5


class JournalSession:
    """`loop.Session` of one process; what has others to agree with, or to tell, overrides `_write`, `_told`, `asked`."""

    def __init__(
        self,
        run_dir: Path,
        rank: int = 0,
        world_size: int = 1,
        folder: RunFolder | None = None,
    ) -> None:
        """`folder`: how the run's folder is reached; by default it is seen from here."""
        self.run_dir, self.rank, self.world_size = run_dir, rank, world_size
        self.folder = folder or RunFolder(run_dir)
        self.attempt, self.step = 1, 0
        self._records: list[dict[str, Any]] = []
        self._flushed = time.monotonic()

    # -------------------------------------------------------------------------------------- the loop's
    def log(self, record: dict[str, Any]) -> None:
        self.step = record["step"]
        if self.rank:
            return
        self._records.append(record)
        if record["kind"] != "step" or time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def report(self, metrics: dict[str, Any], snapshot: Snapshot) -> None:
        kept = None
        if self.rank == 0:
            self.flush()  # the journal must not lack what lies before a checkpoint
            kept = self._keep(snapshot)
        self._told({k: v for k, v in metrics.items() if isinstance(v, int | float)}, kept)

    def resume_from(self) -> tuple[Checkpoint | None, list[str]]:
        return self.folder.newest()

    def asked(self) -> str:
        return ""

    # ----------------------------------------------------------------------------------- its owner's
    def end(self, status: str, reason: str, best: dict[str, Any] | None) -> None:
        """The attempt's last record. `status`: finished | stopped_early | stopped | failed."""
        self.log(self._record("end", status=status, reason=reason, best=best))

    def note(self, message: str) -> None:
        self.log(self._record("note", message=message))

    def tell_failure(self, error: Exception) -> None:
        """From any rank: the one that failed may not be the first."""
        first_line = (str(error).strip().splitlines() or ["?"])[0]
        message = f"worker {self.rank} failed: {type(error).__name__}: {first_line[:300]}"
        self._records.append(self._record("warning", name="worker_failed", message=message))
        self.flush()

    def flush(self) -> None:
        """Raises RunFailed where the journal cannot be written."""
        if self._records:
            try:
                self._write(self._records)
            except OSError as error:
                raise RunFailed(
                    f"runs.dir: the journal of {self.run_dir} could not be written ({error.strerror}); make room there, and "
                    "the same command goes on from the last checkpoint"
                ) from None
        self._records, self._flushed = [], time.monotonic()

    # -------------------------------------------------------------------------------------- within
    def _write(self, records: list[dict[str, Any]]) -> None:
        self.folder.append(records)

    def _told(self, metrics: dict[str, Any], kept: Checkpoint | None) -> None:
        """A checkpoint was kept, by rank 0; every rank is here."""

    def _keep(self, snapshot: Snapshot) -> Checkpoint:
        s = snapshot
        contents = runs.packed(s.model_state, s.state, s.files)
        return self.folder.keep(s.step, contents, s.meta)

    def _record(self, kind: str, **values: Any) -> dict[str, Any]:
        about = {"kind": kind, "attempt": self.attempt, "step": self.step, "time": time.time()}
        return {**about, **values}
