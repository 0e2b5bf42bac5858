"""The explorer in Debian's Chromium: it shows a training and a search, and no other page gets anything from it."""

from __future__ import annotations

import http.server
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from conftest import tiny_overrides
from potstill import runs
from potstill.search_results import Objective, TrialResult, write_leaderboard, write_pictures
from potstill.tracking import AimWriter
from synthetic_runs import attempt, epoch, make_cache, make_run, predictions, whole_journal
from test_explore import Explorer
from test_tracking_search import end, make_search, make_trial, trial_ended

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--use-angle=swiftshader",  # WebGL without a GPU: parallel coordinates are drawn with it
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP evil.test 127.0.0.1",
]
WAIT_MS = 40_000
CLASSES = ["blue", "green", "red", "white"]
# asks for everything that a page may ask of another origin, and says in its title when it has
ATTACK = """<!doctype html><title>at it</title>
<form id="f" method="post" target="framed" action="{base}api/runs/archive-batch/?by=form" enctype="text/plain">
<input name='["{run}"' value='"]'></form>
<iframe name="framed"></iframe>
<iframe src="{base}metrics?by=iframe"></iframe>
<img src="{base}static-files/favicon.ico?by=img">
<script src="{base}api/projects/?by=script"></script>
<link rel="stylesheet" href="{base}static-files/assets/inter/inter.css?by=style">
<script>
let got = [];
const ask = (how, options) => fetch("{base}api/runs/" + how, {{credentials: "include", ...options}})
  .then(async answer => answer.type == "opaque" || got.push(how + " " + await answer.text()), () => null);
const socket = new Promise(done => {{
  const one = new WebSocket("{base}api/?by=socket".replace("http", "ws"));
  one.onopen = () => {{ got.push("socket"); done(); }};
  one.onerror = done;
}});
const events = new Promise(done => {{
  const one = new EventSource("{base}api/projects/?by=events", {{withCredentials: true}});
  one.onmessage = () => got.push("events");
  one.onerror = () => {{ one.close(); done(); }};
}});
document.getElementById("f").submit();
Promise.all([socket, events,
  ask("search/run/?by=simple", {{mode: "no-cors"}}),
  ask("search/run/?by=cors", {{mode: "cors"}}),
  ask("delete-batch/?by=post", {{mode: "no-cors", method: "POST", body: '["{run}"]'}}),
  ask("{run}/?by=delete", {{mode: "cors", method: "DELETE"}}),
  ask("{run}/?by=put", {{mode: "cors", method: "PUT", headers: {{"Content-Type": "application/json"}},
                       body: '{{"archived": true}}'}}),
]).then(() => setTimeout(() => document.title = "done: " + got.join(), 500));
</script>
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def explorer(chromium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explorer]:
    """Of a training and a search, as they leave their folders."""
    root = tmp_path_factory.mktemp("explored")
    guesses = predictions(len(CLASSES))
    make_cache(root / "runs" / "cache" / "k1", guesses, CLASSES, image_px=32)
    training = make_run(root / "runs", whole_journal(3), "meadow", CLASSES, guesses)
    told = [training, *search_of_three(root / "runs", "hunt")]
    writer = AimWriter(root / "runs", print)
    for folder in told:
        writer.follow(folder)
    assert len(writer.close(120)) == len(told)
    started = Explorer(root / "runs", "--port", "0", "--no-open", cwd=root)
    yield started
    started.close()


def search_of_three(root: Path, name: str) -> list[Path]:
    """The folders of a search and its trials."""
    objectives = [Objective("val_top1_acc", True), Objective("parameters", False)]
    search, results, records = make_search(root, name), [], [attempt()]
    trials = []
    for number in range(3):
        accuracy, point = 60.0 + number, {"optimizer.lr": 0.001 * (number + 1), "model.channels": 2}
        journal = [attempt(), epoch(1), epoch(2, val_top1_acc=accuracy), end("finished")]
        trials.append(make_trial(search, number, journal))
        records.append(trial_ended(number, "completed", number + 1, accuracy))
        values = {"val_top1_acc": accuracy, "parameters": 100.0 + number}
        results.append(TrialResult(number, trials[-1].name, "completed", point, values, 2, 1.0))
    runs.append_records(search, [*records, end("finished", 3)])
    write_leaderboard(search, results, objectives)
    write_pictures(search, results, objectives, name)
    return [search, *trials]


class Browser:
    """One user's: his cookies, a page of it, and all that the page's requests were answered."""

    def __init__(self, context: Any) -> None:
        context.add_init_script("localStorage.setItem('communityPopupSeen', 'true')")
        context.set_default_timeout(WAIT_MS)
        self.context, self.page = context, context.new_page()
        self.answers: list[tuple[str, int]] = []
        self.page.on("response", lambda answer: self.answers.append((answer.url, answer.status)))

    def show(self, explorer: Explorer, path: str) -> None:
        self.page.goto(f"http://127.0.0.1:{explorer.port}/{path}")

    def choose(self, what: str, *options: str) -> None:
        """In one of Aim's explorers, tick these and search."""
        self.page.get_by_role("button", name=what).click()
        for option in options:
            found = self.page.get_by_role("option").filter(
                has_text=re.compile(f"^{re.escape(option)}$")
            )
            found.click()
        self.page.keyboard.press("Escape")
        self.page.locator("button:has-text('Search'):visible").first.click()


