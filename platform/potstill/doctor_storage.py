"""What the doctor looks at in storage: folders and buckets of runs and caches, and Aim's repository."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from potstill.doctor_findings import (
    FAIL,
    FEW_INODES,
    SYNC,
    WARN,
    At,
    Finding,
    Options,
    Problem,
    Steps,
    gigabytes,
    judged,
    several,
)

NEED_GB = {"runs": 5.0, "cache": 10.0, "local-cache": 10.0}
SPEED_BYTES, SPEED_S, SLOW_MB_PER_S = 64 << 20, 3.0, 20.0


# --------------------------------------------------------------------------------------------- storage
NETWORK = {
    *(
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "9p",
        "virtiofs",
        "lustre",
        "ceph",
        "beegfs",
        "gpfs",
        "wekafs",
    ),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph"),
}
IN_MEMORY = {"tmpfs", "ramfs"}
BUCKETS = re.compile(r"fuse\.(s3fs|gcsfuse|goofys|rclone|mount-s3|geesefs|juicefs|blobfuse2?)$")


def runs(options: Options) -> Steps:
    yield from _storage("runs", options.runs, options)


def cache(options: Options) -> Steps:
    yield from _storage("cache", options.cache, options)


def local_cache(options: Options) -> Steps:
    from potstill.storage import copies_dir, local_folder

    if not options.local_cache and not options.node:
        return
    # without one, this is where handover.py keeps what this node was sent
    text = options.local_cache
    folder = local_folder(text, "--local-cache") if text else copies_dir()
    yield At("local-cache", f"looking at {folder}")
    yield _folder("local-cache", folder, options)


def _storage(name: str, text: str, options: Options) -> Steps:
    from potstill.storage import is_uri, local_folder

    folder = local_folder(text, f"--{name}")
    if is_uri(text):
        from potstill.data.files import locate

        place = locate(text, f"--{name}")
        if not place.local:
            hint = "check the network, the region and endpoint_override"
            yield At(name, f"asking {place}", hint)
            if options.wants(name):
                yield _bucket(name, place)
            name = f"{name}-copy"
    if options.wants(name):
        yield At(name, f"looking at {folder}")
        yield _folder(name, folder, options)


def _bucket(name: str, place: Any) -> Finding:
    began, doing = time.monotonic(), "opening it"
    try:
        filesystem = place.filesystem()
        for doing in put_and_get(filesystem, place.path, uuid.uuid4().hex):  # noqa: B007
            pass
    except (OSError, ValueError) as error:
        said, remedy = why_not(place, doing, error)
        return judged(name, "", [(FAIL, said, remedy)])
    took_s = time.monotonic() - began
    values = {"place": str(place), "seconds": round(took_s, 2)}
    said = f"{place}: an object was put, listed, read and deleted in {took_s:.1f} s"
    problems: list[Problem] = []
    if took_s > 10:
        remedy = "use a bucket in the region of the machines"
        problems.append((WARN, "that is slow", remedy))
    return judged(name, said, problems, values)


def why_not(place: Any, doing: str, error: Exception) -> tuple[str, str]:
    """What is wrong with a place in an object store, and the remedy."""
    from potstill.data.files import explained
    from potstill.errors import UserError

    if "skewed" in str(error).lower():
        said = f"{str(place)!r} refuses requests, as the clock here is too far from its own"
        return said, "let chrony or systemd-timesyncd set the clock (timedatectl)"
    try:
        with explained(place, "it"):
            raise error
    except UserError as explanation:
        said, _, remedy = str(explanation).partition(", but ")[2].partition("; ")
        return f"{said}, when {doing}", remedy or "check bucket, region and rights"


def put_and_get(filesystem: Any, folder: str, token: str) -> Iterator[str]:
    """What is asked of an object store, each step named before it is taken. Raises OSError, and ValueError where it
    lies."""
    import pyarrow.fs

    path = f"{folder.rstrip('/')}/.potstill-doctor-{token}"
    yield "putting an object"
    with filesystem.open_output_stream(path) as sink:
        sink.write(token.encode())
    try:
        yield "listing what is there"
        selector = pyarrow.fs.FileSelector(path.rpartition("/")[0])
        listed = [info.path for info in filesystem.get_file_info(selector)]
        yield "reading the object"
        with filesystem.open_input_stream(path) as source:
            content = source.read().decode()
        if content != token or path not in listed:
            raise ValueError("does not return what was put there")
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_file(path)
        raise
    yield "deleting the object"
    filesystem.delete_file(path)


def _folder(name: str, folder: Path, options: Options) -> Finding:
    """Everything that is asked of a folder of ours: to be made, written, synced, renamed, locked, mapped."""
    kind = name.removesuffix("-copy")
    key = {"runs": "runs.dir", "cache": "cache.dir", "local-cache": "cache.local_dir"}[kind]
    base = _standing(folder)
    values: dict[str, Any] = {"folder": str(folder), "exists": folder.is_dir()}
    if not base.is_dir():
        link = base.is_symlink() and not base.exists()
        said = f"{base} is {'a link to nothing' if link else 'a file'}, not a folder"
        return judged(
            name, "", [(FAIL, said, f"move it away, or set {key} to another folder")], values
        )
    about = os.statvfs(base)
    total, free = about.f_blocks * about.f_frsize, about.f_bavail * about.f_frsize
    mount, fs_kind = _mount_of(base)
    problems = _writable(base, key, kind, mount)
    wanted = options.need_gb if options.need_gb is not None else NEED_GB[kind]
    if free < wanted * 1e9:
        remedy = f"make room there, set {key} to a larger disk, or --need-gb to what the run takes"
        if kind != "runs":
            remedy += (
                f" (uv run jobs/prepare.py --evict lru {key}={_quoted(folder)} frees old sets)"
            )
        problems.append((FAIL, f"less than the {wanted:g} GB that are asked for", remedy))
    if about.f_files and about.f_favail < FEW_INODES:
        said = f"room for {about.f_favail:,} more files only"
        problems.append((WARN, said, "remove what has many small files there (df -i)"))
    problems += _kind_of_disk(kind, key, fs_kind, mount)
    speed = None
    if not any(p[0] == FAIL for p in problems) and free > 4 * SPEED_BYTES:
        speed, problem = _speed(base, key, mount)
        problems += problem
    values |= {"free_bytes": free, "total_bytes": total, "file_system": fs_kind, "mount": mount}
    values["write_mb_per_s"] = None if speed is None else round(speed)
    where = str(folder) if folder == base else f"{folder} (to be made)"
    written = f", {speed:,.0f} MB/s" if speed else ""
    return judged(name, f"{where}: {gigabytes(free)} free, {fs_kind}{written}", problems, values)


def _standing(folder: Path) -> Path:
    """The folder, or what stands on the way to it."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _mount_of(folder: Path) -> tuple[str, str]:
    """Mount point and kind of file system."""
    real = os.path.realpath(folder)
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
        # of several on one point the last one counts
        if len(point) >= len(best) and (real + "/").startswith(point.rstrip("/") + "/"):
            best, kind = point, after.split()[0]
    return best, kind


