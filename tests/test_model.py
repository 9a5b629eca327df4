"""LlamaAdapter: adapters by name, batches, packs, the hub, and training by other people's loops."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from accelerate import Accelerator, cpu_offload
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from llama_adapter.data.templates import Turn, encode_question
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods import checkpoint
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.packed_attention import Segment
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.projection import Projection
from llama_adapter.methods.prompts import Prompts
from llama_adapter.model import LlamaAdapter
from llama_adapter.vision import tower as vision
from tests.reference import plain_llama_logits
from tests.refusals import refusal
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import (
    VISION,
    build_tiny_base,
    build_tiny_decoder,
    build_tiny_model,
    build_tiny_tower_folder,
    draw_picture,
    padded,
    random_rows,
    sight_of,
)

ADAPTER_KEYS = {"adapters.tiny.prompts.embeddings", "adapters.tiny.prompts.gates", "adapters.tiny.config"}


@pytest.fixture
def model() -> LlamaAdapter:
    return build_tiny_model(names=("first", "second"))


# --- adapters by name ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_adapters_are_chosen_by_name_for_good_or_for_one_call(model: LlamaAdapter) -> None:
    ids = torch.stack(random_rows(7))
    first, second, none = (model(ids, adapter=name).logits for name in ("first", "second", "none"))
    assert not torch.equal(first, second) and not torch.equal(first, none)
    assert model.active_adapter == "second" and torch.equal(model(ids).logits, second)
    model.set_adapter("first")
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("none")
    assert torch.equal(model(ids).logits, none)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "olmo2"])
def test_new_prompts_are_noise_as_large_as_what_their_layers_read(family: str, dtype: torch.dtype) -> None:
    model = LlamaAdapter(build_tiny_decoder(family, dtype))
    adapter = model.new_adapter("fresh", prompt_length=7, adapted_layers=2, vision=VISION, seed=3)
    assert adapter.find(Projection) is not None and adapter.projection.sizes is not None
    prompts, sizes = adapter.prompts.embeddings, adapter.projection.sizes
    noise = Adapter(model.get_adapter("fresh").config, torch.Generator().manual_seed(3)).prompts.embeddings
    assert prompts.dtype == torch.float32
    tokens = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(0))
    states = model.decoder.model(tokens, output_hidden_states=True).hidden_states
    for layer, before, mine, drawn, image in zip((1, 2), states[1:3], prompts, noise, sizes, strict=True):
        # OLMo 2 has its norms behind the attention.
        read = before if family == "olmo2" else model.decoder.model.layers[layer].input_layernorm(before)
        size = float(read[:, 1:].float().pow(2).mean() ** 0.5)
        ratios = mine / drawn
        assert torch.allclose(ratios, torch.full_like(ratios, size), rtol=1e-5)
        assert torch.allclose(image, torch.full_like(image, size), rtol=1e-5)


def test_new_adapters_fit_a_decoder_that_is_partly_offloaded() -> None:
    whole, partly = build_tiny_decoder(), build_tiny_decoder()
    cpu_offload(partly.model.layers[2], execution_device=torch.device("cpu"))
    one, other = (LlamaAdapter(decoder).new_adapter("fresh", seed=3) for decoder in (whole, partly))
    assert torch.equal(one.prompts.embeddings, other.prompts.embeddings)


@torch.no_grad()
def test_switched_off_adapters_come_back_even_after_an_error(model: LlamaAdapter) -> None:
    ids = torch.stack(random_rows(7))
    with model.disable_adapters():
        assert torch.equal(model(ids).logits, build_tiny_decoder()(ids).logits)
        assert not torch.equal(model(ids, adapter="second").logits, model(ids).logits)
    assert model.active_adapter == "second"
    with pytest.raises(RuntimeError), model.disable_adapters():
        raise RuntimeError
    assert model.active_adapter == "second"


def test_the_base_answers_when_the_active_adapter_is_dropped(model: LlamaAdapter) -> None:
    model.delete_adapter("first")
    assert model.active_adapter == "second" and list(model.adapters) == ["second"]
    model.delete_adapter("second")
    assert model.active_adapter == "none" and not any(p.requires_grad for p in model.parameters())
    (row,) = random_rows(5)
    assert torch.equal(model(row[None]).logits, build_tiny_decoder()(row[None]).logits)
    model.new_adapter("first")
    assert model.active_adapter == "first"


@pytest.mark.parametrize("name", ["", "none", "auto", "training", "keys", "forward", "_modules"])
def test_names_that_cannot_be_used_are_refused(model: LlamaAdapter, name: str) -> None:
    assert repr(name) in refusal(lambda: model.new_adapter(name))
    assert list(model.adapters) == ["first", "second"] and model.active_adapter == "second"


def test_a_name_that_is_taken_or_not_there_is_refused(model: LlamaAdapter) -> None:
    assert "'first' is taken" in refusal(lambda: model.new_adapter("first"))
    (row,) = random_rows(3)
    for use in (
        model.set_adapter,
        model.delete_adapter,
        lambda name: model(row[None], adapter=name),
        lambda name: model.generate(row[None], adapter=name),
        lambda name: model.save_pretrained("nowhere", adapter=name),
    ):
        assert "there are first, second, none" in refusal(lambda use=use: use("third"))
    assert "none" not in model.adapters
    refusal(lambda: model.delete_adapter("none"))


@pytest.mark.parametrize(
    "other",
    [
        {"num_hidden_layers": 2},
        {"hidden_size": 16, "head_dim": 4},
        {"num_key_value_heads": 4},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_an_adapter_of_another_base_is_refused(model: LlamaAdapter, other: dict[str, Any]) -> None:
    stranger = build_tiny_model(**other).adapters["tiny"]
    assert isinstance(stranger, Adapter)
    message = refusal(lambda: model.add_adapter("stranger", stranger))
    assert "'stranger' was trained for base 'tiny-base'" in message and "give its own base" in message
    assert "stranger" not in model.adapters


@pytest.mark.parametrize(("layers", "length"), [(0, 10), (4, 10), (-1, 10), (2, 0)])
def test_sizes_that_no_adapter_can_have_are_refused(model: LlamaAdapter, layers: int, length: int) -> None:
    refusal(lambda: model.new_adapter("new", adapted_layers=layers, prompt_length=length))


def test_the_same_seed_gives_the_same_prompts() -> None:
    model = build_tiny_model(names=())
    one, same, other = (model.new_adapter(f"a{i}", seed=seed) for i, seed in enumerate((5, 5, 6)))
    assert torch.equal(one.prompts.embeddings, same.prompts.embeddings) and not torch.equal(
        one.prompts.embeddings, other.prompts.embeddings
    )


def test_a_model_without_adapters_is_the_base() -> None:
    model = build_tiny_model(names=())
    (row,) = random_rows(6)
    assert torch.equal(model(row[None]).logits, build_tiny_decoder()(row[None]).logits)
    assert "no adapter to save" in refusal(lambda: model.save_pretrained("nowhere"))


def test_what_the_model_does_not_have_is_the_decoder_s(model: LlamaAdapter) -> None:
    assert model.device.type == "cpu" and model.dtype == torch.float32
    assert model.get_input_embeddings() is model.decoder.get_input_embeddings()
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.nonsense


@torch.no_grad()
def test_a_copied_and_a_pickled_model_answer_the_same(model: LlamaAdapter) -> None:
    ids = torch.stack(random_rows(6))
    expected = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, expected)
        twin.delete_adapter("first")
    assert "first" in model.adapters


# --- batches and losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_the_mean_over_its_rows_tokens(family: str, side: str) -> None:
    model = build_tiny_model(family)
    rows = random_rows(4, 9, 6)
    ids, mask = padded(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    batch = model(ids, attention_mask=mask, labels=labels)
    losses = torch.stack([model(row[None], labels=row[None]).loss for row in rows])
    counts = torch.tensor([len(row) - 1 for row in rows])
    torch.testing.assert_close(batch.loss, (losses * counts).sum() / counts.sum())


@torch.no_grad()
def test_given_positions_are_taken_and_a_mask_may_be_of_any_type(model: LlamaAdapter) -> None:
    ids, mask = padded(random_rows(4, 7), "left")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    for kind in (mask.bool(), mask.float()):
        torch.testing.assert_close(model(ids, attention_mask=kind).logits[mask.bool()], expected)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    given = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    assert torch.equal(given, expected)
    moved = model(ids, attention_mask=mask, position_ids=positions + 5).logits[mask.bool()]
    assert not torch.allclose(moved, expected, atol=1e-4), "the prompts' term depends on the position"


MASKS = {
    "a hole": [1, 0, 1, 1, 0, 1],
    "a hole behind padding": [0, 1, 0, 1, 1, 1],
    "padding behind a hole": [1, 0, 1, 1, 0, 0],
    "padding in front": [0, 0, 1, 1, 1, 1],
    "padding behind": [1, 1, 1, 1, 0, 0],
    "padding at both ends": [0, 1, 1, 1, 1, 0],
    "nothing but padding": [0, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("kind", MASKS)
@torch.no_grad()
def test_only_padding_in_front_moves_positions(model: LlamaAdapter, kind: str) -> None:
    (row,) = random_rows(6)
    mask = torch.tensor([MASKS[kind]])
    padding = (mask.cumsum(-1) == 0).sum() % 6
    positions = (torch.arange(6)[None] - padding).clamp_min(0)
    bare = build_tiny_decoder("llama")
    expected = bare(row[None], attention_mask=mask, position_ids=positions).logits
    assert torch.equal(model(row[None], attention_mask=mask, adapter="none").logits, expected)
    given = model(row[None], attention_mask=mask, position_ids=positions).logits
    assert torch.equal(model(row[None], attention_mask=mask).logits, given)
    if not padding:
        assert torch.equal(bare(row[None], attention_mask=mask).logits, expected)


@torch.no_grad()
def test_a_mask_of_four_dimensions_leaves_positions_to_the_base(model: LlamaAdapter) -> None:
    ids = torch.stack(random_rows(6, 6))
    sees = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    sees[1, :, :, 1] = False
    sees[1, :, 1, 1] = True
    bare = build_tiny_decoder("llama")
    logits = model(ids, attention_mask=sees, adapter="none").logits
    assert torch.equal(logits, bare(ids, attention_mask=sees).logits)
    two = torch.tensor([[1] * 6, [1, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(
        model(ids, attention_mask=sees).logits[0], model(ids, attention_mask=two).logits[0]
    )


@pytest.mark.parametrize("kind", [kind for kind, mask in MASKS.items() if mask[-1]])
def test_generate_with_any_mask_gives_the_base_s_tokens(model: LlamaAdapter, kind: str) -> None:
    (row,) = random_rows(6)
    mask = torch.tensor([MASKS[kind]])
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = build_tiny_decoder("llama").generate(row[None], **options)
    assert torch.equal(model.generate(row[None], adapter="none", **options), expected)


def test_a_token_behind_a_hole_has_a_loss_as_in_the_base(model: LlamaAdapter) -> None:
    (row,) = random_rows(6)
    mask = torch.tensor([MASKS["a hole"]])
    expected = build_tiny_decoder("llama")(row[None], attention_mask=mask, labels=row[None]).loss
    loss = model(row[None], attention_mask=mask, labels=row[None], adapter="none").loss
    assert torch.equal(loss, expected)


@torch.no_grad()
def test_embeddings_in_place_of_token_ids_and_the_last_logits_only(model: LlamaAdapter) -> None:
    ids, mask = padded(random_rows(4, 7), "left")
    expected = model(ids, attention_mask=mask).logits
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=mask).logits, expected)
    last = model(ids, attention_mask=mask, logits_to_keep=1).logits
    torch.testing.assert_close(last, expected[:, -1:])


# --- packed rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 3], ids=["no context", "shared context"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "qwen3", "starcoder2"])
def test_packed_rows_equal_rows_one_at_a_time(family: str, shared: int) -> None:
    model = build_tiny_model(family, torch.float64)
    adapter = model.adapters["tiny"]
    context, *rests = random_rows(shared, 6, 9, 4)
    starts = [shared]
    for rest in rests:
        starts.append(starts[-1] + len(rest))
    segments = [Segment(0, shared)] if shared else []
    segments += [
        Segment(start, start + len(rest), context=(0, shared) if shared else None)
        for start, rest in zip(starts, rests, strict=False)
    ]

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [adapter.prompts.embeddings, adapter.prompts.gates]))

    def loss_of(logits: Tensor, rest: Tensor) -> Tensor:
        return F.cross_entropy(logits[:-1], rest[1:], reduction="sum")

    packed = model(torch.cat([context, *rests])[None], segments=tuple(segments)).logits[0]
    apart = [model(torch.cat([context, rest])[None]).logits[0, shared:] for rest in rests]
    torch.testing.assert_close(packed[shared:], torch.cat(apart), rtol=0, atol=1e-6)

    losses = [loss_of(packed[s : s + len(r)], r) for s, r in zip(starts, rests, strict=False)]
    losses_apart = [loss_of(logits, rest) for logits, rest in zip(apart, rests, strict=True)]
    pairs = zip(gradients(torch.stack(losses).sum()), gradients(torch.stack(losses_apart).sum()), strict=True)
    for ours, theirs in pairs:
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_positions_of_packed_rows_can_be_given(model: LlamaAdapter) -> None:
    ids = torch.cat(random_rows(4, 5))[None]
    segments = (Segment(0, 4), Segment(4, 9))
    counted = model(ids, segments=segments).logits
    given = model(ids, segments=segments, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).logits
    assert torch.equal(counted, given)
    assert not torch.allclose(
        counted, model(ids, segments=segments, position_ids=torch.arange(9)[None]).logits
    )


# --- pictures -----------------------------------------------------------------------------------------------


FEATURES = torch.randn(3, VISION.feature_width, generator=torch.Generator().manual_seed(5))
OWNERS = torch.tensor([0, 2, 2])  # of three rows the second has none


@pytest.fixture
def seeing() -> LlamaAdapter:
    return build_tiny_model(names=("second", "first"), vision=VISION)


def alone(model: LlamaAdapter, row: Tensor, number: int) -> Tensor:
    """The logits of one of the three rows by itself."""
    own = FEATURES[number == OWNERS]
    given = {"image_features": own, "image_owners": torch.zeros(len(own), dtype=torch.long)}
    return model(row[None], **given if len(own) else {}).logits[0]


@torch.no_grad()
def test_a_row_with_pictures_is_one_with_the_prompts_that_they_give(seeing: LlamaAdapter) -> None:
    [row] = random_rows(6)
    adapter = seeing.get_adapter("first")
    state = adapter.state(FEATURES, torch.zeros(3, dtype=torch.long), 1)
    prompts = state.parts[Prompts]["embeddings"][0]
    expected = plain_llama_logits(seeing.decoder, row, prompts, adapter.prompts.gates)
    given = seeing(row[None], image_features=FEATURES, image_owners=torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(given.logits[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(given.logits, seeing(row[None]).logits, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_mixes_rows_with_pictures_and_without(family: str, side: str) -> None:
    model = build_tiny_model(family, vision=VISION)
    rows = random_rows(4, 9, 6)
    ids, mask = padded(rows, side)
    pictures: dict[str, Any] = {"image_features": FEATURES, "image_owners": OWNERS}
    projected = model.project(**pictures, rows=3)
    for given in (pictures, {"adapter": projected}):
        logits = model(ids, attention_mask=mask, **given).logits
        for number, row in enumerate(rows):
            expected = alone(model, row, number)
            torch.testing.assert_close(logits[number][mask[number].bool()], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_without_pictures_is_exactly_the_text_adapter(
    seeing: LlamaAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "load_tower", lambda *_, **__: pytest.fail("the tower was loaded"))
    blind = build_tiny_model(names=("second", "first"))
    ids = torch.stack(random_rows(7, 7))
    none = {"image_features": FEATURES[:0], "image_owners": OWNERS[:0]}
    for given in ({}, none, {"image_features": FEATURES[:0]}):
        assert torch.equal(seeing(ids, **given).logits, blind(ids).logits)
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(seeing.generate(ids, **given, **options), blind.generate(ids, **options))
    mixed = seeing(ids, image_features=FEATURES[:1], image_owners=torch.tensor([1])).logits
    torch.testing.assert_close(mixed[0], blind(ids).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@torch.no_grad()
def test_generating_reads_the_pictures_as_forward_does(seeing: LlamaAdapter, options: dict[str, Any]) -> None:
    ids, mask = padded(random_rows(4, 9, 6), "left")
    pictures: dict[str, Any] = {"image_features": FEATURES, "image_owners": OWNERS}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    together = seeing.generate(ids, attention_mask=mask, **pictures, **options)
    for given in ({"adapter": seeing.project(**pictures, rows=3)}, {**pictures, "adapter": "first"}):
        assert torch.equal(seeing.generate(ids, attention_mask=mask, **given, **options), together)
    for number, row in enumerate(random_rows(4, 9, 6)):
        own = FEATURES[number == OWNERS]
        zeros = torch.zeros(len(own), dtype=torch.long)
        one = seeing.generate(row[None], image_features=own, image_owners=zeros, **options)
        assert torch.equal(one[0, len(row) :], together[number, 9:])
        if "num_beams" not in options:
            said = one[0]
            for place in range(len(row), len(said)):
                assert alone(seeing, said[:place], number)[-1].argmax() == said[place]
    several = seeing.generate(ids, attention_mask=mask, **pictures, **{**options, "num_beams": 3},
                              num_return_sequences=2)  # fmt: skip
    assert len(several) == 6


def test_pictures_that_do_not_fit_are_refused(seeing: LlamaAdapter) -> None:
    ids = torch.stack(random_rows(7, 7))
    for use in (seeing, seeing.generate):
        message = refusal(lambda use=use: use(ids, image_features=FEATURES))
        assert "3 pictures for 2 rows; give image_owners" in message
        refusal(lambda use=use: use(ids, image_features=FEATURES, image_owners=torch.tensor([0, 1])))
    blind = build_tiny_model(names=("first",))
    for model, name, said in (
        (seeing, "none", "the bare base can't see pictures"),
        (blind, "first", "adapter 'first' can't see pictures; choose one"),
    ):
        assert not model.sees(name)
        for action in (
            lambda model=model, name=name: model(ids[:1], adapter=name, image_features=FEATURES[:1]),
            lambda model=model, name=name: model.generate(ids[:1], adapter=name, image_features=FEATURES[:1]),
            lambda model=model, name=name: model.project(name, image_features=FEATURES[:1]),
            lambda model=model, name=name: model.encode_images(b"", adapter=name),
            lambda model=model, name=name: model.tower(name),
        ):
            assert said in refusal(action)
    assert seeing.sees() and seeing.sees("second")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with two towers."""
    folder = tmp_path_factory.mktemp("towers")
    for seed, name in enumerate(("one", "other")):
        build_tiny_tower_folder(folder / name, seed=seed)
    return folder


