"""The page's handlers, its endpoints, and its server; what a browser shows is tested apart."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gradio as gr
import httpx
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from demo.api import Endpoints
from demo.checks import MAX_CHARACTERS, MAX_NEW_TOKENS, check_length, read_sampling
from demo.display import messages, pace, shown, typed
from demo.experts import describe, load_experts
from demo.handlers import BUSY, EMPTY, IDLE, Handlers
from demo.heatmap import draw_heatmap
from demo.page import EXAMPLES, build_page, offered
from demo.pictures import MAX_PICTURES, MAX_SIDE, PICTURE_EXAMPLES, open_given, picture_file
from demo.science import EXAMPLES as SCIENCE_EXAMPLES
from demo.science import score, trained_for_it
from demo.server import check_port, serve
from llama_adapter.answering import answer_likelihoods
from llama_adapter.checkpoint import save_adapter
from llama_adapter.errors import UsageError
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.pictures import MAX_BYTES, MAX_PIXELS
from llama_adapter.sampling import Sampling
from llama_adapter.scienceqa import Problem, problem_records
from llama_adapter.serving import Engine
from tests.conftest import CHECKOUT
from tests.scripted import ScriptedModel, build_scripted_model, open_eyes
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import VISION, build_tiny_decoder, build_tiny_model

KNOBS = ("", 0, 1, 0, 1, 12, None)  # the settings but for the adapter
SETTINGS = ("one", *KNOBS)
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> &lt;b&gt; ![](http://x.invalid/y.png)"


@pytest.fixture(scope="module", autouse=True)
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gradio's folder for uploads, of this module's own: other pages clear theirs away when they close."""
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


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

    monkeypatch.setattr("demo.handlers.pace", lambda pieces: pace(pieces, seconds=0))
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

SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
SEEING = ("eyes", *KNOBS[:-2], 60, None)


