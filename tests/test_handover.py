"""What nodes without common storage hand each other. The desk is a real actor; the other node is this one, looked at as one."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potstill import handover, runs, storage
from potstill.config import compose
from potstill.data.cache import open_cache
from potstill.data.prepare import prepare
from potstill.errors import RunFailed, UserError
from potstill.handover import Desk, FarFolder, Mark, fetched, fetched_set, made, marked, open_desk


@pytest.fixture(scope="module")
def desk(ray_session):
    import ray

    actor = open_desk(Desk)
    yield actor
    ray.kill(actor)


@pytest.fixture
def node(tmp_path, monkeypatch):
    """The folder of this node's copies."""
    monkeypatch.setenv("POTSTILL_HOME", str(tmp_path / "node"))
    return storage.copies_dir()


def forget(copy: Path) -> None:
    """As if the process that has fetched it had ended."""
    os.close(handover._in_use.pop(copy.parent))


def killed(code: str) -> None:
    """Let a process run `code` until it says so, and kill it then."""
    command = [sys.executable, "-c", f"{code}\nprint(flush=True); import time; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        process.kill()


def test_a_mark_is_seen_where_the_folder_is_and_gone_after(tmp_path):
    with marked(tmp_path) as mark:
        assert mark.seen()
        assert not Mark(str(tmp_path / "elsewhere"), mark.name).seen()
        with marked(tmp_path):
            assert mark.seen(), "it is another one's"
    assert not mark.seen()
    assert not list(tmp_path.iterdir())


def test_the_mark_of_a_driver_that_was_killed_goes_with_the_next_one(tmp_path):
    killed(
        "from pathlib import Path; from potstill import handover\n"
        f"seen = handover.marked(Path({str(tmp_path)!r})); seen.__enter__()"
    )
    (left,) = tmp_path.iterdir()
    with marked(tmp_path):
        assert not left.exists()


def test_files_and_folders_come_whole_and_once(desk, node, tmp_path):
    source = tmp_path / "run"
    content = {
        "config.yaml": b"a: 1",
        "checkpoints/step-1/model": os.urandom(40 << 20),
        "empty": b"",
    }
    for name, data in content.items():
        runs.atomic_write(source / name, data)
    runs.atomic_write(source / ".hidden", b"no")
    copy = fetched(desk, str(source))
    assert copy.name == "run"
    assert copy.is_relative_to(node)
    there = {f.relative_to(copy).as_posix(): f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    assert there == content
    inode = (copy / "config.yaml").stat().st_ino
    assert fetched(desk, str(source)) == copy
    assert (copy / "config.yaml").stat().st_ino == inode, "it was there"
    alone = fetched(desk, str(source / "config.yaml"))
    assert (alone.name, alone.read_bytes()) == ("config.yaml", b"a: 1")


def test_what_has_changed_is_fetched_again_and_what_is_old_goes(desk, node, tmp_path):
    source = tmp_path / "weights"
    source.write_bytes(b"one")
    first = fetched(desk, str(source))
    source.write_bytes(b"two!")
    os.utime(first.parent, (0, time.time() - 2 * handover.KEPT_S))
    forget(first)
    assert fetched(desk, str(source)).read_bytes() == b"two!"
    assert not first.exists()


def test_a_copy_stays_as_long_as_a_process_reads_from_it(desk, node, tmp_path):
    """Soft labels are opened shard by shard, for weeks perhaps."""
    (source := tmp_path / "weights").write_bytes(b"one")
    first = fetched(desk, str(source))
    os.utime(first.parent, (0, time.time() - 2 * handover.KEPT_S))
    source.write_bytes(b"other")
    second = fetched(desk, str(source))
    assert first.read_bytes() == b"one"
    assert {f.name for f in node.iterdir()} == {first.parent.name, second.parent.name}, "no more"


class Meddled:
    """A desk of whose files something is done before they are read."""

    def __init__(self, desk, meddle) -> None:
        self.files, self.read, self._desk, self._meddle = desk.files, self, desk, meddle

    def remote(self, path: str, start: int):
        self._meddle(Path(path))
        return self._desk.read.remote(path, start)


def test_what_changes_while_it_is_copied_is_listed_again(desk, node, tmp_path):
    """A run that goes on removes checkpoints, and writes others."""
    source = tmp_path / "run"
    for name in ("a", "step-1", "step-2"):
        runs.atomic_write(source / name, name)

    def prune(path: Path) -> None:
        if (source / "step-1").exists():
            (source / "step-1").rename(source / "step-3")

    copy = fetched(Meddled(desk, prune), str(source))
    assert sorted(f.name for f in copy.iterdir()) == ["a", "step-2", "step-3"]
    runs.atomic_write(source / "a", "b")

    def rewrite(path: Path) -> None:  # as long as before
        runs.atomic_write(path, b"%03d" % (time.monotonic_ns() % 1000))

    with pytest.raises(UserError, match=r"run must not change while it is copied to .* 3 times"):
        fetched(Meddled(desk, rewrite), str(source))
    assert {f.name for f in node.iterdir()} == {copy.parent.name}, "nothing is left of it"


def test_a_full_disk_is_said_and_nothing_is_left(desk, node, tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (source := tmp_path / "weights").write_bytes(b"x" * 2_500_000)
    refused = r"^POTSTILL_HOME must have room for a copy of .*weights \(2\.5 MB\) .* \(No space left on device\); free"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=refused):
            fetched(desk, str(source))
        with pytest.raises(UserError, match=r"room for what is made for nowhere .*No space left"):
            made(Mark("nowhere", ".seen"), lambda folder: runs.atomic_write(folder / "a", "b"))
    assert list(node.iterdir()) == []

    first = fetched(desk, str(source))
    source.write_bytes(b"y" * 2_500_000)
    second = fetched(desk, str(source))
    (third := tmp_path / "other").write_bytes(b"z")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    forget(first)
    with pytest.raises(UserError, match=r"a copy of .*other .* got 0\.0 MB free at"):
        fetched(desk, str(third))
    assert not first.exists(), "nobody used it, and its room was wanted"
    assert second.exists()


def test_what_a_killed_process_has_left_goes_with_the_next_copy(desk, node, tmp_path):
    killed(
        "import sys; from potstill.handover import Mark, made\n"
        "made(Mark('nowhere', '.seen'), lambda folder: (folder / 'shard').write_bytes(b'x') and exec("
        "'print(flush=True); import time; time.sleep(600)'))"
    )
    assert list(node.glob("*/shard"))
    (source := tmp_path / "weights").write_bytes(b"one")
    with handover._workplace(node / "fetched-busy") as at_work:
        at_work.mkdir()
        copy = fetched(desk, str(source))
        assert {f.name for f in node.iterdir() if f.is_dir()} == {copy.parent.name, at_work.name}


def test_a_file_is_on_the_disk_before_it_has_its_name(desk, node, tmp_path, monkeypatch, prepared):
    """After a loss of power one that has its length and its name is taken for whole."""
    synced, named = set(), set()

    def fsync(handle: int, real=os.fsync) -> None:
        synced.add(os.fstat(handle).st_ino)
        real(handle)

    def replace(source, target, real=os.replace) -> None:
        if os.stat(source).st_ino in synced:
            named.add(os.stat(source).st_ino)
        real(source, target)

    (tmp_path / "weights").write_bytes(b"one")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    copy = fetched(desk, str(tmp_path / "weights"))
    shards = list(fetched_set(desk, prepared, str(tmp_path / "disk"), None).glob("*.arrow"))
    assert shards
    assert {f.stat().st_ino for f in (copy, *shards)} <= named


def test_what_is_not_there_is_said(desk, node, tmp_path):
    with pytest.raises(UserError, match="must exist on the driver's node"):
        fetched(desk, str(tmp_path / "nowhere"))


@pytest.fixture(scope="module")
def prepared(tiny_tree: Path, tmp_path_factory: pytest.TempPathFactory, ray_session):
    cache = f"cache.dir={tmp_path_factory.mktemp('set')}"
    config = compose("prepare", [f"data.root={tiny_tree}", "data.decode.image_px=24", cache])
    return prepare(config.data, config.cache).cache_dir


def test_a_set_comes_whole_and_is_in_use(desk, node, prepared):
    from potstill.data import store

    copy = fetched_set(desk, prepared, None, None)
    assert copy != prepared
    ours, theirs = (open_cache(folder, verify=True).split("train") for folder in (copy, prepared))
    assert (ours.read(range(5)) == theirs.read(range(5))).all()
    (there,) = store.stored_sets(copy.parent)
    assert there.users, "it must not be evicted meanwhile"
    inode = (copy / "manifest.json").stat().st_ino
    assert fetched_set(desk, prepared, None, None) == copy
    assert (copy / "manifest.json").stat().st_ino == inode


def test_a_set_that_finds_no_room_is_refused(desk, node, prepared):
    with pytest.raises(UserError, match=r"cache\.local_dir must have .* for a copy of the set"):
        fetched_set(desk, prepared, None, 1e-6)


def test_a_set_that_is_damaged_at_its_source_is_refused(desk, node, prepared):
    shard = next(prepared.glob("*.arrow"))
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-9] + b"\0" * 9)
        with pytest.raises(UserError, match=r"is damaged: its SHA-256 does not match"):
            fetched_set(desk, prepared, None, None)
    finally:
        shard.write_bytes(content)
    assert open_cache(fetched_set(desk, prepared, None, None), verify=True)


