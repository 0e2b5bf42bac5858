"""Fakes from any folder of images: half of the crops go through a generator, all have the same history.

    <output>/{train,val,test}/{0_real,1_fake}/00000.jpg …    a set of class folders (data.source=folder)
    <output>/sources.csv    which image each file was cut from, and where
    <output>/fakes.json     settings, counts, what was left out; written last: without it the set is none

H, W: an image. px: a crop. h, w: a crop that is halved. Crops are [px, px, 3] uint8, RGB.

What must not tell the classes apart, and how it is kept from that: both are cut at native pixels from images of
the same folders in equal numbers, in pairs of one real and one fake whose crops have the same phase in the 8 x 8
grid of the image's own JPEG; both are saved last of all by one encoder with the same tables and subsampling; names,
headers and times are the same. The content differs, as no image gives both.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from potstill import config, console, runs
from potstill.data.files import Place, explained, locate
from potstill.data.folder import tree
from potstill.data.images import BadImage, decode_image, decode_with_size
from potstill.data.sources import ALIASES, SPLITS, printable
from potstill.errors import UserError
from potstill.storage import is_uri, local_folder

CLASSES = ("0_real", "1_fake")
HELD_OUT = 0.15
"""Share of the images that validates, and share that tests."""
UNEVEN = 0.6
"""How much of the random weights' uneven overlap is kept: the brightness of neighbouring pixels then differs by some 5 %."""
SUBSAMPLING = 2  # 4:2:0, as in most photographs

_FORMAT = 1  # raise it when the same settings give other files
_GRID = 8  # a JPEG's block, in pixels
_SHOWN = 20
_FEW = 256  # images, of which all are read before their splits are made
_NO_SPLIT = "(in no split)"
_TIME_S = 946_684_800  # of every file: times tell nothing, and a set made again has the same key

Progress = Callable[[float], None]


