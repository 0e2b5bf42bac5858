"""The monitor's view: what Monitor.look has told, drawn in lines of a given width. It knows nothing else."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from potstill import console, metric_names
from potstill.data import store
from potstill.monitor_ray import RAY_EVERY_S
from potstill.monitor_runs import ACTIVE, ENDED, Told

MOST_DEAD = 4
WIDE = 150
"""Columns from which a run has one line, and what is below stands side by side."""
_DOT = {"running": "●", "starting": "◌", "finishing": "●", "finished": "✓", "stopped_early": "✓"}
_COLOUR = {
    "running": "green",
    "starting": "cyan",
    "finishing": "cyan",
    "interrupted": "red",
    "not_started": "red",
    "failed": "red",
    "stopped": "yellow",
}


Item = list[Text]
"""Its first line, and what says more, the most important first: where there is little room, it goes from the end."""


@dataclass
class _Block:
    """A section of the view. `head`: what is there in any case."""

    title: str
    note: str = ""
    head: list[Text] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    hidden: int = 0

    def height(self) -> int:
        return 1 + len(self.head) + sum(map(len, self.items)) + bool(self.hidden)

    def shorten(self) -> None:
        """Take the last line of the longest item; an item that is but one line goes as a whole, and is counted."""
        longest = max(reversed(self.items), key=len)
        if len(longest) > 1:
            longest.pop()
        else:
            self.items.pop()
            self.hidden += 1

    def lines(self, width: int) -> list[Text]:
        title = Text.assemble((f"{self.title} ", "bold"))
        note = f" {self.note}" if self.note else ""
        title.append("─" * max(0, width - title.cell_len - cell_len(note)) + note, "dim")
        found = [title, *self.head, *(line for item in self.items for line in item)]
        if self.hidden:
            found.append(Text(f"  … and {self.hidden} more", "dim"))
        for line in found:
            line.truncate(width, overflow="ellipsis")
        return found


def render(told: Told, width: int, height: int | None = None, hint: str = "") -> Text:
    """The view of what Monitor.look has told, `width` columns wide. What does not fit into `height` lines is counted."""
    clock = time.strftime("%H:%M:%S", time.localtime(told["time"]))
    head = Text.assemble(("potstill ", "bold"), (f"{told['host']}  {clock}", ""))
    _push_right(head, Text(hint, "dim"), width)
    wide = width >= WIDE
    half = (width - 3) // 2 if wide else width
    room = height - 1 if height else None
    above = [_errors(told, width), _runs_block(told, width, room), _others(told, width)]
    above = [block for block in above if block]
    left = [_gpu_block(told, half), _machine_block(told, half)]
    right = [_cache_block(told, half), _disk_block(told, half)]
    if ray := _ray_blocks(told, half):
        left, right = left + right, ray
    columns = [left, right] if wide else [left + right]
    if room:
        _trim(above, columns, room)
    lines = [head, *(line for block in above for line in block.lines(width))]
    sides = [[line for block in column for line in block.lines(half)] for column in columns]
    lines += _side_by_side(sides, half) if wide else sides[0]
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines[:height])


def as_ascii(view: Text) -> Text:
    """For a terminal or a file that takes nothing else. Colours stay where they are."""
    plain = view.copy()
    swapped = plain.plain.translate(str.maketrans("━─·–…°×●◌✓✗", "#-|-~ x*o+x"))
    plain.plain = swapped.encode("ascii", "replace").decode()
    return plain


def _trim(above: list[_Block], columns: list[list[_Block]], room: int) -> None:
    """Shorten blocks until all fits: the longest items first, then the longest lists, in each of which one item stays."""

    def tall(column: list[_Block]) -> int:
        return sum(block.height() for block in column)

    while tall(above) + max(map(tall, columns)) > room:
        # what counts towards the height is what is above, and the taller one of the columns
        there = [*above, *max(columns, key=tall)]
        longest = max((len(item) for block in there for item in block.items), default=0)
        if longest > 1:
            # the runs, at the top, give way last
            block = next(b for b in reversed(there) if longest in map(len, b.items))
        else:
            block = max(there, key=lambda b: len(b.items))
            if len(block.items) <= 1:
                return
        block.shorten()


def _side_by_side(sides: list[list[Text]], width: int) -> list[Text]:
    left, right = sides
    lines = []
    for i in range(max(len(left), len(right))):
        line = Text().append_text(left[i]) if i < len(left) else Text()
        line.pad_right(width - line.cell_len + 3)
        lines.append(line.append_text(right[i]) if i < len(right) else line)
    return lines


def _push_right(line: Text, end: Text, width: int) -> None:
    line.truncate(max(8, width - end.cell_len - 1), overflow="ellipsis")
    line.pad_right(max(1, width - line.cell_len - end.cell_len))
    line.append_text(end)


def _folded(parts: Iterable[Text], width: int, indent: str = "  ") -> list[Text]:
    """Parts with a dot between, in as many lines as they need."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + 3 + part.cell_len <= width:
            lines[-1].append(" · ", "dim")
            lines[-1].append_text(part)
        else:
            lines.append(Text(indent) + part)
    return lines


