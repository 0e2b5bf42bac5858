"""What a finished run is worth on some images: metrics, a table by class, evaluation.json."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from potstill import console, runs
from potstill.config import Data, EvaluateConfig, EvaluateData, load_run_config
from potstill.data.cache import Cache, hash_prefixes, open_cache
from potstill.data.prepare import check, prepare_shown
from potstill.errors import UserError


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a run on its own data or, with `data.root`, on a folder that it has never seen.

    Classes are matched by name; the folder may lack some of them, but not hold others. Images that the run
    was trained on are counted, and warned of. Writes evaluation.json and returns its content. Raises UserError.
    """
    if config.from_run is None:
        raise UserError(
            "from_run must name the folder of a run, got null; add from_run=runs/<name>"
        )
    run_dir = runs.open_run(config.from_run, "from_run")
    known: list[str] = runs.read_json(run_dir / "run.json")["classes"]
    data = _data(config.data, load_run_config(run_dir).data)
    plan = check(data, config.cache, for_training=False)
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
    checkpoint = runs.pick_checkpoint(run_dir, config.checkpoint).folder.name
    prepared = prepare_shown(data, config.cache, for_training=False)
    cache = open_cache(prepared.cache_dir, config.cache.verify)
    warnings = _trained_on(run_dir, cache, config.subset)
    for warning in warnings:
        console.warn(f"{warning['name']}: {warning['message']}")
    result = {
        "run": run_dir.name,
        "checkpoint": checkpoint,
        **_measure(config, run_dir, cache),
        "warnings": warnings,
        "quarantined": prepared.report.get("quarantined", {}),
        "data": {"root": str(plan.rows.root), "key": plan.key, "subset": config.subset},
        "absent_classes": sorted(set(known) - set(plan.rows.classes)),
    }
    output = (
        Path(config.output)
        if config.output
        else run_dir / "evaluations" / f"{plan.key}-{config.subset}"
    )
    runs.write_json(output / "evaluation.json", result)
    _say(result, output)
    return result


def _data(asked: EvaluateData, own: Data) -> Data:
    """The run's own data and decoding, with what was asked for instead."""
    data = copy.deepcopy(own)
    if asked.root is not None:
        data.root, data.classes, data.max_samples = asked.root, None, None
        # no split is made: a folder without splits is evaluated whole, one that has them as it is
        data.split.val = 1.0
    if asked.classes is not None:
        data.classes = asked.classes
    if asked.max_samples is not None:
        data.max_samples = asked.max_samples
    if asked.max_bad_fraction is not None:
        data.max_bad_fraction = asked.max_bad_fraction
    return data


def _trained_on(run_dir: Path, cache: Cache, subset: str) -> list[dict[str, str]]:
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


def _measure(config: EvaluateConfig, run_dir: Path, cache: Cache) -> dict[str, Any]:
    import torch

    from potstill.assemble import load_model
    from potstill.data.augment import Augment
    from potstill.data.batches import Batches
    from potstill.loop import autocast_of
    from potstill.metrics import evaluate, top_k
    from potstill.report import confusion_counts, per_class

    model, known, trained = load_model(run_dir, config.checkpoint)
    place = torch.tensor([known.index(name) for name in cache.classes])
    on_gpu = torch.cuda.is_available() and config.use_gpu is not False
    if config.use_gpu and not on_gpu:
        raise UserError("use_gpu must be false or null on a machine without a GPU, got true")
    device = torch.device("cuda" if on_gpu else "cpu")
    model = model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    augment = Augment(trained.augment, trained.data.decode.image_px, trained.loop.seed)
    batches = Batches(cache.split(config.subset), config.batch_size, seed=0, shuffle=False)

    def on_device():
        with console.progress("Evaluating", batches.steps) as update:
            for done, batch in enumerate(batches.epoch(0), start=1):
                padded = not bool(batch["weight"].all())
                batch["label"] = place[batch["label"]]
                batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
                yield {**batch, "image": augment.eval(batch["image"])}, padded
                update(done)

    numbers, found = evaluate(
        lambda batch: model(batch)["logits"],
        on_device(),
        len(known),
        device,
        autocast_of(config.precision, device),
    )
    counts = confusion_counts(found.arrays(), len(known))
    rows = [row for row in per_class(counts, known) if row["support"]]
    return {
        "samples": len(found.id),
        "top_k": top_k(len(known)),
        "metrics": numbers,
        "per_class": sorted(rows, key=lambda row: known.index(row["class"])),
    }


def _say(result: dict[str, Any], output: Path, most: int = 20) -> None:
    rows = sorted(result["per_class"], key=lambda row: row["f1"])
    console.table(
        ["class", "images", "precision", "recall", "F1"],
        [
            [r["class"], r["support"], *(f"{r[k]:.2f}%" for k in ("precision", "recall", "f1"))]
            for r in rows[:most]
        ],
        title=f"{result['run']} by class, weakest first"
        + (f" ({most} of {len(rows)})" if len(rows) > most else ""),
    )
    m = result["metrics"]
    console.say(
        f"{result['samples']} images - Loss: {m['loss']:.4f}, Top-1: {m['top1_acc']:.2f}%, "
        f"Top-{result['top_k']}: {m['top5_acc']:.2f}%, Macro-F1: {m['macro_f1']:.2f}%"
    )
    console.say(f"Written: {output / 'evaluation.json'}")
