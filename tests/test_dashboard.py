"""The page of the web API, in a real Chromium, against the real server."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from conftest import eventually

pytest.importorskip("fastapi", reason="needs the extra [api]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "sb3_grpo_plugin" / "api" / "static"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Seconds: the page waits for a training
PATIENCE = 120
KEY = "a-key-of-this-test-only"
ACTIVE = ("queued", "running", "stopping")
HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, for example Debian's package chromium"),
    pytest.mark.slow,
]


class Server:
    """`sb3-grpo serve` in a process of its own."""

    def __init__(self, folder: Path, **variables: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = variables.get("SB3_GRPO_API_KEY", "")
        self.log = (folder / "log").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sb3_grpo_plugin", "serve", "--port", str(self.port), "--data-dir", str(folder / "data")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy", **variables},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
        eventually(self.healthy, 120)

    def healthy(self) -> bool:
        assert self.process.poll() is None, Path(self.log.name).read_text()
        try:
            return self.call("GET", "/health")["status"] == "ok"
        except OSError:
            return False

    def call(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(self.url + path, data, headers, method=method), timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def train(self, **body: Any) -> str:
        return str(self.call("POST", "/train", body)["job_id"])

    def status(self, job: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/training/{job}/status"))

    def ended(self, job: str) -> dict[str, Any]:
        eventually(lambda: self.status(job)["status"] not in ACTIVE, 180)
        return self.status(job)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without a key, with one trained CartPole model `ready`."""
    server = Server(tmp_path_factory.mktemp("server"))
    job = server.train(env_name="CartPole-v1", total_timesteps=2048, model_name="ready")
    assert server.ended(job)["status"] == "completed", server.status(job)
    yield server
    server.close()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key."""
    server = Server(tmp_path_factory.mktemp("locked"), SB3_GRPO_API_KEY=KEY)
    yield server
    server.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox needs user namespaces, which a container may not have
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One person's browser, and what went on in it."""

    def __init__(self, chromium: Any, url: str, **options: Any) -> None:
        self.context = chromium.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        # Tests share their machine with trainings
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        # Answers that a test asks for, which Chromium also writes to the console
        self.expected: tuple[str, ...] = ()
        self.page.on("request", lambda request: self.requests.append(request.url))
        # What the policy kept from being sent
        self.page.on("requestfailed", lambda request: self.requests.remove(request.url) if request.failure == "csp" else None)
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.violatedDirective, e.blockedURI))"
        )
        self.url = url

    def open(self) -> Any:
        self.page.goto(f"{self.url}/dashboard")
        self.page.locator("main:not([hidden])").wait_for()
        return self.page

    def close(self) -> None:
        self.context.close()
        assert {urlsplit(url).hostname for url in self.requests if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
        assert not [error for error in self.errors if not any(part in error for part in self.expected)]


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    """``visit(server, locale="ja-JP", ...)``. At the end: no request left loopback, no error, no breach of the policy."""
    visits: list[Visit] = []

    def make(server: Server, **options: Any) -> Visit:
        visits.append(Visit(chromium, server.url, **options))
        return visits[-1]

    yield make
    for one in visits:
        one.close()


def card(page: Any, name: str) -> Any:
    return page.locator(".job").filter(has=page.get_by_role("heading", name=name, exact=True))


def path_of(job: Any) -> str | None:
    line = job.locator(".chart .line").first
    return str(line.get_attribute("d")) if line.count() else None


def fits(page: Any) -> bool:
    """Whether nothing reaches beyond the right edge, be it hidden by `overflow` or not."""
    return bool(
        page.evaluate(
            """() => document.documentElement.scrollWidth <= innerWidth && [...document.querySelectorAll('body *')]
            .every((e) => e.closest('.skip, .hidden') || e.getBoundingClientRect().right <= innerWidth + 1)"""
        )
    )


def text_table(page: Any) -> dict[str, list[str]]:
    return dict(page.evaluate("import(document.querySelector('script[src]').src).then((module) => module.TEXT)"))


# ---- texts -----------------------------------------------------------------------------------------------------------------


def test_every_text_is_in_both_languages(server: Server, visit: Callable[..., Visit]) -> None:
    table = text_table(visit(server).open())
    for name, row in table.items():
        assert len(row) == 2 and all(text.strip() for text in row), name
        places = [sorted(re.findall(r"\{\w+\}", text)) for text in row]
        assert places[0] == places[1], name
    # Units, names, and what is nothing but values
    neutral = {"job_is", "percent", "megabytes", "kilobytes", "frame_text", "api_docs", "language"}
    for name in table.keys() - neutral:
        assert re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", table[name][1]), f"{name} is not Japanese: {table[name][1]}"
        assert re.fullmatch(r"[\x20-\x7e]+", table[name][0]), f"{name} is not English: {table[name][0]}"


def test_the_table_holds_what_the_page_says_and_nothing_else(server: Server, visit: Callable[..., Visit]) -> None:
    table = text_table(visit(server).open())
    script = (STATIC / "dashboard.js").read_text(encoding="utf-8")
    code = script[script.index("const LANGUAGES") :]
    html = (STATIC / "dashboard.html").read_text(encoding="utf-8")
    used = {*re.findall(r'data-text(?:-[\w-]+)?="(\w+)"', html), *re.findall(r'"data-text": "(\w+)"', code)}
    # Quoted words of the script that are rows: t("stop"), lock("session_over"), t(timer ? "pause" : "play")
    used |= set(re.findall(r'"(\w+)"', code)) & table.keys()
    statuses = {"queued", "running", "stopping", "completed", "stopped", "failed", "interrupted"}
    assert used | statuses == table.keys()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://", html)


def test_japanese(server: Server, visit: Callable[..., Visit]) -> None:
    page = visit(server, locale="ja-JP").open()
    assert page.evaluate("document.documentElement.lang") == "ja"
    page.get_by_role("heading", name="学習を始める").wait_for()
    page.get_by_text("完了", exact=True).first.wait_for()
    table = text_table(page)
    page.locator(".job summary").first.click()
    page.locator("#advanced summary").click()
    shown = page.evaluate("document.body.innerText").splitlines()
    english = {row[0] for row in table.values() if row[0] not in {other[1] for other in table.values()}}
    assert not english & {line.strip() for line in shown}
    page.get_by_role("button", name="English").click()
    assert page.evaluate("document.documentElement.lang") == "en"
    page.get_by_role("heading", name="Start a training").wait_for()
    page.get_by_text("completed", exact=True).first.wait_for()
    japanese = {row[1] for row in table.values()} - {row[0] for row in table.values()}
    assert not japanese & {line.strip() for line in page.evaluate("document.body.innerText").splitlines()}
    # The choice is kept
    page.reload()
    page.get_by_role("heading", name="Start a training").wait_for()


# ---- one training, from the form to the rollout ----------------------------------------------------------------------------


def test_train_watch_stop_and_use(server: Server, visit: Callable[..., Visit]) -> None:
    one = visit(server)
    one.expected = ("status of 422",)
    page = one.open()
    page.get_by_label("Environment", exact=True).fill("CartPole-v1")
    page.get_by_label("Steps", exact=True).fill("2000000")
    page.get_by_label("Model name", exact=True).fill("watched")
    page.locator("#advanced summary").click()
    page.get_by_label("Epochs", exact=True).fill("1")
    page.get_by_role("button", name="Start", exact=True).click()
    job = card(page, "watched")
    job.wait_for()

    # The bar and the curve move, and neither was asked for by the page twice
    bar = job.get_by_role("progressbar")
    eventually(lambda: path_of(job) and bar.evaluate("e => e.value") > 0, PATIENCE)
    bar_before, curve_before = bar.evaluate("e => e.value"), path_of(job)
    eventually(lambda: bar.evaluate("e => e.value") > bar_before and path_of(job) != curve_before, PATIENCE)
    assert job.locator(".badge").inner_text() == "running"
    assert float(job.locator(".numbers dd").first.inner_text()) > 0

    job.get_by_role("button", name="Stop watched").click()
    eventually(lambda: job.locator(".badge").inner_text() == "stopped", PATIENCE)
    assert job.get_by_role("button").count() == 0
    done = bar.evaluate("e => e.value")
    assert 0 < done < 1

    model = page.locator(".model").filter(has=page.get_by_role("heading", name="watched", exact=True))
    model.wait_for()
    with page.expect_download() as download:
        model.get_by_role("link", name="Download watched").click()
    assert Path(download.value.path()).read_bytes()[:2] == b"PK"

    model.get_by_role("button", name="Try watched").click()
    observation = page.get_by_label("Observation (JSON)")
    assert json.loads(observation.input_value()) == [0, 0, 0, 0]
    observation.fill("[0.0, 0.1, 0.02, -0.1]")
    page.get_by_role("button", name="Get the action").click()
    page.locator("#answer strong").wait_for()
    assert page.locator("#answer strong").inner_text() in ("0", "1")
    chances = [meter.evaluate("e => e.value") for meter in page.locator("#answer meter").all()]
    assert len(chances) == 2 and abs(sum(chances) - 1) < 1e-3

    # The same observation, wrong in three ways
    for text, message in (("[0, 0", "not JSON"), ("[1, 2]", "4"), ('"left"', "")):
        observation.fill(text)
        page.get_by_role("button", name="Get the action").click()
        said = page.locator("#try-form .message.bad")
        said.wait_for()
        assert message in said.inner_text()
        assert not page.locator("#answer").is_visible()


def test_rollout_plays(server: Server, visit: Callable[..., Visit]) -> None:
    page = visit(server).open()
    page.locator(".model").filter(has_text="ready").get_by_role("button", name="Try ready").click()
    page.get_by_role("button", name="Run an episode").click()
    page.locator("#player").wait_for()
    picture = "document.querySelector('#frame').toDataURL()"
    before = page.evaluate(picture)
    eventually(lambda: page.evaluate(picture) != before, PATIENCE)
    eventually(lambda: page.locator("#play").inner_text() == "Play", PATIENCE)
    steps, total = page.locator("#frame-text").inner_text().split(" / ")
    assert steps == total and int(total) > 5
    # The agent's pixels, not an empty canvas
    pixels = "document.querySelector('#frame').getContext('2d').getImageData(0, 0, 600, 400).data.buffer"
    assert page.evaluate(f"new Set(new Uint32Array({pixels})).size") > 3
    end = page.evaluate(picture)
    page.locator("#position").fill("0")
    assert page.evaluate(picture) != end
    assert page.locator("#frame").get_attribute("aria-label").startswith("Rendered episode of ready, frame 1 of")


def test_rollout_waits_where_motion_is_unwelcome(server: Server, visit: Callable[..., Visit]) -> None:
    page = visit(server, reduced_motion="reduce").open()
    page.locator(".model").filter(has_text="ready").get_by_role("button", name="Try ready").click()
    page.get_by_role("button", name="Run an episode").click()
    page.locator("#player").wait_for()
    time.sleep(0.5)
    assert page.locator("#frame-text").inner_text().startswith("1 /")
    page.get_by_role("button", name="Play").click()
    eventually(lambda: not page.locator("#frame-text").inner_text().startswith("1 /"), PATIENCE)
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_polls_when_there_is_no_stream(server: Server, visit: Callable[..., Visit]) -> None:
    one = visit(server)
    one.expected = ("net::ERR_FAILED",)
    one.page.route("**/events", lambda route: route.abort())
    job_id = server.train(env_name="CartPole-v1", total_timesteps=2_000_000, model_name="polled", n_epochs=1)
    try:
        page = one.open()
        job = card(page, "polled")
        bar = job.get_by_role("progressbar")
        eventually(lambda: path_of(job) and bar.evaluate("e => e.value") > 0, PATIENCE)
        bar_before, curve_before = bar.evaluate("e => e.value"), path_of(job)
        eventually(lambda: bar.evaluate("e => e.value") > bar_before and path_of(job) != curve_before, PATIENCE)
    finally:
        server.call("POST", f"/training/{job_id}/stop")
    eventually(lambda: job.locator(".badge").inner_text() == "stopped", PATIENCE)


def test_says_when_the_server_is_away(server: Server, visit: Callable[..., Visit]) -> None:
    one = visit(server)
    one.expected = ("net::ERR_FAILED",)
    page = one.open()
    page.get_by_text("0 running, 0 queued").wait_for()
    page.route("**/*", lambda route: route.abort())
    page.get_by_text("No answer from the server").wait_for()
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text("Name an environment").wait_for()
    page.get_by_label("Environment", exact=True).fill("CartPole-v1")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text("The server did not answer.").wait_for()
    page.unroute("**/*")
    page.get_by_text("0 running, 0 queued").wait_for()


def test_says_when_the_database_is_away(server: Server, visit: Callable[..., Visit]) -> None:
    one = visit(server)
    one.expected = ("status of 503",)
    queue = {"queued": None, "running": None, "limit": 100}
    health = {"status": "degraded", "version": "1", "queue": queue, "database": "down"}
    one.page.route("**/health", partial(fulfil, health))
    for path in ("**/training/jobs*", "**/models"):
        one.page.route(path, lambda route: route.fulfill(status=503, json={"detail": "The database does not answer"}))
    page = one.open()
    page.locator("#connection.bad").wait_for()
    assert page.locator("#connection").inner_text() == "The database does not answer"
    for path in ("**/health", "**/training/jobs*", "**/models"):
        page.unroute(path)
    page.get_by_text("0 running, 0 queued").wait_for()


def test_the_example_client(locked: Server) -> None:
    command = [sys.executable, str(ROOT / "examples" / "api_client.py"), "--url", locked.url, "--steps", "4096"]
    environ = {**os.environ, "SB3_GRPO_API_KEY": KEY}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    for words in ("episode reward", "completed after 4,096 steps", "SHA-256", "action", "probabilities"):
        assert words in done.stdout
    environ["SB3_GRPO_API_KEY"] = "not-the-key-of-this-test"
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1 and "401 The API key is wrong." in done.stderr


# ---- refusals --------------------------------------------------------------------------------------------------------------


def test_refusals_are_shown_where_they_belong(server: Server, visit: Callable[..., Visit]) -> None:
    one = visit(server)
    one.expected = ("status of 400", "status of 422", "status of 409")
    page = one.open()
    start = page.get_by_role("button", name="Start", exact=True)
    environment = page.get_by_label("Environment", exact=True)

    environment.fill("CartPole-v9")
    start.click()
    page.locator("#start-form .message.bad").filter(has_text="CartPole-v1").wait_for()

    environment.fill("CartPole-v1")
    page.locator("#advanced summary").click()
    rate = page.get_by_label("Learning rate", exact=True)
    rate.fill("1e9")
    page.locator("#advanced summary").click()
    start.click()
    # The field is opened, marked, described and has the focus
    page.locator("#learning_rate-error").wait_for()
    assert rate.get_attribute("aria-invalid") == "true"
    assert rate.get_attribute("aria-describedby") == "learning_rate-error"
    assert page.evaluate("document.activeElement.name") == "learning_rate"

    rate.fill("")
    page.get_by_label("Model name", exact=True).fill("../etc")
    start.click()
    page.locator("#model_name-error").wait_for()
    assert not page.locator("#learning_rate-error").count()


def test_a_reward_is_offered_where_it_fits(server: Server, visit: Callable[..., Visit]) -> None:
    rewards = server.call("GET", "/rewards")["rewards"]
    if not rewards:
        pytest.skip("no reward plugin is installed")
    page = visit(server).open()
    page.locator("option", has_text="/").first.wait_for(state="attached")
    page.get_by_label("Environment", exact=True).fill("CartPole-v1")
    offered = page.locator("#start-form select option").evaluate_all("options => options.map((o) => o.value).filter(Boolean)")
    assert offered == [reward["name"] for reward in rewards if reward["name"].startswith("classic/cartpole")]


def test_delete_asks_first(server: Server, visit: Callable[..., Visit]) -> None:
    job = server.train(env_name="CartPole-v1", total_timesteps=1024, model_name="unwanted")
    assert server.ended(job)["status"] == "completed"
    page = visit(server).open()
    delete = page.get_by_role("button", name="Delete unwanted")
    delete.click()
    assert page.evaluate("document.activeElement.textContent") == "Cancel"
    page.keyboard.press("Escape")
    delete.click()
    page.get_by_role("button", name="Cancel").click()
    assert delete.is_visible()
    delete.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.get_by_text("unwanted is deleted.").wait_for()
    delete.wait_for(state="detached")
    assert "unwanted" not in {model["name"] for model in server.call("GET", "/models")["models"]}


def fulfil(answer: Any, route: Any) -> None:
    route.fulfill(json=answer)


def hostile_answers(page: Any) -> None:
    """Let the server's answers hold markup everywhere, as if its own checks were broken."""
    space = {"type": "Dict", "spaces": {HOSTILE: {"type": "Discrete", "n": 2}}}
    job = {
        "job_id": HOSTILE,
        "status": "failed",
        "progress": 0.5,
        "current_timesteps": 5,
        "total_timesteps": 10,
        "start_time": HOSTILE,
        "end_time": None,
        "error_message": f"error {HOSTILE}",
        "env_name": f"env {HOSTILE}",
        "model_name": f"model {HOSTILE}",
        "reward_function_type": f"reward {HOSTILE}",
        "metrics": {f"metric {HOSTILE}": 1.0},
    }
    model = {
        "name": f"model {HOSTILE}",
        "env_name": f"env {HOSTILE}",
        "reward": f"reward {HOSTILE}",
        "total_timesteps": 1,
        "created": HOSTILE,
        "size": 1,
        "sha256": "",
        "mean_reward": 1.0,
        "observation_space": space,
        "action_space": space,
    }
    answers = {
        "**/training/jobs*": {"jobs": [job], "total": 1},
        "**/models": {"models": [model]},
        "**/environments": {"environments": [{"id": f"env {HOSTILE}", "group": HOSTILE, "renderable": True}]},
        "**/rewards": {"rewards": [{"name": f"reward {HOSTILE}", "envs": ["*"], "description": HOSTILE}]},
        "**/inference": {"action": HOSTILE, "action_probs": {HOSTILE: HOSTILE}, "value": None},
        "**/health": {"status": "ok", "version": HOSTILE, "queue": {"running": HOSTILE, "queued": 0, "limit": 1}},
    }
    for pattern, answer in answers.items():
        page.route(pattern, partial(fulfil, answer))
    page.route("**/curve", lambda route: route.fulfill(status=404, json={"detail": HOSTILE}))
    page.route("**/train", lambda route: route.fulfill(status=400, json={"detail": f"refused {HOSTILE}"}))
    page.route(
        "**/rollout*", lambda route: route.fulfill(status=400, json={"detail": [{"loc": [HOSTILE, HOSTILE], "msg": HOSTILE}]})
    )


@pytest.mark.parametrize("locale", ["en-US", "ja-JP"])
def test_markup_is_text(locale: str, server: Server, visit: Callable[..., Visit]) -> None:
    one = visit(server, locale=locale)
    one.expected = ("status of 400", "status of 404")
    hostile_answers(one.page)
    page = one.open()
    for prefix in ("error", "env", "model", "reward", "metric"):
        eventually(lambda prefix=prefix: f"{prefix} {HOSTILE}" in page.evaluate("document.body.textContent"), PATIENCE)
    page.locator("#start-form [name=env_name]").fill("CartPole-v1")
    page.locator("#start-form [type=submit]").click()
    page.locator("#start-form .message.bad").wait_for()
    assert f"refused {HOSTILE}" in page.locator("#start-form .message").inner_text()
    page.locator("#try-form [type=submit]").click()
    page.locator("#answer").wait_for()
    page.locator("#rollout-form [type=submit]").click()
    page.locator("#rollout-form .message.bad").wait_for()
    page.locator(".model button").last.click()
    page.locator("#confirm").wait_for()
    assert HOSTILE in page.locator("#confirm-text").inner_text()
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert page.evaluate("window.pwned") is None
    assert fits(page)


# ---- login -----------------------------------------------------------------------------------------------------------------


def test_login_and_logout(locked: Server, visit: Callable[..., Visit]) -> None:
    one = visit(locked)
    one.expected = ("status of 401",)
    page = one.open()
    field = page.get_by_label("API key")
    field.wait_for()
    # No link leads to what is hidden
    assert not page.locator("#app").is_visible() and page.locator("a:visible").count() == 0
    assert page.evaluate("document.activeElement.name") == "api_key"
    assert {urlsplit(url).path.split("/")[1] for url in one.requests} <= {"dashboard", "static", "session", "favicon.ico"}

    field.fill("not-the-key-of-this-test")
    page.keyboard.press("Enter")
    page.get_by_text("This is not the server's key.").wait_for()
    field.fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Jobs").wait_for()
    page.get_by_text("No training yet.").wait_for()
    page.get_by_text("No model yet.").wait_for()

    # What the browser keeps is out of a script's reach, and no address holds the key
    assert page.evaluate("document.cookie") == ""
    (cookie,) = one.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and KEY not in cookie["value"]
    assert page.evaluate("Object.values({...localStorage, ...sessionStorage}).join()") == ""
    assert not [url for url in one.requests if KEY in url]
    page.reload()
    page.get_by_role("heading", name="Jobs").wait_for()

    page.get_by_role("button", name="Log out").click()
    field.wait_for()
    page.reload()
    field.wait_for()
    assert not page.locator("#app").is_visible()


def test_a_session_that_ends_leads_back_to_the_login(locked: Server, visit: Callable[..., Visit]) -> None:
    one = visit(locked)
    one.expected = ("status of 401",)
    page = one.open()
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Jobs").wait_for()
    one.context.clear_cookies()
    page.get_by_text("The session is over.").wait_for()
    assert not page.locator("#app").is_visible()


# ---- anybody can use it ----------------------------------------------------------------------------------------------------


def test_keyboard_alone(server: Server, visit: Callable[..., Visit]) -> None:
    page = visit(server).open()
    page.get_by_text("0 running, 0 queued").wait_for()
    keys = page.keyboard

    def tab_to(condition: str, limit: int = 80) -> None:
        for _ in range(limit):
            keys.press("Tab")
            if page.evaluate(f"(e => {condition})(document.activeElement)"):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", "the focus is not to be seen"
                return
        raise AssertionError(f"{condition} cannot be reached by Tab")

    tab_to("e.name === 'env_name'")
    keys.type("CartPole-v1")
    tab_to("e.name === 'total_timesteps'")
    keys.type("2000000")
    tab_to("e.name === 'model_name'")
    keys.type("typed")
    keys.press("Enter")
    card(page, "typed").wait_for()
    tab_to("e.getAttribute('aria-label') === 'Stop typed'")
    keys.press("Enter")
    eventually(lambda: card(page, "typed").locator(".badge").inner_text() == "stopped", PATIENCE)
    # The button that had the focus is gone; the focus is still in the job
    assert page.evaluate("document.activeElement.closest('.job') !== null")


def test_no_keyboard_trap_and_every_control_has_a_name(server: Server, visit: Callable[..., Visit]) -> None:
    page = visit(server).open()
    page.locator(".job").first.wait_for()
    page.locator(".model").first.wait_for()
    controls = page.locator("a[href], button, input, select, textarea, summary").filter(visible=True)
    wanted = controls.count()
    seen = set()
    for _ in range(wanted + 20):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    # All of them once around; a control counts when it is in sight or the skip link
    assert len(seen) >= wanted
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('a[href], button, input, select, textarea, progress, meter, canvas, svg')]
        .filter((e) => e.checkVisibility() && !(e.labels?.[0]?.textContent.trim() || e.getAttribute('aria-label')
            || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    identifiers = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(identifiers) == len(set(identifiers))
    assert page.locator("[role=status]").count() >= 5


@pytest.mark.parametrize("locale", ["en-US", "ja-JP"])
@pytest.mark.parametrize("width", [320, 400, 768])
def test_narrow(width: int, locale: str, server: Server, visit: Callable[..., Visit]) -> None:
    page = visit(server, locale=locale, viewport={"width": width, "height": 800}).open()
    page.locator(".model").filter(has_text="ready").get_by_role("button").first.click()
    page.locator("#try-form [type=submit]").click()
    page.locator("#answer strong").wait_for()
    page.locator("#advanced summary").click()
    card(page, "ready").locator("summary").click()
    card(page, "ready").locator(".charts .chart").first.wait_for()
    assert fits(page)


CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const back = (e) => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  const poor = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest('.skip, .hidden, :disabled')) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(parse(e.closest('svg') ? style.fill : style.color)), light(back(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([walk.currentNode.data, (a + 0.05) / (b + 0.05)]);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, server: Server, visit: Callable[..., Visit]) -> None:
    one = visit(server, color_scheme=scheme)
    one.expected = ("status of 400",)
    page = one.open()
    page.locator("#start-form [name=env_name]").fill("CartPole-v9")
    page.locator("#start-form [type=submit]").click()
    page.locator("#start-form .message.bad").wait_for()
    page.locator(".job summary").first.click()
    # Every colour of a badge, not only those of the jobs that are there
    for status in ("queued", "running", "stopping", "completed", "stopped", "failed", "interrupted"):
        page.evaluate("status => { document.querySelector('.job').dataset.status = status; }", status)
        assert page.evaluate(CONTRAST) == []
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", back)[0]) > 128) == (scheme == "light")


def test_a_hidden_page_holds_no_connection(server: Server, visit: Callable[..., Visit]) -> None:
    one = visit(server)
    page = one.open()
    page.get_by_text("0 running, 0 queued").wait_for()
    page.evaluate(
        """() => { Object.defineProperty(document, 'hidden', {get: () => window.away, configurable: true}); window.away = true;
        document.dispatchEvent(new Event('visibilitychange')); }"""
    )
    time.sleep(1)
    before = len(one.requests)
    time.sleep(6)
    assert len(one.requests) == before
    page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    eventually(lambda: len(one.requests) > before, PATIENCE)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_documents_of_the_interface_need_no_network(path: str, server: Server, visit: Callable[..., Visit]) -> None:
    one = visit(server)
    # ReDoc's footer asks for a logo, which the policy refuses
    one.expected = ("cdn.redoc.ly", "CSP img-src")
    page = one.page
    page.goto(server.url + path)
    page.get_by_text("/training/{job_id}/status").first.wait_for()