def _said(text: str, width: int, style: str = "", indent: str = " ") -> list[Text]:
    """A sentence in as many lines as it needs."""
    wrapper = textwrap.TextWrapper(max(20, width), initial_indent=indent, subsequent_indent=indent)
    return [Text(line, style) for line in wrapper.wrap(text)]


def _bar(share: float, width: int, style: str = "green") -> Text:
    done = round(min(max(share, 0.0), 1.0) * width)
    return Text.assemble(("━" * done, style), ("─" * (width - done), "dim"))


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[Text]], width: int, left: int = 1
) -> list[Text]:
    """Aligned lines, the heading first. The first `left` columns stand to the left, the rest to the right; the first is
    cut where there is no room, and columns without a single value are left out."""
    kept = [i for i in range(len(columns)) if i < left or any(row[i].plain for row in rows)]
    cells = [[Text(columns[i], "dim") for i in kept], *([row[i] for i in kept] for row in rows)]
    widths = [max(row[i].cell_len for row in cells) for i in range(len(kept))]
    spare = width - 1 - sum(widths[1:]) - 2 * (len(kept) - 1)
    widths[0] = max(8, min(widths[0], spare))
    lines = []
    for row in cells:
        line = Text(" ")
        for i, cell in enumerate(row):
            cell = cell.copy()
            cell.truncate(widths[i], overflow="ellipsis")
            pad = widths[i] - cell.cell_len
            if i:
                line.append("  ")
            if kept[i] >= left:
                line.append(" " * pad)
                line.append_text(cell)
            else:
                cell.pad_right(pad)
                line.append_text(cell)
        lines.append(line)
    return lines


def _value(text: str, value: Any, style: str = "") -> Text:
    """`loss 0.4213`, the name dim."""
    return Text.assemble((f"{text} ", "dim"), (str(value), style))


def _metric(name: str) -> str:
    return metric_names.title(name).removesuffix(" accuracy").lower()


def _shown(name: str, value: float | None) -> str:
    """A number by its name: a metric, or a measure of a model."""
    if value is None:
        return "–"
    if name.startswith(("val_", "train_")) or name == "loss":
        return metric_names.shown(name, value, " ")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def _of(used: float, total: float) -> str:
    return f"{_gb(used)}/{_gb(total)} GB"


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _ago(told: Told, then: float | None) -> str:
    return "" if then is None else f"{console.duration(max(0.0, told['time'] - then))} ago"


def _errors(told: Told, width: int) -> _Block | None:
    said = [f"{e['section']}: {e['message']}" for e in told["errors"]]
    said += [f"{f['path']}: {f['error']}" for f in told["folders"] if f["error"]]
    if not said:
        return None
    items = [_said(f"! {line}", width, "yellow") for line in said]
    return _Block("Could not be read", items=items)


