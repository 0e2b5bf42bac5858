"""Which sets a cache folder keeps, with real processes that use, build and evict them."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, run_job, tiny_overrides, write_tree
from potstill import runs
from potstill.config import Cache
from potstill.data import store
from potstill.data.cache import FORMAT, open_cache, write_shard
from potstill.errors import UserError

PX = 8


def put(root: Path, key: str, size: int = 1000, used: float = 0.0) -> Path:
    """A set of about `size` bytes, last used `used` seconds after the year began."""
    folder = root / key
    folder.mkdir(parents=True)
    for name, content in {".lock": b"", ".used": b"", "data": b"x" * size}.items():
        (folder / name).write_bytes(content)
    for name in (".lock", ".used"):
        os.utime(folder / name, (1e9 + used, 1e9 + used))
    return folder


@contextlib.contextmanager
def elsewhere(code: str):
    """Another process that runs `code`, up to the point where it prints `ready`; it ends when stdin is closed."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint('ready', flush=True)\ninput()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def holding(folder: Path, user: str = "run a"):
    return elsewhere(
        "from pathlib import Path\nfrom potstill.data import store\n"
        f"held = store.hold(Path({str(folder)!r}), {user!r})\nheld.__enter__()"
    )


def building(folder: Path, size: int):
    return elsewhere(
        f"import fcntl, os\nlock = os.open({str(folder / '.lock')!r}, os.O_RDWR | os.O_CREAT)\n"
        f"fcntl.flock(lock, fcntl.LOCK_EX)\nos.pwrite(lock, b'{size}', 0)"
    )


def keys(root: Path) -> list[str]:
    return [s.key for s in store.stored_sets(root)]


def room(root: Path, needed: int, max_bytes: int) -> store.Room:
    with store.locked(root):
        return store.make_room(root, root / "new", needed, max_bytes / 1e9)


# --------------------------------------------------------------------------------------------- in use
def test_a_set_is_in_use_until_its_process_is_gone(tmp_path):
    folder = put(tmp_path, "a")
    with holding(folder, "run a") as first, store.hold(folder, "run b"):
        users = store.stored_sets(tmp_path)[0].users
        assert [u.split(",")[0] for u in users] == ["run a", "run b"]
        assert f"process {first.pid} on " in users[0]
        with pytest.raises(UserError, match=r"--evict .*not in use.*run a, process"):
            store.evict(Cache(dir=str(tmp_path)), "a")
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert [u.split(",")[0] for u in store.stored_sets(tmp_path)[0].users] == ["run b"]
        with store.hold(folder, "run c"):
            assert len(list(folder.glob(".use.*"))) == 2, "the dead one's is gone"
        assert store.evict(Cache(dir=str(tmp_path)), "all") == []
        assert (folder / "data").exists()
    assert store.stored_sets(tmp_path)[0].users == ()
    assert not list(folder.glob(".use*/*.tmp"))
    assert store.evict(Cache(dir=str(tmp_path)), "all") == ["a"]
    assert not folder.exists()
    with pytest.raises(FileNotFoundError), store.hold(folder):
        pass


def test_who_comes_to_a_full_cache_takes_no_room(tmp_path):
    """A budget that is filled to the last byte holds, however many use the sets."""
    put(tmp_path, "a")
    before = store.stored_sets(tmp_path)[0].bytes
    with store.hold(tmp_path / "a", "one"), store.hold(tmp_path / "a", "two"):
        assert store.stored_sets(tmp_path)[0].bytes == before
        assert len(store.stored_sets(tmp_path)[0].users) == 2


def test_a_file_that_gets_its_lasting_name_while_it_is_looked_at_counts(tmp_path, monkeypatch):
    folder = put(tmp_path, "a")
    before = store.stored_sets(tmp_path)[0].bytes
    (folder / ".shard.tmp").write_bytes(b"0" * 1000)
    listed = store._listed

    def then_renamed(of: Path) -> list[Path]:
        found = listed(of)
        if (folder / ".shard.tmp").exists() and of == folder:
            (folder / ".shard.tmp").rename(folder / "shard")
        return found

    monkeypatch.setattr(store, "_listed", then_renamed)
    assert store.stored_sets(tmp_path)[0].bytes == before + 1000


