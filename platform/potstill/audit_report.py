"""An audit from the config to the page: prepare, measure, extract features, judge, write.

B samples, C channels, h x w a feature map, n images, D features.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill import console, runs
from potstill.config import AuditConfig
from potstill.errors import UserError
from potstill.registry import load_plugins
from potstill.storage import home

if TYPE_CHECKING:
    from torch import Tensor

    from potstill.data.audit import Duplicates, Finding, Images
    from potstill.data.cache import Cache
    from potstill.data.prepare import Prepared
    from potstill.data.sources import Rows

MOST_MAPS = 5
"""Feature maps of a model that are pooled, from its first block to its last."""


def audit_dataset(config: AuditConfig) -> dict[str, Any]:
    """Look a dataset over. Prints a summary, writes audit.html, audit.json and CSVs, returns audit.json's content.

    Raises UserError for a mistake in the config and, with `strict`, where something serious was found.
    """
    load_plugins(config.plugins)
    _check(config)
    from potstill.data.prepare import prepared

    began = time.monotonic()
    features_of = _features(config) if {"labels", "splits"} & set(config.checks) else None
    with prepared(config.data, config.cache, "an audit") as found:
        return _look_over(config, found, features_of, began)


def _look_over(
    config: AuditConfig, prepared: Prepared, features_of: Features | None, began: float
) -> dict[str, Any]:
    from potstill.data import audit
    from potstill.data.cache import open_cache
    from potstill.data.sources import list_rows

    cache = open_cache(prepared.cache_dir, config.cache.verify)
    with console.progress("Measuring images", sum(cache.counts.values())) as update:
        images = audit.measure(cache, update)
    seconds = {"measure": time.monotonic() - began}
    chosen = _choose(len(images), config.max_images, config.seed)

    def timed(name: str, step: Callable[[], Any]) -> Any:
        start = time.monotonic()
        result = step()
        seconds[name] = time.monotonic() - start
        return result

    # groups keep near-duplicates in one fold, so they are needed whatever is looked for
    found: Duplicates = timed(
        "duplicates",
        lambda: audit.near_duplicates(images, config.near_bits, config.near_correlation),
    )
    judged: tuple[Any, ...] = ()
    if features_of is not None:
        features, source = timed("features", lambda: features_of(cache, images, chosen))
        judged = (images, chosen, features, found.group, config.folds, config.seed, source)
    steps: dict[str, Callable[[], Finding]] = {
        "duplicates": lambda: audit.duplicates_finding(images, found),
        "labels": lambda: audit.label_suspects(*judged),
        "balance": lambda: audit.balance(images),
        "history": lambda: _history(config, images, chosen, found.group, list_rows(config.data)),
        "splits": lambda: audit.split_shift(*judged),
        "blank": lambda: audit.blank(images),
    }
    findings: list[Finding] = [
        timed(f"judge {name}", step) for name, step in steps.items() if name in config.checks
    ]
    findings.sort(key=lambda f: audit.SEVERITIES.index(f.severity))
    seconds["all"] = time.monotonic() - began
    notes = []
    if len(chosen) < len(images):
        notes.append(
            f"Labels, history and splits were judged on {len(chosen):,} of {len(images):,} images (max_images)."
        )
    output = home() / (Path(config.output).expanduser() if config.output else f"audits/{cache.key}")
    output.mkdir(parents=True, exist_ok=True)
    about = {
        "root": str(prepared.report["root"]),
        "cache": cache.key,
        "images": len(images),
        "judged": len(chosen),
        "classes": len(cache.classes),
        "counts": cache.counts,
        "quarantined": prepared.report["quarantined"]["total"],
        "notes": notes,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    result = {**about, "findings": [_as_json(f) for f in findings]}
    _write_tables(output, findings)
    runs.write_json(output / "audit.json", result)
    runs.atomic_write(output / "audit.html", _page(about, findings, cache, images, config))
    _say(about, findings, output)
    serious = [f.title for f in findings if f.severity == "serious"]
    if config.strict and serious:
        raise UserError(
            f"strict=true allows no serious finding, got {len(serious)} ({', '.join(serious)}); see {output / 'audit.html'}"
        )
    return result


def _check(config: AuditConfig) -> None:
    model = config.model
    if config.from_run and model.name:
        raise UserError(
            f"from_run and model.name both name a model: set one of them, got {config.from_run!r} and {model.name!r}"
        )
    if (model.init_from or model.pretrained) and not model.name:
        key = "init_from" if model.init_from else "pretrained"
        raise UserError(
            f"model.{key} needs model.name, got null; such as model.name=tf_efficientnet_lite0"
        )
    if model.name and bool(model.init_from) == model.pretrained:
        raise UserError(
            f"model.name={model.name} needs weights from one place, got model.init_from={model.init_from} and "
            f"model.pretrained={str(model.pretrained).lower()}; set model.init_from=<file> or model.pretrained=true"
        )
    if config.from_run:
        runs.open_run(config.from_run, "from_run")
    if model.init_from and not Path(model.init_from).expanduser().exists():
        raise UserError(
            f"model.init_from must be a .safetensors or .pth file, got {model.init_from!r}, which does not exist"
        )


def _choose(n: int, most: int | None, seed: int) -> np.ndarray:
    if most is None or most >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def _history(
    config: AuditConfig, images: Images, chosen: np.ndarray, groups: np.ndarray, rows: Rows
) -> Finding:
    """Read the chosen files' headers from the source, and judge them."""
    from potstill.data import audit

    place = {i: row for row, i in enumerate(rows.id.tolist())}
    at = np.array([place[i] for i in images.id[chosen].tolist()], np.int64)
    back = dict(zip(at.tolist(), chosen.tolist(), strict=True))
    with (
        tempfile.TemporaryDirectory(prefix="potstill-audit-") as folder,
        rows.staged(Path(folder), at) as staged,
        console.progress("Reading headers", len(at)) as update,
    ):
        read, columns = audit.read_headers(staged.open().read, at, update)
    kept = np.array([back[i] for i in read.tolist()], np.int64)
    return audit.history(images, kept, columns, groups, config.folds, config.seed)