def _png(colour: str, size: tuple[int, int] = (8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def _huge_png() -> bytes:
    """A file that says it has 40,000 x 40,000 pixels, and ends there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 100) + b"IDAT"


def _data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


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
    path = str(upload("red.png", _png("red")))
    given = [path, {"path": path, "orig_name": "red.png"}, _data_url(_png("red"))]
    assert [image.getpixel((0, 0)) for image in open_given(given)] == [(255, 0, 0)] * 3
    assert [len(open_given(one)) for one in (given[0], given[1], given[2], None, [])] == [1, 1, 1, 0, 0]


def test_a_large_picture_is_kept_small() -> None:
    (image,) = open_given(_data_url(_png("red", (3000, 30))))
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
        ([_data_url(b"x")] * (MAX_PICTURES + 1), "leave out all but"),
    ],
)
def test_nothing_is_opened_but_uploads_and_data_urls(given: Any, told: str, uploads: Path) -> None:
    (uploads.parent / "secret.png").write_bytes(_png("red"))
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
        ("huge.png", _huge_png(), f"huge.png: more than the {MAX_PIXELS:,} pixels"),
        ("cut.png", _png("red", (64, 64))[:80], "cut.png: the picture is damaged"),
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
    red, blue = upload("red.png", _png("red")), upload("blue.png", _png("blue"))
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
    chat = _said(handlers, handlers.ask(_box("First", upload("red.png", _png("red"))), None, *SEEING))
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
    box = _box("What is it?", upload("red.png", _png("red")))
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

    chat = _said(handlers, handlers.ask(_box("First", upload("red.png", _png("red"))), None, *SEEING))
    assert note().endswith(" · eyes")
    chat = _said(handlers, handlers.ask(_box("Second"), chat, *SETTINGS))
    assert note().endswith(" · one · made without the picture")
    *_, pair = handlers.ask_both(_box("Third", upload("red.png", _png("red"))), *SEEING)
    *_, (_, left, right) = handlers.answer_both(pair)
    assert left[0]["content"][1]["text"].endswith(" · bare base · made without the picture")
    assert right[0]["content"][1]["text"].endswith(" · eyes")
    assert "saw: #ff0000" in _texts(right)[0]


def test_a_picture_that_was_cleared_away_is_written_again(
    handlers: Handlers, upload: Callable[..., Path]
) -> None:
    *_, chat = handlers.ask(_box("First", upload("red.png", _png("red"))), None, *SEEING)
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


def _scored(model: LlamaAdapter, adapter: str, image: Path | None = None) -> list[float]:
    """What `eval.scienceqa` compares, as shares."""
    problem = Problem("7", "Which?", ("hen", "cat", "cow"), 1, hint="It lays eggs.", image=image)
    features: Any = {} if image is None else {image: model.encode_images(image, adapter=adapter)[0]}
    records = problem_records([problem])
    answers = [[f"The answer is {letter}." for letter in "ABC"]]
    (found,) = answer_likelihoods(model, records, answers, features=features, adapter=adapter)
    return torch.tensor(found).softmax(0).tolist()


@pytest.mark.parametrize("adapter", ["one", "two", NO_ADAPTER])
def test_score_gives_the_options_probabilities(adapter: str, client: Client, model: LlamaAdapter) -> None:
    asked = ("Which?", ["hen", "cat", "cow"], "It lays eggs.", None, adapter)
    found = client.predict(*asked, api_name="/score")
    assert found == pytest.approx(_scored(model, adapter), rel=1e-4)
    assert sum(found) == pytest.approx(1)


def test_score_sees_a_picture(client: Client, model: LlamaAdapter, picture: Path) -> None:
    asked = ("Which?", ["hen", "cat", "cow"], "It lays eggs.", handle_file(picture), "eyes")
    found = client.predict(*asked, api_name="/score")
    assert found == pytest.approx(_scored(model, "eyes", picture), rel=1e-4)
    assert found != pytest.approx(_scored(model, "eyes"), rel=1e-3)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"options": ["a"]}, "1 options; expected 2 to 5"),
        ({"options": ["a"] * 6}, "6 options"),
        ({"options": ["a", " "]}, "none of them empty"),
        ({"options": "a, b"}, "no list of texts"),
        ({"options": ["a", 5]}, "no text"),
        ({"question": ""}, "the question is empty"),
        ({"question": "x " * 3000}, "the base reads 1024"),
        ({"context": "x" * (MAX_CHARACTERS + 1)}, "shorten it"),
        ({"image": _data_url(_png("red"))}, "knows nothing of pictures"),
        ({"image": [_data_url(_png("red"))] * 2, "adapter": "eyes"}, "2 pictures"),
        ({"image": "/etc/passwd", "adapter": "eyes"}, "not uploaded"),
        ({"adapter": "nobody"}, "no adapter"),
    ],
)
def test_a_bad_problem_is_told_to_the_caller(values: dict[str, Any], told: str, address: str) -> None:
    asked = {"question": "Which?", "options": ["a", "b"], **values}
    event, data = _called(address, "score", **asked)
    assert event == "error" and told in data["error"]


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


def test_an_adapter_trained_on_scienceqa_answers_in_its_own_way_and_is_named(model: LlamaAdapter) -> None:
    assert trained_for_it(model) == []
    adapter, asked = model.get_adapter("two"), ("Which?", ["a hen", "a cat"], "It lays eggs.", None, "two")
    before, letters = adapter.config, score(model, *asked)
    adapter.config = replace(before, training={"answer": "option", "data": {"format": "QCM-O"}})
    try:
        assert trained_for_it(model) == ["two"]
        problem = Problem("7", "Which?", ("a hen", "a cat"), 1, hint="It lays eggs.")
        records = problem_records([problem], "QCM-O")
        (found,) = answer_likelihoods(model, records, [["a hen", "a cat"]], adapter="two")
        shares = score(model, *asked)
        assert shares == pytest.approx(torch.tensor(found).softmax(0).tolist(), rel=1e-4)
        assert shares != pytest.approx(letters, rel=1e-3)
    finally:
        adapter.config = before


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


# --- the server ---------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def _served(model: LlamaAdapter, **options: Any) -> Iterator[str]:
    page = build_page(model, {name: f"About {name}." for name in [*model.adapters, NO_ADAPTER]})
    try:
        yield serve(page, host="127.0.0.1", port=_free_port(), **options)
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    """Two adapters for text, the second one active, and one that sees."""
    model = build_tiny_model(
        names=("one", "two"), tokenizer=build_tiny_tokenizer(), max_position_embeddings=1024
    )
    seeing = model.new_adapter("eyes", prompt_length=3, adapted_layers=2, vision=VISION, seed=3)
    torch.nn.init.normal_(seeing.gates, generator=torch.Generator().manual_seed(3))
    model.set_adapter("two")
    open_eyes(model)
    return model


@pytest.fixture(scope="module")
def address(model: LlamaAdapter) -> Iterator[str]:
    with _served(model) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


@pytest.mark.parametrize("adapter", ["one", "two", NO_ADAPTER])
def test_answer_is_what_the_model_says(adapter: str, client: Client, model: LlamaAdapter) -> None:
    found = client.predict("Name a colour.", None, adapter, "", 0, max_new_tokens=16, api_name="/answer")
    assert found == model.chat(
        "Name a colour.", adapter=adapter, sampling=Sampling(temperature=0, max_new_tokens=16)
    )


def test_eight_at_once_get_what_each_would_get_alone(
    address: str, model: LlamaAdapter, picture: Path
) -> None:
    """Their pictures and answers don't mix, by whatever endpoint they come."""
    red = picture.with_name("red.png")
    red.write_bytes(_png("red"))
    asked: list[dict[str, Any]] = [
        {"adapter": "one", "message": "Name a colour."},
        {"adapter": "two", "message": "Name a colour."},
        {"adapter": NO_ADAPTER, "message": "Name a colour."},
        {"adapter": "eyes", "message": "Which colour?"},
        {"adapter": "eyes", "message": "Which colour?", "image": picture},
        {"adapter": "eyes", "message": "Which colour?", "image": red},
        {"adapter": "one", "message": "Name three colours of the sky in the evening, and say why.", "n": 60},
        {"adapter": "two", "message": "Hi", "n": 3},
    ]

    def ask(number: int) -> tuple[str, str]:
        values = dict(asked[number])
        length = values.pop("n", 20)
        if image := values.pop("image", None):
            values["image"] = handle_file(image)
        client = Client(address, verbose=False)
        settings = {"temperature": 0, "max_new_tokens": length, "api_name": ("/answer", "/chat")[number % 2]}
        answers = [client.submit(**values, **settings) for _ in range(2)]
        first, second = (answer.result(timeout=60) for answer in answers)
        return first, second

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(ask, range(len(asked))))
    expected = [
        model.chat(
            values["message"],
            image=values.get("image"),
            adapter=values["adapter"],
            sampling=Sampling(temperature=0, max_new_tokens=values.get("n", 20)),
        )
        for values in asked
    ]
    assert found == [(text, text) for text in expected]
    assert len(set(expected)) == len(asked)


def test_a_seed_makes_the_answer_the_same(client: Client) -> None:
    once, again, other = (
        client.predict("Hi", temperature=1.5, top_p=1, max_new_tokens=16, seed=seed, api_name="/answer")
        for seed in (1, 1, 2)
    )
    assert once == again != other


def test_chat_streams_and_reads_the_history(client: Client, model: LlamaAdapter) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    job = client.submit("And now?", history, None, "one", "Be brief.", 0, max_new_tokens=24, api_name="/chat")
    last = job.result()
    assert job.outputs()[-1] == last
    alone = client.predict("And now?", None, "one", "Be brief.", 0, max_new_tokens=24, api_name="/answer")
    assert last != alone


README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
README_ADDRESS = "http://127.0.0.1:7860"


def test_the_readme_s_python_asks_the_page(address: str, picture: Path) -> None:
    (code,) = re.findall(r"^```py\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    there = {README_ADDRESS: address, "photo.jpg": str(picture), "smollm2-135m-vision": "eyes"}
    for ours, here in there.items():
        assert ours in code
        code = code.replace(ours, here)
    names: dict[str, Any] = {}
    lines = code.splitlines()
    exec("\n".join(line for line in lines if not line.startswith("client.")), names)
    answer, story, shares = (eval(line, names) for line in lines if line.startswith("client."))
    assert isinstance(answer, str) and answer
    assert isinstance(story.result(timeout=60), str)
    assert len(shares) == 2 and sum(shares) == pytest.approx(1)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_readme_s_curl_asks_the_page(address: str) -> None:
    first, second = re.findall(r"^    (curl .*?[^\\])$", README, flags=re.MULTILINE | re.DOTALL)

    def run(command: str) -> str:
        command = command.partition("   #")[0].replace(f"{README_ADDRESS}/", address)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    event = json.loads(run(first))["event_id"]
    assert "event: complete" in run(second.replace("/ID", f"/{event}"))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"message": ""}, "the question is empty"),
        ({"message": "x" * (MAX_CHARACTERS + 1)}, "shorten it"),
        ({"message": 5}, "no text"),
        ({"message": "Hi", "adapter": "../../etc/passwd"}, "no adapter"),
        ({"message": "Hi", "temperature": "hot"}, "temperature"),
        ({"message": "Hi", "temperature": -1}, "temperature"),
        ({"message": "Hi", "max_new_tokens": 10**9}, "max-new-tokens"),
        ({"message": "Hi", "system": {"a": 1}}, "no text"),
        ({"message": "two words " * 700}, "the base reads 1024"),
    ],
)
def test_bad_values_are_told_to_the_caller(values: dict[str, Any], told: str, client: Client) -> None:
    with pytest.raises(AppError, match=re.escape(told)):
        client.predict(**values, api_name="/answer")