def _kind_of_disk(kind: str, key: str, fs_kind: str, mount: str) -> list[Problem]:
    if fs_kind in IN_MEMORY:
        said = f"{mount} is in memory: it takes what training needs, and is gone after a restart"
        return [(WARN, said, f"set {key} to a folder on a disk")]
    if BUCKETS.match(fs_kind):
        said = f"{mount} is a bucket behind a mount, which renames by copying"
        return [(WARN, said, f"set {key} to its URI (s3://…, gs://…)")]
    if fs_kind == "overlay" and kind == "runs":
        said = "it lies in the container and goes with it"
        return [(WARN, said, "mount a volume there, or set runs.dir to a URI (s3://…, gs://…)")]
    return []


def _writable(base: Path, key: str, kind: str, mount: str) -> list[Problem]:
    scratch = base / f".potstill-doctor-{uuid.uuid4().hex[:12]}"
    doing = "a folder cannot be made"
    try:
        try:
            scratch.mkdir()
            doing = "a file cannot be written"
            token = os.urandom(4096)
            with open(scratch / "a", "wb") as file:
                file.write(token)
                file.flush()
                os.fsync(file.fileno())
            doing = "a file cannot be renamed"
            (scratch / "b").write_bytes(b"")
            os.replace(scratch / "a", scratch / "b")
            doing = "a folder cannot be synced"
            handle = os.open(scratch, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            doing = "what was written cannot be read"
            if (scratch / "b").read_bytes() != token:
                said = "what was written is not what is read"
                return [
                    (FAIL, said, f"have the disk at {mount} looked after; set {key} to another")
                ]
            doing = "files cannot be locked"
            if not _locks(scratch / "b"):
                said = "locks are not kept there: two processes could write one run"
                remedy = f"mount it with locks (NFS 4, not nolock), or set {key} to a disk of this machine"
                return [(FAIL, said, remedy)]
            if kind != "runs":
                doing = "files cannot be mapped into memory"
                _map(scratch / "b")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        return [(FAIL, f"{doing} ({error.strerror})", _remedy_for(error, base, key, mount))]
    return []


def _remedy_for(error: OSError, base: Path, key: str, mount: str) -> str:
    if error.errno == errno.EROFS:
        return f"mount {mount} for writing (mount -o remount,rw {mount}), or set {key} to another folder"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"chown or chmod {base} so that this account may write there, or set {key} to another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"make room at {mount} (df -h, df -i, quota), or set {key} to another disk"
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENODEV):
        return (
            f"mount {mount} with locks (NFS 4, not nolock), or set {key} to a disk of this machine"
        )
    return f"look after the disk at {mount} (dmesg), or set {key} to another folder"


