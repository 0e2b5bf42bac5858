"""Prepare, with real files and a real Ray."""

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, namedtuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from potstill.config import Cache, Data, Decode
from potstill.data import prepare as module
from potstill.data import store
from potstill.data.cache import open_cache
from potstill.data.images import decode_image
from potstill.data.prepare import check, prepare, prepared, print_report
from potstill.errors import UserError

PX = 8
CLASSES = ("ash", "beech", "cedar")


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    """Ray with 2 CPUs, the one that is running where there is one."""
    from potstill.cluster import start_ray

    mine = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    start_ray(num_cpus=2)  # imports ray: its environment must be set before
    import ray

    yield
    if mine:
        ray.shutdown()


@pytest.fixture
def small_shards(monkeypatch):
    """Several shards from few images."""
    monkeypatch.setattr(module, "SMALL_SHARD_ROWS", 8)


def picture(seed, size=(20, 16)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    )


def encoded(seed, format="PNG", size=(20, 16)):
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, format)
    return buffer.getvalue()


def make_tree(root, each=12, classes=CLASSES):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i:03d}.png").write_bytes(encoded(1000 * c + i))
    return root


def keys(root, **more):
    cache = Cache(dir=str(root.parent / "cache"), **more.pop("cache", {}))
    decode = Decode(**{"image_px": PX, **more.pop("decode", {})})
    return Data(root=str(root), decode=decode, **more), cache


def refusal(action, *args, **more):
    with pytest.raises(UserError) as caught:
        action(*args, **more)
    return str(caught.value)


def test_every_pixel_label_and_id_arrives(tmp_path, small_shards):
    root = make_tree(tmp_path / "data")
    data, cache_keys = keys(root)
    seen = []
    prepared = prepare(data, cache_keys, lambda done, total: seen.append((done, total)))
    assert not prepared.reused
    assert (seen[0], seen[-1]) == ((0, 36), (36, 36))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    plan = check(data, cache_keys)
    assert (prepared.cache_dir, plan.bytes_needed) == (plan.folder, 0)
    cache = open_cache(prepared.cache_dir, verify=True)
    assert cache.classes == list(CLASSES)
    assert cache.counts == {"train": 30, "val": 6}
    assert len(cache.split("train").shard_rows) == 4
    listed = dict(
        zip(
            plan.rows.path,
            zip(plan.rows.id, plan.rows.label, plan.rows.split, strict=True),
            strict=True,
        )
    )
    for split in ("train", "val"):
        reader = cache.split(split)
        pixels = reader.read(np.arange(len(reader)))
        for row, path in enumerate(reader.paths):
            assert listed.pop(path) == (reader.ids[row], reader.labels[row], split)
            assert np.array_equal(
                pixels[row], decode_image((root / path).read_bytes(), data.decode)
            )
    assert not listed
    assert len(set(cache.split("train").labels[:8].tolist())) > 1  # a shard mixes the classes
    assert pq.read_table(prepared.cache_dir / "quarantine.parquet").num_rows == 0
    assert json.loads((prepared.cache_dir / "classes.json").read_text()) == list(CLASSES)