def test_a_link_to_nothing_is_passed_over(tmp_path):
    folder = put(tmp_path, "a")
    before = store.stored_sets(tmp_path)[0].bytes
    (folder / "gone").symlink_to("nowhere")
    assert store.stored_sets(tmp_path)[0].bytes == before


def test_who_only_looks_keeps_no_set_from_its_eviction(tmp_path):
    put(tmp_path, "a")
    looks = os.open(tmp_path / "a" / ".lock", os.O_RDONLY)
    fcntl.flock(looks, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, (looks,)).start()
    assert store.evict(Cache(dir=str(tmp_path)), "all") == ["a"]


def test_using_a_set_makes_it_the_last_to_go(tmp_path):
    for used, key in enumerate("abc"):
        put(tmp_path, key, used=used)
    assert keys(tmp_path) == ["a", "b", "c"]
    with store.hold(tmp_path / "a"):
        pass
    assert keys(tmp_path) == ["b", "c", "a"]


def test_a_set_that_is_built_is_not_evicted_and_takes_what_it_will_take(tmp_path):
    folder = put(tmp_path, "a", size=1000)
    with building(folder, 5000):
        (found,) = store.stored_sets(tmp_path)
        assert found.users == ("its builder",)
        assert found.bytes == 5000
        assert 3900 < found.pending < 4000
        assert store.evict(Cache(dir=str(tmp_path)), "lru") == []
        assert not room(tmp_path, 1000, 5500).fits
        assert room(tmp_path, 400, 5500).fits
    (found,) = store.stored_sets(tmp_path)  # the builder is gone, and so is its claim
    assert (found.users, found.pending) == ((), 0)
    assert room(tmp_path, 4000, 5500).fits


# ----------------------------------------------------------------------------------------------- room
def test_the_least_recently_used_go_and_no_more_than_needed(tmp_path, capsys):
    for used, key in enumerate("abcd"):
        put(tmp_path, key, used=used)
    with holding(tmp_path / "a"):
        found = room(tmp_path, 1500, 4000)
        assert found.fits
        assert keys(tmp_path) == ["d", "a"]  # b and c went; a, the oldest, is in use
        said = capsys.readouterr().out.splitlines()
        assert [line.split(" (")[0] for line in said] == ["Evicted b", "Evicted c"]
        assert "days ago)" in said[0]
        # nothing goes in vain
        found = room(tmp_path, 3500, 4000)
        assert (found.fits, found.could_fit) == (False, True)
        assert [s.key for s in found.blocking] == ["a"]
        assert keys(tmp_path) == ["d", "a"]
        assert not room(tmp_path, 4001, 4000).could_fit
    assert room(tmp_path, 3500, 4000).fits
    assert keys(tmp_path) == []


def test_without_a_limit_nothing_is_evicted(tmp_path, monkeypatch):
    put(tmp_path, "a")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 500))
    with store.locked(tmp_path):
        found = store.make_room(tmp_path, tmp_path / "new", 1000, None)
        assert (found.fits, found.could_fit) == (False, False)
        assert keys(tmp_path) == ["a"]
        # with one, a full disk is a reason too
        assert store.make_room(tmp_path, tmp_path / "new", 1000, 1.0).fits
    assert keys(tmp_path) == []


