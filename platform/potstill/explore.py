"""Aim's explorer for the one who started it: on loopback, behind a guard, with every run indexed.

`aim up` answers whoever reaches its port: any user of the machine, and any page that the user's browser has open, by a
name that resolves to 127.0.0.1. With a query such a page runs what it likes (CVE-2025-5321: the queries are Python, and
their sandbox leaks). So Aim's application runs here behind `Guard` (explore_guard.py), and its queries may ask for data
alone (explore_queries.py).

`explore` is the parent. It binds the port, on 127.0.0.1 and nowhere else, and starts two kinds of children
(explore_child.py):
  explore_index   one process, which brings the index up to date and keeps it so: a run that is not in it is empty to Aim
  explore_serve   WORKERS processes that answer on the parent's socket; one that dies is replaced
"""

from __future__ import annotations

import errno
import os
import queue
import re
import secrets
import shlex
import signal
import socket
import stat
import sys
import tempfile
import time
import webbrowser
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from potstill import console
from potstill.data.files import is_uri
from potstill.errors import UserError
from potstill.explore_child import Child, Record
from potstill.explore_guard import forward_page
from potstill.storage import local_folder

PORT = 43800
PORTS_TRIED = 20
WORKERS = 2
TOKEN_CHARACTERS = 32
START_S = 120.0
DEATHS_A_MINUTE = 5


# ------------------------------------------------------------------------------------------- the command
def command(arguments: Sequence[str], description: str) -> int:
    """`jobs/explore.py`. Returns the exit status."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="jobs/explore.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", default="runs", metavar="DIR|URI", help="what runs.dir is (default: runs)")
    add("--repo", metavar="DIR", help="the folder of .aim (default: that of --runs)")
    add("--port", type=int, default=PORT, help=f"on 127.0.0.1 (default: {PORT}, or the next free)")
    add(
        "--open",
        action=argparse.BooleanOptionalAction,
        help="open a browser (default: on a terminal of a desktop)",
    )
    add("--read-only", action="store_true", help="nobody can rename, archive or delete runs")
    add(
        "--token-file",
        metavar="FILE",
        help="keep the token there, so that the link stays the same; made where there is none",
    )
    add(
        "--reports",
        action="store_true",
        help="let the page load Pyodide from cdn.jsdelivr.net, and packages from PyPI, for the code in Aim's reports",
    )
    add("--index-only", action="store_true", help="bring the index up to date and stop")
    given = parser.parse_args(arguments)
    try:
        explore(
            given.runs,
            given.repo,
            port=given.port,
            open_browser=given.open,
            read_only=given.read_only,
            reports=given.reports,
            token_file=given.token_file,
            index_only=given.index_only,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def explore(
    runs_dir: str = "runs",
    repo: str | None = None,
    *,
    port: int = PORT,
    open_browser: bool | None = None,
    read_only: bool = False,
    reports: bool = False,
    token_file: str | None = None,
    index_only: bool = False,
) -> None:
    """Index, then serve until Ctrl-C, SIGTERM or SIGHUP. Raises UserError."""
    folder = find_repository(runs_dir, repo)
    asked = {"repo": str(folder), "read_only": read_only, "reports": reports}
    if console.standard().is_terminal:
        console.say(f"Opening {_shown(folder)} …", "dim")  # which takes some seconds
    with ExitStack() as stack:
        # SIGINT too: a script's background is started without it
        stack.enter_context(_stopped_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        index = stack.enter_context(_Index(asked))
        if index_only:
            _say_indexed(index.wait(), folder, index_only=True)
            return
        token = read_token(token_file) if token_file else secrets.token_urlsafe(32)
        listening, port = bind(port)
        stack.enter_context(listening)
        asked |= {"token": token, "socket": listening.fileno()}
        # they import Aim while it is indexed
        workers = stack.enter_context(_Workers(asked))
        indexed = index.wait()
        workers.wait()
        link = f"http://127.0.0.1:{port}/?token={token}"
        _say_indexed(indexed, folder)
        _say_link(link, port, read_only)
        stack.enter_context(_opened(link, folder, open_browser))
        try:
            _watch(index, workers, indexed, folder)
        except KeyboardInterrupt:
            console.say("Stopped.")


def find_repository(runs_dir: str, repo: str | None) -> Path:
    """The folder of .aim. Raises UserError where there is none."""
    key = "--repo" if repo else "--runs"
    given = repo or runs_dir
    folder = local_folder(given, key)
    folder = folder.parent if folder.name == ".aim" else folder
    if (folder / ".aim").is_dir():
        return folder
    if is_uri(given):
        how = "it stands on the machine whose drivers wrote these runs, a cluster's head: start the explorer there"
    else:
        how = (
            "name the folder of your runs by --runs, or that of .aim by --repo; runs that were trained with "
            f"tracking=none are filled in by: uv run jobs/report.py from_run=<run> tracking=aim {shlex.quote(f'tracking.repo={folder}')}"
        )
    raise UserError(f"{key} must have an Aim repository, got {given} (no {folder / '.aim'}); {how}")


def read_token(path: str) -> str:
    """The token in a file that only its owner may read; made where there is none. Raises UserError."""
    file = Path(path).expanduser()
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as made:
            made.write(secrets.token_urlsafe(32) + "\n")
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"--token-file must be a file, got {path} ({error.strerror})") from error
    try:
        if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(
                f"--token-file must be its owner's alone, got {path}; chmod 600 {path}, "
                "or delete it: another one is made"
            )
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file must be readable, got {path} ({error})") from error
    if not re.fullmatch(rf"[\w.~-]{{{TOKEN_CHARACTERS},}}", token, re.ASCII):
        raise UserError(
            f"--token-file must hold one token of at least {TOKEN_CHARACTERS} letters, digits or -._~, got {path}; "
            "delete it: another one is made"
        )
    return token


def bind(port: int) -> tuple[socket.socket, int]:
    """A listening socket on 127.0.0.1 and its port: this one, or the next that is free. 0: any.

    There is no way to have another address, by design. Raises UserError.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, got {port}")
    last = min(port + PORTS_TRIED, 65535)
    for candidate in range(port, last + 1):
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", candidate))
            listening.listen(128)
        except OSError as error:
            listening.close()
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"--port must be one that you may use, got {candidate} ({error.strerror}); try {PORT}"
                ) from error
            continue
        found = listening.getsockname()[1]
        if port not in (0, found):
            console.say(f"Port {port} is taken: this is {found}.", "dim")
        return listening, found
    raise UserError(f"--port must be free, got {port} (so are none up to {last}); try another")


