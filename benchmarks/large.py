"""The large suite: a random base of LLaMA-7B's shape, quantised from the start, answers on a CPU."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import LLAMA_7B
from llama_adapter.common.errors import UsageError
from llama_adapter.common.memory import process_memory

if TYPE_CHECKING:  # slow to import
    import torch
    from transformers import PreTrainedModel

    from llama_adapter.model import LlamaAdapter
    from llama_adapter.quantization.formats import Quantized

QUESTION_TOKENS = 8


def large(
    model: LlamaAdapter, arguments: argparse.Namespace, *, shape: dict[str, Any] | None = None
) -> dict[str, float]:
    """Time an answer's tokens after the first, and the process's peak memory.

    Args:
        model: lends its tokenizer.
        shape: what a LlamaConfig takes.
    """
    import torch

    from llama_adapter.decoding.sampling import Sampling
    from llama_adapter.decoding.streams import stream_tokens
    from llama_adapter.model import NO_ADAPTER, LlamaAdapter
    from llama_adapter.quantization.linear import QuantizedWeight, kept_bytes

    if arguments.quantize is None:
        raise UsageError("the suite large takes --quantize int4 or --quantize int8: float32 needs 27 GB")
    generator = torch.Generator().manual_seed(0)
    started = time.monotonic()
    decoder = build_random_base(LLAMA_7B if shape is None else shape, arguments.quantize, generator)
    answering = LlamaAdapter(decoder, model.tokenizer, base="random")
    ready = time.monotonic() - started
    weights = [module for module in decoder.modules() if isinstance(module, QuantizedWeight)]
    parameters = sum(weight.shape.numel() for weight in weights)
    print(
        f"{parameters / 1e9:.2f}e9 random weights in {arguments.quantize}, "
        f"{kept_bytes(decoder) / 1e9:.2f} GB, ready after {ready:.0f} s",
        flush=True,
    )
    question = torch.randint(decoder.config.vocab_size, (1, QUESTION_TOKENS), generator=generator)
    sampling = Sampling(max_new_tokens=arguments.new_tokens, temperature=0)
    stream = stream_tokens(partial(answering, adapter=NO_ADAPTER), question, sampling, ())
    started = time.monotonic()
    next(stream)
    first, processor = time.monotonic(), time.process_time()
    count = sum(1 for _ in stream)
    seconds, processor = time.monotonic() - first, time.process_time() - processor
    peak = process_memory(torch.device("cpu"), peak=True)
    figures = {"large_tokens_per_second": count / seconds}
    print(
        f"  {count / seconds:.2f} tokens/s, {processor / count:.2f} s of processor time each; "
        f"{first - started:.1f} s to the first"
    )
    if peak is not None:
        figures["large_peak_gb"] = peak / 1e9
        print(f"  peak memory {peak / 1e9:.2f} GB")
    return figures


def build_random_base(shape: dict[str, Any], format: str, generator: torch.Generator) -> PreTrainedModel:
    """A decoder with random quantised weights. No matrix of it ever is in floats."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, LlamaConfig

    from llama_adapter.quantization.linear import QuantizedEmbedding, QuantizedLinear, QuantizedWeight

    config = LlamaConfig(**shape)
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(config)
    head = decoder.get_output_embeddings()
    for name, module in list(decoder.named_modules()):
        if type(module) not in (nn.Linear, nn.Embedding):
            continue
        own = "int8" if module is head or type(module) is nn.Embedding else format
        rows, columns = module.weight.shape
        weight = QuantizedWeight(random_weight(rows, columns, own, generator))
        kind = QuantizedEmbedding if type(module) is nn.Embedding else QuantizedLinear
        decoder.set_submodule(name, kind(weight, torch.float32))
    inner = decoder.base_model
    inner.rotary_emb = type(inner.rotary_emb)(config)
    ones = {name: torch.ones(norm.shape) for name, norm in decoder.named_parameters()}
    decoder.load_state_dict(ones, strict=False, assign=True)
    return decoder.eval().requires_grad_(False)


def random_weight(rows: int, columns: int, format: str, generator: torch.Generator) -> Quantized:
    """A matrix of random numbers whose weights are about 1 / sqrt(columns)."""
    import torch

    from llama_adapter.quantization.formats import BLOCK, INT4, Quantized

    blocks = -(-columns // BLOCK)
    ones = torch.ones(rows, blocks, dtype=torch.float16) * columns**-0.5
    if format == INT4:
        numbers = torch.randint(0, 256, (rows, blocks * BLOCK // 2), dtype=torch.uint8, generator=generator)
        return Quantized(format, columns, numbers, ones / 4.6, ones * (-7.5 / 4.6))  # numbers of 0 to 15
    numbers = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    return Quantized(format, columns, numbers, ones / 73)  # numbers of -127 to 127
