"""How much memory this process uses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow to import
    import torch


def process_memory(device: torch.device, *, peak: bool) -> float | None:
    """The current use in bytes, or its peak since the last call with `peak` False.

    A call with `peak` False starts a new peak. None where the system does not report it.
    """
    if device.type == "cuda":
        import torch

        if peak:
            return torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return None
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current use
    wanted = "VmHWM:" if peak else "VmRSS:"
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in status if line.startswith(wanted))
