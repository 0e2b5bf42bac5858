"""Where rows come from. So far: folders of class folders, with or without splits above them.

    root/<class>/**/<image>            the validation split is made (data.split)
    root/<split>/<class>/**/<image>    train, training | val, valid, validation | test, testing

Hidden files and folders are passed over, and files that usually lie beside images (SIDECARS). Every other
file is taken for an image: if it is none, it is quarantined when it is read, not skipped here.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from potstill.errors import UserError

if TYPE_CHECKING:
    from potstill.config import Data, Decode

SPLITS = ("train", "val", "test")
FORMAT_VERSION = (
    1  # of everything that a key stands for: raise it when the same source gives another cache
)

_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# fmt: off
SIDECARS = frozenset((
    ".txt", ".md", ".rst", ".html", ".pdf", ".log", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".xmp", ".yaml", ".yml",
    ".ini", ".db", ".lnk", ".py", ".parquet", ".arrow", ".npy", ".npz", ".pkl", ".mat", ".sha256", ".md5",
    ".zip", ".tar", ".gz", ".tgz", ".bz2", ".7z",
))
# fmt: on
_TREE = "it must hold a folder a class (root/<class>/*.jpg), or train/ and val/ with a folder a class below each"


@dataclass
class Rows:
    """Every image candidate of a source, in the order of its path.

    path: list of N paths relative to `root`, with forward slashes. size [N] int64, bytes. mtime_ns [N] int64.
    label [N] int32, index into `classes`. split [N] str. id [N] int64 >= 0, a hash of the path.
    ignored: how many files were passed over, by extension.
    """

    root: Path
    classes: list[str]
    path: list[str]
    size: np.ndarray
    mtime_ns: np.ndarray
    label: np.ndarray
    split: np.ndarray
    id: np.ndarray
    ignored: dict[str, int]

    def __len__(self) -> int:
        return len(self.path)


def list_rows(data: Data, for_training: bool = True) -> Rows:
    """List a source without opening a file.

    `for_training=False` (to evaluate on a folder) also takes a source of one class or without training
    rows, and `data.split.val=1`, which makes all of it validation where no folder is named for a split;
    where some are, they stay what they are.

    Raises UserError where the source or the selection cannot be used.
    """
    if data.source != "folder":
        raise UserError(f"data.source must be folder, got {data.source!r}")
    if not 0 < data.split.val < 1 and (for_training or data.split.val != 1):
        raise UserError(
            f"data.split.val must be > 0 and < 1, got {data.split.val:g}; it is the share of each class that validates"
        )
    root = _root(data.root)
    ignored: Counter[str] = Counter()
    files = _walk(root, ignored)
    if not files:
        seen = f"{sum(ignored.values())} files that are no images" if ignored else "nothing"
        raise UserError(
            f"data.root must be a folder of class folders, got {str(root)!r}, which holds {seen}; {_TREE}"
        )
    files = _select(files, data.classes, root)
    _make_split(files, data)
    files.sort(key=lambda f: f.path)
    if for_training:
        _require_two_classes(files, data, root)
    if data.max_samples is not None:
        files = _sample(files, data.max_samples, data.split.seed)
    classes = sorted({f.class_name for f in files})
    index = {name: i for i, name in enumerate(classes)}
    return Rows(
        root=root,
        classes=classes,
        path=[f.path for f in files],
        size=np.array([f.size for f in files], np.int64),
        mtime_ns=np.array([f.mtime_ns for f in files], np.int64),
        label=np.array([index[f.class_name] for f in files], np.int32),
        split=np.array([f.split for f in files]),
        id=_ids([f.path for f in files]),
        ignored=dict(sorted(ignored.items())),
    )


def fingerprint(rows: Rows, decode: Decode) -> str:
    """The key of the cache that these rows make: 16 hex digits.

    It stands for the paths below the root, sizes, times, class names, splits and the decode spec, not for
    where the root is.
    """
    digest = hashlib.blake2b(digest_size=8)
    spec = {"format": FORMAT_VERSION, "decode": dataclasses.asdict(decode), "classes": rows.classes}
    digest.update(json.dumps(spec, sort_keys=True).encode())
    digest.update(b"\0".join(os.fsencode(p) for p in rows.path))
    code = {name: i for i, name in enumerate(SPLITS)}
    digest.update(np.array([code[s] for s in rows.split], np.int8).tobytes())
    for column in (rows.size, rows.mtime_ns, rows.label):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def printable(path: str) -> str:
    """A path that can be written as UTF-8: a file's name may hold bytes that are none."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------- listing
