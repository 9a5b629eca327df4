"""Every method that acts in the layers: what all promise, and PEFT's numbers where it has the method."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.checkpoint import load_adapter, save_adapter
from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.state import merge_states
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.packing.losses import answer_loss
from llama_adapter.packing.pack import pack
from llama_adapter.quantization.linear import quantize_decoder
from tests.packed import check_packed_as_alone
from tests.tiny_models import build_tiny_decoder, build_tiny_model
from tests.train_tiny import rows

EXAMPLES = [replace(example, images=()) for example in rows(8)[0]]
TOKENS = torch.tensor([[5, 9, 33, 7, 21, 2], [3, 44, 12, 60, 8, 2]])

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("ia3", {}),
    "bitfit": ("bitfit", {}),
    "lora": ("lora", {"rank": 3}),
    "rslora": ("lora", {"rank": 4, "rslora": True, "targets": ("q_proj", "mlp.down_proj")}),
    "adalora": ("adalora", {"init_rank": 4, "target_rank": 2, "targets": ("v_proj", "mlp.up_proj")}),
    "sequential": ("bottleneck", {"bottleneck_width": 5}),
    "parallel": ("bottleneck", {"bottleneck_width": 4, "placement": "parallel"}),
    "prefix": ("prefix", {"prefix_length": 3}),
    "prefix of an MLP": ("prefix", {"prefix_length": 4, "prefix_mlp": 5}),
    "prompts of an MLP": ("prompts", {"prompt_length": 3, "prompt_mlp": 6}),
    "prompts+prefix+scales": ("prompts+prefix+scales", {"prompt_length": 2, "prefix_length": 2}),
    "prompts+lora": ("prompts+lora", {"rank": 2, "prompt_length": 3}),
    "scales+lora+bottleneck": ("scales+lora+bottleneck", {}),
}


def add(model: LlamaAdapter, name: str, *, stirred: bool = True, layers: int = 2) -> Adapter:
    """A new adapter of one of `METHODS`, its parameters random where they would start at zero."""
    method, options = METHODS[name]
    adapter = model.new_adapter(
        name.replace(".", ""), method=method, adapted_layers=layers, seed=3, **options
    )
    if stirred:
        generator = torch.Generator().manual_seed(4)
        for parameter in adapter.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3, generator=generator)
    return adapter


def logits(model: LlamaAdapter, tokens: Tensor, adapter: Any) -> Tensor:
    found: Tensor = model(input_ids=tokens, adapter=adapter).logits
    return found


@pytest.mark.parametrize("name", [name for name in METHODS if "prefix" not in name])
def test_it_starts_as_the_base_bit_for_bit(name: str) -> None:
    model = build_tiny_model()
    add(model, name, stirred=False)
    assert torch.equal(logits(model, TOKENS, name), logits(model, TOKENS, NO_ADAPTER))


@pytest.mark.parametrize("name", METHODS)
def test_it_moves_the_answer_and_is_kept_in_a_folder(name: str, tmp_path: Path) -> None:
    model = build_tiny_model()
    adapter = add(model, name)
    with torch.no_grad():
        before = logits(model, TOKENS, name)
        assert (before - logits(model, TOKENS, NO_ADAPTER)).abs().max() > 1e-2
        save_adapter(adapter, tmp_path / "kept")
        loaded = load_adapter(tmp_path / "kept")
        assert loaded.config == adapter.config
        model.add_adapter("again", loaded)
        assert torch.equal(logits(model, TOKENS, "again"), before)


@pytest.mark.parametrize("name", METHODS)
def test_packed_rows_have_the_padded_loss_and_gradients(name: str) -> None:
    model = build_tiny_model(dtype=torch.float64)
    adapter = add(model, name).double().requires_grad_(True)
    check_packed_as_alone(model, name, adapter, EXAMPLES)


@pytest.mark.parametrize("name", ["lora", "sequential", "prompts+prefix+scales"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = build_tiny_model()
        adapter = add(model, name).requires_grad_(True)
        if checkpointed:
            checkpoint_activations(model.decoder)
        answer_loss(model, pack(EXAMPLES), adapter=name).sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, rtol=1e-5, atol=1e-6)


def test_rows_of_different_methods_share_a_batch() -> None:
    model = build_tiny_model(names=("prompts",))
    for number, name in enumerate(METHODS):
        add(model, name, layers=2 + number % 2)
    names = ["prompts", *METHODS, NO_ADAPTER]
    tokens = TOKENS[:1].expand(len(names), -1)
    with torch.no_grad():
        together = logits(model, tokens, merge_states([model.project(name) for name in names]))
        for row, name in enumerate(names):
            alone = logits(model, TOKENS[:1], name)
            assert torch.allclose(together[row], alone[0], atol=1e-4), name


def test_two_threads_use_different_methods_at_once() -> None:
    model = build_tiny_model()
    for name in METHODS:
        add(model, name)
    with torch.no_grad():
        alone = {name: logits(model, TOKENS, name) for name in METHODS}
    names = list(METHODS) * 4

    @torch.no_grad()
    def ask(name: str) -> bool:
        return torch.allclose(logits(model, TOKENS, name), alone[name], atol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, names))


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3", "bitfit", "sequential", "prefix"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_on_a_quantised_base_it_is_what_it_is_on_the_rounded_weights(name: str, format: str) -> None:
    decoder, rounded = build_tiny_decoder(), build_tiny_decoder()
    quantize_decoder(decoder, format)
    for key, module in decoder.named_modules():
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            rounded.get_submodule(key).weight.data.copy_(weight)
    models = [LlamaAdapter(own, base="tiny") for own in (decoder, rounded)]
    adapters = [add(model, name).requires_grad_(True) for model in models]
    adapters[1].load_state_dict(adapters[0].state_dict())
    found, expected = (logits(model, TOKENS, name) for model in models)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    for own in (found, expected):
        own.square().mean().backward()
    for (key, parameter), other in zip(adapters[0].named_parameters(), adapters[1].parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() < 0.05 * other.grad.norm(), key


# --- against PEFT -------------------------------------------------------------------------------------------


def peft_model(config: Any) -> tuple[LlamaAdapter, Any]:
    """The same tiny decoder with our adapter and with PEFT's, in float64."""
    decoder = build_tiny_decoder(dtype=torch.float64)
    return LlamaAdapter(copy.deepcopy(decoder), base="tiny"), get_peft_model(decoder, config)