def test_what_is_made_elsewhere_comes_back_in_order(node, tmp_path):
    def make(folder: Path) -> str:
        runs.atomic_write(folder / "b.json", "last")
        runs.atomic_write(folder / "a.arrow", "first")
        return "done"

    with marked(tmp_path) as mark:
        assert made(mark, make) == ("done", {})
        assert (tmp_path / "b.json").exists()
    result, files = made(mark, make)
    assert (result, list(files)) == ("done", ["a.arrow", "b.json"])
    handover.taken(tmp_path / "taken", files)
    assert (tmp_path / "taken" / "b.json").read_text() == "last"


def test_a_run_is_written_and_read_through_the_desk(desk, node, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    far = FarFolder(desk, run_dir)
    assert far.newest() == (None, [])
    far.append([{"kind": "attempt", "attempt": 1, "step": 0}])
    assert far.last_attempt() == 1
    kept = far.keep(3, {"model.safetensors": b"m", "state.pt": b"s"}, {"epoch_done": True})
    found, _ = far.newest()
    assert found is not None
    assert found.folder == kept.folder
    here = far.bring(found)
    assert here.folder.is_relative_to(node)
    assert (here.folder / "state.pt").read_bytes() == b"s"
    assert far.journal() == runs.read_journal(run_dir)
    (here.folder / "state.pt").write_bytes(b"?")
    again = far.bring(found)
    assert again.folder == here.folder
    assert (again.folder / "state.pt").read_bytes() == b"s", "what was damaged here is fetched anew"
    (kept.folder / "state.pt").write_bytes(b"??")
    with pytest.raises(UserError, match=r"it is damaged \(its SHA-256 does not match\)"):
        far.bring(found)


def test_a_full_disk_of_the_head_is_the_same_message(desk, node, tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(
        RunFailed, match=r"^runs\.dir: the checkpoint of step 3 could not be written"
    ):
        FarFolder(desk, tmp_path).keep(3, {"state.pt": b"s"}, {})


def test_copies_are_kept_where_other_accounts_cannot_write(desk, monkeypatch, tmp_path):
    (source := tmp_path / "weights").write_bytes(b"one")
    for variable in ("POTSTILL_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    copy = fetched(desk, str(source))
    assert copy.parents[1] == storage.copies_dir() == tmp_path / "me" / ".cache" / "potstill"
    assert copy.parents[1].stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "large"))
    assert storage.copies_dir() == tmp_path / "large" / "potstill"


def test_relative_folders_are_below_potstill_home(node, monkeypatch, tmp_path):
    assert storage.local_folder("runs") == tmp_path / "node" / "runs"
    assert storage.local_folder("/data/runs") == Path("/data/runs")
    assert storage.local_folder("file:///data/runs") == Path("/data/runs")
    one, two = (storage.local_folder(f"s3://bucket/{name}") for name in ("a/b", "a-b"))
    assert one != two
    assert one.is_relative_to(node)
    monkeypatch.delenv("POTSTILL_HOME")
    monkeypatch.chdir(tmp_path)
    assert storage.local_folder("runs") == tmp_path / "runs"
    monkeypatch.setenv("POTSTILL_HOME", "~/potstill")
    assert storage.local_folder("runs") == Path.home() / "potstill" / "runs"
    with pytest.raises(UserError, match=r"runs\.dir must be a path, or a URI"):
        storage.local_folder("ftp://somewhere/runs")