# ------------------------------------------------------------------------------------------ features
Features = Callable[["Cache", "Images", np.ndarray], tuple[np.ndarray, str]]
"""(features float32 [n, D] of the chosen images, where they are from)."""


def _features(config: AuditConfig) -> Features:
    """What makes features, its model built and its weights read. Raises UserError."""
    from potstill.data.audit import plain_features

    if not config.from_run and not config.model.name:
        return lambda cache, images, rows: (
            plain_features(images, rows),
            "colours and textures (no model was named: suspects are weaker)",
        )
    import torch

    on_gpu = torch.cuda.is_available() and config.use_gpu is not False
    if config.use_gpu and not on_gpu:
        raise UserError("use_gpu must be false or null on a machine without a GPU, got true")
    device = torch.device("cuda" if on_gpu else "cpu")
    if config.from_run:
        from potstill.assemble import image_px, load_model

        run_dir = runs.open_run(config.from_run, "from_run")
        model, _, trained = load_model(run_dir)
        px, source = image_px(trained), f"the run {run_dir.name}"
    else:
        from potstill.models.images import TimmModel
        from potstill.models.weights import init_from

        assert config.model.name
        px = config.data.decode.image_px
        model = TimmModel(
            2, name=config.model.name, pretrained=config.model.pretrained, image_px=px
        )
        if config.model.init_from:
            init_from(model, config.model.init_from, ["", " "])
        source = config.model.name
    network = model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def extract(cache: Cache, images: Images, rows: np.ndarray) -> tuple[np.ndarray, str]:
        from potstill.data.augment import resize

        splits = [name for name in ("train", "val", "test") if len(cache.split(name))]
        starts = np.cumsum([0, *(len(cache.split(name)) for name in splits)])
        parts = []
        with torch.inference_mode(), console.progress("Extracting features", len(rows)) as update:
            for first in range(0, len(rows), config.batch_size):
                part = rows[first : first + config.batch_size]
                owner = np.searchsorted(starts, part, side="right") - 1
                pixels = np.concatenate(
                    [
                        cache.split(splits[k]).read(part[owner == k] - starts[k])
                        for k in np.unique(owner)
                    ]
                )
                batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
                parts.append(pooled(network, resize(batch, px)).float().cpu().numpy())
                update(first + len(part))
        return np.concatenate(parts), source

    return extract


