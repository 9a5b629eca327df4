"""The gpu suite: what an optimiser step costs on a base of LLaMA-7B's shape, beside what it must cost.

The weights are random, which takes the same time; the rows have Alpaca's lengths. The floor is the time of
the matrix products alone, at the rate that one large product reaches on the same device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import rows_to_train_on, seconds_of

if TYPE_CHECKING:  # slow to import
    import torch

    from llama_adapter.data.examples import Example
    from llama_adapter.model import LlamaAdapter

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
PROMPTS, LAYERS = 10, 30  # the paper's K and L
BATCH = 64
MAX_TOKENS = 8192  # a batch of Alpaca in one pack
EPOCHS, ROWS = 5, 52_002  # the paper's training
# Dense bfloat16 FLOP/s by the makers' data sheets, by a part of the device's name.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
LARGE_PRODUCT = 8192  # rows and columns


@dataclass(frozen=True)
class Work:
    """What a step computes, in FLOP.

    Attributes:
        needed: of the matrix products: forward through all layers, backward (of the activations alone)
            through the adapted ones, both through the head for the labelled tokens.
        by_rule: 4 N a token that goes through the decoder, N its parameters without the embeddings.
    """

    needed: float
    by_rule: float


def gpu(
    model: LlamaAdapter,
    arguments: argparse.Namespace,
    *,
    shape: dict[str, Any] | None = None,
    adapted_layers: int = LAYERS,
    product: int = LARGE_PRODUCT,
) -> dict[str, float]:
    """Steps of the paper's training on a random base of a shape (LLaMA-7B's).

    Args:
        model: lends its tokenizer and its device.
        shape: what a LlamaConfig takes.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from llama_adapter.model import LlamaAdapter
    from llama_adapter.packing.losses import accumulate_gradient
    from llama_adapter.training.settings import TrainingSettings

    device, started = model.decoder.device, time.monotonic()
    config = LlamaConfig(**(LLAMA_7B if shape is None else shape))
    vocabulary = config.vocab_size
    examples = [
        replace(
            row,
            input_ids=[token % vocabulary for token in row.input_ids],
            labels=[label % vocabulary if label >= 0 else label for label in row.labels],
        )
        for row in rows_to_train_on(model, arguments, count=BATCH * (arguments.steps + 1))
    ]
    batches = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
    with device:
        decoder = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    large = LlamaAdapter(decoder, model.tokenizer, base="random")
    adapter = large.new_adapter("trained", prompt_length=PROMPTS, adapted_layers=adapted_layers, seed=0)
    settings = TrainingSettings()
    optimizer = torch.optim.AdamW(
        adapter.parameters(),
        lr=settings.peak_learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )

    def step(batch: list[Example]) -> None:
        accumulate_gradient(large, batch, device=device, max_tokens=MAX_TOKENS, adapter="trained")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parameters = sum(p.numel() for p in decoder.parameters())
    print(f"{parameters / 1e9:.2f}e9 random weights, bfloat16, {BATCH} rows a step", flush=True)
    step(batches[0])  # warms up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [seconds_of(lambda batch=batch: step(batch), device) for batch in batches[1:]]  # type: ignore[misc]
    works = [work_of(batch, decoder, adapted_layers) for batch in batches[1:]]
    rate = _rate_of_a_large_product(device, product)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((flops for part, flops in PEAKS.items() if part in name), None)
    by_rule = sum(work.by_rule for work in works) / sum(times)
    rows_per_second = BATCH * len(times) / sum(times)
    floors = [work.needed / rate for work in works]
    hours = EPOCHS * ROWS / rows_per_second / 3600
    median, floor = statistics.median(times), statistics.median(floors)
    print(f"  {name}: one product of {product} x {product} runs at {rate / 1e12:.1f} TFLOP/s")
    print(f"  a step {median:.3f} s; the floor, its matrix products at that rate, {floor:.3f} s")
    print(f"  {rows_per_second:.1f} rows/s: {hours:.2f} hours for {EPOCHS} epochs of {ROWS:,} rows")
    figures = {
        "gpu_rows_per_second": rows_per_second,
        "gpu_floor_share": sum(floors) / sum(times),
        "gpu_hours": hours,
    }
    if peak is None:
        print(
            f"  MFU left out: {name}'s peak is not known here; 4N FLOP a token: {by_rule / 1e12:.2f} TFLOP/s"
        )
    else:
        figures["gpu_mfu"] = by_rule / peak
        print(f"  MFU {figures['gpu_mfu']:.1%}: 4N FLOP a token, of {peak / 1e12:.0f} TFLOP/s")
    if device.type == "cuda":
        figures["gpu_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        print(f"  peak memory {figures['gpu_peak_gb']:.1f} GB, the weights among it")
    print(f"  the suite took {time.monotonic() - started:.0f} s")
    return figures


def work_of(batch: list[Example], decoder: torch.nn.Module, adapted_layers: int) -> Work:
    """What a packed step on a batch computes."""
    from llama_adapter.packing.pack import pack

    config: Any = decoder.config
    layer = sum(p.numel() for n, p in decoder.named_parameters() if ".layers.0." in n and p.ndim == 2)
    head = config.vocab_size * config.hidden_size
    packed = pack(batch)
    tokens, labelled = packed.input_ids.numel(), packed.targets.numel()
    layers = config.num_hidden_layers
    return Work(
        needed=2 * tokens * layer * (layers + adapted_layers) + 4 * labelled * head,
        by_rule=4 * tokens * (layers * layer + head),
    )


def _rate_of_a_large_product(device: torch.device, size: int) -> float:
    """FLOP/s of a square product in bfloat16: the best of some."""
    import torch

    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    seconds = [seconds_of(lambda: torch.mm(a, a, out=out), device) for _ in range(10)]
    return 2 * size**3 / min(seconds)
