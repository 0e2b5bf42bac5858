"""A process of the explorer's own, and the lines between it and its parent.

Aim is imported in such processes alone, for the same reasons as in tracking.py. One is told what to do by a line of
JSON on its stdin, so that the token stands in no command line; more lines may follow, and the end of stdin says that
the parent is gone, in whatever way. It answers by lines of JSON on stdout.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

Record = dict[str, Any]
STOP_S = 5.0
_PR_SET_PDEATHSIG = 1


# ------------------------------------------------------------------------------------------- the parent's side
class Child:
    """`python -m <module>`, told `asked`. What it says comes in `said`, one by one, and None when it has ended.

    `handles`: of files or sockets that it shares with the parent.
    """

    def __init__(self, module: str, asked: Record, handles: Sequence[int] = ()) -> None:
        self.said = queue.SimpleQueue[Record | None]()
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (read after its end)
        source_root = str(Path(__file__).resolve().parents[1])
        paths = [source_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=handles,
            start_new_session=True,  # Ctrl-C is the parent's, which then ends its children
        )
        self.tell(asked)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # torn by its death
                self.said.put(json.loads(line))
        self._process.wait()
        self.said.put(None)

    def tell(self, what: Record) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # its end is heard elsewhere
            print(json.dumps(what), file=self._process.stdin, flush=True)

    def why_ended(self) -> str:
        self._stderr.seek(0)
        last = (self._stderr.read().strip().splitlines() or ["no message"])[-1]
        return f"its process ended with status {self._process.returncode}: {last}"

    def hang_up(self) -> None:
        """It may end now; `close` waits for that."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        self.hang_up()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


# ------------------------------------------------------------------------------------------- the child's side
class Parent:
    """Who has started this process."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # Aim prints
        self._lock = threading.Lock()

    def say(self, **message: Any) -> None:
        with self._lock, suppress(BrokenPipeError):  # the parent is gone: stdin ends
            print(json.dumps(message), file=self._answers, flush=True)

    def listen(
        self, gone: Callable[[], None], heard: Callable[[Record], None] = lambda _: None
    ) -> None:
        """From now on, in a thread: `heard` each line, and `gone` at the end of stdin."""

        def listen() -> None:
            for told in _lines():
                heard(told)
            gone()

        threading.Thread(target=listen, daemon=True).start()


def _lines() -> Iterator[Record]:
    with suppress(ValueError):  # torn by the parent's death
        for line in sys.stdin:
            yield json.loads(line)


def _die_with_parent() -> None:
    """Where Linux is, a parent that is killed takes even a child along that hears nothing, say in an endless query."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(work: Callable[[Record, Parent], None]) -> NoReturn:
    """The whole of a child: do `work`, which is given what was asked."""
    _die_with_parent()
    parent = Parent()
    asked = next(_lines(), None)
    if asked is not None:
        work(asked, parent)
    # Aim's clean-up at exit is for those who write; what is open here is closed by the system
    sys.stderr.flush()
    os._exit(0)
