"""Packs rows of different lengths into one sequence, without padding and without rows seeing each other.

Rows that start with the same tokens (the first sentences of the template) share them. This opening is
computed once, and the rest of each row sees it as its context. The result is exact: no row's opening depends
on its rest, and the opening's gradient is the sum over its rows. A row with pictures shares its opening only
with rows of the same pictures, which have the same prompts.

Shapes: T tokens of the pack, N labelled tokens, V vocabulary, I pictures, F features of one picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llama_adapter.common.processes import Processes
from llama_adapter.data.records import IGNORED, Example, PictureFile
from llama_adapter.methods.packed_attention import Segment
from llama_adapter.packing.frozen_products import frozen_products

SHORTEST_OPENING = 16  # tokens; it does not pay to share a shorter one
ALONE = Processes()


@dataclass(frozen=True)
class Pack:
    """Several rows in one sequence.

    Attributes:
        input_ids: (1, T).
        position_ids: (1, T).
        segments: which tokens each part of the sequence sees.
        predicting: (N,) indices of the tokens whose next token is labelled.
        targets: (N,) these next tokens.
        answers: (N,) for each target, the index of its example among the packed ones.
        pictures: (I,) the rows' pictures. A picture appears once for each prompt set that it belongs to.
        owners: (I,) the prompt set that each picture belongs to. The segments say which set each row reads.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    predicting: Tensor
    targets: Tensor
    answers: Tensor
    pictures: tuple[PictureFile, ...]
    owners: Tensor

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on another device."""
        names = ("input_ids", "position_ids", "predicting", "targets", "answers", "owners")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


def pack(examples: Sequence[Example]) -> Pack:
    """Put rows into one sequence, each group of rows after the opening that it shares."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predicting: list[int] = []
    targets: list[int] = []
    answers: list[int] = []

    def append(
        tokens: Sequence[int], first_position: int, context: tuple[int, int] | None, prompts: int
    ) -> int:
        start = len(ids)
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        segments.append(Segment(start, len(ids), context, prompts))
        return start

    sets: dict[tuple[PictureFile, ...], int] = {}
    for places in _by_opening(examples):
        group = [examples[place] for place in places]
        prompts = sets.setdefault(group[0].images, len(sets))
        shared = _shared_opening(group)
        context = None
        if shared:
            start = append(group[0].input_ids[:shared], 0, None, prompts)
            context = (start, start + shared)
        for place, example in zip(places, group, strict=True):
            start = append(example.input_ids[shared : _read(example)], shared, context, prompts)
            for index, label in enumerate(example.labels[shared + 1 :]):
                if label != IGNORED:
                    predicting.append(start + index)
                    targets.append(label)
                    answers.append(place)
    return Pack(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        segments=tuple(segments),
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        answers=torch.tensor(answers),
        pictures=tuple(picture for pictures in sets for picture in pictures),
        owners=torch.tensor(
            [number for pictures, number in sets.items() for _ in pictures], dtype=torch.long
        ),
    )


def _by_opening(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of rows, grouped by the opening that they share. Rows with the same pictures are neighbours.

    Rows with the same question share all of it. Others share the first sentences of their template.
    """
    questions = [(e.images, tuple(e.input_ids[: _unlabelled(e)])) for e in examples]
    several = Counter(questions)
    groups: dict[tuple[PictureFile, ...], dict[tuple[int, ...], list[int]]] = {}
    for place, (images, question) in enumerate(questions):
        opening = question if several[images, question] > 1 else question[:SHORTEST_OPENING]
        groups.setdefault(images, {}).setdefault(opening, []).append(place)
    return [group for openings in groups.values() for group in openings.values()]


def _unlabelled(example: Example) -> int:
    """The number of tokens before the first answer."""
    return sum(1 for _ in takewhile(lambda label: label == IGNORED, example.labels))


def _read(example: Example) -> int:
    """The number of tokens that predictions are made from. The last labelled token is never read."""
    return max(index for index, label in enumerate(example.labels) if label != IGNORED)


def _tokens(example: Example) -> int:
    """The number of tokens that a row takes in a pack.

    Its rivals share its question: only their answers count.
    """
    return _read(example) + sum(_read(rival) + 1 - _unlabelled(rival) for rival in example.rivals)


def _shared_opening(group: Sequence[Example]) -> int:
    """How many leading tokens all rows share. Each row keeps its first prediction to itself."""
    if len(group) == 1:
        return 0
    columns = zip(*(example.input_ids for example in group), strict=False)
    equal = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    shared = min(equal, min(map(_unlabelled, group)) - 1)
    return shared if shared >= SHORTEST_OPENING else 0


def split_by_tokens(examples: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Split rows into consecutive groups of at most ``max_tokens`` tokens; a longer row stands alone."""
    run: list[Example] = []
    tokens = 0
    for example in examples:
        own = _tokens(example)
        if run and tokens + own > max_tokens:
            yield run
            run, tokens = [], 0
        run.append(example)
        tokens += own
    if run:
        yield run


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


def deal(examples: Sequence[Example], processes: int) -> list[list[Example]]:
    """Share rows out to processes so that all get about equally many tokens.

    The longest row is dealt first, each to the process that has the fewest tokens. Every process computes the
    same shares, so nothing has to be sent.
    """
    if processes == 1:
        return [list(examples)]
    shares: list[list[Example]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for example in sorted(examples, key=_tokens, reverse=True):
        least = tokens.index(min(tokens))
        shares[least].append(example)
        tokens[least] += _tokens(example)
    return shares


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
        list(split_by_tokens([share[place] for group in _by_opening(share) for place in group], max_tokens))
        for share in deal(examples, processes.count)
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
