"""What a finished run is worth on some images: metrics, a table by class, evaluation.json and pictures."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import console, metric_names, runs
from potstill.config import Data, EvaluateConfig, EvaluateData, load_run_config
from potstill.data.cache import Cache, hash_prefixes, open_cache
from potstill.data.prepare import check, prepared
from potstill.errors import UserError
from potstill.predictions import Predictions, calibration, per_class
from potstill.registry import load_plugins
from potstill.replica import send_back
from potstill.storage import home

if TYPE_CHECKING:
    from torch import Tensor


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a run on its own data or, with `data.root`, on a folder that it has never seen.

    Classes are matched by name; the folder may lack some of them, but not hold others. Images that the run
    was trained on are counted, and warned of. Decisions of a binary or multi-label task are taken at the thresholds
    that the checkpoint keeps, chosen on the run's validation images; none is chosen here. Writes evaluation.json,
    reliability.png, and confusion_matrix.png or curves.png, in the object store too where the run is named by a URI and `output` is null.
    Returns the content of evaluation.json (NaN where the file says null). Raises UserError.
    """
    if config.from_run is None:
        raise UserError(
            "from_run must name the folder of a run, got null; add from_run=runs/<name>"
        )
    run_dir = runs.open_run(config.from_run, "from_run")
    about = runs.read_json(run_dir / "run.json")
    known: list[str] = about["classes"]
    trained = load_run_config(run_dir)
    load_plugins([*trained.plugins, *config.plugins])
    kind = trained.task.get("kind", "single_label")
    metrics = trained.task.get("metrics") or [] if config.metrics is None else config.metrics
    metric_names.check(kind, metrics, key="metrics")
    data = _data(config.data, trained.data)
    # its own images as it saw them: raw pixels or JPEGs
    plan = check(data, config.cache, for_training=False, prefer=about["dataset"]["key"])
    unknown = sorted(set(plan.rows.classes) - set(known))
    if unknown:
        raise UserError(
            f"data.root must hold classes that {run_dir.name} knows, got {len(unknown)} it does not: "
            f"{', '.join(unknown[:5])}; choose the others with data.classes (it knows {', '.join(known[:5])}, …)"
        )
    have = [s for s in ("val", "test", "train") if s in set(plan.rows.split)]
    if config.subset not in have:
        raise UserError(
            f"subset must be one that {data.root} has ({', '.join(have)}), got {config.subset!r}; "
            f"add subset={have[0]}"
        )
    # it reads the whole checkpoint, and refuses before anything is decoded
    checkpoint = runs.pick_checkpoint(run_dir, config.checkpoint)
    user = f"evaluation of {run_dir.name}"
    with prepared(data, config.cache, user, for_training=False, prefer=plan.key) as found:
        cache = open_cache(
            found.cache_dir, config.cache.verify, config.cache.local_dir, config.cache.max_gb
        )
        warnings = trained_on(run_dir, cache, config.subset)
        for warning in warnings:
            console.warn(f"{warning['name']}: {warning['message']}")
        measured, predictions = measure(config, run_dir, checkpoint, cache, metrics)
        result = {
            "run": run_dir.name,
            "checkpoint": checkpoint.folder.name,
            **measured,
            "warnings": warnings,
            "quarantined": found.report.get("quarantined", {}),
            "data": {"root": str(plan.rows.root), "key": plan.key, "subset": config.subset},
            "absent_classes": sorted(set(known) - set(plan.rows.classes)),
        }
    output = (
        home() / Path(config.output).expanduser()
        if config.output
        else run_dir / "evaluations" / f"{plan.key}-{config.subset}"
    )
    written = [output / "evaluation.json"]
    for name, picture in _pictures(predictions, known, config.subset).items():
        written.append(output / f"{name}.png")
        runs.atomic_write(written[-1], picture)
    runs.write_json(written[0], result)
    _say(result, output)
    if not config.output:
        send_back(config.from_run, "from_run", written)
    return result


def _data(asked: EvaluateData, own: Data) -> Data:
    """The run's own data and decoding, with what was asked for instead."""
    data = copy.deepcopy(own)
    if asked.root is not None:
        data.root, data.classes, data.max_samples = asked.root, None, None
        data.source, data.unlabeled = asked.source or own.source, None
        # no split is made: a folder without splits is evaluated whole, one that has them as it is
        data.split.val = 1.0
    for name in ("classes", "max_samples", "max_bad_fraction", "allow_outside"):
        if (value := getattr(asked, name)) is not None:
            setattr(data, name, value)
    columns = {k: v for k, v in vars(asked.columns).items() if v is not None}
    data.columns = dataclasses.replace(data.columns, **columns)
    return data


