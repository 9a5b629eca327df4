"""Generation: transformers' `generate` with the prompts in it, and the short loop that streams."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer

from llama_adapter.common.errors import UsageError
from llama_adapter.decoding.answer import Said
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import build_processors, stream_tokens
from llama_adapter.model import LlamaAdapter
from tests.tiny import build_tiny_sentencepiece_tokenizer, build_tiny_tokenizer
from tests.tiny_models import build_tiny_decoder, build_tiny_model, padded, random_rows

TOKENIZER = build_tiny_tokenizer()
NEW = 8


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    model = build_tiny_model(names=("other", "tiny"), tokenizer=TOKENIZER)
    with torch.no_grad():  # its logit is 0, so that another token is always likelier: answers have one length
        model.decoder.get_output_embeddings().weight[TOKENIZER.eos_token_id] = 0
    return model


@pytest.fixture(scope="module")
def row() -> Tensor:
    return random_rows(9, vocab_size=len(TOKENIZER))[0]


@torch.no_grad()
def plain_greedy(
    model: LlamaAdapter, row: Tensor, *, adapter: str | None = None, length: int = NEW
) -> list[int]:
    """The likeliest token again and again, everything computed anew each time."""
    ids = row
    for _ in range(length):
        ids = torch.cat((ids, model(ids[None], adapter=adapter).logits[0, -1:].argmax(-1)))
    return ids[len(row) :].tolist()


def answers(model: LlamaAdapter, ids: Tensor, **settings: Any) -> list[list[int]]:
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(ids, **settings)[:, ids.shape[1] :].tolist()


# --- transformers' generate ---------------------------------------------------------------------------------

GREEDY: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
    "one beam": {"num_beams": 1},
    "top-k of one": {"do_sample": True, "top_k": 1},
    "tiny top-p": {"do_sample": True, "top_p": 1e-6},
    "cold": {"do_sample": True, "temperature": 1e-4},
    "a config object": {"generation_config": GenerationConfig(max_new_tokens=NEW, do_sample=False)},
}


@pytest.mark.parametrize("way", GREEDY)
def test_every_way_to_the_likeliest_tokens_takes_the_same(model: LlamaAdapter, row: Tensor, way: str) -> None:
    expected = plain_greedy(model, row)
    assert expected != plain_greedy(model, row, adapter="none")
    given = dict(GREEDY[way])
    if "generation_config" not in given:
        given = {"max_new_tokens": NEW, "do_sample": False, **given}
    assert model.generate(row[None], **given)[0, len(row) :].tolist() == expected


@pytest.mark.parametrize("adapter", ["tiny", "other", "none", None])
@pytest.mark.parametrize("way", ["greedy", "no cache", "static cache", "prompt lookup", "chunked prefill"])
def test_the_adapter_named_answers(model: LlamaAdapter, row: Tensor, way: str, adapter: str | None) -> None:
    expected = plain_greedy(model, row, adapter=adapter)
    assert answers(model, row[None], adapter=adapter, **GREEDY[way]) == [expected]


def test_an_assistant_may_guess_ahead(model: LlamaAdapter, row: Tensor) -> None:
    assistant = build_tiny_decoder(seed=1, vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id)
    assert answers(model, row[None], assistant_model=assistant) == [plain_greedy(model, row)]


@pytest.mark.parametrize("way", ["greedy", "static cache", "chunked prefill"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_rows_of_a_batch_with_left_padding_answer_as_alone(family: str, way: str) -> None:
    model = build_tiny_model(family, eos_token_id=None)
    rows = random_rows(5, 9, 7)
    ids, mask = padded(rows, "left")
    expected = [plain_greedy(model, row) for row in rows]
    assert answers(model, ids, attention_mask=mask, **GREEDY[way]) == expected


def test_texts_become_answers_as_with_any_model_of_transformers(model: LlamaAdapter) -> None:
    texts = ["Name three colours.", "What is the answer?", "The sky"]
    TOKENIZER.padding_side = "left"
    batch = TOKENIZER(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    for text, ids in zip(texts, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        alone = torch.tensor(TOKENIZER(text)["input_ids"])
        assert ids == plain_greedy(model, alone)


@torch.no_grad()
def test_enough_beams_find_the_likeliest_pair_of_tokens() -> None:
    model = build_tiny_model(eos_token_id=None)
    rows = random_rows(4, 6)
    ids, mask = padded(rows, "left")
    found = answers(model, ids, attention_mask=mask, num_beams=64, max_new_tokens=2)
    for row, pair in zip(rows, found, strict=True):
        firsts = model(row[None]).logits[0, -1].log_softmax(-1)
        seconds = model(torch.stack([torch.cat((row, torch.tensor([t]))) for t in range(64)])).logits[:, -1]
        scores = firsts[:, None] + seconds.log_softmax(-1)
        assert pair == list(divmod(int(scores.argmax()), 64))


def test_beams_of_a_batch_are_those_of_its_rows(model: LlamaAdapter) -> None:
    rows = random_rows(5, 9, vocab_size=len(TOKENIZER))
    ids, mask = padded(rows, "left")
    wide = {"num_beams": 4, "num_return_sequences": 2}
    together = answers(model, ids, attention_mask=mask, **wide)
    assert together == [answer for row in rows for answer in answers(model, row[None], **wide)]
    assert together != [
        answer for row in rows for answer in answers(model, row[None], **wide, adapter="none")
    ]


OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {**OPEN, "temperature": 0.7},
    "top-k": {**OPEN, "top_k": 5},
    "top-p": {**OPEN, "top_p": 0.6},
    "all": {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("sampling", SAMPLED)
def test_sampled_tokens_are_of_the_adapter_s_distribution(
    model: LlamaAdapter, row: Tensor, sampling: str
) -> None:
    torch.manual_seed(0)
    drawn = answers(
        model, row[None], do_sample=True, num_return_sequences=200, max_new_tokens=1, **SAMPLED[sampling]
    )
    with torch.no_grad():
        logits = model(row[None]).logits
    probabilities = build_processors(Sampling(**SAMPLED[sampling]))(row[None], logits[:, -1]).softmax(-1)[0]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(TOKENIZER))
    assert (counts[probabilities == 0] == 0).all()
    likeliest = int(probabilities.argmax())
    assert abs(counts[likeliest] / 200 - probabilities[likeliest]) < 0.12


def test_several_returned_sequences_differ(model: LlamaAdapter, row: Tensor) -> None:
    torch.manual_seed(0)
    sequences = answers(model, row[None], do_sample=True, num_return_sequences=3, temperature=1.0)
    assert len(sequences) == 3 and len({tuple(sequence) for sequence in sequences}) == 3


def test_a_stop_string_ends_the_answer(model: LlamaAdapter, row: Tensor) -> None:
    whole = TOKENIZER.decode(plain_greedy(model, row, length=30))
    stop = whole[8:11]
    (ids,) = answers(model, row[None], max_new_tokens=30, stop_strings=[stop], tokenizer=TOKENIZER)
    text = TOKENIZER.decode(ids)
    assert whole.startswith(text) and stop in text and stop not in TOKENIZER.decode(ids[:-1])


def test_a_streamer_gets_the_text_while_it_is_made(model: LlamaAdapter, row: Tensor) -> None:
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=30)
    arguments = {"max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(row[None],), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == TOKENIZER.decode(plain_greedy(model, row))


def test_an_adapter_chosen_while_another_answers_changes_nothing(model: LlamaAdapter, row: Tensor) -> None:
    class ChooseOther:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            model.set_adapter("other")
            return scores

    expected = plain_greedy(model, row, adapter="none")
    try:
        model.set_adapter("none")
        assert answers(model, row[None], logits_processor=[ChooseOther()]) == [expected]
    finally:
        model.set_adapter("tiny")


def test_generation_without_a_question_starts_from_the_first_token(model: LlamaAdapter) -> None:
    first = torch.tensor([1])
    output = model.generate(max_new_tokens=NEW, do_sample=False, bos_token_id=1)
    assert output[0].tolist() == [1, *plain_greedy(model, first)]


def test_embeddings_in_place_of_a_question(model: LlamaAdapter, row: Tensor) -> None:
    embedded = model.get_input_embeddings()(row[None])
    output = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    assert output[0].tolist() == plain_greedy(model, row)


def test_a_mistyped_keyword_is_refused(model: LlamaAdapter, row: Tensor) -> None:
    with pytest.raises(ValueError, match="temprature"):
        model.generate(row[None], temprature=1.0)


# --- the short loop -----------------------------------------------------------------------------------------


def streamed(
    model: LlamaAdapter, row: Tensor, sampling: Sampling, end_ids: tuple[int, ...] = ()
) -> list[int]:
    state = model.project()
    return list(stream_tokens(partial(model, adapter=state), row[None], sampling, end_ids))


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_streamed_tokens_are_those_of_generate_greedily(
    model: LlamaAdapter, row: Tensor, penalty: float
) -> None:
    sampling = Sampling(max_new_tokens=30, temperature=0, repetition_penalty=penalty)
    expected = answers(model, row[None], max_new_tokens=30, repetition_penalty=penalty)
    assert [streamed(model, row, sampling)] == expected


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("sampling", SAMPLED)
def test_streamed_tokens_are_those_of_generate_for_the_same_seed(
    model: LlamaAdapter, row: Tensor, sampling: str, seed: int
) -> None:
    torch.manual_seed(seed)
    expected = answers(model, row[None], max_new_tokens=20, do_sample=True, **SAMPLED[sampling])
    torch.manual_seed(99)  # the stream has a generator of its own
    assert [streamed(model, row, Sampling(max_new_tokens=20, seed=seed, **SAMPLED[sampling]))] == expected


def test_without_a_seed_the_global_one_is_used(model: LlamaAdapter, row: Tensor) -> None:
    free = Sampling(max_new_tokens=20, temperature=1.0, top_p=1.0)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(streamed(model, row, free))
    assert runs[0] == runs[1] != runs[2]


def test_an_end_token_ends_the_stream_and_is_not_part_of_it(model: LlamaAdapter, row: Tensor) -> None:
    sampling = Sampling(max_new_tokens=NEW, temperature=0)
    whole = streamed(model, row, sampling)
    end = whole[4]
    assert streamed(model, row, sampling, (end, 999)) == whole[: whole.index(end)]


def test_every_token_is_read_once_and_closing_the_stream_stops_the_work(
    model: LlamaAdapter, row: Tensor
) -> None:
    read: list[int] = []

    def forward(**kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].shape[1])
        return model(**kwargs)

    stream = stream_tokens(forward, row[None], Sampling(temperature=0), ())
    assert isinstance(stream, Iterator)
    assert read == []
    next(stream)
    next(stream)
    assert read == [len(row), 1]
    stream.close()
    assert list(stream) == [] and read == [len(row), 1]
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 101),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 11),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_its_name(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^{setting.replace('_', '-')} is .*; expected [^\n]*$"):
        Sampling(**{setting: value})


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 2, 100])
def test_the_ends_of_the_range_of_temperatures_work(
    model: LlamaAdapter, row: Tensor, temperature: float
) -> None:
    tokens = streamed(model, row, Sampling(max_new_tokens=4, temperature=temperature, seed=0))
    assert len(tokens) == 4
    if temperature < 1:
        assert tokens == plain_greedy(model, row, length=4)


# --- text from tokens ---------------------------------------------------------------------------------------


def stream_text(tokens: Iterable[int], tokenizer: Any, stops: Sequence[str] = ()) -> Iterator[str]:
    """The pieces of the text that `Said` makes of tokens, as far as it takes them."""
    said = Said(tokenizer=tokenizer, stop_strings=stops)
    for token in tokens:
        if piece := said.take(token):
            yield piece
        if said.ended:
            break
    if piece := said.end():
        yield piece


def expected_text(ids: list[int], stops: list[str]) -> str:
    """What has been said when the first stop string is complete, up to where it begins; else everything."""
    for length in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:length], skip_special_tokens=True)
        places = [text.index(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)].strip()
    return TOKENIZER.decode(ids, skip_special_tokens=True).lstrip()


token_ids = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=20)
spoken_ids = st.text(alphabet="aé€😀# \n�", max_size=12).map(lambda text: TOKENIZER(text)["input_ids"])
stop_strings = st.lists(st.text(alphabet="aé€😀# \n", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.one_of(token_ids, spoken_ids), stop_strings)
def test_the_pieces_are_the_whole_up_to_the_first_stop_string(ids: list[int], stops: list[str]) -> None:
    pieces = list(stream_text(ids, TOKENIZER, stops))
    assert "".join(pieces) == expected_text(ids, stops)
    assert all(pieces)


SENTENCEPIECE = build_tiny_sentencepiece_tokenizer()


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aé€😀 \n", max_size=12))
def test_a_sentencepiece_text_comes_back(text: str) -> None:
    ids = SENTENCEPIECE(text)["input_ids"]
    whole = SENTENCEPIECE.decode(ids, skip_special_tokens=True)
    assert "".join(stream_text(ids, SENTENCEPIECE)) == whole.lstrip()


def test_a_tokenizer_in_pure_python_streams_too() -> None:
    class Plain:
        def decode(self, ids: list[int], **kwargs: object) -> str:
            return str(TOKENIZER.decode(ids, skip_special_tokens=True))

    ids = TOKENIZER("a é€ word")["input_ids"]
    pieces = list(stream_text(ids, Plain()))  # type: ignore[arg-type]
    assert "".join(pieces) == "a é€ word" and len(pieces) > 3


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aé€😀", min_size=1, max_size=10))
def test_a_character_of_several_tokens_comes_whole_and_at_once(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    sent = ""
    given_out = 0

    def tokens() -> Iterator[int]:
        nonlocal given_out
        for token in ids:
            # All that the tokens so far make whole is out before the next is asked for.
            assert sent == TOKENIZER.decode(ids[:given_out]).rstrip("�")
            given_out += 1
            yield token

    for piece in stream_text(tokens(), TOKENIZER):
        assert "�" not in piece
        sent += piece
    assert sent == text


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\n### Instruction:", ["### Instruction:"], "one"),
        ("one ### In", ["### Instruction:"], "one ### In"),
        ("#€# and", ["#€!"], "#€# and"),
        ("one #😀 two", ["#😀"], "one"),
        ("STOP", ["STOP"], ""),
        (" a space before it", [], "a space before it"),
        ("\nSTOP", ["\nSTOP"], ""),
        ("ends in space ", [], "ends in space "),
        ("ends in space ", ["x"], "ends in space "),
        ("", ["x"], ""),
    ],
)
def test_stop_strings(text: str, stops: list[str], expected: str) -> None:
    for ids in (TOKENIZER(text)["input_ids"], list(text_bytes(text))):
        assert "".join(stream_text(ids, TOKENIZER, stops)) == expected


def text_bytes(text: str) -> Iterator[int]:
    """The ids of a text, one for each byte, so that every character of several bytes is cut."""
    for byte in text.encode():
        (token,) = [i for i in range(len(TOKENIZER)) if TOKENIZER.convert_ids_to_tokens(i) == BYTES[byte]]
        yield token


def byte_letters() -> dict[int, str]:
    """GPT-2's letter of every byte: printable ones as they are, the others moved up."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(moved)}


BYTES = byte_letters()


def test_nothing_after_a_stop_string_is_asked_for() -> None:
    ids = TOKENIZER("one STOP two three")["input_ids"]
    asked = []

    def tokens() -> Iterator[int]:
        for token in ids:
            asked.append(token)
            yield token

    assert "".join(stream_text(tokens(), TOKENIZER, ["STOP"])) == "one"
    assert len(asked) < len(ids)


def test_of_two_stop_strings_in_one_token_the_first_counts() -> None:
    (token,) = TOKENIZER(" the")["input_ids"]
    assert "".join(stream_text([token], TOKENIZER, ["e", "h"])) == "t"


def test_an_answer_ends_before_an_end_token_or_with_the_last_that_there_may_be() -> None:
    said = Said(3, (2, 7))
    for token in (5, 7, 5):
        said.take(token)
    assert said.tokens == [5] and said.finish_reason == "stop"
    said = Said(2, ())
    for token in (7, 2, 1):
        assert not said.ended or token == 1
        said.take(token)
    assert said.tokens == [7, 2] and said.finish_reason == "length"
