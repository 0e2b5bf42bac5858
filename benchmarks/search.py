"""What a search costs beside bare Tune, and how many epochs it spares beside random search.

  uv run benchmarks/search.py --part overhead [--trials 16] [--epochs 10] [--rounds 3] [--at-once 2]
  uv run benchmarks/search.py --part epochs [--data <class folders> --px 64] [--trials 16] [--epochs 12] [--seeds 5]

overhead: the same trials (scikit-learn's digits, a small student, one core each; their settings are drawn by the first
search), in one Ray session, in turns (A B B A …), `--rounds` times:
  ours    potstill.search.tune, algorithm random, scheduler none
  bare    a function trainable with reuse_actors, grid_search over the trials' numbers, FIFO, no loggers, no output
  nested  the usual advice: a function trainable that runs a TorchTrainer of one worker; one round, it is slow
All three train by assemble.train_run: the same updates, evaluation and checkpoints (runs.save_checkpoint, pruned), and
report every epoch to Tune. What bare and nested leave out is what is measured: proposals and the search's journal, each
trial's folder (config, run.json, lock, journal, hashes of the images, summary), the watchdog, leaderboard and plots.
In favour of bare: the trials' configs are there before, and it never resumes. Nested has our polling of Ray Train (0.5 s;
Ray's own is 2 s), and its driver is given no core, so that as many train at once.
Each way begins with one trial a slot that is not counted: there the processes start and import torch; all go on when the
last of these is done. Seconds a trial are a slot's, from the end of that one to the end of its last, so that gaps between
trials count; beside them a trial's own, inside the trainable, and all that a way takes, with Tune's start, the uncounted
trials and the end.

epochs: over paired seeds (search.seed = loop.seed), on real data. Random search with full trials goes first, and fixes the
target: the median over the seeds of the best accuracy that a search ends with (a trial's is that of its best epoch, which
is what it keeps; 0 if it had none). Then ours (tpe, asha) and ours without asha (tpe, none) are counted: epochs of all
trials, in the order in which they were finished, until one has reached it on validation. A search of ours that has not by
its last trial goes on, `--trials` more at a time, while it has spent less than random search's whole budget. One that never
does counts as infinitely many; random search that does not counts with all it spent, which flatters it. The same is
printed for the other reading of the target, the median of all single trials of random search. Stopped, the same command
goes on. key=value are further overrides of jobs/tune.py, such as search=quickstart teacher.run=<run>: another space.

Both write into --output: the runs, and overhead.json or epochs.json.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from potstill import console, runs
from potstill.config import Config, compose, load_run_config
from potstill.search import tune
from potstill.search_plan import trial_name

SPACE = {
    "optimizer.lr": {"min": 1e-4, "max": 1e-1, "log": True},
    "optimizer.weight_decay": {"min": 1e-3, "max": 1.0, "log": True},
    "task.terms.task.label_smoothing": {"min": 0.0, "max": 0.3},
    "model.kwargs.channels": [[4, 6, 8, 12], [6, 8, 12, 16], [8, 12, 20, 28], [12, 16, 24, 32]],
}
PHOTOGRAPHS = [
    "model.name=resnet10t",
    "augment.crop_scale=[0.5,1.0]",
    "augment.flip=0.5",
    "schedule.warmup_epochs=1",
]
WAIT_S = 600.0
WAYS = {"random": ("random", "none"), "ours": ("tpe", "asha"), "ours, no asha": ("tpe", "none")}


def config_of(args: argparse.Namespace, *more: str) -> Config:
    """The base config of every search, with a space wide enough that a random point is seldom good."""
    overrides = [f"data.root={args.output / 'digits'}", "data=digits", "experiment=digits_student"]
    if args.data:
        size = f"data.decode.image_px={args.px}"
        overrides = [f"data.root={args.data.resolve()}", size, *PHOTOGRAPHS]
    overrides += [f"cache.dir={args.output / 'cache'}", "tracking=none", "search.name=null"]
    overrides += [f"loop.epochs={args.epochs}", f"search.num_samples={args.trials}"]
    config: Config = compose("tune", [*overrides, *more, *args.overrides])
    if not config.search.space:
        config.search.space = dict(SPACE)
        if args.data:  # photographs want more of a model than digits
            config.search.space["model.kwargs.channels"] = [
                [width * 4 for width in widths] for widths in SPACE["model.kwargs.channels"]
            ]
    return config


# ------------------------------------------------------------------------------------------- overhead
@contextlib.contextmanager
def clocked(folder: Path, number: int) -> Iterator[None]:
    """Note when a trial began and ended, inside its trainable, and in which process. The uncounted wait for each other."""
    began = time.time()
    yield
    uncounted = range(int((folder / "at-once").read_text()))
    if number in uncounted:
        (folder / f"ready-{number}").touch()
        while not all((folder / f"ready-{n}").exists() for n in uncounted):
            if time.time() - began > WAIT_S:
                raise TimeoutError(f"fewer than {len(uncounted)} trials run at once")
            time.sleep(0.02)
    runs.write_json(folder / f"clock-{number}.json", [began, time.time(), os.getpid()])


def ours_trial(config: dict[str, Any], payload: dict[str, Any]) -> None:
    """The search's own trainable, with a clock around it."""
    with clocked(Path(payload["folder"]), config["number"]):
        from potstill import search_tune

        search_tune._run_trial(config, payload)


