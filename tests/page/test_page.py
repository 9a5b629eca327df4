"""The page's handlers and what they read and show; its server and a browser are tested apart."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llama_adapter.answering.engine import Engine
from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import MAX_PIXELS
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods.checkpoint import save_adapter
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.checks import MAX_CHARACTERS, MAX_NEW_TOKENS, check_length, read_sampling
from llama_adapter.page.display import messages, pace, shown, typed
from llama_adapter.page.experts import describe, load_experts
from llama_adapter.page.handlers import BUSY, EMPTY, IDLE, Handlers
from llama_adapter.page.heatmap import draw_heatmap
from llama_adapter.page.layout import EXAMPLES, offered
from llama_adapter.page.science import EXAMPLES as SCIENCE_EXAMPLES
from llama_adapter.page.uploads import MAX_PICTURES, MAX_SIDE, PICTURE_EXAMPLES, open_given, picture_file
from tests.drawn import SVG, data_url, huge_png, png
from tests.scripted import build_scripted_model
from tests.tiny_models import build_tiny_model

pytestmark = pytest.mark.usefixtures("uploads")

KNOBS = ("", 0, 1, 0, 1, 12, None)  # the settings but for the adapter
SETTINGS = ("one", *KNOBS)
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> &lt;b&gt; ![](http://x.invalid/y.png)"


# --- text on the page ---------------------------------------------------------------------------------------


@given(st.text())
def test_what_is_shown_can_be_read_back_and_holds_no_html(text: str) -> None:
    text = typed(text)
    assert typed(shown(text)) == text
    assert not re.search(r"<[^\u2060]|&[^\u2060]|!\[", shown(text))


def test_a_fence_is_left_alone_unless_its_content_would_be_drawn() -> None:
    assert shown("```python\nx\n```") == "```python\nx\n```"
    assert shown("```Mermaid\nx\n```").startswith("```\u2060Mermaid")


def test_pace_lets_what_comes_at_once_pass_as_one() -> None:
    assert len(list(pace(range(1000), seconds=60))) == 1
    assert len(list(pace(range(10), seconds=0))) == 10


# --- what comes from outside --------------------------------------------------------------------------------


def test_a_message_of_bearable_length_is_left_as_it_is() -> None:
    assert check_length("x" * MAX_CHARACTERS) == "x" * MAX_CHARACTERS


@pytest.mark.parametrize("bad", ["x" * (MAX_CHARACTERS + 1), None, 5, ["text"], {"text": "x"}])
def test_any_other_message_is_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match="a message"):
        check_length(bad)


@pytest.mark.parametrize(
    ("place", "value", "name"),
    [
        (0, "hot", "temperature"),
        (0, float("nan"), "temperature"),
        (1, 0, "top-p"),
        (1, None, "top-p"),
        (2, -1, "top-k"),
        (2, float("inf"), "top-k"),
        (3, [], "repetition-penalty"),
        (4, 0, "max-new-tokens"),
        (4, MAX_NEW_TOKENS + 1, "max-new-tokens"),
        (5, -1, "seed"),
        (5, "x" * 1000, "seed"),
    ],
)
def test_a_bad_setting_is_refused_by_name(place: int, value: Any, name: str) -> None:
    knobs: list[Any] = list(KNOBS[1:])
    knobs[place] = value
    with pytest.raises(UsageError, match=name) as caught:
        read_sampling(*knobs)
    assert len(str(caught.value)) < 120


def test_settings_are_read_in_order() -> None:
    expected = Sampling(
        temperature=0.5, top_p=0.6, top_k=7, repetition_penalty=1.1, max_new_tokens=20, seed=3
    )
    assert read_sampling(0.5, 0.6, 7, 1.1, 20.0, "3") == expected


# --- adapters to choose from --------------------------------------------------------------------------------


def _adapter_folder(folder: Path, card: str | None = None, **settings: Any) -> Path:
    save_adapter(build_tiny_model(**settings).adapters["tiny"], folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("card", "line"),
    [
        ("# Title\n\nFollows instructions. And more.\n", "Follows instructions."),
        ("---\nlicense: x\n# no title\n---\n# Title\nSees\npictures! Really.", "Sees pictures!"),
        ("No title, no stop", "No title, no stop"),
        ("# Only a title\n\n## And another\n", "3 prompts in each of the top 2 layers; no model card."),
        (None, "3 prompts in each of the top 2 layers; no model card."),
    ],
)
def test_the_first_sentence_of_the_card_describes_an_adapter(
    card: str | None, line: str, tmp_path: Path
) -> None:
    assert describe(_adapter_folder(tmp_path / "a", card)) == line


def test_adapters_that_fit_are_loaded_and_others_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _adapter_folder(tmp_path / "fits", "# Fits\n\nIt fits.")
    _adapter_folder(tmp_path / "other-base", "# Other\n\nDoes not.", hidden_size=16)
    _adapter_folder(tmp_path / "broken", "# Broken\n\nIt was cut off.")
    with (tmp_path / "broken" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    model = build_tiny_model(names=())
    lines = load_experts(model, weights=tmp_path)
    assert list(lines) == ["fits", NO_ADAPTER]
    assert lines["fits"] == "It fits."
    assert list(model.adapters) == ["fits"]
    assert model.active_adapter == NO_ADAPTER
    assert capsys.readouterr().err.startswith("broken is left out: ")


def test_an_adapter_from_elsewhere_comes_first_and_stays_chosen(tmp_path: Path) -> None:
    elsewhere = _adapter_folder(tmp_path / "here" / "mine", "# Mine\n\nMy own.")
    _adapter_folder(tmp_path / "weights" / "fits", "# Fits\n\nIt fits.")
    model = build_tiny_model(names=())
    model.load_adapter(elsewhere)
    lines = load_experts(model, adapter=str(elsewhere), weights=tmp_path / "weights")
    assert list(lines.items())[:2] == [("mine", "My own."), ("fits", "It fits.")]
    assert model.active_adapter == "mine"


def test_one_more_folder_of_adapters_is_offered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, card in (("weights", "Old."), ("more", "New.")):
        _adapter_folder(tmp_path / folder / "same", card)
        _adapter_folder(tmp_path / folder / folder, card)
    model = build_tiny_model(names=())
    lines = load_experts(model, weights=tmp_path / "weights", adapters=tmp_path / "more")
    assert lines.items() >= {"more": "New.", "same": "Old.", "weights": "Old."}.items()
    assert "same is left out: another adapter has that name" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--adapters"):
        load_experts(model, weights=tmp_path / "weights", adapters=tmp_path / "nowhere")


# --- handlers -----------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Handlers:
    return Handlers(Engine(build_scripted_model(seeing=("eyes",))))


def _box(text: str, *files: Path) -> dict[str, Any]:
    """What the box holds."""
    return {"text": text, "files": [str(file) for file in files]}


def _texts(look: list[dict[str, Any]]) -> list[str]:
    """What each message of a chat says, pictures and notes left out."""
    return [typed(next(part["text"] for part in message["content"] if "text" in part)) for message in look]


def _pictures(look: list[dict[str, Any]]) -> list[list[Image.Image]]:
    """The pictures that come before each message's text."""
    return [
        [Image.open(part["path"]) for part in message["content"][:-1] if "path" in part] for message in look
    ]