def test_the_disk_must_have_room_for_what_others_have_still_to_write(tmp_path, monkeypatch):
    folder = put(tmp_path, "a", size=0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    with building(folder, 6000):
        assert not store.room_for(tmp_path, tmp_path / "new", 5000, None).fits
        assert store.room_for(tmp_path, tmp_path / "new", 3000, None).fits
    assert store.room_for(tmp_path, tmp_path / "new", 5000, None).fits


def test_an_eviction_that_was_killed_is_finished_by_the_next(tmp_path):
    put(tmp_path, "a").rename(tmp_path / ".evicted-a-1")
    put(tmp_path, "b")
    assert keys(tmp_path) == ["b"]
    assert room(tmp_path, 100, 10_000).fits
    assert not (tmp_path / ".evicted-a-1").exists()
    assert keys(tmp_path) == ["b"]


# ------------------------------------------------------------------------------------- list and evict
def test_list_and_evict_as_commands(tmp_path):
    for used, key in enumerate(("aaaa", "bbbb", "cccc")):
        put(tmp_path / "sets", key, used=used)
    about = {"counts": {"train": 1200, "val": 34}, "decode": {"image_px": 96}}
    about |= {"root": "/photos/of leaves", "pixels": "jpeg"}
    about |= {"shards": [{"file": "a.arrow", "bytes": 5}, {"file": "b.arrow", "bytes": 6}]}
    for name in "ab":
        (tmp_path / "sets" / "bbbb" / f"{name}.arrow").write_bytes(b"12345")
    (tmp_path / "sets" / "bbbb" / "manifest.json").write_text(json.dumps(about))
    where = "cache.dir=sets"
    with holding(tmp_path / "sets" / "bbbb", "run oak"):
        done = run_job("prepare", where, "--list", "cache.max_gb=0.5", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        line = next(text for text in done.stdout.splitlines() if text.startswith(" bbbb"))
        assert line.split()[:5] == ["bbbb", "1,234", "96", "jpeg", "0.0"]
        assert line.split()[-3:] == ["1", "50%", "there"]
        for part in ("3 sets", "of 0.5 GB", "bbbb: /photos/of leaves", "in use by run oak, proce"):
            assert part in done.stdout
        assert "cccc: unfinished" in done.stdout
        done = run_job("prepare", where, "--evict", "lru", cwd=tmp_path)
        assert "Evicted aaaa (" in done.stdout
        done = run_job("prepare", "--evict", "bbbb", where, cwd=tmp_path)
        assert done.returncode == 2
        assert "used by run oak, process" in done.stderr
        done = run_job("prepare", "--evict", "cccb", where, cwd=tmp_path)
        assert "got 'cccb'; did you mean cccc?" in done.stderr
        done = run_job("prepare", "--evict", "all", where, cwd=tmp_path)
        assert "Kept bbbb: in use by run oak" in done.stdout
    assert keys(tmp_path / "sets") == ["bbbb"]


# ------------------------------------------------------------------------------------- on this node
def shared(folder: Path, shards: int = 4, rows: int = 5, seed: int = 0) -> Path:
    """A finished set of random pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    written = []
    for i in range(shards):
        columns = {
            "image": rng.integers(0, 256, (rows, PX, PX, 3), np.uint8),
            "label": np.zeros(rows),
            "weight": np.ones(rows),
            "id": np.arange(rows) + rows * i,
            "sha256": [bytes(32)] * rows,
            "path": [f"{i}/{n}.png" for n in range(rows)],
            "width": np.full(rows, 9),
            "height": np.full(rows, 9),
        }
        written.append({"split": "train", **write_shard(folder, f"shard-{i:05d}.arrow", columns)})
    manifest = {
        **{"format": FORMAT, "key": folder.name, "classes": ["a"], "shards": written},
        "decode": {"image_px": PX, "fit": "squash", "max_megapixels": 1.0},
        "counts": {"train": shards * rows},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def everything(folder: Path, local: Path, max_gb: float | None = None):
    reader = open_cache(folder, local_dir=local, max_gb=max_gb).split("train")
    return reader, reader.read(np.arange(len(reader)))


def copies(local: Path, key: str) -> list[str]:
    return sorted(p.name for p in (local / key).glob("*.arrow"))


def test_shards_are_read_from_their_checked_copies(tmp_path):
    folder, local = shared(tmp_path / "far" / "s"), tmp_path / "near"
    expected = open_cache(folder).split("train").read(np.arange(20))
    reader = open_cache(folder, local_dir=local).split("train")
    assert (reader.ids == np.arange(20)).all()
    assert copies(local, "s") == []  # nothing is copied before its images are read
    assert np.array_equal(reader.read([6]), expected[[6]])
    assert copies(local, "s") == ["shard-00001.arrow"]
    reader, found = everything(folder, local)
    assert np.array_equal(found, expected)
    assert copies(local, "s") == sorted(p.name for p in folder.glob("*.arrow"))
    # they are what is read: the far ones may change now
    for path in folder.glob("*.arrow"):
        path.write_bytes(bytes(path.stat().st_size))
    assert np.array_equal(open_cache(folder, local_dir=local).split("train").read([6]), found[[6]])
    assert not list((local / "s").glob("*.tmp"))


def test_a_damaged_shard_is_noticed_when_it_is_copied(tmp_path):
    folder, local = shared(tmp_path / "far" / "s"), tmp_path / "near"
    path = folder / "shard-00002.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"far/s/shard-00002.arrow is damaged: its SHA-256"):
        everything(folder, local)
    assert "shard-00002.arrow" not in copies(local, "s")
    assert not list((local / "s").glob(".*.tmp"))


def test_copies_stay_within_the_budget_and_the_rest_is_read_in_place(tmp_path, capsys):
    local = tmp_path / "near"
    sets = [shared(tmp_path / "far" / key, rows=40, seed=n) for n, key in enumerate("ab")]
    size = max(p.stat().st_size for p in sets[0].glob("*.arrow"))
    expected = [open_cache(s).split("train").read(np.arange(160)) for s in sets]
    max_gb = (6 * size + 8000) / 1e9  # six of the eight shards, and the manifests
    first, found = everything(sets[0], local, max_gb)
    assert np.array_equal(found, expected[0])
    assert len(copies(local, "a")) == 4
    second, found = everything(sets[1], local, max_gb)
    assert np.array_equal(found, expected[1])
    assert (len(copies(local, "a")), len(copies(local, "b"))) == (4, 2)
    assert capsys.readouterr().out.count("cache.local_dir: no room for all of b") == 1
    # nobody uses the first set any more: it makes room
    del first, found
    gc.collect()
    third, found = everything(sets[1], local, max_gb)
    assert np.array_equal(found, expected[1])
    assert copies(local, "a") == []
    assert len(copies(local, "b")) == 4
    assert len(second) == len(third)


def test_a_copy_counts_from_its_beginning(tmp_path, monkeypatch):
    """Or two that begin at once would both find room."""
    folder, local = shared(tmp_path / "far" / "s"), tmp_path / "near"
    size = (folder / "shard-00000.arrow").stat().st_size
    taken, fill = [], store.LocalCopies._fill

    def watched(*arguments):
        taken.append(store.stored_sets(local)[0].bytes)
        fill(*arguments)

    monkeypatch.setattr(store.LocalCopies, "_fill", watched)
    everything(folder, local)
    assert all(found >= size * n for n, found in enumerate(taken, start=1))
    assert len(taken) == 4


def test_a_local_folder_that_cannot_be_used_is_said_once(tmp_path, capsys):
    folder = shared(tmp_path / "far" / "s")
    (tmp_path / "file").write_text("")
    _, found = everything(folder, tmp_path / "file" / "near")
    assert np.array_equal(found, open_cache(folder).split("train").read(np.arange(20)))
    assert capsys.readouterr().out.count("cache.local_dir") == 1


def test_two_processes_share_the_copies_of_a_node(tmp_path):
    """Two read two sets of 30 shards at once, within a budget for 40, again and again."""
    local = tmp_path / "near"
    sets = [shared(tmp_path / "far" / key, shards=30, seed=n) for n, key in enumerate("ab")]
    size = max(p.stat().st_size for p in sets[0].glob("*.arrow"))
    max_gb = (40 * size + 40_000) / 1e9
    code = f"""
import sys
import numpy as np
from pathlib import Path
from potstill.data.cache import open_cache
sets = {[str(s) for s in sets]!r}
for turn in range(6):
    for folder in sets[:: 1 if turn % 2 == int(sys.argv[1]) else -1]:
        expected = open_cache(Path(folder)).split("train")
        reader = open_cache(Path(folder), True, {str(local)!r}, {max_gb}).split("train")
        rows = np.random.default_rng(turn).permutation(len(reader))
        assert np.array_equal(reader.read(rows), expected.read(rows))
        del reader
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(n)], env=environment) for n in range(3)
    ]
    most = 0
    while any(p.poll() is None for p in both):
        with store.locked(local):  # else two sets are looked at before and after something moved
            most = max(most, sum(s.bytes for s in store.stored_sets(local)))
        time.sleep(0.005)
    assert [p.returncode for p in both] == [0, 0, 0]
    assert 0 < most <= max_gb * 1e9
    assert not list(local.glob("*/.*.tmp"))