# ------------------------------------------------------------------------------------- runs in the view
def _runs_block(told: Told, width: int, most: int | None) -> _Block:
    """`most`: of how many runs there is anything to draw at best."""
    counts: dict[str, int] = {}
    for folder in told["folders"]:
        for state, n in folder["counts"].items():
            counts[state] = counts.get(state, 0) + n
    said = [f"{n} {state.replace('_', ' ')}" for state, n in counts.items() if n]
    shown = told["runs"][:most]
    block = _Block("Runs", ", ".join(said), hidden=len(told["runs"]) - len(shown))
    if not shown:
        where = ", ".join(f["path"] for f in told["folders"])
        missing = all(not f["exists"] for f in told["folders"])
        why = "there is no such folder yet" if missing else "nothing runs"
        more = "; --all shows what ended within a day" if any(map(counts.get, ENDED)) else ""
        # the folders last: their names may be longer than the line
        block.items = [[Text(f" {why}{more} ({where})", "dim")]]
    elif width >= WIDE:
        heading, *lines = _table(_RUN_COLUMNS, [_run_row(r) for r in shown], width)
        block.head = [heading]
        block.items = [
            [line, *_trouble(told, run, width)] for line, run in zip(lines, shown, strict=True)
        ]
    else:
        block.items = [_run_item(told, run, width) for run in shown]
    return block


def _run_name(run: Told) -> Text:
    state = run["state"]
    name = Text.assemble(
        (_DOT.get(state, "✗"), _COLOUR.get(state, "dim")), " ", (run["name"], "bold")
    )
    if run.get("search"):
        name.append(f" of {run['search']}", "dim")
    return name


def _or(value: Any) -> Any:
    return "?" if value is None else value


def _titled(one: Told, end: Text, width: int) -> Text:
    """A run's, a search's or a path's first line: its name, and to the right `end` and what is left, or the state."""
    if one["state"] != "running":
        end.append(f"  {one['state'].replace('_', ' ')}", _COLOUR.get(one["state"], "dim"))
    elif one.get("left_s") is not None:
        end.append(f"  {console.duration(one['left_s'])}", "bold").append(" left", "dim")
    line = Text(" ") + _run_name(one)
    _push_right(line, end, width - 1)
    return line


def _progress(one: Told, share: float | None, length: int = 10) -> Text:
    if share is None:
        return Text()
    bar = _bar(share, length, _COLOUR.get(one["state"], "dim"))
    return bar.append(f" {100 * min(share, 1.0):3.0f} %")


def _run_item(told: Told, run: Told, width: int) -> Item:
    end = Text()
    if run["epoch"] is not None:
        end.append("epoch ", "dim").append(f"{run['epoch']}/{_or(run['epochs'])}")
        if run["state"] in ACTIVE or run["state"] == "interrupted":
            step = f"{run['epoch_step']}/{_or(run['steps_per_epoch'])} "
            end.append(" step ", "dim").append(step)
            end.append_text(_progress(run, run["progress"], 10 if width >= 72 else 0))
    trouble = _trouble(told, run, width)
    return [_titled(run, end, width), *trouble, *_folded(_run_parts(told, run), width - 1, "   ")]