@pytest.mark.parametrize(
    "history",
    ["text", [1], [{"role": "user"}], [{"role": "root", "content": "x"}], [{"role": "user", "content": 1}]],
)
def test_a_bad_history_is_told_to_the_caller(history: Any, client: Client) -> None:
    with pytest.raises(AppError):
        client.predict("Hi", history, api_name="/chat")


def test_hostile_text_comes_back_to_a_program_as_it_is() -> None:
    *_, answer = Endpoints(Engine(build_scripted_model())).answer(HOSTILE, max_new_tokens=1000)
    assert HOSTILE in answer


def test_only_the_three_endpoints_are_public(client: Client) -> None:
    described: Any = client.view_api(return_format="dict")
    assert set(described["named_endpoints"]) == {"/answer", "/chat", "/score"}
    assert not described["unnamed_endpoints"]


def test_the_browser_is_told_to_ask_nobody_else(address: str) -> None:
    policy = httpx.get(address).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "teal.png"
    path.write_bytes(_png("teal"))
    return path


def _called(address: str, endpoint: str, **values: Any) -> tuple[str, Any]:
    """The last event of a call, as curl gets it: its name and what it brings."""
    posted = httpx.post(f"{address}gradio_api/call/v2/{endpoint}", json=values)
    found = httpx.get(f"{address}gradio_api/call/{endpoint}/{posted.json()['event_id']}").text
    event, data = found.strip().splitlines()[-2:]
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def _sent(address: str, name: str, content: bytes) -> str:
    """The path of a file that was uploaded as curl does it."""
    sent = httpx.post(f"{address}gradio_api/upload", files={"files": (name, content)})
    (path,) = sent.json()
    return str(path)