def _locks(path: Path) -> bool:
    """Whether a second lock of the same file is refused, as runs.lock relies on."""
    with open(path, "rb+") as one, open(path, "rb+") as other:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _map(path: Path) -> None:
    import mmap

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        bytes(mapped[:1])


def _speed(base: Path, key: str, mount: str) -> tuple[float, list[Problem]]:
    """How fast a large file reaches the disk, in MB/s."""
    path = base / f".potstill-doctor-{uuid.uuid4().hex[:12]}"
    block = os.urandom(4 << 20)
    written = 0
    try:
        with open(path, "wb", buffering=0) as file:
            began = time.monotonic()
            while written < SPEED_BYTES and time.monotonic() - began < SPEED_S:
                written += file.write(block)
                os.fsync(file.fileno())
            speed = written / 1e6 / max(time.monotonic() - began, 1e-6)
    except OSError as error:
        said = f"a large file cannot be written ({error.strerror})"
        return 0.0, [(FAIL, said, _remedy_for(error, base, key, mount))]
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    if speed < SLOW_MB_PER_S:
        remedy = f"set {key} to a faster disk"
        return speed, [(WARN, f"writing is slow ({speed:.1f} MB/s)", remedy)]
    return speed, []


# --------------------------------------------------------------------------------------------- tracking
def aim(options: Options) -> Steps:
    from potstill.aim_health import CORRUPT, NAME, OUTDATED, UNINDEXED, examine
    from potstill.storage import local_folder

    runs_dir = local_folder(options.runs, "--runs")
    repo = local_folder(options.repo, "--repo") if options.repo else runs_dir
    yield At("aim", f"looking through {repo / NAME}")
    health = examine(repo, 120.0)
    at = health.repo / NAME
    values: dict[str, Any] = {"repo": str(repo), "aim": health.aim, "format": health.format}
    values["runs"] = len(health.runs)
    if health.aim is None:
        remedy = f"{SYNC} (Aim has wheels for Python up to 3.12), or tracking=none"
        yield judged(
            "aim", "", [(WARN, "Aim is not installed: runs are not shown in it", remedy)], values
        )
        return
    how = f"move {at} away, and fill a new one from the journals (jobs/report.py from_run=… tracking=aim)"
    if health.error:
        slow = health.error.startswith("it did not") and health.runs
        remedy = "" if slow else health.remedy or how
        said = f"Aim {health.aim}: {at}: {health.error}"
        problem = (WARN if slow else FAIL, said, remedy)
        yield judged("aim", f"{len(health.runs)} runs read" if slow else "", [problem], values)
        if not slow:
            return
        # of the rest nothing is known but what has been seen to be broken
        if broken := [r.hash for r in health.having(CORRUPT)]:
            known = _told(runs_dir, repo)
            yield _broken_runs(health, broken, {h: f for f, h in known.items() if h}, repo)
        return
    elif not health.exists:
        yield judged("aim", f"Aim {health.aim}; {at} will be made by the first run", [], values)
        return
    else:
        took = f"{several(len(health.runs), 'run')} read in {health.seconds:.0f} s"
        problems: list[Problem] = []
        if denied := _denied(at):
            remedy = f"sudo chown -R $(id -un) {_quoted(at)}, or mount it for writing"
            problems.append((FAIL, f"this account may not write {denied}", remedy))
        _, fs_kind = _mount_of(at)
        if fs_kind in NETWORK or BUCKETS.match(fs_kind):
            said = f"it lies on {fs_kind}, and its databases want a disk of this machine"
            problems.append((WARN, said, "set tracking.repo to a folder on a local disk"))
        yield judged(
            "aim", f"Aim {health.aim}, format {health.format}, {at}: {took}", problems, values
        )
    yield At("aim-runs", "reading aim.json of the runs")
    known = _told(runs_dir, repo)
    folders = {run_hash: folder for folder, run_hash in known.items() if run_hash}
    yield _broken_runs(health, [r.hash for r in health.having(CORRUPT)], folders, repo)
    yield _index(health, [r.hash for r in health.having(UNINDEXED, OUTDATED)], repo)
    yield _missing_runs(health, known, repo)
    yield _left_open(health, folders, repo)


