"""What is wrong with a dataset: near-duplicates, wrong labels, imbalance, shortcuts, shifted splits, blank images.

N images, n of them looked at, K classes, D features, P pairs, G groups.

Every check takes arrays and gives a `Finding`: how serious it is, how many images it concerns, the
evidence, what to do, the rows of its table, and which images to show. Nothing here knows models: whoever
calls hands the features in.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from potstill.data.cache import Cache

SEVERITIES = ("serious", "warning", "note", "ok")


THUMB_PX = 32
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)
_CHUNK = 64
_MOST_CANDIDATES = 2_000_000

Progress = Callable[[float], None]


@dataclass
class Strip:
    """Images that are shown beside each other: a group of duplicates, or one suspect."""

    caption: str
    images: list[int]
    notes: list[str] = field(default_factory=list)
    """One for each image, or none."""


@dataclass
class Finding:
    check: str
    """One of config.AUDIT_CHECKS."""
    title: str
    severity: str
    """One of SEVERITIES."""
    count: int
    """Images (or classes, or columns) that it concerns; 0 where nothing is wrong."""
    evidence: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers for audit.json."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Everything that was found, worst first, for the CSV."""
    strips: list[Strip] = field(default_factory=list)


# ------------------------------------------------------------------------------------------ measuring
@dataclass
class Images:
    """All images of a cache and what one pass over their pixels tells.

    path: N. split [N] str. label [N] int64, -1 where there is none. tags [N, K] bool, of a multi-label set,
    whose `label` is -1 throughout. sha256 [N] S32. id [N] int64. size_px [N, 2] int32, width and height of
    the files. thumb [N, 32, 32, 3] uint8. stats: [N] float32 each, see `STATS`.
    """

    classes: list[str]
    path: list[str]
    split: np.ndarray
    label: np.ndarray
    tags: np.ndarray | None
    sha256: np.ndarray
    id: np.ndarray
    size_px: np.ndarray
    thumb: np.ndarray
    stats: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.path)

    def class_of(self, i: int) -> str:
        if self.tags is not None:
            return "|".join(self.classes[k] for k in np.flatnonzero(self.tags[i]))
        return self.classes[self.label[i]] if self.label[i] >= 0 else ""

    def row(self, i: int) -> dict[str, Any]:
        return {"path": self.path[i], "split": str(self.split[i]), "class": self.class_of(i)}


STATS = ("brightness", "contrast", "saturation", "sharpness", "entropy", "one_colour")
"""Mean grey and its standard deviation (0 to 255), mean saturation (0 to 255), log10 of the variance of the
Laplacian, entropy of 64 grey levels (bits), share of the commonest of 4,096 colours."""


def measure(cache: Cache, progress: Progress | None = None) -> Images:
    """One pass over a cache's pixels, in threads; about a millisecond of one core an image of 224 px."""
    splits = [name for name in ("train", "val", "test") if len(cache.split(name))]
    readers = [cache.split(name) for name in splits]
    total = sum(map(len, readers))
    thumb = np.empty((total, THUMB_PX, THUMB_PX, 3), np.uint8)
    stats = {name: np.empty(total, np.float32) for name in STATS}
    starts = np.cumsum([0, *map(len, readers)])

    def work(job: tuple[int, int]) -> int:
        which, first = job
        rows = np.arange(first, min(first + _CHUNK, len(readers[which])))
        for at, image in zip(rows + starts[which], readers[which].read(rows), strict=True):
            thumb[at] = _thumbnail(image)
            for name, value in _statistics(image).items():
                stats[name][at] = value
        return len(rows)

    jobs = [(k, i) for k, reader in enumerate(readers) for i in range(0, len(reader), _CHUNK)]
    done = 0
    with ThreadPoolExecutor(_threads()) as pool:
        for n in pool.map(work, jobs):
            done += n
            if progress:
                progress(done)
    multi_label = cache.multi_label
    return Images(
        classes=cache.classes,
        path=[path for reader in readers for path in reader.paths],
        split=np.repeat(splits, [len(r) for r in readers]),
        label=np.full(total, -1) if multi_label else np.concatenate([r.labels for r in readers]),
        tags=np.concatenate([r.targets(np.arange(len(r))) > 0 for r in readers])
        if multi_label
        else None,
        sha256=np.concatenate([r.hashes for r in readers]),
        id=np.concatenate([r.ids for r in readers]),
        size_px=np.concatenate([r.original_sizes for r in readers]),
        thumb=thumb,
        stats=stats,
    )


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _thumbnail(image: np.ndarray) -> np.ndarray:
    from PIL import Image

    shape = (THUMB_PX, THUMB_PX)
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BOX))


def _statistics(image: np.ndarray) -> dict[str, float]:
    grey = image @ _LUMA
    laplacian = -4 * grey[1:-1, 1:-1]
    laplacian += grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    share = np.bincount((grey / 4).astype(np.uint8).ravel(), minlength=64) / grey.size
    share = share[share > 0]
    coarse = (image >> 4).astype(np.uint16)
    colour = (coarse[..., 0] << 8) | (coarse[..., 1] << 4) | coarse[..., 2]
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "saturation": float((image.max(2) - image.min(2)).mean()),
        "sharpness": float(np.log10(laplacian.var() + 1e-2)),
        "entropy": float(-(share * np.log2(share)).sum()),
        "one_colour": float(np.bincount(colour.ravel()).max() / colour.size),
    }


