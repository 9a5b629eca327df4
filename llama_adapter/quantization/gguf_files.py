"""Loads decoders from GGUF files. The weights keep the file's own blocks.

transformers reads GGUF too, but dequantises every matrix of most families. It is used here for what only it
knows: the names of the tensors in its own decoders, and the order of a matrix's rows. GGUF has another order
for LLaMA's queries and keys; rows can be moved as blocks just as they can be as floats.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from llama_adapter.common.errors import UsageError
from llama_adapter.common.gguf_reading import open_gguf
from llama_adapter.quantization.formats import GGUF_KINDS, Quantized
from llama_adapter.quantization.linear import QuantizedEmbedding, QuantizedLinear, QuantizedWeight

FLOATS = ("F32", "F16", "BF16")


def load_gguf(path: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load the decoder in a GGUF file. Quantised matrices stay as they are; all else gets the dtype.

    A line on standard error names tensors that the decoder has no place for.

    Args:
        config: the config that transformers makes of the file's metadata.

    Raises:
        UsageError: blocks of a kind that can't be kept, or a file that does not fill the decoder.
    """
    reader = open_gguf(path)
    architecture = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    with no_init_weights():  # memory that is never written takes no space
        decoder: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = get_gguf_hf_weights_map(decoder, processor)
    missing = {name for name, _ in decoder.named_parameters()}
    unused: list[str] = []
    floats: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        kind = tensor.tensor_type.name
        if name is None:
            unused.append(tensor.name)
            continue
        missing.discard(name)
        if kind in FLOATS:
            floats[name] = _read_floats(path, tensor, processor).to(dtype)
        elif kind in GGUF_KINDS:
            weight = _read_blocks(path, tensor, processor)
            _replace(decoder, name.removesuffix(".weight"), weight, dtype, tensor.name)
        else:
            raise UsageError(
                f"{path.name}: {tensor.name} has blocks of the kind {kind}, which cannot be kept; kept are "
                f"{', '.join(GGUF_KINDS)}; --quantize int8 quantises the file's weights again"
            )
    _, unexpected = decoder.load_state_dict(floats, strict=False, assign=True)
    head, embedding = decoder.get_output_embeddings(), decoder.get_input_embeddings()
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")
        if isinstance(embedding, QuantizedEmbedding):
            decoder.set_output_embeddings(QuantizedLinear(embedding.quantized, dtype, head.bias))
        else:
            decoder.tie_weights()
    if missing or unexpected:
        wrong = ", ".join(sorted({*missing, *unexpected})[:5])
        raise UsageError(f"{path.name}: the file does not fit a {config.model_type} decoder: {wrong}")
    if unused:
        print(f"{path.name}: not used: {', '.join(unused)}", file=sys.stderr)
    decoder.requires_grad_(False)
    decoder.generation_config = GenerationConfig.from_model_config(config)
    return decoder.eval()


def _read_floats(path: Path, tensor: Any, processor: Any) -> Tensor:
    """A tensor of floats as transformers has it, in float32."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
    found = _process(processor, values, tensor.name)
    if found is None:
        raise UsageError(
            f"{path.name}: {tensor.name} {values.shape} is of a family whose GGUF files are only read whole; "
            "--quantize int8 quantises the file's weights again"
        )
    return torch.from_numpy(np.array(found, dtype=np.float32))


def _read_blocks(path: Path, tensor: Any, processor: Any) -> QuantizedWeight:
    """A matrix as in the file, with its rows in transformers' order."""
    *stack, columns = (int(size) for size in tensor.shape[::-1])
    rows = stack[-1] if len(stack) == 1 else 0
    order = np.arange(rows, dtype=np.int64)[:, None]
    moved = _process(processor, order, tensor.name)
    if not rows or moved is None or not np.array_equal(np.sort(moved, axis=0), order):
        raise UsageError(
            f"{path.name}: {tensor.name} {tuple(tensor.shape[::-1])} has no blocks that can be kept; "
            "--quantize int8 quantises the file's weights again"
        )
    # Copied into memory of its own: a mapped file would have to stay unchanged as long as the decoder is
    # used.
    blocks = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.data_offset).reshape(rows, -1)
    if not np.array_equal(moved, order):
        blocks = blocks[moved[:, 0]]
    return QuantizedWeight(Quantized(tensor.tensor_type.name, columns, torch.from_numpy(blocks), None))


def _process(processor: Any, values: Any, name: str) -> Any:
    """What transformers makes of a tensor's values; None where it needs more than these."""
    try:
        return processor.process(weights=values, name=name).weights
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def _replace(
    decoder: PreTrainedModel, name: str, weight: QuantizedWeight, dtype: torch.dtype, tensor: str
) -> None:
    """Replace a module without weights by a quantised one."""
    module: Any = decoder.get_submodule(name)
    if type(module) not in (nn.Linear, nn.Embedding) or module.weight.shape != weight.shape:
        raise UsageError(
            f"{tensor} {tuple(weight.shape)} does not fit {name}; --quantize int8 quantises the file's "
            "weights again"
        )
    if isinstance(module, nn.Embedding):
        decoder.set_submodule(name, QuantizedEmbedding(weight, dtype, module.padding_idx))
    else:
        # Its bias is loaded later, with all other floats.
        decoder.set_submodule(name, QuantizedLinear(weight, dtype, module.bias))