def _shown(folder: Path) -> Path:
    shown = folder / ".aim"
    return shown.relative_to(Path.cwd()) if shown.is_relative_to(Path.cwd()) else shown


def _say_indexed(indexed: Record, folder: Path, index_only: bool = False) -> None:
    shown, count = _shown(folder), indexed["runs"]
    news = f", {indexed['indexed']:,} newly indexed" if indexed["indexed"] else ""
    console.say(f"{shown}: {count:,} run{'' if count == 1 else 's'}{news}", "bold")
    if indexed["mended"]:
        console.warn(f"the index was broken and has been made again ({indexed['mended']})")
    _warn_broken(indexed["broken"], folder)
    if left := indexed["left"]:
        said = f"{left:,} run{' is' if left == 1 else 's are'} not indexed yet: {indexed['why']}"
        if index_only:
            raise UserError(f"{said}; close what holds it (another explorer?) and try again")
        console.warn(f"{said}; indexed as soon as that is over")


def _warn_broken(broken: Sequence[str], folder: Path) -> None:
    if not broken:
        return
    names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    console.warn(
        f"{len(broken)} of Aim's runs cannot be read ({names}) and {'is' if len(broken) == 1 else 'are'} empty in the "
        f"explorer; delete with: uv run aim runs --repo {shlex.quote(str(folder))} rm {broken[0]}"
        f"{' …' if len(broken) > 1 else ''}, then fill in again: uv run jobs/report.py from_run=<run> tracking=aim"
    )


def _say_link(link: str, port: int, read_only: bool) -> None:
    console.say(link, "bold cyan")
    console.say(
        f"Whoever has this link may see{'' if read_only else ', rename and delete'} these runs; nobody else, and only "
        "from this machine. Ctrl-C stops."
    )
    if os.environ.get("SSH_CONNECTION"):
        host = os.environ["SSH_CONNECTION"].split()[2]
        user = os.environ.get("USER") or os.environ.get("LOGNAME") or "<you>"
        console.say(
            f"On your own machine, unless it forwards the port already: "
            f"ssh -N -L {port}:127.0.0.1:{port} {user}@{host}, then open the link.",
            "dim",
        )