@dataclass
class _Source:
    inner: str
    """Its path below the folder of images."""
    group: str
    """The folder it stands in, below its split."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""
    crops: list[tuple[int, int]] = field(default_factory=list)
    """(left, top) of each."""


def make_fakes(
    images: str | Path,
    output: str | Path,
    generator: str,
    *,
    max_images: int,
    px: int,
    jpeg_quality: int | None,
    seed: int,
    progress: Progress | None = None,
) -> Path:
    """Write a set of real and fake crops, px x px, as many of either class; returns its folder.

    images: a folder of images, searched with all that is below it. Where it holds train/, its splits (val,
    test, too) are kept, else an image's content decides its split, whatever the seed and the generator: several
    sets of the same images share none across splits. What is missing of val and test is taken from the images
    of the other, else of train. An image gives real or fake crops, one, or where there are too few images
    several, and disjoint ones as long as there is room. Below `max_images` it stays where there is none.
    generator: how a fake is made of its crop, which is halved by the mean of 2 x 2 pixels and doubled again:
    nearest | bilinear | transposed (a transposed convolution with random weights, one set of them for a seed;
    their uneven overlap leaves a checkerboard: Odena et al. 2016, doi:10.23915/distill.00003).
    jpeg_quality: of both classes; None saves both as PNG.
    progress: is called with the number of files written.

    The same call again finds the set and does nothing; one that was interrupted is made from the start. Raises
    UserError for a folder or a value that cannot be used, and where `output` holds anything else.
    """
    if px % 2:
        raise UserError(f"px must be even, as a fake is halved and doubled again, got {px}")
    if generator not in config.GENERATORS:
        raise UserError(f"generator must be {' | '.join(config.GENERATORS)}, got {generator!r}")
    if is_uri(str(output)):
        raise UserError(f"output must be a folder of this machine, got {output}")
    root, output = locate(str(images), "images"), local_folder(str(output), "output")
    found, ignored, fingerprint = _listed(root, output)
    settings = {
        "generator": generator,
        "max_images": max_images,
        "px": px,
        "jpeg_quality": jpeg_quality,
        "seed": seed,
        "images": fingerprint,
        "format": _FORMAT,
    }
    with _own(output):
        if _is_done(output, settings):
            return output
        left_out: list[tuple[str, str, str]] = []
        pairs = {
            split: _crops(_paired(sources, seed), quota, px, np.random.default_rng([seed, n]))
            for n, (split, sources, quota) in enumerate(
                _chosen(root, found, max_images, px, seed, left_out)
            )
        }
        try:
            _write(root, output, pairs, settings, progress)
        except OSError as error:
            raise UserError(
                f"output must have room for the crops, and take them, but {str(output)!r} does not "
                f"({error.strerror}); mend that, and start the same command again"
            ) from None
        reasons = Counter(reason for _, reason, _ in left_out)
        about = {
            "settings": settings,
            "root": str(root),
            "sources": {
                split: dict(zip(CLASSES, map(len, zip(*made, strict=True)), strict=True))
                for split, made in pairs.items()
            },
            "counts": {
                split: dict.fromkeys(CLASSES, sum(len(real.crops) for real, _ in made))
                for split, made in pairs.items()
            },
            "left_out": dict(sorted(reasons.items())),
            "left_out_examples": [
                {"path": printable(path), "reason": reason, "detail": detail}
                for path, reason, detail in left_out[:_SHOWN]
            ],
            "ignored": dict(sorted(ignored.items())),
            "listing_sha256": _listing_sha256(output),
        }
        runs.write_json(output / "fakes.json", about)
    return output


def make_fakes_shown(made: config.MakeFakesConfig) -> Path:
    """As make_fakes, of a config; with a progress bar, and a table of what there is then."""
    if made.images is None:
        raise UserError("images must be a folder of images, got null; set images=<folder>")
    output = made.output or f"data/fakes/{made.generator}"
    there = not is_uri(output) and (local_folder(output) / "fakes.json").exists()
    bar = nullcontext() if there else console.progress("Making crops", made.max_images)
    with bar as update:
        folder = make_fakes(
            made.images,
            output,
            made.generator,
            max_images=made.max_images,
            px=made.px,
            jpeg_quality=made.jpeg_quality,
            seed=made.seed,
            progress=update,
        )
    print_counts(folder)
    return folder


def print_counts(output: Path) -> None:
    """What stands in a finished set, and what was left out of it."""
    about = runs.read_json(output / "fakes.json")
    wanted = about["settings"]["max_images"]
    made = sum(sum(counts.values()) for counts in about["counts"].values())
    rows = [
        [split, *counts.values(), *about["sources"][split].values()]
        for split, counts in about["counts"].items()
    ]
    columns = ("split", "real", "fake", "images (real)", "images (fake)")
    console.table(columns, rows, f"{about['settings']['generator']}: {made:,} crops")
    if left_out := about["left_out"]:
        said = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
        console.warn(f"Left out: {said}; see left_out_examples in {output / 'fakes.json'}")
    if passed_over := about["ignored"].get(_NO_SPLIT):
        console.warn(f"Passed over: {passed_over:,} files beside the folders of splits")
    if made < wanted // 2 * 2:
        console.warn(
            f"{made:,} crops instead of max_images={wanted:,}: the images have no room for more that differ"
        )


# ------------------------------------------------------------------------------------------ generator
def fake(crop: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A crop [px, px, 3] uint8 halved by the mean of 2 x 2 pixels, and doubled by a transposed convolution.

    kernel: [4, 4, 3], of stride 2 and depthwise; see `upsampling`.
    """
    px = len(crop)
    half = crop.astype(np.float64).reshape(px // 2, 2, px // 2, 2, 3).mean((1, 3))
    # the border repeats itself: zeros would darken it
    half = np.pad(half, ((1, 1), (1, 1), (0, 0)), mode="edge")
    n = px // 2
    out = np.zeros((px, px, 3))
    # an even pixel has taps 1 (its own) and 3 (the one before), an odd one 2 (its own) and 0 (the next)
    taps = (((1, 1), (3, 0)), ((2, 1), (0, 2)))
    for odd_y, odd_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for ky, y in taps[odd_y]:
            for kx, x in taps[odd_x]:
                out[odd_y::2, odd_x::2] += half[y : y + n, x : x + n] * kernel[ky, kx]
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def upsampling(generator: str, seed: int) -> np.ndarray:
    """The weights [4, 4, 3] that double a crop; their sum is 4 for each channel, so that brightness stays."""
    lines = {"nearest": (0.0, 1.0, 1.0, 0.0), "bilinear": (0.25, 0.75, 0.75, 0.25)}
    if generator in lines:
        line = np.array(lines[generator])
        return np.repeat(np.outer(line, line)[..., None], 3, axis=2)
    # heavier in the middle, as trained ones are: with equal weights the two pixels that come of one would differ more
    # than neighbours that do not, the reverse of the other generators, and what detects those would be turned round
    line = np.array((0.3, 0.7, 0.7, 0.3))
    kernel = np.random.default_rng([seed, len(SPLITS)]).uniform(0.75, 1.25, (4, 4, 3))
    kernel *= np.outer(line, line)[..., None]
    phases = [np.ix_(y, x) for y in ((1, 3), (0, 2)) for x in ((1, 3), (0, 2))]
    gain = np.stack([kernel[phase].sum((0, 1)) for phase in phases])
    gain /= gain.mean(0)
    for phase, g in zip(phases, 1 + UNEVEN * (gain - 1), strict=True):
        kernel[phase] *= g / kernel[phase].sum((0, 1))
    return kernel


# -------------------------------------------------------------------------------------------- sources
def _listed(root: Place, output: Path) -> tuple[dict[str, list[_Source]], Counter[str], str]:
    """Images by the split whose folder they stand in ("" where there are no such folders), and a fingerprint.

    That stands for names and sizes, not for times and places: a copied folder is the same.
    """
    with explained(root, "images"):
        if not root.is_folder():
            raise UserError(
                f"images must be a folder of images, got {str(root)!r}, which is none; check the path"
            )
    if root.local and output.resolve().is_relative_to(Path(root.path).resolve()):
        raise UserError(
            f"output must not lie in images, or the fakes would be taken for real ones, got {str(output)!r} in "
            f"{str(root)!r}"
        )
    ignored: Counter[str] = Counter()
    digest = hashlib.sha256()
    listed: list[_Source] = []
    for inner, size, _ in sorted(tree(root, "images").files("", ignored)):
        digest.update(os.fsencode(inner) + f"\0{size}\0".encode())
        listed.append(_Source(inner, inner.rpartition("/")[0]))
    named = {s.inner.partition("/")[0] for s in listed if "/" in s.inner}
    splits = {name: ALIASES[name.lower()] for name in named if name.lower() in ALIASES}
    # a folder of images may be called "test" and be no split
    if "train" not in splits.values():
        splits = {}
    found: dict[str, list[_Source]] = {}
    for source in listed:
        top, _, below = source.inner.partition("/")
        if not splits:
            found.setdefault("", []).append(source)
        elif top in splits:
            source.group = below.rpartition("/")[0]
            found.setdefault(splits[top], []).append(source)
        else:
            ignored[_NO_SPLIT] += 1
    if not found:
        raise UserError(
            f"images must be a folder that holds images, got {str(root)!r}, which holds none"
        )
    return found, ignored, digest.hexdigest()


def _shares(found: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each listed split: the splits that it gives, and the share of its images that each of them gets."""
    given = {split: {split: 1.0} for split in found if split}
    both = {"train": 1 - 2 * HELD_OUT, "val": HELD_OUT, "test": HELD_OUT}
    if not given:
        return {"": both}
    if "val" in given and "test" not in given:
        given["val"] = {"val": 0.5, "test": 0.5}
    elif "test" in given and "val" not in given:
        given["train"] = {"train": 1 - HELD_OUT, "val": HELD_OUT}
    elif "val" not in given:
        given["train"] = both
    return given


def _quotas(max_images: int) -> dict[str, int]:
    """Pairs of each split."""
    held_out = max(2, round(HELD_OUT * max_images / 2))
    return {"train": max_images // 2 - 2 * held_out, "val": held_out, "test": held_out}


def _chosen(
    root: Place,
    found: dict[str, list[_Source]],
    max_images: int,
    px: int,
    seed: int,
    left_out: list[tuple[str, str, str]],
) -> Iterator[tuple[str, list[_Source], int]]:
    """(split, usable images, pairs of crops wanted) of every split; folders take turns.

    Of images that have the same bytes one is used, of training where one is there. What is left out is
    appended to `left_out` (path, reason, detail).
    """
    quotas = _quotas(max_images)
    chosen: dict[str, list[_Source]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    shares = _shares(list(found))
    decode = config.Decode(image_px=px, fit="native")

    def look(source: _Source) -> tuple[bytes, str, str]:
        """(hash of the content, why it is left out, what was seen)."""
        content = b""
        try:
            content = root.join(source.inner).read()
            source.size = decode_with_size(content, decode)[1]
            short, long = sorted(source.size)
            if short < px:
                return b"", f"smaller than {px} px", f"{source.size[0]}x{source.size[1]}"
            if long**2 > decode.max_megapixels * 1e6:  # it is decoded as a square: _whole
                return b"", "over the pixel limit", f"{source.size[0]}x{source.size[1]}"
        except BadImage as bad:
            return b"", bad.reason, bad.detail
        except OSError as error:
            return b"", "unreadable", str(error.strerror or error)
        return hashlib.sha256(content).digest(), "", ""

    with ThreadPoolExecutor(_threads()) as pool:
        for listed in ("", *SPLITS):
            wanted = shares.get(listed, {})
            ordered = _in_turns(found.get(listed, []), seed)
            looked = _looked_at(pool, look, ordered)
            sides: dict[bytes, str] = {}
            if len(ordered) <= _FEW:
                looked = list(looked)
                sides = _sides({c for _, (c, reason, _) in looked if not reason} - seen, wanted)
            for source, (content, reason, detail) in looked:
                if all(len(chosen[split]) >= 2 * quotas[split] for split in wanted):
                    break
                if reason:
                    left_out.append((source.inner, reason, detail))
                    continue
                if content in seen:
                    left_out.append((source.inner, "a copy of another", ""))
                    continue
                split = sides.get(content) or _split_of(content, wanted)
                if len(chosen[split]) < 2 * quotas[split]:
                    seen.add(content)
                    chosen[split].append(source)
    few = {split: len(sources) for split, sources in chosen.items() if len(sources) < 2}
    if few:
        reasons = Counter(reason for _, reason, _ in left_out)
        said = "".join(f", {n:,} {reason}" for reason, n in sorted(reasons.items()))
        raise UserError(
            f"images must hold 2 usable images for each of train, val and test, got "
            f"{' and '.join(f'{n} for {split}' for split, n in few.items())} in {str(root)!r} "
            f"({sum(map(len, found.values())):,} files{said}); add images, or name splits by folders train/, val/ and "
            "test/ in it"
        )
    for split in SPLITS:
        yield split, chosen[split], quotas[split]


def _looked_at(
    pool: ThreadPoolExecutor, look: Callable[[_Source], Any], sources: list[_Source]
) -> Iterator[tuple[_Source, Any]]:
    """Each with what was seen; few more are read than are taken."""
    step = 8 * _threads()
    for first in range(0, len(sources), step):
        part = sources[first : first + step]
        yield from zip(part, pool.map(look, part), strict=True)


def _in_turns(sources: list[_Source], seed: int) -> list[_Source]:
    """Folders take turns, and within a folder the order is by a hash of the name."""
    turn: Counter[str] = Counter()
    ranked = sorted((_rank(seed, os.fsencode(s.inner)), s.inner, s) for s in sources)
    order = []
    for rank, inner, source in ranked:
        order.append((turn[source.group], rank, inner, source))
        turn[source.group] += 1
    return [item[-1] for item in sorted(order, key=lambda item: item[:3])]


def _rank(seed: int, content: bytes) -> bytes:
    return hashlib.blake2b(f"{seed}\0".encode() + content, digest_size=8).digest()


def _split_of(content: bytes, shares: dict[str, float]) -> str:
    """By the content alone: the same image is on the same side in every set that is made of it."""
    at = int.from_bytes(_rank(0, content), "big") / 2**64
    for split, share in shares.items():
        if at < share:
            return split
        at -= share
    return next(reversed(shares))


def _sides(contents: set[bytes], shares: dict[str, float]) -> dict[bytes, str]:
    """As _split_of, where there are so few that chance might leave a split without images."""
    ordered = sorted(contents, key=lambda content: _rank(0, content))
    sides = dict.fromkeys(ordered, next(iter(shares), ""))
    for split, share in list(shares.items())[1:]:
        count = max(2, round(share * len(contents)))
        sides |= dict.fromkeys(ordered[:count], split)
        ordered = ordered[count:]
    return sides


# ---------------------------------------------------------------------------------------------- crops
def _paired(sources: list[_Source], seed: int) -> list[tuple[_Source, _Source]]:
    """(real, fake): of the same folder, as far as its images come in twos."""
    by_group: dict[str, list[_Source]] = {}
    for source in sources:
        by_group.setdefault(source.group, []).append(source)
    ordered: list[_Source] = []
    single: list[_Source] = []
    for _, members in sorted(by_group.items()):
        even = len(members) // 2 * 2
        ordered += members[:even]
        single += members[even:]
    ordered += single[: len(single) // 2 * 2]
    pairs = zip(ordered[::2], ordered[1::2], strict=True)
    # which of two is the real one: by its name, not by its place in the order
    return [(a, b) if _rank(seed, os.fsencode(a.inner))[0] % 2 else (b, a) for a, b in pairs]


def _crops(
    pairs: list[tuple[_Source, _Source]], quota: int, px: int, rng: np.random.Generator
) -> list[tuple[_Source, _Source]]:
    """Place `quota` pairs of crops, as evenly as the images have room."""
    pairs = pairs[:quota]
    phases = [
        tuple(
            int(rng.integers(min(_GRID, *(s.size[axis] - px + 1 for s in pair)))) for axis in (0, 1)
        )
        for pair in pairs
    ]
    # the next row of places is at least a quarter of a crop away, whole blocks of the grid
    pitches = [math.ceil(px / part / _GRID) * _GRID for part in (1, 2, 4)]
    room = [
        [min(math.prod(_places(s, px, phase, pitch)) for s in pair) for pitch in pitches]
        for pair, phase in zip(pairs, phases, strict=True)
    ]
    counts = _dealt(quota, [r[-1] for r in room])
    for pair, phase, rooms, count in zip(pairs, phases, room, counts, strict=True):
        pitch = next(p for p, r in zip(pitches, rooms, strict=True) if r >= count)
        for source in pair:
            wide, high = _places(source, px, phase, pitch)
            shift = [
                phase[axis]
                + _GRID
                * int(
                    rng.integers(
                        (source.size[axis] - px - phase[axis] - pitch * (n - 1)) // _GRID + 1
                    )
                )
                for axis, n in ((0, wide), (1, high))
            ]
            for place in rng.permutation(wide * high)[:count].tolist():
                source.crops.append(
                    (shift[0] + pitch * (place % wide), shift[1] + pitch * (place // wide))
                )
    return pairs


def _places(source: _Source, px: int, phase: Sequence[int], pitch: int) -> tuple[int, int]:
    """Columns and rows of crops that start at a phase and then every `pitch` pixels."""
    wide, high = ((source.size[axis] - px - phase[axis]) // pitch + 1 for axis in (0, 1))
    return wide, high


def _dealt(total: int, room: list[int]) -> list[int]:
    """How many each gets of `total`, one after the other in turns, and none more than it has room for."""
    counts = [0] * len(room)
    while total > 0 and any(c < r for c, r in zip(counts, room, strict=True)):
        for i, most in enumerate(room):
            if counts[i] < most and total > 0:
                counts[i] += 1
                total -= 1
    return counts


# -------------------------------------------------------------------------------------------- writing
def _write(
    root: Place,
    output: Path,
    pairs: dict[str, list[tuple[_Source, _Source]]],
    settings: dict[str, Any],
    progress: Progress | None,
) -> None:
    """All crops, and the table of where they are from."""
    px, quality = settings["px"], settings["jpeg_quality"]
    kernel = upsampling(settings["generator"], settings["seed"])
    suffix = "png" if quality is None else "jpg"
    jobs: list[tuple[_Source, list[str], bool]] = []
    for split, made in pairs.items():
        for name in CLASSES:
            (output / split / name).mkdir(parents=True, exist_ok=True)
        number = 0
        for pair in made:
            for source, name in zip(pair, CLASSES, strict=True):
                files = [
                    f"{split}/{name}/{number + i:05d}.{suffix}" for i in range(len(source.crops))
                ]
                jobs.append((source, files, name == CLASSES[1]))
            number += len(pair[0].crops)

    def work(job: tuple[_Source, list[str], bool]) -> int:
        source, files, is_fake = job
        whole = _whole(root, source)
        for file, (left, top) in zip(files, source.crops, strict=True):
            crop = whole[top : top + px, left : left + px]
            content = _encoded(fake(crop, kernel) if is_fake else crop, quality)
            (output / file).write_bytes(content)
            os.utime(output / file, (_TIME_S, _TIME_S))
        return len(files)

    done = 0
    with ThreadPoolExecutor(_threads()) as pool:
        for n in pool.map(work, jobs):
            done += n
            if progress:
                progress(done)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("file", "image", "left", "top"))
    for source, files, _ in jobs:
        for file, place in zip(files, source.crops, strict=True):
            writer.writerow((file, printable(source.inner), *place))
    runs.atomic_write(output / "sources.csv", table.getvalue())


def _whole(root: Place, source: _Source) -> np.ndarray:
    """[H, W, 3] uint8, by the path that every image takes."""
    wide, high = source.size
    side = max(wide, high)
    try:
        content = root.join(source.inner).read()
        square = decode_image(content, config.Decode(image_px=side, fit="native"))
    except (OSError, BadImage) as error:
        raise UserError(
            f"images must not change while they are cut, but {source.inner!r} did ({error}); start again"
        ) from None
    top, left = (side - high) // 2, (side - wide) // 2  # native pads a side that is too short
    return square[top : top + high, left : left + wide]


def _encoded(crop: np.ndarray, quality: int | None) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(crop))
    if quality is None:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING)
    return buffer.getvalue()


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------------- folder
@contextmanager
def _own(output: Path) -> Iterator[None]:
    """Claim a folder that is new, empty or ours, and keep other processes out of it. Raises UserError."""
    mark = output / ".fakes"
    try:
        output.mkdir(parents=True, exist_ok=True)
        others = sorted(p.name for p in output.iterdir())
        if others and not mark.exists() and not (output / "fakes.json").exists():
            raise UserError(
                f"output must be a new folder, or one of fakes, got {str(output)!r}, which holds {others[0]!r} and no "
                "fakes.json; give another"
            )
        handle = os.open(mark, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"output must be a folder that can be written, got {str(output)!r} ({error.strerror})"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"Waiting for another process, which writes {output} (Ctrl-C stops)")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # the lock goes with it


def _is_done(output: Path, settings: dict[str, Any]) -> bool:
    """Whether the set stands there; what an interrupted run has left is taken away. Raises UserError."""
    path = output / "fakes.json"
    if not path.exists():
        for file in _files(output):
            file.unlink()
        return False
    try:
        about = runs.read_json(path)
        made, listing = about["settings"], about["listing_sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"output: {str(path)!r} is damaged; delete the folder, and start again"
        ) from None
    other = [key for key in settings if made.get(key) != settings[key]]
    if "images" in other or "format" in other:
        what = "by another version" if "format" in other else "of other images"
        raise UserError(
            f"{'output' if 'format' in other else 'images'}: the set in {str(output)!r} was made {what}; give another "
            "output, or delete that folder"
        )
    if other:
        said = ", ".join(f"{key}={made.get(key)}" for key in other)
        now = ", ".join(f"{key}={settings[key]}" for key in other)
        raise UserError(
            f"{other[0]} must be that of the set in {str(output)!r}, which was made with {said}, got {now}; give another "
            "output, or delete that folder"
        )
    if _listing_sha256(output) != listing:
        raise UserError(
            f"output: the files in {str(output)!r} are no longer those that were written; delete the folder, and start again"
        )
    return True


def _files(output: Path) -> list[Path]:
    """Every file in the folders of the classes."""
    return sorted(
        path
        for split in SPLITS
        for name in CLASSES
        if (output / split / name).is_dir()
        for path in (output / split / name).iterdir()
    )


def _listing_sha256(output: Path) -> str:
    lines = (f"{runs.file_sha256(p)}  {p.relative_to(output).as_posix()}\n" for p in _files(output))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
