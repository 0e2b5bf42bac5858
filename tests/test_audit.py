"""What is planted in a dataset must be found, and a clean one must be left in peace."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from conftest import ROOT, run_job
from potstill.config import compose
from potstill.data import audit
from potstill.errors import UserError

CLASSES = ("ash", "birch", "elm", "oak")


def scene(rng: np.random.Generator, kind: int, px: int = 96) -> Image.Image:
    """A picture of its own with a class's hue and grain."""
    size = 6 + 5 * kind
    shapes = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    pixels = np.asarray(shapes.resize((px, px), Image.Resampling.BICUBIC)).astype(np.float32)
    pixels[..., kind % 3] += 40 if kind < 3 else -40
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_scenes(root: Path, train: int = 40, val: int = 16) -> Path:
    """Class folders of scenes: train/<class>/000.jpg and so on, all written alike."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                scene(rng, kind).save(folder / f"{i:03d}.jpg", quality=92)
    return root


def again(path: Path, quality: int) -> None:
    """Write a JPEG once more."""
    with Image.open(path) as im:
        pixels = im.convert("RGB")
    pixels.save(path, quality=quality)


def run(folder: Path, root: Path, *overrides: str) -> dict[str, dict]:
    config = compose(
        "audit",
        [
            f"data.root={root}",
            f"cache.dir={folder / 'cache'}",
            f"output={folder / 'out'}",
            "data.decode.image_px=96",
            *overrides,
        ],
    )
    from potstill.audit_report import audit_dataset

    return {f["check"]: f for f in audit_dataset(config)["findings"]}


def table(folder: Path, check: str) -> list[dict[str, str]]:
    with open(folder / "out" / f"{check}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def clean(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("clean")
    write_scenes(folder / "tree")
    return folder, run(folder, folder / "tree")


@pytest.fixture(scope="module")
def planted(tmp_path_factory, ray_session):
    """Near-duplicates across splits and classes, an exact one, 8 moved files, a blank one."""
    folder = tmp_path_factory.mktemp("planted")
    tree = write_scenes(folder / "tree")
    with Image.open(tree / "train/oak/000.jpg") as im:
        small = im.crop((3, 0, 94, 91)).resize((70, 70)).point(lambda v: min(255, int(v * 1.15)))
        small.save(tree / "val/oak/leak.jpg", quality=45)
    with Image.open(tree / "train/elm/000.jpg") as im:
        im.filter(ImageFilter.GaussianBlur(1)).save(tree / "train/ash/conflict.jpg", quality=60)
    shutil.copy(tree / "train/birch/000.jpg", tree / "train/birch/copy.jpg")
    for i in range(8):
        kind = i % 4
        source = tree / "train" / CLASSES[kind] / f"{10 + i:03d}.jpg"
        wrong = CLASSES[(kind + 1 + i // 4) % 4]
        source.rename(tree / "train" / wrong / f"moved-{i}.jpg")
    Image.new("RGB", (96, 96), (90, 91, 90)).save(tree / "train/oak/blank.jpg", quality=92)
    return folder, run(folder, tree)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory, ray_session):
    """One class written at another quality, and a darker, softer validation split."""
    folder = tmp_path_factory.mktemp("skewed")
    tree = write_scenes(folder / "tree")
    for path in sorted(tree.rglob("*.jpg")):
        if "val" in path.parts:
            with Image.open(path) as im:
                dark = im.point(lambda v: int(v * 0.8)).filter(ImageFilter.GaussianBlur(0.7))
            dark.save(path, quality=92)
        again(path, 70 if path.parent.name == "elm" else 95)
    return folder, run(folder, tree)


# ------------------------------------------------------------------------------------- whole audits
def test_a_clean_set_is_left_in_peace(clean):
    _, found = clean
    fine = dict.fromkeys(("duplicates", "labels", "balance", "splits", "blank"), "ok")
    # the grain of a class makes its files larger: said, but no shortcut
    assert {name: f["severity"] for name, f in found.items()} == {**fine, "history": "note"}
    assert found["history"]["facts"]["flagged"] == []
    assert "bytes, bytes_per_pixel would" in found["history"]["evidence"]
    assert found["labels"]["facts"]["estimated_share"] < 0.01


def test_near_duplicates_are_found_and_told_apart(planted):
    folder, found = planted
    assert found["duplicates"]["severity"] == "serious"
    groups: dict[str, set[str]] = {}
    for row in table(folder, "duplicates"):
        groups.setdefault(row["group"], set()).add(row["path"])
    assert {frozenset(g) for g in groups.values()} == {
        frozenset({"train/oak/000.jpg", "val/oak/leak.jpg"}),
        frozenset({"train/elm/000.jpg", "train/ash/conflict.jpg"}),
        frozenset({"train/birch/000.jpg", "train/birch/copy.jpg"}),
    }
    facts = found["duplicates"]["facts"]
    assert facts["groups_across_splits"] == facts["groups_across_classes"] == 1
    assert facts["groups_of_same_bytes"] == 1


def test_flipped_labels_are_found_with_the_right_suggestion(planted):
    folder, found = planted
    suspects = {row["path"]: row for row in table(folder, "labels")}
    moved = {path for path in suspects if "moved-" in path or "conflict" in path}
    assert len(moved) >= 7, "of 8 moved and one copied into another class"
    assert len(moved) >= 0.6 * len(suspects)
    right = sum(suspects[p]["suggested"] == CLASSES[int(p[-5]) % 4] for p in moved if "moved-" in p)
    assert right >= len(moved) - 2
    assert found["labels"]["severity"] == "serious"
    assert 0.01 < found["labels"]["facts"]["estimated_share"] < 0.1


def test_a_blank_image_is_found_and_a_blurred_one_and_nothing_else(planted):
    folder, found = planted
    assert [(r["path"], r["problem"]) for r in table(folder, "blank")] == [
        ("train/oak/blank.jpg", "nearly blank"),
        ("train/ash/conflict.jpg", "blurred"),
    ]
    assert found["blank"]["severity"] == "warning"


def test_a_class_of_another_quality_is_a_shortcut(skewed):
    folder, found = skewed
    assert found["history"]["severity"] == "serious"
    assert "jpeg_quality" in found["history"]["facts"]["flagged"]
    row = next(r for r in table(folder, "history") if r["column"] == "jpeg_quality")
    assert row["class"] == "elm"
    assert float(row["area_under_curve"]) > 0.99
    assert row["values"] == "70 in 100% of its files, elsewhere in 0%"


def test_a_shifted_split_is_found_and_said_how(skewed):
    folder, found = skewed
    assert found["splits"]["severity"] == "serious"
    differing = {r["compared"] for r in table(folder, "splits") if r["differs"] == "True"}
    assert {"the images' features", "brightness", "sharpness"} <= differing
    assert not {"class mix", "width", "height"} & differing


def test_the_page_stands_alone(planted):
    folder, _ = planted
    page = (folder / "out" / "audit.html").read_text()
    for word in ("Near-duplicates", "leak.jpg", "conflicting labels", "across splits", "blank.jpg"):
        assert word in page
    assert page.count("data:image/jpeg;base64,") > 10
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    written = json.loads((folder / "out" / "audit.json").read_text())
    assert written["images"] == 4 * 56 + 4


def test_strict_ends_with_a_status(planted):
    folder, _ = planted
    done = run_job(
        "audit",
        f"data.root={folder / 'tree'}",
        f"cache.dir={folder / 'cache'}",
        "data.decode.image_px=96",
        "checks=[duplicates,blank]",
        "strict=true",
        cwd=folder,
    )
    assert done.returncode == 2, done.stderr
    assert "strict=true allows no serious finding, got 1 (Near-duplicates)" in done.stderr
    assert "Near-duplicates" in done.stdout


def test_max_images_is_said_and_kept(planted, tmp_path):
    folder, _ = planted
    shutil.copytree(folder / "cache", tmp_path / "cache")
    found = run(tmp_path, folder / "tree", "max_images=100", "folds=3")
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert written["judged"] == 100
    assert "100 of 228 images (max_images)" in written["notes"][0]
    assert found["labels"]["facts"]["images"] <= 100
    assert found["history"]["facts"]["files"] <= 100
    assert found["duplicates"]["facts"]["groups"] == 3, "all images are compared"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.init_from=x.pth"], r"model\.init_from needs model\.name, got null"),
        (["model.name=resnet18"], r"model\.name=resnet18 needs weights from one place"),
        (
            ["model.name=resnet18", "model.init_from=no.pth"],
            r"model\.init_from must be .* got 'no\.pth', which does not exist",
        ),
        (["model.name=resnet18", "from_run=runs/a"], r"set one of them"),
        (["from_run=runs/none"], r"from_run must be the folder of a run"),
        (["checks=[duplicates,colours]"], r"checks must be some of duplicates, labels"),
        (["near_bits=40"], r"near_bits must be >= 0 and <= 24, got 40"),
    ],
)
def test_mistakes_are_refused_before_anything_is_prepared(overrides, says, tmp_path):
    from potstill.audit_report import audit_dataset

    with pytest.raises(UserError, match=says):
        audit_dataset(
            compose("audit", ["data.root=/", f"cache.dir={tmp_path / 'cache'}", *overrides])
        )
    assert not (tmp_path / "cache").exists()


def test_features_of_a_network_see_what_is_planted(planted, tmp_path):
    """Weights from a file, through the network's own feature maps."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder, _ = planted
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "w.safetensors")
    shutil.copytree(folder / "cache", tmp_path / "cache")
    found = run(
        tmp_path,
        folder / "tree",
        "checks=[labels]",
        "model.name=test_efficientnet",
        f"model.init_from={tmp_path / 'w.safetensors'}",
    )
    assert found["labels"]["facts"]["features"] == "test_efficientnet"
    assert found["labels"]["facts"]["accuracy"] > 0.6, "random filters tell colours and grain"


