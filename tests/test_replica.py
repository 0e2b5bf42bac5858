"""Runs and sets whose copies lie in an object store: a real S3 server on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from conftest import run_job, s3_bucket, tiny_overrides
from potstill import claim, copies, replica, runs, storage
from potstill.claim import Claim
from potstill.config import Config, compose, load_run_config
from potstill.copies import GoneApart, Replica
from potstill.data.files import Place, locate
from potstill.errors import RunFailed, Stopped, UserError
from potstill.evaluation import evaluate_run
from potstill.fit import fit
from potstill.loop import Training


@pytest.fixture(scope="module")
def bucket():
    """The URI of a bucket; its options stand behind it."""
    with s3_bucket("kept") as options:
        yield lambda inner: f"s3://kept/{inner}?{options}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`machine("one")`: from now on this process is on a machine with an empty disk, or on that one again."""

    def move(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv("POTSTILL_HOME", str(tmp_path / name))
        return tmp_path / name

    return move


@pytest.fixture
def config(tiny_tree: Path, bucket, request: pytest.FixtureRequest, ray_session):
    where = request.node.name.replace("[", "-").replace("]", "")

    def make(*overrides: str) -> Config:
        given = tiny_overrides(tiny_tree, Path("cache"), Path("runs"))
        stores = [f"runs.dir={bucket(where)}", f"cache.dir={bucket(where + '-cache')}"]
        return compose("train", [*given, *stores, "run.name=one", *overrides])

    return make


def objects(uri: str) -> dict[str, bytes]:
    place = locate(uri, "runs.dir")
    return {name: place.join(name).read() for name, _ in place.files(recursive=True)}


def test_a_run_stands_whole_in_the_store(config, machine):
    machine("one")
    chosen = config()
    fit(chosen)
    there = objects(chosen.runs.dir)
    folder = storage.local_folder(chosen.runs.dir) / "one"
    journal = b"".join(v for k, v in sorted(there.items()) if k.startswith("one/journal/"))
    assert journal == (folder / "journal.jsonl").read_bytes()
    for name in ("config.yaml", "run.json", "summary.json", "report.html", "training_history.json"):
        assert there[f"one/{name}"] == (folder / name).read_bytes()
    kept = {f.relative_to(folder.parent).as_posix() for f in folder.glob("checkpoints/*/*")}
    assert {k for k in there if "checkpoints" in k} == kept, "pruned ones are gone there, too"
    assert "one/owner.json" not in there
    assert not [k for k in there if "/." in k]


def test_another_machine_reads_it_and_goes_on_with_it(config, machine, monkeypatch):
    """The first machine is lost in the third epoch; the second one has an empty disk, and reads no image again."""
    machine("whole")
    straight = config("loop.epochs=4")
    straight.runs.dir = "runs"
    fit(straight)
    expected = runs.history(runs.read_journal(storage.local_folder("runs") / "one"))

    machine("one")
    chosen = config("loop.epochs=4")
    lost(chosen, monkeypatch, at_epoch=3)
    machine("two")
    from potstill.data import prepare

    monkeypatch.setattr(prepare, "_build", lambda *_: pytest.fail("the set is in the store"))
    summary = fit(config("loop.epochs=4"))
    assert summary["status"] == "finished"
    folder = storage.local_folder(chosen.runs.dir) / "one"
    records = runs.read_journal(folder)
    begun = [r for r in records if r["kind"] == "attempt"]
    assert [r["attempt"] for r in begun] == [1, 2]
    assert begun[1]["resumed_from"] == runs.checkpoint_name(2 * begun[0]["steps_per_epoch"])
    assert runs.history(records) == expected

    machine("three")
    again = fit(config("loop.epochs=4"))
    assert again == summary, "a finished run is known anywhere"
    uri = chosen.runs.dir.replace("?", "/one?")
    assert runs.open_run(uri, "from_run") == storage.local_folder(chosen.runs.dir) / "one"
    assert runs.best_checkpoint(runs.open_run(uri, "from_run")).model_state()


def lost(config: Config, monkeypatch: pytest.MonkeyPatch, at_epoch: int) -> None:
    """Train until this epoch is about to begin, with all before it in the store."""
    real, seen = Training._train_epoch, []

    def epoch(self: Training) -> None:
        seen.append(1)
        if len(seen) == at_epoch:
            raise Stopped("the machine is gone")
        real(self)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_train_epoch", epoch)
        with pytest.raises(Stopped):
            fit(config)


def test_what_is_unfinished_in_the_store_is_left(bucket, tmp_path):
    source, place = tmp_path / "a" / "one", locate(bucket("unfinished/one"), "runs.dir")
    write(source, "config.yaml", "a: 1")
    for step, names in (("step-1", ("model.safetensors", "meta.json")), ("step-2", ("state.pt",))):
        for name in names:
            write(source, f"checkpoints/{step}/{name}", f"{step} {name}")
    Replica(source, place).push()
    target = tmp_path / "b" / "one"
    assert Replica(target, place).pull()
    assert (target / "checkpoints/step-1/meta.json").read_text() == "step-1 meta.json"
    assert not (target / "checkpoints/step-2").exists()


def write(folder: Path, name: str, content: str) -> None:
    runs.atomic_write(folder / name, content)


def put(place: Place, content: bytes) -> None:
    with place.filesystem().open_output_stream(place.path) as sink:
        sink.write(content)


def checkpoint(folder: Path, step: int, time: float, best: int | None = None, text="") -> None:
    """A checkpoint's files, as `runs` writes them; `time`: when it was written."""
    about = {"step": step, "time": time, "best": {"folder": f"step-{best or step}"}, "text": text}
    write(folder, f"checkpoints/step-{step}/state.pt", text or f"state of {step}")
    write(folder, f"checkpoints/step-{step}/meta.json", json.dumps(about))


def checkpoints(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.glob("checkpoints/step-*"))


def test_the_journal_is_put_in_segments_of_whole_lines(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "SEGMENT_BYTES", 20)
    folder, uri = tmp_path / "one", bucket("segments/one")
    replica = Replica(folder, locate(uri, "runs.dir"))
    write(folder, "journal.jsonl", '{"kind":"a"}\n{"ki')
    replica.push()
    assert objects(uri) == {"journal/00000001.jsonl": b'{"kind":"a"}\n'}
    write(folder, "journal.jsonl", '{"kind":"a"}\n{"kind":"b"}\n')
    Replica(folder, locate(uri, "runs.dir")).push()  # another process goes on
    assert objects(uri) == {"journal/00000001.jsonl": b'{"kind":"a"}\n{"kind":"b"}\n'}
    write(folder, "journal.jsonl", '{"kind":"a"}\n{"kind":"b"}\n{"kind":"c"}\n')
    Replica(folder, locate(uri, "runs.dir")).push()
    assert objects(uri)["journal/00000002.jsonl"] == b'{"kind":"c"}\n', "the first one is full"
    target = tmp_path / "else" / "one"
    Replica(target, locate(uri, "runs.dir")).pull()
    assert (target / "journal.jsonl").read_bytes() == (folder / "journal.jsonl").read_bytes()


def test_a_long_run_has_a_few_segments(bucket, tmp_path, monkeypatch):
    """One is put again as it grows, and only when there is something to go with, or after a while."""
    folder, uri = tmp_path / "one", bucket("long/one")
    replica = Replica(folder, locate(uri, "runs.dir"))
    sent: list[int] = []
    real = Place.filesystem
    monkeypatch.setattr(Place, "filesystem", lambda p: sent.append("journal/" in p.path) or real(p))
    for n in range(50):
        write(folder, "journal.jsonl", "".join(f'{{"n":{i}}}\n' for i in range(n + 1)))
        replica.push(unhurried=True)
    assert sum(sent) == 1, "its first line"
    checkpoint(folder, 7, time=1.0)
    replica.push(unhurried=True)
    assert sum(sent) == 2, "no checkpoint is there before what was told of it"
    write(folder, "journal.jsonl", (folder / "journal.jsonl").read_text() + '{"n":50}\n')
    monkeypatch.setattr(copies, "JOURNAL_S", 0.0)
    replica.push(unhurried=True)
    assert [n for n in objects(uri) if "journal" in n] == ["journal/00000001.jsonl"]
    assert objects(uri)["journal/00000001.jsonl"] == (folder / "journal.jsonl").read_bytes()


def test_a_journal_that_was_begun_anew_is_not_sent(bucket, tmp_path):
    """Such as where the folder was moved away under a training: it would be taken for what follows."""
    folder, uri = tmp_path / "one", bucket("begun/one")
    replica = Replica(folder, locate(uri, "runs.dir"))
    write(folder, "journal.jsonl", '{"n":1}\n')
    replica.push()
    write(folder, "journal.jsonl", '{"n":2}\n{"n":3}\n{"n":4}\n')
    with pytest.raises(UserError, match="not the journal that was sent before"):
        replica.push()
    assert objects(uri)["journal/00000001.jsonl"] == b'{"n":1}\n'


def test_two_histories_are_refused(bucket, tmp_path):
    place = locate(bucket("ways/one"), "runs.dir")
    write(tmp_path / "a" / "one", "journal.jsonl", '{"kind":"a"}\n')
    Replica(tmp_path / "a" / "one", place).push()
    write(tmp_path / "b" / "one", "journal.jsonl", '{"kind":"b"}\n')
    with pytest.raises(UserError, match="have gone different ways"):
        Replica(tmp_path / "b" / "one", place).pull()


def test_the_one_that_is_ahead_counts(bucket, tmp_path):
    """A machine that went on while the store was away is not set back by what the store still has, and one that has been
    overtaken takes over everything: what was removed there, too."""
    place = locate(bucket("ahead/one"), "runs.dir")
    one, two = tmp_path / "1" / "one", tmp_path / "2" / "one"
    write(one, "journal.jsonl", '{"n":1}\n')
    write(one, "summary.json", '"stopped"')
    write(one, "adopt.json", "{}")
    checkpoint(one, 1, time=1.0)
    there = Replica(one, place)
    there.push()
    assert Replica(two, place).pull()

    write(one, "journal.jsonl", '{"n":1}\n{"n":2}\n')
    write(one, "summary.json", '"finished"')
    (one / "adopt.json").unlink()
    shutil.rmtree(one / "checkpoints/step-1")
    checkpoint(one, 2, time=2.0)
    assert Replica(one, place).pull()
    assert (one / "summary.json").read_text() == '"finished"'
    (one / "adopt.json").unlink()  # it was here before: whether it was lost cannot be told
    shutil.rmtree(one / "checkpoints/step-1")
    there.push()
    names = objects(bucket("ahead/one"))
    assert names["summary.json"] == b'"finished"'
    assert not [n for n in names if "adopt" in n or "step-1" in n]

    assert Replica(two, place).pull()
    assert (two / "summary.json").read_text() == '"finished"'
    assert checkpoints(two) == ["step-2"]


def test_what_is_lost_here_is_not_removed_there(bucket, tmp_path):
    """The copy is what is left: somebody has made room on this disk, or a whole folder is gone."""
    place, folder = locate(bucket("lost/one"), "runs.dir"), tmp_path / "one"
    write(folder, "journal.jsonl", '{"n":1}\n')
    write(folder, "config.yaml", "a: 1")
    checkpoint(folder, 1, time=1.0)
    checkpoint(folder, 2, time=2.0)
    running = Replica(folder, place)
    running.push()
    whole = objects(bucket("lost/one"))

    shutil.rmtree(folder / "checkpoints")
    running.push()  # under its feet
    again = Replica(folder, place)
    again.pull()
    assert checkpoints(folder) == ["step-1", "step-2"], "as far as the copy, but not as whole"
    again.push()
    assert objects(bucket("lost/one")) == whole

    shutil.rmtree(folder / "checkpoints/step-2")
    (folder / "config.yaml").unlink()
    write(folder, "journal.jsonl", '{"n":1}\n{"n":2}\n')  # while the store was away
    again = Replica(folder, place)
    again.pull()
    assert checkpoints(folder) == ["step-1", "step-2"], "it would begin anew from an older one"
    assert (folder / "config.yaml").exists()

    write(folder, "checkpoints/step-2/meta.json", "\0\0")
    Replica(folder, place).pull()
    assert runs.read_json(folder / "checkpoints/step-2/meta.json")["step"] == 2, "damaged is lost"

    folder.rename(tmp_path / "elsewhere")
    for keeper in (running, again):
        with pytest.raises(UserError, match="is gone, or empty"):
            keeper.push()
    write(folder, "training_history.json", "{}")  # the training writes on
    with pytest.raises(UserError, match=r"journal\.jsonl is gone"):
        again.push()
    assert whole.keys() <= objects(bucket("lost/one")).keys()
    assert Replica(folder, place).pull()
    assert checkpoints(folder) == ["step-1", "step-2"]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(bucket, tmp_path, monkeypatch):
    place, folder = locate(bucket("unread/one"), "runs.dir"), tmp_path / "one"
    write(folder, "journal.jsonl", '{"n":1}\n')
    checkpoint(folder, 1, time=1.0)
    checkpoint(folder, 2, time=2.0)
    running = Replica(folder, place)
    running.push()
    whole = objects(bucket("unread/one"))
    real = os.scandir

    def fails(path):
        if "step-1" in str(path):
            raise OSError(5, "Input/output error")
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", fails)
        with pytest.raises(OSError, match="Input/output error"):
            running.push()
    assert objects(bucket("unread/one")) == whole


def test_a_course_that_was_given_up_does_not_come_back(bucket, tmp_path):
    """A trial that took over another one's weights goes on from an earlier step; killed before that was sent."""
    place, folder = locate(bucket("course/one"), "runs.dir"), tmp_path / "one"
    write(folder, "journal.jsonl", '{"n":1}\n')
    checkpoint(folder, 9, time=1.0)
    Replica(folder, place).push()
    shutil.rmtree(folder / "checkpoints/step-9")
    checkpoint(folder, 5, time=2.0)
    write(folder, "journal.jsonl", '{"n":1}\n{"n":2}\n')
    again = Replica(folder, place)
    again.pull()
    assert checkpoints(folder) == ["step-5"]
    again.push()
    target = tmp_path / "else" / "one"
    Replica(target, place).pull()
    assert checkpoints(target) == ["step-5"]


def test_a_checkpoint_that_was_written_anew_is_known_by_its_content(bucket, tmp_path, monkeypatch):
    """Its files have the size that they had; sent or fetched in part it would be damaged."""
    place = locate(bucket("anew/one"), "runs.dir")
    one, two = tmp_path / "1" / "one", tmp_path / "2" / "one"
    write(one, "journal.jsonl", '{"n":1}\n')
    checkpoint(one, 1, time=1.0, text="old")
    Replica(one, place).push()
    Replica(two, place).pull()
    checkpoint(one, 1, time=2.0, text="new")
    write(one, "journal.jsonl", '{"n":1}\n{"n":2}\n')
    again = Replica(one, place)  # the first process was killed before it sent that
    again.pull()
    with monkeypatch.context() as patched:  # and so is this one, in the midst of it
        patched.setattr(Replica, "_send", lambda *_: (_ for _ in ()).throw(OSError("cut off")))
        with pytest.raises(OSError, match="cut off"):
            again.push()
    assert "checkpoints/step-1/meta.json" not in objects(bucket("anew/one"))
    again.push()
    Replica(two, place).pull()
    there = objects(bucket("anew/one"))
    for name in ("checkpoints/step-1/state.pt", "checkpoints/step-1/meta.json"):
        assert there[name] == (one / name).read_bytes() == (two / name).read_bytes()
    assert there["checkpoints/step-1/state.pt"] == b"new"


def test_what_is_pruned_while_it_is_fetched(bucket, tmp_path, monkeypatch):
    place = locate(bucket("pruned/one"), "runs.dir")
    one, two = tmp_path / "1" / "one", tmp_path / "2" / "one"
    write(one, "journal.jsonl", '{"n":1}\n')
    checkpoint(one, 1, time=1.0)
    owner = Replica(one, place)
    owner.push()
    real, fetched = Replica._fetch, []

    def fetch(self: Replica, name: str) -> None:
        if not fetched:
            fetched.append(name)
            checkpoint(one, 2, time=2.0)
            shutil.rmtree(one / "checkpoints/step-1")
            owner.push()
        real(self, name)

    monkeypatch.setattr(Replica, "_fetch", fetch)
    assert Replica(two, place).pull()
    assert checkpoints(two) == ["step-2"]


def test_files_go_in_pieces(bucket, tmp_path, monkeypatch):
    """Checkpoints of GBs, many at once, must not stand in memory whole."""
    monkeypatch.setattr(copies, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(copies, "IN_FLIGHT_BYTES", 1 << 18)
    place, folder = locate(bucket("pieces/one"), "runs.dir"), tmp_path / "one"
    content = os.urandom((1 << 20) + 5)
    (folder / "checkpoints/step-1").mkdir(parents=True)
    (folder / "checkpoints/step-1/state.pt").write_bytes(content)
    write(folder, "checkpoints/step-1/meta.json", "{}")
    read, most, since = [], [], [0]

    class Watched:
        def __init__(self, of) -> None:
            self.of = of

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.of.close()

        def __getattr__(self, name: str):
            return getattr(self.of, name)

        def read(self, size: int | None = None):
            read.append(size)
            return self.of.read(size)

        def write(self, chunk: bytes) -> None:
            since[0] += len(chunk)
            most.append(since[0])
            self.of.write(chunk)

        def flush(self) -> None:
            since[0] = 0
            self.of.flush()

    class Store:
        def __init__(self, of) -> None:
            self.of = of

        def __getattr__(self, name: str):
            return getattr(self.of, name)

        def open_output_stream(self, path: str):
            return Watched(self.of.open_output_stream(path))

    real, opened = Place.filesystem, Place.open
    with monkeypatch.context() as patched:
        patched.setattr(Place, "filesystem", lambda p: Store(real(p)))
        Replica(folder, place).push()
    assert max(most) <= (1 << 18) + (1 << 16), "what was written, but is not there yet"
    with monkeypatch.context() as patched:
        patched.setattr(Place, "open", lambda p: Watched(opened(p)))
        Replica(tmp_path / "else" / "one", place)._fetch("checkpoints/step-1/state.pt")
    assert set(read) == {1 << 16}
    assert (tmp_path / "else/one/checkpoints/step-1/state.pt").read_bytes() == content


def test_a_pull_that_is_cut_off_is_made_again(bucket, tmp_path, monkeypatch):
    place = locate(bucket("cut/one"), "runs.dir")
    one, two = tmp_path / "1" / "one", tmp_path / "2" / "one"
    write(one, "journal.jsonl", '{"n":1}\n')
    write(one, "config.yaml", "a: 1")
    Replica(one, place).push()
    with monkeypatch.context() as patched:
        patched.setattr(Replica, "_fetch", lambda *_: (_ for _ in ()).throw(OSError("away")))
        with pytest.raises(OSError, match="away"):
            Replica(two, place).pull()
    Replica(two, place).pull()
    assert (two / "config.yaml").exists()


def claim_of(place: Place, host: str, pid: int, age_s: float = 0.0, **about) -> None:
    known = {"owner": "another", "pid": pid, "host": host, "time": time.time() - age_s, **about}
    put(place.join("owner.json"), json.dumps(known).encode())


def here(**about) -> dict:
    """What tells that a process is one of this machine."""
    return {k: v for k, v in claim.this_process().items() if k in ("boot", "pids")} | about


def test_one_machine_at_a_time(config, machine, monkeypatch, capsys):
    machine("one")
    chosen = config()
    place = locate(chosen.runs.dir, "runs.dir").join("one")
    claim_of(place, socket.gethostname(), os.getppid(), **here())
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        fit(chosen)
    monkeypatch.setattr(claim, "OWNED_S", 3600.0)
    claim_of(place, "elsewhere", 7)
    began = time.monotonic()
    with monkeypatch.context() as patched:  # an hour passes
        ticks = iter(range(10**6))
        patched.setattr(claim.time, "monotonic", lambda: began + 1000 * next(ticks))
        patched.setattr(claim.time, "sleep", lambda _: None)
        with pytest.raises(UserError, match="in use by process 7 on elsewhere"):
            fit(chosen)
    assert "waiting" in capsys.readouterr().out
    monkeypatch.setattr(claim, "RENEW_S", 0.1)
    claim_of(place, "elsewhere", 7, age_s=3700)
    assert fit(chosen)["status"] == "finished", "a machine that is gone holds nothing"


def test_a_process_that_was_killed_holds_nothing(bucket, monkeypatch):
    monkeypatch.setattr(claim, "SETTLE_S", 0.0)
    place = locate(bucket("killed/one"), "runs.dir")
    gone = subprocess.Popen(["true"])
    gone.wait()
    claim_of(place, socket.gethostname(), gone.pid, **here())
    Claim(place, "runs.dir").take()
    claim_of(
        place, socket.gethostname(), os.getppid(), **here(started="7")
    )  # its number is another's now
    mine = Claim(place, "runs.dir")
    mine.take()
    mine.check()


def test_a_number_of_another_machine_says_nothing(bucket, monkeypatch):
    """Host names may be the same, such as those of two containers, and numbers are counted in each anew."""
    monkeypatch.setattr(claim, "OWNED_S", 2.0)
    monkeypatch.setattr(claim, "RENEW_S", 1.0)
    place = locate(bucket("names/one"), "runs.dir")
    gone = subprocess.Popen(["true"])
    gone.wait()
    for other in ({}, here(boot="another"), here(pids=7)):
        claim_of(place, socket.gethostname(), gone.pid, **other)
        began = time.monotonic()
        Claim(place, "runs.dir").take()
        assert time.monotonic() - began > 1.0, "it was waited for"


def test_whose_clock_differs_is_known_by_its_silence(bucket, monkeypatch):
    monkeypatch.setattr(claim, "OWNED_S", 1.0)
    monkeypatch.setattr(claim, "RENEW_S", 0.2)
    place = locate(bucket("clocks/one"), "runs.dir")
    over = threading.Event()

    def live() -> None:
        age_s = 3700.0
        while not over.wait(0.05):
            age_s -= 0.05
            claim_of(place, "elsewhere", 7, age_s=age_s)

    claim_of(place, "elsewhere", 7, age_s=3700)
    behind = threading.Thread(target=live)
    behind.start()
    try:
        with pytest.raises(UserError, match="in use by process 7 on elsewhere"):
            Claim(place, "runs.dir").take()
    finally:
        over.set()
        behind.join()
    for age_s in (3700, -3700):  # by now it is dead, whatever its clock said
        claim_of(place, "elsewhere", 7, age_s=age_s)
        mine = Claim(place, "runs.dir")
        mine.take()
        mine.check()


def test_who_was_overtaken_stops(config, machine, monkeypatch, capsys):
    """This machine was asleep, and another one goes on with the run: two that train it are one too many."""
    machine("one")
    monkeypatch.setattr(claim, "RENEW_S", 0.2)
    chosen = config("loop.epochs=500")
    place = locate(chosen.runs.dir, "runs.dir").join("one")
    real, seen = Training._train_epoch, []

    def epoch(self: Training) -> None:
        seen.append(1)
        if len(seen) > 1:  # again and again: a renewal that has just looked writes over it once
            claim_of(place, "elsewhere", 7)
        real(self)

    monkeypatch.setattr(Training, "_train_epoch", epoch)
    with pytest.raises(RunFailed, match="process 7 on elsewhere has taken over the copy"):
        fit(chosen)
    assert len(seen) < 500
    assert "Saving, then stopping" in capsys.readouterr().out
    folder = storage.local_folder(chosen.runs.dir) / "one"
    assert [r["status"] for r in runs.read_journal(folder) if r["kind"] == "end"] == ["stopped"]
    there = objects(chosen.runs.dir)
    assert "one/summary.json" not in there
    assert json.loads(there["one/owner.json"])["host"] == "elsewhere", "its claim stands"


def test_who_was_overtaken_while_it_prepares(bucket, machine, monkeypatch):
    machine("one")
    monkeypatch.setattr(claim, "RENEW_S", 0.1)
    uri = bucket("prepares")
    place = locate(uri, "runs.dir").join("one")

    def prepare() -> None:
        with replica.replicated(storage.local_folder(uri) / "one", uri):
            for _ in range(600):  # a renewal that has just looked puts it there once more
                with contextlib.suppress(OSError):
                    place.filesystem().delete_file(place.join("owner.json").path)
                time.sleep(0.1)
            pytest.fail("it went on")

    # these tests may themselves run where it is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(RunFailed, match="another process, which has ended, had taken over"):
            prepare()
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_cannot_be_read_is_not_free(bucket, monkeypatch):
    """A store that does not answer does not say that nobody has it."""
    place = locate(bucket("answers/one"), "runs.dir")
    claim_of(place, "elsewhere", 7)

    def away(self: Place) -> bytes:
        raise OSError("SlowDown")

    mine = Claim(place, "runs.dir")
    monkeypatch.setattr(claim, "RENEW_S", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(Place, "read", away)
        for ask in (mine.take, mine.check, mine.release):
            with pytest.raises(OSError, match="SlowDown"):
                ask()
        with mine.renewed():
            time.sleep(0.3)
        assert mine.lost is None, "it may be ours"
    assert json.loads(place.join("owner.json").read())["host"] == "elsewhere"


def work(folder: Path, n: int) -> None:
    """What a training leaves behind, in small."""
    lines = "".join(f'{{"n":{i + 1}}}\n' for i in range(n))
    write(folder, "journal.jsonl", lines)
    write(folder, "summary.json", json.dumps({"n": n}))


def test_a_store_that_fails_does_not_stop_the_work(bucket, machine, monkeypatch, capsys):
    """But what is only here is gone with this machine: a job that says that it is done must not be."""
    machine("one")
    monkeypatch.setattr(replica, "LAST_TRIES_S", 2.0)
    monkeypatch.setattr(replica, "PUSH_S", 0.05)
    uri = bucket("fails")
    folder = storage.local_folder(uri) / "one"
    done: list[int] = []

    def fails(self, **_):
        raise OSError("the store is away")

    def job() -> None:
        with replica.replicated(folder, uri):
            work(folder, 1)
            time.sleep(0.5)
            work(folder, 2)
            done.append(1)

    with monkeypatch.context() as patched:
        patched.setattr(Replica, "push", fails)
        with pytest.raises(RunFailed, match=r"lacks the end \(the store is away\)"):
            job()
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("is behind (the store is away); it is tried again") == 1
    assert done
    assert "one/summary.json" not in objects(uri)
    job()
    assert objects(uri)["one/summary.json"] == b'{"n": 2}', "the same command sends it"


@pytest.mark.parametrize("method", [(Claim, "check"), (Replica, "push")])
def test_a_fault_of_the_store_at_the_end_is_waited_out(
    bucket, machine, monkeypatch, capsys, method
):
    """One answer that fails at the end of a training of days is not the end of it."""
    machine("one")
    uri = bucket(f"waits-{method[1]}")
    folder = storage.local_folder(uri) / "one"
    real, faults = getattr(*method), []

    def once(self, *given, **more):
        if not faults:
            faults.append(1)
            raise OSError("SlowDown")
        return real(self, *given, **more)

    with replica.replicated(folder, uri):
        work(folder, 3)
        monkeypatch.setattr(*method, once)
    assert faults
    assert "lacks the end (SlowDown); trying for 1 min 30 s" in " ".join(
        capsys.readouterr().out.split()
    )
    assert objects(uri)["one/summary.json"] == b'{"n": 3}'


def test_a_stop_keeps_its_own_status(bucket, machine, monkeypatch, capsys):
    """What is said of the copy must not hide why the work ended."""
    machine("one")
    monkeypatch.setattr(replica, "LAST_TRIES_S", 0.0)
    monkeypatch.setattr(
        Replica, "push", lambda *_, **__: (_ for _ in ()).throw(OSError("the store is away"))
    )
    uri = bucket("status")
    folder = storage.local_folder(uri) / "one"

    def job() -> None:
        with replica.replicated(folder, uri):
            work(folder, 1)
            raise Stopped("as was asked")

    with pytest.raises(Stopped, match="as was asked"):
        job()
    assert "lacks the end (the store is away)" in " ".join(capsys.readouterr().out.split())


def test_a_bucket_that_is_not_there_is_one_message(config, machine):
    machine("one")
    chosen = config()
    chosen.runs.dir = chosen.runs.dir.replace("s3://kept", "s3://missing")
    with pytest.raises(UserError, match=r"runs\.dir .*bucket that does not exist"):
        fit(chosen)


def test_a_run_that_is_not_there(bucket, machine):
    machine("one")
    with pytest.raises(UserError, match="where there is none"):
        runs.open_run(bucket("nobody/one"), "teacher.run")
    folder = storage.local_folder(bucket("nobody"))
    assert not (folder / "one").exists(), "it would pass for a run that died"


def test_a_teacher_and_first_weights_may_lie_in_the_store(config, machine, tiny_tree):
    machine("one")
    teacher = config("run.name=teacher")
    fit(teacher)
    machine("two")
    uri = teacher.runs.dir.replace("?", "/teacher?")
    student = config("run.name=student", "task=distil", f"teacher.run='{uri}'")
    assert fit(student)["status"] == "finished"
    # a part of what the first one was trained on is what this one is measured by
    begun = config("run.name=begun", f"model.init_from='{uri}'", f"data.root={tiny_tree}/train")
    assert fit(begun)["status"] == "finished"
    folder = storage.local_folder(begun.runs.dir)
    assert load_run_config(folder / "begun").model["init_from"] == uri, "it means the same anywhere"
    said = [r["message"] for r in runs.read_journal(folder / "begun") if r["kind"] == "warning"]
    assert any("model.init_from was trained on" in m for m in said)


def test_what_jobs_write_into_a_run_of_the_store_comes_back_to_it(config, machine, capsys):
    machine("one")
    chosen = config()
    fit(chosen)
    before = objects(chosen.runs.dir)
    uri = chosen.runs.dir.replace("?", "/one?")
    machine("two")
    given = [f"from_run='{uri}'", f"cache.dir={config().cache.dir}"]
    evaluate_run(compose("evaluate", given))
    folder = storage.local_folder(chosen.runs.dir) / "one"
    there = objects(chosen.runs.dir)
    [name] = [n for n in there if n.endswith("/evaluation.json")]
    assert there[name] == (folder / name.removeprefix("one/")).read_bytes()
    assert name.replace("evaluation.json", "reliability.png") in there
    assert before.items() <= there.items()
    assert "Sent to s3://" in capsys.readouterr().out
    evaluate_run(compose("evaluate", [*given, "output=mine"]))
    assert objects(chosen.runs.dir).keys() == there.keys(), "it was asked for elsewhere"

    place = locate(uri, "from_run").join("report.html")
    put(place, b"old")
    done = run_job("report", f"from_run='{uri}'", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert place.read() == (folder / "report.html").read_bytes() != b"old"

    machine("one")
    fit(config())
    assert name in objects(chosen.runs.dir), "who trained it does not remove what it never had"


def test_what_could_not_be_sent_back_is_said(bucket, machine, monkeypatch):
    machine("one")
    uri = bucket("back/one")
    folder = storage.local_folder(bucket("back")) / "one"
    write(folder, "report.html", "new")
    monkeypatch.setattr(Replica, "send", lambda *_: (_ for _ in ()).throw(OSError("no\n way")))
    with pytest.raises(
        UserError, match=r"from_run: what was written is in .*/one, but not .*no way"
    ):
        replica.send_back(uri, "from_run", [folder / "report.html"])
    replica.send_back(folder, "from_run", [folder / "report.html"])  # no URI, nothing to do


def test_a_run_that_is_not_as_the_store_has_it_is_not_taken_in_silence(
    bucket, machine, monkeypatch, capsys
):
    """A student of last week's teacher would be none of this one's."""
    home = machine("one")
    source, uri = home / "source" / "one", bucket("stale/one")
    for name in ("config.yaml", "run.json"):
        write(source, name, "{}")
    record = {"kind": "epoch", "attempt": 1, "step": 1, "time": time.time() - 7200}
    write(source, "journal.jsonl", json.dumps(record) + "\n")
    Replica(source, locate(uri, "runs.dir")).push()
    folder = runs.open_run(uri, "teacher.run")
    assert capsys.readouterr().out == ""

    def away(*_):
        raise OSError("NETWORK_CONNECTION: timed out")

    with monkeypatch.context() as patched:
        patched.setattr(Replica, "_look", away)
        for _ in range(3):  # it is asked for in several places
            assert runs.open_run(uri, "teacher.run") == folder
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("cannot be reached; check the network") == 1
    assert "Taken as it was here 2 h 00 min ago" in said
    write(folder, "journal.jsonl", '{"kind":"epoch","of":"another training"}\n')
    with pytest.raises(GoneApart, match="have gone different ways"):
        runs.open_run(uri, "teacher.run")


def test_another_run_is_started_where_the_store_has_one(config, machine, monkeypatch):
    machine("one")
    real, begun = Training._train_epoch, []

    def epoch(self: Training) -> None:
        begun.append(1)
        real(self)
        if len(begun) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_train_epoch", epoch)
        with pytest.raises(KeyboardInterrupt):
            fit(config())
    assert "one/summary.json" in objects(config().runs.dir)
    assert fit(config("run.again=true"))["name"] == "one", "it had stopped, and is gone on with"
    machine("two")
    assert fit(config("run.again=true"))["name"] == "one-2"


def test_a_set_that_is_damaged_in_the_store_is_built_and_sent_again(config, machine):
    from potstill.data.cache import open_cache
    from potstill.data.prepare import prepare

    machine("one")
    chosen = config()
    prepare(chosen.data, chosen.cache)
    there = objects(chosen.cache.dir)
    name = next(n for n in there if n.endswith(".arrow"))
    place = locate(chosen.cache.dir, "cache.dir").join(name)
    put(place, there[name][:-9] + b"\0" * 9)
    machine("two")
    found = prepare(chosen.data, chosen.cache)
    open_cache(found.cache_dir, verify=True)
    mended = objects(chosen.cache.dir)
    assert mended[name] == (found.cache_dir / name.partition("/")[2]).read_bytes()


def test_a_set_comes_back_without_its_source(config, machine, tiny_tree, monkeypatch):
    from potstill.data.cache import open_cache
    from potstill.data.prepare import prepare

    machine("one")
    chosen = config()
    first = prepare(chosen.data, chosen.cache)
    one = open_cache(first.cache_dir, verify=True).split("train")
    shutil.rmtree(first.cache_dir)
    with monkeypatch.context() as patched:
        patched.setattr("potstill.data.prepare._build", lambda *_: pytest.fail("it is there"))
        second = prepare(chosen.data, chosen.cache)
    two = open_cache(second.cache_dir, verify=True).split("train")
    assert (one.ids == two.ids).all()
    assert (two.read(range(3)) > 0).any()
