"""Errors of the hub, worded alike for bases, adapters and towers."""

from __future__ import annotations

from llama_adapter.common.errors import UsageError


def gated_error(kind: str, name: str) -> UsageError:
    """The error for weights whose terms have to be accepted first. ``kind`` is base, adapter or tower."""
    return UsageError(
        f"{kind} {name!r} is gated: accept its terms on its hub page, then run `hf auth login` "
        "or set HF_TOKEN"
    )