def trained_on(run_dir: Path, cache: Cache, subset: str) -> list[dict[str, str]]:
    """A warning, if the run was trained on some of these images; they are known by their content."""
    import numpy as np

    known = run_dir / "train_hashes.npy"
    if not known.exists():
        message = (
            f"{known} is missing: it cannot be told whether the run was trained on these images"
        )
        return [{"name": "trained_on_unknown", "message": message}]
    images = hash_prefixes(cache.split(subset).hashes)
    seen = int(np.isin(images, np.load(known)).sum())
    if not seen:
        return []
    message = (
        f"the run was trained on {seen} of these {len(images)} images: the result is flattered"
    )
    return [{"name": "trained_on", "message": message}]


def measure(
    config: EvaluateConfig,
    run_dir: Path,
    checkpoint: runs.Checkpoint,
    cache: Cache,
    metrics: Sequence[str],
) -> tuple[dict[str, Any], Predictions]:
    """A run's checkpoint on `config.subset` of these images, whose classes it knows, in batches and views of `config`.

    `metrics`: those besides what always is measured. Returns {kind, samples, top_k, metrics, per_class, calibration,
    and thresholds where the task has them}, and the predictions.
    """
    import torch

    from potstill.assemble import Predictor
    from potstill.data.batches import Batches
    from potstill.metrics import evaluate, top_k

    predictor = Predictor(run_dir, checkpoint, config.precision, config.use_gpu, config.tta)
    known = predictor.classes
    batches = Batches(cache.split(config.subset), config.batch_size, seed=0, shuffle=False)
    place = torch.tensor([known.index(name) for name in cache.classes])

    def on_device():
        with console.progress("Evaluating", batches.steps) as update:
            for done, batch in enumerate(batches.epoch(0), start=1):
                padded = not bool(batch["label_weight"].all())
                batch["label"] = _placed(batch["label"], place, len(known))
                batch = {k: v.to(predictor.device, non_blocking=True) for k, v in batch.items()}
                yield batch, padded
                update(done)

    numbers, found = evaluate(
        lambda batch: predictor.logits(batch["image"]),
        on_device(),
        predictor.kind,
        len(known),
        predictor.device,
        contextlib.nullcontext,  # the predictor has its own
        metrics,
        0.5 if predictor.thresholds is None else predictor.thresholds,
    )
    sureness = calibration(found)
    rows = [row for row in per_class(found, known) if row["support"]]
    measured = {
        "kind": predictor.kind,
        "samples": len(found.id),
        "top_k": top_k(len(known)),
        "metrics": numbers,
        "per_class": sorted(rows, key=lambda row: known.index(row["class"])),
        "calibration": {"error": sureness.error, "bins": sureness.rows()},
    }
    if found.thresholds is not None:
        chosen = found.thresholds.tolist()
        measured["thresholds"] = dict(zip(predictor.outputs, chosen, strict=True))
    return measured, found


def _placed(label: Tensor, place: Tensor, num_known: int) -> Tensor:
    """Labels in the order of the run's classes; `place` [K] says where each of the data's classes stands there."""
    import torch

    if label.ndim == 1:
        return torch.where(label >= 0, place[label.clamp(min=0)], label)
    known = label.new_zeros(len(label), num_known)
    known[:, place] = label
    return known


def _pictures(found: Predictions, classes: list[str], subset: str) -> dict[str, bytes]:
    from potstill.report import png, prediction_figures

    return {name: png(draw()) for name, draw in prediction_figures(found, classes, subset).items()}


def _say(result: dict[str, Any], output: Path, most: int = 20) -> None:
    rows = sorted(result["per_class"], key=lambda row: row["f1"])
    columns = {"precision": "precision", "recall": "recall", "f1": "F1"}
    if result["kind"] == "multi_label":
        columns |= {"average_precision": "average precision", "threshold": "threshold"}
    shown = [
        [r["class"], r["support"], *(metric_names.shown(k, r[k]) for k in columns)]
        for r in rows[:most]
    ]
    console.table(
        ["class", "images", *columns.values()],
        shown,
        title=f"{result['run']} by class, weakest first"
        + (f" ({most} of {len(rows)})" if len(rows) > most else ""),
    )
    m, kind, k = result["metrics"], result["kind"], result["top_k"]
    keys = [key for key in m if key != "top5_acc" or k > 1]
    said = (
        f"{metric_names.title(key, kind, k).removesuffix(' accuracy')}: {metric_names.shown(key, m[key])}"
        for key in keys
    )
    console.say(f"{result['samples']} images - {', '.join(said)}")
    console.say(f"Written: {output / 'evaluation.json'}, with pictures beside it")
