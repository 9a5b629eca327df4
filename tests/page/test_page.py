"""What the page reads and shows. Its chat, its server and the page in a browser have tests of their own."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llama_adapter.common.errors import UsageError
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods.checkpoint import read_config, save_adapter
from llama_adapter.methods.config import ScienceQAConfig
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.about import describe_limits
from llama_adapter.page.chat_tab import offered
from llama_adapter.page.checks import MAX_CHARACTERS, MAX_NEW_TOKENS, check_length, read_sampling
from llama_adapter.page.display import pace, shown, typed
from llama_adapter.page.experts import describe, load_experts
from llama_adapter.page.science import Scores, answer, fill, note, score
from llama_adapter.page.suggestions import PICTURE_EXAMPLES, SCIENCE_EXAMPLES, TEXT_EXAMPLES
from llama_adapter.page.uploads import MAX_PICTURES, MAX_SIDE, open_given
from llama_adapter.quantization.linear import quantize_decoder
from llama_adapter.surface.named_adapters import AUTO
from tests.drawn import data_url, png
from tests.page_parts import KNOBS, typed_in
from tests.scripted import build_scripted_model
from tests.tiny_models import build_tiny_model

pytestmark = pytest.mark.usefixtures("uploads")

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
        ("# Only a title\n\n## And another\n", "prompts in the top 2 layers; no model card."),
        (None, "prompts in the top 2 layers; no model card."),
    ],
)
def test_the_first_sentence_of_the_card_describes_an_adapter(
    card: str | None, line: str, tmp_path: Path
) -> None:
    folder = _adapter_folder(tmp_path / "a", card)
    assert describe(folder, read_config(folder)) == line


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
    assert list(lines) == [AUTO, "fits", NO_ADAPTER]
    assert lines["fits"] == "It fits." and lines[AUTO] == "fits answers."
    assert list(model.adapters) == ["fits"]
    assert model.active_adapter == NO_ADAPTER
    assert capsys.readouterr().err.startswith("broken is left out: ")


def test_an_adapter_from_elsewhere_comes_first_and_stays_chosen(tmp_path: Path) -> None:
    elsewhere = _adapter_folder(tmp_path / "here" / "mine", "# Mine\n\nMy own.")
    _adapter_folder(tmp_path / "weights" / "fits", "# Fits\n\nIt fits.")
    model = build_tiny_model(names=())
    model.load_adapter(elsewhere)
    lines = load_experts(model, adapter=str(elsewhere), weights=tmp_path / "weights")
    assert list(lines.items())[1:3] == [("mine", "My own."), ("fits", "It fits.")]
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


# --- pictures -----------------------------------------------------------------------------------------------


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
        ({"url": "http://127.0.0.1/x.png"}, "an uploaded file or a data URL"),
        (5, "an uploaded file or a data URL"),
        ([None], "an uploaded file or a data URL"),
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


# --- ScienceQA ----------------------------------------------------------------------------------------------


def test_the_form_is_filled_in_and_answered() -> None:
    model = build_scripted_model(seeing=("eyes",))
    for number, example in enumerate(SCIENCE_EXAMPLES):
        box, options, *others = fill(number)
        assert (box["text"], others) == (example.text, [example.context, None, ""])
        assert options.splitlines() == list(example.options)
        assert len(box["files"]) == (example.picture is not None)
        shares, told = answer(model, box, options, example.context, "eyes")
        lettered = zip("ABCDE", example.options, strict=False)
        assert list(shares) == [f"({letter}) {text}" for letter, text in lettered]
        assert sum(shares.values()) == pytest.approx(1)
        assert told.startswith("eyes answered. ")
    assert fill(None) == (gr.skip(),) * 5
    with pytest.warns(UserWarning, match="expected 2 to 5"):
        assert answer(model, typed_in("Which?"), "\n one \n\n", "", "one") == (gr.skip(), gr.skip())


def test_the_note_says_whether_the_order_decided() -> None:
    steady = Scores((0.2, 0.8), "one", (1, 1))
    assert note(["a", "b"], steady) == "one answered. The order of the options makes no difference."
    moved = Scores((0.2, 0.5, 0.3), NO_ADAPTER, (1, 0, 2))
    told = note(["a", "b", "c"], moved)
    assert told.startswith("bare base answered. **The choice depends on the order of the options**")
    assert told.endswith("in another order it is “a” or “c”.")


@pytest.mark.parametrize("rotations", [False, True])
def test_scores_are_those_of_the_rotations(rotations: bool) -> None:
    """The plain reference asks each rotation by itself and puts its probabilities back in order."""
    model = build_scripted_model(seeing=("eyes",))
    adapter = model.get_adapter("one")
    asked = ScienceQAConfig("QCM-A", answer="letter", rotations=rotations)
    adapter.config = replace(adapter.config, scienceqa=asked)
    options = ["cat", "hen", "dog"]
    found = score(model, "Which?", options, "", None, "one")
    # A program that gets no favourites is not made to wait for them.
    quick = score(model, "Which?", options, "", None, "one", every_order=False)
    assert quick.shares == pytest.approx(found.shares, abs=1e-6)
    assert len(quick.favourites) == (3 if rotations else 1)
    adapter.config = replace(adapter.config, scienceqa=replace(asked, rotations=False))
    shares = []
    for places in range(3):
        order = [(number + places) % 3 for number in range(3)]
        alone = score(model, "Which?", [options[number] for number in order], "", None, "one").shares
        shares.append([alone[order.index(number)] for number in range(3)])
    wanted = [sum(column) / 3 for column in zip(*shares, strict=True)] if rotations else shares[0]
    assert found.shares == pytest.approx(wanted, abs=1e-6)
    assert found.favourites == tuple(max(range(3), key=own.__getitem__) for own in shares)


def test_auto_is_scored_by_the_adapter_for_such_questions() -> None:
    model = build_scripted_model(seeing=("eyes",))
    model.set_adapter(AUTO)
    assert score(model, "Which?", ["a", "b"], "", None, None).adapter == "one"
    adapter = model.get_adapter("two")
    adapter.config = replace(adapter.config, scienceqa=ScienceQAConfig("QCM-A"))
    assert score(model, "Which?", ["a", "b"], "", None, AUTO).adapter == "two"
    assert score(model, "Which?", ["a", "b"], "", data_url(png("red")), AUTO).adapter == "eyes"
    assert score(model, "Which?", ["a", "b"], "", None, "one").adapter == "one"


# --- what the model is --------------------------------------------------------------------------------------


def test_the_page_says_how_large_the_model_is_and_what_it_is_not_good_at() -> None:
    model = build_scripted_model(seeing=("eyes",))
    size = sum(parameter.numel() for parameter in model.decoder.parameters())
    mine = sum(parameter.numel() for parameter in model.get_adapter("one").parameters())
    eyes = sum(parameter.numel() for parameter in model.get_adapter("eyes").parameters())
    line = describe_limits(model, "one")
    assert line.startswith(f"tiny-base has {size:,} parameters, this adapter {mine:,} more.")
    assert "wrong about facts, sums" in line and "does not see pictures" in line
    assert "often mistakes colours and counts" in describe_limits(model, "eyes")
    assert "this adapter" not in describe_limits(model, NO_ADAPTER)
    both = describe_limits(model, AUTO)
    assert f"the two adapters {mine + eyes:,} more" in both and "gist of a picture" in both


def test_a_quantised_base_is_said_to_be_as_large() -> None:
    model = build_tiny_model()
    size, line = model.decoder.num_parameters(), describe_limits(model, NO_ADAPTER)
    quantize_decoder(model.decoder, "int8")
    assert model.decoder.num_parameters() < size / 2 and describe_limits(model, NO_ADAPTER) == line


def test_a_larger_model_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_scripted_model()
    monkeypatch.setattr(model.decoder, "num_parameters", lambda: 7_240_000_000)
    line = describe_limits(model, NO_ADAPTER)
    assert line.startswith("tiny-base has 7.24 billion parameters.") and "So small" not in line


def test_adapters_that_see_are_offered_pictures() -> None:
    model = build_scripted_model(seeing=("eyes",))
    assert [example["text"] for example in offered(model, "one")] == [
        example.text for example in TEXT_EXAMPLES
    ]
    drawn = [example for example in offered(model, "eyes") if "files" in example]
    for offer, example in zip(drawn, PICTURE_EXAMPLES, strict=True):
        assert offer["text"] == example.text and example.picture is not None
        url = offer["files"][0]["url"]
        there = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert there.tobytes() == example.picture.tobytes()
    assert "files" in offered(model, AUTO)[0]