def test_pictures_are_encoded_by_the_tower_that_the_adapter_was_trained_with(
    towers: Path, tmp_path: Path
) -> None:
    model = LlamaAdapter(build_tiny_decoder(), base="tiny-base", weights=towers)
    model.new_adapter("seeing", vision=sight_of(towers, "one"))
    tower = model.tower()
    assert model.tower("seeing") is tower
    path = draw_picture(tmp_path / "red.png", "red")
    image = Image.open(path)
    expected = tower.encode(tower.prepare([image]))
    for picture in (path, str(path), path.read_bytes(), image, [path]):
        assert torch.equal(model.encode_images(picture), expected)
    both = model.encode_images([path, draw_picture(tmp_path / "blue.png", "blue")])
    torch.testing.assert_close(both[:1], expected)
    assert both.shape == (2, tower.feature_width) and not torch.allclose(both[0], both[1], atol=1e-3)
    assert model.encode_images([]).shape == (0, tower.feature_width)
    assert not any("tower" in name or "visual" in name for name in model.state_dict())
    assert "nothing.png: there is no such file" in refusal(lambda: model.encode_images("nothing.png"))
    assert "not fetched unless allowed" in refusal(lambda: model.encode_images("https://example.org/a.png"))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.encode_images(path), expected)


def test_another_tower_of_the_same_name_is_refused(towers: Path) -> None:
    model = LlamaAdapter(build_tiny_decoder(), base="tiny-base", weights=towers)
    model.new_adapter("seeing", vision=replace(sight_of(towers, "one"), tower="other"))
    message = refusal(lambda: model.encode_images([]))
    assert "trained with a tower 'other' of fingerprint" in message and "get the right one" in message
    model.new_adapter("lost", vision=replace(VISION, tower="nowhere"))
    assert "no tower 'nowhere'" in refusal(lambda: model.encode_images([]))


