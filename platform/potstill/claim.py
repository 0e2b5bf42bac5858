"""Whose a copy in an object store is: one process at a time writes to it.

owner.json there names the process, and is written anew every RENEW_S. Who has not been heard of for OWNED_S may be
overtaken; that of another machine only after a look of our own at its silence, as clocks differ. Who finds another name
there, or none, has been: it stops, for what it does is another's by now.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from potstill import console
from potstill.data.files import Place
from potstill.errors import RunFailed, UserError

OWNER = "owner.json"
RENEW_S, OWNED_S = 10.0, 60.0
SETTLE_S = 0.2


class InUse(UserError):
    """Another process writes to the copy."""

    def __init__(self, place: Place, known: dict[str, Any]) -> None:
        super().__init__(
            f"run.name: its copy in the object store, {place}, is in use by {_named(known)}, heard of "
            f"{max(0.0, time.time() - known['time']):.0f} s ago; wait for it, or give this run another run.name"
        )


class Overtaken(RunFailed):
    """Another process has the copy now."""


class Claim:
    """This process's claim to a place in an object store. Threads may share one."""

    def __init__(self, place: Place, key: str) -> None:
        self.place, self.key = place, key
        self.lost: Overtaken | None = None
        self._mark = uuid.uuid4().hex
        self._over = threading.Event()
        self._stops = threading.Lock()
        """Held while the main thread is asked to stop, so that it is asked within `stopping` only."""
        self._to_stop = False

    # ------------------------------------------------------------------------------------ to have it
    def take(self) -> None:
        """Claim the place; one whose owner may be gone is waited for. Raises InUse, and OSError."""
        began, said = time.monotonic(), False
        seen, since = self._owner(), began
        while True:
            if (known := self._owner()) != seen:
                seen, since = known, time.monotonic()
            if not known or _is_gone(known, time.monotonic() - since):
                self._write()
                time.sleep(SETTLE_S)  # two who claim in one moment: the later one has it
                if self._is_ours(self._owner()):
                    return
                continue
            error = InUse(self.place, known)
            if _is_of_this_machine(known) or time.monotonic() > began + OWNED_S + RENEW_S:
                raise error
            if not said:
                wait_s = console.duration(_silence_s(known))
                console.say(f"{error} (waiting {wait_s} to see whether it is still there)")
                said = True
            time.sleep(1.0)

    def check(self) -> None:
        """Raises Overtaken where the place is no longer ours, and OSError where it cannot be told."""
        if self.lost is None and not self._is_ours(known := self._owner()):
            who = f"{_named(known)} has" if known else "another process, which has ended, had"
            self.lost = Overtaken(
                f"{self.key}: {who} taken over the copy in {self.place}, while this one was not heard of; this one stops, and "
                "sends nothing more. To go on here instead, end the other one, and move what this machine has of it away"
            )
        if self.lost is not None:
            raise self.lost

    def release(self) -> None:
        """Let the next one have it at once. Raises OSError."""
        if self.lost is None and self._is_ours(self._owner()):
            with suppress(FileNotFoundError):
                self.place.filesystem().delete_file(self.place.join(OWNER).path)

    # ----------------------------------------------------------------------------------- to keep it
    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Say every RENEW_S that this process is still there, until the block ends."""

        def renew() -> None:
            while not self._over.wait(RENEW_S):
                with suppress(Exception):  # whatever a store's library raises: tried again
                    self.check()
                    self._write()
                if self.lost is not None:
                    self._ask_to_stop()
                    return

        thread = threading.Thread(target=renew, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Stop what the block does in the main thread, as Ctrl-C would, when the claim is lost; `lost` then says why.

        In another thread nothing can be stopped so.
        """
        if self.lost is not None:
            raise self.lost
        self._to_stop = threading.current_thread() is threading.main_thread()
        try:
            yield
        finally:
            with self._stops:
                self._to_stop = False

    def _ask_to_stop(self) -> None:
        console.warn(str(self.lost))
        # started in the background, it does not hear Ctrl-C until something listens that knows how to stop
        while not callable(signal.getsignal(signal.SIGINT)):
            if self._over.wait(1.0):
                return
        with self._stops:
            if self._to_stop:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    # -------------------------------------------------------------------------------- what stands there
    def _owner(self) -> dict[str, Any]:
        """Nothing where nobody has it. Raises OSError where it cannot be told: then somebody may."""
        with suppress(FileNotFoundError, ValueError):
            known = json.loads(self.place.join(OWNER).read())
            if isinstance(known, dict) and {"owner", "pid", "host", "time"} <= known.keys():
                return known
        return {}

    def _is_ours(self, known: dict[str, Any]) -> bool:
        return known.get("owner") == self._mark

    def _write(self) -> None:
        content = json.dumps({"owner": self._mark, **this_process(), "time": time.time()})
        place = self.place.join(OWNER)
        with place.filesystem().open_output_stream(place.path) as sink:
            sink.write(content.encode())


# ------------------------------------------------------------------------------------------ processes
def this_process() -> dict[str, Any]:
    """Names may be the same on two machines, and numbers in two containers; these are not."""
    boot, pids = None, None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = os.stat("/proc/self/ns/pid").st_ino
    about = {"pid": os.getpid(), "host": socket.gethostname()}
    return {**about, "boot": boot, "pids": pids, "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did."""
    with suppress(OSError, IndexError):
        # its name, in brackets, may hold blanks and brackets
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _is_of_this_machine(known: dict[str, Any]) -> bool:
    """Whether its number means the same process here."""
    here = this_process()
    return bool(here["boot"] and here["pids"]) and all(
        known.get(k) == here[k] for k in ("boot", "pids")
    )


def _is_gone(known: dict[str, Any], silent_s: float) -> bool:
    """`silent_s`: for how long we have seen its record unchanged."""
    if not _is_of_this_machine(known):
        return silent_s >= _silence_s(known)
    try:
        os.kill(known["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    began = _started(known["pid"])
    if began and known.get("started") not in (None, began):
        return True  # another process has its number now
    return time.time() - known["time"] >= OWNED_S


def _silence_s(known: dict[str, Any]) -> float:
    """For how long another machine's record must not change before it is taken over: two renewals where it is old by our
    clock, which may be ahead of that one's."""
    old = time.time() - known["time"] >= OWNED_S
    return min(2.5 * RENEW_S, OWNED_S) if old else OWNED_S


def _named(known: dict[str, Any]) -> str:
    return f"process {known['pid']} on {known['host']}"