def _run_parts(told: Told, run: Told) -> Iterator[Text]:
    if run["train_loss"] is not None:
        yield _value("loss", f"{run['train_loss']:.4f}")
    if run["val_loss"] is not None:
        yield _value("val loss", f"{run['val_loss']:.4f}")
    monitor = run["monitor"]
    if monitor and monitor != "val_loss" and run["monitor_value"] is not None:
        yield _value(_metric(monitor), _shown(monitor, run["monitor_value"]))
    if monitor and run["best_value"] is not None:
        best = f"{_shown(monitor, run['best_value'])} in epoch {run['best_epoch']}"
        yield _value("best", best)
    if run["lr"] is not None:
        yield _value("lr", f"{run['lr']:.2e}")
    if run["images_per_s"] is not None:
        yield _value("img/s", f"{run['images_per_s']:,.0f}")
    if run["elapsed_s"] is not None:
        yield _value("for", console.duration(run["elapsed_s"]))
    if run["ended"] is not None:
        yield _value("ended", _ago(told, run["ended"]))
    if run["stages"] and run["stages"] > 1:
        yield _value("stage", f"{run['stage']}/{run['stages']}")
    if (run["attempt"] or 1) > 1:
        yield _value("attempt", run["attempt"])
    if run["device"]:
        yield Text(_device(run), "dim")
    if run["model"]:
        yield Text(run["model"], "dim")


_RUN_COLUMNS = (
    *("run", "epoch", "step", "", "loss", "val loss", "monitored", "best", "lr", "img/s"),
    *("for", "left", "on"),
)


def _run_row(run: Told) -> list[Text]:
    monitor, state = run["monitor"], run["state"]
    value = None if monitor == "val_loss" else run["monitor_value"]

    def cell(value: Any, shown: Callable[[Any], str]) -> Text:
        return Text("" if value is None else shown(value))

    left = cell(run["left_s"], console.duration)
    if state != "running":
        left = Text(state.replace("_", " "), _COLOUR.get(state, "dim"))
    return [
        _run_name(run),
        cell(run["epoch"], lambda e: f"{e}/{_or(run['epochs'])}"),
        cell(run["epoch_step"], lambda s: f"{s}/{_or(run['steps_per_epoch'])}"),
        _progress(run, run["progress"]),
        cell(run["train_loss"], lambda v: f"{v:.4f}"),
        cell(run["val_loss"], lambda v: f"{v:.4f}"),
        cell(value, lambda v: f"{_metric(monitor)} {_shown(monitor, v)}"),
        cell(run["best_value"], lambda v: f"{_shown(monitor, v)} ({run['best_epoch']})"),
        cell(run["lr"], lambda v: f"{v:.2e}"),
        cell(run["images_per_s"], lambda v: f"{v:,.0f}"),
        cell(run["elapsed_s"], console.duration),
        left,
        cell(run["device"], lambda _: _device(run)),
    ]


def _device(run: Told) -> str:
    return f"{run['workers']} × {run['device']}" if (run["workers"] or 1) > 1 else run["device"]


def _trouble(told: Told, run: Told, width: int) -> list[Text]:
    """What a reader should know, below a run."""
    said: list[tuple[str, str]] = []
    if run["state"] in ("interrupted", "not_started"):
        said.append((_gone(told, run), "red"))
    elif run["state"] in ("failed", "stopped") and run["reason"]:
        said.append((run["reason"], _COLOUR[run["state"]]))
    if run["silent"]:
        said.append((f"! silent: its last record came {_ago(told, run['last_record'])}", "yellow"))
    warnings = run["warnings"]
    if newest := warnings["newest"]:
        count = f"{warnings['count']} warnings, the newest " if warnings["count"] > 1 else ""
        said.append((f"! {count}{newest['name']}: {newest['message']}", "yellow"))
    if run["unread_lines"]:
        said.append((f"! {run['unread_lines']} lines of its journal are damaged", "yellow"))
    return [line for text, style in said for line in _said(text, width, style, "   ")]


def _gone(told: Told, one: Told) -> str:
    """Of what broke off, or never began."""
    if one["state"] == "not_started":
        return "its process was gone before it began; what it printed says why"
    when = _ago(told, one["last_record"])
    return f"its process is gone, its last record came {when}; the same command goes on"


def _others(told: Told, width: int) -> _Block | None:
    """Searches and distillations."""
    width = min(width, 120)  # the eye must find its way from the name to how far it is
    items = [_search_item(told, s, width) for s in told["searches"]]
    items += [_path_item(told, p, width) for p in told["distillations"]]
    return _Block("Searches and distillations", items=items) if items else None


