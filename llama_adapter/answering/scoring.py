"""Scores answers about pictures: captions by BLEU-4 and CIDEr-D, short answers by exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from llama_adapter.common.errors import UsageError

# ---- captions ----

# The tokens of Stanford's PTBTokenizer, which published scores use, in lower case. Whatever pycocoevalcap
# removes (quotes and . , : ; - ? !, but not brackets) is matched by no branch, so it is removed here too.
# NLTK's Treebank tokenizers can't replace it: they leave a full stop inside the text on its word ("dog.").
_TOKEN = re.compile(
    r"""
    (?<!\w)(?:[a-z]\.)+(?![a-z])                   # initials keep their dots: u.s.
  | \b(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|etc)\.(?=\s+\S)
  | \d+(?:[.,:/-]\d+)+                             # 1,000  2.5  1/2  10:30
  | \b(?:can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))
  | \w+?(?=n't\b) | n't\b | '(?:s|m|d|ll|re|ve)\b  # do n't, man 's
  | 'n' | '\d0s\b | \bo'\w+ | \#[a-z]\w*
  | \w+(?:[-./]\w+)*
  | [?!]{2,}                                       # single ones are dropped, "?!" is not
  | [^\s\w.,:;?!'"`“”‘–—…-]
    """,
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


@dataclass(frozen=True)
class CaptionScores:
    """How close captions come to those of people.

    `bleu4` is a fraction, over all rows together. `cider` is CIDEr-D on pycocoevalcap's scale (0 to 10), the
    mean of `cider_rows`. CIDEr weights words by how few rows have them in their references. So figures can
    only be compared on the same rows, and those of a single row are 0.
    """

    bleu4: float
    cider: float
    cider_rows: tuple[float, ...]


def caption_tokens(text: str) -> list[str]:
    """A caption's words as PTBTokenizer and pycocoevalcap give them: "The man's dog." -> the man 's dog."""
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text.lower().replace("’", "'"))]


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Score one caption for each row against the row's references, by pycocoevalcap's BLEU and CIDEr, without
    Java.

    Raises UsageError if there are no rows, the numbers differ, a row has no reference with a word in it, or
    pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise UsageError(
            f"captions are scored by pycocoevalcap ({error}): pip install 'llama-adapter[eval]'"
        ) from None

    if not candidates or len(candidates) != len(references):
        raise UsageError(
            f"{len(candidates)} captions for {len(references)} rows of references: expected one a row"
        )
    given = {row: [" ".join(caption_tokens(text))] for row, text in enumerate(candidates)}
    wanted = {row: [" ".join(caption_tokens(t)) for t in texts] for row, texts in enumerate(references)}
    for row, texts in wanted.items():
        if not any(texts):
            raise UsageError(f"row {row + 1} of the references has no caption to compare with")
    bleu, _ = Bleu(4).compute_score(wanted, given, verbose=0)  # otherwise it prints
    cider, cider_rows = Cider().compute_score(wanted, given)
    return CaptionScores(float(bleu[3]), float(cider), tuple(map(float, cider_rows)))


# ---- questions ----

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Contractions that are not words of their own without the apostrophe (unlike "well", "shed", "its").
_CONTRACTIONS = {
    word.replace("'", ""): word
    for ending, stems in {
        "n't": "ai are ca could did does do had has have is might must need ought sha should "
        "was were wo would",
        "n't've": "could had might should would",
        "'ve": "could i might must not should they we what where who would you",
        "'d": "he how it somebody someone something there they where who you",
        "'d've": "he i it she somebody someone something there they we who y'all you",
        "'ll": "how it somebody someone something they what who why y'all you",
        "'s": "he how somebody someone that there what when where who why",
        "'re": "there they what why you",
        "": "i'm ma'am o'clock 'twas y'all",
    }.items()
    for word in (stem + ending for stem in stems.split())
}


def normalise_answer(text: str) -> str:
    """A short answer in the form in which VQA answers are compared: "The two dogs." -> "2 dogs".

    After VQA v2's vqaEval.py (github.com/GT-Vision-Lab/VQA, PythonEvaluationTools): lower case, punctuation,
    number words, articles, contractions. There are three differences: "’" is "'", contractions follow a rule
    and not a list of spellings, and an answer of only articles is kept, since "A" may be a choice.
    """
    text = " ".join(text.lower().replace("’", "'").split()).rstrip(". ")
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        # The official rule: a mark beside a space, or any mark in a text with 1,000, is removed; others split
        # words.
        goes = in_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if goes else " ")
    words = [_NUMBER_WORDS.get(word, word) for word in _PERIOD.sub("", cleaned).split()]
    words = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words)


def is_right(answer: str, expected: str) -> bool:
    """Whether the two are equal after `normalise_answer`, or as lists with commas in any order."""
    if not normalise_answer(expected):  # only a sign, such as "<"
        return answer.strip() == expected.strip()
    return normalise_answer(answer) == normalise_answer(expected) or _items(answer) == _items(expected)


def _items(text: str) -> set[str]:
    return {normalise_answer(item) for item in text.split(",")} - {""}


# What is asked for, not what is mentioned: not "how many colours", not "what is on the red colour chair".
_ASKS_FOR = re.compile(
    r"\b(?:what|which)(?:(?: is| are|'s)? the)? (?:colou?r|shape)s?\b"
    r"|\bwhat(?: is| are|'s) (?:the )?(?:(?!in\b)\w+ ){1,3}(?:colou?r|shape)s?(?=\W*$| (?:of|in|on|for)\b)"
)


def question_type(question: str, expected: str) -> str:
    """The kind of answer that a question asks for: "yes/no", "how many", "colour", "shape" or "other"."""
    if normalise_answer(expected) in ("yes", "no"):
        return "yes/no"
    question = question.lower().replace("’", "'")
    if "how many" in question or "number of" in question:
        return "how many"
    if asked := _ASKS_FOR.search(question):
        return "shape" if "shape" in asked[0] else "colour"
    return "other"


def accuracy_interval(right: int, rows: int) -> tuple[float, float]:
    """The 95 % Wilson score interval (Wilson 1927) of a share, as fractions.

    Raises UsageError for no share.
    """
    if not 0 <= right <= rows or rows == 0:
        raise UsageError(
            f"{right} right answers of {rows}: expected at least one row, and no more right than rows"
        )
    z = NormalDist().inv_cdf(0.975)
    share = right / rows
    centre = share + z * z / (2 * rows)
    half = z * sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
