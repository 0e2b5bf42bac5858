"""Files and folders, on a disk or in an object store: a path, file://, or s3:// and gs:// through PyArrow."""

from __future__ import annotations

import functools
import os
import re
import stat
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from potstill.data.images import BadImage
from potstill.errors import UserError
from potstill.storage import home

if TYPE_CHECKING:
    from potstill.data.sources import Entry

HTTP_TIMEOUT_S = 30
MAX_HTTP_BYTES = 1 << 30
REQUESTS_AT_ONCE = 16

Stat = tuple[int, int]
"""Bytes, and time of the last change in ns."""

A = TypeVar("A")
B = TypeVar("B")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_REMOTE = {"s3": "s3", "gs": "gs", "gcs": "gs"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or use gs://anonymous@<bucket> for a public one",
}


def is_uri(text: str) -> bool:
    return _SCHEME.match(text) is not None


@dataclass(frozen=True)
class Place:
    """A file or folder. It pickles, and opens its file system where it is used."""

    scheme: str
    """"" on a disk, else s3 or gs."""
    path: str
    """An absolute path, or <bucket>/<key>."""
    options: str = ""
    """The query of the URI, such as endpoint_override=…; bucket and key are not in it."""
    user: str = ""
    """gs: "anonymous", or nothing."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}" if self.scheme else self.path

    @property
    def local(self) -> bool:
        return not self.scheme

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Place:
        above = self.path.rstrip("/").rpartition("/")[0]
        return replace(self, path=above or ("/" if self.local else ""))

    def join(self, inner: str) -> Place:
        return replace(self, path=f"{self.path.rstrip('/')}/{inner}" if inner else self.path)

    def filesystem(self) -> Any:
        bucket = self.path.partition("/")[0]
        return _filesystem(self.scheme, bucket, self.options, self.user)

    def stat(self) -> Stat | None:
        """None where it is no regular file. Raises OSError where it cannot be told."""
        if self.local:
            try:
                info = os.stat(self.path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return (info.st_size, info.st_mtime_ns) if stat.S_ISREG(info.st_mode) else None
        info = self.filesystem().get_file_info(self.path)
        return (info.size, info.mtime_ns or 0) if info.is_file else None

    def is_folder(self) -> bool:
        if self.local:
            return os.path.isdir(self.path)
        info = self.filesystem().get_file_info(self.path.rstrip("/"))
        return not info.is_file and info.type.name == "Directory"

    def open(self) -> Any:
        """A binary file to read from any place of. Raises OSError."""
        if self.local:
            return open(self.path, "rb")
        return self.filesystem().open_input_file(self.path)

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()

    def files(self, recursive: bool = False) -> Iterator[tuple[str, Stat]]:
        """(path below this folder, Stat) of every regular file in it; hidden ones are left out.

        `recursive` is for object stores, where it is one listing.
        """
        if self.local:
            assert not recursive
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    with suppress(OSError):
                        info = entry.stat()
                        if stat.S_ISREG(info.st_mode):
                            yield entry.name, (info.st_size, info.st_mtime_ns)
            return
        import pyarrow.fs

        base = self.path.rstrip("/")
        selector = pyarrow.fs.FileSelector(base, recursive=recursive)
        for info in self.filesystem().get_file_info(selector):
            inner = info.path[len(base) + 1 :]
            if info.is_file and not any(part.startswith(".") for part in inner.split("/")):
                yield inner, (info.size, info.mtime_ns or 0)


def locate(text: str, key: str) -> Place:
    """The place that a config's path or URI names; nothing is asked of it yet.

    Raises UserError for another scheme, and for credentials in the URI: configs are kept and shown.
    """
    found = _SCHEME.match(text)
    if found is None:
        return Place("", str(home() / Path(text).expanduser()))
    scheme, rest = found[1].lower(), text[found.end() :]
    if scheme == "file":
        path = urllib.request.url2pathname(rest.removeprefix("localhost"))
        if not path.startswith("/"):
            raise UserError(
                f"{key} must name a file as file:///<absolute path>, got {shown(text)!r}"
            )
        return Place("", str(Path(path).absolute()))
    if scheme not in _REMOTE:
        raise UserError(
            f"{key} must be a path, or a URI of s3://, gs:// or file://, got {shown(text)!r}"
        )
    scheme = _REMOTE[scheme]
    path, options = rest, ""
    with_options = re.fullmatch(r"(.*?)\?(\w+=[^?]*)", rest, re.DOTALL)
    if with_options:  # a ? without a key after it is a wildcard
        path, options = with_options.groups()
    bucket = path.partition("/")[0]
    user = ""
    if "@" in bucket:
        user, _, bucket = bucket.rpartition("@")
        path = path[len(user) + 1 :]
    secret = re.search(r"(\w*(?:key|secret|token|password)\w*)=", options, re.IGNORECASE)
    if secret or user not in ("", "anonymous" if scheme == "gs" else ""):
        raise UserError(
            f"{key} must hold no credentials: configs are kept and shown. Take them out of {shown(text)!r}, and "
            f"{_CREDENTIALS[scheme]}"
        )
    if not bucket:
        raise UserError(f"{key} must name a bucket, {scheme}://<bucket>/…, got {shown(text)!r}")
    return Place(scheme, path.rstrip("/"), options, user)


def shown(text: str) -> str:
    """A URI without what may be a secret: user, password and query."""
    return re.sub(r"(?s)\?\w+=.*$", "", re.sub(r"^(\w[\w+.-]*://)[^/@]*@", r"\1", text))


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, bucket: str, options: str, user: str) -> Any:
    import pyarrow.fs

    if scheme == "gs" and "retry_limit_seconds=" not in options:
        # by itself it would try for 15 minutes
        options += f"{'&' if options else ''}retry_limit_seconds=10"
    uri = f"{scheme}://{user}{'@' if user else ''}{bucket}{'?' if options else ''}{options}"
    return pyarrow.fs.FileSystem.from_uri(uri)[0]


@contextmanager
def explained(place: Place, key: str) -> Iterator[None]:
    """Say in one line why a file system does not give what it was asked for. Raises UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{key} must be readable, but {str(place)!r} {_why(place, error)}"
        ) from None


