"""Real and fake crops: the generator is the only thing that tells them apart."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from conftest import run_job
from potstill.config import compose
from potstill.data import fakes
from potstill.data.fakes import CLASSES, fake, make_fakes, upsampling
from potstill.errors import UserError

PX = 32
SPLITS = ("train", "val", "test")


def write_images(root: Path, counts: dict[str, int], size: tuple[int, int] = (90, 77)) -> Path:
    """JPEGs of shapes and grain, each of its own, in folders."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([*name.encode(), i])
            shapes = Image.fromarray(rng.integers(40, 216, (9, 9, 3), np.uint8))
            pixels = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
            pixels += rng.normal(0, 12, pixels.shape)
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(root / name / f"{i:03d}.jpg", quality=90)
    return root


def make(images: Path, output: Path, generator: str = "transposed", **changes) -> Path:
    settings: dict[str, Any] = {"max_images": 120, "px": PX, "jpeg_quality": 95, "seed": 0}
    return make_fakes(images, output, generator, **(settings | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def sources(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sources.csv", newline="") as file:
        return list(csv.DictReader(file))


def crops(folder: Path, split: str, name: str) -> np.ndarray:
    """[N, px, px] float64, grey."""
    found = [
        np.asarray(Image.open(p).convert("L")) for p in sorted((folder / split / name).iterdir())
    ]
    return np.stack(found).astype(np.float64)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three folders of different size, and what must be left out."""
    root = write_images(tmp_path_factory.mktemp("images"), {"ash": 70, "elm/a": 60, "oak": 33})
    content = (root / "ash" / "000.jpg").read_bytes()
    for name in ("ash", "elm/a", "oak"):
        (root / name / "cut.jpg").write_bytes(content[: len(content) // 2] + name.encode())
    shutil.copy(root / "ash" / "001.jpg", root / "oak" / "copy.jpg")
    Image.new("RGB", (PX - 1, 90)).save(root / "oak" / "narrow.png")
    (root / "oak" / "text.jpg").write_text("no image")
    return root


@pytest.fixture(scope="module")
def made(images, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {g: make(images, folder / g, g) for g in ("nearest", "bilinear", "transposed")}


# ---------------------------------------------------------------------------------------------- sets
def test_both_classes_are_equal_in_number_split_by_split_and_folder_by_folder(images, made):
    about = json.loads((made["nearest"] / "fakes.json").read_text())
    assert about["counts"] == {
        split: dict.fromkeys(CLASSES, n) for split, n in {"train": 42, "val": 9, "test": 9}.items()
    }
    for split in SPLITS:
        folders: dict[str, list[str]] = {name: [] for name in CLASSES}
        for row in sources(made["nearest"]):
            if row["file"].startswith(f"{split}/"):
                folders[row["file"].split("/")[1]].append(str(Path(row["image"]).parent))
        real, fakes_ = (folders[name] for name in CLASSES)
        for folder in ("ash", "elm/a", "oak"):
            assert abs(real.count(folder) - fakes_.count(folder)) <= 1, "an odd one is left of each"
            assert split != "train" or real.count(folder) > 5, "folders take turns"


@pytest.mark.parametrize("few", [256, 0], ids=["by rank", "each by itself"])
def test_an_image_has_one_split_and_one_class_whatever_the_set(images, tmp_path, monkeypatch, few):
    monkeypatch.setattr(fakes, "_FEW", few)
    first = make(images, tmp_path / "first", "nearest")
    other = make(images, tmp_path / "other", seed=7, max_images=60)
    split_of: dict[str, set[str]] = {}
    for folder in (first, other):
        class_of: dict[str, set[str]] = {}
        for row in sources(folder):
            content = hashlib.sha256((images / row["image"]).read_bytes()).hexdigest()
            split, name, _ = row["file"].split("/")
            split_of.setdefault(content, set()).add(split)
            class_of.setdefault(content, set()).add(name)
        assert all(len(names) == 1 for names in class_of.values())
    assert all(len(splits) == 1 for splits in split_of.values())
    both = [{r["image"] for r in sources(folder)} for folder in (first, other)]
    assert both[0] & both[1], "some are in both sets"
    assert both[1] - both[0], "and another seed takes others"


def test_the_table_says_where_each_file_was_cut(images, made):
    for row in sources(made["nearest"])[:20]:
        left, top = int(row["left"]), int(row["top"])
        whole = np.asarray(Image.open(images / row["image"]))
        crop = whole[top : top + PX, left : left + PX]
        if "1_fake" in row["file"]:
            crop = fake(crop, upsampling("nearest", 0))
        buffer = io.BytesIO()
        Image.fromarray(crop).save(buffer, "JPEG", quality=95, subsampling=2)
        assert (made["nearest"] / row["file"]).read_bytes() == buffer.getvalue()


def test_all_files_have_the_same_header_time_and_names(made):
    for folder in made.values():
        seen, times = set(), set()
        for path in folder.glob("*/*/*"):
            with Image.open(path) as im:
                assert isinstance(im, JpegImagePlugin.JpegImageFile)
                tables = tuple(tuple(t) for t in im.quantization.values())
                seen.add((im.size, im.mode, tables, JpegImagePlugin.get_sampling(im), str(im.info)))
            content = path.read_bytes()
            seen.add(content[: content.index(b"\xff\xda")])  # everything before the pixels
            times.add(path.stat().st_mtime_ns)
        assert len(seen) == 2
        assert len(times) == 1
        for split in SPLITS:
            real, fakes_ = (sorted(p.name for p in (folder / split / c).iterdir()) for c in CLASSES)
            assert real == fakes_


def test_phases_in_the_grid_of_the_images_own_jpeg_are_the_same_in_both_classes(made):
    phases = {name: [] for name in CLASSES}
    for row in sources(made["bilinear"]):
        phases[row["file"].split("/")[1]].append((int(row["left"]) % 8, int(row["top"]) % 8))
    real, fakes_ = (sorted(phases[name]) for name in CLASSES)
    assert real == fakes_
    assert {x for x, _ in real} == {y for _, y in real} == set(range(8))


def test_the_same_call_gives_the_same_bytes_and_another_seed_others(images, made, tmp_path):
    first, again = files(made["transposed"]), files(make(images, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(first[name] == again[name] for name in first)
    other = files(make(images, tmp_path / "other", seed=1))
    assert sum(first[n] == other[n] for n in first if n.endswith(".jpg")) == 0


def test_png_for_both_where_there_is_no_quality(images, tmp_path):
    folder = make(images, tmp_path / "set", jpeg_quality=None, max_images=40)
    assert {p.suffix for p in folder.glob("*/*/*")} == {".png"}
    nearest = make(images, tmp_path / "nearest", "nearest", jpeg_quality=None, max_images=40)
    fakes_ = crops(nearest, "train", "1_fake")
    assert (fakes_[:, ::2, ::2] == fakes_[:, 1::2, 1::2]).all()


def test_what_is_no_use_is_left_out_and_counted(images, tmp_path):
    # more than there are, so that every file is looked at
    folder = make(images, tmp_path / "set", max_images=4000)
    about = json.loads((folder / "fakes.json").read_text())
    assert about["left_out"] == {
        "a copy of another": 1,
        "not an image": 1,
        f"smaller than {PX} px": 1,
        "truncated": 3,
    }
    small = next(e for e in about["left_out_examples"] if e["reason"].startswith("smaller"))
    assert small == {"path": "oak/narrow.png", "reason": "smaller than 32 px", "detail": "31x90"}


def test_few_images_give_several_crops_disjoint_while_there_is_room(tmp_path):
    images = write_images(tmp_path / "few", {"a": 40}, size=(110, 104))
    for wanted, disjoint in ((120, True), (6000, False)):
        folder = make(images, tmp_path / str(wanted), max_images=wanted)
        places: dict[str, list[tuple[int, int]]] = {}
        for row in sources(folder):
            places.setdefault(row["image"], []).append((int(row["left"]), int(row["top"])))
        assert max(map(len, places.values())) > 1
        for at in places.values():
            assert len(set(at)) == len(at)
            assert all(0 <= x <= 110 - PX and 0 <= y <= 104 - PX for x, y in at)
            gaps = [
                max(abs(a[0] - b[0]), abs(a[1] - b[1])) for i, a in enumerate(at) for b in at[:i]
            ]
            assert min(gaps, default=PX) >= (PX if disjoint else PX // 4)
        counts = json.loads((folder / "fakes.json").read_text())["counts"]
        assert all(c["0_real"] == c["1_fake"] for c in counts.values())
        total = sum(sum(c.values()) for c in counts.values())
        assert total == 120 if disjoint else 120 < total < 6000


# -------------------------------------------------------------------------------------------- splits
@pytest.mark.parametrize(
    ("there", "comes_from"),
    [
        (("train", "Validation"), {"train": "train", "val": "Validation", "test": "Validation"}),
        (("train", "test"), {"train": "train", "val": "train", "test": "test"}),
        (("training", "val", "test"), {"train": "training", "val": "val", "test": "test"}),
        (("train",), dict.fromkeys(SPLITS, "train")),
    ],
)
def test_the_folders_own_splits_are_kept(tmp_path, there, comes_from):
    images = write_images(tmp_path / "in", {f"{name}/x": 36 for name in there} | {"loose": 3})
    # the same picture on two sides is used on one
    for name in there[1:]:
        shutil.copy(images / there[0] / "x" / "000.jpg", images / name / "x" / "leak.jpg")
    folder = make(images, tmp_path / "out", max_images=60)
    came: dict[str, set[str]] = {}
    contents: dict[bytes, set[str]] = {}
    for row in sources(folder):
        split = row["file"].split("/")[0]
        came.setdefault(split, set()).add(row["image"].split("/")[0])
        contents.setdefault((images / row["image"]).read_bytes(), set()).add(split)
    assert came == {split: {name} for split, name in comes_from.items()}
    assert all(len(splits) == 1 for splits in contents.values())
    assert json.loads((folder / "fakes.json").read_text())["ignored"] == {"(in no split)": 3}


# ----------------------------------------------------------------------------------------- generators
def test_doubling_by_hand():
    """Two grey levels side by side, halved to [0, 100] in every row."""
    crop = np.zeros((4, 4, 3), np.uint8)
    crop[:, 2:] = 100
    crop[:, 0], crop[:, 1] = 10, 0  # their mean is 5
    assert fake(crop, upsampling("nearest", 0))[1, :, 0].tolist() == [5, 5, 100, 100]
    # 0.75 of the own and 0.25 of the nearer neighbour; the border's own outside
    by_hand = [5, round(0.75 * 5 + 25), round(75 + 0.25 * 5), 100]
    assert fake(crop, upsampling("bilinear", 0))[2, :, 1].tolist() == by_hand


def test_random_weights_are_positive_keep_brightness_and_leave_a_checkerboard():
    import torch

    kernel = upsampling("transposed", 3)
    assert (kernel > 0).all()
    assert kernel.sum((0, 1)) == pytest.approx(4)
    assert (kernel == upsampling("transposed", 3)).all()
    assert (kernel != upsampling("transposed", 4)).any()
    flat = fake(np.full((16, 16, 3), 128, np.uint8), kernel)
    assert flat.mean() == pytest.approx(128, abs=0.5)
    assert (flat[::2, ::2] == flat[0, 0]).all(), "of period 2"
    assert 2 < np.ptp(flat.astype(int), axis=(0, 1)).max() < 40, "and seen by a machine, not by you"
    # it is torch's transposed convolution, but for the border
    crop = np.random.default_rng(0).integers(60, 200, (16, 16, 3), np.uint8)
    half = torch.tensor(crop.reshape(8, 2, 8, 2, 3).mean((1, 3))).permute(2, 0, 1)[None]
    weight = torch.tensor(kernel).permute(2, 0, 1)[:, None]
    out = torch.nn.functional.conv_transpose2d(half, weight, stride=2, padding=1, groups=3)
    expected = out[0].permute(1, 2, 0).numpy()[2:-2, 2:-2]
    assert np.abs(fake(crop, kernel)[2:-2, 2:-2] - expected).max() <= 0.5 + 1e-9


def trace(grey: np.ndarray, generator: str) -> np.ndarray:
    """[N]: larger where the generator has been."""
    dx = np.abs(np.diff(grey, axis=2))
    within, across = dx[..., ::2].mean((1, 2)), dx[..., 1::2].mean((1, 2))
    if generator == "nearest":
        return across / within
    if generator == "bilinear":
        return 1 / (within + across)
    signs = (-1.0) ** np.arange(grey.shape[1])
    shares = [
        np.abs((grey * s).mean((1, 2))) for s in (signs, signs[:, None], signs * signs[:, None])
    ]
    return np.max(shares, axis=0)


@pytest.mark.parametrize("generator", ["nearest", "bilinear", "transposed"])
def test_a_generators_trace_survives_and_brightness_tells_nothing(made, generator):
    from sklearn.metrics import roc_auc_score

    real, fakes_ = (crops(made[generator], "train", name) for name in CLASSES)
    y = np.repeat([0, 1], [len(real), len(fakes_)])
    both = np.concatenate([real, fakes_])
    assert roc_auc_score(y, trace(both, generator)) > 0.95
    assert abs(roc_auc_score(y, both.mean((1, 2))) - 0.5) < 0.2, "42 of each"


def test_a_fake_shows_what_its_crop_showed(images, made):
    for generator, folder in made.items():
        for row in [r for r in sources(folder) if "1_fake" in r["file"]][:10]:
            left, top = int(row["left"]), int(row["top"])
            crop = np.asarray(Image.open(images / row["image"]).convert("L"), np.float64)
            crop = crop[top : top + PX, left : left + PX]
            mine = np.asarray(Image.open(folder / row["file"]).convert("L"), np.float64)
            coarse = [a.reshape(8, 4, 8, 4).mean((1, 3)).ravel() for a in (crop, mine)]
            assert np.corrcoef(*coarse)[0, 1] > 0.95, generator
            assert mine.mean() == pytest.approx(crop.mean(), rel=0.02)


# -------------------------------------------------------------------------------------------- again
def test_a_finished_set_is_found_and_a_stopped_one_made_again(images, tmp_path, monkeypatch):
    whole = files(make(images, tmp_path / "whole", max_images=40))
    output = tmp_path / "stopped"
    encoded, left = fakes._encoded, 15

    def stop(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return encoded(*args)

    monkeypatch.setattr(fakes, "_encoded", stop)
    with pytest.raises(KeyboardInterrupt):
        make(images, output, max_images=60)
    assert list(output.glob("*/*/*.jpg"))
    assert not (output / "fakes.json").exists()
    monkeypatch.setattr(fakes, "_encoded", encoded)
    # what the larger one has left is not in the smaller one
    assert files(make(images, output, max_images=40)) == whole
    monkeypatch.setattr(fakes, "_encoded", stop)
    assert make(images, output, max_images=40) == output, "nothing is written"
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    assert make(moved, output, max_images=40) == output, "names and sizes count, not places"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"generator": "nearest"}, r"generator must be that of the set in .* generator=transposed"),
        ({"seed": 1}, r"seed must be that of the set in .* made with seed=0, got seed=1"),
        ({"jpeg_quality": None}, r"jpeg_quality must be .* jpeg_quality=95, got jpeg_quality=None"),
        ({"px": 31}, r"px must be even"),
        (
            {"px": 78},
            r"2 usable images for each of train, val and test, got 0 for train .* smaller",
        ),
    ],
)
def test_other_settings_are_refused_by_name(images, made, tmp_path, changes, says):
    before = files(made["transposed"])
    output = tmp_path / "new" if changes.get("px") == 78 else made["transposed"]
    with pytest.raises(UserError, match=says):
        make(images, output, **changes)
    assert files(made["transposed"]) == before


def test_other_folders_are_refused(images, made, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"output must be a new folder.*'thesis\.txt'"):
        make(images, mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="output must not lie in images"):
        make(images, images / "fakes")
    assert not (images / "fakes").exists()
    with pytest.raises(UserError, match=r"images must be a folder of images.*check the path"):
        make(tmp_path / "none", tmp_path / "x")
    with pytest.raises(UserError, match="images must be a folder that holds images"):
        make(mine, tmp_path / "x")
    other = tmp_path / "other"
    shutil.copytree(images, other)
    (other / "ash" / "005.jpg").unlink()
    with pytest.raises(UserError, match=r"images: the set in .* was made of other images"):
        make(other, made["transposed"])
    hurt = tmp_path / "hurt"
    shutil.copytree(made["transposed"], hurt)
    (hurt / "val" / "0_real" / "00000.jpg").unlink()
    with pytest.raises(UserError, match="no longer those that were written; delete the folder"):
        make(images, hurt)


def test_the_job_says_what_it_made(images, tmp_path):
    arguments = (f"images={images}", "generator=bilinear", "px=32", "max_images=100")
    done = run_job("make_fakes", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bilinear: 100 crops" in done.stdout
    assert (tmp_path / "data/fakes/bilinear/fakes.json").exists()
    refused = run_job("make_fakes", "px=32", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: images must be a folder of images, got null")


# --------------------------------------------------------------------------------------------- audit
def resaved(folder: Path, careless: Path, quality: int | None) -> Path:
    """The fakes written another way than the reals."""
    shutil.copytree(folder, careless)
    for path in careless.glob("*/1_fake/*.jpg"):
        with Image.open(path) as im:
            pixels = im.convert("RGB")
        if quality is None:
            path.unlink()
            pixels.save(path.with_suffix(".png"))
        else:
            pixels.save(path, quality=quality)
    return careless


@pytest.mark.parametrize(
    ("how", "flagged"),
    [("careful", set()), ("png", {"format", "jpeg_quality"}), ("quality 90", {"jpeg_quality"})],
)
def test_the_audit_catches_a_set_without_that_care(made, tmp_path, ray_session, how, flagged):
    from potstill.audit_report import audit_dataset

    root = made["transposed"]
    if how != "careful":
        root = resaved(root, tmp_path / "careless", None if how == "png" else 90)
    found = audit_dataset(
        compose(
            "audit",
            [
                f"data.root={root}",
                f"cache.dir={tmp_path / 'cache'}",
                f"output={tmp_path / 'out'}",
                f"data.decode.image_px={PX}",
                "data.decode.fit=native",
                "checks=[history]",
            ],
        )
    )["findings"][0]
    assert flagged <= set(found["facts"]["flagged"])
    assert (found["severity"] == "serious") == bool(flagged)


def test_what_jobs_write_lies_where_jobs_read(tmp_path, monkeypatch):
    """A submitted job's current folder is a copy of the code, and goes with the job."""
    from potstill.config import Data, MakeFakesConfig
    from potstill.data.digits import list_digits

    home, code = tmp_path / "home", tmp_path / "code"
    code.mkdir()
    monkeypatch.chdir(code)
    monkeypatch.setenv("POTSTILL_HOME", str(home))
    assert list_digits(Data(source="digits", root="data/digits")).entries
    write_images(home / "photos", {"a": 40})
    asked = MakeFakesConfig(images="photos", generator="transposed", max_images=60, px=PX)
    assert fakes.make_fakes_shown(asked) == home / "data" / "fakes" / "transposed"
    assert list(code.iterdir()) == []
    with pytest.raises(UserError, match="output must be a folder of this machine, got s3://b/f"):
        fakes.make_fakes_shown(MakeFakesConfig(images="photos", output="s3://b/f"))