def _denied(repository: Path) -> Path | None:
    """What of it a run would write to and may not, as what another account has made."""
    inner = (
        "",
        "meta",
        "meta/chunks",
        "meta/index",
        "meta/progress",
        "seqs",
        "seqs/chunks",
        "locks",
    )
    places = [repository / name for name in (*inner, "run_metadata.sqlite")]
    return next((p for p in places if p.exists() and not os.access(p, os.W_OK)), None)


def _named(folder: Path | None, run_hash: str, health: Any) -> str:
    name = folder.name if folder else getattr(health.runs.get(run_hash), "name", None)
    return f"{name} ({run_hash})" if name else run_hash


def _quoted(path: Path | str) -> str:
    """As a shell takes it for one word."""
    return shlex.quote(str(path))


def _again(folder: Path, repo: Path) -> str:
    """The command that tells Aim a run, or a search, from its journal."""
    if (folder / "search.json").exists():
        call = f"fill(Path({str(folder)!r}), Path({str(repo)!r}))"
        return f"uv run python -c {_quoted(f'from potstill.tracking import *; {call}')}"
    keys = f"from_run={_quoted(folder)} tracking=aim tracking.repo={_quoted(repo)}"
    return f"uv run jobs/report.py {keys}"


def _broken_runs(
    health: Any, broken: list[str], folders: Mapping[str, Path], repo: Path
) -> Finding:
    problems: list[Problem] = []
    for run_hash in broken[:5]:
        folder = folders.get(run_hash)
        parts = (repo / ".aim" / part / "chunks" / run_hash for part in ("meta", "seqs"))
        remove = f"rm -rf {' '.join(map(_quoted, parts))}"
        remedy = f"{remove} && {_again(folder, repo)}" if folder else remove
        error = health.runs[run_hash].error
        problems.append(
            (FAIL, f"{_named(folder, run_hash, health)} cannot be read: {error}", remedy)
        )
    if len(broken) > 5:
        problems.append((FAIL, f"{len(broken) - 5} further ones", ""))
    fine = "" if broken else "every run's database was read to its end"
    return judged("aim-runs", fine, problems, {"broken": broken})


