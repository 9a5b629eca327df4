"""Records -> examples: token ids, and labels that say what is learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import Record
from llama_adapter.data.row_pictures import PictureFile
from llama_adapter.data.templates import Turn, encode_whole_dialogues

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the losses of transformers ignore
_ENCODED_AT_ONCE = 1000  # rows for each call of the tokenizer: fast, and its temporary lists stay small


@dataclass(frozen=True)
class Example:
    """A record as tokens.

    `labels` has the length of `input_ids`. It holds the ids of the answers and their end tokens, and -100
    elsewhere (not shifted: the losses of transformers shift). `rivals` are the same question with other
    answers, from which the right one is to be told apart; each is an example of its own. `cut` is True if the
    record was longer.
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[PictureFile, ...]
    row: int
    rivals: tuple[Example, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class EncodeSummary:
    """What became of records when they were encoded.

    Attributes:
        rows: the records given. A record with answers that have to be learnt separately counts once for each.
        dropped: those without an answer within `max_length` tokens.
        cut: examples that were cut at `max_length` tokens.
        pictures: how many different pictures there are.
        tokens: all tokens of the examples.
        learnt_tokens: the tokens of answers that are learnt, with their end tokens.
    """

    max_length: int
    rows: int
    dropped: int
    cut: int
    pictures: int
    tokens: int
    learnt_tokens: int

    @classmethod
    def count(cls, given: int, examples: Sequence[Example], max_length: int) -> EncodeSummary:
        """Count the examples made from `given` records."""
        return cls(
            max_length=max_length,
            rows=given,
            dropped=given - len(examples),
            cut=sum(example.cut for example in examples),
            pictures=len({image for example in examples for image in example.images}),
            tokens=sum(len(example.input_ids) for example in examples),
            learnt_tokens=sum(label != IGNORED for example in examples for label in example.labels),
        )

    def __str__(self) -> str:
        parts = [f"{self.rows - self.dropped:,} rows"]
        if self.dropped:
            parts.append(
                f"{self.dropped:,} of {self.rows:,} dropped (no answer within {self.max_length:,} tokens)"
            )
        if self.cut:
            parts.append(f"{self.cut:,} cut at {self.max_length:,} tokens")
        pictures = f"{self.pictures:,} pictures"
        return ", ".join([*parts, pictures, f"{self.tokens:,} tokens, {self.learnt_tokens:,} of them learnt"])

    @property
    def warning(self) -> str | None:
        """A warning if most rows are dropped or cut, else None."""
        if 2 * (self.dropped + self.cut) <= self.rows:
            return None
        return (
            f"warning: of {self.rows:,} rows {self.dropped:,} are dropped and {self.cut:,} cut, which are "
            f"longer than --max-length {self.max_length:,}; give a larger one"
        )

    def facts(self) -> dict[str, int]:
        """The numbers that are saved with a run."""
        return asdict(self)


def encode_records(
    records: Sequence[Record],
    *,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    date: str | None = None,
) -> list[Example]:
    """Encode records as examples of at most `max_length` tokens, in the order of the records.

    A longer record is cut at its end, so its answer has no end token. A record with no answer left after that
    is dropped, so there may be fewer examples than records. An answer that can be learnt only where it is the
    last one (see `data.chat_template`) gets an example of its own, after the record's.

    Args:
        date: such as 2026-11-28, for chat templates that write it. None is today.

    Raises:
        UsageError: a record that the template refuses (named by its row), or no answer left at all.
    """
    return encode_and_count(
        records, template=template, tokenizer=tokenizer, max_length=max_length, date=date
    )[0]


def encode_and_count(
    records: Sequence[Record],
    *,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    date: str | None = None,
) -> tuple[list[Example], EncodeSummary]:
    """`encode_records`, with a summary of what became of the records."""
    examples = []
    given = 0
    for start in range(0, len(records), _ENCODED_AT_ONCE):
        waiting = list(records[start : start + _ENCODED_AT_ONCE])
        while waiting:
            apart: list[Record] = []
            try:
                encoded = encode_whole_dialogues(
                    [record.turns for record in waiting], template, tokenizer, date=date
                )
            except UsageError:
                _refuse_by_row(waiting, template, tokenizer, date)
                raise
            for record, dialogue in zip(waiting, encoded, strict=True):
                apart += [_with_one_answer(record, place) for place in dialogue.untaught]
                if not any(dialogue.is_learnt):
                    continue  # all of its answers get examples of their own
                given += 1
                pairs = zip(dialogue.ids, dialogue.is_learnt, strict=True)
                labels = [token if learnt else IGNORED for token, learnt in pairs]
                if any(dialogue.is_learnt[:max_length]):
                    ids, cut = dialogue.ids[:max_length], len(labels) > max_length
                    examples.append(Example(ids, labels[:max_length], record.images, record.row, cut=cut))
            waiting = apart
    summary = EncodeSummary.count(given, examples, max_length)
    if not examples:
        raise UsageError(f"no answer starts within {max_length:,} tokens; give a larger --max-length")
    return examples, summary


def _refuse_by_row(
    records: Sequence[Record], template: str, tokenizer: PreTrainedTokenizerBase, date: str | None
) -> None:
    """Raise UsageError for the first record that the template refuses, if it accepts a plain conversation."""
    encode_whole_dialogues([[Turn("user", "?"), Turn("assistant", "!")]], template, tokenizer, date=date)
    for record in records:
        try:
            encode_whole_dialogues([record.turns], template, tokenizer, date=date)
        except UsageError as error:
            raise UsageError(f"row {record.row}: {error}") from None


def _with_one_answer(record: Record, place: int) -> Record:
    """The record up to the turn at index `place`. Only that turn is learnt."""
    before = (replace(turn, learnt=False) for turn in record.turns[:place])
    return replace(record, turns=(*before, record.turns[place]))


def balance_yes_no(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """A weight for each example, such that yes and no are equally frequent answers to each question.

    If most answers to a question are the same, a model learns that answer from the wording and never looks at
    the picture. The weights of a question's examples add up to their number. They are 1 for a question that
    has other answers, or only one of the two.
    """
    asked = []
    for example in examples:
        labelled = list(zip(example.input_ids, example.labels, strict=True))
        question = tuple(token for token, label in labelled if label == IGNORED)
        answer = tokenizer.decode(
            [label for _, label in labelled if label != IGNORED], skip_special_tokens=True
        )
        asked.append((question, str(answer).strip().lower()))
    found: dict[tuple[int, ...], Counter[str]] = {}
    for question, answer in asked:
        found.setdefault(question, Counter())[answer] += 1
    return [
        found[question].total() / (2 * found[question][answer])
        if set(found[question]) == {"yes", "no"}
        else 1.0
        for question, answer in asked
    ]
