"""A process that answers: Aim's application behind `Guard`, faster than it comes.

`python -m potstill.explore_serve`, started by explore.py, is told `repo`, `token`, `read_only`, `reports` and the number
of the listening `socket` that it shares with others of its kind; later which runs are `broken`. It says `ready`, and
`warn` with a line for the user. Aim's own code is changed in this process alone, and only here and in explore_queries.py.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.aim_health import reason
from potstill.explore_child import Parent, Record, run
from potstill.explore_guard import PYODIDE, App, Guard, Receive, Scope, Send, page_policy
from potstill.explore_queries import narrow_queries

Files = tuple[tuple[str, int, int], ...]
"""Name, bytes and time of the last change of each file of a run."""
KEPT_MB = 128  # of sampled metrics


def serve(asked: Record, parent: Parent) -> None:
    os.environ["__AIM_UI_MOUNT_REPO_PATH__"] = asked["repo"]

    def warn(text: str) -> None:
        parent.say(warn=f"explorer: {text}")

    _one_line_each(warn)
    import aim_ui
    import uvicorn
    from aim.web.api import create_app

    narrow_queries()
    broken: list[str] = []
    _spare_looking(broken)
    _spare_waiting()
    _Series(Path(asked["repo"]), warn).install()
    template = (Path(aim_ui.__file__).parent / "build" / "index-template.html").read_text()
    app = _with_page(create_app(), own_page(template, asked["reports"]))
    policy = page_policy(template, asked["reports"])
    guard = Guard(app, asked["token"], asked["read_only"], policy)
    config = uvicorn.Config(
        guard,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)

    def heard(told: Record) -> None:
        broken[:] = told["broken"]

    def gone() -> None:
        server.should_exit = True

    parent.listen(gone, heard)
    parent.say(ready=True)
    server.run(sockets=[socket.socket(fileno=asked["socket"])])


def own_page(template: str, reports: bool) -> str:
    """Aim's page without what `page_policy` would refuse it: scripts and fonts of other servers, and Aim's news.

    Their column would turn a wheel for ever.
    """
    page = template.replace("{{ base_path }}", "")
    assert "{{" not in page, "Aim's template asks for more"
    loads = r'<(?:script|link)[^>]* (?:src|href)="https://[^>]*>(?:</script>)?'
    page = re.sub(loads, lambda load: load[0] if reports and PYODIDE in load[0] else "", page)
    return page.replace("</head>", "<style>.DashboardRight{display:none}</style></head>")


def _with_page(app: App, page: str) -> App:
    from starlette.responses import HTMLResponse

    response: Any = HTMLResponse(page)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        its_own = scope["path"].startswith(("/api/", "/static-files/"))
        shown = not its_own and scope["method"] in ("GET", "HEAD")
        await (response if shown else app)(scope, receive, send)

    return answer


def _one_line_each(say: Callable[[str], None]) -> None:
    """Errors that Python logs, each in one line and seldom twice: a page asks for everything again and again."""
    last: dict[str, float] = {}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            text = f"{type(error).__name__}: {error}" if error else record.getMessage()
            text = (text.strip().splitlines() or [""])[0]
            if text and time.monotonic() - last.get(text, -60.0) > 30:
                last[text] = time.monotonic()
                say(text)

    logging.root.handlers[:] = [Handler()]
    logging.root.setLevel(logging.ERROR)


class _Series:
    """What the metrics explorer has read of the runs' files, for when it asks again.

    Aim opens a database a run, three milliseconds each, for every search and at every tick of live update; and where
    one of them is broken the whole answer is. Values are kept as they were sampled, for as long as the run's files are
    the same; a run whose files cannot be opened is left out.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._chunks, self._say = folder / ".aim" / "seqs" / "chunks", say
        self._opened: dict[str, Files] = {}  # as they were when they could be opened
        self._said: dict[str, Files] = {}  # as they were when it was said that they cannot
        self._kept: OrderedDict[tuple[Any, ...], tuple[Files, Any]] = OrderedDict()
        self._bytes = 0

    def install(self) -> None:
        from aim.sdk.sequence import Sequence
        from aim.sdk.sequence_collection import SingleRunSequenceCollection
        from aim.sdk.sequences.metric import Metric

        metric_class: Any = Metric
        series, sequences_of, data_of = self, SingleRunSequenceCollection.iter, Sequence.data.fget
        assert data_of is not None

        def readable(self: Any) -> Iterator[Any]:
            for sequence in sequences_of(self):
                if not series.can_open(self.run):
                    return
                yield sequence

        class Kept:
            """Stands for the data of a metric; reads it when something else is wanted than samples."""

            def __init__(self, metric: Any) -> None:
                self._metric = metric

            def __getattr__(self, name: str) -> Any:
                return getattr(data_of(self._metric), name)

            def sample(self, count: int) -> Any:
                return Sample(self._metric, count)

        class Sample:
            def __init__(self, metric: Any, count: int) -> None:
                self._metric, self._count = metric, count

            def __getattr__(self, name: str) -> Any:
                return getattr(data_of(self._metric).sample(self._count), name)

            def numpy(self) -> Any:
                return series.sampled(self._metric, self._count, data_of)

        SingleRunSequenceCollection.iter = readable
        metric_class.data = property(Kept)

    def _files(self, run: Any) -> Files:
        """What the run's files are now; looked at once in a request, which has a Run of its own."""
        files = run.__dict__.get("_potstill_files")
        if files is None:
            found = []
            with suppress(FileNotFoundError):
                for entry in os.scandir(self._chunks / run.hash):
                    if not entry.name.startswith("LOG"):  # written by those who read
                        with suppress(FileNotFoundError):
                            about = entry.stat()
                            found.append((entry.name, about.st_size, about.st_mtime_ns))
            files = run.__dict__["_potstill_files"] = tuple(sorted(found))
        return files

    def can_open(self, run: Any) -> bool:
        from aimrocks.errors import Corruption, RocksIOError

        files = self._files(run)
        if self._opened.get(run.hash) != files:
            try:
                # a broken file is noticed when it is read, not when the database is opened
                container = run.repo.request_container("seqs", run.hash, read_only=True)
                container.db.iteritems().seek_to_first()
                _ = run.series_run_trees  # by which the run keeps it open
            except (RocksIOError, Corruption) as error:
                if self._said.get(run.hash) != files:
                    self._said[run.hash] = files
                    said = reason(error)
                    self._say(f"run {run.hash} is left out: its values cannot be read ({said})")
                return False
            self._opened[run.hash] = files
        return True

    def sampled(self, metric: Any, count: int, data_of: Callable[[Any], Any]) -> Any:
        files = self._files(metric.run)
        key = (metric.run.hash, metric.context.idx, metric.name, count)
        # what the last step is stands in the index
        state = (*files, ("last", metric.last_step(), 0))
        kept = self._kept.get(key)
        if kept is not None and kept[0] == state:
            self._kept.move_to_end(key)
            return kept[1]
        values = data_of(metric).sample(count).numpy()
        self._forget(key)
        self._kept[key] = (state, values)
        self._bytes += _size(values)
        while self._bytes > KEPT_MB * 2**20:
            self._forget(next(iter(self._kept)))
        return values

    def _forget(self, key: tuple[Any, ...]) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._bytes -= _size(kept[1])


def _size(values: Any) -> int:
    steps, columns = values
    return 1000 + steps.nbytes + sum(column.nbytes for column in columns)


def _spare_looking(broken: list[str]) -> None:
    """Of every page Aim opens all runs' databases, to say whether one is broken: the child that indexes knows."""
    from aim.sdk.repo import Repo

    def list_corrupted_runs(self: Any) -> list[str]:
        return list(broken)

    Repo.list_corrupted_runs = list_corrupted_runs


def _spare_waiting() -> None:
    """Between two runs Aim lets other requests have their turn by a sleep of 10 µs, which epoll makes a millisecond."""
    from aim.web.api.runs import object_api_utils, utils

    modules: list[Any] = [utils, object_api_utils]
    for module in modules:
        assert module.ASYNC_SLEEP_INTERVAL < 0.001
        module.ASYNC_SLEEP_INTERVAL = 0


if __name__ == "__main__":
    run(serve)
