"""The cache on disk, as its readers see it."""

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from potstill.data.cache import FORMAT, encode_jpeg, open_cache, write_shard
from potstill.errors import UserError

PX = 4
SPLIT_ROWS = {"train": [5, 1, 3], "val": [3]}  # odd counts: Arrow pads its buffers


@pytest.fixture
def made(tmp_path):
    return make(tmp_path)


def make(tmp_path, jpeg_quality=None):
    """A cache of random pixels, and what was put in: {split: (images, ids, labels, hashes, paths)}."""
    rng = np.random.default_rng(0)
    shards, content = [], {}
    for split, counts in SPLIT_ROWS.items():
        n = sum(counts)
        images = rng.integers(0, 256, (n, PX, PX, 3), np.uint8)
        ids = np.sort(rng.choice(10**15, n, replace=False))
        labels = rng.integers(0, 2, n)
        hashes = [bytes([i, *rng.integers(0, 256, 30).tolist(), 0]) for i in range(n)]
        paths = [f"{split}/ü{i}.jpg" for i in range(n)]
        start = 0
        for rows in counts:
            part = slice(start, start + rows)
            columns = {
                "image": images[part],
                "label": labels[part],
                "weight": np.ones(rows),
                "id": ids[part],
                "sha256": hashes[part],
                "path": paths[part],
                "width": np.arange(start, start + rows),
                "height": np.full(rows, 7),
            }
            name = f"shard-{len(shards):05d}.arrow"
            shards.append({"split": split, **write_shard(tmp_path, name, columns, jpeg_quality)})
            start += rows
        content[split] = (images, ids, labels, hashes, paths)
    manifest = {
        "format": FORMAT,
        "key": "k",
        "pixels": "raw" if jpeg_quality is None else "jpeg",
        "classes": ["a", "b"],
        "decode": {"image_px": PX, "fit": "squash", "max_megapixels": 1.0},
        "counts": {split: sum(counts) for split, counts in SPLIT_ROWS.items()},
        "shards": shards,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path, content


def test_what_was_written_is_read(made):
    folder, content = made
    cache = open_cache(folder, verify=True)
    assert (cache.key, cache.classes, cache.decode.fit, cache.counts) == (
        "k",
        ["a", "b"],
        "squash",
        {"train": 9, "val": 3},
    )
    for split, (images, ids, labels, hashes, paths) in content.items():
        reader = cache.split(split)
        assert (len(reader), reader.shard_rows) == (len(ids), SPLIT_ROWS[split])
        assert reader.ids.dtype == reader.labels.dtype == np.int64
        assert np.array_equal(reader.ids, ids)
        assert np.array_equal(reader.labels, labels)
        assert np.array_equal(reader.hashes, np.array(hashes, "S32"))
        assert reader.paths == paths
        assert np.array_equal(reader.original_sizes, [[i, 7] for i in range(len(ids))])
        assert np.array_equal(reader.read(np.arange(len(ids))), images)
        for row, sample_id in enumerate(ids.tolist()):
            assert reader.row_of(sample_id) == row
            assert np.array_equal(reader.image(row), images[row])
    assert len(cache.split("test")) == 0
    assert cache.split("test").ids.shape == (0,)


def test_rows_are_read_in_the_order_asked_for(made):
    folder, content = made
    images = content["train"][0]
    reader = open_cache(folder).split("train")
    rows = np.array([8, 0, 5, 5, 4, 6])
    assert np.array_equal(reader.read(rows), images[rows])
    assert reader.read([]).shape == (0, PX, PX, 3)
    out = np.zeros((8, PX, PX, 3), np.uint8)
    reader.read(rows, out=out[1:7])
    assert np.array_equal(out[1:7], images[rows])
    assert not out[[0, 7]].any()
    with ThreadPoolExecutor(4) as pool:
        for got, n in zip(
            pool.map(reader.read, [rows[:n] for n in range(6)] * 20),
            list(range(6)) * 20,
            strict=True,
        ):
            assert np.array_equal(got, images[rows[:n]])


def test_a_read_is_a_copy_and_the_cache_cannot_be_written_to(made):
    folder, content = made
    reader = open_cache(folder).split("train")
    reader.read([0])[:] = 0
    assert np.array_equal(reader.read([0])[0], content["train"][0][0])
    with pytest.raises(ValueError, match="read-only"):
        reader.image(0)[:] = 0


@pytest.mark.parametrize("rows", [[-1], [9], [0, 100]])
def test_rows_that_are_not_there(made, rows):
    reader = open_cache(made[0]).split("train")
    with pytest.raises(IndexError):
        reader.read(rows)
    with pytest.raises(IndexError):
        reader.image(rows[-1])
    with pytest.raises(KeyError):
        reader.row_of(-5)


def test_it_travels_as_its_folder(made):
    folder, content = made
    cache = open_cache(folder)
    reader = cache.split("train")
    reader.read([0])
    packed = pickle.dumps(reader)
    assert len(packed) < 1000
    assert np.array_equal(pickle.loads(packed).read([3]), content["train"][0][[3]])
    assert pickle.loads(pickle.dumps(cache)).folder == folder


@pytest.mark.parametrize("how", ["shorter", "gone", "flipped"])
def test_damage_is_noticed(made, how):
    folder, _ = made
    shard = folder / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    if how == "gone":
        shard.unlink()
    elif how == "shorter":
        shard.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        open_cache(folder)  # only the checksum can tell
    with pytest.raises(UserError, match=r"shard-00001.arrow is damaged: .*; run jobs/prepare.py"):
        open_cache(folder, verify=True)


def test_what_is_no_cache(made, tmp_path):
    folder, _ = made
    with pytest.raises(UserError, match=r"finished cache.*manifest.json.*jobs/prepare.py"):
        open_cache(tmp_path / "nowhere")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest)[:-10])
    with pytest.raises(UserError, match="finished cache"):
        open_cache(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match=f"format {FORMAT}, got 99"):
        open_cache(folder)