@contextmanager
def _opened(link: str, folder: Path, asked: bool | None) -> Iterator[None]:
    """Open a browser, by a file that only the user may read: the link would else stand in the list of processes."""
    desktop = sys.platform == "darwin" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    at_desk = sys.stdout.isatty() and desktop and not os.environ.get("SSH_CONNECTION")
    if not (at_desk if asked is None else asked):
        yield
        return
    # not in /tmp, which browsers in a sandbox have one of their own of
    try:
        handle, name = tempfile.mkstemp(".html", "open-explorer-", folder / ".aim")
    except OSError as error:
        console.warn(f"no browser is opened ({error})")
        yield
        return
    try:
        with os.fdopen(handle, "w") as file:
            file.write(forward_page(link))
        if not webbrowser.open(Path(name).as_uri()):
            console.warn("no browser was found; open the link")
        yield
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _stopped_by(*signals: signal.Signals) -> Iterator[None]:
    """These stop as Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = [signal.signal(number, stop) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- its children
def _too_often(deaths: list[float]) -> bool:
    """Notes one more; whether to replace what dies like that is of no use."""
    now = time.monotonic()
    deaths[:] = [*(t for t in deaths if now - t < 60), now]
    return len(deaths) > DEATHS_A_MINUTE


class _Index:
    """The process that indexes, replaced when it dies."""

    def __init__(self, asked: Record) -> None:
        self._asked, self._deaths = asked, list[float]()
        self._child: Child | None = None

    def __enter__(self) -> _Index:
        self._child = self._start()
        return self

    def _start(self) -> Child:
        return Child("potstill.explore_index", self._asked)

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()

    def wait(self) -> Record:
        """What it says when everything is in the index that can be; a bar meanwhile. Raises UserError."""
        said = first = self._next()
        if "ready" in first:
            return first
        with console.progress("Indexing runs", first["total"]) as update:
            while "ready" not in said:
                update(said["done"])
                said = self._next()
            update(first["total"] - said["left"])
        return said

    def _next(self) -> Record:
        assert self._child is not None
        said = self._child.said.get()
        if said is None:
            raise UserError(f"Aim's repository cannot be indexed: {self._child.why_ended()}")
        if "error" in said:
            raise UserError(said["error"])
        return said

    def hear(self, timeout_s: float) -> Record | None:
        """What it says within that time, from then on."""
        if self._child is None:
            time.sleep(timeout_s)
            return None
        try:
            said = self._child.said.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if said is None:
            why = self._child.why_ended()
            self._child.close()
            if _too_often(self._deaths):
                self._child = None
                console.warn(f"new runs are no longer indexed: {why}; start it again")
            else:
                self._child = self._start()
                console.warn(f"the process that indexes is replaced: {why}")
        return said


class _Workers:
    """The processes that answer, each replaced when it dies."""

    def __init__(self, asked: Record) -> None:
        self._asked = asked
        self._children: list[Child] = []
        self._deaths: list[float] = []
        self._broken: list[str] = []

    def __enter__(self) -> _Workers:
        self._children.append(self._start())
        return self

    def _start(self) -> Child:
        return Child("potstill.explore_serve", self._asked, [self._asked["socket"]])

    def __exit__(self, *_: object) -> None:
        for child in self._children:  # all at once, then each to its end
            child.hang_up()
        for child in self._children:
            child.close()

    def wait(self) -> None:
        """Until one answers; the others, for which it would wait, start then. Raises UserError."""
        (child,) = self._children
        said: Record | None = {}
        while said is not None and "ready" not in said:
            try:
                said = child.said.get(timeout=START_S)
            except queue.Empty:
                raise UserError(f"Aim's explorer did not start within {START_S:g} s") from None
        if said is None:
            raise UserError(f"Aim's explorer does not start: {child.why_ended()}")
        while len(self._children) < WORKERS:
            self._children.append(self._start())

    def tell_broken(self, run_hashes: Iterable[str]) -> None:
        """Which runs cannot be read, for the page's banner."""
        self._broken = sorted(run_hashes)
        for child in self._children:
            child.tell({"broken": self._broken})

    def look_after(self) -> None:
        """Print what they say; replace who has died. Raises UserError where that is of no use."""
        for at, child in enumerate(self._children):
            while not child.said.empty():
                said = child.said.get()
                if said is None:
                    self._replace(at, child.why_ended())
                    break
                if "warn" in said:
                    console.warn(said["warn"])

    def _replace(self, at: int, why: str) -> None:
        if _too_often(self._deaths):
            raise UserError(f"Aim's explorer dies again and again: {why}")
        console.warn(f"one of the explorer's processes is replaced: {why}")
        self._children[at].close()
        self._children[at] = self._start()
        self._children[at].tell({"broken": self._broken})


def _watch(index: _Index, workers: _Workers, indexed: Record, folder: Path) -> None:
    """Until KeyboardInterrupt. Raises UserError."""
    broken = set(indexed["broken"])
    workers.tell_broken(broken)
    while True:
        said = index.hear(0.5)
        if said and "broken" in said:
            new = set(said["broken"]) - broken
            broken = set(said["broken"])
            _warn_broken(sorted(new), folder)
            workers.tell_broken(broken)
        workers.look_after()