def _has(box: dict[str, Any], state: dict[str, Any]) -> bool:
    return state.items() <= box.items()


def test_a_question_is_taken_at_once_and_its_answer_grows(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, look, chat = handlers.ask(_box("Hello?"), None, *SETTINGS)
    assert _has(box, {**BUSY, "value": EMPTY})
    assert _texts(look) == ["Hello?"]
    assert handlers.model.made == 0  # type: ignore[attr-defined]

    monkeypatch.setattr("llama_adapter.page.handlers.pace", lambda pieces: pace(pieces, seconds=0))
    steps = list(handlers.answer(chat))
    lengths = [len(_texts(look)[1]) for _, look in steps]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5
    # Only the end touches the box: what arrives late, after a stop, must not make it busy again.
    assert all(box == gr.skip() for box, _ in steps[:-1])
    assert _has(steps[-1][0], IDLE)
    assert chat.exchanges[0].answer.tokens == 12
    note = steps[-1][1][1]["content"][1]["text"]
    assert re.fullmatch(r"\u206312 tokens · [\d.]+ tokens/s · one", note)


def test_an_answer_that_a_new_question_ended_leaves_the_box_busy(handlers: Handlers) -> None:
    *_, chat = handlers.ask(_box("First"), None, *SETTINGS)
    first = handlers.answer(chat)
    next(first)
    handlers.ask(_box("Second"), chat, *SETTINGS)
    assert all(box == gr.skip() for box, _ in first)
    *_, (box, _) = handlers.answer(chat)
    assert _has(box, IDLE)


def _said(handlers: Handlers, taken: tuple[Any, ...]) -> Any:
    """Let the answer to what was taken come to its end; the conversation."""
    for _ in handlers.answer(taken[-1]):
        pass
    return taken[-1]


def test_retry_edit_undo_and_clear(handlers: Handlers) -> None:
    chat = _said(handlers, handlers.ask(_box("First"), None, *SETTINGS))
    chat = _said(handlers, handlers.ask(_box("Second"), chat, *SETTINGS))
    chat = _said(handlers, handlers.retry(chat, "two", *KNOBS))
    assert _texts(messages(chat))[::2] == ["First", "Second"]
    assert [exchange.adapter for exchange in chat.exchanges] == ["one", "two"]

    event = gr.EditData(None, {"index": 0, "value": shown("<b>First</b>"), "previous_value": "First"})
    chat = _said(handlers, handlers.edit(event, chat, *SETTINGS))
    assert [exchange.question.text for exchange in chat.exchanges] == ["<b>First</b>"]

    assert handlers.undo(chat) == (_box("<b>First</b>"), [])
    chat = _said(handlers, handlers.ask(_box("Third"), chat, *SETTINGS))
    box, look = handlers.clear(chat)
    assert look == chat.exchanges == []
    assert _has(box, IDLE)
    assert handlers.undo(chat) == handlers.undo(None) == (gr.skip(), gr.skip())


def test_an_example_is_asked(handlers: Handlers) -> None:
    event = gr.SelectData(None, {"index": 0, "value": {"text": "Why?"}})
    assert _texts(handlers.ask_example(event, None, *SETTINGS)[1]) == ["Why?"]


def test_stop_keeps_what_was_said_and_ends_the_work(handlers: Handlers) -> None:
    *_, chat = handlers.ask(_box("Hello?"), None, "one", "", 0, 1, 0, 1, 1000, None)
    answering = handlers.answer(chat)
    next(answering)
    box, look = handlers.stop(chat)
    assert _has(box, IDLE)
    said = _texts(look)[1]
    rest = list(answering)
    assert len(rest) <= 2
    assert _texts(rest[-1][1])[1].startswith(said)
    assert handlers.model.made < 10  # type: ignore[attr-defined]
    assert _has(handlers.stop(None)[0], IDLE)


@pytest.mark.parametrize("bad", ["", "  ", "x" * (MAX_CHARACTERS + 1), "half \ud800"])
def test_a_bad_question_is_told_and_changes_nothing(bad: str, handlers: Handlers) -> None:
    chat = _said(handlers, handlers.ask(_box("First"), None, *SETTINGS))
    with pytest.warns(UserWarning):
        assert handlers.ask(_box(bad), chat, *SETTINGS) == (gr.skip(),) * 3
    with pytest.warns(UserWarning):
        assert handlers.ask_both(_box(bad), *SETTINGS) == (gr.skip(),) * 4
    # What answers next finds nothing to do.
    assert len(list(handlers.answer(chat))) == len(list(handlers.answer(None))) == 1
    assert len(list(handlers.answer_both(None))) == 1
    assert len(chat.exchanges) == 1


def test_side_by_side_both_answer_by_turns(handlers: Handlers) -> None:
    box, *look, pair = handlers.ask_both(_box("Hello?"), *SETTINGS)
    assert _has(box, BUSY)
    assert look == [[{"role": "assistant", "content": "…"}]] * 2
    step = next(iter(handlers.answer_both(pair)))
    assert [side[0]["content"][1]["text"][:8] for side in step[1:]] == ["\u20631 token"] * 2
    *_, step = handlers.answer_both(handlers.ask_both(_box("Hello?"), *SETTINGS)[-1])
    assert [text.split()[0] for side in step[1:] for text in _texts(side)] == ["none", "one"]
    assert _has(step[0], IDLE)


def test_side_by_side_can_be_stopped_and_wants_an_adapter(handlers: Handlers) -> None:
    *_, pair = handlers.ask_both(_box("Hello?"), *SETTINGS)
    answering = handlers.answer_both(pair)
    next(answering)
    assert _has(handlers.stop_both(pair)[0], IDLE)
    assert len(list(answering)) <= 2
    assert _has(handlers.stop_both(None)[0], IDLE)
    with pytest.warns(UserWarning, match="both sides"):
        handlers.ask_both(_box("Hello?"), NO_ADAPTER, *KNOBS)


def test_a_warning_holds_no_html(handlers: Handlers) -> None:
    with pytest.warns(UserWarning, match="&lt;img"):
        handlers.ask(_box("Hello?"), None, "one", "", 0, 1, 0, 1, 12, "<img src=x>")


def test_hostile_text_is_defused_in_question_and_answer(handlers: Handlers) -> None:
    *_, chat = handlers.ask(_box(HOSTILE), None, "one", "", 0, 1, 0, 1, 1000, None)
    _said(handlers, (chat,))
    said = chat.exchanges[0].answer.text
    assert HOSTILE in said
    for message in messages(chat):
        for part in message["content"]:
            assert not re.search(r"<[^\u2060]|&[^\u2060]|!\[", part["text"])


def test_the_note_tells_what_no_longer_fits(handlers: Handlers) -> None:
    chat = _said(handlers, handlers.ask(_box("First"), None, *SETTINGS))
    chat.dropped = 2
    assert messages(chat)[-1]["content"][1]["text"].endswith(
        "the conversation's first 4 messages no longer fit"
    )


def test_an_answer_without_a_word_still_has_its_place(handlers: Handlers) -> None:
    *_, chat = handlers.ask(_box("First"), None, *SETTINGS)
    handlers.stop(chat)
    assert _texts(messages(chat)) == ["First", "(no answer)"]
    assert _texts(handlers.ask(_box("Second"), chat, *SETTINGS)[1]) == ["First", "(no answer)", "Second"]


# --- pictures -----------------------------------------------------------------------------------------------

SEEING = ("eyes", *KNOBS[:-2], 60, None)


@pytest.fixture
def upload(uploads: Path, tmp_path: Path) -> Callable[..., Path]:
    """Puts a file where Gradio puts what is uploaded."""

    def put(name: str, content: bytes) -> Path:
        folder = uploads / tmp_path.name
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return put


def test_a_picture_comes_as_a_path_a_dict_or_a_data_url_and_several_in_a_list(
    upload: Callable[..., Path],
) -> None:
    path = str(upload("red.png", png("red")))
    given = [path, {"path": path, "orig_name": "red.png"}, data_url(png("red"))]
    assert [image.getpixel((0, 0)) for image in open_given(given)] == [(255, 0, 0)] * 3
    assert [len(open_given(one)) for one in (given[0], given[1], given[2], None, [])] == [1, 1, 1, 0, 0]


def test_a_large_picture_is_kept_small() -> None:
    (image,) = open_given(data_url(png("red", (3000, 30))))
    assert image.size == (MAX_SIDE, 8)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/etc/passwd", "not uploaded"),
        ({"path": "/etc/passwd"}, "not uploaded"),
        ("{uploads}/../secret.png", "not uploaded"),
        ("{uploads}/link.png", "not uploaded"),
        ("http://127.0.0.1/x.png", "not uploaded"),
        ("x\0.png", "not uploaded"),
        ("x" * 10_000, "not uploaded"),
        ("{uploads}/missing.png", "missing.png: there is no such file"),
        ("{uploads}", "a folder"),
        ({"url": "http://127.0.0.1/x.png"}, "no uploaded file"),
        (5, "no uploaded file"),
        ([None], "no uploaded file"),
        ("data:image/png,abc", "data URL is damaged"),
        ("data:image/png;base64,!", "data URL is damaged"),
        ("data:image/png;base64,", "empty"),
        ("data:text/plain;base64,aGVsbG8=", "not a picture"),
        ([data_url(b"x")] * (MAX_PICTURES + 1), "leave out all but"),
    ],
)
def test_nothing_is_opened_but_uploads_and_data_urls(given: Any, told: str, uploads: Path) -> None:
    (uploads.parent / "secret.png").write_bytes(png("red"))
    with contextlib.suppress(FileExistsError):
        (uploads / "link.png").symlink_to(uploads.parent / "secret.png")
    if isinstance(given, str):
        given = given.replace("{uploads}", str(uploads))
    with pytest.raises(UsageError, match=told) as caught:
        open_given(given)
    assert str(uploads.parent) not in str(caught.value).partition(" was not")[2]
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("text.png", b"some text", "text.png: not a picture"),
        ("drawn.svg", SVG, "drawn.svg: SVG is drawn"),
        ("huge.png", huge_png(), f"huge.png: more than the {MAX_PIXELS:,} pixels"),
        ("cut.png", png("red", (64, 64))[:80], "cut.png: the picture is damaged"),
        ("<img src=x onerror=alert(1)>.png", b"", "&lt;img src=x onerror=alert(1)&gt;.png: empty"),
    ],
    ids=["text", "svg", "huge", "cut", "html name"],
)
def test_a_bad_picture_is_told_by_its_name_and_changes_nothing(
    name: str, content: bytes, told: str, handlers: Handlers, upload: Callable[..., Path]
) -> None:
    chat = _said(handlers, handlers.ask(_box("First"), None, *SEEING))
    box = _box("What is it?", upload(name, content))
    with pytest.warns(UserWarning, match=re.escape(told)):
        assert handlers.ask(box, chat, *SEEING) == (gr.skip(),) * 3
    with pytest.warns(UserWarning, match=re.escape(told)):
        assert handlers.ask_both(box, *SEEING) == (gr.skip(),) * 4
    assert len(chat.exchanges) == 1