def layers_of(model: Any) -> list[nn.Module]:
    return list(model.base_model.model.model.layers)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_computes_what_pefts_does(rslora: bool) -> None:
    targets = ("q_proj", "v_proj", "up_proj")
    model, peft = peft_model(
        LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), use_rslora=rslora, task_type="CAUSAL_LM")
    )
    adapter = model.new_adapter(
        "lora", method="lora", adapted_layers=3, rank=3, alpha=7.0, targets=targets, rslora=rslora, seed=1
    ).double()
    adapter.requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for name, ours in adapter.named_parameters():
        site, _, own = name.removeprefix("lora.").rpartition(".")
        nn.init.normal_(ours, std=0.3, generator=generator)
        for index, layer in enumerate(layers_of(peft)):
            module = layer.get_submodule(site)
            theirs = (module.lora_A if own == "down" else module.lora_B)["default"].weight
            theirs.data.copy_(ours.data[index])
            pairs.append((ours, index, theirs))
    _same(model, peft, "lora", pairs)


def test_ia3_computes_what_pefts_does() -> None:
    model, peft = peft_model(
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        )
    )
    adapter = model.new_adapter("ia3", method="ia3", adapted_layers=3, seed=1).double().requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for name, ours in adapter.named_parameters():
        site = name.removeprefix("ia3.").removesuffix(".scale").replace("up_proj", "down_proj")
        nn.init.normal_(ours, std=0.3, generator=generator)
        for index, layer in enumerate(layers_of(peft)):
            theirs = layer.get_submodule(site).ia3_l["default"]
            theirs.data.copy_((1 + ours.data[index]).view_as(theirs))
            pairs.append((ours, index, theirs))
    _same(model, peft, "ia3", pairs)


