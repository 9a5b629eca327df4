"""The mean of several adapters' weights ("model soups", Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.config import AdapterConfig


def average(
    adapters: Mapping[str, Adapter], shares: Sequence[float] | None = None, *, from_last: Collection[str] = ()
) -> Adapter:
    """The mean of each weight. It is of use for stages of one training: others have little in common.

    Args:
        adapters: two or more, each with the name that messages call it. The mean gets the last one's config.
        shares: how much each counts; their sum does not matter. None: all the same.
        from_last: kinds of parts, such as "projection", that are copied from the last adapter.

    Raises:
        UsageError: fewer than two adapters, not one positive share for each, a part that the last one lacks
            (in ``from_last``), or adapters of which no mean can be taken.
    """
    names, members = list(adapters), list(adapters.values())
    if len(members) < 2:
        raise UsageError(f"a mean of {len(members)} given; name two or more adapters")
    shares = [1.0] * len(members) if shares is None else list(shares)
    if len(shares) != len(members) or not all(0 < share < float("inf") for share in shares):
        given = ", ".join(f"{share:g}" for share in shares)
        raise UsageError(
            f"shares {given} given; expected {len(members)} positive numbers, one for each adapter"
        )
    last = members[-1]
    if unknown := sorted(set(from_last) - set(last)):
        raise UsageError(f"{names[-1]} has no part {unknown[0]!r} to copy; it has {', '.join(last)}")
    if not set(last) - set(from_last):
        raise UsageError(
            f"all parts of {names[-1]} are to be copied, which leaves nothing to average; copy fewer"
        )
    for name, member in zip(names[:-1], members, strict=False):
        if difference := _difference(member.config, last.config, from_last):
            raise UsageError(f"{name} and {names[-1]} have no mean: {difference}")
    made = {"adapters": names, "shares": shares, "from_last": sorted(from_last)}
    mean = Adapter(dataclasses.replace(last.config, training={**last.config.training, "mean_of": made}))
    states = [member.state_dict() for member in members]
    values = {}
    for key, own in states[-1].items():
        if key.partition(".")[0] in from_last:
            values[key] = own
        elif own.is_floating_point():
            values[key] = _mean([state[key] for state in states], shares)
        elif all(torch.equal(state[key], own) for state in states):  # which weights `selected` has chosen
            values[key] = own
        else:
            raise UsageError(
                f"{', '.join(names)} have no mean: they change different weights of the base ({key}); give "
                "stages of one training"
            )
    mean.load_state_dict(values)
    return mean


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values[-1], dtype=torch.float64)
    for share, value in zip(shares, values, strict=True):
        total += share * value.double()
    return (total / sum(shares)).to(values[-1].dtype)


def _difference(one: AdapterConfig, last: AdapterConfig, left_out: Collection[str]) -> str | None:
    """What prevents a mean of two adapters, and what to do about it; or None."""
    for name, own, other in (
        ("base", one.base, last.base),
        ("number of adapted layers", one.adapted_layers, last.adapted_layers),
    ):
        if own != other:
            return f"the first has the {name} {own}, the second {other}; give stages of one training"
    if one.shape != last.shape:
        return f"their bases, both called {last.base}, have different shapes; give stages of one training"
    parts, others = (
        {kind: part for part in config.parts if (kind := config.kind_of(part)) not in left_out}
        for config in (one, last)
    )
    if parts.keys() != others.keys():
        return (
            f"the first has {', '.join(parts)}, the second {', '.join(others)}; give stages of one training"
        )
    different = next((kind for kind in parts if parts[kind] != others[kind]), None)
    if different is None:
        return None
    return (
        f"the settings of their parts {different!r} differ; copy the last one's with --from-last {different}"
    )