def pooled(model: Any, images: Tensor) -> Tensor:
    """Mean and deviation of a network's feature maps, from its first block to its last. [B, 3, H, W] -> [B, D].

    Early maps see textures and late ones things: together they told flipped labels of plants twice as
    well as the last layer's features. Where a family gives no maps, those features are all there is.
    """
    import torch

    network: Any = getattr(model, "net", None)
    if hasattr(network, "forward_intermediates"):
        normal = (images - model.mean) / model.std
        maps = network.forward_intermediates(normal, intermediates_only=True)
        if maps and all(m.ndim == 4 for m in maps):
            spaced = np.unique(np.linspace(0, len(maps) - 1, MOST_MAPS).round().astype(int))
            maps = [maps[k] for k in spaced]
            # a map of one pixel has no deviation
            parts = [m.mean((2, 3)) for m in maps] + [
                m.std((2, 3), correction=0) for m in maps if m.shape[2] * m.shape[3] > 1
            ]
            return torch.cat(parts, 1)
    outputs = model({"image": images})
    if "features" not in outputs:
        raise UserError("model.name must be a model with features; try tf_efficientnet_lite0")
    return outputs["features"]


# ------------------------------------------------------------------------------------------- results
def _as_json(finding: Finding) -> dict[str, Any]:
    keys = ("check", "title", "severity", "count", "evidence", "remedy", "facts")
    return {**{k: getattr(finding, k) for k in keys}, "table": f"{finding.check}.csv"}


def _write_tables(output: Path, findings: Sequence[Finding]) -> None:
    for finding in findings:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(finding.rows[0]) if finding.rows else ["nothing found"])
        writer.writeheader()
        writer.writerows(finding.rows)
        runs.atomic_write(output / f"{finding.check}.csv", text.getvalue())


def _say(about: dict[str, Any], findings: Sequence[Finding], output: Path) -> None:
    console.table(
        ["finding", "severity", "count", "evidence"],
        [[f.title, f.severity, f.count, f.evidence] for f in findings],
        title=f"{about['root']}: {about['images']:,} images, {about['classes']:,} classes",
    )
    for note in about["notes"]:
        console.say(note)
    console.say(f"Written: {output / 'audit.html'} ({console.duration(about['seconds']['all'])})")


# ---------------------------------------------------------------------------------------------- page
CSS = """
:root { --ink: #1f2933; --muted: #66727f; --line: #e3e8ee; --paper: #fff; }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #f6f8fa; margin: 0 }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 18px; margin: 0 }
.muted { color: var(--muted) } p { margin: 8px 0 } a { color: #1c5f9e }
section, .card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 18px 0 }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--muted); font-weight: 600 } tr:last-child td { border-bottom: 0 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.badge { display: inline-block; border-radius: 20px; padding: 0 10px; font-size: 13px; font-weight: 600; white-space: nowrap }
.serious { background: #fbe3e1; color: #a1231a } .warning { background: #fdf0d5; color: #8a5a00 }
.note { background: #e4eef8; color: #1c5f9e } .ok { background: #e1f3e6; color: #1d6b37 }
.title { display: flex; gap: 12px; align-items: center }
.strips { display: flex; flex-wrap: wrap; gap: 14px 22px; margin-top: 14px }
.strip { max-width: 100% } .strip > b { display: block; font-size: 13px; line-height: 1.3; margin-bottom: 4px; overflow-wrap: anywhere }
.images { display: flex; flex-wrap: wrap; gap: 8px }
figure { margin: 0; width: 128px } figure img { width: 128px; height: 128px; border-radius: 6px; display: block; background: #eee }
figcaption { font-size: 11.5px; line-height: 1.35; color: var(--muted); overflow-wrap: anywhere; margin-top: 3px }
figcaption b { color: var(--ink); font-weight: 600 }
details { margin-top: 12px } summary { cursor: pointer; color: var(--muted) }
.scroll { overflow-x: auto }
"""

_IMAGES_A_STRIP = 8
_ROWS_ON_PAGE = 30