@dataclass(slots=True)
class _File:
    path: str  # relative to the root
    inner: str  # relative to the class folder
    class_name: str
    split: str  # "" until it is made
    size: int
    mtime_ns: int


def _root(root: str | None) -> Path:
    if root is None:
        raise UserError(
            f"data.root must be a folder of class folders, got null; set data.root=<folder>: {_TREE}"
        )
    path = Path(root).expanduser().absolute()
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path"
        raise UserError(
            f"data.root must be a folder of class folders, got {root!r}, which does not exist; {hint}"
        )
    if not path.is_dir():
        remedy = (
            "unpack it first, and give the folder"
            if path.suffix in (".tar", ".gz", ".tgz", ".zip")
            else _TREE
        )
        raise UserError(
            f"data.root must be a folder of class folders, got {root!r}, which is a file; {remedy}"
        )
    return path


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _folders(folder: str) -> list[str]:
    """Names of the visible folders below one, sorted."""
    with _scan(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def _scan(folder: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise UserError(
            f"data.root must be readable, but {folder!r} is not: {error.strerror}"
        ) from None


def _walk(root: Path, ignored: Counter[str]) -> list[_File]:
    top = _folders(str(root))
    split_folders = {name: _ALIASES[name.lower()] for name in top if name.lower() in _ALIASES}
    with_classes = [name for name in split_folders if _folders(str(root / name))]
    # a class may be called "train", too: a split has folders in it
    if not any(split_folders[name] == "train" for name in with_classes) and len(with_classes) < len(
        top
    ):
        split_folders = {}
    twice = [s for s, n in Counter(split_folders.values()).items() if n > 1]
    if twice:
        names = sorted(n for n, s in split_folders.items() if s == twice[0])
        raise UserError(
            f"data.root must hold one {twice[0]} folder, but {str(root)!r} holds {' and '.join(names)}; merge them"
        )
    files: list[_File] = []
    _count_loose(str(root), ignored)
    if not split_folders:
        for name in top:
            files += _class_files(root, name, "", ignored)
        return files
    for folder, split in split_folders.items():
        _count_loose(str(root / folder), ignored)
        for name in _folders(str(root / folder)):
            files += _class_files(root, f"{folder}/{name}", split, ignored)
    for name in top:
        if name not in split_folders:
            ignored[f"{name}/"] += sum(
                1 for _ in _files(str(root / name), "", frozenset(), Counter())
            )
    return files


def _class_files(root: Path, folder: str, split: str, ignored: Counter[str]) -> Iterator[_File]:
    # macOS writes names decomposed: the same class must be the same class in train/ and val/
    class_name = unicodedata.normalize("NFC", printable(folder.rsplit("/", 1)[-1]))
    for inner, size, mtime_ns in _files(str(root / folder), "", frozenset(), ignored):
        yield _File(f"{folder}/{inner}", inner, class_name, split, size, mtime_ns)


def _files(
    folder: str, prefix: str, above: frozenset[tuple[int, int]], ignored: Counter[str]
) -> Iterator[tuple]:
    """(path below the class folder, bytes, mtime in ns) of every image candidate, links followed."""
    here = os.stat(folder)
    if (here.st_dev, here.st_ino) in above:
        return  # a link to a folder that it lies in
    above = above | {(here.st_dev, here.st_ino)}
    with _scan(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(entry.path, f"{prefix}{name}/", above, ignored)
            elif _is_candidate(name, ignored):
                try:
                    info = entry.stat()
                except OSError:
                    yield prefix + name, 0, 0  # a broken link: it will be quarantined as unreadable
                    continue
                if stat.S_ISREG(info.st_mode):
                    yield prefix + name, info.st_size, info.st_mtime_ns
                else:
                    ignored["(no regular file)"] += 1


def _is_candidate(name: str, ignored: Counter[str]) -> bool:
    stem, dot, end = name.rpartition(".")
    extension = f"{dot}{end.lower()}" if stem else ""
    if extension in SIDECARS:
        ignored[extension] += 1
    return extension not in SIDECARS


def _count_loose(folder: str, ignored: Counter[str]) -> None:
    with _scan(folder) as entries:
        for entry in entries:
            if (
                not entry.name.startswith(".")
                and not entry.is_dir()
                and _is_candidate(entry.name, ignored)
            ):
                ignored["(in no class folder)"] += 1


# ----------------------------------------------------------------------------------------- selection
def _select(files: list[_File], patterns: list[str] | None, root: Path) -> list[_File]:
    if patterns is None:
        return files
    names = sorted({f.class_name for f in files})
    chosen: set[str] = set()
    for pattern in patterns:
        pattern = unicodedata.normalize("NFC", pattern)
        matches = {pattern} if pattern in names else set(fnmatch.filter(names, pattern))
        if not matches:
            lower = {n.lower(): n for n in reversed(names)}
            near = [
                lower[n]
                for n in difflib.get_close_matches(
                    pattern.lower().strip("*?"), lower, n=3, cutoff=0.4
                )
            ]
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {_some(names)}"
            raise UserError(
                f"data.classes: {pattern!r} matches none of the {len(names)} classes of {str(root)!r}; {hint}"
            )
        chosen |= matches
    return [f for f in files if f.class_name in chosen]


def _make_split(files: list[_File], data: Data) -> None:
    """Give every file a split. What is made depends on a file's class and name alone, not on the other classes."""
    present = {f.split for f in files}
    if "val" in present or (data.split.val == 1 and "" not in present):
        return
    by_class: dict[str, list[_File]] = {}
    for file in files:
        if file.split in ("", "train"):
            by_class.setdefault(file.class_name, []).append(file)
    for name, members in by_class.items():
        members.sort(key=lambda f: _rank(data.split.seed, name, f.inner))
        wanted = max(1, round(data.split.val * len(members)))
        if data.split.val < 1:
            wanted = min(wanted, len(members) - 1)
        for i, file in enumerate(members):
            file.split = "val" if i < wanted else "train"


def _require_two_classes(files: list[_File], data: Data, root: Path) -> None:
    names = sorted({f.class_name for f in files})
    selected = "" if data.classes is None else f" that data.classes={data.classes} selects"
    if len(names) < 2:
        hint = _TREE
        if data.classes is not None:
            hint = "select more"
        elif _looks_like_root(root / names[0]):
            hint = f"did you mean data.root={root / names[0]}?"
        raise UserError(
            f"data.root must hold at least 2 classes{selected}, got {len(names)} ({_some(names)}) in {str(root)!r}; {hint}"
        )
    trained = sorted({f.class_name for f in files if f.split == "train"})
    if len(trained) < 2:
        raise UserError(
            f"data.root must hold training images of at least 2 classes{selected}, got {len(trained)} in {str(root)!r}; "
            "put a folder a class below train/"
        )
    if not any(f.split == "val" for f in files):
        raise UserError(
            f"data.root must hold validation images, got none in {str(root)!r}: no class has the 2 images that a "
            "split needs; add images, or a val/ folder"
        )


def _looks_like_root(folder: Path) -> bool:
    return folder.is_dir() and len(_folders(str(folder))) >= 2


def _sample(files: list[_File], wanted: int, seed: int) -> list[_File]:
    """The splits keep their proportions; within a split, classes take turns."""
    by_split = {s: [f for f in files if f.split == s] for s in SPLITS}
    by_split = {s: members for s, members in by_split.items() if members}
    least = 2 * len(by_split)
    if wanted < least:
        raise UserError(
            f"data.max_samples must be >= {least} (2 for each of {', '.join(by_split)}), got {wanted}"
        )
    if wanted >= len(files):
        return files
    quota = {s: max(2, int(wanted * len(m) / len(files))) for s, m in by_split.items()}
    quota[max(quota, key=lambda s: quota[s])] += wanted - sum(quota.values())
    kept = []
    for split, members in by_split.items():
        members.sort(key=lambda f: _rank(seed, f.class_name, f.inner))
        turn: Counter[str] = Counter()
        order = []
        for file in members:
            order.append((turn[file.class_name], file.class_name, file))
            turn[file.class_name] += 1
        order.sort(key=lambda item: item[:2])
        kept += [file for _, _, file in order[: quota[split]]]
    return sorted(kept, key=lambda f: f.path)


def _rank(seed: int, class_name: str, inner: str) -> bytes:
    return hashlib.blake2b(
        f"{seed}\0{class_name}\0".encode() + os.fsencode(inner), digest_size=8
    ).digest()


def _ids(paths: Iterable[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(os.fsencode(p), digest_size=8).digest() for p in paths)
    ids = (np.frombuffer(digests, ">u8") >> 1).astype(np.int64)
    if len(np.unique(ids)) < len(ids):
        raise UserError(
            "data.root holds two paths with the same id (a hash of the path); rename a folder"
        )
    return ids


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