def _search_item(told: Told, search: Told, width: int) -> Item:
    trials, state = search["trials"], search["state"]
    end = Text()
    if planned := trials["planned"]:
        end.append(f"{trials['done']}/{planned}").append(" trials ", "dim")
        end.append_text(_progress(search, trials["done"] / planned))
    parts = []
    if trials["running"]:
        parts.append(_value("running", trials["running"]))
    ends = [name for name in ("stopped_early", "failed", "refused") if trials[name]]
    parts += [_value(name.replace("_", " "), trials[name]) for name in ends]
    if search["best"]:
        best = ", ".join(f"{_metric(k)} {_shown(k, v)}" for k, v in search["best"].items())
        parts.append(_value("best", best))
    if search["elapsed_s"] is not None:
        parts.append(_value("for", console.duration(search["elapsed_s"])))
    trouble = []
    if state in ("interrupted", "not_started"):
        trouble = _said(_gone(told, search), width, "red", "   ")
    elif state == "failed" and search["reason"]:
        trouble = _said(search["reason"], width, "red", "   ")
    title = _titled({**search, "search": None}, end, width)  # it is no trial of another
    return [title, *trouble, *_folded(parts, width - 1, "   ")]


def _path_item(told: Told, path: Told, width: int) -> Item:
    done = sum(s["status"] == "finished" for s in path["steps"])
    parts = []
    for step in path["steps"]:
        if step["status"] != "finished":
            took = f" {console.duration(step['seconds'])}" if step["seconds"] is not None else ""
            parts.append(_value(step["status"], f"{step['name']}{took}"))
    if path["elapsed_s"] is not None:
        parts.append(_value("for", console.duration(path["elapsed_s"])))
    gone = _gone(told, path) if path["state"] == "interrupted" else ""
    title = _titled(path, Text(f"{_many(done, 'step')} done"), width)
    return [title, *_said(gone, width, "red", "   "), *_folded(parts, width - 1, "   ")]


# ---------------------------------------------------------------------------------- machines in the view
def _gpu_block(told: Told, width: int) -> _Block:
    gpus = told["gpus"] or {"reason": "unknown", "driver": None, "devices": []}
    nodes = [
        n for n in (told["ray"] or {}).get("nodes", []) if n["hardware"] and not _same(n, told)
    ]
    others = [(n, gpu) for n in nodes for gpu in n["hardware"]["gpus"]]
    block = _Block("GPUs", f"driver {gpus['driver']}" if gpus["driver"] else "")
    rows, below = [], []
    for gpu in gpus["devices"]:
        rows.append(_gpu_row(str(gpu["index"]), gpu, width))
        below.append(_gpu_lines(gpu))
    for node, gpu in others:
        rows.append(_gpu_row(f"{node['host'] or node['ip']} {gpu['index']}", gpu, width))
        below.append(_pid_lines(told, node, gpu))
    if rows:
        heading, *lines = _table(("gpu", "", "use", "memory", "°C", "power"), rows, width)
        block.head = [heading]
        block.items = [[line, *more] for line, more in zip(lines, below, strict=True)]
    if not gpus["devices"]:
        here = " on this machine" if told["ray"] else ""
        block.items.insert(0, [Text(f" {gpus['reason']}{here}", "dim")])
    return block


def _gpu_row(where: str, gpu: Told, width: int) -> list[Text]:
    name = Text.assemble(where, (f" {gpu['name'] or ''}", "dim"))
    if gpu.get("error"):
        return [name, Text(gpu["error"], "red"), *(Text() for _ in range(4))]
    use, used, total = (
        gpu[k] for k in ("utilization_percent", "memory_used_bytes", "memory_total_bytes")
    )
    power, limit = gpu["power_w"], gpu.get("power_limit_w")
    watts = "–" if power is None else f"{power:.0f}{f'/{limit:.0f}' if limit else ''} W"
    warm = gpu["temperature_c"]
    heat = "red" if warm and warm >= 90 else "yellow" if warm and warm >= 83 else ""
    return [
        name,
        Text() if use is None else _bar(use / 100, 10 if width < 100 else 16),
        Text("–" if use is None else f"{use:.0f} %"),
        Text("–" if used is None or not total else _of(used, total)),
        Text("–" if warm is None else f"{warm:.0f}", heat),
        Text(watts),
    ]


