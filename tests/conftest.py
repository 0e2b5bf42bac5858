"""Shared by all tests: 64 small images that can be learned, one Ray, a config that trains in a second."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["OMP_WAIT_POLICY"] = "passive"
# as on most machines: each of the many processes would compile torch anew, 10 s of a core
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Ray reads it when it is imported: start_ray is too late where a test's module has done that
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
# no test may reach a real cloud; Ray's workers inherit this
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {
    "blue": (40, 60, 200),
    "green": (40, 180, 60),
    "red": (200, 50, 40),
    "white": (220, 220, 220),
}


def skip(reason: str) -> None:
    """Skip a test for want of something, but fail where .ci/run has said that nothing is to be wanting."""
    (pytest.fail if os.environ.get("POTSTILL_NO_SKIPS") else pytest.skip)(reason)


def write_tree(root: Path, train: int = 12, val: int = 4, px: int = 24, seed: int = 0) -> Path:
    """Class folders of noisy, coloured squares: train/<colour>/*.png and val/<colour>/*.png."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 40, (px, px, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tiny") / "colours")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def ray_session():
    """Ray on two CPUs, started once."""
    import ray

    from potstill.cluster import start_ray

    start_ray(2)
    yield
    ray.shutdown()


@pytest.fixture
def tiny(tiny_tree: Path, cache_dir: Path, tmp_path: Path, ray_session):
    """`tiny("loop.epochs=3", …)`: a config whose run takes about a second, in this test's own folder."""
    from potstill.config import compose

    def make(*overrides: str):
        return compose(
            "train", [*tiny_overrides(tiny_tree, cache_dir, tmp_path / "runs"), *overrides]
        )

    return make


def tiny_overrides(tree: Path, cache: Path, runs: Path) -> list[str]:
    return [
        f"data.root={tree}",
        f"cache.dir={cache}",
        f"runs.dir={runs}",
        "data.decode.image_px=32",
        "data.decode.fit=squash",
        "augment.crop_scale=[0.6,1.0]",
        "augment.flip=0.5",
        "model.name=test_convnext",
        "optimizer.lr=1e-3",
        "loop.epochs=2",
        "loop.batch_size=20",
        "tracking=none",
    ]


def run_job(
    name: str, *arguments: str, cwd: Path, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """A job as a user runs it, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@contextlib.contextmanager
def s3_bucket(name: str) -> Iterator[str]:
    """A server on this machine that speaks S3, with one empty bucket: the options of its URIs."""
    import pyarrow.fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"endpoint_override=http://{host}:{port}&region=us-east-1"
    uri = f"s3://{name}?{options}&allow_bucket_creation=true"
    pyarrow.fs.FileSystem.from_uri(uri)[0].create_dir(name)
    try:
        yield options
    finally:
        server.stop()


def write_down_connections(root: Path) -> Path:
    """A folder for PYTHONPATH: to what its processes connect stands in root/connections, and a dot for each in root/hooked."""
    hook = root / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "def hook(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        f"        open({str(root / 'connections')!r}, 'a').write(f'{{event}} {{arguments[1:]}}\\n')\n"
        "sys.addaudithook(hook)\n"
        f"open({str(root / 'hooked')!r}, 'a').write('.')\n"
    )
    return hook