@pytest.fixture
def browser(chromium) -> Iterator[Browser]:
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    yield Browser(context)
    context.close()


@pytest.fixture(scope="module")
def user(chromium, explorer: Explorer) -> Iterator[Browser]:
    """Who has opened the link."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    user = Browser(context)
    user.page.goto(explorer.link)
    yield user
    context.close()


@pytest.fixture(scope="module")
def stranger() -> Iterator[Any]:
    """A server of somebody else: `stranger.page` is what it answers, on any host name."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = server.page.encode()  # type: ignore[attr-defined]
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_the_link_opens_it_and_loads_nothing_from_elsewhere(user: Browser, explorer: Explorer):
    user.page.get_by_text("Total runs: 5").wait_for()
    assert user.page.url == f"http://127.0.0.1:{explorer.port}/"
    (cookie,) = user.context.cookies()
    assert cookie["value"] == explorer.token
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert explorer.token not in user.page.evaluate(
        "document.cookie + document.documentElement.outerHTML"
    )
    assert {urlparse(url).netloc for url, _ in user.answers} == {f"127.0.0.1:{explorer.port}"}
    assert {status for _, status in user.answers} <= {200, 303}
    news = user.page.locator(".DashboardRight")  # which are Aim's, from elsewhere
    news.wait_for(state="attached")
    assert not news.is_visible()
    with user.page.expect_console_message(lambda line: "Content Security Policy" in line.text):
        user.page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<img src=none onerror=\"window.harmed = 1\">')"
        )
    assert not user.page.evaluate("window.harmed"), "what a run's text holds is not run"


def test_the_runs_table_shows_the_training_the_search_and_its_trials(user, explorer):
    runs_are_listed(user, explorer)


def test_metrics_of_train_and_validation_are_drawn(user, explorer):
    losses_are_drawn(user, explorer)


def test_images_with_predictions_are_shown(user, explorer):
    predictions_are_shown(user, explorer)


def test_figures_of_the_training_and_of_the_search_are_drawn(user, explorer):
    figures_are_drawn(user, explorer)


def runs_are_listed(user: Browser, explorer: Explorer) -> None:
    user.show(explorer, "runs")
    for name in ("meadow", "hunt", *(f"trial-{n:04d}" for n in range(3))):
        user.page.get_by_text(name, exact=True).first.wait_for()
    user.page.get_by_text("search:hunt").first.wait_for()


def losses_are_drawn(user: Browser, explorer: Explorer) -> None:
    user.show(explorer, "metrics")
    user.choose("Metrics", 'loss subset="train"', 'loss subset="val"')
    from playwright.sync_api import expect

    lines = user.page.locator("path[class*=Line]")
    lines.nth(7).wait_for(state="attached")  # of four runs, in both subsets
    expect(lines).to_have_count(8)
    assert all(
        "L" in lines.nth(n).get_attribute("d") or "M" in lines.nth(n).get_attribute("d")
        for n in range(8)
    )


