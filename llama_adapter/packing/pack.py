"""Rows of different lengths in one sequence, without padding and without seeing each other.

Rows that open with the same tokens (the template's first sentences) share them: the opening is computed once,
and each row's rest sees it as its context. The result is exact, since no row's opening depends on its rest,
and the opening's gradient is the sum over its rows. Rows with pictures share theirs with rows of the same
pictures only, whose prompts are the same.

Shapes: T tokens of the pack, N labelled ones, V vocabulary, I pictures, F features of one.
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

SHORTEST_OPENING = 16  # tokens; a shorter one is not worth a stretch of its own
ALONE = Processes()


@dataclass(frozen=True)
class Pack:
    """Several rows in one sequence.

    Attributes:
        input_ids, position_ids: (1, T).
        segments: what each stretch of the sequence sees.
        predicting: (N,) indices of the tokens whose successor is labelled.
        targets: (N,) those successors.
        answers: (N,) the place of the example that each belongs to, among those that were packed.
        pictures: (I,) those of the rows, each as often as there are sets of prompts that it belongs to.
        owners: (I,) the set of prompts that each belongs to; the segments say who reads which.
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
    """Put rows into one sequence, rows with the same opening behind it."""
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
    """Places of rows that share their opening, side by side; those of the same pictures next to each other.

    Rows with the same question share all of it, others what the first sentences of their template are.
    """
    questions = [(e.images, tuple(e.input_ids[: _unlabelled(e)])) for e in examples]
    several = Counter(questions)
    groups: dict[tuple[PictureFile, ...], dict[tuple[int, ...], list[int]]] = {}
    for place, (images, question) in enumerate(questions):
        opening = question if several[images, question] > 1 else question[:SHORTEST_OPENING]
        groups.setdefault(images, {}).setdefault(opening, []).append(place)
    return [group for openings in groups.values() for group in openings.values()]


def _unlabelled(example: Example) -> int:
    """How many tokens there are before the first answer."""
    return sum(1 for _ in takewhile(lambda label: label == IGNORED, example.labels))


def _read(example: Example) -> int:
    """How many tokens its predictions are made from: nothing reads the last labelled one."""
    return max(index for index, label in enumerate(example.labels) if label != IGNORED)


def _tokens(example: Example) -> int:
    """How many a row takes in a pack: of its rivals the answers alone, since they share its question."""
    return _read(example) + sum(_read(rival) + 1 - _unlabelled(rival) for rival in example.rivals)


def _shared_opening(group: Sequence[Example]) -> int:
    """How many leading tokens all rows share, each row's first prediction left to itself."""
    if len(group) == 1:
        return 0
    columns = zip(*(example.input_ids for example in group), strict=False)
    equal = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    shared = min(equal, min(map(_unlabelled, group)) - 1)
    return shared if shared >= SHORTEST_OPENING else 0


def split_by_tokens(examples: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Consecutive runs of rows of at most ``max_tokens`` tokens (a longer single row stands alone)."""
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

    Tokens by vocabulary is the largest array of a step, and torch's own loss makes three more of it. Here
    the logits become likelihoods, and those their gradient: it can be had once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets[:, None]
        highest = logits.amax(1, keepdim=True)
        below = highest - logits.gather(1, targets)  # first, or small losses would drown in rounding
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
    """Cross-entropy of each labelled token in nats, float32, (N,); logits exist at those places only.

    Args:
        model: takes the arguments of `LlamaAdapter.forward`, ``kwargs`` among them.
        features: (F,) of each picture of the pack; None for rows without.
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
    """Share rows out to processes, about as many tokens to each: the longest first, each to who has least.

    Every process works out the same shares, so nothing has to be sent around.
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
    """Each row's cross-entropy in nats, summed over its answer, (B,), and its tokens, (B,), in one pass.

    ``kwargs`` as in `answer_loss`.
    """
    packed = pack(examples).to(device)
    each = answer_loss(model, packed, **kwargs)
    losses = each.new_zeros(len(examples)).index_add(0, packed.answers, each)
    return losses, torch.bincount(packed.answers, minlength=len(examples))


def _two_losses(
    model: Callable[..., Any], examples: Sequence[Example], *, by_rows: bool, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The sums over rows of the loss of their answers and of that of telling them from their rivals.

    The second is the cross-entropy, in nats a row, of choosing by the answers' likelihoods.
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
    """Add the gradient of the batch's loss to the trainable parameters; returns that loss.

    It is the mean over labelled tokens; ``by_rows`` the mean over rows of theirs, so that short answers count
    as much as long ones. Rows with rivals add the mean loss of telling them apart. Of several processes each
    computes the part of its rows, in the gradient and in the loss: both are to be summed.
    """
    answers = len(examples) if by_rows else _count_answers(examples)
    contested = _count_contested(examples)
    # Rows with the same opening side by side, so that they share it within a pack.
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
    """This process's runs of rows, each with weight 1.

    A sharded decoder's layers are gathered by all processes together, so there all make as many passes: who
    has fewer runs adds some of one row, with weight 0.
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
    """Mean cross-entropy in nats over all labelled tokens of all rows, and how many tokens they are.

    Rows with rivals add the mean loss of telling them apart. Of several processes each computes a part; all
    get the whole.
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