def test_many_shards_do_not_hold_many_files_open(made):
    import os

    folder, _ = made
    before = len(os.listdir("/proc/self/fd"))
    reader = open_cache(folder).split("train")
    reader.read([0, 8])
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------------------------------------- jpeg
def decoded(image, quality):
    with Image.open(io.BytesIO(encode_jpeg(image, quality))) as im:
        assert im.mode == "RGB"
        return np.array(im)


def test_jpeg_records_are_decoded_when_they_are_read(tmp_path):
    folder, content = make(tmp_path, jpeg_quality=90)
    cache = open_cache(folder, verify=True)
    assert cache.pixels == "jpeg"
    for split, (images, ids, *_) in content.items():
        reader = cache.split(split)
        expected = np.stack([decoded(image, 90) for image in images])
        assert not np.array_equal(expected, images)
        assert np.array_equal(reader.ids, ids)
        assert np.array_equal(reader.read(np.arange(len(ids))), expected)
        assert np.array_equal(reader.image(1), expected[1])
        with pytest.raises(ValueError, match="read-only"):
            reader.image(1)[:] = 0
    reader, images = cache.split("train"), content["train"][0]
    expected = np.stack([decoded(image, 90) for image in images])
    rows = np.array([8, 0, 5, 5, 4, 6])
    out = np.zeros((8, PX, PX, 3), np.uint8)
    reader.read(rows, out=out[1:7])
    assert np.array_equal(out[1:7], expected[rows])
    assert not out[[0, 7]].any()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(pickle.loads(pickle.dumps(reader)).read, [rows] * 40):
            assert np.array_equal(got, expected[rows])


def test_quality_is_what_is_asked_for_and_colours_are_not_subsampled():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, ::2] = (255, 0, 0)  # stripes of one pixel, which 4:2:0 would blend
    error = [np.abs(decoded(image, q).astype(int) - image).mean() for q in (95, 30)]
    assert error[0] < 6
    assert error[1] > 2 * error[0]
    assert len(encode_jpeg(image, 95)) > len(encode_jpeg(image, 30))


@pytest.mark.parametrize("how", ["no jpeg", "another size"])
def test_a_damaged_jpeg_is_named(tmp_path, how):
    folder, content = make(tmp_path, jpeg_quality=90)
    shard = folder / "shard-00000.arrow"
    record = encode_jpeg(content["train"][0][2], 90)
    other = b"\0" * len(record)
    if how == "another size":
        place = record.index(b"\xff\xc0") + 5  # the frame's header: its height and width
        other = record[:place] + bytes([0, PX - 1, 0, PX]) + record[place + 4 :]
    damaged = shard.read_bytes().replace(record, other)
    assert damaged != shard.read_bytes()
    shard.write_bytes(damaged)
    reader = open_cache(folder).split("train")
    reader.read([0, 1])
    with pytest.raises(UserError, match=r"shard-00000.arrow is damaged: image 2.*jobs/prepare.py"):
        reader.read([0, 2])
