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
        adapters: two or more, by the names that messages call them. The mean gets the config of the last one.
        shares: how much each counts; their sum does not matter. None: all alike.
        from_last: kinds of parts, such as "projection", that are taken from the last adapter as they are.

    Raises:
        UsageError: fewer than two adapters, shares that are not positive or of another number, or adapters of
            which no mean can be taken.
    """
    names, members = list(adapters), list(adapters.values())
    if len(members) < 2:
        raise UsageError(f"{len(members)} adapter given; expected two or more, to take the mean of")
    shares = [1.0] * len(members) if shares is None else list(shares)
    if len(shares) != len(members) or not all(0 < share < float("inf") for share in shares):
        given = ", ".join(f"{share:g}" for share in shares)
        raise UsageError(
            f"shares: {given} given for {len(members)} adapters; expected a positive number for each"
        )
    last = members[-1]
    if unknown := sorted(set(from_last) - set(last)):
        raise UsageError(f"{names[-1]} has no part {unknown[0]!r}; it has {', '.join(last)}")
    if not set(last) - set(from_last):
        raise UsageError(f"all parts would be taken from {names[-1]}: there is nothing to take the mean of")
    for name, member in zip(names[:-1], members, strict=False):
        if difference := _difference(member.config, last.config, from_last):
            raise UsageError(f"no mean of {name} and {names[-1]}: {difference}")
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
            raise UsageError(f"no mean of {', '.join(names)}: their {key} differ")
    mean.load_state_dict(values)
    return mean


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values[-1], dtype=torch.float64)
    for share, value in zip(shares, values, strict=True):
        total += share * value.double()
    return (total / sum(shares)).to(values[-1].dtype)


def _difference(one: AdapterConfig, other: AdapterConfig, left_out: Collection[str]) -> str | None:
    """In what two adapters differ so that there is no mean, or None."""
    for name, mine, theirs in (
        ("their bases are", one.base, other.base),
        ("their adapted layers are", one.adapted_layers, other.adapted_layers),
        ("their templates are", one.template, other.template),
    ):
        if mine != theirs:
            return f"{name} {mine} and {theirs}"
    if one.shape != other.shape:
        return "their bases have other shapes"
    kept, others = (
        {kind: part for part in config.parts if (kind := config.kind_of(part)) not in left_out}
        for config in (one, other)
    )
    if kept.keys() != others.keys():
        return f"their parts are {', '.join(kept)} and {', '.join(others)}"
    return next((f"their settings of {kind} differ" for kind in kept if kept[kind] != others[kind]), None)
