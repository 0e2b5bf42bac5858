"""What a user sees while things run: our own lines, and a bar where a terminal is.

Numbers are formatted from the journal's floats and nothing else, so that console and history cannot disagree.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from potstill import metric_names

Record = dict[str, Any]
BAR_AFTER_S = 2.0
LINE_EVERY_S = 60.0
"""Where there is no terminal, as in `ray job logs`, how far things are is said so often."""


@cache
def standard() -> Console:
    """The console on standard output that everything shares."""
    return Console(highlight=False)


def say(text: str, style: str = "", console: Console | None = None) -> None:
    """Print one line as it is: no markup, no wrapping, no colours of rich's own choice."""
    (console or standard()).print(Text(text, style), soft_wrap=True)


def warn(text: str, console: Console | None = None) -> None:
    say(f"! {text}", "yellow", console)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    title: str | None = None,
    console: Console | None = None,
) -> None:
    """Print a table; columns of numbers stand to the right."""
    from rich import box
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for at, column in enumerate(columns):
        numbers = bool(rows) and at > 0 and all(_is_numeric(row[at]) for row in rows)
        drawn.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    (console or standard()).print(drawn)


def _is_numeric(cell: Any) -> bool:
    return isinstance(cell, (int, float)) or str(cell)[:1] in "0123456789+-–."


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    if not 0 <= seconds < 1e7:
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _bar(console: Console, known_total: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
    )
    if not known_total:
        columns = (
            TextColumn("{task.description}"),
            SpinnerColumn(),
            TextColumn("{task.completed:,.0f}"),
        )
    return Progress(
        *columns,
        TextColumn("[dim]{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


@contextmanager
def live(
    view: Callable[[], tuple[str, Sequence[str], Sequence[Sequence[str]]]],
) -> Iterator[Callable[[], None]]:
    """Keep a table at the foot of a terminal. `view`: title, columns and rows. Yields what draws it anew.

    Lines that are said meanwhile stand above it; where there is no terminal there are those lines alone.
    """
    from rich import box
    from rich.live import Live
    from rich.table import Table

    console = standard()
    if not console.is_terminal:
        yield lambda: None
        return

    def drawn() -> Table:
        title, columns, rows = view()
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(Text(column), no_wrap=True, overflow="ellipsis")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    with Live(drawn(), console=console, auto_refresh=False, transient=True) as shown:
        yield lambda: shown.update(drawn(), refresh=True)


@contextmanager
def progress(
    description: str, total: int | None, console: Console | None = None
) -> Iterator[Callable[[float], None]]:
    """Show how far a piece of work is. Yields `update(done)`.

    On a terminal a bar appears after 2 s and gives way to one line at the end; elsewhere a line a minute comes before it.
    """
    console = console or standard()
    began, done, lock = time.monotonic(), 0.0, threading.Lock()
    bar: Progress | None = None
    task: TaskID | None = None
    over, spoke = False, began
    first: tuple[float, float] | None = None

    def show() -> None:
        nonlocal bar, task
        with lock:
            if not over:
                bar = _bar(console, total is not None)
                task = bar.add_task(escape(description), total=total, completed=int(done), note="")
                bar.start()

    def update(now_done: float) -> None:
        nonlocal done, spoke, first
        with lock:
            done, now = now_done, time.monotonic()
            first = first or (now, done)  # what an earlier start has done took no time of ours
            if not console.is_terminal and now - spoke >= LINE_EVERY_S:
                spoke = now
                of = f" of {total:,.0f}{_left(first, done, total)}" if total else ""
                say(f"{description}: {done:,.0f}{of}", "dim", console)
            if bar is not None and task is not None:
                bar.update(task, completed=int(done))

    timer = threading.Timer(BAR_AFTER_S, show)
    timer.daemon = True
    if console.is_terminal:
        timer.start()
    try:
        yield update
    finally:
        timer.cancel()
        with lock:
            over = True
            if bar is not None:
                bar.stop()
    if bar is not None or not console.is_terminal:
        say(f"{description}: {done:,.0f} in {duration(time.monotonic() - began)}", console=console)


def _left(first: tuple[float, float], done: float, total: float) -> str:
    """`, 12 min 30 s left`. `first`: when the first part was heard of, and how much was done by then."""
    when, before = first
    if done <= before:
        return ""
    return f", {duration((time.monotonic() - when) / (done - before) * (total - done))} left"


def said_of(record: Record) -> str:
    """A change of level or of stage in words."""
    if record["kind"] == "stage":
        name = f" ({record['stage_name']})" if record["stage_name"] else ""
        return f"Stage {record['stage']}/{record['stages']}{name}: {record['stage_epochs']} epochs"
    what = "back at" if record["restored"] else "now at"
    after = ", with the weights of that moment" if record["restored"] else ""
    return f"Weight of {record['term']} {what} {record['weight']:g} (level {record['level']}){after}: {record['message']}"


class EpochPrinter:
    """Follows a run's journal: a bar while an epoch's steps arrive, or a line a minute where there is no terminal, then
    the epoch's lines."""

    def __init__(self, name: str, console: Console | None = None) -> None:
        self._name, self._console = name, console or standard()
        self._epochs = self._steps_per_epoch = 0
        self._kind, self._shown = "single_label", []
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._spoke = time.monotonic()
        self._epoch_from: tuple[float, float] | None = None
        """When the first step of the epoch under way was heard of, and which one that was."""

    def handle(self, record: Record) -> None:
        """Print what `record` says, if it says anything to a user."""
        show = getattr(self, f"_on_{record['kind']}", None)
        if show is not None:
            show(record)

    def close(self) -> None:
        """Take the bar away. Call it however the run ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _say(self, text: str, style: str = "") -> None:
        say(text, style, self._console)

    def _warn(self, warning: dict[str, str]) -> None:
        warn(f"{warning['name']}: {warning['message']}", self._console)

    def _on_attempt(self, record: Record) -> None:
        self.close()
        self._epoch_from = None
        self._epochs, self._steps_per_epoch = record["epochs"], record["steps_per_epoch"]
        self._kind = record.get("task_kind", "single_label")
        # what a run was asked for, besides what every line says
        asked = [*(f"val_{name}" for name in record.get("metrics", ())), record.get("monitor", "")]
        said = ("loss", "top1_acc", "top5_acc")
        self._shown = [key for key in dict.fromkeys(asked) if metric_names.plain(key) not in said]
        over = (
            f"passed over {', '.join(record['passed_over'])} (damaged)"
            if record["passed_over"]
            else ""
        )
        if record["resumed_from"]:
            done, step = record["epoch"], record["step"]
            at_end = step == done * self._steps_per_epoch
            where = f"after epoch {done}" if at_end else f"epoch {done + 1}"
            self._say(
                f"Resumed from {record['resumed_from']} ({where}, step {step}){'; ' + over if over else ''}"
            )
        elif record["attempt"] > 1 or over:
            self._say(
                f"Starting from the beginning: no valid checkpoint{'; ' + over if over else ''}",
                "yellow",
            )
        else:
            workers = "1 worker" if record["world_size"] == 1 else f"{record['world_size']} workers"
            self._say(
                f"{self._name}: {self._epochs} epochs of {self._steps_per_epoch} updates on {workers}, {record['device']}",
                "bold",
            )

    def _on_step(self, record: Record) -> None:
        if not self._console.is_terminal:
            self._say_step(record)
            return
        if self._bar is None:
            self._bar = _bar(self._console, known_total=True)
            self._task = self._bar.add_task(
                f"Epoch {record['epoch']}/{self._epochs}", total=self._steps_per_epoch, note=""
            )
            self._bar.start()
        assert self._task is not None
        note = f"loss {record['loss']:.4f}, {record['images_per_s']:,.0f} img/s"
        self._bar.update(self._task, completed=record["epoch_step"], note=note)

    def _say_step(self, record: Record) -> None:
        now, at = time.monotonic(), record["epoch_step"]
        if self._epoch_from is None:
            self._epoch_from = now, at
        if now - self._spoke < LINE_EVERY_S:
            return
        self._spoke, updates = now, self._steps_per_epoch
        self._say(
            f"Epoch {record['epoch']}/{self._epochs}: update {at:,} of {updates:,}, loss {record['loss']:.4f}, "
            f"{record['images_per_s']:,.0f} img/s{_left(self._epoch_from, at, updates)}",
            "dim",
        )

    def _on_epoch(self, record: Record) -> None:
        self.close()
        self._spoke, self._epoch_from = time.monotonic(), None
        self._say(f"Epoch {record['epoch']}/{self._epochs}", "bold")
        for subset in ("train", "val"):
            keys = [f"{subset}_loss", f"{subset}_top1_acc"]
            if record["top_k"] > 1:  # of two classes, the best two are always right
                keys.append(f"{subset}_top5_acc")
            if subset == "val":
                keys += [key for key in self._shown if key in record]
            parts = (
                f"{self._title(k, record['top_k'])}: {metric_names.shown(k, record[k])}"
                for k in keys
            )
            line = f"{subset.capitalize()} - {', '.join(parts)}"
            self._say(f"{line} *best*" if subset == "val" and record["best"] else line)
        left = (
            f", {duration(record['seconds_left'])} left" if record["epoch"] < self._epochs else ""
        )
        self._say(
            f"{record['images_per_s']:,.0f} img/s, {duration(record['seconds'])}{left}", "dim"
        )
        for warning in record["warnings"]:
            self._warn(warning)

    def _title(self, key: str, top_k: int) -> str:
        return metric_names.title(key, self._kind, top_k).removesuffix(" accuracy")

    def _on_level(self, record: Record) -> None:
        self.close()
        self._say(said_of(record), "yellow" if record["restored"] else "cyan")

    def _on_stage(self, record: Record) -> None:
        self.close()
        self._say(said_of(record), "bold")

    def _on_note(self, record: Record) -> None:
        self._say(record["message"])

    def _on_warning(self, record: Record) -> None:
        self._warn(record)

    def _on_end(self, record: Record) -> None:
        self.close()
        reason = f": {record['reason']}" if record.get("reason") else ""
        said = f"{record['status'].replace('_', ' ').capitalize()}{reason}"
        if best := record.get("best"):
            number = metric_names.shown(best["metric"], best["value"])
            said += f". Best {best['metric']}: {number} at epoch {best['epoch']} ({best['folder']})"
        self._say(said, "red" if record["status"] == "failed" else "")
