"""What a training has written into its run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def losses(output: Path) -> list[float]:
    """The loss of each step, in order."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)), "each step is written once"
    return [line["loss"] for line in steps]


def last_checkpoint(output: Path) -> Path:
    """The file of the latest checkpoint."""
    return sorted((output / "checkpoints").glob("*.pt"))[-1]


def load_last_checkpoint(output: Path) -> dict[str, Any]:
    """The content of the latest checkpoint."""
    state: dict[str, Any] = torch.load(last_checkpoint(output), weights_only=True)
    return state


def trained_weights(output: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors in the latest checkpoint, by name."""
    found: dict[str, torch.Tensor] = load_last_checkpoint(output)["adapter"]
    return found