# -------------------------------------------------------------------------------------------- parts
def test_pairs_are_those_of_a_plain_comparison():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, (6, 700), dtype=np.uint64)
    hashes[:, 600] = hashes[:, 3] ^ np.uint64(0b1011)
    hashes[2, 650] = hashes[0, 9]  # a crop of the one is the whole of the other
    a, b, bits, limit = audit._close_pairs(hashes, 10)
    plain = set()
    for i in range(700):
        for j in range(i + 1, 700):
            near = min(
                int(np.bitwise_count(x ^ y))
                for v in range(6)
                for x, y in ((hashes[v, i], hashes[0, j]), (hashes[0, i], hashes[v, j]))
            )
            if near <= 10:
                plain.add((i, j, near))
    assert set(zip(a.tolist(), b.tolist(), bits.tolist(), strict=True)) == plain
    assert {(3, 600, 3), (9, 650, 0)} <= plain
    assert limit == 10


def test_where_all_look_alike_the_limit_falls(monkeypatch):
    monkeypatch.setattr(audit, "_MOST_CANDIDATES", 50)
    hashes = np.zeros((6, 40), np.uint64)
    hashes[:] = np.array([(1 << (i % 8)) - 1 for i in range(40)], np.uint64)
    a, _, bits, limit = audit._close_pairs(hashes, 12)
    assert limit < 12
    assert bits.max(initial=0) <= limit
    assert len(a) <= 80, "40 images in 8 kinds of 5: 80 pairs are the same to the bit"