def test_a_picture_is_shown_above_its_question_and_known_afterwards(
    handlers: Handlers, upload: Callable[..., Path], uploads: Path
) -> None:
    red, blue = upload("red.png", png("red")), upload("blue.png", png("blue"))
    box, look, chat = handlers.ask(_box("What is it?", red, blue), None, *SEEING)
    assert _has(box, {"value": EMPTY})
    assert [image.getpixel((0, 0)) for image in _pictures(look)[0]] == [(255, 0, 0), (0, 0, 255)]
    assert all(Path(part["path"]).is_relative_to(uploads) for part in look[0]["content"][:2])
    _said(handlers, (chat,))
    chat = _said(handlers, handlers.ask(_box("And its colour?"), chat, *SEEING))
    for text in _texts(messages(chat))[1::2]:
        assert "saw: #ff0000 #0000ff" in text
    assert [len(pictures) for pictures in _pictures(messages(chat))] == [2, 0, 0, 0]


def test_retry_edit_and_undo_keep_the_picture(handlers: Handlers, upload: Callable[..., Path]) -> None:
    chat = _said(handlers, handlers.ask(_box("First", upload("red.png", png("red"))), None, *SEEING))
    chat = _said(handlers, handlers.retry(chat, *SEEING))
    event = gr.EditData(None, {"index": 0, "value": "Second", "previous_value": "First"})
    chat = _said(handlers, handlers.edit(event, chat, *SEEING))
    assert _texts(messages(chat))[1].startswith("eyes heard: Second\n\nsaw: #ff0000")
    box, look = handlers.undo(chat)
    assert look == []
    assert box["text"] == "Second"
    assert "saw: #ff0000" in _texts(messages(_said(handlers, handlers.ask(box, chat, *SEEING))))[1]


