"""Every name that transformers and PEFT give their models: right, or refused in a line; none by accident."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel

import llama_adapter
from llama_adapter.common.errors import UsageError
from llama_adapter.model import LlamaAdapter
from llama_adapter.surface.passing import PASSED_METHODS, REFUSED
from tests.tiny_models import build_tiny_model

PUBLIC = {
    "Conversation",
    "LlamaAdapter",
    "Question",
    "Sampling",
    "TrainingSettings",
    "Turn",
    "__version__",
    "train",
}

# What LlamaAdapter has of its own; what torch's Module and transformers' generation give is theirs.
ATTRIBUTES = (
    {"decoder", "tokenizer", "adapters", "active_adapter", "base", "weights", "config", "generation_config"}
    | {"shape", "device", "context_length", "main_input_name", "model_tags"}
    | {"from_base", "from_pretrained", "load_adapter", "save_pretrained", "push_to_hub", "add_model_tags"}
    | {"new_adapter", "add_adapter", "get_adapter", "set_adapter", "delete_adapter", "unload"}
    | {"merge", "merge_and_unload"}
    | {"disable_adapters", "disable_adapter", "enable_adapters", "active_adapters", "answering_adapter"}
    | {"reference_model"}
    | {"get_base_model", "get_decoder", "set_requires_grad", "num_parameters", "get_memory_footprint"}
    | {"get_nb_trainable_parameters", "print_trainable_parameters", "set_attn_implementation"}
    | {"activation_checkpointing_enable", "gradient_checkpointing_enable", "get_compiled_call"}
    | {"forward", "project", "generate", "sees", "tower", "vision_config", "encode_images"}
    | {
        "chat",
        "stream_chat",
        "prepare_request",
        "project_requests",
        "encode_question",
        "template",
        "template_date",
        "end_ids",
    }
)


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    return build_tiny_model()


def test_the_public_names_of_the_package_are_these() -> None:
    assert set(llama_adapter.__all__) == PUBLIC
    assert all(hasattr(llama_adapter, name) for name in PUBLIC)


def test_the_public_names_of_the_model_are_these(model: LlamaAdapter) -> None:
    theirs = {*dir(nn.Module()), *dir(GenerationMixin)} - {"forward", "generate"}
    own = {name for name in {*dir(type(model)), *vars(model), *model._modules} if not name.startswith("_")}
    assert own - theirs == ATTRIBUTES


# The public names that transformers and PEFT define themselves.
THEIRS = sorted(
    name
    for name in {*dir(PreTrainedModel), *dir(LlamaForCausalLM), *dir(PeftModelForCausalLM), *dir(BaseTuner)}
    if not name.startswith("_") and not hasattr(nn.Module, name) and not hasattr(GenerationMixin, name)
)


@pytest.mark.parametrize("name", THEIRS)
def test_a_name_of_theirs_is_ours_passed_on_by_decision_or_refused(model: LlamaAdapter, name: str) -> None:
    if name in ATTRIBUTES:
        return
    try:
        value = getattr(model, name)
    except AttributeError as error:
        message = str(error)
        assert name in message and "\n" not in message
        assert not hasattr(model, name)
        if hasattr(PreTrainedModel, name):
            assert isinstance(error, UsageError)
        return
    assert name not in REFUSED
    if isinstance(value, nn.Module):
        assert value is not getattr(model.decoder, name), "it would compute without the adapter"
    elif callable(value) and not isinstance(value, type):
        assert name in PASSED_METHODS


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_names_say_why(model: LlamaAdapter, name: str) -> None:
    with pytest.raises(UsageError, match=f"no '{name}': ") as error:
        getattr(model, name)
    assert isinstance(error.value, AttributeError)


def test_methods_that_are_passed_on_exist(model: LlamaAdapter) -> None:
    not_everywhere = {"_default_compile_config", "activation_checkpointing_disable"}
    for name in PASSED_METHODS - not_everywhere:
        assert hasattr(PreTrainedModel, name), f"transformers has no {name} any more"
        assert getattr(model, name) == getattr(model.decoder, name)


def test_a_family_s_own_methods_and_private_ones_are_not_passed_on(model: LlamaAdapter) -> None:
    with pytest.raises(UsageError, match=r"model\.decoder\._init_weights"):
        _ = model._init_weights
    assert model._no_split_modules == model.decoder._no_split_modules
    assert model.vocab_size == 64 and model.dtype == torch.float32
    nothing: Any = model
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = nothing.nonsense