# --- training -----------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = build_tiny_model().train()
    adapter = model.adapters["tiny"]
    ids, mask = padded(random_rows(5, 8), "right")
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for layer in attention_layers(model.decoder):
        layer.register_forward_hook(count)

    def gradients() -> tuple[list[Tensor], int]:
        nonlocal calls
        calls = 0
        model.zero_grad()
        model(
            ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False
        ).loss.backward()
        return [adapter.prompts.embeddings.grad.clone(), adapter.prompts.gates.grad.clone()], calls

    plain, plain_calls = gradients()
    model.gradient_checkpointing_enable()
    recomputed, recomputed_calls = gradients()
    assert recomputed_calls > plain_calls, "nothing was recomputed, so nothing was tested"
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def test_projecting_the_prompts_for_inference_cannot_stop_their_training() -> None:
    model = build_tiny_model()
    (row,) = random_rows(6)
    model(row[None], adapter=model.project())
    model.generate(row[None], max_new_tokens=2)
    model(row[None], labels=row[None]).loss.backward()
    assert model.adapters["tiny"].prompts.embeddings.grad.abs().max() > 0


def training_rows() -> list[dict[str, Tensor]]:
    return [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
        for row in random_rows(*[8] * 8)
    ]


def train_with_trainer(
    folder: Path, *, steps: int, resume: str | None = None, **settings: Any
) -> LlamaAdapter:
    model = build_tiny_model(tie_word_embeddings=True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=training_rows())
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_transformers_trainer_trains_saves_and_resumes_the_adapter_alone(tmp_path: Path) -> None:
    whole = train_with_trainer(tmp_path / "whole", steps=4)
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert set(saved) == ADAPTER_KEYS
    before = build_tiny_model(tie_word_embeddings=True)
    for name, tensor in before.decoder.state_dict().items():
        assert torch.equal(whole.decoder.state_dict()[name], tensor), f"{name} was trained"
    for name, tensor in before.adapters.named_parameters():
        assert not torch.equal(whole.adapters.get_parameter(name), tensor), f"{name} was not trained"
    for name, tensor in whole.state_dict().items():
        assert torch.equal(saved[name], tensor)

    resumed = train_with_trainer(tmp_path / "half", steps=4, resume=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_transformers_trainer_with_checkpointed_gradients_and_accumulation(tmp_path: Path) -> None:
    plain = train_with_trainer(tmp_path / "plain", steps=2, save_strategy="no", gradient_accumulation_steps=2)
    recomputed = train_with_trainer(
        tmp_path / "again",
        steps=2,
        save_strategy="no",
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
    )
    for name, tensor in plain.state_dict().items():
        assert torch.equal(recomputed.state_dict()[name], tensor)


def test_accelerate_prepares_saves_and_loads_the_adapter_alone(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = build_tiny_model(tie_word_embeddings=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable, lr=1e-2))
    (row,) = random_rows(8)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(row[None], labels=row[None]).loss
        accelerator.backward(loss)
        optimizer.step()
        return float(loss.detach())

    step()
    accelerator.save_state(str(tmp_path / "state"))
    assert set(load_file(tmp_path / "state" / "model.safetensors")) == ADAPTER_KEYS
    expected = [step(), step()]
    assert expected[1] < expected[0]
    accelerator.load_state(str(tmp_path / "state"))
    assert [step(), step()] == expected


def test_a_state_dict_with_a_key_too_few_or_too_many_is_refused() -> None:
    model = build_tiny_model()
    state = model.state_dict()
    assert set(state) == ADAPTER_KEYS
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"adapters\.tiny\.prompts\.gates"):
        model.load_state_dict({"adapters.tiny.prompts.embeddings": state["adapters.tiny.prompts.embeddings"]})
    with pytest.raises(RuntimeError, match="stray"):
        model.load_state_dict({**state, "stray": torch.zeros(1)})