class Plain:
    """`loop.Session` with the same checkpoints, and nothing else but a report after every epoch."""

    rank, world_size = 0, 1

    def __init__(self, run_dir: Path, tell: Callable[[dict[str, Any]], None]) -> None:
        self.run_dir, self.tell = run_dir, tell
        self.epoch: dict[str, Any] = {}

    def log(self, record: dict[str, Any]) -> None:
        if record["kind"] == "epoch":
            self.epoch = {k: v for k, v in record.items() if isinstance(v, int | float)}

    def report(self, metrics: dict[str, Any], snapshot: Any) -> None:
        s = snapshot
        kept = runs.save_checkpoint(self.run_dir, s.step, s.model_state, s.state, s.meta, s.files)
        runs.prune_checkpoints(self.run_dir, kept)
        if kept.meta["epoch_done"]:
            self.tell(self.epoch)

    def resume_from(self) -> tuple[None, list[str]]:
        return None, []

    def asked(self) -> str:
        return ""


def train(task: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """What bare and nested do in a trial."""
    import torch

    from potstill.assemble import prepare_process, train_run

    prepare_process(1)
    name = trial_name(task["number"])
    config = load_run_config(Path(task["configs"]) / name)
    session = Plain(Path(task["folder"]) / name, tell)
    train_run(config, Path(task["cache"]), session, torch.device("cpu"), 1, [])  # type: ignore[arg-type]


def bare_trial(config: dict[str, Any], task: dict[str, Any]) -> None:
    with clocked(Path(task["folder"]), config["number"]):
        import ray.tune

        train({**task, **config}, ray.tune.report)


def nested_trial(config: dict[str, Any], task: dict[str, Any]) -> None:
    with clocked(Path(task["folder"]), config["number"]):
        import ray.train
        from ray.train.torch import TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        TorchTrainer(
            nested_worker,
            train_loop_config={**task, **config},
            scaling_config=ray.train.ScalingConfig(
                num_workers=1, use_gpu=False, resources_per_worker={"CPU": 1}
            ),
            run_config=ray.train.RunConfig(
                name=f"nested-{config['number']}",
                storage_path=task["storage"],
                callbacks=[TuneReportCallback()],
            ),
        ).fit()


def nested_worker(task: dict[str, Any]) -> None:
    import ray.train

    train(task, ray.train.report)


def run_ours(args: argparse.Namespace, folder: Path) -> None:
    config = config_of(args, f"runs.dir={folder.parent}", f"run.name={folder.name}")
    config.scaling.use_gpu = False
    search = config.search
    search.algorithm, search.scheduler, search.cpus_per_trial = "random", "none", 1
    search.max_concurrent_trials, search.num_samples = args.at_once, args.trials + args.at_once
    # the search sets variables for Tune, which bare Tune must not inherit
    with mock.patch.dict(os.environ), mock.patch("potstill.search_tune._run_trial", ours_trial):
        found = tune(config)
    if found["failed"]:
        raise SystemExit(f"{found['failed']} trials failed; see {folder}/trials/*/error.txt")


def run_tune(args: argparse.Namespace, folder: Path, nested: bool, cache: Path) -> None:
    """Tune as it comes, but for loggers and output."""
    import ray.tune

    numbers = list(range(args.trials + args.at_once))
    with tempfile.TemporaryDirectory(prefix="bare-tune-") as storage:
        configs = folder.parent / "ours-0" / "trials"
        task = {"folder": folder, "cache": cache, "configs": configs, "storage": storage}
        task = {name: str(path) for name, path in task.items()}
        trainable = ray.tune.with_parameters(nested_trial if nested else bare_trial, task=task)
        quiet = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
        with mock.patch.dict(os.environ, quiet):
            results = ray.tune.Tuner(
                # nested: the worker has the core, and a trial must hold something
                ray.tune.with_resources(trainable, {"cpu": 0.01 if nested else 1}),
                param_space={"number": ray.tune.grid_search(numbers)},
                tune_config=ray.tune.TuneConfig(
                    max_concurrent_trials=args.at_once, reuse_actors=True
                ),
                run_config=ray.tune.RunConfig(storage_path=storage, verbose=0),
            ).fit()
    if results.errors:
        raise results.errors[0]


def measured(args: argparse.Namespace, way: str, folder: Path, cache: Path) -> dict[str, float]:
    """Seconds of one way, once through all trials."""
    console.say(f"{folder.name} …")
    folder.mkdir(parents=True)
    (folder / "at-once").write_text(str(args.at_once))
    console.standard().quiet = True
    began = time.time()
    try:
        if way == "ours":
            run_ours(args, folder)
        else:
            run_tune(args, folder, way == "nested", cache)
    finally:
        console.standard().quiet = False
    whole = time.time() - began
    every = range(args.at_once + args.trials)
    clocks = [runs.read_json(folder / f"clock-{n}.json") for n in every]
    ends: dict[int, list[float]] = {}
    for _, end, slot in clocks:
        ends.setdefault(slot, []).append(end)
    if len(ends) != args.at_once:
        raise SystemExit(
            f"{len(ends)} processes ran trials instead of {args.at_once}; see {folder}"
        )
    slots = sum(max(of_slot) - min(of_slot) for of_slot in ends.values())
    return {
        "trial_s": slots / args.trials,
        "inside_s": statistics.fmean(end - start for start, end, _ in clocks[args.at_once :]),
        "whole_s": whole,
    }


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    import logging

    from potstill.cluster import start_ray
    from potstill.data.prepare import prepare

    base = config_of(args)
    cache = prepare(base.data, base.cache).cache_dir
    start_ray(args.at_once + 1)  # the one more is for nested's drivers
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    root = args.output / "overhead"
    shutil.rmtree(root, ignore_errors=True)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "bare": [], "nested": []}
    for i in range(args.rounds):
        for way in ("ours", "bare") if i % 2 == 0 else ("bare", "ours"):
            found[way].append(measured(args, way, root / f"{way}-{i}", cache))
    if not args.no_nested:
        found["nested"].append(measured(args, "nested", root / "nested-0", cache))
    rows, columns = [], ("trial_s", "inside_s", "whole_s")
    medians: dict[str, dict[str, float]] = {}
    for way, rounds in found.items():
        if rounds:
            medians[way] = {c: statistics.median(r[c] for r in rounds) for c in columns}
            one = [r["trial_s"] for r in rounds]
            told = [f"{medians[way][c]:.3f}" for c in columns]
            rows.append([way, *told, f"{min(one):.3f} … {max(one):.3f}"])
    title = f"{args.trials} trials of {args.epochs} epochs, {args.at_once} at once, {args.rounds} rounds"
    names = ["way", "s a trial", "inside it", "s in all", "s a trial, rounds"]
    console.table(names, rows, title=title)
    pairs = zip(found["ours"], found["bare"], strict=True)
    ratios = [a["trial_s"] / b["trial_s"] for a, b in pairs]
    result = {
        "rounds": found,
        "medians": medians,
        "ours / bare": statistics.median(ratios),
        "ours / bare, rounds": ratios,
        "milliseconds a trial": 1000 * (medians["ours"]["trial_s"] - medians["bare"]["trial_s"]),
    }
    said = f"{min(ratios):.3f} … {max(ratios):.3f} over rounds; to be at most 1.05"
    console.say(f"ours / bare    {result['ours / bare']:.3f}  ({said})")
    console.say(f"ours - bare    {result['milliseconds a trial']:.0f} ms a trial")
    if "nested" in medians:
        result["nested / bare"] = medians["nested"]["trial_s"] / medians["bare"]["trial_s"]
        console.say(f"nested / bare  {result['nested / bare']:.3f}")
    return result


