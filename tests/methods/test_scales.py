"""Scales and biases of the decoder's projections: against a decoder whose weights are changed accordingly."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_adapter.answering.records_answered import answer_likelihoods
from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import Record
from llama_adapter.data.templates import Turn, question_turn
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import stream_tokens
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.checkpoint import export_pth, load_adapter, save_adapter
from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.probe import prepare_decoder
from llama_adapter.methods.prompts import Prompts, PromptsConfig
from llama_adapter.methods.scales import ScalesConfig
from llama_adapter.methods.sites import projections_of
from llama_adapter.methods.state import AdapterState, merge_states
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.packing.losses import answer_loss
from llama_adapter.packing.pack import pack
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import FAMILIES, VISION, build_tiny_decoder, build_tiny_model, random_rows
from tests.train_tiny import rows

WIDTHS = (32, 48, 48, 16, 32, 32, 16)  # of a tiny layer's down, gate, up, k, o, q and v projections

EXAMPLES = [replace(example, images=()) for example in rows(8)[0]]


def tuned_model(family: str = "llama") -> LlamaAdapter:
    """The active adapter "tuned" in the top 2 of 3 layers, beside one without tuning."""
    model = build_tiny_model(family, names=("plain",))
    adapter = model.new_adapter("tuned", prompt_length=3, adapted_layers=2, method="prompts+scales", seed=5)
    _stir(adapter)
    return model


def _stir(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(6)
    nn.init.normal_(adapter.prompts.gates, generator=generator)
    nn.init.normal_(adapter.scales.values, std=0.3, generator=generator)


def logits(model: LlamaAdapter, tokens: Tensor, adapter: str | AdapterState, **kwargs: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens, adapter=adapter, **kwargs).logits
    return found


def projections(decoder: nn.Module, attention: nn.Module) -> list[nn.Linear]:
    """Those of the layer that an attention is in."""
    (layer,) = (module for module in decoder.modules() if attention in module.children())
    names = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.c_fc", "mlp.c_proj")
    names += ("self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
    linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert set(linear) <= set(names)
    return [linear[name] for name in sorted(names) if name in linear]


def with_other_weights(model: LlamaAdapter, family: str) -> LlamaAdapter:
    """The same decoder with W (1 + s) and b in the place of W and 0, from the tensor as it is documented."""
    tuning = model.get_adapter("tuned").scales.values
    decoder = prepare_decoder(build_tiny_decoder(family))
    for values, attention in zip(tuning.detach(), attention_layers(decoder)[1:], strict=True):
        rest = values
        for projection in projections(decoder, attention):
            width = projection.out_features
            scale, bias, rest = rest.split([width, width, len(rest) - 2 * width])
            before = projection.bias
            with torch.no_grad():
                projection.weight.mul_(1 + scale[:, None])
                projection.bias = nn.Parameter(bias if before is None else bias + (1 + scale) * before)
        assert len(rest) == 0
    return LlamaAdapter(decoder)


def prompts_alone(model: LlamaAdapter) -> AdapterState:
    """The tuned adapter's prompts, projected, without its scales and biases."""
    state = model.project("tuned")
    return AdapterState(state.num_layers, {Prompts: state.parts[Prompts]})


# --- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_decoder_with_other_weights_and_the_prompts_of_the_frozen_ones(family: str) -> None:
    model = tuned_model(family)
    tokens = torch.stack(random_rows(9, 9))
    reference = with_other_weights(model, family)
    prompts = prompts_alone(model)
    expected = logits(reference, tokens, prompts)
    torch.testing.assert_close(logits(model, tokens, "tuned"), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(model, tokens, prompts)).abs().max() > 0.1


def test_its_width_is_twice_that_of_a_layer_s_projections() -> None:
    decoder = prepare_decoder(build_tiny_decoder())
    assert [out for _, out in projections_of(decoder, 2).values()] == list(WIDTHS)


def test_untrained_it_leaves_the_decoder_as_it_is_and_others_always() -> None:
    model = build_tiny_model(names=("plain",))
    tokens = torch.stack(random_rows(9, 9))
    before = {name: logits(model, tokens, name) for name in ("plain", NO_ADAPTER)}
    adapter = model.new_adapter("tuned", method="prompts+scales")
    assert torch.equal(logits(model, tokens, "tuned"), before[NO_ADAPTER])
    _stir(adapter)
    assert not torch.equal(logits(model, tokens, "tuned"), before[NO_ADAPTER])
    for name, expected in before.items():
        assert torch.equal(logits(model, tokens, name), expected)


