"""The chat page: its policy, and in a real browser everything that a person does with it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from anarcho_cli import chatting
from anarcho_cli.serving.access import LOOPBACK, Access
from anarcho_cli.serving.limits import Limits
from anarcho_cli.serving.page import content_policy
from anarcho_model.generate.sampling import SamplingConfig
from colours import contrast
from served import Served, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), context=256)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    """A server whose every answer has 40 tokens, or an untrained model would end some at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chatting, "role_token_ids", lambda *_, **__: (10**6,))
        defaults = SamplingConfig(max_new_tokens=40)
        with Served(model, access=Access(hosts=LOOPBACK), defaults=defaults) as server:
            yield server


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page in a browser that has never seen it; complaints of the browser fail the test."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], locale="en-GB")
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if "Security Policy" in message.text else None)
    page.set_default_timeout(10_000)
    page.goto(served.address)
    page.wait_for_selector(".dot.up")
    yield page
    served.slow_down(0)
    context.close()
    assert not complaints


def ask(page: Any, text: str) -> str:
    """Send a message and return the answer when it is complete."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.wait_for_selector("#regenerate")
    return page.locator("article.assistant .text").last.inner_text()


def answer_with(page: Any, text: str, *, finish: str = "stop") -> None:
    """Let the next answers be this text, in events of three characters."""
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    events = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def test_the_page_needs_no_key_and_its_policy_allows_its_own_code_alone(model: Path) -> None:
    with Served(model, access=Access(api_key="k")) as served:
        status, headers, text = served.ask_all("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = headers["content-security-policy"]
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert policy == content_policy()


def test_the_page_loads_nothing_from_elsewhere_and_writes_no_markup(served: Served) -> None:
    _, _, text = served.ask_all("GET", "/")
    links = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert links == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bFunction\(| on\w+=\"", text
    )


def test_an_answer_is_streamed_with_the_models_name_and_its_speed_and_survives_a_reload(page: Any) -> None:
    assert page.inner_text("#model") == page.title() == "tiny"
    answer = ask(page, "the whale")
    assert re.match(r"40 tokens · [\d.]+ tokens/s · cut at its length", page.inner_text("article.assistant .foot"))
    assert page.inner_text("article.user .text") == "the whale"
    page.reload()
    page.wait_for_selector("#regenerate")
    assert page.locator("article.assistant .text").inner_text() == answer


def test_stop_ends_an_answer_keeps_what_is_there_and_frees_the_slot(page: Any, served: Served) -> None:
    served.slow_down(0.1)
    for way in ("click", "Escape"):
        page.fill("#message", "the sea")
        page.press("#message", "Enter")
        page.wait_for_selector("article.writing .foot span")
        if way == "click":
            page.click("#stop")
        else:
            page.keyboard.press("Escape")
        page.wait_for_selector("#send")
        assert "stopped" in page.locator("article.assistant .foot").last.inner_text()
        assert served.idle_within(5)


def test_regenerate_replaces_the_last_answer_and_edit_the_last_question(page: Any) -> None:
    ask(page, "the whale")
    ask(page, "the ship")
    page.focus("#regenerate")
    page.keyboard.press("Enter")
    page.wait_for_selector("#regenerate")
    page.wait_for_selector("#message:focus")
    assert page.locator("article").count() == 4
    page.press("#message", "ArrowUp")
    page.locator(".edit textarea").press("Escape")
    assert page.locator(".edit").count() == 0
    page.click("#edit")
    assert page.input_value(".edit textarea") == "the ship"
    page.fill(".edit textarea", "the sea")
    page.press(".edit textarea", "Enter")
    page.wait_for_selector("#regenerate")
    assert page.locator("article.user .text").all_inner_texts() == ["the whale", "the sea"]


def test_settings_are_sent_and_kept(page: Any) -> None:
    page.click("#open-settings")
    page.fill("#system", "the ship")
    page.fill("#temperature", "0")
    page.fill("#top_p", "0.5")
    page.fill("#max_tokens", "3")
    page.click("dialog .main")
    page.reload()
    page.wait_for_selector(".dot.up")
    answer_with(page, "the sea", finish="length")
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "the whale")
    body = asked.value.post_data_json
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0, 0.5, 3)
    assert body["messages"] == [{"role": "system", "content": "the ship"}, {"role": "user", "content": "the whale"}]
    assert "cut at its length" in page.inner_text("article.assistant .foot")


def test_a_new_chat_is_empty_and_the_old_one_can_be_brought_back(page: Any) -> None:
    ask(page, "the whale")
    page.click("#new")
    assert page.locator("article").count() == 0
    assert page.is_visible("#empty")
    page.click("#undo")
    assert page.inner_text("article.user .text") == "the whale"


def test_what_the_model_writes_never_becomes_markup(page: Any) -> None:
    answer_with(page, "<img src=x onerror=alert(1)><script>alert(1)</script> [a](javascript:alert(1)) <b>x</b>")
    page.on("dialog", lambda _: pytest.fail("the model's text was run"))
    text = ask(page, "<i>me</i>")
    assert "<img src=x onerror=alert(1)><script>" in text
    assert page.locator("#log img, #log script, #log b, #log i, #log a").count() == 0


def test_paragraphs_lists_code_and_emphasis_become_their_nodes(page: Any) -> None:
    answer_with(
        page,
        "# Title\n\nSome **bold**, *slanted* and `a*b*c` text\nin two lines, 2 * 3 * 4.\n\n* one\n* two\n  1. inner\n  2. more\n\n"
        "```python\nif a < b:\n    **no**\n```\nend\n\n> said",
    )
    ask(page, "x")
    body = page.locator("article.assistant .text")
    assert body.locator("> ul > li").count() == 2
    assert body.locator("ul ol > li").all_inner_texts() == ["inner", "more"]
    assert body.locator("pre code").text_content() == "if a < b:\n    **no**"
    assert body.locator("strong").all_inner_texts() == ["bold"]
    assert body.locator("em").all_inner_texts() == ["slanted"]
    assert body.locator("p > code").inner_text() == "a*b*c"
    assert "2 * 3 * 4" in body.inner_text()
    assert (body.locator("h2").inner_text(), body.locator("blockquote").inner_text()) == ("Title", "said")
    body.locator("text=Copy").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == "if a < b:\n    **no**"


def test_turns_that_no_longer_fit_are_left_out_and_a_message_that_never_fits_is_explained(page: Any) -> None:
    for _ in range(5):
        ask(page, "the whale and the sea, " * 4)
    page.wait_for_selector("text=no longer fit")
    page.click("#new")
    page.fill("#message", "x" * 2000)
    page.press("#message", "Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "does not fit" in page.inner_text("#error-text")


def test_errors_are_explained_and_can_be_tried_again(page: Any) -> None:
    busy = '{"error": {"message": "too many clients at once"}}'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=503, body=busy, headers={"retry-after": "5", "content-type": "application/json"}
        ),
    )
    page.fill("#message", "the whale")
    page.press("#message", "Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "busy" in page.inner_text("#error-text")
    assert "5 s" in page.inner_text("#error-text")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.click("#retry")
    page.wait_for_selector("text=cannot be reached")
    page.unroute("**/v1/chat/completions")
    page.click("#retry")
    page.wait_for_selector("#regenerate")
    assert page.is_hidden("#error")


def test_a_key_is_asked_for_where_the_server_wants_one(browser: Any, model: Path) -> None:
    with Served(model, access=Access(api_key="secret"), limits=Limits()) as served:
        page = browser.new_page()
        page.goto(served.address)
        for key in ("wrong", "secret"):
            page.wait_for_selector("#settings[open] #key:focus")
            page.fill("#key", key)
            page.keyboard.press("Enter")
        page.wait_for_selector(".dot.up")
        ask(page, "the whale")
        assert page.evaluate("() => JSON.stringify(localStorage)").count("secret") == 0
        page.close()


def test_a_model_without_roles_continues_what_is_written(page: Any) -> None:
    model = {"object": "list", "data": [{"id": "tiny", "object": "model", "chat": False, "context_length": 64}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=model))
    page.reload()
    page.wait_for_selector("text=continues what you write")
    with page.expect_request("**/v1/completions") as asked:
        ask(page, "the whale")
    assert asked.value.post_data_json["prompt"] == "the whale"


def test_everything_has_a_name_for_screen_readers_and_nothing_overflows_on_a_phone(
    browser: Any, served: Served
) -> None:
    context = browser.new_context(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(served.address)
    ask(page, "x" * 150)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")].filter((node) => !(node.textContent.trim()
        || node.getAttribute("aria-label") || node.labels?.length)).map((node) => node.outerHTML)"""
    )
    assert unnamed == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.tap("#open-settings")
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 320
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them_in_both_colour_schemes(
    scheme: str, browser: Any, served: Served
) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(served.address)
    style = "(name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
    pairs = ["text/back", "text/bubble", "text/code", "quiet/back", "quiet/raised", "on-accent/accent", "bad/bad-back"]
    for text, behind in (pair.split("/") for pair in pairs):
        assert contrast(page.evaluate(style, text), page.evaluate(style, behind)) >= 4.5, (text, behind)
    for name in ("light", "dark", "auto"):
        page.click("#theme")
        assert ("system" if name == "auto" else name) in page.get_attribute("#theme", "aria-label")
    context.close()