# --------------------------------------------------------------------------------------------- epochs
def searched(args: argparse.Namespace, way: str, seed: int, trials: int) -> list[dict[str, Any]]:
    """Search, or go on; returns all epochs of all trials in the order in which they were finished."""
    name = f"{way.replace(', ', '-').replace(' ', '-')}-{args.trials}x{args.epochs}-seed{seed}"
    folder = args.output / "epochs"
    config = config_of(args, f"runs.dir={folder}", f"run.name={name}", f"loop.seed={seed}")
    config.search.seed, config.search.num_samples = seed, trials
    config.search.algorithm, config.search.scheduler = WAYS[way]
    tune(config)
    epochs = [
        {"trial": run_dir.name, **record}
        for run_dir in sorted((folder / name / "trials").iterdir())
        for record in runs.read_journal(run_dir)
        if record["kind"] == "epoch"
    ]
    return sorted(epochs, key=lambda record: record["time"])


def until(epochs: Sequence[dict[str, Any]], target: float) -> int | None:
    """How many epochs were spent when the target was reached."""
    hits = (i for i, r in enumerate(epochs, start=1) if r["val_top1_acc"] >= target - 1e-9)
    return next(hits, None)


def best_of_trials(epochs: Sequence[dict[str, Any]], trials: int) -> list[float]:
    """Each trial's accuracy as it ended; a trial without one counts as 0."""
    found: dict[str, float] = {}
    for record in epochs:
        found[record["trial"]] = max(found.get(record["trial"], 0.0), record["val_top1_acc"])
    return [*found.values(), *[0.0] * (trials - len(found))]