def test_projected_it_is_the_same_alone_and_beside_rows_without() -> None:
    model = tuned_model()
    tokens = random_rows(9)[0][None]
    greedy = Sampling(temperature=0, max_new_tokens=12)

    def said(name: str) -> list[int]:
        forward = partial(model, adapter=model.project(name))
        return list(stream_tokens(forward, tokens, greedy, ()))

    expected = said("tuned")
    assert expected != said(NO_ADAPTER)
    assert torch.equal(logits(model, tokens, "tuned"), logits(model, tokens, model.project("tuned")))
    generated = model.generate(tokens, adapter="tuned", do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert generated[0, 9:].tolist() == expected


def test_beams_and_an_assistant_have_it_too() -> None:
    model = tuned_model()
    reference = with_other_weights(model, "llama")
    prompts = prompts_alone(model)
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    rows = torch.stack(random_rows(6, 6))
    beams = model.generate(rows, adapter="tuned", num_beams=3, **asked)
    assert torch.equal(beams, reference.generate(rows, num_beams=3, adapter=prompts, **asked))
    assert not torch.equal(beams, model.generate(rows, adapter=NO_ADAPTER, num_beams=3, **asked))
    guesses = build_tiny_decoder(seed=1)
    helped = model.generate(rows[:1], adapter="tuned", assistant_model=guesses, **asked)
    assert torch.equal(helped, model.generate(rows[:1], adapter="tuned", **asked))


def test_what_was_projected_stays_when_training_goes_on() -> None:
    model = tuned_model()
    tokens = torch.stack(random_rows(9, 9))
    projected = model.project("tuned")
    before = logits(model, tokens, projected)
    with torch.no_grad():
        for parameter in model.get_adapter("tuned").parameters():
            parameter.add_(1)
    assert torch.equal(logits(model, tokens, projected), before)


def test_tokens_may_leave_their_rows_before_the_mlp() -> None:
    """As in OPT: its MLP sees (B * T, D)."""
    decoder = build_tiny_decoder("opt", ffn_dim=48, word_embed_proj_dim=32)
    model = LlamaAdapter(decoder, base="tiny-base")
    for name in ("one", "two"):
        _stir(model.new_adapter(name, adapted_layers=2, method="prompts+scales"))
    with torch.no_grad():
        model.get_adapter("two").scales.values.mul_(-1)
    tokens = torch.stack(random_rows(9, 9))
    merged = merge_states([model.project("one"), model.project("two")])
    together = logits(model, tokens, merged)
    for row, name in enumerate(("one", "two")):
        alone = logits(model, tokens[row : row + 1], name)[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_a_router_that_gives_more_than_a_product_stays_as_it_is() -> None:
    """As in Phi MoE: it gives the experts' weights and their numbers."""
    model = LlamaAdapter(build_tiny_decoder("phimoe"), base="tiny-base")
    tokens = torch.stack(random_rows(9, 9))
    before = logits(model, tokens, NO_ADAPTER)
    _stir(model.new_adapter("tuned", method="prompts+scales"))
    assert (logits(model, tokens, "tuned") - before).abs().max() > 0.1


class EightBit(nn.Module):
    """A projection as bitsandbytes has them: whole numbers, multiplied in bfloat16 whatever it reads."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.size = float(linear.weight.detach().abs().max()) / 127
        self.register_buffer("weight", (linear.weight / self.size).round().to(torch.int8))

    def forward(self, read: Tensor) -> Tensor:
        weight = self.get_buffer("weight").bfloat16() * self.size
        return (read.bfloat16() @ weight.T).to(read.dtype)


def test_a_quantised_decoder_computes_in_its_own_dtype() -> None:
    decoder = build_tiny_decoder(dtype=torch.bfloat16)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            decoder.set_submodule(name, EightBit(module))
    model = LlamaAdapter(decoder, base="tiny-base")
    adapter = model.new_adapter("tuned", prompt_length=3, adapted_layers=2, method="prompts+scales", seed=5)
    _stir(adapter)
    tokens = torch.stack(random_rows(9, 9))
    found, expected = logits(model, tokens, "tuned"), logits(tuned_model(), tokens, "tuned")
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_two_models_on_one_decoder_apply_it_once() -> None:
    model = tuned_model()
    tokens = torch.stack(random_rows(9, 9))
    expected = logits(model, tokens, "tuned")
    second = LlamaAdapter(model.decoder)
    _stir(second.new_adapter("own", method="prompts+scales"))
    assert torch.equal(logits(model, tokens, "tuned"), expected)
    model.delete_adapter("tuned")
    assert torch.equal(logits(model, tokens, NO_ADAPTER), logits(second, tokens, NO_ADAPTER))


def test_a_packed_sequence_has_one() -> None:
    model = tuned_model()
    packed = pack(EXAMPLES[:2])
    two = merge_states([model.project("tuned"), model.project("tuned")])
    with pytest.raises(UsageError, match="2 sets of scales for a packed sequence; give one"):
        model(input_ids=packed.input_ids, segments=packed.segments, adapter=two)


def test_rows_with_pictures_share_it() -> None:
    """Together, each has prompts of its own and all the same tuning."""
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(names=("plain",), tokenizer=tokenizer, max_position_embeddings=512)
    _stir(model.new_adapter("tuned", vision=VISION, method="prompts+scales", seed=1))
    pictures = [Path("one.png"), Path("two.png")]
    features = {path: torch.full((6,), float(number)) for number, path in enumerate(pictures)}
    asked = [
        Record((question_turn("Which?"), Turn("assistant", "red")), 1, (picture,)) for picture in pictures
    ]
    answers = [["red", "blue"]] * 2
    together = answer_likelihoods(model, asked, answers, features=features, adapter="tuned")
    apart = [
        answer_likelihoods(model, [record], answers[:1], features=features, adapter="tuned")[0]
        for record in asked
    ]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(apart), rtol=1e-4, atol=1e-4)


def test_threads_keep_to_their_own() -> None:
    model = tuned_model()
    tokens = torch.stack(random_rows(30, 30))
    names = ("tuned", "plain", NO_ADAPTER) * 20
    expected = {name: logits(model, tokens, name) for name in names[:3]}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: logits(model, tokens, name), names))
    assert all(torch.equal(got, expected[name]) for name, got in zip(names, found, strict=True))


def test_a_copy_of_the_model_computes_the_same() -> None:
    model = tuned_model()
    tokens = torch.stack(random_rows(9, 9))
    assert torch.equal(logits(copy.deepcopy(model), tokens, "tuned"), logits(model, tokens, "tuned"))


# --- its gradient -------------------------------------------------------------------------------------------


def _gradient(model: LlamaAdapter) -> Tensor:
    """Of a pack of rows."""
    tuning = model.get_adapter("tuned").scales.values
    tuning.grad = None
    answer_loss(model, pack(EXAMPLES), adapter="tuned").sum().backward()
    assert tuning.grad is not None
    return tuning.grad.clone()


def test_its_gradient_is_that_of_the_other_weights() -> None:
    """With W' = W (1 + s) that of s is the sum over W times its own, and that of b the bias's own."""
    model = tuned_model()
    reference = with_other_weights(model, "llama")
    reference.decoder.requires_grad_(True)
    prompts = prompts_alone(model)
    answer_loss(reference, pack(EXAMPLES), adapter=prompts).sum().backward()
    expected = []
    for layer in (1, 2):
        ours, theirs = (
            projections(each.decoder, attention_layers(each.decoder)[layer]) for each in (model, reference)
        )
        for frozen, changed in zip(ours, theirs, strict=True):
            assert changed.weight.grad is not None and changed.bias.grad is not None
            expected += [(frozen.weight * changed.weight.grad).sum(1), changed.bias.grad]
    torch.testing.assert_close(_gradient(model).flatten(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_layers_that_are_computed_again_have_it_again() -> None:
    model = tuned_model()
    expected = _gradient(model)
    checkpoint_activations(model.decoder)
    assert torch.equal(_gradient(model), expected)


# --- kept and refused ---------------------------------------------------------------------------------------


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tuned_model()
    save_adapter(model.get_adapter("tuned"), tmp_path)
    loaded = load_adapter(tmp_path)
    assert loaded.config.method == "prompts+scales"
    fresh = build_tiny_model()
    fresh.add_adapter("loaded", loaded)
    tokens = torch.stack(random_rows(9, 9))
    assert torch.equal(logits(fresh, tokens, "loaded"), logits(model, tokens, "tuned"))


def test_the_authors_layout_has_no_room_for_it(tmp_path: Path) -> None:
    adapter = build_tiny_model().new_adapter("tuned", method="prompts+scales")
    with pytest.raises(UsageError, match="can hold only prompts"):
        export_pth(adapter, tmp_path / "theirs.pth")
    assert not list(tmp_path.iterdir())


def test_a_width_that_does_not_fit_is_refused() -> None:
    model = tuned_model()
    config = model.get_adapter("tuned").config
    stored = replace(config, parts=(PromptsConfig(), ScalesConfig(10)), projections={})
    with pytest.raises(UsageError, match="has 10 scales and biases a layer; this base has room for 448"):
        model.add_adapter("other", Adapter(stored))
    with pytest.raises(UsageError, match="width: -1 given"):
        ScalesConfig(-1)
    elsewhere = replace(config, projections={"mlp.up_proj": (32, 99)})
    with pytest.raises(UsageError, match="whose layers have other projections"):
        model.add_adapter("other", Adapter(elsewhere))


def test_one_that_was_stored_without_the_names_of_its_projections_learns_them() -> None:
    """As in folders of format version 1."""
    model = tuned_model()
    adapter = model.get_adapter("tuned")
    parts = (PromptsConfig(3), ScalesConfig(2 * sum(WIDTHS)))
    stored = Adapter(replace(adapter.config, parts=parts, projections={}))
    stored.load_state_dict(adapter.state_dict())
    model.add_adapter("stored", stored)
    assert stored.config == adapter.config
    tokens = torch.stack(random_rows(9, 9))
    assert torch.equal(logits(model, tokens, "stored"), logits(model, tokens, "tuned"))
