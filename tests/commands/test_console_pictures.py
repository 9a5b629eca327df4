"""Pictures in ``ask`` and ``chat``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from llama_adapter.data.templates import Turn
from llama_adapter.model import LlamaAdapter
from tests.commands.console import ADAPTER, CUT_OFF, GREEDY, SEEING, Sudden, chat, greedy, invoke, refusal
from tests.tiny_models import draw_picture

pytestmark = pytest.mark.usefixtures("weights")

SEES = (*GREEDY, "--adapter", SEEING)


@pytest.fixture(scope="module")
def seeing(weights: Path) -> LlamaAdapter:
    return LlamaAdapter.from_pretrained(SEEING, quantize="auto")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory, seeing: LlamaAdapter) -> list[str]:
    """Pictures after which the tiny adapter says something else than without, and than after the other."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [str(draw_picture(folder / f"my {name}.png", name)) for name in ("red", "blue")]
    said = {greedy(seeing, "What is it?", image=some) for some in (None, files[:1], files[1:], files)}
    assert len(said) == 4, "else these tests show nothing"
    return files


def test_ask_looks_at_one_picture_or_several(seeing: LlamaAdapter, colours: list[str]) -> None:
    for files in (colours[:1], colours[1:], colours):
        options = [word for file in files for word in ("--image", file)]
        code, out, err = invoke("ask", "What is it?", *SEES, *options)
        assert (code, out.strip(), err) == (0, greedy(seeing, "What is it?", image=files), CUT_OFF)


def test_what_is_no_picture_is_refused_before_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, colours: list[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(LlamaAdapter, "from_pretrained", mock.Mock(side_effect=Sudden))
    (tmp_path / "text.jpg").write_text("no picture")
    for file, expected in (
        ("missing.png", "missing.png: there is no such file"),
        (str(tmp_path), "a folder; expected a picture's file"),
        (str(tmp_path / "text.jpg"), "text.jpg: not a picture"),
        ("", "''"),
        ("https://example.org/cat.jpg", "URLs are not fetched unless allowed"),
        ("http://127.0.0.1:1/cat.jpg", "--allow-urls"),
    ):
        assert expected in refusal("ask", "hi", *SEES, "--image", colours[0], "--image", file)
    private = refusal("ask", "hi", *SEES, "--allow-urls", "--image", "http://127.0.0.1:1/cat.jpg")
    assert "leads into a private network" in private


def test_pictures_are_refused_where_nobody_would_look(colours: list[str]) -> None:
    for adapter, expected in ((ADAPTER, f"adapter {ADAPTER!r} can't see"), ("none", "the bare base")):
        words = ("ask", "hi", *GREEDY, "--adapter", adapter, "--image", colours[0])
        assert expected in refusal(*words)


def test_a_chat_remembers_its_picture(seeing: LlamaAdapter, colours: list[str]) -> None:
    red, blue = colours
    code, out, err = chat(f"/image {red}", "What is it?", "And now?", f"/image {blue}", "This?", options=SEES)
    first = greedy(seeing, "What is it?", image=red)
    turns = [Turn("user", "What is it?"), Turn("assistant", first), Turn("user", "And now?")]
    second = greedy(seeing, turns, image=red)
    assert second != greedy(seeing, turns)
    turns += [Turn("assistant", second), Turn("user", "This?")]
    third = greedy(seeing, turns, image=blue)
    told = "1 picture for the next question"
    assert (code, err) == (0, CUT_OFF * 3)
    assert out.split() == f"{told} {first} {second} {told} {third}".split()


def test_pictures_of_a_chat_are_added_up_and_forgotten(seeing: LlamaAdapter, colours: list[str]) -> None:
    red, blue = colours
    result = chat(f"/image {red}", f"/image  {blue}", "What is it?", options=SEES)
    both = greedy(seeing, "What is it?", image=colours)
    assert (
        result.out.split()
        == f"1 picture for the next question 2 pictures for the next question {both}".split()
    )
    result = chat(f"/image {red}", "/clear", "What is it?", options=SEES)
    assert result.out.split("forgotten\n")[1].strip() == greedy(seeing, "What is it?")


def test_a_bad_picture_is_told_and_the_chat_goes_on(seeing: LlamaAdapter) -> None:
    for line, expected in (
        ("/image", "/image needs a picture's file: /image photo.jpg"),
        ("/image missing.png", "missing.png: there is no such file"),
        ("/image https://example.org/cat.jpg", "URLs are not fetched unless allowed"),
    ):
        code, out, err = chat(line, "What is it?", options=SEES)
        assert (code, out.strip()) == (0, greedy(seeing, "What is it?"))
        error = err.removesuffix(CUT_OFF)
        assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert "can't see pictures" in chat("/image missing.png").err


def test_a_picture_that_the_next_adapter_does_not_see_is_dropped(colours: Any) -> None:
    result = chat(f"/image {colours[0]}", "/adapter none", "What is it?", options=SEES)
    assert "none can't see pictures: those for the next question are dropped" in result.out
    assert result.code == 0 and result.err == CUT_OFF


def test_a_picture_that_was_not_looked_at_is_told_with_the_answer(colours: list[str]) -> None:
    lines = (f"/image {colours[0]}", "What is it?", f"/adapter {ADAPTER}", "And now?", "/help", "/adapter",
             f"/adapter {SEEING}", "And now?", "/undo", "/retry")  # fmt: skip
    code, _, err = chat(*lines, options=SEES)
    unseen = f"({ADAPTER} can't see pictures: yours was not looked at)\n"
    assert (code, err) == (0, CUT_OFF * 2 + unseen + CUT_OFF * 2)
