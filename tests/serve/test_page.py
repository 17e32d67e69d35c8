"""The chat page in a browser without a screen: streaming, stopping, settings, looks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tessel.generate.batcher import Batcher
from tessel.serve.command import Server
from tests.serve.conftest import until

pytestmark = pytest.mark.slow

Start = Callable[..., Server]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page of the common server; whatever it complains of, or asks elsewhere for, fails the test."""
    context = browser.new_context()
    found = context.new_page()
    problems: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    found.on("request", lambda r: problems.append(r.url) if not r.url.startswith((server.url, "data:")) else None)
    found.goto(server.url)
    found.wait_for_selector("#model[data-known=yes]")
    yield found
    context.close()
    assert [problem for problem in problems if "status of 400" not in problem] == []


def say(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def answers(page: Any, number: int) -> list[str]:
    until(lambda: page.evaluate(f"document.querySelectorAll('.assistant').length == {number} && !running"))
    return [one.inner_text() for one in page.query_selector_all(".assistant .text")]


def test_a_dialogue(page: Any) -> None:
    assert page.inner_text("#model") == "tiny"
    page.fill("#max_tokens", "20")
    page.fill("#temperature", "0")
    bodies: list[Any] = []
    page.on("request", lambda r: bodies.append(json.loads(r.post_data)) if r.method == "POST" else None)
    say(page, "the <b>dog</b>")
    (first,) = answers(page, 1)
    assert first and "20 tokens in" in page.inner_text("#facts")
    page.fill("#system", "be brief")
    page.fill("#seed", "7")
    say(page, "and the fox")
    assert answers(page, 2)[0] == first
    assert [one["role"] for one in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert bodies[1]["messages"][1]["content"] == "the <b>dog</b>", "text is no markup"
    assert (bodies[0].get("seed"), bodies[1]["seed"], bodies[1]["temperature"]) == (None, 7, 0)
    page.click("#clear")
    assert page.query_selector(".message") is None


def test_stopping_and_errors(page: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Batcher.step

    def slower(self: Batcher) -> Any:
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Batcher, "step", slower)
    page.fill("#max_tokens", "480")
    say(page, "the dog")
    until(lambda: page.evaluate("document.querySelector('.assistant .text')?.textContent.length > 5"))
    page.click("#send")
    (stopped,) = answers(page, 1)
    assert stopped and server.service.worker.num_texts <= 1
    page.evaluate("document.getElementById('max_tokens').value = 100000")
    with page.expect_response("**/v1/chat/completions"):
        say(page, "the fox")
    assert "at most 512" in page.inner_text(".error")
    assert page.input_value("#question") == "the fox", "what was not answered can be sent again"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ["", "plain"]),
        ("<think>\nso\n</think>\n\nyes", ["so", "yes"]),
        ("so</think>yes", ["so", "yes"]),
        ("<think>half", ["half", ""]),
    ],
)
def test_thoughts_are_folded(text: str, expected: list[str], page: Any) -> None:
    assert page.evaluate("parted", text) == expected
    page.evaluate("text => show(add('assistant', 'Model'), text)", text)
    assert page.is_visible("details.thought") == bool(expected[0])
    assert not page.is_visible("details.thought div"), "folded"


def test_a_key(browser: Any, start: Start) -> None:
    server = start("--api-key", "secret")
    page = browser.new_page()
    page.goto(server.url)
    until(lambda: "API key" in page.inner_text("#model"))
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.wait_for_selector("#model[data-known=yes]")
    page.close()


def test_looks(browser: Any, server: Server) -> None:
    for scheme, dark in (("light", False), ("dark", True)):
        page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme=scheme)
        page.goto(server.url)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colour[4:-1].split(","))) < 200) == dark
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is wider than a phone"
        assert not page.is_visible("#system")
        page.click("#open")
        assert page.is_visible("#system") and page.is_visible("#question")
        page.click("#theme")
        assert (page.evaluate("document.documentElement.dataset.theme") == "dark") != dark
        page.close()