def test_an_adapter_for_text_warns_and_leaves_everything_in_the_box(
    handlers: Handlers, upload: Callable[..., Path]
) -> None:
    box = _box("What is it?", upload("red.png", png("red")))
    for adapter in ("one", NO_ADAPTER):
        with pytest.warns(UserWarning, match="knows nothing of pictures") as told:
            assert handlers.ask(box, None, adapter, *KNOBS) == (gr.skip(),) * 3
        assert len(told) == 1


def test_the_note_tells_that_the_picture_was_not_seen(
    handlers: Handlers, upload: Callable[..., Path]
) -> None:
    def note() -> str:
        text: str = messages(chat)[-1]["content"][1]["text"]
        return text

    chat = _said(handlers, handlers.ask(_box("First", upload("red.png", png("red"))), None, *SEEING))
    assert note().endswith(" · eyes")
    chat = _said(handlers, handlers.ask(_box("Second"), chat, *SETTINGS))
    assert note().endswith(" · one · made without the picture")
    *_, pair = handlers.ask_both(_box("Third", upload("red.png", png("red"))), *SEEING)
    *_, (_, left, right) = handlers.answer_both(pair)
    assert left[0]["content"][1]["text"].endswith(" · bare base · made without the picture")
    assert right[0]["content"][1]["text"].endswith(" · eyes")
    assert "saw: #ff0000" in _texts(right)[0]