# ----------------------------------------------------------------------------------------- whole runs
def test_a_run_goes_on_with_the_pixels_it_began_with(tiny, tmp_path):
    from potstill.fit import fit

    local = tmp_path / "near"

    def begun(name: str, *more: str) -> dict:
        fit(tiny(f"run.name={name}", *more))
        (tmp_path / "runs" / name / "summary.json").unlink()  # as if it had been stopped
        return runs.read_json(tmp_path / "runs" / name / "run.json")["dataset"]

    raw = begun("raw", "cache.format=raw")
    jpeg = begun("jpeg", "cache.format=jpeg", f"cache.local_dir={local}")
    assert (raw["pixels"], jpeg["pixels"]) == ("raw", "jpeg")
    assert raw["source_key"] == jpeg["source_key"] == raw["key"] != jpeg["key"]
    assert copies(local, jpeg["key"]) == sorted(
        p.name for p in Path(jpeg["dir"]).glob("shard-*.arrow")
    )
    for name, wanted in (("raw", "jpeg"), ("jpeg", "raw")):
        with pytest.raises(UserError, match=rf"cache.format .* must be .*\({name}\), got {wanted}"):
            fit(tiny(f"run.name={name}", f"cache.format={wanted}"))
    for name in (
        "raw",
        "jpeg",
    ):  # auto knows; of the two sets that are there it would take the raw one
        assert fit(tiny(f"run.name={name}"))["status"] == "finished"