def _why(place: Place, error: Exception) -> str:
    text = " ".join(str(error).split())
    lower = text.lower()

    def said(*words: str) -> bool:
        return any(word in lower for word in words)

    if isinstance(error, FileNotFoundError) and not said("bucket"):
        return "does not exist; check the path"
    if said("no_such_bucket", "bucket does not exist", "bucket not found"):
        return (
            "is in a bucket that does not exist; check its name, the region and endpoint_override"
        )
    if said("network_connection", "curl", "resolve host", "unavailable", "timed out", "timeout"):
        return "cannot be reached; check the network, the region and endpoint_override"
    if said("access_denied", "forbidden", "403", "401", "credential", "access key", "access_key"):
        return f"refuses access; {_CREDENTIALS.get(place.scheme, 'check the permissions')}"
    if said("signature", "oauth", "permission", "token"):
        return f"refuses access; {_CREDENTIALS.get(place.scheme, 'check the permissions')}"
    if isinstance(error, OSError) and error.strerror:
        return f"is not: {error.strerror}"
    return f"is not: {text[:300]}"


def at_once(action: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """`action` of every item, several at a time: for requests, which wait for their answers."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="requests") as pool:
        return list(pool.map(action, items))


# ------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Files:
    """Reads entries that are files: `entry.place` (a Place, or a URL of http) or else its path below `base`."""

    base: Place

    def waits(self, place: Any) -> bool:
        """Whether reading takes a request, so that several at a time are faster."""
        return not (place or self.base).local if not isinstance(place, str) else True

    def read(self, entry: Entry) -> bytes:
        """Raises OSError, BadImage, and UserError where the file is no longer what was listed."""
        place = entry.place or self.base.join(entry.path)
        if isinstance(place, str):
            return _download(place)
        with place.open() as file:
            if place.local:
                info = os.fstat(file.fileno())
                regular = stat.S_ISREG(info.st_mode)
                same = regular and (info.st_size, info.st_mtime_ns) == (entry.size, entry.mtime_ns)
            else:
                same = same_object(file, (entry.size, entry.mtime_ns))
            if not same:
                raise changed(place)
            return file.read()


def same_object(file: Any, expected: Stat) -> bool:
    """Whether an object that was opened is the one that was listed."""
    if file.size() != expected[0]:
        return False
    modified = (file.metadata() or {}).get(b"Last-Modified", b"")
    with suppress(ValueError):  # not every store says when
        return int(datetime.fromisoformat(modified.decode()).timestamp()) == expected[1] // 10**9
    return True


def changed(place: Place) -> UserError:
    return UserError(
        f"data.root must not change while it is prepared, but {str(place)!r} did; start the same command again"
    )


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "potstill"})
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as answer:
            content = answer.read(MAX_HTTP_BYTES + 1)
    except ValueError as error:
        raise OSError(f"no valid URL: {error}") from None
    if len(content) > MAX_HTTP_BYTES:
        raise BadImage("over the pixel limit", f"more than {MAX_HTTP_BYTES >> 20} MB")
    return content


class Spans:
    """Reads entries that lie within larger files: `entry.place` is (which file, offset), `entry.size` the length."""

    def __init__(self, files: Sequence[tuple[Place, Stat]]) -> None:
        self.files = list(files)
        self._open: dict[int, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Spans, (self.files,)

    def waits(self, place: Any) -> bool:
        """Whether reading takes a request."""
        return not self.files[place[0]][0].local

    def read(self, entry: Entry) -> bytes:
        """Raises OSError, and UserError where the file is no longer what was listed."""
        number, offset = entry.place
        place, expected = self.files[number]
        if not place.local:
            if number not in self._open:  # opening takes a request
                file = place.open()
                if not same_object(file, expected):
                    raise changed(place)
                self._open[number] = file
            return self._open[number].read_at(entry.size, offset)
        with place.open() as file:
            info = os.fstat(file.fileno())
            if (info.st_size, info.st_mtime_ns) != expected:
                raise changed(place)
            return os.pread(file.fileno(), entry.size, offset)


# ---------------------------------------------------------------------------------------- patterns
def find_files(
    text: str | None, suffixes: tuple[str, ...], what: str
) -> tuple[Place, list[tuple[Place, Stat]]]:
    """The files of a data.root that is a file, a folder, a glob or a brace pattern (`train-{000..099}.tar`).

    Returns the folder that is named, or that they have in common, and the files in the order of their paths.
    Raises UserError.
    """
    if text is None:
        raise UserError(
            f"data.root must name {what}, got null; set data.root=<file, folder or pattern>"
        )
    found: dict[Place, Stat] = {}
    missing = []
    whole = locate(text, "data.root")
    # a folder may have braces in its name
    exact = whole.local and os.path.exists(whole.path)
    for each in [whole] if exact else [locate(t, "data.root") for t in _braces(text)]:
        with explained(each, "data.root"):
            if not exact and re.search(r"[*?\[]", each.path):
                found.update(_glob(each))
            elif (about := each.stat()) is not None:
                found[each] = about
            elif each.is_folder():
                found.update((p, s) for p, s in _below(each) if p.name.endswith(suffixes))
            else:
                missing.append(each)
    if missing:
        many = f" and {len(missing) - 1} more that it names" if len(missing) > 1 else ""
        raise UserError(
            f"data.root must name {what}, got {shown(text)!r}, but {str(missing[0])!r}{many} does not exist; check the path"
        )
    if not found:
        raise UserError(
            f"data.root must name {what}, got {shown(text)!r}, which holds none ({', '.join(suffixes)}); check the path"
        )
    files = sorted(found.items(), key=lambda item: item[0].path)
    if whole not in found and all(f.path.startswith(f"{whole.path}/") for f, _ in files):
        return whole, files
    common = os.path.commonpath([f.parent.path for f, _ in files])
    return replace(files[0][0], path=common), files


def _braces(text: str) -> list[str]:
    """`a-{00..02}.{x,y}` -> a-00.x, a-00.y, a-01.x …, as a shell expands it."""
    found = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", text)
    if not found:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        low, high = int(span[1]), int(span[2])
        if low > high or high - low >= 10**6:
            raise UserError(
                f"data.root: a range must go up, and name less than a million files, got {found[0]!r}"
            )
        width = max(map(len, span.groups())) if span[1].startswith("0") else 0
        choices = [f"{n:0{width}d}" for n in range(low, high + 1)]
    else:
        choices = found[1].split(",")
    before, after = text[: found.start()], text[found.end() :]
    # the innermost came first, so what it stood in may be the same several times
    texts = (t for choice in choices for t in _braces(f"{before}{choice}{after}"))
    return list(dict.fromkeys(texts))


def _glob(pattern: Place) -> Iterator[tuple[Place, Stat]]:
    if pattern.local:
        import glob

        for path in glob.glob(pattern.path, recursive=True):
            place = replace(pattern, path=path)
            if (about := place.stat()) is not None:
                yield place, about
        return
    import fnmatch

    fixed = re.split(r"[*?\[]", pattern.path, maxsplit=1)[0].rpartition("/")[0]
    folder = replace(pattern, path=fixed)
    deep = "/" in pattern.path[len(fixed) + 1 :]
    for inner, about in folder.files(recursive=deep):
        place = folder.join(inner)
        if fnmatch.fnmatchcase(place.path, pattern.path):
            yield place, about


def _below(folder: Place) -> Iterator[tuple[Place, Stat]]:
    if not folder.local:
        for inner, about in folder.files(recursive=True):
            yield folder.join(inner), about
        return
    for path, folders, names in os.walk(folder.path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            place = replace(folder, path=f"{path}/{name}")
            if not name.startswith(".") and (about := place.stat()) is not None:
                yield place, about
