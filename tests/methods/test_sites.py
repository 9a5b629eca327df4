"""Parts that act on what a layer's modules give: a made-up one, against a decoder that is changed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_adapter.common.errors import UsageError
from llama_adapter.methods import config as config_module
from llama_adapter.methods import table
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.config import AdapterConfig
from llama_adapter.methods.part import PartConfig
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.probe import prepare_decoder
from llama_adapter.methods.prompts import PromptsConfig
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import SitePart, projections_of, register_parameters
from llama_adapter.methods.state import merge_states
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing.losses import answer_loss
from llama_adapter.packing.pack import pack
from tests.tiny_models import build_tiny_decoder, random_rows
from tests.train_tiny import rows

EXAMPLES = [replace(example, images=()) for example in rows(4)[0]]
WIDTHS = {"attention": (32, 32), "mlp": (32, 32)}  # of the sub-layers


@dataclass(frozen=True)
class NarrowConfig(PartConfig):
    """Settings of `Narrow`."""

    rank: int = 2
    sites: tuple[str, ...] = ("self_attn.q_proj", "mlp.down_proj", "attention", "mlp")


class Narrow(SitePart):
    """y + U D x at some sites: both matrices of a small rank, (L, rank, in) and (L, out, rank)."""

    kind = "narrow"
    Config = NarrowConfig

    def __init__(
        self, config: NarrowConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        tensors = {}
        for site in config.sites:
            width, out = {**layout.projections, **WIDTHS}[site]
            down = torch.randn(layout.adapted_layers, config.rank, width, generator=generator)
            tensors[f"{site}.down"] = down * width**-0.5
            tensors[f"{site}.up"] = torch.zeros(layout.adapted_layers, out, config.rank)
        register_parameters(self, tensors)

    @staticmethod
    def act(own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return y + x @ own["down"].transpose(-1, -2) @ own["up"].transpose(-1, -2)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Narrow` is in the table of methods, before scales."""
    parts = {**table.PARTS, "narrow": Narrow}
    parts["scales"] = parts.pop("scales")
    for module in (table, config_module):
        monkeypatch.setattr(module, "PARTS", parts)
        monkeypatch.setattr(module, "METHODS", ("prompts", "narrow", "scales"))
    for module in ("llama_adapter.methods.adapter", "llama_adapter.methods.state"):
        monkeypatch.setattr(f"{module}.PARTS", parts)
    monkeypatch.setattr("llama_adapter.surface.making.PARTS", parts)


METHODS = {
    "prompts": "prompts",
    "narrow": "narrow",
    "all": "scales+prompts+narrow",
    "scaled": "scales",
}


