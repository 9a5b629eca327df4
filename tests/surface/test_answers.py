"""Questions and settings as people give them; generate ends where chat does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

from llama_adapter.data.templates import Turn
from llama_adapter.decoding.question import Question
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from tests.refusals import refusal
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import VISION, build_tiny_decoder, build_tiny_model, random_rows


@pytest.fixture(scope="module")
def chatty() -> LlamaAdapter:
    return build_tiny_model(tokenizer=build_tiny_tokenizer())


# --- chat ---------------------------------------------------------------------------------------------------


def test_single_settings_of_sampling_are_taken(chatty: LlamaAdapter) -> None:
    greedy = Sampling(max_new_tokens=8, temperature=0)
    expected = chatty.chat("Hi", sampling=greedy)
    assert chatty.chat("Hi", max_new_tokens=8, temperature=0) == expected
    assert chatty.chat("Hi", sampling=Sampling(temperature=0), max_new_tokens=8) == expected
    assert "".join(chatty.stream_chat("Hi", max_new_tokens=8, temperature=0)).strip() == expected
    assert "no option 'max_length' of a question" in refusal(lambda: chatty.chat("Hi", max_length=8))
    assert "top-p is 2" in refusal(lambda: chatty.chat("Hi", top_p=2))


def test_a_question_object_is_answered_as_its_parts_are(chatty: LlamaAdapter) -> None:
    asked = Question.of("Hi", adapter=NO_ADAPTER, max_new_tokens=8, temperature=0)
    expected = chatty.chat("Hi", adapter=NO_ADAPTER, max_new_tokens=8, temperature=0)
    assert chatty.chat(asked) == expected != chatty.chat(asked, adapter="tiny")


def test_requests_with_the_same_pictures_share_a_state_and_all_are_right() -> None:
    model = build_tiny_model(tokenizer=build_tiny_tokenizer(), vision=VISION)
    projection = model.get_adapter("tiny").projection
    assert projection is not None
    torch.nn.init.normal_(projection.up.weight, generator=torch.Generator().manual_seed(1))
    one, two = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).split([1, 2])
    made = model.project("tiny", image_features=two, image_owners=torch.tensor([0, 0]))
    asked = [("tiny", one), ("tiny", None), ("tiny", two), (NO_ADAPTER, None), ("tiny", one), (made, None)]
    requests = [
        replace(model.prepare_request(Question.of("Hi")), adapter=adapter, features=features)
        for adapter, features in asked
    ]
    states = model.project_requests(requests)
    assert states[0] is states[4] and states[5] is made and not states[3].parts
    for state, (adapter, features) in zip(states, asked, strict=True):
        if isinstance(adapter, str):
            owners = None if features is None else torch.zeros(len(features), dtype=torch.long)
            expected = model.project(adapter, image_features=features, image_owners=owners)
            for part, tensors in expected.parts.items():
                for name, tensor in tensors.items():
                    torch.testing.assert_close(state.parts[part][name], tensor)


def test_dictionaries_are_turns(chatty: LlamaAdapter) -> None:
    turns = [Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Ho"), Turn("user", "Why?")]
    given = [{"role": turn.role, "content": turn.text} for turn in turns]
    expected = chatty.encode_question(turns)
    assert chatty.encode_question(given) == expected
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in given]
    assert chatty.encode_question(parts) == expected
    assert (
        chatty.encode_question(given[1]) == chatty.encode_question(turns[1]) == chatty.encode_question("Hi")
    )
    assert chatty.chat(given, max_new_tokens=3, temperature=0) == chatty.chat(
        turns, max_new_tokens=3, temperature=0
    )


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"from": "human", "value": "Hi"}, "expected a Turn, or a dictionary with role and content"),
        ({"role": "user", "content": [{"type": "image"}]}, "give pictures with image="),
        ({"role": "user", "content": None}, "expected text"),
        ({"role": "tool", "content": "x"}, "role is 'tool'"),
        ("text", "expected a Turn"),
    ],
)
def test_what_is_no_turn_is_refused(chatty: LlamaAdapter, turn: Any, said: str) -> None:
    assert said in refusal(lambda: chatty.chat([turn]))


# --- the end of what is generated ---------------------------------------------------------------------------


@pytest.fixture
def ending() -> Iterator[tuple[LlamaAdapter, int]]:
    """A base that ends all at once with its chat template's end token, which is not its own."""
    tokenizer = build_tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    eos = tokenizer.eos_token_id
    decoder = build_tiny_decoder(vocab_size=len(tokenizer), eos_token_id=eos, pad_token_id=eos)
    model = LlamaAdapter(decoder, tokenizer, base="tiny-base")
    model.new_adapter("new", template="chat")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    hook = decoder.lm_head.register_forward_hook(lambda *a: a[2].index_fill(-1, torch.tensor([end]), 1e4))
    yield model, end
    hook.remove()


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}], ids=str
)
def test_generate_ends_at_the_template_s_end_token(ending: Any, options: dict[str, Any]) -> None:
    model, end = ending
    question = torch.tensor([model.encode_question("Hi")])
    said = model.generate(question, max_new_tokens=9, **options)[0, question.shape[1] :].tolist()
    assert said == [end]
    assert model.chat("Hi") == ""
    config = GenerationConfig(max_new_tokens=9, **options)
    assert model.generate(question, config).shape[1] == question.shape[1] + 1
    assisted = model.generate(question, max_new_tokens=9, assistant_model=build_tiny_decoder(vocab_size=320))
    assert assisted[0, question.shape[1] :].tolist() == [end]


def test_end_tokens_that_are_given_win(ending: Any) -> None:
    model, _ = ending
    question = torch.tensor([model.encode_question("Hi")])
    long = question.shape[1] + 5
    assert model.generate(question, max_new_tokens=5, eos_token_id=77).shape[1] == long
    config = GenerationConfig(max_new_tokens=5, eos_token_id=77)
    assert model.generate(question, config).shape[1] == long
    assert model.generate(question, generation_config=config).shape[1] == long
    assert model.generate(question, max_new_tokens=5, adapter="none").shape[1] == long, "the base has its own"


def test_a_static_cache_and_a_compiled_forward_keep_the_adapter() -> None:
    model = build_tiny_model()
    ids = torch.stack(random_rows(6))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, expected)
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    compiled = model.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(compiled, expected)
    assert not torch.equal(model.generate(ids, adapter="none", **options), expected)
