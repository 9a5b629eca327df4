"""The training suite's memory: the peak of one step above the frozen weights, for each way to train.

Each way is measured in a process of its own, which frees what the others took, on the batch of the run that
has the longest row.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from eval.measuring import rows_to_train_on
from eval.ways_to_train import PEFT, PEFT_512, ways_to_train
from llama_adapter.arguments import load_model

if TYPE_CHECKING:  # slow to import
    import torch

CHECKPOINTED = "packed, gradient checkpointing"
MEGABYTE = 1e6


def training_memory(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Print each way's peak; of PEFT's padded to the longest row, the packed one's share."""
    if device.type != "cuda" and not sys.platform.startswith("linux"):
        print("\npeak memory left out: only Linux and CUDA tell it")
        return {}
    print("\npeak memory of a step above the frozen weights")
    peaks = {}
    for label in ("packed", CHECKPOINTED, "padded", PEFT, PEFT_512):
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
            peaks[label] = process.submit(peak_of_a_step, arguments, label).result()
        print(f"  {label:<32} {peaks[label] / MEGABYTE:10,.0f} MB", flush=True)
    return {
        "training_memory_mb": peaks["packed"] / MEGABYTE,
        "training_memory_vs_peft": peaks["packed"] / peaks[PEFT],
        "checkpointed_memory_vs_peft": peaks[CHECKPOINTED] / peaks[PEFT],
    }


def peak_of_a_step(arguments: argparse.Namespace, label: str) -> float:
    """Bytes that one optimiser step takes at its highest, beyond what the loaded model does."""
    import torch

    from llama_adapter.decoder import checkpoint_activations
    from llama_adapter.model import NO_ADAPTER
    from llama_adapter.training import TrainingSettings

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    size = arguments.batch_size
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        model = load_model(argparse.Namespace(**{**vars(arguments), "adapter": NO_ADAPTER}))
        examples = rows_to_train_on(model, arguments, count=size * (arguments.steps + 1))
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    batch = max(batches, key=lambda rows: max(len(row.input_ids) for row in rows))
    way = ways_to_train(model, peers=True)["packed" if label == CHECKPOINTED else label]
    if label == CHECKPOINTED:
        checkpoint_activations(model.decoder)
    device = model.decoder.device
    with torch.no_grad():  # weights that are mapped from their file come into memory when they are used
        model(torch.zeros(1, 2, dtype=torch.long, device=device), adapter=NO_ADAPTER, use_cache=False)
    before = _memory(device, peak=False)
    way.gradient(batch)
    way.optimizer(TrainingSettings(batch_size=size)).step()
    return _memory(device, peak=True) - before


def _memory(device: torch.device, *, peak: bool) -> float:
    """Bytes in use, from where the peak is counted on; or the peak since then."""
    import torch

    if device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    wanted = "VmHWM:" if peak else "VmRSS:"
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in status if line.startswith(wanted))