def spoil(root):
    """One bad file of each kind in each class; {path: reason}."""
    header = bytearray(encoded(7, size=(16, 16)))
    header[16:24] = (40_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    jpeg, png = encoded(1, "JPEG", (80, 60)), encoded(2, "PNG", (80, 60))
    kinds = {
        "empty.jpg": (b"", "empty"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "text.jpg": (b"This is no image.\n" * 20, "not an image"),
        "huge.png": (bytes(header), "over the pixel limit"),
    }
    expected = {}
    for name in CLASSES:
        for file, (content, reason) in kinds.items():
            (root / name / file).write_bytes(content)
            expected[f"{name}/{file}"] = reason
        (root / name / "gone.jpg").symlink_to(root / "nowhere.jpg")
        expected[f"{name}/gone.jpg"] = "unreadable"
    return expected


def test_exactly_the_bad_files_are_quarantined(tmp_path):
    root = make_tree(tmp_path / "data")
    expected = spoil(root)
    prepared = prepare(*keys(root, max_bad_fraction=0.5))
    table = pq.read_table(prepared.cache_dir / "quarantine.parquet")
    assert table.column_names == ["path", "split", "class", "reason", "detail"]
    rows = table.to_pylist()
    assert {row["path"]: row["reason"] for row in rows} == expected
    assert all(row["class"] == row["path"].split("/")[0] and row["detail"] for row in rows)
    report, cache = prepared.report, open_cache(prepared.cache_dir)
    assert report["quarantined"]["by_reason"] == dict(Counter(expected.values()))
    assert report["listed"] == 36 + len(expected)
    assert report["images"] == report["listed"] - len(rows) == sum(cache.counts.values()) == 36
    assert sum(n for counts in report["by_class"].values() for n in counts.values()) == 36
    kept = {path for split in cache.counts for path in cache.split(split).paths}
    assert kept == {f"{name}/{i:03d}.png" for name in CLASSES for i in range(12)}


def test_too_many_bad_images_stop_it_and_nothing_is_lost(tmp_path):
    root = make_tree(tmp_path / "data")
    spoil(root)
    data, cache = keys(root)
    message = refusal(prepare, data, cache)
    for part in (
        "data.max_bad_fraction",
        "got 0.05 with 18 of 54 bad",
        "6 truncated",
        "ash/",
        "quarantine.parquet",
        "=0.334",
    ):
        assert part in message
    folder = check(data, cache).folder
    assert pq.read_table(folder / "quarantine.parquet").num_rows == 18
    assert not (folder / "manifest.json").exists()
    for link in root.glob("*/gone.jpg"):
        link.unlink()  # what could not be opened is tried again, the rest is kept
        link.write_bytes(b"")
    data, cache = keys(root, max_bad_fraction=0.334)
    assert prepare(data, cache).report["images"] == 36
    # a cache that a laxer limit let pass does not pass a stricter one
    data.max_bad_fraction = 0.1
    assert "got 0.1 with 18 of 54 bad" in refusal(prepare, data, cache)


def test_what_could_not_be_opened_is_tried_again(tmp_path, small_shards):
    root = make_tree(tmp_path / "data", each=30)
    for i in range(5):
        (root / "ash" / f"late{i}.png").symlink_to(tmp_path / "elsewhere.png")
    data, cache = keys(root)
    assert "5 unreadable" in refusal(prepare, data, cache)
    folder = check(data, cache).folder
    found = [json.loads(path.read_text()) for path in folder.glob("shard-*.json")]
    again = [d for d in found if d["unopened"]]
    assert 0 < len(again) < len(found)
    data.max_bad_fraction = 0.2
    report = prepare(data, cache).report
    assert report["built"]["images"] == sum(d["planned"] for d in again)
    assert (report["images"], report["quarantined"]["total"]) == (90, 5)


def test_nothing_left_to_train_on(tmp_path):
    root = make_tree(tmp_path / "data", each=2, classes=("a", "b"))
    for path in (root / "b").iterdir():
        path.write_bytes(b"")
    message = refusal(prepare, *keys(root, max_bad_fraction=1.0))
    assert "training images of at least 2 classes, got 1 (a)" in message
    for path in (root / "a").iterdir():
        path.write_bytes(b"")
    assert "none in train, val" in refusal(prepare, *keys(root, max_bad_fraction=1.0))


# ------------------------------------------------------------------------------ reuse, change, damage
def test_a_build_that_was_cut_off_goes_on(tmp_path, small_shards):
    data, cache = keys(make_tree(tmp_path / "data"))
    first = prepare(data, cache)
    folder = first.cache_dir
    names = sorted(path.name for path in folder.glob("shard-*.arrow"))
    assert len(names) == 5
    # killed after 3 shards, of which one has no description yet, in the middle of a fourth
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.json").unlink()
    for number in ("00003", "00004"):
        (folder / f"shard-{number}.arrow").unlink()
        (folder / f"shard-{number}.json").unlink()
    (folder / ".shard-00003.arrow.1.tmp").write_bytes(b"half")
    times = {name: (folder / name).stat().st_mtime_ns for name in names if (folder / name).exists()}
    plan = check(data, cache)
    assert plan.bytes_needed > 0
    calls = []
    second = prepare(data, cache, lambda done, total: calls.append(done))
    assert not second.reused
    sizes = {s.file: len(s.rows) for s in plan.shards}
    kept = ("shard-00000.arrow", "shard-00002.arrow")
    assert calls[0] == sum(sizes[name] for name in kept)
    assert second.report["built"]["images"] == 36 - calls[0]
    for name in kept:
        assert (folder / name).stat().st_mtime_ns == times[name]
    assert (folder / "shard-00001.arrow").stat().st_mtime_ns != times["shard-00001.arrow"]
    assert not list(folder.glob(".*.tmp"))
    assert {k: v for k, v in second.report.items() if k != "built"} == {
        k: v for k, v in first.report.items() if k != "built"
    }
    open_cache(folder, verify=True)


def test_a_cache_that_fits_is_reused_without_ray(tmp_path):
    data, cache = keys(make_tree(tmp_path / "data"))
    folder = prepare(data, cache).cache_dir
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    code = f"""
import sys, time
from potstill.config import Cache, Data, Decode
from potstill.data.prepare import check, prepare
started = time.process_time()
data, cache = Data(root={data.root!r}, decode=Decode(image_px={PX})), Cache(dir={cache.dir!r})
check(data, cache)
assert not set(sys.modules) & {{"ray", "torch", "pyarrow", "timm"}}
assert prepare(data, cache).reused
assert not set(sys.modules) & {{"ray", "torch", "timm"}}
assert time.process_time() - started < 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after.pop(".used") > before.pop(".used")
    assert after == before


def test_a_changed_source_makes_a_new_cache(tmp_path):
    root = make_tree(tmp_path / "data")
    data, cache = keys(root)
    folders = [prepare(data, cache).cache_dir]
    (root / "ash" / "new.png").write_bytes(encoded(99))
    folders.append(prepare(data, cache).cache_dir)
    (root / "ash" / "001.png").write_bytes(encoded(98))
    folders.append(prepare(data, cache).cache_dir)
    (root / "ash" / "002.png").unlink()
    folders.append(prepare(data, cache).cache_dir)
    data.decode.fit = "pad"
    folders.append(prepare(data, cache).cache_dir)
    assert len(set(folders)) == 5
    assert prepare(data, cache).reused
    assert open_cache(folders[-1]).counts["train"] + open_cache(folders[-1]).counts["val"] == 36


@pytest.mark.parametrize("how", ["gone", "shorter", "flipped"])
def test_only_a_damaged_shard_is_built_again(tmp_path, small_shards, how):
    data, cache = keys(make_tree(tmp_path / "data"), cache={"verify": how == "flipped"})
    folder = prepare(data, cache).cache_dir
    good = (folder / "shard-00002.arrow").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.arrow")}
    if how == "gone":
        (folder / "shard-00002.arrow").unlink()
    elif how == "shorter":
        (folder / "shard-00002.arrow").write_bytes(good[:100])
    else:
        (folder / "shard-00002.arrow").write_bytes(
            good[:900] + bytes([good[900] ^ 255]) + good[901:]
        )
    prepared = prepare(data, cache)
    assert not prepared.reused
    assert prepared.report["built"]["mended"] == ["shard-00002"]
    assert (folder / "shard-00002.arrow").read_bytes() == good
    changed = [path.name for path, at in times.items() if path.stat().st_mtime_ns != at]
    assert changed == ["shard-00002.arrow"]


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "data")
    data, cache = keys(root)
    plan = check(data, cache)
    (root / "ash" / "003.png").write_bytes(encoded(5, size=(30, 30)))
    monkeypatch.setattr(module, "check", lambda *args: plan)
    message = refusal(prepare, data, cache)
    assert "must not change while it is prepared" in message
    assert "ash/003.png" in message


def test_a_second_process_waits_and_reuses(tmp_path):
    data, cache = keys(make_tree(tmp_path / "data"))
    in_hand, go_on = threading.Event(), threading.Event()
    results = {}

    def slow(done, total):
        in_hand.set()
        go_on.wait(30)

    def run(name, progress):
        results[name] = prepare(data, cache, progress)

    first = threading.Thread(target=run, args=("first", slow))
    first.start()
    assert in_hand.wait(30)
    second = threading.Thread(target=run, args=("second", None))
    second.start()
    time.sleep(0.7)
    assert second.is_alive()
    go_on.set()
    first.join(60)
    second.join(60)
    assert (results["first"].reused, results["second"].reused) == (False, True)


# --------------------------------------------------------------------------------------------- space
def test_no_disk_space(tmp_path, monkeypatch):
    data, cache = keys(make_tree(tmp_path / "data"))
    needed = check(data, cache).bytes_needed
    assert needed > 36 * PX * PX * 3
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, int(needed * 1.04)))
    message = refusal(prepare, data, cache)
    assert "cache.dir must have" in message
    assert "GB free" in message
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, int(needed * 1.06)))
    check(data, cache)


def test_the_estimate_of_bytes_is_not_below_what_is_written(tmp_path, small_shards):
    data, cache = keys(make_tree(tmp_path / "data"))
    needed = check(data, cache).bytes_needed
    folder = prepare(data, cache).cache_dir
    assert sum(path.stat().st_size for path in folder.glob("shard-*")) <= needed


def test_max_gb_holds_for_all_sets_and_the_oldest_goes(tmp_path, capsys):
    root = make_tree(tmp_path / "data")
    data, cache = keys(root, cache={"format": "raw"})
    needed = check(data, cache).bytes_needed
    cache.max_gb = needed * 0.9 / 1e9
    assert "cache.max_gb must be at least" in refusal(prepare, data, cache)
    assert not (tmp_path / "cache").exists()
    cache.max_gb = needed * 1.5 / 1e9
    first = prepare(data, cache).cache_dir
    data.decode.fit = "pad"
    second = prepare(data, cache)
    assert not first.exists()
    assert open_cache(second.cache_dir, verify=True).decode.fit == "pad"
    assert f"Evicted {first.name} (" in capsys.readouterr().out
    assert prepare(data, cache).reused


def test_a_build_claims_its_room_before_it_writes(tmp_path):
    data, cache = keys(make_tree(tmp_path / "data"))
    needed = check(data, cache).bytes_needed
    seen = []
    prepare(data, cache, lambda *_: seen.extend(store.stored_sets(tmp_path / "cache")))
    assert all(s.users == ("its builder",) and s.bytes >= needed for s in seen)
    assert seen[0].pending > 0.9 * needed
    (after,) = store.stored_sets(tmp_path / "cache")
    assert (after.users, after.pending) == ((), 0)


def test_a_set_in_use_is_waited_for(tmp_path, capsys):
    """The holder is another process: there would be nothing to wait for in this one."""
    data, cache = keys(make_tree(tmp_path / "data"), cache={"format": "raw"})
    cache.max_gb = check(data, cache).bytes_needed * 1.5 / 1e9
    first = prepare(data, cache).cache_dir
    data.decode.fit = "pad"
    with store.hold(first, "run here"):
        message = refusal(prepare, data, cache)
        assert "cache.max_gb must have room for all sets that are used at once" in message
        assert f"{first.name} (" in message
    code = f"""
from pathlib import Path
from potstill.data import store
with store.hold(Path({str(first)!r}), "run elsewhere"):
    print("ready", flush=True)
    input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    results = []
    waiting = threading.Thread(target=lambda: results.append(prepare(data, cache)))
    waiting.start()
    said, deadline = "", time.monotonic() + 30
    while "Waiting for room: " not in said and time.monotonic() < deadline:
        time.sleep(0.2)
        said += capsys.readouterr().out
    time.sleep(1.0)  # and it looks again
    said += capsys.readouterr().out
    assert waiting.is_alive()
    assert not results
    assert (first / "manifest.json").exists()
    assert said.count("Waiting for room: ") == 1
    assert "run elsewhere, process" in said
    holder.communicate("")
    waiting.join(60)
    assert open_cache(results[0].cache_dir, verify=True).decode.fit == "pad"
    assert not first.exists()


def test_a_set_that_is_evicted_before_it_is_opened_is_built_again(tmp_path, monkeypatch):
    data, cache = keys(make_tree(tmp_path / "data"))
    folder = prepare(data, cache).cache_dir
    really = module._lock

    def late(plan, progress):
        if plan.finished:
            assert store.evict(cache, plan.key) == [plan.key]
        return really(plan, progress)

    monkeypatch.setattr(module, "_lock", late)
    with prepared(data, cache, "run") as again:
        assert (again.cache_dir, again.reused) == (folder, False)
        assert sum(open_cache(folder, verify=True).counts.values()) == 36
        assert "run, process" in refusal(store.evict, cache, folder.name)
    assert store.evict(cache, folder.name) == [folder.name]


def test_who_waits_for_a_set_that_is_evicted_meanwhile_builds_it_again(tmp_path):
    data, cache = keys(make_tree(tmp_path / "data"))
    folder = prepare(data, cache).cache_dir
    (folder / "manifest.json").unlink()  # a build that its owner has not finished
    lock = os.open(folder / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    results = []
    waiting = threading.Thread(target=lambda: results.append(prepare(data, cache)))
    waiting.start()
    time.sleep(0.4)
    folder.rename(tmp_path / "gone")
    os.close(lock)
    waiting.join(60)
    assert not results[0].reused
    assert sum(open_cache(folder, verify=True).counts.values()) == 36


def photos(root, each=12, px=96):
    """Smooth images, which JPEG makes small."""
    x, y = np.meshgrid(np.linspace(0, 1, px), np.linspace(0, 1, px))
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(each):
            waves = [np.sin((2 + c) * x + i * y + k) * 100 + 128 for k in range(3)]
            Image.fromarray(np.stack(waves, 2).astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root


def test_a_set_of_jpegs(tmp_path, small_shards):
    root = photos(tmp_path / "data")
    data, cache = keys(root, decode={"image_px": 64}, cache={"format": "jpeg", "jpeg_quality": 90})
    plan = check(data, cache)
    prepared = prepare(data, cache)
    assert prepared.cache_dir == plan.folder
    assert plan.source_key != plan.key
    written = sum(path.stat().st_size for path in plan.folder.glob("shard-*.arrow"))
    assert 0.6 * plan.bytes_needed < written <= plan.bytes_needed
    found = open_cache(prepared.cache_dir, verify=True)
    assert (found.pixels, found.manifest["jpeg_quality"]) == ("jpeg", 90)
    cache.format = "raw"
    raw = open_cache(prepare(data, cache).cache_dir)
    assert raw.pixels == "raw"
    assert raw.folder.name == plan.source_key
    assert sum(path.stat().st_size for path in raw.folder.glob("shard-*.arrow")) > 3 * written
    for split in ("train", "val"):
        a, b = raw.split(split), found.split(split)
        assert a.shard_rows == b.shard_rows  # the same order of an epoch
        assert np.array_equal(a.ids, b.ids)
        rows = np.arange(len(a))
        off = np.abs(a.read(rows).astype(int) - b.read(rows))
        assert 0 < off.mean() < 3
    cache.format, cache.jpeg_quality = "jpeg", 80
    assert check(data, cache).key not in (plan.key, raw.key)


def test_a_broken_build_of_jpegs_goes_on(tmp_path, small_shards):
    data, cache = keys(photos(tmp_path / "data"), cache={"format": "jpeg"})
    folder = prepare(data, cache).cache_dir
    sums = {path.name: path.read_bytes() for path in folder.glob("shard-*.arrow")}
    (folder / "shard-00001.arrow").unlink()
    report = prepare(data, cache).report
    assert report["built"]["mended"] == ["shard-00001"]
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*.arrow")} == sums


def test_auto_takes_raw_pixels_where_they_fit_else_jpegs_else_none(tmp_path, capsys):
    data, cache = keys(photos(tmp_path / "data"), decode={"image_px": 64})
    raw = check(data, cache)
    assert (raw.pixels, raw.key) == ("raw", raw.source_key)
    cache.max_gb = raw.bytes_needed * 0.6 / 1e9
    plan = check(data, cache)
    assert plan.pixels == "jpeg"
    folder = prepare(data, cache).cache_dir
    assert folder == plan.folder
    said = capsys.readouterr().out
    assert "cache.format=auto: images are kept as JPEGs" in said
    assert f"cache.max_gb={cache.max_gb:g}" in said
    cache.max_gb = None
    assert check(data, cache).key == plan.key  # what is there is taken
    assert check(data, cache, prefer=raw.key).key == raw.key
    prepare(data, Cache(dir=cache.dir, format="raw"))
    assert check(data, cache).key == raw.key  # raw first
    assert check(data, cache, prefer=plan.key).key == plan.key
    assert check(data, cache, prefer="neither").key == raw.key
    shutil.rmtree(cache.dir)
    cache.max_gb = 1e-6
    message = refusal(check, data, cache)
    assert "GB raw and about 0." in message
    assert "GB as JPEGs" in message


def test_native_pixels_stay_raw(tmp_path):
    data, cache = keys(make_tree(tmp_path / "data"), decode={"fit": "native"})
    cache.max_gb = 1e-6
    message = refusal(check, data, cache)
    assert "GB raw; raise it" in message
    cache.format = "jpeg"
    assert "cache.format must be raw or auto where data.decode.fit is native" in refusal(
        check, data, cache
    )


def test_jpegs_that_turn_out_larger_than_the_samples_stop_before_the_budget_is_passed(
    tmp_path, small_shards, monkeypatch
):
    data, cache = keys(photos(tmp_path / "data"), decode={"image_px": 64})
    cache.format = "jpeg"
    really = module._sampled_sizes
    monkeypatch.setattr(
        module, "_sampled_sizes", lambda plan, quality: [s // 4 for s in really(plan, quality)]
    )
    cache.max_gb = check(data, cache).bytes_needed * 1.05 / 1e9
    message = refusal(prepare, data, cache)
    assert "cache.max_gb must have room for" in message
    assert "of 36 images show" in message
    (left,) = store.stored_sets(tmp_path / "cache")
    assert left.users == ()
    # where there is room, more of it is taken
    cache.max_gb = 1.0
    assert open_cache(prepare(data, cache).cache_dir, verify=True).counts == {
        "train": 30,
        "val": 6,
    }


def test_where_the_cache_cannot_be(tmp_path):
    root = make_tree(tmp_path / "data")
    data, _ = keys(root)
    assert "must not be inside data.root" in refusal(check, data, Cache(dir=str(root / "cache")))
    check(data, Cache(dir=str(root / ".cache")))
    assert "another folder than cache.dir" in refusal(
        check, data, Cache(dir=str(root / ".cache"), local_dir=str(root / ".cache"))
    )
    (tmp_path / "file").write_text("")
    for local in (tmp_path / "file", tmp_path / "file" / "near"):
        there = Cache(dir=str(root / ".cache"), local_dir=str(local))
        assert "cache.local_dir must be a folder that can be written" in refusal(check, data, there)
    assert "must be a folder" in refusal(check, data, Cache(dir=str(tmp_path / "file" / "cache")))


# -------------------------------------------------------------------------------------------- report
def test_duplicates_and_missing_classes_are_reported(tmp_path):
    root = tmp_path / "data"
    for split, classes in {"train": ("a", "b", "c"), "val": ("a", "b")}.items():
        make_tree(root / split, each=3, classes=classes)
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        path.write_bytes(encoded(i))
    same = encoded(500)
    for path in ("train/a/x.png", "train/b/x.png", "val/a/x.png"):
        (root / path).write_bytes(same)
    (root / "train/c/000.png").write_bytes((root / "train/c/001.png").read_bytes())
    report = prepare(*keys(root)).report
    found = report["duplicates"]
    assert (found["groups"], found["images"]) == (2, 5)
    assert (found["groups_across_splits"], found["groups_across_classes"]) == (1, 1)
    listed = [{(m["path"], m["split"], m["class"]) for m in group} for group in found["listed"]]
    assert listed == [
        {
            ("train/a/x.png", "train", "a"),
            ("train/b/x.png", "train", "b"),
            ("val/a/x.png", "val", "a"),
        },
        {("train/c/000.png", "train", "c"), ("train/c/001.png", "train", "c")},
    ]
    assert report["missing_classes"] == {"train": [], "val": ["c"]}
    assert report["counts"] == {"train": 11, "val": 7}
    assert report["by_class"]["c"] == {"train": 3, "val": 0}


def test_the_report_in_numbers_and_on_the_console(tmp_path):
    classes = tuple(f"class{i:02d}" for i in range(23))
    root = make_tree(tmp_path / "data", each=2, classes=classes)
    (root / "class00" / "000.png").write_bytes(encoded(1, size=(100, 50)))
    (root / "class00" / "bad.png").write_bytes(b"")
    (root / "class01" / "notes.txt").write_text("")
    report = prepare(*keys(root)).report
    assert report["sizes"]["width"] == {"min": 20, "median": 20, "max": 100}
    assert report["sizes"]["height"] == {"min": 16, "median": 16, "max": 50}
    assert report["sizes"]["source_bytes"] == sum(os.path.getsize(p) for p in root.rglob("*.png"))
    assert report["ignored_files"] == {".txt": 1}
    assert report["built"]["images_per_s"] > 0
    console = Console(file=io.StringIO(), width=120)
    print_report(report, console)
    text = console.file.getvalue()
    for part in (
        "46 images, 23 classes",
        "class00",
        "… 3 more",
        "1 of 47: 1 empty",
        "1 .txt",
        report["cache_dir"][:40],
    ):
        assert part in text
    assert "class22" not in text


def test_the_console_stays_quiet(tmp_path, capfd):
    prepare(*keys(make_tree(tmp_path / "data")))
    out, err = capfd.readouterr()
    assert out + err == ""


# ------------------------------------------------------------------------------------ other sources
def test_several_labels_weights_and_unlabelled_images_arrive(tmp_path, small_shards):
    root = make_tree(tmp_path / "data")
    make_tree(tmp_path / "more", each=5, classes=("any",))
    names = {"ash": "old|tall", "beech": "", "cedar": "tall"}
    lines = [
        f"{name}/{i:03d}.png,{names[name]},{i / 4},{'val' if i < 3 else 'train'}"
        for name in CLASSES
        for i in range(12)
    ]
    (root / "list.csv").write_text("\n".join(["path,label,weight,split", *lines]))
    data, cache_keys = keys(root, multi_label=True, unlabeled=str(tmp_path / "more"))
    data.source, data.root = "manifest", str(root / "list.csv")
    prepared = prepare(data, cache_keys)
    cache = open_cache(prepared.cache_dir, verify=True)
    assert cache.multi_label
    assert cache.classes == ["old", "tall"]
    train = cache.split("train")
    assert len(train.shard_rows) > 1
    hot = {"ash": [1, 1], "beech": [0, 0], "cedar": [0, 1], "unlabeled": [0, 0]}
    labels = {"ash": 0, "beech": 2, "cedar": 1, "unlabeled": -1}
    rows = np.random.default_rng(0).permutation(len(train))
    targets = train.targets(rows)
    assert (targets.dtype, targets.shape) == (np.float32, (32, 2))
    for row, target in zip(rows, targets, strict=True):
        name, _, file = train.paths[row].partition("/")
        assert target.tolist() == hot[name]
        assert train.labels[row] == labels[name]
        assert train.classes_of(row) == names.get(name, "")
        assert train.weights[row] == (1 if name == "unlabeled" else int(file[:3]) / 4)
    assert train.class_counts().tolist() == [9, 18]
    assert cache.split("test").targets([]).shape == (0, 2)
    report = prepared.report
    assert report["by_class"] == {"old": {"train": 9, "val": 3}, "tall": {"train": 18, "val": 6}}
    assert report["unlabeled"] == 5
    assert report["counts"] == {"train": 32, "val": 9}
    console = Console(file=io.StringIO(), width=120)
    print_report(report, console)
    assert "5 images, for training" in console.file.getvalue()


def test_one_label_unlabelled_images_and_what_is_bad_among_them(tmp_path):
    root = make_tree(tmp_path / "data")
    make_tree(tmp_path / "more", each=5, classes=("any",))
    (tmp_path / "more" / "any" / "bad.png").write_bytes(b"")
    data, cache_keys = keys(root, unlabeled=str(tmp_path / "more"))
    prepared = prepare(data, cache_keys)
    cache = open_cache(prepared.cache_dir)
    train = cache.split("train")
    assert Counter(train.targets(range(len(train))).tolist()) == {-1: 5, 0: 10, 1: 10, 2: 10}
    assert train.class_counts().tolist() == [10, 10, 10]
    bad = pq.read_table(prepared.cache_dir / "quarantine.parquet").to_pylist()
    assert [(row["path"], row["class"]) for row in bad] == [("unlabeled/any/bad.png", "")]
    found = prepared.report["duplicates"]
    # those of `more` are the first of `ash`: what has no label contradicts none
    assert (found["groups"], found["groups_across_classes"]) == (5, 0)
    inside = Cache(dir=str(tmp_path / "more" / "cache"))
    assert "must not be inside data.root or data.unlabeled" in refusal(check, data, inside)


def test_a_source_of_ones_own_is_read_in_tasks(tmp_path, monkeypatch):
    from potstill.registry import load_plugins

    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "drawn_squares.py").write_text(
        """
import io

from PIL import Image

from potstill.data.sources import Entry, Listing
from potstill.registry import register


class Squares:
    def read(self, entry):
        sink = io.BytesIO()
        Image.new("RGB", (16, 16), entry.place).save(sink, "PNG")
        return sink.getvalue()


@register("source", "squares")
def squares(data):
    names = ["black", "white"]
    entries = [
        Entry(f"{name}/{i}", (name,), place=(200 * (name == "white") + i,) * 3)
        for name in names
        for i in range(20)
    ]
    return Listing(entries, Squares(), "squares")
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path / "plugins"))
    load_plugins(["drawn_squares"])
    data = Data(source="squares", decode=Decode(image_px=PX))
    prepared = prepare(data, Cache(dir=str(tmp_path / "cache")))
    cache = open_cache(prepared.cache_dir)
    assert cache.counts == {"train": 32, "val": 8}
    reader = cache.split("val")
    for row, path in enumerate(reader.paths):
        name, _, i = path.partition("/")
        assert (reader.image(row) == 200 * (name == "white") + int(i)).all()
        assert cache.classes[reader.labels[row]] == name


def test_images_in_parquet_are_staged_and_left_nowhere(tmp_path, small_shards):
    import pyarrow as pa

    images = [encoded(i) for i in range(30)]
    table = pa.table({"image": images, "label": [CLASSES[i % 3] for i in range(30)]})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "all.parquet", row_group_size=4)
    data, cache_keys = keys(tmp_path / "data")
    data.source = "parquet"
    prepared = prepare(data, cache_keys)
    assert not list(prepared.cache_dir.glob(".staged*"))
    cache = open_cache(prepared.cache_dir)
    for split in cache.counts:
        reader = cache.split(split)
        for row, path in enumerate(reader.paths):
            i = int(path.removeprefix("all/"))
            assert np.array_equal(reader.image(row), decode_image(images[i], data.decode))
            assert reader.labels[row] == i % 3