def test_folds_spread_strata_and_keep_groups_whole():
    rng = np.random.default_rng(0)
    strata = rng.integers(0, 3, 600)
    groups = np.arange(600)
    groups[:60] = np.repeat(np.arange(20), 3)
    strata[:60] = np.repeat(strata[:20], 3)
    fold = audit.make_folds(strata, groups, 5, seed=1)
    assert all(len(set(fold[groups == g])) == 1 for g in range(20))
    counts = np.array([[((fold == k) & (strata == s)).sum() for k in range(5)] for s in range(3)])
    assert counts.max() - counts.min() < 25
    assert (fold != audit.make_folds(strata, groups, 5, seed=2)).any()


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_share_of_wrong_labels_is_estimated_from_miscalibrated_outputs(share):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 4000)
    scores = rng.normal(0, 1, (4000, 6))
    scores[np.arange(4000), truth] += 3
    exact = np.exp(3 * scores)  # what log odds of a shift of 3 amount to
    overconfident = exact**4
    given = truth.copy()
    flipped = rng.random(4000) < share
    given[flipped] = (given[flipped] + rng.integers(1, 6, flipped.sum())) % 6
    noise, random_share, calibrated = audit.noise_posterior(
        overconfident / overconfident.sum(1, keepdims=True), given
    )
    assert random_share * 5 / 6 == pytest.approx(share, abs=0.015)
    reference = exact / exact.sum(1, keepdims=True)
    assert np.abs(calibrated - reference).mean() < 0.02
    if share:
        suspects = noise > 0.5
        assert (suspects & flipped).sum() > 0.7 * flipped.sum()
        assert (suspects & flipped).sum() > 0.8 * suspects.sum()