def predictions_are_shown(user: Browser, explorer: Explorer) -> None:
    user.show(explorer, "images")
    user.choose("Images", 'predictions kind="correct", subset="val"')
    picture = user.page.locator("img[src^='data:image']").first
    picture.wait_for()
    width = picture.evaluate("async image => { await image.decode(); return image.naturalWidth }")
    assert width == 32
    caption = re.compile(rf"({'|'.join(CLASSES)}) → \1 \(\d\.\d\d\)")
    user.page.get_by_text(caption).first.wait_for()


def figures_are_drawn(user: Browser, explorer: Explorer) -> None:
    user.show(explorer, "figures")
    user.choose(
        "Figures", 'confusion_matrix subset="val"', 'pareto kind="figure"', 'parallel kind="figure"'
    )
    user.page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
    user.page.locator(".js-plotly-plot .scatterlayer .point").first.wait_for()
    user.page.locator(".js-plotly-plot .parcoords").first.wait_for(state="attached")
    assert user.page.get_by_text("WebGL is not supported").count() == 0


def test_without_the_token_there_is_no_explorer(browser: Browser, explorer: Explorer):
    browser.show(explorer, "runs")
    browser.page.get_by_text("No token").first.wait_for()
    browser.page.get_by_text("Open the link that jobs/explore.py has printed").wait_for()
    assert [status for url, status in browser.answers if url.endswith("/runs")] == [401]


def test_under_another_name_there_is_no_explorer(user: Browser, explorer: Explorer):
    """DNS rebinding: a name of somebody else's that resolves to this machine."""
    for path in ("", f"?token={explorer.token}", "api/projects/"):
        answer = user.page.goto(f"http://evil.test:{explorer.port}/{path}")
        assert answer is not None
        assert answer.status == 403
    user.page.get_by_text("Wrong host").first.wait_for()