def _gpu_lines(gpu: Told) -> list[Text]:
    lines = [_process_line(p) for p in gpu["processes"]]
    for part in gpu["slices"]:
        used, total = part["memory_used_bytes"], part["memory_total_bytes"]
        memory = f"  {_of(used, total)}" if used is not None and total else ""
        lines.append(Text(f"   slice {part['index']} {part['name'] or ''}{memory}", "dim"))
        lines += [_process_line(p, "     ") for p in part["processes"]]
    return lines


def _process_line(process: Told, indent: str = "   ") -> Text:
    memory = process["memory_bytes"]
    size = "" if memory is None else f" {_gb(memory)} GB"
    name = process["run"] or process["name"] or "a process"
    return Text.assemble(
        indent, (name, "" if process["run"] else "dim"), (f" ({process['pid']}){size}", "dim")
    )


def _pid_lines(told: Told, node: Told, gpu: Told) -> list[Text]:
    """Of another node the dashboard tells the processes' numbers alone; the runs' journals know some of them."""
    ours = {(r["host"], r["pid"]): r["name"] for r in told["runs"] if r["state"] in ACTIVE}
    lines = []
    for pid in gpu["pids"]:
        name = ours.get((node["host"], pid))
        lines.append(
            Text.assemble("   ", (name or "a process", "" if name else "dim"), (f" ({pid})", "dim"))
        )
    return lines


def _same(node: Told, told: Told) -> bool:
    return node["host"] == told["host"]


def _machine_block(told: Told, width: int) -> _Block:
    m = told["machine"]
    if not m:
        return _Block("Machine", items=[[Text(" unknown", "dim")]])
    parts = []
    if m["cpu_percent"] is not None:
        bar = _bar(m["cpu_percent"] / 100, 10)
        busy = _value("CPU", "") + bar + f" {m['cpu_percent']:.0f} % of {m['cores']:g} cores"
        parts.append(busy)
    else:
        parts.append(_value("CPU", f"{m['cores']:g} cores"))
    parts.append(_value("load", " ".join(f"{one:.1f}" for one in m["load"])))
    share = 100 * m["memory_used_bytes"] / max(1, m["memory_total_bytes"])
    bar = _bar(share / 100, 10, _heat(share, 85, 95))
    memory = _of(m["memory_used_bytes"], m["memory_total_bytes"])
    parts.append(_value("memory", "") + bar + f" {memory}")
    if m["swap_total_bytes"]:
        share = 100 * m["swap_used_bytes"] / m["swap_total_bytes"]
        swap = _of(m["swap_used_bytes"], m["swap_total_bytes"])
        parts.append(_value("swap", swap, "yellow" if share > 50 else ""))
    note = "limits of its container" if m["container"] else ""
    return _Block(f"Machine {m['host']}", note, head=_folded(parts, width, " "))


def _heat(share: float, warm: float, hot: float) -> str:
    return "red" if share >= hot else "yellow" if share >= warm else "green"


