from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from llama_adapter.answering.conversation import Conversation
from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import Turn
from llama_adapter.decoding.answer import Answer
from llama_adapter.decoding.question import Question
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.surface.named_adapters import AUTO
from tests.scripted import MeanColour, ScriptedModel, build_scripted_model
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_model

GREEDY = Sampling(max_new_tokens=8, temperature=0)
CONTEXT = 400  # tokens that the scripted model reads


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    """A real one, if tiny: what it says depends on all that it reads."""
    tokenizer = build_tiny_tokenizer()
    return build_tiny_model(names=("one", "two"), tokenizer=tokenizer, max_position_embeddings=4000)


@pytest.fixture(scope="module")
def scripted() -> ScriptedModel:
    """One that repeats the question and counts on."""
    model = build_scripted_model()
    model.config.max_position_embeddings = CONTEXT
    return model


@pytest.fixture
def read(scripted: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> list[list[Turn]]:
    """The turns of every question that the scripted model was asked."""
    asked: list[list[Turn]] = []

    def stream_chat(question: Question) -> Answer:
        asked.append(list(question.turns))
        return ScriptedModel.stream_chat(scripted, question)

    monkeypatch.setattr(scripted, "stream_chat", stream_chat)
    return asked


def said(chat: Conversation) -> list[tuple[str, str]]:
    return [(exchange.question.text, exchange.answer.text) for exchange in chat.exchanges]


def texts(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in turns]


# --- asking -------------------------------------------------------------------------------------------------


def test_what_was_said_before_is_read_again(model: LlamaAdapter) -> None:
    chat = Conversation(model, sampling=GREEDY)
    first = "".join(chat.ask("Hello?")).strip()
    second = "".join(chat.ask("And then?")).strip()
    assert first == model.chat("Hello?", sampling=GREEDY)
    turns = [Turn("user", "Hello?"), Turn("assistant", first), Turn("user", "And then?")]
    assert second == model.chat(turns, sampling=GREEDY) != model.chat("And then?", sampling=GREEDY)
    assert said(chat) == [("Hello?", first), ("And then?", second)]
    assert chat.exchanges[-1].answer.tokens > 0 and chat.exchanges[-1].answer.tokens_per_second > 0


def test_the_system_text_stands_in_front(scripted: ScriptedModel, read: list[list[Turn]]) -> None:
    chat = Conversation(scripted, system="Be brief.", sampling=GREEDY)
    list(chat.ask("One?"))
    list(chat.ask("Two?"))
    assert [turn.role for turn in read[-1]] == ["system", "user", "assistant", "user"]
    assert read[-1][0].text == "Be brief."
    chat.system = "  "
    list(chat.ask("Three?"))
    assert read[-1][0].text == "One?"


def test_each_conversation_has_its_own_adapter(model: LlamaAdapter) -> None:
    chats = {name: Conversation(model, adapter=name, sampling=GREEDY) for name in ("one", "two", NO_ADAPTER)}
    answers = {name: chat.ask("Hello?") for name, chat in chats.items()}
    for _ in zip(*answers.values(), strict=False):
        pass  # by turns
    for name, answer in answers.items():
        list(answer)
        assert answer.text == model.chat("Hello?", adapter=name, sampling=GREEDY)
        assert chats[name].exchanges[0].adapter == name


def test_without_an_adapter_of_its_own_the_active_one_answers(scripted: ScriptedModel) -> None:
    chat = Conversation(scripted, sampling=Sampling())
    try:
        for name in ("one", "two"):
            scripted.set_adapter(name)
            assert "".join(chat.ask("Who?")).startswith(f"{name} heard: Who?")
    finally:
        scripted.set_adapter("one")
    assert [exchange.adapter for exchange in chat.exchanges] == ["one", "two"]


@pytest.mark.parametrize("message", ["", " \n\t", "a\0b", "\ud83d", "word " * CONTEXT])
def test_a_bad_question_changes_nothing(scripted: ScriptedModel, message: str) -> None:
    chat = Conversation(scripted, sampling=GREEDY)
    running = chat.ask("Fine?")
    next(running)
    with pytest.raises(UsageError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedModel, "stream_chat", LlamaAdapter.stream_chat)
        chat.ask(message)
    assert len(chat.exchanges) == 1
    assert list(running), "the answer goes on"


# --- stopping -----------------------------------------------------------------------------------------------


def test_a_stopped_answer_is_kept_as_far_as_it_got(scripted: ScriptedModel, read: list[list[Turn]]) -> None:
    chat = Conversation(scripted, sampling=Sampling())
    answer = chat.ask("Count.")
    pieces = [next(answer) for _ in range(10)]
    assert said(chat) == [("Count.", "".join(pieces).strip())], "the conversation grows with the answer"
    answer.close()
    made = scripted.made
    assert list(answer) == [] and scripted.made == made, "no more work"
    list(chat.ask("Go on."))
    assert texts(read[-1])[1] == ("assistant", "".join(pieces).strip())


def test_an_answer_stopped_before_its_first_word_is_not_read(
    scripted: ScriptedModel, read: list[list[Turn]]
) -> None:
    chat = Conversation(scripted, sampling=GREEDY)
    chat.ask("Never mind.").close()
    assert said(chat) == [("Never mind.", "")]
    list(chat.ask("Hello?"))
    assert texts(read[-1]) == [("user", "Hello?")]


def test_a_new_question_stops_the_answer_before(scripted: ScriptedModel) -> None:
    chat = Conversation(scripted, sampling=Sampling())
    first = chat.ask("One?")
    kept = next(first)
    second = chat.ask("Two?")
    assert list(first) == [] and list(second)
    assert said(chat)[0] == ("One?", kept.strip())


def test_another_thread_may_stop_an_answer() -> None:
    model = build_scripted_model(delay=0.01)
    answer = Conversation(model, sampling=Sampling(max_new_tokens=2000)).ask("Count.")
    reader = threading.Thread(target=lambda: list(answer))
    reader.start()
    while not answer.tokens:
        pass
    answer.close()  # in the middle of a token
    reader.join(timeout=20)
    assert not reader.is_alive() and answer.tokens < 1000


# --- taking back --------------------------------------------------------------------------------------------


def filled(model: LlamaAdapter) -> Conversation:
    chat = Conversation(model, sampling=GREEDY)
    for question in ("A", "B", "C"):
        list(chat.ask(question))
    return chat


def test_retry_answers_the_last_question_again(scripted: ScriptedModel, read: list[list[Turn]]) -> None:
    chat = filled(scripted)
    chat.adapter = "two"
    before = said(chat)
    list(chat.retry())
    assert read[-1] == read[-2], "it reads what it read then"
    assert said(chat)[:2] == before[:2] and len(chat.exchanges) == 3
    assert chat.exchanges[2].question.text == "C" and chat.exchanges[2].answer.text.startswith("two")


def test_edit_asks_anew_from_there(scripted: ScriptedModel, read: list[list[Turn]]) -> None:
    chat = filled(scripted)
    list(chat.edit(1, "B2"))
    assert [question for question, _ in said(chat)] == ["A", "B2"]
    assert texts(read[-1])[0::2] == [("user", "A"), ("user", "B2")]
    list(chat.edit(0, "A2"))
    assert texts(read[-1]) == [("user", "A2")]


def test_undo_gives_the_question_back_until_there_is_none(scripted: ScriptedModel) -> None:
    chat = filled(scripted)
    running = chat.ask("D")
    assert [chat.undo() for _ in range(4)] == ["D", "C", "B", "A"]
    assert list(running) == []
    assert not chat.exchanges


def test_clear_forgets_everything(scripted: ScriptedModel, read: list[list[Turn]]) -> None:
    chat = filled(scripted)
    chat.clear()
    list(chat.ask("D"))
    assert texts(read[-1]) == [("user", "D")] and len(chat.exchanges) == 1


def test_nothing_can_be_taken_back_where_nothing_was_said(scripted: ScriptedModel) -> None:
    chat = Conversation(scripted)
    for attempt in (chat.undo, chat.retry, lambda: chat.edit(0, "A")):
        with pytest.raises(UsageError, match="nothing was asked there yet"):
            attempt()
    list(chat.ask("A"))
    with pytest.raises(UsageError, match="nothing was asked there yet"):
        chat.edit(1, "B")


# --- the end of the context ---------------------------------------------------------------------------------


def test_the_oldest_exchanges_make_room_and_the_system_text_stays(
    scripted: ScriptedModel, read: list[list[Turn]]
) -> None:
    chat = Conversation(scripted, system="Be brief.", sampling=GREEDY)
    for number in range(30):
        list(chat.ask(f"Question {number}?"))
    assert 0 < chat.dropped < 29 and len(chat.exchanges) == 30
    roles = [turn.role for turn in read[-1]]
    assert roles == ["system"] + ["user", "assistant"] * (29 - chat.dropped) + ["user"]
    assert read[-1][1].text == f"Question {chat.dropped}?" and read[-1][-1].text == "Question 29?"
    chat.edit(0, "Anew?")
    assert chat.dropped == 0


LENGTHS = st.lists(st.integers(min_value=1, max_value=200), max_size=12)


@settings(deadline=None, max_examples=25)
@given(lengths=LENGTHS, last=st.integers(1, 100), max_new_tokens=st.integers(1, 2000))
def test_no_more_is_dropped_than_has_to_be(
    scripted: ScriptedModel, lengths: list[int], last: int, max_new_tokens: int
) -> None:
    chat = Conversation(scripted, adapter=NO_ADAPTER, sampling=GREEDY)
    for length in lengths:
        next(chat.ask("x" * length))
    chat.sampling = Sampling(max_new_tokens=max_new_tokens)
    asked: list[list[Turn]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripted, "stream_chat", lambda question: asked.append(question.turns))
        chat.ask("y" * last)

    def tokens(turns: list[Turn]) -> int:
        return len(scripted.encode_question(turns, adapter=NO_ADAPTER))

    room = CONTEXT - min(max_new_tokens, CONTEXT // 2)
    everything = [turn for exchange in chat.exchanges[:-1] for turn in exchange.turns] + asked[0][-1:]
    assert asked[0] == everything[2 * chat.dropped :]
    assert tokens(asked[0]) <= room or len(asked[0]) == 1
    assert chat.dropped == 0 or tokens(everything[2 * chat.dropped - 2 :]) > room


def test_a_decoder_without_a_limit_reads_everything(
    scripted: ScriptedModel, read: list[list[Turn]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripted.config, "max_position_embeddings", 0)
    chat = Conversation(scripted, sampling=GREEDY)
    for number in range(30):
        list(chat.ask(f"Question {number}?"))
    assert chat.dropped == 0 and len(read[-1]) == 59


# --- pictures -----------------------------------------------------------------------------------------------

SEES = "sees"  # the adapter that does
RED, BLUE, GREEN = (Image.new("RGB", (4, 4), colour) for colour in ("#ff0000", "#0000ff", "#00ff00"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were encoded, each time that any were."""
    counts: list[int] = []
    encode = MeanColour.encode

    def counted(self: MeanColour, pixels: Tensor) -> Tensor:
        counts.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(MeanColour, "encode", counted)
    return counts


@pytest.fixture
def sighted() -> Conversation:
    model = build_scripted_model(seeing=(SEES,))
    return Conversation(model, adapter=SEES, sampling=Sampling(max_new_tokens=60))


def seen(answer: Answer) -> list[str]:
    """The colours of the pictures that an answer was made with."""
    found = re.search(r"saw: (.*)", "".join(answer))
    return found[1].split() if found else []


def test_a_picture_stays_known_until_another_comes(sighted: Conversation, encoded: list[int]) -> None:
    assert seen(sighted.ask("Hello?")) == [] and not encoded
    assert seen(sighted.ask("What is it?", [RED])) == ["#ff0000"]
    assert seen(sighted.ask("And its colour?")) == ["#ff0000"]
    assert seen(sighted.ask("And these?", [BLUE, GREEN])) == ["#0000ff", "#00ff00"]
    assert seen(sighted.ask("Which is greener?")) == ["#0000ff", "#00ff00"]
    assert sum(encoded) == 3, "each once"
    assert [len(exchange.images) for exchange in sighted.exchanges] == [0, 1, 0, 2, 0]
    assert not sighted.unseen
    sighted.clear()
    assert seen(sighted.ask("Hello?")) == []


def test_whatever_is_taken_back_the_right_picture_is_seen(sighted: Conversation, encoded: list[int]) -> None:
    for question, images in (("One?", [RED]), ("Two?", [BLUE]), ("Three?", [])):
        list(sighted.ask(question, images))
    assert seen(sighted.retry()) == ["#0000ff"]
    assert seen(sighted.edit(1, "Two, anew?")) == ["#0000ff"], "a question keeps its picture"
    assert seen(sighted.retry()) == ["#0000ff"]
    sighted.undo()
    assert seen(sighted.ask("Three?")) == ["#ff0000"]
    assert seen(sighted.edit(0, "One, anew?")) == ["#ff0000"]
    sighted.undo()
    assert seen(sighted.ask("Four?")) == []
    assert sum(encoded) == 2


def test_pictures_may_be_files_and_contents(sighted: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    RED.save(path)
    assert seen(sighted.ask("What?", [path, str(path), path.read_bytes(), RED])) == ["#ff0000"] * 4
    assert all(isinstance(image, Image.Image) for image in sighted.exchanges[0].images)


@pytest.mark.parametrize("picture", ["missing.png", b"no picture", "https://example.org/a.png"])
def test_what_is_no_picture_changes_nothing(sighted: Conversation, picture: str | bytes) -> None:
    running = sighted.ask("What is it?", [RED])
    next(running)
    with pytest.raises(UsageError):
        sighted.ask("And this?", [BLUE, picture])
    assert len(sighted.exchanges) == 1 and list(running), "the answer goes on"
    assert seen(sighted.ask("And now?")) == ["#ff0000"]


def test_auto_lets_who_sees_answer_once_there_is_a_picture(sighted: Conversation) -> None:
    chat = Conversation(sighted.model, adapter=AUTO, sampling=sighted.sampling)
    assert "one heard: Hello?" in "".join(chat.ask("Hello?"))
    assert seen(chat.ask("What is it?", [RED])) == ["#ff0000"]
    assert seen(chat.ask("And its colour?")) == ["#ff0000"], "a follow-up goes to who sees, too"
    assert [exchange.adapter for exchange in chat.exchanges] == ["one", SEES, SEES]
    assert not chat.unseen
    chat.check("And this?", [BLUE])
    chat.undo()
    chat.undo()
    list(chat.ask("And now?"))
    assert chat.exchanges[-1].adapter == "one"


@pytest.mark.parametrize("blind", ["one", NO_ADAPTER])
def test_an_adapter_that_does_not_see_says_so(sighted: Conversation, encoded: list[int], blind: str) -> None:
    chat = Conversation(sighted.model, adapter=blind, sampling=sighted.sampling)
    list(chat.ask("Hello?"))
    with pytest.raises(UsageError, match="can't see pictures"):
        chat.ask("What is it?", [RED])
    assert said(chat) == [("Hello?", chat.exchanges[0].answer.text)] and not encoded
    assert not chat.unseen

    chat.adapter = SEES
    list(chat.ask("What is it?", [RED]))
    chat.adapter = blind
    assert not chat.unseen
    assert seen(chat.ask("And its colour?")) == [] and chat.unseen
    assert seen(chat.retry()) == [] and chat.unseen
    chat.adapter = SEES
    assert seen(chat.ask("Its colour?")) == ["#ff0000"] and not chat.unseen
    chat.undo()
    assert chat.unseen, "of the answer before that is true"
    chat.undo()
    assert not chat.unseen
    list(chat.ask("Its colour?"))
    chat.adapter = blind
    list(chat.edit(0, "Hello again?"))
    assert not chat.unseen, "there is no picture any more"


def test_another_tower_looks_again(sighted: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    class Negative(MeanColour):
        key = "negative"

        def prepare(self, images: Sequence[Image.Image]) -> Tensor:
            return 255 - super().prepare(images)

    list(sighted.ask("What is it?", [RED]))
    monkeypatch.setattr(sighted.model, "tower", lambda adapter=None: Negative())
    assert seen(sighted.ask("And now?")) == ["#00ffff"]
