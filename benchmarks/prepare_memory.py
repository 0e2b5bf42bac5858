"""What preparing costs in memory: the summed PSS of the driver, Ray and its tasks, over an idle Ray's.

    python benchmarks/prepare_memory.py [--images 20000] [--image_px 224] [--output prepare_memory.json]

Makes JPEGs in a temporary folder, prepares them, samples the PSS of the whole process tree meanwhile (the
object store is shared memory: it is in there once), prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

LIMIT_MIB = 1536  # issue 2, "done when" 8


def make_jpegs(
    root: Path, count: int, classes: int = 10, side: int = 300, variants: int = 64
) -> int:
    """`count` JPEGs of about `side` pixels in class folders. Returns their bytes in all."""
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    contents = []
    for v in range(variants):
        smooth = np.stack(
            [127 + 90 * np.sin((x * (c + 1) + v * y) / (20 + v)) for c in range(3)], -1
        )
        noisy = np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
        contents.append(buffer.getvalue())
    for c in range(classes):
        (root / f"class{c:02d}").mkdir(parents=True)
    total = 0
    for i in range(count):
        # bytes behind the image's end make every file another one
        content = contents[i % variants] + i.to_bytes(4, "big")
        (root / f"class{i % classes:02d}" / f"{i:06d}.jpg").write_bytes(content)
        total += len(content)
    return total


def summed_pss_mib() -> dict[str, float]:
    """PSS of this process and everything below it, in MiB, by the kind of process."""
    found: dict[str, float] = {"all": 0.0}
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            pss = process.memory_full_info().pss / 2**20
            name = "driver" if process.pid == me.pid else (process.cmdline() or [process.name()])[0]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        kind = (
            "tasks"
            if name.startswith("ray::Map")
            else "driver"
            if name == "driver"
            else "rest of Ray"
        )
        found[kind] = found.get(kind, 0.0) + pss
        found["all"] += pss
    return found


class Sampler(threading.Thread):
    """Keeps the largest of the sums that it sees."""

    def __init__(self, every_s: float = 0.3):
        super().__init__(daemon=True)
        self.every_s = every_s
        self.peak: dict[str, float] = {"all": 0.0}
        self.samples = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(self.every_s):
            now = summed_pss_mib()
            self.samples += 1
            if now["all"] > self.peak["all"]:
                self.peak = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--image_px", type=int, default=224)
    parser.add_argument("--output", type=Path, default=Path("prepare_memory.json"))
    args = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    from potstill.cluster import start_ray
    from potstill.config import Cache, Data, Decode
    from potstill.data.cache import open_cache
    from potstill.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        source_bytes = make_jpegs(Path(folder) / "images", args.images)
        start_ray()
        time.sleep(8)  # its workers are still importing when init returns
        idle = summed_pss_mib()
        sampler = Sampler()
        sampler.start()
        data = Data(root=f"{folder}/images", decode=Decode(image_px=args.image_px))
        cache = Cache(dir=f"{folder}/cache")
        prepared = prepare(data, cache)
        started = time.monotonic()
        assert prepare(data, cache).reused
        reuse_s = time.monotonic() - started
        sampler.done.set()
        sampler.join()

        started = time.monotonic()
        reader = open_cache(prepared.cache_dir).split("train")
        order = np.random.default_rng(0).permutation(len(reader))[
            : 256 * (min(len(reader), 8192) // 256)
        ]
        open_s = time.monotonic() - started
        out = np.empty((256, args.image_px, args.image_px, 3), np.uint8)
        started = time.monotonic()
        for start in range(0, len(order), 256):
            reader.read(order[start : start + 256], out=out)
        read_per_s = len(order) / (time.monotonic() - started) if len(order) else None

    over = sampler.peak["all"] - idle["all"]
    result = {
        "images": args.images,
        "image_px": args.image_px,
        "cores": os.cpu_count(),
        "source_mb": source_bytes / 1e6,
        "cache_mb": prepared.report["sizes"]["cache_bytes"] / 1e6,
        "seconds": prepared.report["built"]["seconds"],
        "images_per_s": prepared.report["built"]["images_per_s"],
        "reuse_s": reuse_s,
        "open_s": open_s,
        "read_per_s": read_per_s,
        "idle_pss_mib": idle,
        "peak_pss_mib": sampler.peak,
        "over_idle_mib": over,
        "limit_mib": LIMIT_MIB,
        "share_of_limit": over / LIMIT_MIB,
        "samples": sampler.samples,
    }
    table = Table(title=f"{args.images:,} images at {args.image_px} px, PSS in MiB")
    for name in ("", "idle", "peak", "over idle"):
        table.add_column(name, justify="right")
    for kind in ("driver", "tasks", "rest of Ray", "all"):
        low, high = idle.get(kind, 0.0), sampler.peak.get(kind, 0.0)
        table.add_row(kind, f"{low:,.0f}", f"{high:,.0f}", f"{high - low:,.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"over idle: {over / LIMIT_MIB:.2f} of the {LIMIT_MIB} MiB allowed, {sampler.samples} samples"
    )
    console.print(
        f"{result['images_per_s']:,.0f} img/s built; reused in {reuse_s:.2f} s; opened in {open_s:.2f} s; "
        f"read {read_per_s or 0:,.0f} rows/s in one thread"
    )
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