def test_a_program_asks_about_a_picture(
    client: Client, address: str, model: LlamaAdapter, picture: Path
) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=16)
    expected = model.chat("Which colour?", image=picture, adapter="eyes", sampling=greedy)
    assert expected != model.chat("Which colour?", adapter="eyes", sampling=greedy)
    asked = {"message": "Which colour?", "adapter": "eyes", "temperature": 0, "max_new_tokens": 16}
    for image in (handle_file(picture), [handle_file(picture)], _data_url(picture.read_bytes())):
        assert client.predict(**asked, image=image, api_name="/answer") == expected
        assert client.predict(**asked, image=image, api_name="/chat") == expected
    path = _sent(address, "teal.png", picture.read_bytes())
    for image in (path, {"path": path}, _data_url(picture.read_bytes())):
        assert _called(address, "answer", **asked, image=image) == ("complete", [expected])


@pytest.mark.parametrize(
    ("adapter", "image", "told"),
    [
        ("one", _data_url(_png("red")), "knows nothing of pictures"),
        (NO_ADAPTER, _data_url(_png("red")), "the bare base knows nothing of pictures"),
        ("eyes", _data_url(SVG), "SVG"),
        ("eyes", _data_url(_huge_png()), "more than the"),
        ("eyes", "/etc/passwd", "not uploaded"),
        ("eyes", {"path": "/etc/passwd"}, "not uploaded"),
        ("eyes", {"path": "http://192.0.2.1/x.png"}, "not uploaded"),
        ("eyes", {"path": "http://192.0.2.1/x.png", "meta": {"_type": "gradio.FileData"}}, "not fetched"),
        # Gradio's own refusal, which it keeps to itself.
        ("eyes", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, None),
        ("eyes", {"path": "x", "url": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, None),
    ],
)
def test_a_bad_picture_is_told_to_the_caller(adapter: str, image: Any, told: str, address: str) -> None:
    event, data = _called(address, "answer", message="Hi", adapter=adapter, image=image)
    assert event == "error"
    assert data["error"] is None if told is None else told in data["error"]


def test_nothing_is_fetched_in_the_place_of_a_text_either(address: str) -> None:
    url = {"path": "http://192.0.2.1/x", "meta": {"_type": "gradio.FileData"}}
    event, data = _called(address, "answer", message=url)
    assert (event, data["error"]) == (
        "error",
        "URLs are not fetched; download the picture and send the file",
    )


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
@pytest.mark.parametrize("path", ["/etc/passwd", f"{CHECKOUT}/pyproject.toml", "http://192.0.2.1/x.png"])
def test_the_box_takes_no_path_from_outside(
    path: str, meta: dict[str, Any], address: str, model: LlamaAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the browser sends by itself, with another path in it."""
    asked: list[Any] = []
    monkeypatch.setattr(Handlers, "ask", lambda *values: asked.append(values))
    config = httpx.get(f"{address}config").json()
    box = next(part["id"] for part in config["components"] if part["type"] == "multimodaltextbox")
    call = next(each for each in config["dependencies"] if [box, "submit"] in each["targets"])
    data: list[Any] = [{"text": "Hi", "files": [{"path": path, **meta}]}, None, *SETTINGS]
    posted = {"fn_index": call["id"], "data": data, "session_hash": "a"}
    assert httpx.post(f"{address}gradio_api/queue/join", json=posted).status_code == 200
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash=a") as stream:
        lines = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    (done,) = (line for line in lines if line["msg"] == "process_completed")
    assert not done["success"]
    assert asked == []


def test_an_upload_is_limited_and_never_shown_as_a_page(address: str) -> None:
    sent = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", bytes(MAX_BYTES + 1))})
    assert sent.status_code in (400, 413)
    for name, content in (("x.html", b"<script>alert(1)</script>"), ("x.svg", SVG)):
        found = httpx.get(f"{address}gradio_api/file={_sent(address, name, content)}")
        assert found.headers["content-disposition"].startswith("attachment")


def test_no_file_can_be_read(address: str) -> None:
    for path in ("/etc/passwd", f"{CHECKOUT}/pyproject.toml", "../pyproject.toml"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_no_connection_leaves_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            hosts.append(address[0])
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    with _served(build_scripted_model()) as address:
        Client(address, verbose=False).predict("Hi", max_new_tokens=4, api_name="/answer")
    assert set(hosts) == {"127.0.0.1"}


def test_who_does_not_know_the_password_stays_outside() -> None:
    with _served(build_scripted_model(), auth=("me", "secret")) as address:
        posted = httpx.post(f"{address}gradio_api/call/v2/answer", json={"message": "Hi"})
        assert posted.status_code == 401
        client = Client(address, auth=("me", "secret"), verbose=False)
        assert client.predict("Hi", max_new_tokens=3, api_name="/answer")


@pytest.mark.parametrize("endpoint", ["answer", "chat"])
def test_a_caller_who_leaves_stops_the_work(endpoint: str) -> None:
    model = build_scripted_model(delay=0.02)
    with _served(model) as address:
        call = f"{address}gradio_api/call"
        asked = {"message": "Hi", "max_new_tokens": 1000}
        event = httpx.post(f"{call}/v2/{endpoint}", json=asked).json()["event_id"]
        with httpx.stream("GET", f"{call}/{endpoint}/{event}") as stream:
            for line in stream.iter_lines():
                if line.startswith("event: generating"):
                    break
        _assert_settles(model)


def _assert_settles(model: ScriptedModel) -> None:
    """Within two seconds no token is made any more, though there would be many to come."""
    deadline = time.monotonic() + 2
    before = -1
    while model.made != before:
        assert time.monotonic() < deadline, "the work goes on"
        before = model.made
        time.sleep(0.2)
    assert 0 < before < 400


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="--port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(UsageError, match="--host"):
        check_port("192.0.2.1", port)
    with pytest.raises(UsageError, match="--port"):
        check_port("127.0.0.1", 70_000)


# --- the command --------------------------------------------------------------------------------------------


def _demo(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "demo", *options],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    )


def test_the_command_serves_the_page_until_ctrl_c(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    build_tiny_decoder(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    port = _free_port()
    process = _demo("--base", str(tmp_path / "base"), "--weights", str(tmp_path), "--port", str(port))
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        with pytest.raises(OSError):  # another address of the same machine
            socket.create_connection(("127.0.0.2", port), timeout=1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped"
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--auth", "me"], "--auth"), (["--nothing"], "--nothing"), (["--port", "x"], "--port")],
)
def test_a_mistyped_option_is_told_in_one_line(options: list[str], told: str) -> None:
    process = _demo(*options)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told in errors
    assert errors.count("\n") == 1
