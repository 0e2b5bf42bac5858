"""The explorer: who is let in, that every run is indexed, and that it starts, serves and stops as it says."""

from __future__ import annotations

import asyncio
import fcntl
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import ROOT, run_job, write_down_connections
from potstill.errors import UserError
from potstill.explore import _say_indexed, bind, find_repository, read_token
from potstill.explore_guard import Guard, page_policy
from potstill.explore_serve import own_page
from potstill.tracking import AimWriter
from synthetic_runs import make_run, whole_journal

TOKEN = "t" * 43
HOST = "127.0.0.1:43800"
COOKIE = {"cookie": f"potstill-explorer-43800={TOKEN}"}


# ------------------------------------------------------------------------------------------------ the guard
class Behind:
    """What stands behind the guard: counts who gets through, and answers as Aim does, for all origins to read."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(f"{scope['method']} {scope['path']}")
        headers = [
            (b"access-control-allow-origin", b"*"),
            (b"Access-Control-Allow-Credentials", b"true"),
            (b"content-type", b"text/plain"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"runs"})


def knock(
    guard: Guard,
    headers: Mapping[str, str] | list[tuple[str, str]] = COOKIE,
    path: str = "/",
    method: str = "GET",
    host: str | None = HOST,
    kind: str = "http",
) -> tuple[int, dict[str, str], str]:
    path, _, query = path.partition("?")
    pairs = list(headers.items()) if isinstance(headers, Mapping) else headers
    pairs = ([("host", host)] if host else []) + pairs
    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in pairs],
    }
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("what is refused is not read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    if kind == "websocket":
        return sent[0]["code"], {}, ""
    found = [(name.decode().lower(), value.decode()) for name, value in sent[0]["headers"]]
    assert len(dict(found)) == len(found), "no header twice"
    return sent[0]["status"], dict(found), b"".join(m["body"] for m in sent[1:]).decode()


@pytest.fixture
def behind() -> Behind:
    return Behind()


@pytest.fixture
def guard(behind: Behind) -> Guard:
    return Guard(behind, TOKEN, policy="default-src 'self'")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:43800", "localhost:43800", "LOCALHOST:5000", "[::1]:43800", "127.0.0.1"],
)
def test_a_name_of_loopback_is_let_in_whatever_its_port(guard, behind, host):
    cookie = {
        "cookie": f"potstill-explorer-{host.rpartition(':')[2] if host[-1] != '1' else 80}={TOKEN}"
    }
    assert knock(guard, cookie, host=host)[0] == 200
    assert behind.reached == ["GET /"]


@pytest.mark.parametrize(
    "host",
    [
        None,
        "evil.test:43800",
        "127.0.0.1.evil.test",
        "localhost.evil.test:43800",
        "evil-localhost",
        "127.0.0.1@evil.test",
        "127.0.0.1:43800\n",
        "127.0.0.1:",
        "127.0.0.2:43800",
        "0.0.0.0:43800",
        "[::]:43800",
        "2130706433:43800",
        "",
    ],
)
def test_another_name_is_refused_even_with_the_token(guard, behind, host):
    for headers, path in (
        (COOKIE, "/"),
        ({"authorization": f"Bearer {TOKEN}"}, f"/?token={TOKEN}"),
    ):
        assert knock(guard, headers, path, host=host)[0] == 403
    assert behind.reached == []


def test_two_hosts_are_none(guard, behind):
    assert knock(guard, [("host", "evil.test"), *COOKIE.items()])[0] == 403
    assert behind.reached == []


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.test"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8265"},  # another server of this machine
        {"origin": "https://127.0.0.1:43800"},
        {"origin": "http://localhost:43800"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},  # another port: browsers send it the cookie
        {
            "sec-fetch-site": "cross-site",
            "sec-fetch-mode": "navigate",
            "sec-fetch-dest": "document",
        },
    ],
)
def test_another_pages_request_is_refused_even_with_the_cookie(guard, behind, headers):
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        status, answer, _ = knock(guard, {**COOKIE, **headers}, "/api/runs/x/", method)
        assert status == 403
        assert not [name for name in answer if name.startswith("access-control")]
    assert behind.reached == []


def test_two_origins_are_foreign(guard, behind):
    own = ("origin", f"http://{HOST}")
    assert knock(guard, [own, ("origin", "http://evil.test"), *COOKIE.items()])[0] == 403
    assert behind.reached == []


def test_its_own_page_may_do_everything_and_over_ssh_too(guard, behind):
    for host in (HOST, "localhost:5000"):
        cookie = f"a=1; potstill-explorer-{host.rpartition(':')[2]}={TOKEN}; b=2"
        own = {"cookie": cookie, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        assert knock(guard, own, "/api/runs/x/", "DELETE", host=host)[0] == 200
    assert behind.reached == ["DELETE /api/runs/x/"] * 2


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ({}, "/"),
        ({}, "/static-files/manifest.json"),
        ({}, "/?token="),
        ({}, f"/?token={TOKEN[:-1]}"),
        ({}, f"/?token={TOKEN}x"),
        ({}, "/?token=%C3%A9"),
        ({"cookie": "potstill-explorer-43800=wrong"}, "/"),
        ({"cookie": f"potstill-explorer-43801={TOKEN}"}, "/"),
        ({"authorization": f"Basic {TOKEN}"}, "/"),
        ({"authorization": "Bearer wrong"}, "/"),
        ({"authorization": "Bearer"}, "/"),
    ],
)
def test_without_the_token_the_page_says_how_to_get_it(guard, behind, headers, path):
    status, answer, page = knock(guard, headers, path)
    assert status == 401
    assert "jobs/explore.py" in page
    assert TOKEN not in page
    assert "set-cookie" not in answer
    assert behind.reached == []


def test_the_link_sets_a_cookie_and_leaves_the_address(guard, behind):
    status, answer, _ = knock(
        guard, {"sec-fetch-site": "none"}, f"/metrics?a=1&token={TOKEN}&b=%26"
    )
    assert status == 303
    assert answer["location"] == "/metrics?a=1&b=%26"
    cookie, *attributes = answer["set-cookie"].split("; ")
    assert set(attributes) == {"Path=/", "HttpOnly", "SameSite=Strict"}
    assert knock(guard, {"cookie": cookie}, answer["location"])[0] == 200
    assert behind.reached == ["GET /metrics"]


def test_a_link_cannot_forward_elsewhere(guard):
    for path in ("//evil.test/", "/\\evil.test/", "///evil.test"):
        location = knock(guard, {}, f"{path}?token={TOKEN}")[1]["location"]
        assert location.startswith("/evil.test")


def test_a_link_in_another_page_is_followed_but_not_framed(guard, behind):
    clicked = {
        "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "navigate",
        "sec-fetch-dest": "document",
    }
    status, answer, page = knock(guard, clicked, f"/?token={TOKEN}")
    assert (status, "set-cookie" in answer) == (200, True)
    assert 'content="0;url=/"' in page
    assert TOKEN not in page
    for change in ({"sec-fetch-dest": "iframe"}, {"sec-fetch-mode": "no-cors"}, {"origin": "null"}):
        assert knock(guard, {**clicked, **change}, f"/?token={TOKEN}")[0] == 403
    assert knock(guard, clicked, f"/?token={TOKEN}", "POST")[0] == 403
    assert behind.reached == []


def test_a_cookie_that_another_port_has_set_locks_nobody_out(guard, behind):
    name, _, _ = COOKIE["cookie"].partition("=")
    assert knock(guard, {"cookie": f"{name}=wrong; {COOKIE['cookie']}"})[0] == 200
    assert knock(guard, {"cookie": f"{name}=wrong; {name}=wrong, too"})[0] == 401
    assert behind.reached == ["GET /"]


def test_a_script_may_send_the_token_as_a_header(guard, behind):
    assert knock(guard, {"authorization": f"bearer {TOKEN}"}, "/api/projects/")[0] == 200
    assert behind.reached == ["GET /api/projects/"]


def test_what_is_answered_lets_nobody_else_read_or_frame_it(guard):
    for headers in (COOKIE, {}):
        _, answer, _ = knock(guard, headers)
        assert not [name for name in answer if name.startswith("access-control")]
        assert answer["x-frame-options"] == "DENY"
        assert answer["referrer-policy"] == "no-referrer"
        assert answer["cross-origin-resource-policy"] == "same-origin"
        assert answer["content-security-policy"] == "default-src 'self'"
        assert answer["cache-control"] == "no-store"


def test_files_with_a_version_stay_in_the_browser(guard):
    def kept(path: str) -> str:
        return knock(guard, path=path)[1]["cache-control"]

    assert kept("/static-files/static/js/main.js?version=84833b") == "private, max-age=31536000"
    assert kept("/static-files/assets/inter/inter.css") == "private, max-age=3600"
    assert kept("/api/projects/?version=1") == "no-store"


def test_a_websocket_is_refused(guard, behind):
    assert knock(guard, kind="websocket")[0] == 1008
    assert behind.reached == []


def test_read_only_lets_reading_through(behind):
    guard = Guard(behind, TOKEN, read_only=True)
    reads = [
        "/api/runs/images/get-batch",
        "/api/runs/h/metric/get-batch/",
        "/api/runs/search/metric/align",
        "/api/runs/h/images/get-step/",  # the slider of a run's page
    ]
    for path in reads:
        assert knock(guard, path=path, method="POST")[0] == 200
    assert knock(guard, path="/api/runs/search/run/")[0] == 200
    writes = [
        ("DELETE", "/api/runs/h/"),
        ("PUT", "/api/runs/h/"),
        ("POST", "/api/runs/delete-batch/"),
        ("POST", "/api/runs/archive-batch/"),
        ("POST", "/api/runs/h/tags/new/"),
        ("POST", "/api/dashboards/"),
        ("DELETE", "/api/runs/images/get-batch"),
    ]
    for method, path in writes:
        status, _, page = knock(guard, path=path, method=method)
        assert (status, "--read-only" in page) == (403, True)
    assert len(behind.reached) == 5


def test_the_page_may_load_from_here_alone():
    import aim_ui

    template = (Path(aim_ui.__file__).parent / "build" / "index-template.html").read_text()
    assert "https://" in template, "what the policy is for"
    policy = page_policy(template, reports=False)
    assert "//" not in policy
    assert policy.count("'sha256-") == len(re.findall("<script>", template)) > 0
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert "'unsafe-inline'" not in scripts
    more = page_policy(template, reports=True)
    assert set(re.findall(r"https://[^/;\s]+", more)) == {
        "https://cdn.jsdelivr.net",
        "https://pypi.org",
        "https://files.pythonhosted.org",
    }


def test_the_page_asks_for_nothing_that_it_may_not_load():
    import aim_ui

    template = (Path(aim_ui.__file__).parent / "build" / "index-template.html").read_text()
    loads = re.compile(r' (?:src|href)="(https://[^"]*)"')
    (pyodide,) = [url for url in loads.findall(template) if "pyodide" in url]
    assert loads.findall(own_page(template, reports=False)) == []
    assert loads.findall(own_page(template, reports=True)) == [pyodide]
    assert len(re.findall('src="/static-files/', own_page(template, reports=False))) == 2


# --------------------------------------------------------------------------------------- what it is started with
def test_a_token_file_is_made_for_its_owner_and_kept(tmp_path: Path):
    file = tmp_path / "token"
    token = read_token(str(file))
    assert len(token) >= 40
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_token(str(file)) == token
    file.chmod(0o640)
    with pytest.raises(UserError, match="its owner's alone"):
        read_token(str(file))
    file.chmod(0o600)
    for text in ("", "short\n", "two\n" * 20, "x" * 40 + ";Path=/", "é" * 40):
        file.write_text(text)
        with pytest.raises(UserError, match="at least 32 letters"):
            read_token(str(file))
    for wrong in (tmp_path, tmp_path / "none" / "token"):
        with pytest.raises(UserError, match="--token-file"):
            read_token(str(wrong))


def test_a_taken_port_is_left_to_its_owner(capsys):
    first, port = bind(0)
    with first:
        second, next_port = bind(port)
        with second:
            assert first.getsockname() == ("127.0.0.1", port)
            assert second.getsockname() == ("127.0.0.1", next_port)
            assert port < next_port <= port + 20
    assert f"Port {port} is taken: this is {next_port}." in capsys.readouterr().out
    with pytest.raises(UserError, match="from 0 to 65535, got 70000"):
        bind(70000)


def test_the_repository_is_found_or_the_remedy_said(tmp_path: Path, monkeypatch):
    (tmp_path / "runs" / ".aim").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POTSTILL_HOME", raising=False)
    assert find_repository("runs", None) == tmp_path / "runs"
    assert find_repository("elsewhere", "runs/.aim") == tmp_path / "runs"
    with pytest.raises(
        UserError, match=r"--runs must have an Aim repository, got other .*report\.py"
    ):
        find_repository("other", None)
    with pytest.raises(UserError, match="--repo must have an Aim repository"):
        find_repository("runs", "other")
    with pytest.raises(UserError, match="a cluster's head"):
        find_repository("s3://bucket/runs?region=eu-west-1", None)
    monkeypatch.setenv("POTSTILL_HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert find_repository("runs", None) == tmp_path / "runs"


# ------------------------------------------------------------------------------------------- a real repository
@pytest.fixture(scope="module")
def aim() -> Iterator[Aim]:
    process = Aim()
    yield process
    process.close()


class Aim:
    """A process that may import Aim, which takes seconds, and then runs one script after the other."""

    LOOP = (
        "import json, logging, os, sys, threading\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "answers = os.fdopen(os.dup(1), 'w', buffering=1)\n"
        "os.dup2(2, 1)\n"  # Aim prints
        "logging.disable()\n"
        "from aim import Repo\n"
        "from potstill.explore_index import Indexer, index\n"
        "for line in sys.stdin:\n"
        "    names = dict(globals())\n"
        "    exec(json.loads(line), names)\n"
        "    print(json.dumps(names['answer']), file=answers)\n"
    )

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.LOOP, str(ROOT / "platform")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *lines: str) -> None:
        assert self._process.stdin is not None
        print(json.dumps("\n".join(lines)), file=self._process.stdin, flush=True)

    def answer(self, timeout_s: float = 60) -> Any:
        """What the script has left in `answer`; None where it is not over within that time."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        return json.loads(self._process.stdout.readline()) if ready else None

    def ask(self, *lines: str) -> Any:
        self.start(*lines)
        return self.answer()

    def found(self, repo: Path, query: str = "run.config.optimizer.lr == 0.003") -> list[str]:
        return self.ask(
            f"runs = Repo({str(repo)!r}).query_runs({query!r}, report_mode=0).iter_runs()",
            "answer = sorted(r.run.name for r in runs)",
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def index_of(repo: Path, wait_s: float) -> tuple[str, ...]:
    """A script that brings the index of `repo` up to date."""
    return (
        "import time",
        f"indexer = Indexer(Path({str(repo)!r}), lambda **_: None, threading.Event())",
        f"answer = [*indexer.bring_up_to_date(time.monotonic() + {wait_s}), indexer.mended]",
        "del indexer",
    )


@pytest.fixture(scope="module")
def filled(aim: Aim, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a repository with three runs, without an index."""
    root = tmp_path_factory.mktemp("filled")
    said: list[str] = []
    writer = AimWriter(root, said.append)
    for name in ("oak", "ash", "elm"):
        writer.follow(make_run(root, whole_journal(3), name))
    hashes = writer.close(120)
    # of runs that synthetic_runs makes there are neither images nor predictions
    assert all("no confusion matrix" in line for line in said)
    assert len(hashes) == 3
    shutil.rmtree(root / ".aim" / "meta" / "index")
    # an empty one, as while a run is first written
    aim.ask(f"Repo({str(root)!r})._get_index_tree('meta', 0)", "answer = 1")
    return root


def aim_hash(repo: Path, name: str) -> str:
    return json.loads((repo / name / "aim.json").read_text())["run"]


def test_what_is_not_indexed_is_and_what_is_broken_is_said(aim, filled: Path, tmp_path: Path):
    repo = shutil.copytree(filled, tmp_path / "a copy")
    assert aim.found(repo) == [], "Aim reads empty what is not in its index"
    (repo / ".aim" / "meta" / "index" / "CURRENT").write_text("garbage")
    chunk = repo / ".aim" / "meta" / "chunks" / aim_hash(repo, "ash")
    for file in chunk.glob("*.sst"):
        os.truncate(file, 100)
    done = run_job("explore", "--runs", str(repo), "--index-only", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a copy/.aim: 3 runs, 2 newly indexed" in done.stdout
    assert "the index was broken and has been made again" in done.stdout
    assert f"1 of Aim's runs cannot be read ({chunk.name})" in done.stdout
    assert f"--repo '{repo}' rm {chunk.name}" in done.stdout
    assert aim.found(repo) == ["elm", "oak"]
    assert aim.ask(*index_of(repo, 0)) == [0, 0, "", ""]


def test_an_index_that_another_process_holds_is_waited_for(aim, filled: Path, tmp_path: Path):
    repo = shutil.copytree(filled, tmp_path / "copy")
    with open(repo / ".aim" / "meta" / "index" / "LOCK", "r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        held = "another process holds the index"
        assert aim.ask(*index_of(repo, 0)) == [0, 3, held, ""]
        aim.start(*index_of(repo, 60))
        assert aim.answer(1.0) is None
    assert aim.answer() == [3, 0, "", ""]
    assert aim.found(repo) == ["ash", "elm", "oak"]


def test_what_stood_in_an_index_that_was_deleted_is_indexed_again(aim, filled, tmp_path: Path):
    repo = shutil.copytree(filled, tmp_path / "copy")
    answer = aim.ask(
        *index_of(repo, 0)[:-1],
        "import shutil",
        "indexer.bring_up_to_date(0)",  # now it knows that they are over
        f"shutil.rmtree({str(repo / '.aim' / 'meta' / 'index')!r})",
        f"Repo({str(repo)!r})._get_index_tree('meta', 0)",
        "answer.append(indexer.bring_up_to_date(0)[0])",
    )
    assert answer == [3, 0, "", "", 3]


def test_what_is_left_is_said(capsys, tmp_path: Path):
    left = {"runs": 3, "indexed": 1, "left": 2, "why": "it is held", "broken": [], "mended": ""}
    with pytest.raises(UserError, match="2 runs are not indexed yet: it is held; close what"):
        _say_indexed(left, tmp_path, index_only=True)
    _say_indexed({**left, "left": 1}, tmp_path)
    said = "1 run is not indexed yet: it is held; indexed as soon as that is over"
    assert said in capsys.readouterr().out


def test_a_repository_of_another_aim_is_none(aim, tmp_path: Path):
    (tmp_path / ".aim").mkdir()
    for version, why in (("9.0", "format 9.0, and this Aim knows"), (None, "it has no VERSION")):
        file = tmp_path / ".aim" / "VERSION"
        file.write_text(version) if version else file.unlink()
        (said,) = aim.ask(
            "answer = []",
            "class Parent:",
            "    def say(self, **message): answer.append(message)",
            f"index({{'repo': {str(tmp_path)!r}}}, Parent())",
        )
        assert why in said["error"]
        assert "must be one that the installed Aim reads" in said["error"]


def test_stopped_while_it_indexes_it_says_so_and_leaves_nothing(filled: Path, tmp_path: Path):
    repo = shutil.copytree(filled, tmp_path / "copy")
    command = [sys.executable, str(ROOT / "jobs" / "explore.py"), "--runs", str(repo)]
    with open(repo / ".aim" / "meta" / "index" / "LOCK", "r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        job = subprocess.Popen([*command, "--index-only"], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        children: list[psutil.Process] = []
        while time.monotonic() < deadline and not any(
            "explore_index" in str(c.cmdline()) for c in children
        ):
            time.sleep(0.02)
            children = psutil.Process(job.pid).children()
        job.terminate()
        _, said = job.communicate(timeout=30)
    assert (job.returncode, said) == (130, "stopped; the same command goes on from here\n")
    assert len(children) == 1
    assert psutil.wait_procs(children, 15)[1] == []


def test_mistakes_are_one_line(tmp_path: Path):
    done = run_job("explore", "--runs", "none", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --runs must have an Aim repository, got none")
    assert len(done.stderr.splitlines()) == 1


ESCAPES = [
    "run.db.engine.url.database != ''",
    "run.db.engine.connect().exec_driver_sql('select count(*) from run').scalar() > 0",
    "run.run.repo.path != ''",
    "run.structured_run_cls.find != None",
    "run.meta_run_tree.container != None",
    "run.metrics.meta_run_tree != None",
    "'Undefined' not in str(run.config.container)",
    "run.config.collect() != None",
    "str.format('{0.run.repo.path}', run) != ''",
    "'{r.run.repo.path}'.format_map({'r': run}) != ''",
    "f'{run.run.repo.path}' != ''",
    "random.SystemRandom != None",
    "string.Formatter != None",
    "[r for r in [run.run.repo]] != []",
    "(lambda r: r.db.engine)(run) != None",
    "setattr(run, 'fields', list) == None",
    # the view taken for the run, and its repository for the view's
    "[setattr(run, 'fields', lambda: ['repo', 'path']), setattr(run, 'structured_run_cls', run), "
    "setattr(run, 'db', None), setattr(run, 'run', run.repo), run.path][-1] != ''",
    "delattr(run, 'db') == None",
]
QUESTIONS = [
    "run.name == 'oak'",
    "run.name.startswith('o') and 'x' not in run.name.upper()",
    "run.experiment == 'seedlings' and 'first' in run.tags and len(run.tags) == 2",
    "any([tag.startswith('oa') for tag in run.tags])",
    "run.config.optimizer.lr > 0.001 and run['config', 'optimizer', 'lr'] < 1",
    "run.config.get('optimizer') != None",
    "run.metrics['loss', {'subset': 'val'}].last < 10",
    "run.created_at < datetime.now() - timedelta(days=1) and run.duration > 0",
    "math.log(run.config.optimizer.lr) < 0 and round(run.duration, 1) > 0",
    "not run.nothing.of_the_kind and not run.active",
    "sum([len(tag) for tag in sorted(run.tags)]) == 8",
]
# Aim keeps it: in all questions that follow `math` is a number
LASTING = "[(math := 3) for x in [0]] == [3]"


def test_queries_ask_for_data_and_reach_nothing_else(aim, filled: Path, tmp_path: Path):
    repo = shutil.copytree(filled, tmp_path / "copy")
    asked = [*ESCAPES, LASTING, *QUESTIONS]
    before, after = aim.ask(
        *index_of(repo, 0),
        "from aim.storage import query",
        "from potstill.explore_queries import narrow_queries",
        f"repo, asked = Repo({str(repo)!r}), {asked!r}",
        "def ask(): return [len(list(repo.query_runs(q, report_mode=0).iter_runs())) for q in asked]",
        "as_it_is, check = dict(query.restricted_globals), query.RestrictedPythonQuery.check",
        "before = ask()",
        "query.restricted_globals.clear()",
        "query.restricted_globals.update(as_it_is)",
        "narrow_queries()",
        "answer = [before, ask()]",
        "query.restricted_globals.update(as_it_is)",
        "query.RestrictedPythonQuery.check = check",
    )
    before, after = (dict(zip(asked, counts, strict=True)) for counts in (before, after))
    assert sum(before[query] == 3 for query in ESCAPES) > 7, "Aim has closed it: this can go"
    assert [query for query in ESCAPES if after[query]] == []
    of_math = next(query for query in QUESTIONS if "math" in query)
    assert (before[of_math], after[of_math]) == (0, 3)
    assert [query for query in QUESTIONS if not after[query]] == []
    assert [query for query in QUESTIONS if after[query] != before[query]] == [of_math]


# ------------------------------------------------------------------------------------------------- as it serves
class Explorer:
    """`jobs/explore.py` in a process of its own, from the link that it prints to its end."""

    def __init__(self, repo: Path, *flags: str, cwd: Path, env: Mapping[str, str] | None = None):
        self.repo = repo
        command = [sys.executable, str(ROOT / "jobs" / "explore.py"), "--repo", str(repo), *flags]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        link = self.wait_for(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]+)")
        self.link, self.port, self.token = link[0], int(link[1]), link[2]
        self.children: list[psutil.Process] = []
        self.look_again()

    def look_again(self) -> None:
        """What processes it has now."""
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def those_that(self, what: str) -> list[psutil.Process]:
        found = []
        for child in self.children:
            with suppress(psutil.NoSuchProcess):  # Aim asks other programs what machine this is
                if f"potstill.explore_{what}" in child.cmdline():
                    found.append(child)
        return found

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Reads what it says until this comes; it must come before it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"{pattern} did not come: {self.said}")

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """With the token, where no other header is given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = headers or {"Authorization": f"Bearer {self.token}"}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, content

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.look_again()
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=30)
        self.said += out
        return self.process.returncode

    def left(self, wait_s: float) -> list[psutil.Process]:
        """Those of its processes that are still there after so long."""
        return psutil.wait_procs(self.children, wait_s)[1]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        for child in self.left(10):
            child.kill()


@pytest.fixture(scope="module")
def served(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explorer]:
    """An explorer of three runs that opens a browser, with all that its processes connect to written down."""
    root = tmp_path_factory.mktemp("served")
    repo = shutil.copytree(filled, root / "runs")
    browser = root / "browser"
    browser.write_text('#!/bin/sh\necho "$1" > "$0.tmp"\nmv "$0.tmp" "$0.opened"\n')
    browser.chmod(0o755)
    taken = socket.create_server(("127.0.0.1", 0))
    flags = ["--port", str(taken.getsockname()[1]), "--open", "--token-file", str(root / "token")]
    paths = [str(write_down_connections(root)), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths), "BROWSER": f"{browser} %s"}
    explorer = Explorer(repo, *flags, cwd=root, env=env)
    taken.close()
    yield explorer
    explorer.close()


