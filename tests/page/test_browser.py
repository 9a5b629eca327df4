"""The page in Chromium, as a person uses it. Leaves pictures of it in tests/screenshots/.

The README's picture is made by the one test here that needs the real base and its adapter:

    pytest -m slow tests/page/test_browser.py
"""

from __future__ import annotations

import io
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.page.about import describe_limits
from llama_adapter.page.compare_tab import Compared
from llama_adapter.page.display import typed
from llama_adapter.page.experts import load_experts
from llama_adapter.page.layout import build_page
from llama_adapter.page.server import serve
from llama_adapter.page.suggestions import PICTURE_EXAMPLES, SCIENCE_EXAMPLES, TEXT_EXAMPLES
from llama_adapter.page.wiring import PEOPLE
from llama_adapter.surface.named_adapters import AUTO
from tests.compared import build_results
from tests.conftest import CHECKOUT
from tests.drawn import png
from tests.scripted import ScriptedModel, build_scripted_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: install the extra 'test'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.usefixtures("uploads"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

SCREENSHOTS = CHECKOUT / "tests" / "screenshots"
HOSTILE = (
    "<script>document.title='owned'</script> <img src=x onerror=\"document.title='owned'\"> "
    "<b>bold</b> &lt;i&gt; ![p](http://x.invalid/p.png) [link](javascript:alert(1))\n\n"
    "```mermaid\ngraph TD; A-->B\n```"
)


@contextmanager
def _served(
    model: LlamaAdapter, experts: dict[str, str], comparison: Compared | None = None
) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = build_page(model, experts, comparison=comparison)
    try:
        yield serve(page, host="127.0.0.1", port=port)
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return build_scripted_model(seeing=("eyes",), delay=0.02)


@pytest.fixture(scope="module")
def address(model: ScriptedModel) -> Iterator[str]:
    lines = {name: f"About *{name}*, with a <b>tag</b>." for name in [*model.adapters, NO_ADAPTER]}
    comparison = Compared(
        build_results(),
        {"prompts": [(1, 2.5), (2, 2.0)], "prompts+lora": [(1, 2.25), (2, 1.5)]},
        {"prompts": "one", "prompts+lora": "two"},
        {},
    )
    with _served(model, lines, comparison) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--use-fake-device-for-media-stream",  # a camera that films a green clock
            ],
        )
        yield chromium
        chromium.close()