def _same(model: LlamaAdapter, peft: Any, name: str, pairs: list[tuple[Tensor, int, Tensor]]) -> None:
    ours = model(input_ids=TOKENS, labels=TOKENS, adapter=name)
    theirs = peft(input_ids=TOKENS, labels=TOKENS)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    for parameter, index, other in pairs:
        assert torch.allclose(parameter.grad[index].flatten(), other.grad.flatten(), atol=1e-7)


# --- each one's own -----------------------------------------------------------------------------------------


def test_dropout_is_for_training_alone() -> None:
    model = build_tiny_model()
    adapter = model.new_adapter("lora", method="lora", adapted_layers=2, rank=3, dropout=0.5, seed=1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        assert torch.equal(logits(model, TOKENS, "lora"), logits(model, TOKENS, "lora"))
        kept = logits(model, TOKENS, model.project("lora"))
    adapter.requires_grad_(True)
    torch.manual_seed(0)
    first, second = (logits(model, TOKENS, "lora") for _ in range(2))
    assert not torch.allclose(first, second)
    adapter.eval()
    assert torch.allclose(logits(model, TOKENS, "lora"), kept, atol=1e-6)


def test_a_bottleneck_acts_after_both_sublayers() -> None:
    model = build_tiny_model()
    adapter = add(model, "sequential", layers=1)
    state = adapter.bottleneck.state_dict()
    decoder = copy.deepcopy(model.decoder)
    layer = attention_layers(model.decoder)[-1]
    last = decoder.model.layers[int(layer.layer_idx)]  # type: ignore[arg-type]

    def after(site: str) -> Any:
        down, up = state[f"{site}.down"][0], state[f"{site}.up"][0]

        def change(module: nn.Module, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            hidden = nn.functional.gelu(h @ down.T + state[f"{site}.down_bias"][0])
            changed = h + hidden @ up.T + state[f"{site}.up_bias"][0]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return change

    last.self_attn.register_forward_hook(after("attention"))
    last.mlp.register_forward_hook(after("mlp"))
    with torch.no_grad():
        expected = decoder(input_ids=TOKENS).logits
        assert torch.allclose(logits(model, TOKENS, "sequential"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lora", "rank": 0}, "rank: 0 given; choose 1 or more"),
        ({"method": "lora", "alpha": 0.0}, "alpha: 0.0 given; choose a number above 0"),
        ({"method": "lora", "dropout": 1.0}, "dropout: 1.0 given"),
        ({"method": "lora", "targets": ("q_prj",)}, "no projection 'q_prj'; it has mlp.down_proj"),
        ({"method": "bottleneck", "bottleneck_width": 0}, "bottleneck width: 0 given; choose 1 or more"),
        ({"method": "bottleneck", "placement": "beside"}, "choose sequential or parallel"),
        ({"method": "prefix", "prefix_length": 0}, "prefix length: 0 given; choose 1 or more"),
        ({"method": "prefix", "prefix_mlp": -1}, "prefix MLP: -1 given; choose its width, or 0 for none"),
        ({"method": "prompts", "prompt_mlp": -1}, "prompt MLP: -1 given; choose its width, or 0 for none"),
        ({"method": "adalora", "target_rank": 13}, "target rank: 13 given with a first rank of 12"),
        ({"method": "adalora", "alpha": -1.0}, "alpha: -1.0 given; choose a number above 0"),
        ({"method": "adalora", "prune_from": 0.8}, "from 0.8 to 0.7 of the steps"),
        ({"method": "adalora", "prune_every": 0}, "prune every: 0 steps given; choose 1 or more"),
        ({"method": "adalora", "orthogonality": -0.1}, "orthogonality: -0.1 given"),
        ({"method": "ia3", "rank": 3}, "has no option 'rank'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_tiny_model().new_adapter("new", adapted_layers=2, **options)