def test_it_says_what_it_serves_and_where(served: Explorer):
    assert "runs/.aim: 3 runs, 3 newly indexed" in served.said
    assert f"is taken: this is {served.port}." in served.said
    assert (
        "Ctrl-C stops" in served.wait_for("Whoever has this link may see, rename and delete").string
    )


def test_it_listens_on_loopback_alone(served: Explorer):
    workers = [*served.those_that("serve"), *served.those_that("index")]
    family = [psutil.Process(served.process.pid), *workers]
    listening = [
        tuple(c.laddr) for p in family for c in p.net_connections("inet") if c.status == "LISTEN"
    ]
    assert set(listening) == {("127.0.0.1", served.port)}
    assert (len(served.those_that("serve")), len(served.those_that("index"))) == (2, 1)
    for process in family:
        assert served.token not in " ".join([*process.cmdline(), *process.environ().values()])


def opened_page(served: Explorer) -> Path:
    opened = served.repo.parent / "browser.opened"
    deadline = time.monotonic() + 30
    while not opened.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return Path(opened.read_text().strip().removeprefix("file://"))


def test_a_browser_is_opened_by_a_file_of_the_users_own(served: Explorer):
    page = opened_page(served)
    kept = (served.repo.parent / "token").read_text().strip()
    assert served.token == kept not in str(page)
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert f'content="0;url={served.link}"' in page.read_text()