def stir(adapter: Adapter, seed: int) -> None:
    """No parameter stays at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3, generator=generator)


@pytest.fixture
def model() -> LlamaAdapter:
    """An adapter of each method in `METHODS`, each with another number of layers."""
    model = LlamaAdapter(build_tiny_decoder(), base="tiny-base")
    for seed, (name, method) in enumerate(METHODS.items()):
        options: dict[str, Any] = {"rank": 1 + seed} if "narrow" in method else {}
        model.new_adapter(name, method=method, adapted_layers=1 + seed % 3, seed=seed, **options)
        stir(model.get_adapter(name), seed)
    return model


def logits(model: LlamaAdapter, tokens: Tensor, adapter: Any, **kwargs: Any) -> Tensor:
    found: Tensor = model(input_ids=tokens, adapter=adapter, **kwargs).logits
    return found


# --- what it computes ---------------------------------------------------------------------------------------


def test_it_acts_where_it_says(model: LlamaAdapter) -> None:
    """At projections and sub-layers of the top layers; by hooks that a test writes itself."""
    adapter = model.new_adapter("two", method="narrow", adapted_layers=2, seed=9)
    stir(adapter, 9)
    plain = LlamaAdapter(build_tiny_decoder())
    tensors = dict(adapter["narrow"].named_parameters())
    for place, layer in enumerate(plain.decoder.model.layers[1:]):
        modules = {"attention": layer.self_attn, "mlp": layer.mlp}
        for site in NarrowConfig().sites:
            module = modules.get(site) or layer.get_submodule(site)
            matrix = tensors[f"{site}.up"][place] @ tensors[f"{site}.down"][place]

            def add(_: Any, args: Any, kwargs: Any, output: Any, matrix: Tensor = matrix) -> Any:
                x = args[0] if args else kwargs["hidden_states"]
                if isinstance(output, tuple):
                    return (output[0] + x @ matrix.T, *output[1:])
                return output + x @ matrix.T

            module.register_forward_hook(add, with_kwargs=True)
    tokens = torch.stack(random_rows(9, 9))
    expected = logits(plain, tokens, "none")
    torch.testing.assert_close(logits(model, tokens, "two"), expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits(model, tokens, "none")).abs().max() > 0.1


def test_untrained_it_leaves_the_base_s_logits_bit_for_bit() -> None:
    tokens = torch.stack(random_rows(9, 9))
    expected = build_tiny_decoder()(tokens).logits
    model = LlamaAdapter(build_tiny_decoder())
    for method in METHODS.values():
        model.new_adapter(method, method=method)
        assert torch.equal(logits(model, tokens, method), expected)
        assert torch.equal(logits(model, tokens, model.project(method)), expected)
        assert torch.equal(logits(model, tokens, "none"), expected)


def test_rows_of_one_batch_with_different_methods_are_each_as_alone(model: LlamaAdapter) -> None:
    names = [*METHODS, "none", "narrow"]
    tokens = torch.stack(random_rows(*[7] * len(names)))
    merged = merge_states([model.project(name) for name in names])
    together = logits(model, tokens, merged)
    for row, name in enumerate(names):
        alone = logits(model, tokens[row : row + 1], name)[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            logits(model, tokens, merged.of_row(row))[row], alone, rtol=1e-4, atol=1e-5
        )
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    beams = model.generate(tokens, adapter=merged, **options)
    for row, name in enumerate(names):
        alone = model.generate(tokens[row : row + 1], adapter=name, **options)
        assert torch.equal(beams[row], alone[0])


def test_parts_act_in_the_order_of_the_table_whatever_they_are_named_in(model: LlamaAdapter) -> None:
    adapter = model.get_adapter("all")
    assert adapter.config.method == "prompts+narrow+scales" and list(adapter) == [
        "prompts",
        "narrow",
        "scales",
    ]
    state = merge_states([model.project(name) for name in ("scaled", "narrow")])
    assert [part.kind for part in state.parts] == ["narrow", "scales"]


def test_threads_keep_to_their_own(model: LlamaAdapter) -> None:
    tokens = torch.stack(random_rows(30, 30))
    names = [*METHODS, "none"] * 12
    expected = {name: logits(model, tokens, name) for name in [*METHODS, "none"]}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: logits(model, tokens, name), names))
    assert all(torch.equal(got, expected[name]) for name, got in zip(names, found, strict=True))


@pytest.mark.parametrize("name", [*METHODS, "none"])
def test_the_whole_forward_pass_compiles_to_one_graph(model: LlamaAdapter, name: str) -> None:
    tokens = torch.stack(random_rows(9, 9))
    for adapter in (name, model.project(name)):
        torch._dynamo.reset()
        compiled: Any = torch.compile(model.forward, fullgraph=True, backend="eager")
        found = compiled(tokens, adapter=adapter, use_cache=False).logits
        assert torch.equal(found, logits(model, tokens, adapter, use_cache=False))


# --- its gradient -------------------------------------------------------------------------------------------


def gradients(model: LlamaAdapter, name: str) -> dict[str, Tensor]:
    """Of a pack of rows."""
    adapter = model.get_adapter(name)
    adapter.zero_grad()
    answer_loss(model, pack(EXAMPLES), adapter=name).sum().backward()
    return {own: parameter.grad.clone() for own, parameter in adapter.named_parameters()}  # type: ignore[union-attr]


def test_packed_rows_and_recomputed_layers_have_the_gradients_of_rows_alone(model: LlamaAdapter) -> None:
    packed = gradients(model, "all")
    adapter = model.get_adapter("all")
    adapter.zero_grad()
    for example in EXAMPLES:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        scores = logits(model, ids, "all")[0, :-1]
        nn.functional.cross_entropy(scores, labels[0, 1:], ignore_index=-100, reduction="sum").backward()
    for own, parameter in adapter.named_parameters():
        torch.testing.assert_close(packed[own], parameter.grad, rtol=1e-3, atol=1e-4)
        assert packed[own].abs().max() > 0
    model.activation_checkpointing_enable()
    for own, gradient in gradients(model, "all").items():
        assert torch.equal(gradient, packed[own])


def test_nothing_is_left_noted_behind_a_forward_pass(model: LlamaAdapter) -> None:
    """A module that is called by itself afterwards computes what it did before."""
    layer = model.decoder.model.layers[-1]
    states = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    before = layer.mlp(states)
    logits(model, torch.stack(random_rows(5)), "all")
    assert torch.equal(layer.mlp(states), before)


# --- what it is built for -----------------------------------------------------------------------------------


def test_it_is_saved_and_loaded_with_the_names_of_its_sites(model: LlamaAdapter, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path, adapter="all")
    again = LlamaAdapter(build_tiny_decoder(), base="tiny-base")
    again.load_adapter(tmp_path / "all" if (tmp_path / "all").is_dir() else tmp_path, name="again")
    names = set(again.get_adapter("again").state_dict())
    assert {"narrow.self_attn.q_proj.down", "narrow.mlp.up", "scales.values", "prompts.gates"} <= names
    tokens = torch.stack(random_rows(9, 9))
    assert torch.equal(logits(again, tokens, "again"), logits(model, tokens, "all"))


def test_options_go_to_the_part_that_has_them() -> None:
    model = LlamaAdapter(build_tiny_decoder())
    adapter = model.new_adapter("both", method="prompts+narrow", prompt_length=4, rank=3)
    assert adapter.config.parts == (PromptsConfig(4), NarrowConfig(3))
    assert adapter.config.options == {
        "prompt_length": 4,
        "prompt_mlp": 0,
        "rank": 3,
        "sites": NarrowConfig().sites,
    }
    with pytest.raises(
        UsageError, match=r"method 'narrow' has no option 'prompt_length'; it has rank, sites"
    ):
        model.new_adapter("new", method="narrow", prompt_length=4)
    for method, said in (
        ("nothing", "there is no 'nothing'; choose among prompts, narrow, scales"),
        ("narrow+narrow", "has 'narrow' twice"),
        ("", "there is no ''"),
    ):
        with pytest.raises(UsageError, match=said):
            model.new_adapter("new", method=method)
    assert list(adapter.parameter_groups()) == ["prompts", "gates", "narrow"]


def test_a_decoder_with_other_projections_is_refused() -> None:
    decoder = prepare_decoder(build_tiny_decoder(intermediate_size=40))
    sizes = projections_of(decoder, 2)
    assert sizes["mlp.down_proj"] == (40, 32) and len(attention_layers(decoder)) == 3
    made = LlamaAdapter(build_tiny_decoder()).new_adapter("narrow", method="narrow")
    assert isinstance(made.config, AdapterConfig)
    with pytest.raises(UsageError, match="whose layers have other projections"):
        LlamaAdapter(decoder).add_adapter("narrow", made)