def _index(health: Any, behind: list[str], repo: Path) -> Finding:
    explorer = "open it by jobs/explore.py, which indexes first"
    remedy = f"{explorer}, or uv run aim storage --repo {_quoted(repo)} reindex -y"
    problems: list[Problem] = []
    values = {"behind": behind, "error": health.index_error}
    if health.index_error == "missing" and health.runs:
        problems.append((WARN, "there is no index: a query finds nothing", remedy))
    elif health.index_error and health.runs:
        problems.append((FAIL, f"the index is damaged: {health.index_error}", remedy))
    elif behind:
        some = ", ".join(_named(None, each, health) for each in behind[:3])
        more = ", …" if len(behind) > 3 else ""
        said = f"{len(behind)} of {several(len(health.runs), 'run')} are not in the index as they are: {some}{more}"
        problems.append((WARN, said, remedy))
    fine = "" if problems else f"{several(len(health.runs), 'run')} indexed"
    return judged("aim-index", fine, problems, values)


def _told(runs_dir: Path, repo: Path) -> dict[Path, str | None]:
    """Folders of runs and searches that Aim was told of in this repository, with their hashes, and of those that it
    should have been told of (None)."""
    found: dict[Path, str | None] = {}
    places = [*runs_dir.glob("*/config.yaml"), *runs_dir.glob("*/trials/*/config.yaml")]
    for config in sorted(places):
        folder = config.parent
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads((folder / "aim.json").read_text())
            if os.path.realpath(known["repo"]) == os.path.realpath(repo):
                found[folder] = known["run"]
            continue
        with contextlib.suppress(OSError):
            text = config.read_text()
            tracked = re.search(r"^tracking:\n  name: aim\n  repo: (.*)$", text, re.MULTILINE)
            here = tracked and tracked[1] == "null" and runs_dir == repo
            if here and (folder / "summary.json").exists():
                found[folder] = None
    return found


def _missing_runs(health: Any, known: Mapping[Path, str | None], repo: Path) -> Finding:
    missing = [f for f, h in known.items() if h not in health.runs or health.runs[h].name is None]
    problems: list[Problem] = []
    for folder in missing[:3]:
        said = f"Aim does not have {folder.name}"
        problems.append((WARN, said, _again(folder, repo)))
    if len(missing) > 3:
        problems.append((WARN, f"nor {len(missing) - 3} others", ""))
    fine = (
        f"{several(len(known), 'run')} that Aim was told of: all there"
        if known
        else "no run here was tracked"
    )
    values = {"missing": [str(folder) for folder in missing]}
    return judged("aim-journals", "" if missing else fine, problems, values)


def _left_open(health: Any, folders: Mapping[str, Path], repo: Path) -> Finding:
    problems: list[Problem] = []
    left = [r.hash for r in health.runs.values() if r.abandoned]
    writing = sum(r.writing for r in health.runs.values())
    for run_hash in left[:3]:
        folder = folders.get(run_hash)
        remedy = (
            f"start its command again, or {_again(folder, repo)}"
            if folder
            else f"uv run aim runs --repo {_quoted(repo)} close {run_hash} --yes"
        )
        said = f"{_named(folder, run_hash, health)} was left open by a process that died: it is shown as running"
        problems.append((WARN, said, remedy))
    if len(left) > 3:
        problems.append((WARN, f"and {len(left) - 3} others", ""))
    others = [name for name in health.stale_locks if not any(h in name for h in left)]
    for name in others:
        said = f"{name} is the lock of a process that died"
        problems.append((WARN, said, f"rm {_quoted(repo / '.aim' / name)}"))
    values = {"left_open": left, "stale_locks": list(health.stale_locks), "writing": writing}
    fine = f"{several(writing, 'run')} being written, none left open"
    return judged("aim-locks", "" if problems else fine, problems, values)