def test_a_picture_that_was_cleared_away_is_written_again(
    handlers: Handlers, upload: Callable[..., Path]
) -> None:
    *_, chat = handlers.ask(_box("First", upload("red.png", png("red"))), None, *SEEING)
    file = Path(messages(chat)[0]["content"][0]["path"])
    content = file.read_bytes()
    file.unlink()
    assert messages(chat)[0]["content"][0]["path"] == str(file)
    assert file.read_bytes() == content


def test_adapters_that_see_are_offered_pictures(handlers: Handlers) -> None:
    assert [example["text"] for example in offered(handlers.model, "one")] == list(EXAMPLES)
    drawn = [example for example in offered(handlers.model, "eyes") if "files" in example]
    assert [example["text"] for example in drawn] == list(PICTURE_EXAMPLES)
    for example in drawn:
        url = example["files"][0]["url"]
        shown_there = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert shown_there.tobytes() == PICTURE_EXAMPLES[example["text"]].tobytes()
    red, blue = (image.getpixel((128, 128)) for image in PICTURE_EXAMPLES.values())
    assert (red, blue) == ((224, 32, 32), (32, 64, 208))


def test_an_example_is_asked_with_our_picture_whatever_file_the_click_names(handlers: Handlers) -> None:
    text = next(iter(PICTURE_EXAMPLES))
    event = gr.SelectData(None, {"index": 0, "value": {"text": text, "files": [{"path": "/etc/passwd"}]}})
    _, look, chat = handlers.ask_example(event, None, *SEEING)
    assert _pictures(look)[0][0].tobytes() == PICTURE_EXAMPLES[text].tobytes()
    assert picture_file(chat.exchanges[0].images[0]) == look[0]["content"][0]["path"]