# --- folders and the hub ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer, as `fetch` leaves one."""
    return build_tiny_base(tmp_path_factory.mktemp("weights") / "tiny-base", max_position_embeddings=128)


def save_trained(base: Path, folder: Path, *, name: str = "tiny") -> LlamaAdapter:
    """Save an adapter with gates that are not zero to ``folder``; returns the model it comes from."""
    model = LlamaAdapter.from_base(str(base), device="cpu")
    adapter = model.new_adapter(name, seed=3)
    torch.nn.init.normal_(adapter.prompts.gates)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_what_is_saved_comes_back_bit_for_bit(tiny_base: Path, tmp_path: Path) -> None:
    model = save_trained(tiny_base, tmp_path / "my.adapter")
    again = LlamaAdapter.from_pretrained(tmp_path / "my.adapter", device="cpu")
    assert again.active_adapter == "my.adapter" and again.base == model.base
    for name, tensor in model.adapters["tiny"].state_dict().items():
        assert torch.equal(again.adapters["my.adapter"].state_dict()[name], tensor)
    ids = torch.stack(random_rows(7))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert all(p.requires_grad for p in again.adapters.parameters()), "it can be trained on"


def test_names_in_the_weights_folders_work_for_adapter_and_base(tiny_base: Path) -> None:
    weights = tiny_base.parent
    model = LlamaAdapter.from_base("tiny-base", weights=weights, device="cpu")
    assert model.base == "tiny-base"
    model.new_adapter("tiny", seed=0)
    model.save_pretrained(weights / "tiny-alpaca")
    assert checkpoint.read_config(weights / "tiny-alpaca").base == "tiny-base"
    again = LlamaAdapter.from_pretrained("tiny-alpaca", weights=weights, device="cpu")
    assert again.active_adapter == "tiny-alpaca"
    assert again.load_adapter("tiny-alpaca", name="second", weights=weights) == "second"
    assert "is taken" in refusal(lambda: again.load_adapter("tiny-alpaca", weights=weights))


