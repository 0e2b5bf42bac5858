"""Folders of class folders, with or without splits above them, on a disk or in an object store.

    root/<class>/**/<image>            the validation split is made (data.split)
    root/<split>/<class>/**/<image>    train, training | val, valid, validation | test, testing

Hidden files and folders are passed over, and files that usually lie beside images (SIDECARS). Every other
file is taken for an image: if it is none, it is quarantined when it is read, not skipped here.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from potstill.data.files import Files, Place, explained, locate
from potstill.data.sources import ALIASES, Entry, Listing, class_name_of
from potstill.errors import UserError

if TYPE_CHECKING:
    from potstill.config import Data

# fmt: off
SIDECARS = frozenset((
    ".txt", ".md", ".rst", ".html", ".pdf", ".log", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".xmp", ".yaml", ".yml",
    ".ini", ".db", ".lnk", ".py", ".parquet", ".arrow", ".npy", ".npz", ".pkl", ".mat", ".sha256", ".md5",
    ".zip", ".tar", ".gz", ".tgz", ".bz2", ".7z",
))
# fmt: on
_TREE = "it must hold a folder a class (root/<class>/*.jpg), or train/ and val/ with a folder a class below each"


def list_folder(data: Data) -> Listing:
    """The source `folder`. Raises UserError where the root is none, or holds no image."""
    root = _root(data.root)
    found = tree(root, "data.root")
    apart = locate(data.unlabeled, "data.unlabeled") if data.unlabeled else None
    ignored: Counter[str] = Counter()
    entries = _walk(root, found, ignored, apart)
    if not entries:
        seen = f"{sum(ignored.values())} files that are no images" if ignored else "nothing"
        raise UserError(
            f"data.root must be a folder of class folders, got {str(root)!r}, which holds {seen}; {_TREE}"
        )
    walked = [Path(root.path)] if root.local else []
    return Listing(entries, Files(root), str(root), dict(ignored), walked=walked)


def list_unlabeled(text: str) -> Listing:
    """Every image below the folder `data.unlabeled`, without labels, for training."""
    root = locate(text, "data.unlabeled")
    if root.local and not os.path.isdir(root.path):
        raise UserError(
            f"data.unlabeled must be a folder of images, got {text!r}, which is none; check the path"
        )
    ignored: Counter[str] = Counter()
    entries = [
        Entry(f"unlabeled/{inner}", None, "train", size, mtime_ns, place=root.join(inner))
        for inner, size, mtime_ns in tree(root, "data.unlabeled").files("", ignored)
    ]
    if not entries:
        raise UserError(
            f"data.unlabeled must be a folder that holds images, got {str(root)!r}, which holds none"
        )
    walked = [Path(root.path)] if root.local else []
    return Listing(entries, Files(root), str(root), dict(ignored), walked=walked)


def looks_like_root(folder: Path) -> bool:
    """Whether this could be what data.root was meant to be."""
    return folder.is_dir() and len(_LocalTree(str(folder)).folders("")) >= 2


def _root(root: str | None) -> Place:
    if root is None:
        raise UserError(
            f"data.root must be a folder of class folders, got null; set data.root=<folder>: {_TREE}"
        )
    place = locate(root, "data.root")
    if not place.local:
        return place
    path = Path(place.path)
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path"
        raise UserError(
            f"data.root must be a folder of class folders, got {root!r}, which does not exist; {hint}"
        )
    if not path.is_dir():
        raise UserError(
            f"data.root must be a folder of class folders, got {root!r}, which is a file; {_remedy(path)}"
        )
    return place


def _remedy(file: Path) -> str:
    """How a file that is no folder could be used."""
    if file.suffix == ".tar":
        return "add data.source=tar"
    if file.suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        return "add data.source=manifest"
    if file.suffix in (".gz", ".tgz", ".zip"):
        return "unpack it first, and give the folder"
    return _TREE


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _walk(root: Place, tree: _Tree, ignored: Counter[str], apart: Place | None) -> list[Entry]:
    top = [name for name in tree.folders("") if root.join(name) != apart]
    split_folders = {name: ALIASES[name.lower()] for name in top if name.lower() in ALIASES}
    with_classes = [name for name in split_folders if tree.folders(name)]
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
    entries: list[Entry] = []
    ignored["(in no class folder)"] += tree.loose("", ignored)
    if not split_folders:
        for name in top:
            entries += _class_files(tree, name, "", ignored)
    for folder, split in split_folders.items():
        ignored["(in no class folder)"] += tree.loose(folder, ignored)
        for name in tree.folders(folder):
            entries += _class_files(tree, f"{folder}/{name}", split, ignored)
    for name in top if split_folders else ():
        if name not in split_folders:
            ignored[f"{name}/"] += sum(1 for _ in tree.files(name, Counter()))
    ignored += Counter()  # without what was counted 0 times
    return entries


def _class_files(tree: _Tree, folder: str, split: str, ignored: Counter[str]) -> Iterator[Entry]:
    labels = (class_name_of(folder.rsplit("/", 1)[-1]),)
    for inner, size, mtime_ns in tree.files(folder, ignored):
        yield Entry(f"{folder}/{inner}", labels, split, size, mtime_ns)


def _is_candidate(name: str, ignored: Counter[str]) -> bool:
    stem, dot, end = name.rpartition(".")
    extension = f"{dot}{end.lower()}" if stem else ""
    if extension in SIDECARS:
        ignored[extension] += 1
    return extension not in SIDECARS


# --------------------------------------------------------------------------------------------- trees
class _Tree(Protocol):
    def folders(self, inner: str) -> list[str]:
        """Names of the visible folders in one, sorted."""
        ...

    def loose(self, inner: str, ignored: Counter[str]) -> int:
        """How many image candidates stand in the folder itself."""
        ...

    def files(self, inner: str, ignored: Counter[str]) -> Iterator[tuple[str, int, int]]:
        """(path below the folder, bytes, mtime in ns) of every image candidate below it."""
        ...


def tree(root: Place, key: str) -> _Tree:
    if root.local:
        return _LocalTree(root.path, key)
    with explained(root, key):
        return _RemoteTree(root)


class _LocalTree:
    """Links are followed."""

    def __init__(self, root: str, key: str = "data.root") -> None:
        self._root, self._key = root, key

    def _at(self, inner: str) -> str:
        return f"{self._root}/{inner}" if inner else self._root

    def folders(self, inner: str) -> list[str]:
        with self._scan(self._at(inner)) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())

    def loose(self, inner: str, ignored: Counter[str]) -> int:
        with self._scan(self._at(inner)) as entries:
            return sum(
                not e.name.startswith(".") and not e.is_dir() and _is_candidate(e.name, ignored)
                for e in entries
            )

    def files(self, inner: str, ignored: Counter[str]) -> Iterator[tuple[str, int, int]]:
        return self._files(self._at(inner), "", frozenset(), ignored)

    def _scan(self, folder: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
        try:
            return os.scandir(folder)
        except OSError as error:
            raise UserError(
                f"{self._key} must be readable, but {folder!r} is not: {error.strerror}"
            ) from None

    def _files(
        self, folder: str, prefix: str, above: frozenset[tuple[int, int]], ignored: Counter[str]
    ) -> Iterator[tuple[str, int, int]]:
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in above:
            return  # a link to a folder that it lies in
        above = above | {(here.st_dev, here.st_ino)}
        with self._scan(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from self._files(entry.path, f"{prefix}{name}/", above, ignored)
                elif _is_candidate(name, ignored):
                    try:
                        info = entry.stat()
                    except OSError:
                        yield prefix + name, 0, 0  # a broken link: it will be quarantined
                        continue
                    if stat.S_ISREG(info.st_mode):
                        yield prefix + name, info.st_size, info.st_mtime_ns
                    else:
                        ignored["(no regular file)"] += 1


class _RemoteTree:
    """An object store's folder, by one listing of all that is below it."""

    def __init__(self, root: Place) -> None:
        self._folders: dict[str, set[str]] = {}
        self._files: dict[str, list[tuple[str, int, int]]] = {}
        for path, (size, mtime_ns) in root.files(recursive=True):
            folder, _, name = path.rpartition("/")
            self._files.setdefault(folder, []).append((name, size, mtime_ns))
            while folder:
                above, _, own = folder.rpartition("/")
                self._folders.setdefault(above, set()).add(own)
                folder = above

    def folders(self, inner: str) -> list[str]:
        return sorted(self._folders.get(inner, ()))

    def loose(self, inner: str, ignored: Counter[str]) -> int:
        return sum(_is_candidate(name, ignored) for name, _, _ in self._files.get(inner, ()))

    def files(self, inner: str, ignored: Counter[str]) -> Iterator[tuple[str, int, int]]:
        for name, size, mtime_ns in self._files.get(inner, ()):
            if _is_candidate(name, ignored):
                yield name, size, mtime_ns
        for folder in self.folders(inner):
            below = self.files(f"{inner}/{folder}" if inner else folder, ignored)
            for path, size, mtime_ns in below:
                yield f"{folder}/{path}", size, mtime_ns
