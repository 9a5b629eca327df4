"""PEFT's folders: we read what PEFT wrote, and PEFT reads what we write, with the same logits."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.peft_folders import read_peft
from llama_adapter.methods.peft_writing import write_peft
from llama_adapter.model import LlamaAdapter
from tests import tiny_models

TOKENS = torch.tensor([[5, 9, 33, 7, 21, 2], [3, 44, 12, 60, 8, 2]])
LORA = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM"}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Settings with which PEFT can adapt the decoder.
LORAS: dict[str, dict[str, Any]] = {
    "two names": {"target_modules": ["q_proj", "v_proj"]},
    "all names": {"target_modules": ALL},
    "a regular expression": {"target_modules": r".*self_attn\.(q|o)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "the family's default": {},
    "rsLoRA": {"target_modules": ["down_proj"], "use_rslora": True},
    "the top layer": {"target_modules": ["q_proj"], "layers_to_transform": [2]},
    "a layer left out": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "a module left out": {
        "target_modules": ["q_proj"],
        "exclude_modules": ["model.layers.1.self_attn.q_proj"],
    },
    "ranks of their own": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "scales of their own": {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"layers.1.self_attn.v_proj": 2, "q_proj": 5},
        "rank_pattern": {r"layers.\d.self_attn.q_proj": 4},
        "use_rslora": True,
    },
}


def build_decoder(family: str = "llama", **settings: Any) -> PreTrainedModel:
    """In float64, so that logits differ only if the computation does."""
    return tiny_models.build_tiny_decoder(family, torch.float64, **settings)


def stir(module: nn.Module, std: float = 0.3) -> None:
    """Set all trainable parameters to random values."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def peft_folder(decoder: PreTrainedModel, config: Any, folder: Path) -> Tensor:
    """Write an adapter of PEFT with random values. Returns the logits of the decoder with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(decoder), config)
    stir(model)
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    model.save_pretrained(folder)
    return logits


def ours(decoder: PreTrainedModel, folder: Path) -> LlamaAdapter:
    model = LlamaAdapter(copy.deepcopy(decoder), base="tiny")
    model.add_adapter("theirs", read_peft(folder, model.decoder, base="tiny", template="alpaca"))
    return model


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", [*LORAS, "ia3"])
def test_an_adapter_of_pefts_is_read_and_written_back(name: str, tmp_path: Path) -> None:
    decoder = build_decoder()
    config = IA3Config(task_type="CAUSAL_LM") if name == "ia3" else LoraConfig(**{**LORA, **LORAS[name]})
    expected = peft_folder(decoder, config, tmp_path / "theirs")
    model = ours(decoder, tmp_path / "theirs")
    assert not same(expected, logits_of(decoder))
    assert same(logits_of(model), expected)
    write_peft(model.get_adapter("theirs"), tmp_path / "back", model.decoder)
    back = PeftModel.from_pretrained(copy.deepcopy(decoder), tmp_path / "back")
    assert same(logits_of(back), expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_adaption_prompt_of_pefts_is_read_and_written_back(family: str, tmp_path: Path) -> None:
    decoder = build_decoder(family, **({"sliding_window": None} if family == "mistral" else {}))
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    expected = peft_folder(decoder, config, tmp_path / "theirs")
    model = ours(decoder, tmp_path / "theirs")
    assert not same(expected, logits_of(decoder))
    assert same(logits_of(model), expected)
    write_peft(model.get_adapter("theirs"), tmp_path / "back", model.decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = PeftModel.from_pretrained(copy.deepcopy(decoder), tmp_path / "back")
    assert same(logits_of(back), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_what_is_trained_here_is_read_by_peft(method: str, family: str, tmp_path: Path) -> None:
    if (method, family) == ("ia3", "gpt2"):
        pytest.skip("it has no k_proj")
    decoder = build_decoder(family)
    model = LlamaAdapter(copy.deepcopy(decoder), base="tiny")
    adapter = model.new_adapter("own", method=method, adapted_layers=2, seed=0)
    stir(adapter)
    write_peft(adapter, tmp_path / "own", model.decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about GPT-2's transposed weights
        peft = PeftModel.from_pretrained(copy.deepcopy(decoder), tmp_path / "own")
    assert not same(logits_of(model), logits_of(decoder))
    assert same(logits_of(peft), logits_of(model))
    again = read_peft(tmp_path / "own", model.decoder, base="tiny", template="alpaca")
    assert again.config.parts == adapter.config.parts
    assert again.config.adapted_layers == 2
    for name, value in adapter.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, atol=1e-6), name  # 1 + s in float32


def test_a_decoder_without_weights_is_enough(tmp_path: Path) -> None:
    decoder = build_decoder()
    expected = peft_folder(decoder, LoraConfig(**LORA, target_modules=ALL), tmp_path)
    with torch.device("meta"):
        structure = LlamaAdapter(type(decoder)(copy.deepcopy(decoder.config)), base="tiny").decoder
    model = LlamaAdapter(decoder, base="tiny")
    model.add_adapter("theirs", read_peft(tmp_path, structure, base="tiny", template="alpaca"))
    assert same(logits_of(model), expected)


# --- what cannot be read or written -------------------------------------------------------------------------


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "VERA"}, "a VERA of PEFT's; of its adapters LORA, IA3, ADAPTION_PROMPT can be read"),
        ({"use_dora": True}, "use_dora is 'True', which cannot be read"),
        ({"bias": "lora_only"}, "bias is 'lora_only', which cannot be read"),
        ({"lora_bias": True}, "lora_bias is 'True'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is .*lm_head.*, which cannot be read"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"of_tomorrow": 1}, "of_tomorrow is '1', which cannot be read"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights is 'pissa', which changes the base's own weights",
        ),
        ({"lora_alpha": "much"}, "lora_alpha, lora_dropout and alpha_pattern have to be numbers"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern: '\\(' is not a regular expression"),
    ],
)
def test_settings_that_we_lack_are_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    decoder = build_decoder()
    peft_folder(decoder, LoraConfig(**LORA, target_modules=["q_proj"]), tmp_path)
    edit(tmp_path, **values)
    with pytest.raises(UsageError, match=said):
        ours(decoder, tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(**LORA, target_modules=["q_proj", "lm_head"]), "'lm_head.*no linear projection"),
        (LoraConfig(**LORA, target_modules=["embed_tokens"]), "embed_tokens.*no linear projection"),
        (
            IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
            "IA3 on self_attn.q_proj; it can be read on k_proj, v_proj",
        ),
        (
            IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"], task_type="CAUSAL_LM"),
            "IA3 on self_attn.o_proj",
        ),
    ],
)
def test_modules_that_we_do_not_adapt_are_refused(config: Any, said: str, tmp_path: Path) -> None:
    decoder = build_decoder()
    peft_folder(decoder, config, tmp_path)
    with pytest.raises(UsageError, match=said):
        ours(decoder, tmp_path)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    decoder = build_decoder()
    peft_folder(decoder, LoraConfig(**LORA, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(UsageError, match=r"has a tensor of .* this base has"):
        ours(build_decoder(hidden_size=16), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "1.self_attn.q_proj.lora_B" not in name}, path
    )
    with pytest.raises(UsageError, match=r"self_attn.q_proj of layer 1 lacks its lora_B.weight"):
        ours(decoder, tmp_path)
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, path)
    with pytest.raises(UsageError, match="not finite"):
        ours(decoder, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read"):
        ours(decoder, tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match=r"has no adapter_model.safetensors"):
        ours(decoder, tmp_path)


def test_a_gate_that_no_tanh_reaches_is_refused(tmp_path: Path) -> None:
    decoder = build_decoder()
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    peft_folder(decoder, config, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gate = next(name for name in tensors if name.endswith("gate"))
    save_file({**tensors, gate: torch.tensor([1.5])}, path)
    with pytest.raises(UsageError, match=r"is 1.5; it has to lie between -1 and 1"):
        ours(decoder, tmp_path)
    save_file(tensors, path)
    with pytest.raises(UsageError, match="of the family 'qwen3'"):
        ours(build_decoder("qwen3"), tmp_path)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("scales", "only one of lora, ia3, prompts; this adapter is scales"),
        ("prompts+lora", r"this adapter is prompts\+lora"),
        ("prompts", "one gate a layer; this adapter's heads have gates of their own"),
    ],
)
def test_what_peft_has_no_room_for_is_not_written(method: str, said: str, tmp_path: Path) -> None:
    model = LlamaAdapter(build_decoder(), base="tiny")
    adapter = model.new_adapter("own", method=method, adapted_layers=2, seed=0)
    stir(adapter)
    with pytest.raises(UsageError, match=said):
        write_peft(adapter, tmp_path / "own", model.decoder)
    assert not (tmp_path / "own").exists()