@contextmanager
def forwarded(to: int) -> Iterator[int]:
    """A port whose connections go on to another one."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", to)) as onward:
                for source, sink in ((self.request, onward), (onward, self.request)):
                    threading.Thread(target=pump, args=(source, sink), daemon=True).start()
                ended.wait()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                sink.sendall(content)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    ended = threading.Event()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            ended.set()
            server.shutdown()


class Wire:
    """The status of every answer to a page, also of those that the browser then keeps from it."""

    def __init__(self, browser: Browser) -> None:
        self._urls: dict[str, str] = {}
        self._statuses: dict[str, list[int]] = {}
        self._browser = browser
        session = browser.context.new_cdp_session(browser.page)
        session.on("Network.requestWillBeSent", self._sent)
        session.on("Network.webSocketCreated", self._sent)
        session.on("Network.responseReceivedExtraInfo", self._answered)
        session.on("Network.webSocketFrameError", self._failed)
        session.send("Network.enable")

    def _sent(self, event: Any) -> None:
        self._urls[event["requestId"]] = event.get("url") or event["request"]["url"]

    def _answered(self, event: Any) -> None:
        self._statuses.setdefault(event["requestId"], []).append(event["statusCode"])

    def _failed(self, event: Any) -> None:
        status = re.search(r"Unexpected response code: (\d+)", event["errorMessage"])
        self._statuses.setdefault(event["requestId"], []).append(int(status[1]) if status else 0)

    def by(self) -> dict[str, set[int]]:
        """The statuses of what was asked for with ?by=…"""
        found: dict[str, set[int]] = {}
        answers = [(self._urls.get(i, ""), s) for i, all_ in self._statuses.items() for s in all_]
        for url, status in [*answers, *self._browser.answers]:
            if by := re.search(r"by=(\w+)", url):
                found.setdefault(by[1], set()).add(status)
        return found


@pytest.mark.parametrize("host", ["127.0.0.1", "evil.test"])
def test_another_page_gets_nothing_and_changes_nothing(user, explorer, stranger, host):
    """Of another site; and of another port of this machine, whose requests carry the cookie."""
    base = f"http://127.0.0.1:{explorer.port}/"
    user.page.goto(base)  # the test before has left it elsewhere
    runs = user.page.evaluate("fetch('/api/runs/search/run/?limit=1').then(a => a.text())")
    stranger.page = ATTACK.format(base=base, run=re.findall(r"[0-9a-f]{24}", runs)[0])
    user.answers.clear()
    wire = Wire(user)
    user.page.goto(f"http://{host}:{stranger.server_port}/")
    user.page.wait_for_function("document.title.startsWith('done')")
    assert user.page.title() == "done:"
    plain = ("form", "iframe", "img", "script", "style", "socket", "events", "simple", "post")
    preflighted = ("cors", "delete", "put")
    wanted, end = {by: {403} for by in plain + preflighted}, time.monotonic() + 10
    while wire.by() != wanted and time.monotonic() < end:
        user.page.wait_for_timeout(100)
    assert wire.by() == wanted
    user.show(explorer, "")
    after = user.page.evaluate("fetch('/api/projects/activity/').then(answer => answer.json())")
    assert (after["num_runs"], after["num_archived_runs"]) == (5, 0)


def test_it_may_be_forwarded_to_another_port(browser: Browser, explorer: Explorer):
    """As `ssh -L` does: the browser's port is not the explorer's."""
    with forwarded(explorer.port) as port:
        browser.page.goto(f"http://localhost:{port}/?token={explorer.token}")
        browser.page.get_by_text("Total runs: 5").wait_for()
        renamed = browser.page.evaluate(
            "fetch('/api/experiments/', {method: 'POST', body: JSON.stringify({name: 'new'}),"
            " headers: {'Content-Type': 'application/json'}}).then(answer => answer.status)"
        )
        assert renamed == 200
        assert browser.context.cookies()[0]["name"] == f"potstill-explorer-{port}"


def test_the_link_may_be_clicked_in_another_page(browser: Browser, explorer: Explorer, stranger):
    stranger.page = f'<a href="{explorer.link}">the link</a>'
    browser.page.goto(f"http://evil.test:{stranger.server_port}/")
    browser.page.get_by_text("the link").click()
    browser.page.get_by_text("Total runs: 5").wait_for()
    assert browser.page.url == f"http://127.0.0.1:{explorer.port}/"


@pytest.mark.slow
def test_a_training_and_a_search_that_have_just_run_are_shown(
    chromium, tiny_tree, cache_dir, ray_session, tmp_path: Path
):
    from potstill.config import compose
    from potstill.fit import fit
    from potstill.search import tune

    (tmp_path / "conf" / "search").mkdir(parents=True)
    (tmp_path / "conf" / "search" / "own.yaml").write_text(
        "# @package _global_\n"
        "search:\n"
        "  algorithm: random\n"
        "  scheduler: none\n"
        "  num_samples: 3\n"
        "  objectives: [val_top1_acc, parameters]\n"
        "  space:\n"
        "    optimizer.lr: {min: 1e-4, max: 1e-1, log: true}\n"
        "    model.channels: [2, 4]\n"
    )
    places = tiny_overrides(tiny_tree, cache_dir, tmp_path / "runs")
    places = [*(o for o in places if o != "tracking=none"), "tracking=aim"]
    fit(compose("train", [*places, "run.name=meadow"]))
    small = [o for o in places if not o.startswith(("model.", "loop."))]
    few = ["plugins=[search_parts]", "model=plugin", "model._target_=few_weights"]
    few += ["loop.epochs=1", "loop.batch_size=24"]
    tune(compose("tune", ["search=own", "run.name=hunt", *small, *few], str(tmp_path / "conf")))
    explorer = Explorer(tmp_path / "runs", "--port", "0", "--no-open", cwd=tmp_path)
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    try:
        user = Browser(context)
        user.page.goto(explorer.link)
        for look in (runs_are_listed, losses_are_drawn, predictions_are_shown, figures_are_drawn):
            look(user, explorer)
    finally:
        context.close()
        explorer.close()