def test_a_folder_may_have_any_name(tiny_base: Path, tmp_path: Path) -> None:
    save_trained(tiny_base, tmp_path / "training")
    assert LlamaAdapter.from_pretrained(tmp_path / "training", device="cpu").active_adapter == "training_"


def test_an_adapter_with_the_wrong_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    save_trained(tiny_base, tmp_path / "mine")
    other = tmp_path / "other-base"
    build_tiny_decoder(num_hidden_layers=4, vocab_size=320).save_pretrained(other)
    build_tiny_tokenizer().save_pretrained(other)
    message = refusal(lambda: LlamaAdapter.from_pretrained(tmp_path / "mine", base=str(other), device="cpu"))
    assert "other-base" in message and "tiny-base" in message and "4 layers" in message
    message = refusal(lambda: LlamaAdapter.from_pretrained(tiny_base, device="cpu"))
    assert "not an adapter folder" in message


def test_bfloat16_keeps_the_adapter_in_float32(tiny_base: Path, tmp_path: Path) -> None:
    save_trained(tiny_base, tmp_path / "mine")
    model = LlamaAdapter.from_pretrained(tmp_path / "mine", device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.adapters.parameters()} == {torch.float32}
    (row,) = random_rows(6)
    assert model(row[None]).logits.dtype == torch.bfloat16