def plain_features(images: Images, rows: np.ndarray) -> np.ndarray:
    """Colours, coarse layout, edges by direction and STATS: float32 [n, 278], for want of a trained model."""
    thumb = images.thumb[rows].astype(np.float32)
    n = len(thumb)
    levels = (images.thumb[rows] >> 5).reshape(n, -1, 3)
    colours = np.stack([(levels == k).mean(1) for k in range(8)], 1).reshape(n, -1)
    side = THUMB_PX // 4
    layout = thumb.reshape(n, 4, side, 4, side, 3).mean((2, 4)).reshape(n, -1)
    grey = thumb @ _LUMA
    dy, dx = np.gradient(grey, axis=(1, 2))
    strength, angle = np.hypot(dx, dy), np.mod(np.arctan2(dy, dx), np.pi)
    bins = np.minimum((angle / np.pi * 8).astype(int), 7)
    edges = np.stack(
        [
            (strength * (bins == k)).reshape(n, 4, side, 4, side).mean((2, 4)).reshape(n, -1)
            for k in range(8)
        ],
        1,
    ).reshape(n, -1)
    low = _dct(grey, 9)[:, :8, :8].reshape(n, -1) / THUMB_PX
    pixel = np.stack([images.stats[name][rows] for name in STATS], 1)
    parts = (np.sqrt(colours), layout, np.sqrt(edges), np.sign(low) * np.sqrt(np.abs(low)), pixel)
    return np.concatenate(parts, 1).astype(np.float32)


