"""A small reader in the decoder's place teaches a projection in minutes what would take the decoder hours.

All that a decoder learns of a picture goes through the projection's hidden layer. Taught through the
decoder, this layer learns slowly: each row has to pass all layers. A reader has a few small layers instead.
It predicts the words of an answer from the question's words and the hidden layer, by the product of the two
("low-rank bilinear pooling", Kim et al. 2017, arXiv 1610.04325). Learning from words alone gives good
features for pictures (Joulin et al. 2016, arXiv 1511.02251). Then the reader is thrown away, and the
projection is trained on through the decoder.

Shapes: N pictures, R rows, Q words of a question, A words of an answer, F features of a picture, H width of
the projection's hidden layer, V known words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import PictureFile, Record
from llama_adapter.methods.projection import Projection
from llama_adapter.training.schedule import warmup_cosine

BATCH = 128  # rows a step
_RATE, _WARMUP, _DECAY, _DROPOUT = 0.002, 0.1, 0.05, 0.1
_WORD_WIDTH, _JOINED_WIDTH = 128, 512
_LEAST = 4  # rows that a word has to be in; the reader does not know rarer ones
_LONGEST = 16  # words of a question or an answer that are read

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class PictureRow:
    """A question about one picture, with its answer, as words in lower case."""

    picture: PictureFile
    question: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class ReaderResult:
    """How well a reader predicts the answers of `rows` rows that it did not learn from, in nats a word.

    `exchanged` is the same with another row's picture. A reader that looks at pictures is worse at that.
    """

    rows: int
    loss: float
    exchanged: float

    def __str__(self) -> str:
        if not self.rows:
            return "no row was kept back"
        return (
            f"{self.loss:.3f} nats a word on {self.rows:,} rows kept back, {self.exchanged:.3f} with another "
            "row's picture"
        )


def picture_rows(records: Iterable[Record]) -> list[PictureRow]:
    """The questions and answers of all records with exactly one picture."""
    return [
        PictureRow(record.images[0], _words(question.text), _words(answer.text))
        for record in records
        if len(record.images) == 1
        for question, answer in zip(record.turns, record.turns[1:], strict=False)
        if (question.role, answer.role) == ("user", "assistant") and answer.learnt
    ]


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower())[:_LONGEST])


def teach_projection(
    projection: Projection,
    rows: Sequence[PictureRow],
    kept_back: Sequence[PictureRow],
    features: Mapping[PictureFile, Tensor],
    *,
    epochs: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> ReaderResult:
    """Train the lower layer of a projection, in place, with a reader. The upper layer stays as it is.

    Args:
        features: (F,) of each picture.
        epochs: passes over the rows.
        seed: of the reader's first weights and the order of the rows. The global generator stays as it is.
        progress: called with the number of rows done.

    Returns:
        how well the reader does on the rows kept back.

    Raises:
        UsageError: there is no row with a picture, or no word that is in four answers.
    """
    answers = _places(row.answer for row in rows)
    if not answers:
        raise UsageError(
            f"the reader has {len(rows):,} questions with one picture each, and no word is in {_LEAST} of "
            "their answers; give more rows with pictures, or leave out --reader-epochs"
        )
    questions = _places(row.question for row in rows)
    pictures = {picture: place for place, picture in enumerate(features)}
    device = projection.down.weight.device
    seen = torch.stack(list(features.values())).to(device)

    def encode(some: Sequence[PictureRow]) -> tuple[Tensor, Tensor, Tensor]:
        asked = torch.tensor([_encoded(row.question, questions) for row in some], dtype=torch.long).view(
            -1, _LONGEST
        )
        wanted = torch.tensor([_encoded(row.answer, answers) for row in some], dtype=torch.long).view(
            -1, _LONGEST
        )
        shown = torch.tensor([pictures[row.picture] for row in some], dtype=torch.long)
        known = (wanted > 0).any(1)
        return shown[known].to(device), asked[known].to(device), wanted[known].to(device)

    shown, asked, wanted = encode(rows)
    steps = max(1, epochs * len(shown) // BATCH)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        reader = _Reader(projection.down.out_features, len(questions), len(answers)).to(device)
        learnt = [*projection.down.parameters(), *reader.parameters()]
        optimiser = torch.optim.AdamW(learnt, lr=_RATE, weight_decay=_DECAY)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = _RATE * warmup_cosine(step, steps, _WARMUP * steps)
            some = torch.randint(len(shown), (min(BATCH, len(shown)),), device=device)
            hidden = projection.hidden(seen[shown[some]])
            loss = _loss(reader(hidden, asked[some]), wanted[some]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress((step + 1) * BATCH)
        optimiser.zero_grad()
    reader.eval()
    shown, asked, wanted = encode(kept_back)
    if not len(shown):
        return ReaderResult(0, 0.0, 0.0)
    with torch.no_grad():
        losses = [
            _loss(reader(projection.hidden(seen[places]), asked), wanted).mean().item()
            for places in (shown, shown.roll(len(shown) // 2))
        ]
    return ReaderResult(len(shown), *losses)


def _places(texts: Iterable[tuple[str, ...]]) -> dict[str, int]:
    """The number of each word that is frequent enough, from 1."""
    counts = Counter(word for words in texts for word in set(words))
    frequent = (word for word, count in counts.items() if count >= _LEAST)
    return {word: place for place, word in enumerate(frequent, start=1)}


def _encoded(words: Sequence[str], places: Mapping[str, int]) -> list[int]:
    """The numbers of the known words, then zeros."""
    known = [places[word] for word in words if word in places]
    return known + [0] * (_LONGEST - len(known))


def _loss(scores: Tensor, wanted: Tensor) -> Tensor:
    """Scores (R, V) and the answers' words (R, A), 0 where there is none -> nats a word of each row, (R,)."""
    there = (wanted > 0).float()
    found = F.log_softmax(scores, dim=-1).gather(1, (wanted - 1).clamp_min(0))
    return -(found * there).sum(1) / there.sum(1)


class _Reader(nn.Module):
    """From the hidden layer (R, H) and a question's words (R, Q) to scores of the answer's words, (R, V)."""

    def __init__(self, width: int, question_words: int, answer_words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(question_words + 1, _WORD_WIDTH, padding_idx=0)
        self.question = nn.Linear(2 * _WORD_WIDTH, _JOINED_WIDTH)
        self.picture = nn.Linear(width, _JOINED_WIDTH)
        self.joined = nn.Linear(_JOINED_WIDTH, answer_words)
        self.alone = nn.Linear(_JOINED_WIDTH, answer_words)  # what the question alone tells
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, hidden: Tensor, questions: Tensor) -> Tensor:
        words, there = self.words(questions), (questions > 0)[..., None]
        mean = words.sum(1) / there.sum(1).clamp_min(1)  # the embedding of "no word" is zero
        asked = torch.tanh(self.question(torch.cat([mean, words.amax(1)], dim=-1)))
        seen = self.picture(self.dropout(hidden))
        scores: Tensor = self.joined(self.dropout(seen * asked)) + self.alone(asked)
        return scores