def _cache_block(told: Told, width: int) -> _Block:
    block = _Block("Cache")
    for cache in told["caches"]:
        parts = [Text(cache["path"])]
        if not cache["exists"]:
            parts.append(Text("nothing there yet", "dim"))
        else:
            size = store.gigabytes(cache["bytes"])
            limit = cache["limit_bytes"]
            if limit:
                share = (cache["bytes"] + cache["pending_bytes"]) / limit
                bar = _bar(share, 10, _heat(100 * share, 95, 101))
                parts.append(Text.assemble(bar, f" {size} of {limit / 1e9:g} GB"))
            else:
                parts.append(Text.assemble(size, (" (no limit known)", "dim")))
            used = sum(bool(s["users"]) for s in cache["sets"])
            sets = _many(len(cache["sets"]), "set") + (" of local copies" if cache["local"] else "")
            parts.append(Text(f"{sets}, {used} in use", "dim"))
        lines = _folded(parts, width, " ")
        for one in [s for s in cache["sets"] if s["users"]]:
            line = Text.assemble(f"   {one['key'][:12]} ", (store.gigabytes(one["bytes"]), "dim"))
            if one["pending_bytes"]:
                share = 1 - one["pending_bytes"] / max(1, one["bytes"])
                line.append(f" being built, {100 * share:.0f} %", "cyan")
            users = [u for u in one["users"] if u != "its builder"]
            line.append(f" {'; '.join(users)}" if users else "", "dim")
            lines.append(line)
        block.items.append(lines)
    return block


def _disk_block(told: Told, width: int) -> _Block:
    colours = {"ok": "", "low": "yellow", "critical": "bold red"}
    rows = []
    for disk in told["disks"]:
        used = 1 - disk["free_percent"] / 100
        bar = _bar(used, 10, colours[disk["state"]].removeprefix("bold ") or "green")
        size = f"{_gb(disk['free_bytes'])} of {_gb(disk['total_bytes'])} GB"
        free = Text.assemble(
            (size, colours[disk["state"]]), (f" ({disk['free_percent']:.0f} %)", "dim")
        )
        rows.append([Text(", ".join(disk["for"])), bar, free])
    heading, *lines = _table(("disk of", "used", "free"), rows, width) if rows else [Text()]
    return _Block("Disks", head=[heading], items=[[line] for line in lines])


# -------------------------------------------------------------------------------------- Ray in the view
def _ray_blocks(told: Told, width: int) -> list[_Block]:
    ray = told["ray"]
    if not ray:
        return []
    title = f"Ray {ray['address']}"
    if ray["reason"]:
        style = "dim" if ray["reason"] == "asking" else "yellow"
        return [_Block(title, items=[_said(ray["reason"], width, style)])]
    late = ray["age_s"] is not None and ray["age_s"] > 3 * RAY_EVERY_S
    note = _many(len(ray["nodes"]), "node") + (f", {ray['age_s']:.0f} s old" if late else "")
    parts = [
        _value(r["name"].replace("object_store_memory", "object store"), _amounts(r))
        for r in ray["resources"]
    ]
    block = _Block(title, note, head=_folded(parts, width, " "))
    rows = [_node_row(node) for node in ray["nodes"]]
    columns = ("node", "role", "state", "CPU", "GPU", "busy", "memory", "disk free")
    if rows:
        heading, *lines = _table(columns, rows, width, left=3)
        block.head.append(heading)
        block.items = [[line] for line in lines]
    if ray["hardware_reason"]:
        said = f"no use of the nodes' hardware: {ray['hardware_reason']}"
        block.items.append(_said(said, width, "dim"))
    for node in ray["dead"][:MOST_DEAD]:
        name = node["host"] or node["ip"] or node["id"][:8]
        why = f": {node['reason']}" if node["reason"] else ""
        line = f" ✗ {name} {node['role'] or ''} gone {_ago(told, node['time'])}{why}"
        block.items.append([Text(line, "dim")])
    blocks = [block, _jobs_block(told, ray, width)]
    if ray["autoscaler"]:
        blocks.append(_autoscaler_block(told, ray["autoscaler"], width))
    return blocks


def _amounts(resource: Told) -> str:
    if resource["name"].endswith("memory"):
        return _of(resource["used"], resource["total"])
    return f"{resource['used']:g}/{resource['total']:g}"