def test_aims_application_answers_behind_the_guard(served: Explorer):
    status, headers, page = served.ask("/")
    assert (status, b"static-files/static/js/main.js" in page) == (200, True)
    assert "script-src 'self'" in headers["content-security-policy"]
    assert served.ask("/api/projects/")[0] == 200
    status, headers, names = served.ask("/api/runs/search/run/?limit=45&report_progress=false")
    assert status == 200
    assert all(name in names for name in (b"oak", b"ash", b"elm"))
    assert "access-control-allow-origin" not in headers
    status, headers, _ = served.ask("/static-files/static/js/main.js?version=1")
    assert (status, headers["cache-control"]) == (200, "private, max-age=31536000")
    assert headers["content-type"].startswith(("text/javascript", "application/javascript"))


def test_over_the_wire_others_are_refused(served: Explorer):
    bearer = {"Authorization": f"Bearer {served.token}"}
    assert served.ask("/api/projects/", Accept="*/*")[0] == 401
    assert served.ask("/api/projects/", **bearer, Host=f"evil.test:{served.port}")[0] == 403
    foreign = {**bearer, "Origin": "http://evil.test"}
    assert served.ask("/api/projects/", **foreign)[0] == 403
    preflight = {**foreign, "Access_Control_Request_Method": "DELETE"}
    status, headers, _ = served.ask("/api/runs/x/", "OPTIONS", **preflight)
    assert status == 403
    assert not [name for name in headers if name.startswith("access-control")]
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    key = {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert served.ask("/api/", **foreign, **upgrade, **key)[0] == 403


def test_files_of_this_machine_are_not_among_the_pages(served: Explorer):
    for path in (
        "/static-files/../../../../../etc/passwd",
        "/static-files/%2e%2e/%2e%2e/aim_ui.py",
    ):
        status, _, content = served.ask(path)
        assert status == 404 or b"<!doctype html>" in content.lower()
        assert b"root:" not in content


SEARCH = "/api/runs/search/metric/?p=50&report_progress=false&q=metric.name%20%3D%3D%20%22loss%22"


def test_metrics_are_the_same_when_they_are_asked_for_again(served: Explorer):
    # of both processes, from the files and from memory
    answers = [served.ask(SEARCH) for _ in range(6)]
    assert {status for status, _, _ in answers} == {200}
    assert len({content for _, _, content in answers}) == 1
    assert answers[0][2].count(b"subset") >= 6


def test_a_run_that_comes_while_it_serves_is_shown_and_broken_values_left_out(served: Explorer):
    """Also when the process that indexes has died, and another one has deleted the index."""
    served.those_that("index")[0].kill()
    assert served.wait_for("the process that indexes is replaced: .* status -9")
    folder = make_run(served.repo, whole_journal(3), "yew")
    writer = AimWriter(served.repo, lambda _: None)
    writer.follow(folder)
    new = writer.close(180)[folder]
    # at once, whoever has just opened it
    (served.repo / ".aim" / "meta" / "index").rename(served.repo.parent / "deleted")
    both = [
        new.encode(),
        aim_hash(served.repo, "oak").encode(),
    ]  # the index is made again run by run
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if all(name in (content := served.ask(SEARCH)[2]) for name in both):
            break
        time.sleep(0.3)
    assert all(name in content for name in both)
    for file in (served.repo / ".aim" / "seqs" / "chunks" / new).glob("*.sst"):
        os.truncate(file, 100)
    for _ in range(6):
        status, _, content = served.ask(SEARCH)
        assert (status, new.encode() in content) == (200, False)
        assert aim_hash(served.repo, "oak").encode() in content
    assert served.wait_for(f"run {new} is left out: its values cannot be read")


def test_a_process_that_dies_is_replaced(served: Explorer):
    served.look_again()
    first = served.those_that("serve")[0]
    first.kill()
    assert served.wait_for("one of the explorer's processes is replaced: .* status -9")
    deadline = time.monotonic() + 10
    now: list[psutil.Process] = []
    while (
        len(now) < 2 and time.monotonic() < deadline
    ):  # one that is just made bears its parent's name
        time.sleep(0.1)
        served.look_again()
        now = served.those_that("serve")
    assert (len(now), first in now) == (2, False)
    assert [served.ask("/api/projects/")[0] for _ in range(6)] == [200] * 6


def test_ctrl_c_ends_all_of_it_and_nothing_was_sent_anywhere(served: Explorer):
    """The last test of this explorer."""
    page, root = opened_page(served), served.repo.parent
    assert served.stop() == 0
    assert served.said.endswith("Stopped.\n")
    assert served.left(30) == []
    assert not page.exists()
    assert len((root / "hooked").read_text()) >= 4, "the hook was in each of its processes"
    sent = (root / "connections").read_text() if (root / "connections").exists() else ""
    assert sent == ""
    with suppress(ConnectionRefusedError):
        served.ask("/")
        raise AssertionError("something still answers")


def test_killed_it_leaves_no_process_behind(filled: Path, tmp_path: Path):
    """Not even one that hears nothing, because of a query that does not end."""
    repo = shutil.copytree(filled, tmp_path / "runs")
    explorer = Explorer(repo, "--read-only", "--no-open", "--port", "0", cwd=tmp_path)
    try:
        assert explorer.ask("/api/runs/x/", "DELETE")[0] == 403
        assert "Whoever has this link may see these runs" in explorer.wait_for("Whoever").string
        endless = http.client.HTTPConnection("127.0.0.1", explorer.port, timeout=60)
        bearer = {"Authorization": f"Bearer {explorer.token}"}
        endless.request("GET", "/api/runs/search/run/?q=10**10**9%3E0", headers=bearer)
        assert endless.sock is not None
        asker = endless.sock.getsockname()
        deadline = time.monotonic() + 30
        at_it: list[psutil.Process] = []
        while not at_it and time.monotonic() < deadline:
            at_it = [
                worker
                for worker in explorer.those_that("serve")
                if any(c.raddr == asker for c in worker.net_connections("inet"))
            ]
        began_s = at_it[0].cpu_times().user
        while at_it[0].cpu_times().user < began_s + 0.5 and time.monotonic() < deadline:
            time.sleep(0.05)
        explorer.process.kill()
        assert explorer.left(30) == []
    finally:
        explorer.close()
