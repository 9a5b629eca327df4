"""Losses of packed rows: of each token, of each row, and the mean over a batch or a data set.

Shapes: N labelled tokens of a pack, B rows, V vocabulary, F features of one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llama_adapter.common.processes import Processes
from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.data.records import PictureFile
from llama_adapter.packing.frozen_products import frozen_products
from llama_adapter.packing.pack import Pack, deal, pack, sort_by_opening, split_by_tokens

ALONE = Processes()


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy in nats, (N,), of targets, (N,), by logits, (N, V), which are overwritten.

    The logits are the largest array of a step, and torch's own loss makes three more of its size. Here the
    logits are turned into likelihoods, and these into the gradient, in place. So backward works only once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets[:, None]
        highest = logits.amax(1, keepdim=True)
        below = highest - logits.gather(1, targets)  # before the rest: small losses would be lost in rounding
        likelihoods = logits.sub_(highest).exp_()  # not yet divided by their sum
        total = likelihoods.sum(1, keepdim=True)
        ctx.save_for_backward(likelihoods, total, targets)
        return (total.log() + below).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        likelihoods, total, targets = ctx.saved_tensors
        gradient = gradient[:, None]
        return likelihoods.mul_(gradient / total).scatter_add_(1, targets, -gradient), None


def answer_loss(
    model: Callable[..., Any],
    packed: Pack,
    *,
    features: Mapping[PictureFile, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy in nats of each labelled token, (N,), float32. Logits are computed for these tokens only.

    Args:
        model: takes the arguments of `LlamaAdapter.forward`, including ``kwargs``.
        features: (F,) for each picture of the pack; None for rows without pictures.
    """
    if packed.pictures:
        assert features is not None
        seen = torch.stack([features[picture] for picture in packed.pictures])
        kwargs |= {"image_features": seen.to(packed.owners.device), "image_owners": packed.owners}
    output = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        segments=packed.segments,
        logits_to_keep=packed.predicting,
        use_cache=False,
        **kwargs,
    )
    logits = output.logits.squeeze(0).float()
    losses: Tensor = CrossEntropy.apply(logits, packed.targets)
    return losses


def answer_losses(
    model: Callable[..., Any],
    examples: Sequence[Example],
    *,
    device: torch.device,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row's answer in nats, (B,), summed over its tokens, and their number, (B,).

    All rows are computed in one pass. ``kwargs`` are those of `answer_loss`.
    """
    packed = pack(examples).to(device)
    each = answer_loss(model, packed, **kwargs)
    losses = each.new_zeros(len(examples)).index_add(0, packed.answers, each)
    return losses, torch.bincount(packed.answers, minlength=len(examples))


def _two_losses(
    model: Callable[..., Any], examples: Sequence[Example], *, by_rows: bool, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Two losses, each summed over rows: that of the answers, and that of telling them from their rivals.

    The second is the cross-entropy, in nats for each row, of choosing an answer by its likelihood.
    """
    everything = [answer for example in examples for answer in (example, *example.rivals)]
    losses, tokens = answer_losses(model, everything, **kwargs)
    sizes = [1 + len(example.rivals) for example in examples]  # the right answer is the first of each group
    right = torch.stack([group[0] for group in (losses / tokens if by_rows else losses).split(sizes)])
    chosen = [-torch.log_softmax(-group, 0)[0] for group in losses.split(sizes) if len(group) > 1]
    return right.sum(), torch.stack(chosen).sum() if chosen else right.new_zeros(())


def _count_answers(examples: Sequence[Example]) -> int:
    return sum(label != IGNORED for example in examples for label in example.labels[1:])


def _count_contested(examples: Sequence[Example]) -> int:
    return max(1, sum(bool(example.rivals) for example in examples))


def accumulate_gradient(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    device: torch.device,
    max_tokens: int,
    by_rows: bool = False,
    processes: Processes = ALONE,
    **kwargs: Any,
) -> float:
    """Add the gradient of the batch's loss to the trainable parameters, and return the loss.

    The loss is the mean over labelled tokens. With ``by_rows`` it is the mean over rows of each row's mean,
    so short answers count as much as long ones. Rows with rivals add the mean loss of telling them apart.
    With several processes each computes the part of its own rows: gradients and losses have to be added up.
    """
    answers = len(examples) if by_rows else _count_answers(examples)
    contested = _count_contested(examples)
    # Sorted by opening, so that rows with the same one come into the same pack and share it.
    shares = [
        list(split_by_tokens(sort_by_opening(share), max_tokens)) for share in deal(examples, processes.count)
    ]
    total = 0.0
    for run, weight in _in_step(shares, min(examples, key=lambda row: len(row.input_ids)), processes):
        with frozen_products(model):
            right, chosen = _two_losses(model, run, device=device, by_rows=by_rows, **kwargs)
            loss = right / answers + chosen / contested
            (loss * weight).backward()
        total += weight * float(loss.detach())
    return total


def _in_step(
    shares: Sequence[Sequence[list[Example]]], filler: Example, processes: Processes
) -> list[tuple[list[Example], int]]:
    """This process's groups of rows, each with the weight 1.

    All processes gather a sharded decoder's layers together, so all have to make equally many passes. A
    process with fewer groups adds groups of one row, with the weight 0.
    """
    own = [(run, 1) for run in shares[processes.index]]
    if not processes.sharded:
        return own
    return own + [([filler], 0)] * (max(map(len, shares)) - len(own))


@torch.no_grad()
def mean_answer_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    device: torch.device,
    max_tokens: int = 2048,
    progress: Callable[[int], None] = lambda rows: None,
    processes: Processes = ALONE,
    **kwargs: Any,
) -> tuple[float, int]:
    """Mean cross-entropy in nats over all labelled tokens of all rows, and the number of these tokens.

    Rows with rivals add the mean loss of telling them apart. With several processes each computes a part, and
    all get the total.
    """
    answers, chosen, rows = 0.0, 0.0, 0
    examples = sorted(examples, key=lambda e: len(e.input_ids))
    runs = list(split_by_tokens(examples, max_tokens))
    shares = [runs[index :: processes.count] for index in range(processes.count)]
    for run, weight in _in_step(shares, examples[0], processes):
        with frozen_products(model):
            losses = _two_losses(model, run, device=device, by_rows=False, **kwargs)
        answers, chosen = answers + weight * float(losses[0]), chosen + weight * float(losses[1])
        rows += len(run) * processes.count
        progress(min(rows, len(examples)))
    if processes.count > 1:
        sums = torch.tensor([answers, chosen], dtype=torch.float64, device=device)
        answers, chosen = processes.sum(sums).tolist()
    tokens = _count_answers(examples)
    return answers / tokens + chosen / _count_contested(examples), tokens