def test_a_hub_id_is_fetched_once(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_trained(tiny_base, tmp_path / "snapshots" / "0123abcd")
    asked: list[str] = []

    def snapshot(name: str, **_: Any) -> str:
        asked.append(name)
        return str(tmp_path / "snapshots" / "0123abcd")

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    model = LlamaAdapter.from_pretrained("owner/llama-v1.5", device="cpu")
    assert asked == ["owner/llama-v1.5"] and model.active_adapter == "llama-v1.5"


@pytest.mark.parametrize("kind", [GatedRepoError, RepositoryNotFoundError, OSError])
def test_a_hub_id_that_cannot_be_had_says_what_to_do(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        if kind is OSError:
            raise OSError("no\nnetwork")
        response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/owner/name"))
        raise kind("Access is restricted.\nLog in.", response=response)

    monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
    message = refusal(lambda: LlamaAdapter.from_pretrained("owner/name", device="cpu"))
    assert "'owner/name'" in message and "hf auth login" in message
    assert ("accept its terms" in message) == (kind is GatedRepoError)


@torch.no_grad()
def test_an_adapter_that_sees_comes_back_and_finds_its_tower(
    tiny_base: Path, towers: Path, tmp_path: Path
) -> None:
    picture = draw_picture(tmp_path / "red.png", "red")
    weights = tmp_path / "weights"
    weights.mkdir()
    for folder in (tiny_base, towers / "one"):
        (weights / folder.name).symlink_to(folder)
    model = LlamaAdapter.from_base("tiny-base", weights=weights, device="cpu")
    adapter = model.new_adapter("tiny", vision=sight_of(towers, "one"), seed=3)
    torch.nn.init.normal_(adapter.prompts.gates)
    model.save_pretrained(weights / "mine")
    again = LlamaAdapter.from_pretrained("mine", weights=weights, device="cpu")
    assert again.get_adapter("mine").config.vision == adapter.config.vision
    question = {"image": picture, "sampling": GREEDY}
    seen = again.chat("What is it?", **question)
    assert seen == model.chat("What is it?", **question) != model.chat("What is it?", sampling=GREEDY)
    features = again.encode_images(picture)
    assert again.chat("What is it?", image=features, sampling=GREEDY) == seen
    assert again.chat("What is it?", image=[], sampling=GREEDY) == model.chat("What is it?", sampling=GREEDY)


# --- answering ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty() -> LlamaAdapter:
    return build_tiny_model(tokenizer=build_tiny_tokenizer())


GREEDY = Sampling(max_new_tokens=12, temperature=0)


def test_an_answer_streams_and_its_pieces_are_the_whole(chatty: LlamaAdapter) -> None:
    answer = chatty.stream_chat("Name three colours.", sampling=GREEDY)
    assert answer.tokens == 0 and answer.text == ""
    pieces = list(answer)
    assert len(pieces) > 1 and all(pieces)
    assert chatty.chat("Name three colours.", sampling=GREEDY) == "".join(pieces).strip() == answer.text
    assert 1 < answer.tokens <= 12 and answer.tokens_per_second > 0


def test_a_closed_answer_keeps_what_was_said(chatty: LlamaAdapter) -> None:
    answer = chatty.stream_chat("Name three colours.", sampling=GREEDY)
    first = next(answer)
    answer.close()
    assert list(answer) == [] and answer.text == first.strip()


def test_the_bare_base_is_asked_by_its_own_template_and_the_adapter_by_its(chatty: LlamaAdapter) -> None:
    assert chatty.template() == "alpaca" and chatty.template("none") == "chat"
    adapted = chatty.chat("Name three colours.", sampling=GREEDY)
    assert adapted != chatty.chat("Name three colours.", sampling=GREEDY, adapter="none")
    assert chatty.chat([Turn("user", "Name three colours.")], sampling=GREEDY) == adapted


def test_prompts_are_projected_once_an_answer(chatty: LlamaAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = attention_layers(chatty.decoder)[-1]
    seen: list[int] = []
    forward = layer.k_proj.forward

    def project(read: Tensor) -> Tensor:
        seen.append(read.shape[1])
        projected: Tensor = forward(read)
        return projected

    monkeypatch.setattr(layer.k_proj, "forward", project)
    chatty.chat("Name three colours.", sampling=GREEDY)
    assert seen.count(3) == 1, "three prompts once, then only tokens"
    assert seen.count(1) >= 5


@pytest.mark.parametrize(
    "question", ["", "  \n", [], [Turn("user", " ")], [Turn("user", "?"), Turn("assistant", "!")]]
)
def test_an_empty_question_or_none_is_refused(chatty: LlamaAdapter, question: Any) -> None:
    refusal(lambda: chatty.chat(question))


def test_a_question_longer_than_the_context_is_refused(chatty: LlamaAdapter) -> None:
    assert "the base reads 128" in refusal(lambda: chatty.chat("word " * 200))


def test_an_answer_ends_where_the_context_does() -> None:
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(tokenizer=tokenizer)
    with torch.no_grad():  # its logit is 0, so that another token is always likelier
        model.decoder.get_output_embeddings().weight[tokenizer.eos_token_id] = 0
    longest = Sampling(max_new_tokens=500, temperature=0)
    answer = model.stream_chat("Hi", sampling=longest)
    list(answer)
    room = 128 - len(encode_question([Turn("user", "Hi")], "alpaca", tokenizer))
    assert answer.tokens == room


def test_without_a_tokenizer_there_is_no_chat(model: LlamaAdapter) -> None:
    assert "without a tokenizer" in refusal(lambda: model.chat("Hello?"))