@contextmanager
def _opened(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """A page in a browser of its own; a request to another host or an error in it fails the test."""
    context = browser.new_context(**options)
    context.grant_permissions(["camera", "clipboard-read", "clipboard-write"])
    context.set_default_timeout(60_000)
    page = context.new_page()
    wrong: list[str] = []

    def check_request(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(request.url)

    page.on("request", check_request)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name=TEXT_EXAMPLES[0].text).wait_for()
    yield page
    context.close()
    assert wrong == []


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with _opened(browser, address, viewport={"width": 1200, "height": 900}) as page:
        yield page


def _shoot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def _answer(page: Page, number: int = -1) -> Locator:
    """An answer without its note, the latest one by default."""
    return page.get_by_test_id("bot").filter(has_not_text="tokens/s").nth(number)


def _ask(page: Page, text: str, box: str = "Ask something") -> None:
    page.get_by_placeholder(box).fill(text)
    page.get_by_placeholder(box).press("Enter")


def _send(page: Page) -> Locator:
    return page.get_by_test_id("submit-button").locator("visible=true")


def _choose(page: Page, adapter: str) -> None:
    page.get_by_role("combobox", name="Adapter").click()
    page.get_by_role("option", name=re.compile(rf"^{adapter}\b")).click()


def _stop(page: Page) -> None:
    page.get_by_role("button", name="Stop").click()
    _send(page).wait_for()


def _attach(page: Page, name: str, content: bytes, mime: str = "image/png") -> None:
    """Choose a file with the paper clip."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a file").click()
    chooser.value.set_files({"name": name, "mimeType": mime, "buffer": content})


def _drop(target: Locator, kind: str, content: bytes) -> None:
    """Let a picture be dropped somewhere, or pasted there."""
    target.evaluate(
        """(box, [kind, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "image.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true};
            box.dispatchEvent(kind == "drop"
                ? new DragEvent(kind, {...options, dataTransfer: data})
                : new ClipboardEvent(kind, {...options, clipboardData: data}));
        }""",
        [kind, list(content)],
    )


def _thumbnails(page: Page) -> Locator:
    """The pictures in the box."""
    return page.get_by_label("File thumbnail")


def _pictures(page: Page) -> Locator:
    """The pictures in the chat."""
    return page.get_by_test_id("user").locator("img")


def _finished(page: Page, tokens: int = 48) -> None:
    """Wait for the end of an answer that `_shorten` limits."""
    playwright.expect(page.get_by_test_id("bot").last).to_contain_text(f"{tokens} tokens · ")
    playwright.expect(_send(page)).to_be_visible()


def _shorten(page: Page, tokens: int = 48) -> None:
    """Ask in the settings for answers of another length, mostly shorter ones."""
    page.get_by_role("button", name="How the answer is made").click()
    number = page.get_by_label("number input for Longest answer")
    slider = page.get_by_label("range slider for Longest answer")
    while True:  # what is typed in before the slider has come to life is lost; pytest ends a test that hangs
        number.fill(str(tokens))
        number.press("Tab")
        page.wait_for_timeout(100)
        if slider.input_value() == str(tokens):
            break


def test_an_example_is_answered_at_the_first_click(page: Page) -> None:
    _shoot(page, "empty")
    page.get_by_role("button", name=TEXT_EXAMPLES[0].text).click()
    playwright.expect(_answer(page)).to_contain_text(f"one heard: {TEXT_EXAMPLES[0].text}")
    playwright.expect(page.get_by_test_id("bot").last).to_contain_text(
        re.compile(r"\d+ tokens · [\d.]+ tokens/s · one")
    )
    _finished(page, 256)  # it may have ended before a click on Stop
    _shoot(page, "chat")


def test_an_answer_grows_and_stops_at_once(page: Page, model: ScriptedModel) -> None:
    _ask(page, "Count")
    playwright.expect(page.get_by_placeholder("Ask something")).to_have_value("")
    playwright.expect(_answer(page)).to_contain_text("1 2 3")
    first = _answer(page).inner_text()
    playwright.expect(_answer(page)).to_contain_text("10 11 12")
    assert _answer(page).inner_text().startswith(first.strip())
    _stop(page)
    said, made = _answer(page).inner_text().split(), model.made
    time.sleep(0.5)
    assert model.made <= made + 2
    shown = _answer(page).inner_text().split()  # what was on its way may still have come
    assert shown[: len(said)] == said and len(shown) <= len(said) + 2


def test_a_closed_tab_stops_the_work(browser: Browser, address: str, model: ScriptedModel) -> None:
    with _opened(browser, address) as page:
        _ask(page, "Count")
        playwright.expect(_answer(page)).to_contain_text("1 2 3")
    time.sleep(0.5)
    made = model.made
    time.sleep(0.5)
    assert model.made == made


def test_retry_undo_edit_and_clear(page: Page) -> None:
    _shorten(page)
    _ask(page, "First")
    _finished(page)
    _choose(page, "two")
    playwright.expect(page.locator("#line")).to_have_text("About two, with a <\u2060b>tag<\u2060/b>.")
    page.get_by_role("button", name="Retry").click()
    playwright.expect(_answer(page)).to_contain_text("two heard: First")
    _finished(page)
    page.get_by_role("button", name="Edit").click()
    page.locator("textarea.edit-textarea").fill("Second")
    page.locator(".message-buttons").get_by_role("button", name="Submit").click()
    playwright.expect(_answer(page)).to_contain_text("two heard: Second")
    _finished(page)
    _ask(page, "Third")
    playwright.expect(page.get_by_test_id("user")).to_have_count(2)
    playwright.expect(_answer(page)).to_contain_text("two heard: Third")
    _finished(page)
    page.get_by_role("button", name="Undo").click()
    playwright.expect(page.get_by_placeholder("Ask something")).to_have_value("Third")
    playwright.expect(page.get_by_test_id("user")).to_have_count(1)
    page.get_by_role("button", name="Clear").locator("visible=true").click()
    playwright.expect(page.get_by_role("button", name=TEXT_EXAMPLES[0].text)).to_be_visible()


def test_the_bare_base_can_be_chosen(page: Page) -> None:
    _choose(page, "none")
    playwright.expect(page.locator("#line")).to_contain_text("About none")
    _ask(page, "Who?")
    playwright.expect(_answer(page)).to_contain_text("none heard: Who?")
    playwright.expect(page.get_by_test_id("bot").last).to_contain_text("bare base")
    _stop(page)


def test_side_by_side(page: Page) -> None:
    page.get_by_role("tab", name="Side by side").click()
    page.get_by_role("button", name=TEXT_EXAMPLES[1].text).click()
    for number, name in enumerate((NO_ADAPTER, "one")):
        playwright.expect(_answer(page, number)).to_contain_text(f"{name} heard: {TEXT_EXAMPLES[1].text}")
    playwright.expect(_answer(page, 1)).to_contain_text("1 2 3")
    _shoot(page, "side-by-side")
    _stop(page)


def test_a_row_of_a_comparison_chats_with_its_adapter(page: Page) -> None:
    page.get_by_role("tab", name="Compare", exact=True).click()
    table = page.locator("#compared")
    first = table.get_by_role("gridcell").first
    playwright.expect(first).to_contain_text("prompts+lora")
    playwright.expect(page.locator("#charts svg")).to_have_count(4)
    _shoot(page, "compare")
    page.get_by_role("combobox", name="Best first by").click()
    page.get_by_role("option", name="parameters").click()
    playwright.expect(first).to_have_text("prompts")
    table.get_by_role("gridcell", name="full").click()
    playwright.expect(page.get_by_text("The adapter of full is not loaded here.")).to_be_visible()
    table.get_by_role("gridcell", name="prompts+lora").click()
    playwright.expect(page.get_by_role("combobox", name="Adapter")).to_have_value("two")
    _ask(page, "Who?")
    playwright.expect(_answer(page)).to_contain_text("two heard: Who?")


def test_html_is_text_in_question_and_answer_and_on_the_clipboard(page: Page) -> None:
    _shorten(page, 400)
    _ask(page, HOSTILE)
    _finished(page, 400)
    for said in (page.get_by_test_id("user").last, _answer(page)):
        playwright.expect(said).to_contain_text("script>document.title='owned'")
        playwright.expect(said).to_contain_text("lt;i")
        assert said.locator("script, img, b, i, svg:not(button svg)").count() == 0
        assert said.locator("a[href^=javascript]").count() == 0
    assert page.title() == "LLaMA-Adapter"
    page.get_by_role("button", name="Copy message").last.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"one heard: {HOSTILE}")
    assert "tokens/s" not in copied
    page.get_by_role("button", name="Copy conversation").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"user: {HOSTILE}\n\nassistant: one heard: {HOSTILE}")
    assert not re.search("tokens/s|assistant: $|[\u2060\u2063]", copied)
    _shoot(page, "hostile")


def test_a_question_that_is_too_long_or_empty_is_told(page: Page) -> None:
    _ask(page, " ")
    playwright.expect(page.get_by_text("the question is empty")).to_be_visible()
    _shoot(page, "warning")
    playwright.expect(_send(page)).to_be_visible()
    _ask(page, "x" * 8001)
    playwright.expect(page.get_by_text("8,001 characters; shorten it to 8,000")).to_be_visible()
    playwright.expect(page.get_by_placeholder("Ask something")).to_have_value("x" * 8001)


def test_dots_move_until_the_first_word(page: Page, model: ScriptedModel) -> None:
    with pytest.MonkeyPatch.context() as patch:  # undone even if the test fails: all tests share the model
        patch.setattr(model, "held", True)
        _ask(page, "Count")
        dots = page.get_by_label("Loading response")
        playwright.expect(dots).to_be_visible()
        page.wait_for_timeout(1500)  # until all that the question set off is over
        playwright.expect(dots).to_be_visible(timeout=1)
        _shoot(page, "waiting")
    playwright.expect(_answer(page)).to_contain_text("1 2 3")
    playwright.expect(dots).to_have_count(0)
    _stop(page)


def test_a_picture_is_shown_above_its_question_and_known_afterwards(page: Page) -> None:
    _choose(page, "eyes")
    _shorten(page)
    _attach(page, "<img src=x onerror=document.title='owned'>.png", png("#204060", (320, 240)))
    _thumbnails(page).wait_for()
    page.get_by_placeholder("Ask something").fill("What is it?")
    _shoot(page, "picture-attached")
    page.get_by_placeholder("Ask something").press("Enter")
    playwright.expect(_answer(page)).to_contain_text("saw: #204060")
    playwright.expect(_thumbnails(page)).to_have_count(0)
    playwright.expect(_pictures(page)).to_have_js_property("naturalWidth", 320)
    assert page.get_by_test_id("user").evaluate_all("all => all.map(one => one.innerText.trim())") == [
        "",
        "What is it?",
    ]
    _finished(page)
    _ask(page, "And now?")
    playwright.expect(_answer(page)).to_contain_text("eyes heard: And now?")
    playwright.expect(_answer(page)).to_contain_text("saw: #204060")
    _finished(page)
    _shoot(page, "picture")
    _choose(page, "one")
    _ask(page, "You too?")
    playwright.expect(page.get_by_text("made without the picture")).to_be_visible()
    _finished(page)
    page.get_by_role("button", name="Copy conversation").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("user: (a picture)\n\nuser: What is it?\n\nassistant: eyes heard")
    _choose(page, "eyes")
    page.get_by_role("button", name="Edit").first.click()
    page.locator("textarea.edit-textarea").fill("What else?")
    page.locator(".message-buttons").get_by_role("button", name="Submit").click()
    playwright.expect(_answer(page)).to_contain_text("eyes heard: What else?")
    playwright.expect(_answer(page)).to_contain_text("saw: #204060")
    _finished(page)
    page.get_by_role("button", name="Undo").click()
    playwright.expect(page.get_by_placeholder("Ask something")).to_have_value("What else?")
    playwright.expect(_thumbnails(page)).to_have_count(1)
    assert page.title() == "LLaMA-Adapter"


def test_a_picture_can_be_dropped_anywhere_pasted_and_taken(page: Page) -> None:
    _choose(page, "eyes")
    _drop(page.locator("#chat"), "drop", png("#ff0000", (320, 240)))
    playwright.expect(_thumbnails(page)).to_have_count(1)
    _drop(page.get_by_placeholder("Ask something"), "drop", png("#0000ff", (320, 240)))
    playwright.expect(_thumbnails(page)).to_have_count(2)
    page.get_by_role("button", name="Remove file").or_(page.locator(".delete-button")).last.click()
    playwright.expect(_thumbnails(page)).to_have_count(1)
    _drop(page.get_by_placeholder("Ask something"), "paste", png("#0000ff", (320, 240)))
    playwright.expect(_thumbnails(page)).to_have_count(2)
    page.get_by_role("button", name="Take a photo").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("[...document.querySelectorAll('video')].some(video => video.videoWidth > 0)")
    page.get_by_role("button", name="capture photo").click()
    playwright.expect(_thumbnails(page)).to_have_count(3)
    _shoot(page, "photo")
    _ask(page, "What are they?")
    playwright.expect(_answer(page)).to_contain_text(re.compile("saw: #ff0000 #0000ff #0.[6-9a-f].0."))
    playwright.expect(_pictures(page)).to_have_count(3)
    boxes = [picture.bounding_box() for picture in _pictures(page).all()]
    assert len({box["y"] for box in boxes if box}) == 1, "several are beside each other"
    assert all(box and box["height"] < 100 for box in boxes), "and small"
    _stop(page)


def test_an_example_with_a_picture_is_answered_at_the_first_click(page: Page) -> None:
    _choose(page, "eyes")
    example = page.get_by_role("button", name=PICTURE_EXAMPLES[0].text)
    playwright.expect(example.locator("img")).to_have_js_property("naturalWidth", 256)
    _shoot(page, "picture-examples")
    example.click()
    playwright.expect(_answer(page)).to_contain_text("saw: #")
    playwright.expect(_pictures(page)).to_have_js_property("naturalWidth", 256)
    _stop(page)
    page.get_by_role("button", name="Clear").locator("visible=true").click()
    _choose(page, "one")
    playwright.expect(page.get_by_role("button", name=TEXT_EXAMPLES[3].text)).to_be_visible()
    playwright.expect(example).to_have_count(0)


@pytest.mark.parametrize(
    ("adapter", "name", "content", "told"),
    [
        ("one", "red.png", png("red", (320, 240)), "adapter 'one' can't see pictures"),
        ("eyes", "text.png", b"some text", "text.png: not a picture"),
        ("eyes", "drawn.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not supported"),
    ],
)
def test_a_picture_that_is_of_no_use_is_told_and_stays_in_the_box(
    adapter: str, name: str, content: bytes, told: str, page: Page
) -> None:
    _choose(page, adapter)
    _attach(page, name, content, "image/svg+xml" if name.endswith("svg") else "image/png")
    _thumbnails(page).wait_for()
    _ask(page, "What is it?")
    playwright.expect(page.get_by_text(told)).to_be_visible()
    playwright.expect(page.get_by_placeholder("Ask something")).to_have_value("What is it?")
    playwright.expect(_thumbnails(page)).to_have_count(1)
    assert page.get_by_test_id("user").count() == 0


def test_side_by_side_the_base_is_not_shown_the_picture(page: Page) -> None:
    _choose(page, "eyes")
    page.get_by_role("tab", name="Side by side").click()
    _attach(page, "green.png", png("#00ff00", (320, 240)))
    _thumbnails(page).wait_for()
    _ask(page, "What is it?", "Ask both the same")
    playwright.expect(_answer(page, 1)).to_contain_text("saw: #00ff00")
    playwright.expect(page.get_by_text("The bare base cannot see pictures, so it was not")).to_be_visible()
    playwright.expect(page.locator("#question img")).to_have_count(1)
    asked = page.locator("#question").bounding_box()
    for side in (page.get_by_label("Left").first, page.get_by_label("Right").first):
        below = side.bounding_box()
        assert asked and below and asked["y"] + asked["height"] <= below["y"]
    _shoot(page, "side-by-side-picture")
    _stop(page)


def test_a_question_with_options(page: Page) -> None:
    page.get_by_role("tab", name="ScienceQA").click()
    page.get_by_role("combobox", name="An example").click()
    example = SCIENCE_EXAMPLES[0]
    page.get_by_role("option", name=example.text).click()
    box = page.get_by_placeholder("Attach a picture if it is about one")
    playwright.expect(box).to_have_value(example.text)
    playwright.expect(page.get_by_label("Options")).to_have_value("\n".join(example.options))
    page.get_by_label("Options").fill("cat\nhen\n<b>dog</b>")
    box.press("Enter")
    for option in ("(A) cat", "(B) hen", "(C) <b>dog</b>"):
        playwright.expect(page.get_by_text(option).last).to_be_visible()
    playwright.expect(page.locator("#science-note")).to_contain_text("one answered.")
    _shoot(page, "science")
    page.get_by_label("Options").fill("only one")
    box.press("Enter")
    playwright.expect(page.get_by_text("1 options; expected 2 to 5")).to_be_visible()


def test_a_question_with_options_and_a_picture(page: Page) -> None:
    _choose(page, "eyes")
    page.get_by_role("tab", name="ScienceQA").click()
    page.get_by_role("combobox", name="An example").click()
    page.get_by_role("option", name=SCIENCE_EXAMPLES[-1].text).click()
    playwright.expect(_thumbnails(page)).to_have_count(1)
    page.get_by_role("button", name="Answer", exact=True).click()
    playwright.expect(page.get_by_text("(A) triangle").last).to_be_visible()
    _shoot(page, "science-picture")


def test_look_inside(page: Page) -> None:
    page.get_by_role("tab", name="Look inside").click()
    gates = page.get_by_role("img", name=re.compile(r"tanh\(gate\) of 3 layers with 4 heads"))
    playwright.expect(gates.locator("rect")).to_have_count(12)
    playwright.expect(page.get_by_text("Ask something in the chat")).to_be_visible()
    page.get_by_role("tab", name="Chat").click()
    _shorten(page)
    _ask(page, "<b>Why</b>?")
    _finished(page)
    page.get_by_role("tab", name="Look inside").click()
    answer = page.get_by_role("img", name=re.compile("Heat map of 3 layers and"))
    playwright.expect(answer.locator("rect").first).to_be_visible()
    playwright.expect(page.get_by_text("one answered “<b>Why</b>?”")).to_be_visible()
    assert "token on: " in str(answer.locator("rect title").first.text_content())
    _shoot(page, "inside")
    _choose(page, "none")
    playwright.expect(page.get_by_text("The bare base has no prompts and no gates")).to_be_visible()
    playwright.expect(gates).to_have_count(0)


def test_a_question_waits_its_turn_and_code_is_drawn_as_code(page: Page, model: ScriptedModel) -> None:
    _shorten(page, 112)
    _ask(page, "Mend this:\ndef add(a, b):\n    return a * b * 2\nThanks.")
    playwright.expect(_answer(page)).to_contain_text("one heard")
    with pytest.MonkeyPatch.context() as patch:  # the first answer does not end before the second question
        patch.setattr(model, "held", True)
        _ask(page, "Second")
        playwright.expect(page.get_by_text("Next: “Second”")).to_be_visible()
        _shoot(page, "next")
    playwright.expect(page.get_by_test_id("user").last).to_have_text("Second")
    playwright.expect(page.get_by_text("Next: ")).to_have_count(0)
    _finished(page, 112)
    playwright.expect(page.get_by_text("112 tokens")).to_have_count(2)
    for said in (page.get_by_test_id("user").first, _answer(page, 0)):
        assert said.locator("pre code").inner_text().rstrip() == "def add(a, b):\n    return a * b * 2"
        assert said.locator("em").count() == 0
    page.get_by_role("button", name="Copy message").first.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "Mend this:\ndef add(a, b):\n    return a * b * 2\nThanks."


def test_chats_survive_a_reload_and_can_be_saved(page: Page) -> None:
    _shorten(page)
    _choose(page, "eyes")
    _drop(page.locator("#chat"), "drop", png("#204060", (320, 240)))
    _thumbnails(page).wait_for()
    _ask(page, "What is it?")
    _finished(page)
    page.get_by_role("button", name="New chat").click()
    playwright.expect(page.get_by_role("button", name=TEXT_EXAMPLES[2].text)).to_have_count(0)
    _ask(page, "Second chat")
    _finished(page)
    page.wait_for_timeout(500)  # what is to be kept comes after the answer
    page.reload()
    playwright.expect(page.get_by_test_id("user")).to_have_text(["Second chat"])
    playwright.expect(page.get_by_role("combobox", name="Adapter")).to_have_value("eyes")
    _shorten(page)
    page.get_by_role("combobox", name="Your chats").click()
    page.get_by_role("option", name="What is it?").click()
    playwright.expect(_pictures(page)).to_have_js_property("naturalWidth", 320)
    playwright.expect(page.get_by_test_id("bot").last).to_contain_text("eyes · cut off at the length limit")
    _ask(page, "And now?")
    playwright.expect(_answer(page)).to_contain_text("saw: #204060")
    _finished(page)
    page.get_by_role("button", name="Save or delete this chat").click()
    for kind, start in (("Markdown", "# What is it?"), ("JSON", "{")):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save as {kind}").click()
        assert download.value.path().read_text().startswith(start)
    page.get_by_role("button", name="Delete this chat", exact=True).click()
    playwright.expect(page.get_by_test_id("user")).to_have_text(["Second chat"])
    page.wait_for_timeout(500)
    page.reload()
    page.get_by_role("combobox", name="Your chats").click()
    playwright.expect(page.get_by_role("option")).to_have_count(1)


def test_who_has_to_wait_sees_the_place_in_the_queue(browser: Browser, address: str) -> None:
    with _opened(browser, address) as page:
        for _ in range(PEOPLE + 1):
            httpx.post(f"{address}gradio_api/call/v2/answer", json={"message": "Hi", "max_new_tokens": 200})
        _ask(page, "And I?")
        playwright.expect(page.get_by_text("queue: 2/2")).to_be_visible()
        _shoot(page, "queue")
        playwright.expect(_answer(page)).to_contain_text("one heard: And I?")
        _stop(page)


def test_two_people_are_answered_at_once_and_do_not_see_each_other(
    browser: Browser, address: str, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "delay", 0.1)
    with _opened(browser, address) as mine, _opened(browser, address) as theirs:
        _shorten(mine, 1024)
        _ask(mine, "Mine")
        playwright.expect(_answer(mine)).to_contain_text("1 2 3")
        _ask(theirs, "Theirs")
        playwright.expect(_answer(theirs)).to_contain_text("one heard: Theirs")
        playwright.expect(mine.get_by_role("button", name="Stop")).to_be_visible()
        _stop(theirs)
        said = _answer(mine).inner_text()
        playwright.expect(_answer(mine)).not_to_have_text(said)
        for page, name in ((mine, "Mine"), (theirs, "Theirs")):
            playwright.expect(_answer(page)).to_contain_text(f"one heard: {name}")
            playwright.expect(page.get_by_test_id("user")).to_have_count(1)
        _stop(mine)


def test_everything_that_can_be_used_has_a_name(page: Page) -> None:
    """What a screen reader says of a button, a field or a slider."""
    page.get_by_role("button", name="How the answer is made").click()
    page.get_by_role("button", name="Take a photo").click()
    for tab in ("Chat", "Side by side", "ScienceQA", "Look inside"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
        spoken = page.locator("body").aria_snapshot()
        nameless = re.findall(
            r"^ *- (?:button|textbox|combobox|slider|spinbutton|tab|img)(?::.*)?$", spoken, re.M
        )
        assert [line.strip() for line in nameless if "img" not in line] == [], tab


def test_the_keyboard_alone_asks_and_stops(
    page: Page, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "delay", 0.1)
    focused = "document.activeElement.placeholder || document.activeElement.innerText"

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate(focused).strip() == name:
                return
        raise AssertionError(f"{name} is not reached")

    tab_to("Ask something")
    page.keyboard.type("Count")
    page.keyboard.press("Enter")
    playwright.expect(_answer(page)).to_contain_text("1 2 3")
    tab_to("Stop")
    page.keyboard.press("Enter")
    _send(page).wait_for()


def test_on_a_phone_nothing_is_wider_than_the_screen(
    browser: Browser, address: str, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "delay", 0.1)
    options: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
    with _opened(browser, address, **options, has_touch=True, is_mobile=True) as page:
        _shoot(page, "phone-empty")
        title, expert, box = (
            page.locator(where).bounding_box() for where in ("#header h1", "#expert", "#box")
        )
        assert title and expert and box
        assert title["y"] < expert["y"] + expert["height"] / 2 < title["y"] + title["height"], "one line"
        assert title["x"] + title["width"] <= expert["x"], "beside each other"
        assert page.locator("#title").evaluate("title => title.scrollWidth <= title.clientWidth"), "whole"
        assert box["y"] + box["height"] <= 844, "on the first screen"
        page.get_by_role("button", name=TEXT_EXAMPLES[0].text).tap()
        playwright.expect(_answer(page)).to_contain_text("1 2 3")
        _shoot(page, "phone-chat")
        _stop(page)
        for tab in ("Look inside", "ScienceQA", "Side by side", "Chat"):
            if not page.get_by_role("tab", name=tab).is_visible():
                page.locator(".overflow-menu > button").tap()
            page.get_by_role("tab", name=tab).or_(
                page.locator(".overflow-dropdown button", has_text=tab)
            ).locator("visible=true").first.tap()
            page.wait_for_timeout(500)
            _shoot(page, f"phone-{tab.split()[0].lower()}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.get_by_role("button", name="Clear").locator("visible=true").tap()
        page.get_by_role("combobox", name="Adapter").tap()
        page.get_by_role("option", name="eyes").tap()
        page.get_by_role("button", name=PICTURE_EXAMPLES[0].text).tap()
        playwright.expect(_answer(page)).to_contain_text("1 2 3")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        _shoot(page, "phone-picture")
        _stop(page)
        page.get_by_role("button", name="How the answer is made").tap()
        page.get_by_label("System text").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        _shoot(page, "phone-settings")


@pytest.mark.slow
def test_picture_for_the_readme(browser: Browser, default_base: str) -> None:
    """Leaves the page as it opens, with the shipped adapters, in docs/page.png."""
    model = LlamaAdapter.from_pretrained(base=default_base, quantize="auto")
    with (
        _served(model, load_experts(model)) as address,
        _opened(browser, address, viewport={"width": 1280, "height": 800}) as page,
    ):
        page.get_by_placeholder("Ask something").wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        shot = Image.open(io.BytesIO(page.screenshot()))
        limits = describe_limits(model, AUTO)
        assert limits in typed(page.locator("body").inner_text())
    # The line is kept in the file, so that a fast test can tell whether the page still says it.
    facts = PngInfo()
    facts.add_text("limits", limits)
    picture = CHECKOUT / "docs" / "page.png"
    shot.save(picture, pnginfo=facts, optimize=True)
    assert picture.stat().st_size < 300_000