@pytest.mark.slow
def test_two_runs_at_once_under_a_cache_for_one_end_with_the_numbers_of_runs_alone(
    tmp_path, ray_session
):
    from potstill.config import compose
    from potstill.fit import fit

    def overrides(name: str, runs_dir: str, cache: str) -> list[str]:
        places = (tmp_path / name, tmp_path / cache, tmp_path / runs_dir)
        return [*tiny_overrides(*places), f"run.name={name}", "cache.format=raw"]

    names = ("one", "two")
    for seed, name in enumerate(names):
        write_tree(tmp_path / name, train=30, seed=seed)
        fit(compose("train", overrides(name, "alone", "roomy")))
    sizes = [s.bytes for s in store.stored_sets(tmp_path / "roomy")]
    max_gb = (max(sizes) * 1.5) / 1e9
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), f"cache.max_gb={max_gb:.6f}"]
    started = [
        subprocess.Popen(
            [*command, *overrides(name, "together", "tight")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in names
    ]
    most = 0
    while any(p.poll() is None for p in started):
        with store.locked(tmp_path / "tight"):
            most = max(most, sum(s.bytes for s in store.stored_sets(tmp_path / "tight")))
        time.sleep(0.02)
    said = [p.communicate()[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], said
    assert 0 < most <= max_gb * 1e9
    assert "Evicted " in "".join(said)
    for name in names:
        told = [
            runs.read_json(tmp_path / d / name / "training_history.json")
            for d in ("alone", "together")
        ]
        assert told[0] == told[1]