def compared(
    target: float, spent: dict[str, list[list[dict[str, Any]]]], title: str
) -> dict[str, Any]:
    """Epochs until the target by way and seed, their ratios to random search's; printed."""
    counts = {w: [until(epochs, target) for epochs in of_way] for w, of_way in spent.items()}
    there = [n or len(e) for n, e in zip(counts["random"], spent["random"], strict=True)]
    ratios = {
        way: [(n or math.inf) / of_random for n, of_random in zip(of_way, there, strict=True)]
        for way, of_way in counts.items()
        if way != "random"
    }
    rows = [
        [seed]
        + [
            f"{n or '–'} of {len(spent[way][seed])}"
            for way, ns in counts.items()
            for n in [ns[seed]]
        ]
        + [f"{of_way[seed]:.2f}" for of_way in ratios.values()]
        for seed in range(len(there))
    ]
    console.table(["seed", *counts, *(f"{way} / random" for way in ratios)], rows, title=title)
    medians = {way: statistics.median(of_way) for way, of_way in ratios.items()}
    for way, of_way in ratios.items():
        said = f"{min(of_way):.2f} … {max(of_way):.2f}; reached by {sum(map(math.isfinite, of_way))} of {len(of_way)}"
        aim = "; to be at most 0.33" if way == "ours" else ""
        console.say(f"{way} / random: {medians[way]:.3f}  ({said}{aim})")
    spent_epochs = {way: [len(e) for e in of_way] for way, of_way in spent.items()}
    return {
        "target": target,
        "epochs until it": counts,
        "epochs spent": spent_epochs,
        "ratios": ratios,
        "median ratios": medians,
    }


def epochs_until_target(args: argparse.Namespace) -> dict[str, Any]:
    seeds = range(args.seeds)
    spent = {"random": [searched(args, "random", seed, args.trials) for seed in seeds]}
    finals = [best_of_trials(epochs, args.trials) for epochs in spent["random"]]
    target = statistics.median(max(of_seed) for of_seed in finals)
    single = statistics.median(value for of_seed in finals for value in of_seed)
    fixed = {"random search's best": target, "random search's single trials": single}
    shown = ", ".join(f"{max(of_seed):.2f}" for of_seed in finals)
    console.say(
        f"\nTarget: {target:.2f} %, the median of what random search ends with ({shown}); "
        f"of its single trials {single:.2f} %\n",
        "bold",
    )
    budget = args.trials * args.epochs
    for way in list(WAYS)[1:]:
        spent[way] = []
        for seed in seeds:
            epochs, before, trials = searched(args, way, seed, args.trials), 0, args.trials
            while until(epochs, target) is None and before < len(epochs) < budget:
                before, trials = len(epochs), trials + args.trials
                epochs = searched(args, way, seed, trials)
            spent[way].append(epochs)
    return {
        "finals of random search": finals,
        "budget": budget,
        **{
            name: compared(value, spent, f"\nEpochs until {value:.2f} %, {name}")
            for name, value in fixed.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of jobs/tune.py")
    parser.add_argument("--part", choices=("overhead", "epochs"), required=True)
    parser.add_argument("--trials", type=int, default=16, help="of a search (16)")
    parser.add_argument("--epochs", type=int, help="of a trial (overhead: 10, epochs: 12)")
    parser.add_argument("--rounds", type=int, default=3, help="overhead: turns of ours, bare (3)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--at-once", type=int, default=cores, help=f"overhead: trials at a time ({cores})"
    )
    parser.add_argument("--no-nested", action="store_true", help="overhead: leave nested out")
    parser.add_argument("--data", type=Path, help="epochs: class folders (the digits)")
    parser.add_argument("--px", type=int, default=64, help="epochs: side of --data's images (64)")
    parser.add_argument("--seeds", type=int, default=5, help="epochs: paired searches (5)")
    parser.add_argument(
        "--output", type=Path, default=Path("search_benchmark"), help="folder (search_benchmark)"
    )
    args = parser.parse_intermixed_args()
    args.epochs = args.epochs or (10 if args.part == "overhead" else 12)
    args.output = args.output.resolve()
    args.data = args.data if args.part == "epochs" else None
    result = overhead(args) if args.part == "overhead" else epochs_until_target(args)
    asked = {name: value for name, value in vars(args).items() if name not in ("output", "data")}
    asked["data"] = str(args.data or "digits")
    path = args.output / f"{args.part}.json"
    runs.write_json(path, {"arguments": asked, "cores": os.cpu_count(), **result})
    console.say(f"Written: {path}")


if __name__ == "__main__":
    main()
