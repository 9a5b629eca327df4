"""A small network, the reader, teaches a projection in the decoder's place, in minutes.

All that a decoder learns of a picture goes through the projection's hidden layer. Through the decoder this
layer sees few rows, since each costs a pass through all of the decoder's layers. A reader has a few small
layers. It predicts the words of an answer from the question's words and the hidden layer, which it multiplies
element by element ("low-rank bilinear pooling", Kim et al. 2017, arXiv 1610.04325). Predicting words is
enough to learn good features of pictures (Joulin et al. 2016, arXiv 1511.02251). It sees each picture many
times and would learn pictures by heart, so noise is added to their features (Bishop 1995, "Training with
noise is equivalent to Tikhonov regularization"). Then the reader is thrown away, and the projection is
trained on through the decoder.

Shapes: R rows, Q words of a question, A words of an answer, F features of a picture, H width of the
projection's hidden layer, V known words of answers.
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

_BATCH = 128  # rows a step
_RATE, _WARMUP, _DECAY, _DROPOUT = 0.002, 0.1, 0.05, 0.1
_NOISE = 0.3  # in standard deviations of each feature
_WORD_WIDTH, _JOINED_WIDTH = 128, 512
_LEAST = 4  # rows that a word has to be in; the reader does not know rarer ones
_LONGEST = 16  # words of a question or an answer that are read
_SCORED_AT_ONCE = 1000  # rows

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class PictureRow:
    """A question about one picture, with its answer, as words in lower case."""

    picture: PictureFile
    question: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class ReaderResult:
    """How well a reader predicts answers that it did not learn from.

    Attributes:
        rows: how many rows were asked: those kept back with a word that the reader knows in their answer.
        loss: nats a word of an answer, averaged over the rows.
        exchanged: the same with another row's picture, which is higher if the reader looks at pictures; None
            if all rows have the same one.
    """

    rows: int
    loss: float
    exchanged: float | None

    def __str__(self) -> str:
        if not self.rows:
            return "no row kept back has a picture and a word that it knows"
        said = f"loss {self.loss:.3f} nats a word on {self.rows:,} rows kept back"
        if self.exchanged is None:
            return said
        return f"{said}; {self.exchanged:.3f} with another row's picture (should be higher)"


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


class Lesson:
    """What a reader learns: rows, and the words in them that are frequent enough.

    Attributes:
        rows: the rows to learn from, which have a known word in their answer.
        kept_back: the rows to ask at the end, likewise.

    Raises:
        UsageError: no word is in four answers or more.
    """

    def __init__(self, rows: Sequence[PictureRow], kept_back: Sequence[PictureRow]) -> None:
        self._questions = _numbered(row.question for row in rows)
        self._answers = _numbered(row.answer for row in rows)
        if not self._answers:
            raise UsageError(
                f"--reader-epochs: no word is in {_LEAST} or more answers ({len(rows):,} questions about a "
                "single picture); give more rows with pictures, or leave out --reader-epochs"
            )
        self.rows, self.kept_back = (
            [row for row in some if any(word in self._answers for word in row.answer)]
            for some in (rows, kept_back)
        )

    def teach(
        self,
        projection: Projection,
        features: Mapping[PictureFile, Tensor],
        *,
        epochs: int,
        seed: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> ReaderResult:
        """Train the lower layer of a projection, in place, with a new reader. The upper layer is kept.

        Args:
            features: (F,) of each picture.
            epochs: passes over the rows.
            seed: of the reader's first weights and the order of the rows.
            progress: called with the number of rows done, of epochs * rows.
        """
        device = projection.down.weight.device
        pictures = {picture: number for number, picture in enumerate(features)}
        seen = torch.stack(list(features.values())).to(device)  # (N, F)
        shown, asked, wanted = self._encode(self.rows, pictures, device)
        size = min(_BATCH, len(shown))
        steps = epochs * (len(shown) // size)
        done = 0
        # The reader's first weights, its dropout, the noise and the order come from torch's own generator.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            reader = _Reader(projection.down.out_features, len(self._questions), len(self._answers))
            reader = reader.to(device)
            learnt = [*projection.down.parameters(), *reader.parameters()]
            optimiser = torch.optim.AdamW(learnt, lr=_RATE, weight_decay=_DECAY)
            for _ in range(epochs):
                order = torch.randperm(len(shown), device=device)
                for some in order[: len(order) // size * size].view(-1, size):
                    for group in optimiser.param_groups:
                        group["lr"] = _RATE * warmup_cosine(done, steps, _WARMUP * steps)
                    noise = _NOISE * torch.randn(size, seen.shape[1], device=device)
                    noisy = seen[shown[some]] + noise / projection.scale
                    scores = reader(projection.hidden(noisy), asked[some])
                    optimiser.zero_grad()
                    _losses(scores, wanted[some]).mean().backward()
                    optimiser.step()
                    done += 1
                    progress(done * epochs * len(shown) // steps)
            optimiser.zero_grad()
        return self._score(reader.eval(), projection, seen, pictures)

    @torch.no_grad()
    def _score(
        self, reader: _Reader, projection: Projection, seen: Tensor, pictures: Mapping[PictureFile, int]
    ) -> ReaderResult:
        if not self.kept_back:
            return ReaderResult(0, 0.0, None)
        shown, asked, wanted = self._encode(self.kept_back, pictures, seen.device)
        different, place = shown.unique(return_inverse=True)
        exchanged = different.roll(1)[place]  # each picture becomes another one

        def mean_loss(shown: Tensor) -> float:
            parts = zip(*(rows.split(_SCORED_AT_ONCE) for rows in (shown, asked, wanted)), strict=True)
            losses = [_losses(reader(projection.hidden(seen[s]), a), w) for s, a, w in parts]
            return float(torch.cat(losses).mean())

        return ReaderResult(
            len(shown), mean_loss(shown), mean_loss(exchanged) if len(different) > 1 else None
        )

    def _encode(
        self, rows: Sequence[PictureRow], pictures: Mapping[PictureFile, int], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers of rows' pictures (R,), of their questions' words (R, Q) and answers' words (R, A)."""
        columns = (
            [pictures[row.picture] for row in rows],
            [_encoded(row.question, self._questions) for row in rows],
            [_encoded(row.answer, self._answers) for row in rows],
        )
        shown, asked, wanted = (torch.tensor(column, device=device) for column in columns)
        return shown, asked, wanted


def _numbered(texts: Iterable[tuple[str, ...]]) -> dict[str, int]:
    """The number of each word that is frequent enough, from 1."""
    counts = Counter(word for words in texts for word in set(words))
    frequent = (word for word, count in counts.items() if count >= _LEAST)
    return {word: number for number, word in enumerate(frequent, start=1)}


def _encoded(words: Sequence[str], numbers: Mapping[str, int]) -> list[int]:
    """The numbers of the known words, then zeros."""
    known = [numbers[word] for word in words if word in numbers]
    return known + [0] * (_LONGEST - len(known))


def _losses(scores: Tensor, wanted: Tensor) -> Tensor:
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
        mean = words.sum(1) / there.sum(1).clamp_min(1)  # "no word" is embedded as zeros
        asked = torch.tanh(self.question(torch.cat([mean, words.amax(1)], dim=-1)))
        seen = self.picture(self.dropout(hidden))
        scores: Tensor = self.joined(self.dropout(seen * asked)) + self.alone(asked)
        return scores