@pytest.mark.parametrize("quality", [30, 70, 75, 95, 100])
def test_the_quality_of_a_jpeg_is_read_from_its_tables(quality):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0131] = "Maker", "Model 5", "Editor 2"
    image = scene(np.random.default_rng(0), 1).resize((60, 40))
    image.save(file, "JPEG", quality=quality, progressive=True, subsampling=0, exif=exif)
    header = audit.read_header(file.getvalue())
    assert header["jpeg_quality"] == quality
    expected = {"format": "JPEG", "width": 60, "height": 40, "aspect": 1.5, "progressive": 1}
    expected |= {"subsampling": 0, "camera": "Maker Model 5", "software": "Editor 2"}
    assert {k: header[k] for k in expected} == expected
    assert header["bytes"] == len(file.getvalue())


def test_the_same_mix_has_the_same_shares():
    rng = np.random.default_rng(0)
    a, b = rng.choice(4, 4000, p=[0.4, 0.3, 0.2, 0.1]), rng.choice(4, 500, p=[0.1, 0.2, 0.3, 0.4])
    in_a, in_b = audit.same_mix(a, b, seed=0)
    shares = [np.bincount(x[rows], minlength=4) / len(rows) for x, rows in ((a, in_a), (b, in_b))]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
    assert len(in_b) > 150


def test_a_mix_of_classes_is_no_shift_of_images():
    """Validation holds the same images of each class, but other shares: only the mix differs."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [1200, 400])
    label = np.where(
        y == 0, rng.choice(3, 1600, p=[0.6, 0.3, 0.1]), rng.choice(3, 1600, p=[0.1, 0.3, 0.6])
    )
    x = rng.normal(0, 1, (1600, 8)) + 3 * label[:, None]
    area, p = audit._shift(x, y, label, np.arange(1600), 5, seed=0)
    assert abs(area - 0.5) < 0.05
    assert p > 0.01
    area, p = audit._shift(x + 0.5 * y[:, None], y, label, np.arange(1600), 5, seed=0)
    assert area > 0.75
    assert p < 1e-6
    assert audit._mix_differs(label, y, "val", 3)["differs"]


# --------------------------------------------------------------------------------------- real images
def seedlings(folder: Path) -> Path:
    """The set of 12 species, unpacked: from POTSTILL_SEEDLINGS, or beside the repository."""
    if given := os.environ.get("POTSTILL_SEEDLINGS"):
        return Path(given)
    archive = ROOT.parent / "shared" / "data" / "seedlings12.tar"
    if not archive.exists():
        pytest.skip("needs the seedlings: POTSTILL_SEEDLINGS or ../shared/data/seedlings12.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "seedlings12"


@pytest.mark.slow
def test_flipped_seedlings_are_found(tmp_path, ray_session):
    weights = ROOT.parent / "shared" / "weights" / "tf_efficientnet_lite0.safetensors"
    if not weights.exists():
        pytest.skip("needs ../shared/weights/tf_efficientnet_lite0.safetensors")
    tree = tmp_path / "flipped"
    shutil.copytree(seedlings(tmp_path), tree)
    rng = np.random.default_rng(0)
    classes = sorted(p.name for p in (tree / "train").iterdir())
    files = sorted((tree / "train").glob("*/*.jpg"))
    flipped = set()
    for i in rng.choice(len(files), round(0.05 * len(files)), replace=False):
        others = [c for c in classes if c != files[i].parent.name]
        name = f"{others[rng.integers(len(others))]}/moved-{i}.jpg"
        files[i].rename(tree / "train" / name)
        flipped.add(f"train/{name}")
    found = run(
        tmp_path,
        tree,
        "checks=[labels]",
        "data.decode.image_px=160",
        "model.name=tf_efficientnet_lite0",
        f"model.init_from={weights}",
    )
    suspects = {row["path"] for row in table(tmp_path, "labels")}
    assert len(suspects & flipped) >= 0.7 * len(flipped)
    assert len(suspects & flipped) >= 0.5 * len(suspects)
    assert 0.03 < found["labels"]["facts"]["estimated_share"] < 0.09