def _node_row(node: Told) -> list[Text]:
    have = {r["name"]: _amounts(r) for r in node["resources"]}
    hardware, colour = node["hardware"], {"draining": "yellow", "idle": "dim"}
    role = node["role"] or ("head" if node["head"] else node["type"] or "")
    role = f"{role} {node['market']}" if node["market"] else role
    name = Text(node["host"] or node["ip"] or node["id"][:8])
    if node["host"] and node["ip"]:
        name.append(f" {node['ip']}", "dim")
    row = [name, Text(role), Text(node["state"], colour.get(node["state"], "green"))]
    row += [Text(have.get("CPU", "")), Text(have.get("GPU", ""))]
    if not hardware:
        return [*row, Text(), Text(), Text()]
    cpu, free, total = (hardware[k] for k in ("cpu_percent", "disk_free_bytes", "disk_total_bytes"))
    low = bool(free is not None and total and free / total < 0.1)
    return [
        *row,
        Text("" if cpu is None else f"{cpu:.0f} %"),
        Text(_of(hardware["memory_used_bytes"], hardware["memory_total_bytes"])),
        Text("" if free is None else f"{_gb(free)} GB", "red" if low else ""),
    ]


def _jobs_block(told: Told, ray: Told, width: int) -> _Block:
    block = _Block("Jobs", "" if ray["jobs"] else "none")
    colours = {"RUNNING": "green", "PENDING": "cyan", "FAILED": "red", "STOPPED": "yellow"}
    for job in ray["jobs"]:
        status = job["status"]
        line = Text.assemble(
            " ", (status.lower(), colours.get(status, "dim")), " ", (job["id"], "bold")
        )
        if job["ended"]:
            line.append(f" {_ago(told, job['ended'])}", "dim")
        elif job["started"]:
            line.append(f" for {console.duration(told['time'] - job['started'])}", "dim")
        lines = [line, Text(f"   {job['entrypoint']}", "dim")]
        if status in ("FAILED", "PENDING") and job["message"]:
            lines.append(Text(f"   {job['message']}", colours[status]))
        block.items.append(lines)
    return block


def _autoscaler_block(told: Told, auto: Told, width: int) -> _Block:
    block = _Block("Autoscaler", auto["version"] or "none")
    lines: list[Text] = []
    if auto["version"] and auto["silent_s"] is None:
        lines.append(Text(" ! it has not reported yet", "yellow"))
    elif auto["version"] and auto["silent_s"] > 60:
        lines.append(
            Text(f" ! it has said nothing for {console.duration(auto['silent_s'])}", "yellow")
        )
    for launch in auto["launching"]:
        about = f": {launch['details']}" if launch["details"] else ""
        lines.append(Text(f" launching {launch['count']} × {launch['type']}{about}", "cyan"))
    hopeless = [{**d, "count": 0} for d in auto["infeasible"]]
    waiting = [d for d in auto["pending"] if {**d, "count": 0} not in hopeless]
    lines += [Text(f" waiting: {_demand(d)}") for d in waiting]
    lines += [Text(f" ! no node type can hold {_demand(d)}", "red") for d in auto["infeasible"]]
    for failed in auto["failed"]:
        when = f" {_ago(told, failed['time'])}" if failed["time"] else ""
        said = f"! {failed['count']} × {failed['type']} failed{when}: {failed['reason']}"
        lines += _said(said, width, "red")
    block.items = [[line] for line in lines or [Text(" nothing is waited for", "dim")]]
    return block


def _demand(demand: Told) -> str:
    resources = ", ".join(f"{name} {_amount(name, n)}" for name, n in demand["resources"].items())
    labels = ", ".join(f"{k.rpartition('/')[2]}={v}" for k, v in demand["labels"].items())
    group = " in a group" if demand["group"] else ""
    return f"{demand['count']} × ({resources}){f' on {labels}' if labels else ''}{group}"


def _amount(name: str, amount: float) -> str:
    return f"{_gb(amount)} GB" if name.endswith("memory") else f"{amount:g}"