def _page(
    about: dict[str, Any],
    findings: Sequence[Finding],
    cache: Cache,
    images: Images,
    config: AuditConfig,
) -> str:
    text = html.escape
    thumbnail = _Thumbnails(cache)
    counts = ", ".join(f"{n:,} {split}" for split, n in about["counts"].items())
    out = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Audit of {text(Path(about['root']).name)}</title><style>{CSS}</style></head><body><main>",
        f"<h1>Audit of {text(Path(about['root']).name)}</h1>",
        f'<div class="muted">{text(about["root"])} · {about["images"]:,} images ({counts}) · {about["classes"]:,} '
        f"classes · {about['quarantined']:,} unreadable · took {console.duration(about['seconds']['all'])}</div>",
        *(f'<p class="muted">{text(note)}</p>' for note in about["notes"]),
        '<div class="card"><table><tr><th>Finding</th><th>Severity</th><th style="text-align:right">Count</th><th>Evidence</th></tr>',
    ]
    out += [
        f'<tr><td><a href="#{f.check}">{text(f.title)}</a></td><td><span class="badge {f.severity}">{f.severity}</span></td>'
        f'<td class="n">{f.count:,}</td><td>{text(f.evidence)}</td></tr>'
        for f in findings
    ]
    out.append("</table></div>")
    for f in findings:
        out += [
            f'<section id="{f.check}"><div class="title"><h2>{text(f.title)}</h2><span class="badge {f.severity}">{f.severity}</span></div>',
            f"<p>{text(f.evidence)}</p>",
            f'<p class="muted">{text(f.remedy)}</p>' if f.remedy else "",
        ]
        shown = f.strips[: config.most_shown]
        if shown:
            out.append('<div class="strips">')
            for strip in shown:
                wide = min(len(strip.images), _IMAGES_A_STRIP) * 136 - 8
                out.append(
                    f'<div class="strip" style="width:{wide}px"><b>{text(strip.caption)}</b><div class="images">'
                )
                for k, i in enumerate(strip.images[:_IMAGES_A_STRIP]):
                    note = f"<b>{text(strip.notes[k])}</b><br>" if strip.notes else ""
                    out.append(
                        f'<figure><img alt="" src="{thumbnail(i)}"><figcaption>{note}{text(images.class_of(i))}<br>'
                        f"{images.split[i]} · {text(Path(images.path[i]).name)}</figcaption></figure>"
                    )
                more = len(strip.images) - _IMAGES_A_STRIP
                out.append(f'<span class="muted">+{more:,}</span>' if more > 0 else "")
                out.append("</div></div>")
            out.append("</div>")
        left = len(f.strips) - len(shown)
        where = f'<a href="{f.check}.csv">{f.check}.csv</a>'
        if left > 0:
            out.append(f'<p class="muted">… and {left:,} more: all are in {where}.</p>')
        if f.rows:
            out += _table(f, where)
        out.append("</section>")
    return "\n".join(out) + "\n</main></body></html>\n"


def _table(finding: Finding, where: str) -> list[str]:
    text = html.escape
    columns = list(finding.rows[0])
    open_ = " open" if not finding.strips else ""
    out = [
        f"<details{open_}><summary>Table ({len(finding.rows):,} rows, {where})</summary>",
        '<div class="scroll"><table><tr>',
        *(
            f"<th{' class=n' if _is_number(finding.rows[0][c]) else ''}>{text(c.replace('_', ' '))}</th>"
            for c in columns
        ),
        "</tr>",
    ]
    for row in finding.rows[:_ROWS_ON_PAGE]:
        cells = []
        for value in row.values():
            if isinstance(value, bool):
                value = "yes" if value else "no"
            number = _is_number(value)
            shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
            cells.append(f"<td{' class=n' if number else ''}>{text(shown)}</td>")
        out.append(f"<tr>{''.join(cells)}</tr>")
    more = len(finding.rows) - _ROWS_ON_PAGE
    out.append("</table></div>")
    out.append(f'<p class="muted">… and {more:,} more rows.</p>' if more > 0 else "")
    out.append("</details>")
    return out


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Thumbnails:
    """Images of the cache as data URLs of 128 px."""

    def __init__(self, cache: Cache) -> None:
        splits = [name for name in ("train", "val", "test") if len(cache.split(name))]
        self._readers = [cache.split(name) for name in splits]
        self._starts = np.cumsum([0, *map(len, self._readers)])

    def __call__(self, i: int) -> str:
        from PIL import Image

        which = int(np.searchsorted(self._starts, i, side="right")) - 1
        image = Image.fromarray(self._readers[which].read([i - int(self._starts[which])])[0])
        image.thumbnail((128, 128))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