# ------------------------------------------------------------------------------------ near-duplicates
def near_duplicates(images: Images, near_bits: int, near_correlation: float) -> Duplicates:
    """Pairs of images that are the same picture: recompressed, resized, recoloured or cropped a little.

    Candidates are pairs whose 64-bit perceptual hashes (signs of the lowest frequencies of a 32 px thumbnail,
    the whole and four crops of it, so that a small crop is found too) differ in at most `near_bits` bits;
    every pair is compared, in blocks. What is kept has thumbnails whose detail correlates, at some small
    crop of one of them, by at least `near_correlation`. Nearly blank images are compared by their bytes
    only: they all look alike.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    looked_at = np.flatnonzero(~_is_blank(images))
    grey = images.thumb[looked_at] @ _LUMA
    hashes = _hashes(grey)
    a, b, bits, used_bits = _close_pairs(hashes, near_bits)
    correlation = _correlation(grey, a, b)
    kept = correlation >= near_correlation
    a, b = looked_at[a[kept]], looked_at[b[kept]]
    bits, correlation = bits[kept], correlation[kept]
    # images of the same bytes belong together, blank ones too
    _, first, same = np.unique(images.sha256, return_index=True, return_inverse=True)
    n = len(images)
    twins = np.flatnonzero(first[same] != np.arange(n))
    links = np.concatenate([np.stack([a, b]), np.stack([first[same][twins], twins])], 1)
    graph = coo_matrix((np.ones(links.shape[1], bool), links), (n, n))
    _, group = connected_components(graph, directed=False)
    return Duplicates(a, b, bits, correlation, same, group.astype(np.int64), used_bits)


@dataclass
class Duplicates:
    a: np.ndarray
    """[P] int64: the earlier image of each pair."""
    b: np.ndarray
    """[P] int64."""
    bits: np.ndarray
    """[P] int64: in how many bits their hashes differ."""
    correlation: np.ndarray
    """[P] float32."""
    same_bytes: np.ndarray
    """[N] int64: equal where the files are."""
    group: np.ndarray
    """[N] int64: equal where images are joined by pairs."""
    near_bits: int
    """What was searched with: less than was asked for, where too much was alike."""


@functools.cache
def _cosines(size: int, rows: int) -> np.ndarray:
    """The first rows of the DCT-II [rows, size], orthonormal."""
    at = (2 * np.arange(size) + 1) * np.pi / (2 * size)
    basis = np.cos(np.arange(rows)[:, None] * at) * np.sqrt(2 / size)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _dct(grey: np.ndarray, rows: int) -> np.ndarray:
    """[n, px, px] -> [n, rows, rows], the lowest frequencies."""
    basis = _cosines(grey.shape[1], rows)
    return basis @ grey @ basis.T


_WINDOWS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))


def _hashes(grey: np.ndarray, scale: float = 0.92) -> np.ndarray:
    """uint64 [6, n]: of the whole thumbnails [n, 32, 32], and of crops at the corners and the centre.

    The sign of each of the 64 lowest frequencies, without the mean, against their median. Zauner 2010,
    "Implementation and benchmarking of perceptual image hash functions".
    """
    views = [grey]
    views += [_crop(y, scale) @ grey @ _crop(x, scale).T for y, x in _WINDOWS]
    wave = np.add.outer(np.arange(9), np.arange(9)).ravel()
    lowest = np.argsort(wave, kind="stable")[1:65]
    found = []
    for view in views:
        low = _dct(view, 9).reshape(len(view), 81)[:, lowest]
        signs = low > np.median(low, axis=1, keepdims=True)
        found.append(np.ascontiguousarray(np.packbits(signs, axis=1)).view(np.uint64)[:, 0])
    return np.stack(found)


@functools.cache
def _crop(place: float, scale: float) -> np.ndarray:
    """[32, 32]: linear interpolation that blows up `scale` of a line, at the start (0) to the end (1) of it."""
    size = THUMB_PX
    at = (np.arange(size) + 0.5) * scale + place * size * (1 - scale) - 0.5
    at = np.clip(at, 0, size - 1)
    below = np.minimum(at.astype(int), size - 2)
    matrix = np.zeros((size, size), np.float32)
    matrix[np.arange(size), below] = 1 - (at - below)
    matrix[np.arange(size), below + 1] += at - below
    return matrix


def _close_pairs(
    hashes: np.ndarray, most_bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Pairs (a < b) of which any view [6, n] of one is near the whole of the other: a, b, bits, limit used.

    Brute force, 11 bit counts a pair of images: memory is a block's, and 136,000 images take some four
    minutes of two cores.
    Where more than two million pairs are that near, the limit falls until they are not.
    """
    n = hashes.shape[1]
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    limit, held = most_bits, 0
    block = 512

    def work(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = slice(start, min(start + block, n))
        whole = hashes[0]
        nearest = np.bitwise_count(whole[rows, None] ^ whole[None, start:])
        for view in hashes[1:]:
            np.minimum(
                nearest, np.bitwise_count(view[rows, None] ^ whole[None, start:]), out=nearest
            )
            np.minimum(
                nearest, np.bitwise_count(whole[rows, None] ^ view[None, start:]), out=nearest
            )
        a, b = np.nonzero(nearest <= limit)
        later = a < b
        a, b = a[later], b[later]
        return a + start, b + start, nearest[a, b]

    with ThreadPoolExecutor(_threads()) as pool:
        for part in _in_turn(pool, work, range(0, n, block)):
            near = part[2] <= limit
            found.append((part[0][near], part[1][near], part[2][near]))
            held += int(near.sum())
            while held > _MOST_CANDIDATES and limit > 0:
                limit -= 1
                found = [(a[d <= limit], b[d <= limit], d[d <= limit]) for a, b, d in found]
                held = sum(len(d) for _, _, d in found)
    if not found:
        empty = np.empty(0, np.int64)
        return empty, empty, empty, limit
    a, b, bits = (np.concatenate(parts).astype(np.int64) for parts in zip(*found, strict=True))
    return a, b, bits, limit


def _in_turn(
    pool: ThreadPoolExecutor, work: Callable[[int], Any], items: Sequence[int]
) -> Iterator[Any]:
    """`map` that is never far ahead of who takes the results, so that memory stays that of a few blocks."""
    ahead = 2 * _threads()
    waiting = [pool.submit(work, item) for item in items[:ahead]]
    for item in [*items[ahead:], *[None] * min(ahead, len(items))]:
        yield waiting.pop(0).result()
        if item is not None:
            waiting.append(pool.submit(work, item))


def _correlation(grey: np.ndarray, a: np.ndarray, b: np.ndarray, block: int = 2048) -> np.ndarray:
    """[P] float32: of the detail of thumbnails a and b, the best over small crops of the one or the other."""
    scales = (0.96, 0.92, 0.88)
    crops = [(1.0, 0.0, 0.0)] + [
        (s, y, x) for s in scales for y in (0.0, 0.5, 1.0) for x in (0.0, 0.5, 1.0)
    ]
    best = np.full(len(a), -1, np.float32)
    for first in range(0, len(a), block):
        at = slice(first, first + block)
        pair = grey[a[at]], grey[b[at]]
        plain = [_detail(side) for side in pair]
        score = best[at]
        for scale, y, x in crops:
            for one, other in ((0, 1), (1, 0)):
                view = pair[one]
                if scale < 1:
                    view = _detail(_crop(y, scale) @ view @ _crop(x, scale).T)
                else:
                    view = plain[one]
                np.maximum(score, np.einsum("nd,nd->n", view, plain[other]), out=score)
    return best


def _detail(grey: np.ndarray) -> np.ndarray:
    """[n, 32, 32] -> unit vectors [n, 1024] without the slow changes (light, vignettes), which are alike everywhere."""
    from scipy.ndimage import uniform_filter

    fine = grey - uniform_filter(grey, size=13, mode="reflect", axes=(1, 2))
    flat = fine.reshape(len(grey), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def duplicates_finding(images: Images, found: Duplicates) -> Finding:
    """Groups of near-duplicates: first those that cross splits, then those that cross classes."""
    same, size = found.same_bytes, np.bincount(found.group)
    members = np.flatnonzero(size[found.group] > 1)
    members = members[np.argsort(found.group[members], kind="stable")]
    cuts = np.flatnonzero(np.diff(found.group[members])) + 1
    groups = [g.tolist() for g in np.split(members, cuts)] if len(members) else []
    kinds = []
    for group in groups:
        splits = len({str(images.split[i]) for i in group}) > 1
        known = {c for i in group if (c := images.class_of(i))}
        kinds.append((splits, len(known) > 1, len(np.unique(same[group])) == 1))
    order = sorted(
        range(len(groups)), key=lambda k: (not kinds[k][0], not kinds[k][1], -len(groups[k]))
    )
    nearest = {int(i): -1.0 for i in members}
    for a, b, value in zip(
        found.a.tolist(), found.b.tolist(), found.correlation.tolist(), strict=True
    ):
        nearest[a], nearest[b] = max(nearest[a], value), max(nearest[b], value)
    rows, strips = [], []
    for number, k in enumerate(order, start=1):
        across_splits, across_classes, exact = kinds[k]
        words = "same bytes" if exact else "near-duplicates"
        words = "across splits" if across_splits else words
        words += ", conflicting labels" if across_classes else ""
        twins = Counter(same[groups[k]].tolist())
        notes = []
        for i in groups[k]:
            twin = twins[int(same[i])] > 1
            value = 1.0 if twin else nearest[i]
            notes.append("same bytes" if twin else f"correlation {value:.2f}")
            kind = {"across_splits": across_splits, "across_classes": across_classes}
            rows.append(
                {
                    "group": number,
                    **images.row(i),
                    **kind,
                    "exact": twin,
                    "correlation": round(value, 4),
                }
            )
        strips.append(Strip(f"{number}: {words}", groups[k], notes))
    facts = {
        "groups": len(groups),
        "images": len(members),
        "groups_across_splits": sum(k[0] for k in kinds),
        "groups_across_classes": sum(k[1] for k in kinds),
        "groups_of_same_bytes": sum(k[2] for k in kinds),
        "near_bits": found.near_bits,
    }
    serious = facts["groups_across_splits"] or facts["groups_across_classes"]
    severity = "serious" if serious else "warning" if groups else "ok"
    evidence = "No two images look the same."
    if groups:
        evidence = (
            f"{len(members):,} images in {len(groups):,} groups; {facts['groups_across_splits']:,} groups across "
            f"splits, {facts['groups_across_classes']:,} with conflicting labels, {facts['groups_of_same_bytes']:,} "
            "of the same bytes."
        )
    if len(members) > 0.2 * len(images) or len(groups) == 1 < len(members) / 20:
        evidence += " So many: scans or silhouettes of one kind all look alike; near_correlation=0.97 asks for more."
    remedy = (
        "Keep one of each group, or keep groups within one split (a group column in a manifest); "
        "decide which of two conflicting labels is right."
    )
    return Finding(
        *("duplicates", "Near-duplicates", severity, len(members), evidence),
        remedy if groups else "",
        facts,
        rows,
        strips,
    )


# --------------------------------------------------------------------------------------------- folds
def make_folds(strata: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each of n images [n] int64: strata (int [n]) are spread evenly, groups (int [n]) stay whole."""
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(first))
    in_turn = shuffled[np.argsort(strata[first][shuffled], kind="stable")]
    fold = np.empty(len(first), np.int64)
    fold[in_turn] = np.arange(len(first)) % folds
    return fold[member]


def _out_of_fold(
    make: Callable[[], Any], x: np.ndarray, y: np.ndarray, fold: np.ndarray, classes: int
) -> np.ndarray:
    """[n, classes] float64: each image's probabilities from a model that has not seen its fold."""
    out = np.zeros((len(y), classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is missing from a fold, a solver's patience
        for k in np.unique(fold):
            held = fold == k
            if len(np.unique(y[~held])) < 2:
                continue
            model = make().fit(x[~held], y[~held])
            out[np.ix_(held, model.classes_)] = model.predict_proba(x[held])
    return out


def _linear() -> Any:
    """Discriminant analysis with Ledoit and Wolf's shrinkage: a linear classifier in closed form.

    Beside logistic regression on the same features it found flipped labels as well, in a fraction of the
    time, and its cost does not grow with the number of classes.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(
        StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    )


# -------------------------------------------------------------------------------------- wrong labels
def noise_posterior(
    probability: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:
    """Probability [n] that a given label was drawn at random, their share, and the calibrated [n, K].

    `probability` [n, K] is out of fold, `label` [n] int64 as given. A label is taken to be the image's own
    with probability 1 - e, else any class alike (symmetric noise, Angluin and Laird 1988); e and the
    temperature of the probabilities (arXiv:1706.04599) are fitted together by maximum likelihood. Unlike
    per-class thresholds (confident learning, arXiv:1911.00068) this finds next to nothing in a set that is
    merely hard.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, log_softmax

    n, classes = probability.shape
    rows = np.arange(n)
    log_p = np.log(probability + 1e-300)

    def loss(at: np.ndarray) -> float:
        given = log_softmax(log_p * np.exp(-at[0]), axis=1)[rows, label]
        share = np.clip(expit(at[1]), 1e-9, 1 - 1e-9)
        return -float(np.logaddexp(np.log1p(-share) + given, np.log(share / classes)).mean())

    best = minimize(loss, np.array([0.5, -3.0]), method="Nelder-Mead")
    share = float(expit(best.x[1]))
    calibrated = np.exp(log_softmax(log_p * np.exp(-best.x[0]), axis=1))
    given = calibrated[rows, label]
    noise = share / classes
    return noise / ((1 - share) * given + noise), share, calibrated


def label_suspects(
    images: Images,
    rows: np.ndarray,
    features: np.ndarray,
    groups: np.ndarray,
    folds: int,
    seed: int,
    source: str,
) -> Finding:
    """Labels that a classifier which never saw the image, nor its near-duplicates, would not give.

    rows [n] are the images that `features` [n, D] stand for; `groups` [N] keeps near-duplicates in one
    fold. Classes of fewer than 2 * `folds` images are left out. `source` says where the features are from.
    """
    title = "Suspect labels"
    if images.tags is not None:
        return Finding(
            *("labels", title, "note", 0),
            "Not looked for: an image may have several classes here, and each would need its own verdict.",
        )
    label = images.label[rows]
    enough = np.bincount(label[label >= 0], minlength=len(images.classes)) >= 2 * folds
    keep = (label >= 0) & enough[label]
    rows, features, label = rows[keep], features[keep], label[keep]
    known, y = np.unique(label, return_inverse=True)
    if len(known) < 2:
        return Finding(
            *("labels", title, "note", 0),
            f"Not looked for: fewer than two classes have {2 * folds} images.",
        )
    fold = make_folds(y, groups[rows], folds, seed)
    probability = _out_of_fold(_linear, features, y, fold, len(known))
    noise, share, calibrated = noise_posterior(probability, y)
    suggestion = calibrated.argmax(1)
    found = np.flatnonzero((noise > 0.5) & (suggestion != y))
    found = found[np.argsort(-noise[found], kind="stable")]
    accuracy = float((probability.argmax(1) == y).mean())
    table, strips = [], []
    for i in found.tolist():
        at = int(rows[i])
        suggested = images.classes[known[suggestion[i]]]
        table.append(
            {
                **images.row(at),
                "suggested": suggested,
                "wrong": round(float(noise[i]), 4),
                "p_given": round(float(calibrated[i, y[i]]), 6),
                "p_suggested": round(float(calibrated[i, suggestion[i]]), 4),
            }
        )
        strips.append(Strip(f"{images.class_of(at)} → {suggested}?", [at], [f"{noise[i]:.0%}"]))
    portion = len(found) / len(rows)
    severity = (
        "serious" if portion >= 0.02 else "warning" if portion >= 0.005 or len(found) > 20 else "ok"
    )
    if len(found) and severity == "ok":
        severity = "note"
    if accuracy < 0.7 and severity == "serious":  # who is often wrong is no judge
        severity = "warning"
    left_out = int((~enough[images.label[images.label >= 0]]).sum())
    evidence = (
        f"{len(found):,} of {len(rows):,} labels ({portion:.1%}) are more likely wrong than right; about "
        f"{share * (1 - 1 / len(known)):.1%} wrong labels are estimated in all. Features: {source}; a linear classifier on them is right "
        f"for {accuracy:.1%}, out of fold."
    )
    if left_out:
        evidence += f" {left_out:,} images of classes with fewer than {2 * folds} were left out."
    return Finding(
        *("labels", title, severity, len(found), evidence),
        "Look at them, worst first, and correct or remove what is wrong; the suggestion is a guess."
        if len(found)
        else "",
        {
            "images": len(rows),
            "estimated_share": share * (1 - 1 / len(known)),
            "accuracy": accuracy,
            "features": source,
        },
        table,
        strips,
    )


# ----------------------------------------------------------------------------------------- imbalance
def balance(images: Images, few: int = 20) -> Finding:
    """How many images each class has in each split, and which have too few."""
    classes, splits = images.classes, [str(s) for s in dict.fromkeys(images.split.tolist())]
    if images.tags is not None:
        counts = np.stack([images.tags[images.split == s].sum(0) for s in splits], 1)
    else:
        labelled = images.label >= 0
        counts = np.stack(
            [
                np.bincount(images.label[(images.split == s) & labelled], minlength=len(classes))
                for s in splits
            ],
            1,
        )
    train = counts[:, splits.index("train")] if "train" in splits else counts.sum(1)
    ratio = float(train.max() / max(train.min(), 1))
    share = train / max(train.sum(), 1)
    effective = float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))
    missing = {
        s: [c for c, n in zip(classes, counts[:, k], strict=True) if n == 0]
        for k, s in enumerate(splits)
    }
    missing = {s: names for s, names in missing.items() if names}
    scarce = [c for c, n in zip(classes, train, strict=True) if 0 < n < few]
    severity = "ok"
    if ratio >= 10 or scarce or missing:
        severity = "warning"
    if "train" in missing or ratio >= 100:
        severity = "serious"
    evidence = (
        f"The largest class has {train.max():,} training images, the smallest {train.min():,} ({ratio:.1f} : 1); "
        f"{len(classes):,} classes weigh as much as {effective:.1f} of equal size."
    )
    for split, names in missing.items():
        evidence += f" Not in {split}: {_some(names)}."
    if scarce:
        evidence += f" Fewer than {few} training images: {_some(scarce)}."
    rows = [
        {"class": c, **{s: int(n) for s, n in zip(splits, counts[i], strict=True)}}
        for i, c in sorted(enumerate(classes), key=lambda item: train[item[0]])
    ]
    concerned = len({*scarce, *(n for names in missing.values() for n in names)})
    return Finding(
        *("balance", "Class balance", severity, concerned, evidence),
        "loop.sampler=class_balanced or class weights; look at macro metrics; collect more of the scarce classes."
        if severity != "ok"
        else "",
        {"ratio": ratio, "effective_classes": effective, "missing": missing, "scarce": scarce},
        rows,
    )


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (
        f" and {len(names) - most:,} more" if len(names) > most else ""
    )


# ------------------------------------------------------------------------------------------- history
CONTENT = frozenset(("bytes", "bytes_per_pixel"))
"""Columns that depend on what an image shows, too: a leaf costs more bytes than a sky."""

HEADER = (
    *("format", "mode", "bytes", "width", "height", "aspect", "bytes_per_pixel", "jpeg_quality"),
    *("subsampling", "progressive", "metadata", "camera", "software", "icc_profile", "dpi"),
)


@functools.cache
def _tables() -> dict[tuple[int, ...], int]:
    """libjpeg's quantisation table of each quality."""
    from PIL import Image

    found: dict[tuple[int, ...], int] = {}
    for quality in range(1, 101):
        file = io.BytesIO()
        Image.new("L", (8, 8)).save(file, "JPEG", quality=quality)
        found.setdefault(_first_table(Image.open(file)), quality)
    return found


def _first_table(im: Any) -> tuple[int, ...]:
    return tuple(next(iter(im.quantization.values()), ()))


def _quality(im: Any) -> int:
    """libjpeg's quality whose table is nearest to this file's."""
    table = _first_table(im)
    if table in (known := _tables()):
        return known[table]
    mine = np.array(table, np.int64)
    fits = {k: np.abs(np.array(k) - mine).sum() for k in known if len(k) == len(table)}
    return known[min(fits, key=lambda k: fits[k])] if fits else 0


def read_header(data: bytes) -> dict[str, Any]:
    """What a file's header tells without its pixels: a value for each of HEADER."""
    from PIL import ExifTags, Image, JpegImagePlugin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as im:
            jpeg = isinstance(im, JpegImagePlugin.JpegImageFile)
            try:
                exif = im.getexif()
            except Exception:  # a broken block of metadata is one that is there
                exif = {}
            make, model = (exif.get(tag) for tag in (ExifTags.Base.Make, ExifTags.Base.Model))
            width, height = im.size
            info = set(im.info) - {"dpi", "icc_profile", "progression", "progressive"}
            return {
                "format": im.format or "",
                "mode": im.mode,
                "bytes": len(data),
                "width": width,
                "height": height,
                "aspect": round(width / height, 3),
                "bytes_per_pixel": len(data) / (width * height),
                "jpeg_quality": _quality(im) if jpeg else 0,
                "subsampling": JpegImagePlugin.get_sampling(im) if jpeg else -1,
                "progressive": int(bool(im.info.get("progressive"))),
                "metadata": " ".join(sorted(map(str, info))),
                "camera": " ".join(str(part).strip("\0 ") for part in (make, model) if part),
                "software": str(exif.get(ExifTags.Base.Software, "")).strip("\0 "),
                "icc_profile": len(im.info.get("icc_profile") or b""),
                "dpi": str(im.info.get("dpi", "")),
            }


def read_headers(
    read: Callable[[int], bytes], rows: np.ndarray, progress: Progress | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Headers of files `rows` [n], in threads: those that could be read [m], and their columns [m]."""

    def work(row: int) -> dict[str, Any] | None:
        try:
            return read_header(read(row))
        except (OSError, ValueError, SyntaxError):  # what PIL raises for files that it half knows
            return None

    found: list[dict[str, Any] | None] = []
    with ThreadPoolExecutor(2 * _threads()) as pool:
        for header in _in_turn(pool, work, rows.tolist()):
            found.append(header)
            if progress:
                progress(len(found))
    good = np.array([h is not None for h in found], bool)
    kept = [h for h in found if h is not None]
    return rows[good], {name: np.array([h[name] for h in kept]) for name in HEADER}


def _coded(column: np.ndarray) -> np.ndarray:
    """Numbers as they are; words by how common they are, so that a tree splits off the common ones."""
    if column.dtype.kind in "iufb":
        return column.astype(np.float64)
    _, code, counts = np.unique(column, return_inverse=True, return_counts=True)
    return np.argsort(np.argsort(-counts, kind="stable"))[code].astype(np.float64)


def _tree() -> Any:
    from sklearn.tree import DecisionTreeClassifier

    return DecisionTreeClassifier(
        max_depth=5, min_samples_leaf=5, class_weight="balanced", random_state=0
    )


def _told_apart(
    probability: np.ndarray, y: np.ndarray, seed: int, times: int = 199
) -> tuple[float, np.ndarray, float]:
    """Balanced accuracy, each class's area under the curve [K], and a p-value for the largest of them.

    `probability` [n, K] is out of fold; the p-value is that of permuted labels against the same outputs.
    """
    from scipy.stats import rankdata

    n, classes = probability.shape
    size = np.bincount(y, minlength=classes)
    rank = rankdata(probability, axis=0).astype(np.float32)
    rows = np.arange(n)

    def areas(label: np.ndarray) -> np.ndarray:
        sums = np.bincount(label, weights=rank[rows, label], minlength=classes)
        return (sums - size * (size + 1) / 2) / np.maximum(size * (n - size), 1)

    rng = np.random.default_rng(seed)
    area = areas(y)
    # small classes reach large areas by chance: compare in units of their own spread
    spread = np.sqrt((n + 1) / (12 * np.maximum(size * (n - size), 1)))
    largest = ((area - 0.5) / spread).max()
    chance = [((areas(rng.permutation(y)) - 0.5) / spread).max() for _ in range(times)]
    p = (1 + sum(c >= largest for c in chance)) / (1 + times)
    hit = np.bincount(y, weights=probability.argmax(1) == y, minlength=classes)
    return float((hit / np.maximum(size, 1))[size > 0].mean()), area, float(p)


def history(
    images: Images,
    rows: np.ndarray,
    columns: dict[str, np.ndarray],
    groups: np.ndarray,
    folds: int,
    seed: int,
    most_classes: int = 200,
) -> Finding:
    """Whether what a file went through (format, quality, size, camera, …) tells its class.

    rows [n] are the images that `columns` [n] each stand for. Each column alone, then all that do not
    depend on what an image shows, are given to a shallow tree; how well it tells a class from the rest, out
    of fold, is compared with chance. Above `most_classes` the most frequent are looked at. A model would
    take the shortcut: Geirhos et al. 2020, arXiv:2004.07780.
    """
    title = "Shortcuts in the files' history"
    label = images.label[rows]
    counts = np.bincount(label[label >= 0], minlength=len(images.classes))
    chosen = np.argsort(-counts, kind="stable")[:most_classes]
    chosen = np.sort(chosen[counts[chosen] >= 2 * folds])
    keep = np.isin(label, chosen)
    if len(chosen) < 2:
        reason = (
            "an image may have several classes here"
            if images.tags is not None
            else f"fewer than two classes have {2 * folds} images"
        )
        return Finding("history", title, "note", 0, f"Not looked for: {reason}.")
    rows, y = rows[keep], np.searchsorted(chosen, label[keep])
    columns = {name: column[keep] for name, column in columns.items()}
    coded = {name: _coded(column) for name, column in columns.items()}
    varied = [name for name in HEADER if len(np.unique(coded[name])) > 1]
    trials = [(name, [name]) for name in varied]
    together = [name for name in varied if name not in CONTENT]
    if len(together) > 1:
        trials.append(("all together", together))
    fold = make_folds(y, groups[rows], folds, seed)
    chance = 1 / len(chosen)
    table: list[dict[str, Any]] = []
    flagged: list[str] = []
    entangled: list[str] = []
    strips: list[Strip] = []
    for name, parts in trials:
        x = np.stack([coded[part] for part in parts], 1)
        accuracy, area, p = _told_apart(_out_of_fold(_tree, x, y, fold, len(chosen)), y, seed)
        worst = int(area.argmax())
        skill = (accuracy - chance) / (1 - chance)
        found = p <= 0.01 and (area[worst] >= 0.8 or skill >= 0.15)
        if found and name in CONTENT:
            entangled.append(name)
            found = False
        table.append(
            {
                "column": name,
                "tells": found,
                "balanced_accuracy": round(accuracy, 4),
                "chance": round(chance, 4),
                "class": images.classes[chosen[worst]],
                "area_under_curve": round(float(area[worst]), 4),
                "p": round(p, 4),
                "values": _telling_values(columns[name], y == worst) if name in columns else "",
            }
        )
        if found:
            flagged.append(name)
            if name in columns:
                pick = [rows[np.flatnonzero(y == k)[:3]] for k in np.argsort(-area)[:2]]
                for part in pick:
                    at = part.tolist()
                    where = {int(r): i for i, r in enumerate(rows)}
                    strips.append(
                        Strip(
                            f"{name}: {images.class_of(at[0])}",
                            at,
                            [f"{name}={_short(columns[name][where[i]])}" for i in at],
                        )
                    )
    table.sort(key=lambda row: (not row["tells"], -row["area_under_curve"]))
    constant = [name for name in HEADER if name not in varied]
    severity = "serious" if flagged else "note" if entangled else "ok"
    if flagged:
        worst_row = next(
            (r for r in table if r["tells"] and r["column"] != "all together"), table[0]
        )
        evidence = (
            f"{_some(flagged)} tell the class without a look at the pixels. {worst_row['column']} tells "
            f"{worst_row['class']} from the rest with an area under the curve of {worst_row['area_under_curve']:.2f}"
            + (f": {worst_row['values']}." if worst_row["values"] else ".")
        )
    else:
        evidence = f"None of {len(varied) - len(entangled)} columns that vary tells the class."
    if entangled:
        evidence += f" {_some(entangled)} would, but may follow from what the images show."
    if constant:
        evidence += f" The same in all files: {_some(constant, 15)}."
    return Finding(
        *("history", title, severity, len(flagged), evidence),
        "Give all classes the same history: decode everything, resize it alike, and write it again at one quality; "
        "or collect each class from the same sources."
        if flagged
        else "",
        {"columns": len(varied), "flagged": flagged, "files": len(rows)},
        table,
        strips,
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)[:40] or "none"


def _telling_values(column: np.ndarray, mine: np.ndarray) -> str:
    """The value (or the middle half of the values) that marks a class, and how it is elsewhere."""
    values, code = np.unique(column, return_inverse=True)
    if len(values) > 30 and column.dtype.kind in "iuf":
        inner, outer = (np.percentile(column[m], (25, 50, 75)) for m in (mine, ~mine))
        middle = [f"{low:.4g} to {high:.4g}" for low, _, high in (inner, outer)]
        return f"mostly {middle[0]}, elsewhere {middle[1]}"
    inside = np.bincount(code[mine], minlength=len(values)) / max(mine.sum(), 1)
    outside = np.bincount(code[~mine], minlength=len(values)) / max((~mine).sum(), 1)
    k = int((inside - outside).argmax())
    return f"{_short(values[k])} in {inside[k]:.0%} of its files, elsewhere in {outside[k]:.0%}"


# -------------------------------------------------------------------------------------------- splits
def same_mix(label_a: np.ndarray, label_b: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a and of b in which every class has the same share, as many as there can be."""
    classes = int(max(label_a.max(initial=0), label_b.max(initial=0))) + 1
    have_a, have_b = (np.bincount(x, minlength=classes) for x in (label_a, label_b))
    ratio = have_a[have_b > 0].sum() / max(have_b[have_a > 0].sum(), 1)
    take_b = np.floor(np.minimum(have_b, have_a / max(ratio, 1e-9)) + 1e-9)
    take_a = np.floor(take_b * ratio + 1e-9)
    rng = np.random.default_rng(seed)

    def pick(label: np.ndarray, take: np.ndarray) -> np.ndarray:
        order = rng.permutation(len(label))
        order = order[np.argsort(label[order], kind="stable")]
        starts = np.searchsorted(label[order], np.arange(classes))
        place = np.arange(len(label)) - starts[label[order]]
        return np.sort(order[place < take[label[order]]])

    return pick(label_a, take_a), pick(label_b, take_b)


def split_shift(
    images: Images,
    rows: np.ndarray,
    features: np.ndarray,
    groups: np.ndarray,
    folds: int,
    seed: int,
    source: str,
) -> Finding:
    """Whether a split looks different from the training images, class by class, or holds other classes.

    A classifier two-sample test: Lopez-Paz and Oquab 2016, arXiv:1610.06545. Its area under the curve is
    taken within classes and compared with the rank test's own spread (van Elteren 1960); the simple
    statistics are compared by Kolmogorov and Smirnov's test on samples of the same class mix, at p < 0.01
    over all of them.
    """
    title = "Splits that differ"
    split = images.split[rows]
    table: list[dict[str, Any]] = []
    strips: list[Strip] = []
    facts: dict[str, Any] = {"features": source}
    said: list[str] = []
    severity = "ok"
    label = np.zeros(len(rows), np.int64) if images.tags is not None else images.label[rows]
    for other in ("val", "test"):
        pair = np.isin(split, ("train", other)) & (label >= 0)
        y = (split[pair] == other).astype(np.int64)
        if min(y.sum(), (1 - y).sum()) < 4 * folds:
            continue
        at, own = rows[pair], label[pair]
        area, p = _shift(features[pair], y, own, groups[at], folds, seed)
        facts[f"train_{other}"] = {"area_under_curve": area, "p": p}
        found = p < 0.001 and area >= 0.6
        table.append(
            _compared(other, "the images' features", area, p, found, "area under the curve")
        )
        if found:
            severity = "serious" if area >= 0.7 else max(severity, "warning", key=_rank)
            said.append(f"a classifier tells {other} from train (area under the curve {area:.2f})")
        cells, moved = _statistics_moved(images, at, y, own, other, seed)
        table += cells
        if moved:
            severity = "serious" if moved[0][1] >= 0.3 else max(severity, "warning", key=_rank)
            said.append(f"{other} differs in {', '.join(name for name, _ in moved)}")
            name = moved[0][0]
            values = images.stats.get(name)
            if values is not None:
                for which in (0, 1):
                    mine = at[y == which]
                    middle = mine[np.argsort(values[mine])][len(mine) // 2 :][:6].tolist()
                    part = other if which else "train"
                    notes = [f"{name} {values[i]:.4g}" for i in middle]
                    strips.append(Strip(f"typical {name} of {part}", middle, notes))
        if images.tags is None:
            cell = _mix_differs(own, y, other, len(images.classes))
            table.append(cell)
            if cell["differs"]:
                severity = max(severity, "warning", key=_rank)
                said.append(f"{other} has another mix of classes")
    if not table:
        return Finding(
            *("splits", title, "note", 0),
            f"Not compared: there are no two splits of {4 * folds} images.",
        )
    evidence = "; ".join(said).capitalize() + "." if said else "No split differs from train."
    return Finding(
        *("splits", title, severity, sum(row["differs"] for row in table), evidence),
        "Find out why before trusting a validation number; draw the split again from all images "
        "(data.split), or keep a shifted set as a test of robustness."
        if said
        else "",
        facts,
        table,
        strips,
    )


def _rank(severity: str) -> int:
    return -SEVERITIES.index(severity)


def _compared(
    other: str, what: str, value: float, p: float, differs: bool, measure: str, note: str = ""
) -> dict[str, Any]:
    return {
        "split": other,
        "compared": what,
        "differs": bool(differs),
        "measure": measure,
        "value": round(float(value), 4),
        "p": float(f"{p:.3g}"),
        "note": note,
    }


def _shift(
    x: np.ndarray, y: np.ndarray, label: np.ndarray, groups: np.ndarray, folds: int, seed: int
) -> tuple[float, float]:
    """Area under the curve within classes of an out-of-fold classifier of y [n] in {0, 1}, and its p-value."""
    from scipy.stats import norm, rankdata

    fold = make_folds(2 * label + y, groups, folds, seed)
    score = _out_of_fold(_linear, x, y, fold, 2)[:, 1]
    for k in range(folds):  # folds have models of their own, and scales
        score[fold == k] = rankdata(score[fold == k]) / max((fold == k).sum(), 1)
    won = pairs = variance = 0.0
    for c in np.unique(label):
        mine = label == c
        a, b = int((1 - y[mine]).sum()), int(y[mine].sum())
        if a and b:
            # weights that make the sum the most sensitive one: van Elteren's
            weight = 1 / (a + b + 1)
            won += weight * (rankdata(score[mine])[y[mine] == 1].sum() - b * (b + 1) / 2)
            pairs += weight * a * b
            variance += weight**2 * a * b * (a + b + 1) / 12
    if not pairs:
        return 0.5, 1.0
    return float(won / pairs), float(norm.sf((won - pairs / 2) / np.sqrt(variance)))


def _statistics_moved(
    images: Images, at: np.ndarray, y: np.ndarray, label: np.ndarray, other: str, seed: int
) -> tuple[list[dict[str, Any]], list[tuple[str, float]]]:
    from scipy.stats import ks_2samp

    train, held = at[y == 0], at[y == 1]
    a, b = same_mix(label[y == 0], label[y == 1], seed)
    train, held = train[a], held[b]
    values = {**images.stats, "width": images.size_px[:, 0], "height": images.size_px[:, 1]}
    cells, moved = [], []
    for name, column in values.items():
        if not len(train) or not len(held):
            continue
        distance, p = map(float, ks_2samp(column[train], column[held]))  # type: ignore[arg-type]
        p = min(1.0, p * len(values))
        found = p < 0.01 and distance >= 0.1
        medians = [float(np.median(column[part])) for part in (train, held)]
        note = f"median {medians[0]:.4g} in train, {medians[1]:.4g} in {other}"
        cells.append(_compared(other, name, distance, p, found, "largest distance (KS)", note))
        if found:
            moved.append((name, distance))
    return cells, sorted(moved, key=lambda item: -item[1])


def _mix_differs(label: np.ndarray, y: np.ndarray, other: str, classes: int) -> dict[str, Any]:
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import chi2_contingency

    counts = np.stack([np.bincount(label[y == k], minlength=classes) for k in (0, 1)])
    counts = counts[:, counts.sum(0) > 0]
    p = float(chi2_contingency(counts).pvalue) if counts.shape[1] > 1 else 1.0  # type: ignore[attr-defined]
    distance = float(jensenshannon(counts[0], counts[1], base=2))
    return _compared(
        other, "class mix", distance, p, p < 0.01 and distance >= 0.1, "Jensen-Shannon distance"
    )


# --------------------------------------------------------------------------------------------- blank
def _is_blank(images: Images) -> np.ndarray:
    return (images.stats["contrast"] < 4) | (images.stats["one_colour"] > 0.995)


def blank(images: Images) -> Finding:
    """Images that show next to nothing, are nearly black or white, or are blurred beside the rest of the set."""
    stats = images.stats
    empty = _is_blank(images)
    sharp = stats["sharpness"]
    middle = np.median(sharp)
    spread = max(1.4826 * float(np.median(np.abs(sharp - middle))), 0.1)
    standing_out = (sharp - middle) / spread
    problems = {
        "nearly blank": empty,
        "very dark": ~empty & (stats["brightness"] < 15),
        "very bright": ~empty & (stats["brightness"] > 245),
        "blurred": ~empty & (standing_out < -4) & (sharp < 2),
    }
    rows, strips = [], []
    for problem, mask in problems.items():
        found = np.flatnonzero(mask)
        by = {"very dark": stats["brightness"], "very bright": -stats["brightness"]}
        found = found[np.argsort(by.get(problem, sharp)[found], kind="stable")]
        for i in found.tolist():
            numbers = {name: round(float(values[i]), 3) for name, values in stats.items()}
            rows.append({**images.row(i), "problem": problem, **numbers})
        notes = [f"{images.class_of(i)}, {images.split[i]}" for i in found.tolist()]
        for first in range(0, len(found), 8):
            part = slice(first, first + 8)
            strips.append(Strip(problem, found[part].tolist(), notes[part]))
    counts = {problem: int(mask.sum()) for problem, mask in problems.items()}
    n, empties = len(rows), counts["nearly blank"]
    severity = "warning" if empties or n > 0.01 * len(images) else "note" if n else "ok"
    if empties > 0.01 * len(images):
        severity = "serious"
    said = ", ".join(f"{k} {problem}" for problem, k in counts.items() if k)
    return Finding(
        *("blank", "Blank, dark, bright or blurred", severity, n),
        f"{said}." if n else "Every image shows something.",
        "Remove what shows nothing; a blurred or dark image may be a fair example." if n else "",
        counts,
        rows,
        strips,
    )