def test_a_photo_that_was_taken_joins_what_is_in_the_box(handlers: Handlers) -> None:
    box = _box("What is it?", Path("a.png"))
    assert handlers.attach("b.png", box) == (_box("What is it?", Path("a.png"), Path("b.png")), None)
    assert handlers.attach(None, box) == (gr.skip(), gr.skip())


# --- ScienceQA ----------------------------------------------------------------------------------------------


def test_the_form_is_filled_in_and_answered(handlers: Handlers) -> None:
    for number, (question, options, context, picture) in enumerate(SCIENCE_EXAMPLES):
        box, *texts, found = handlers.fill(number)
        assert (box["text"], *texts, found) == (question, options, context, None)
        assert len(box["files"]) == (picture is not None)
        shares = handlers.score(box, options, context, "eyes")
        lines = options.splitlines()
        assert list(shares) == [f"({letter}) {text}" for letter, text in zip("ABCDE", lines, strict=False)]
        assert sum(shares.values()) == pytest.approx(1)
    assert handlers.fill(None) == (gr.skip(),) * 4
    with pytest.warns(UserWarning, match="expected 2 to 5"):
        assert handlers.score(_box("Which?"), "\n one \n\n", "", "one") == gr.skip()


# --- looking inside -----------------------------------------------------------------------------------------


def test_the_gates_are_drawn(handlers: Handlers) -> None:
    picture = handlers.show_gates("one")
    gates = handlers.model.get_adapter("one").gates.detach().tanh()
    assert picture.count("<rect") == gates.numel()
    assert f"<title>layer 2, head 1: {float(gates[2, 1]):.3g}</title>" in picture
    assert 'aria-label="Heat map of tanh(gate) of 3 layers with 4 heads' in picture
    assert "no prompts" in handlers.show_gates(NO_ADAPTER)


def test_what_prompts_did_to_the_latest_answer_is_drawn(handlers: Handlers) -> None:
    assert "Ask something" in handlers.show_answer(None)
    chat = _said(handlers, handlers.ask(_box(HOSTILE), None, "one", "", 0, 1, 0, 1, 400, None))
    picture = handlers.show_answer(chat)
    assert 0 < picture.count("<rect") <= 3 * 96
    assert "first 96 tokens" in picture
    assert not re.search(r"<(script|img|b)\b", picture)
    assert _said(handlers, handlers.ask(_box("Who?"), chat, NO_ADAPTER, *KNOBS)) is chat
    assert "bare base has no prompts" in handlers.show_answer(chat)


@given(st.lists(st.lists(st.floats(-1, 1), min_size=2, max_size=2), min_size=1, max_size=3), st.text())
def test_a_heat_map_is_well_formed_whatever_it_is_labelled(values: list[list[float]], label: str) -> None:
    label = "".join(c for c in label if c.isprintable())
    names = [label] * len(values)
    picture = draw_heatmap(values, rows=names, columns=[label, "b"], names=("r", "c"), summary=label)
    svg = ElementTree.fromstring(picture)[0]
    assert svg.get("aria-label") == label
    cells = [element for element in svg if element.tag == "rect"]
    assert [cell[0].text for cell in cells[:1]] == [f"r {label}, c {label}: {values[0][0]:.3g}"]
    assert len(cells) == 2 * len(values)
    assert all(0 <= float(cell.get("fill-opacity", "")) <= 1 for cell in cells)
