"""Scores compared with their equations, tokens with those of published scores, and answers with tables."""

from __future__ import annotations

import random
import shutil
import string
import sys
from collections import Counter
from importlib.util import find_spec
from math import exp, log, prod, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_adapter.answering.scoring import (
    accuracy_interval,
    caption_scores,
    caption_tokens,
    is_right,
    normalise_answer,
    question_type,
)
from llama_adapter.common.errors import UsageError

CANDIDATES = [
    "A brown dog runs over the grass.",
    "Two children play in the snow",
    "A man's red boat lies on the lake.",
    "Nobody is standing on the old bridge today",
]
REFERENCES = [
    ["A brown dog runs over the grass.", "The dog is running on a lawn"],
    ["Two kids are playing with snow", "Two children play in the snow", "Children outside"],
    ["A red boat on a blue lake", "A man's red boat lies on the lake."],
    ["Nobody is standing on the old bridge today"],
]

word = st.sampled_from(["a", "dog", "red", "runs", "on", "grass"])
caption = st.lists(word, min_size=1, max_size=9).map(" ".join)
row = st.tuples(caption, st.lists(caption, min_size=1, max_size=4))
rows = st.lists(row, min_size=1, max_size=6)


needs_library = pytest.mark.skipif(
    find_spec("pycocoevalcap") is None, reason="pip install 'llama-adapter[eval]'"
)


# ---- captions ----


def ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def plain_bleu4(candidates: list[str], references: list[list[str]]) -> float:
    """Papineni et al. 2002 over a corpus. A row's reference length is the closest one (in a tie the shorter).

    The two tiny numbers are pycocoevalcap's, which avoid a division by 0.
    """
    length = sum(len(c.split()) for c in candidates)
    reference_length = 0
    for c, texts in zip(candidates, references, strict=True):
        lengths = sorted(len(text.split()) for text in texts)
        reference_length += min(lengths, key=lambda r, c=c: abs(r - len(c.split())))  # type: ignore[misc]
    precisions = []
    for n in range(1, 5):
        matched = total = 0
        for c, texts in zip(candidates, references, strict=True):
            counts = ngrams(c, n)
            most: Counter[tuple[str, ...]] = Counter()
            for text in texts:
                most |= ngrams(text, n)
            matched += sum((counts & most).values())
            total += sum(counts.values())
        precisions.append((matched + 1e-15) / (total + 1e-9))
    brevity = 1.0 if length >= reference_length else exp(1 - reference_length / length)
    return brevity * prod(precisions) ** 0.25


def plain_cider_d(candidates: list[str], references: list[list[str]]) -> list[float]:
    """Vedantam et al.

    2015, CIDEr-D: clipped, with a Gaussian of the length difference (sigma 6), times 10.
    """

    def weights(text: str, n: int) -> dict[tuple[str, ...], float]:
        def rows_with(gram: tuple[str, ...]) -> int:
            return sum(any(gram in ngrams(t, n) for t in texts) for texts in references)

        return {g: k * log(len(references) / max(1, rows_with(g))) for g, k in ngrams(text, n).items()}

    def norm(vector: dict[tuple[str, ...], float]) -> float:
        return sqrt(sum(weight * weight for weight in vector.values()))

    scores = []
    for c, texts in zip(candidates, references, strict=True):
        total = 0.0
        for text in texts:
            # As in published code, the length is counted in bigrams: a caption without one has length 0.
            difference = sum(ngrams(c, 2).values()) - sum(ngrams(text, 2).values())
            for n in range(1, 5):
                ours, theirs = weights(c, n), weights(text, n)
                dot = sum(min(weight, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, weight in ours.items())
                length = norm(ours) * norm(theirs)
                total += exp(-(difference**2) / (2 * 6**2)) * (dot / length if length else 0.0)
        scores.append(10 * total / 4 / len(texts))
    return scores


@needs_library
@settings(deadline=None)  # the first call imports the library
@given(rows)
def test_equals_the_equations(data: list[tuple[str, list[str]]]) -> None:
    candidates, references = [c for c, _ in data], [r for _, r in data]
    scores = caption_scores(candidates, references)
    cider = plain_cider_d(candidates, references)
    assert scores.cider_rows == pytest.approx(cider, abs=1e-9)
    assert scores.cider == pytest.approx(sum(cider) / len(cider), abs=1e-9)
    assert scores.bleu4 == pytest.approx(plain_bleu4(candidates, references), abs=1e-9)


@needs_library
def test_perfect_captions() -> None:
    scores = caption_scores(CANDIDATES, [[text] for text in CANDIDATES])
    assert scores.bleu4 == pytest.approx(1)
    assert scores.cider == pytest.approx(10)
    assert caption_scores(CANDIDATES, REFERENCES).bleu4 == pytest.approx(1)


@needs_library
@settings(deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_order_of_rows_and_references_is_irrelevant(
    data: list[tuple[str, list[str]]], shuffler: random.Random
) -> None:
    before = caption_scores([c for c, _ in data], [r for _, r in data])
    order = list(range(len(data)))
    shuffler.shuffle(order)
    after = caption_scores(
        [data[i][0] for i in order], [shuffler.sample(data[i][1], len(data[i][1])) for i in order]
    )
    assert after.bleu4 == pytest.approx(before.bleu4)
    assert after.cider == pytest.approx(before.cider)
    assert after.cider_rows == pytest.approx([before.cider_rows[i] for i in order])


@needs_library
def test_captions_of_other_rows_score_lower() -> None:
    own = caption_scores(CANDIDATES, REFERENCES)
    others = caption_scores(CANDIDATES[1:] + CANDIDATES[:1], REFERENCES)
    assert others.bleu4 < own.bleu4 / 10
    assert others.cider < own.cider / 10


@needs_library
@pytest.mark.parametrize("empty", ["", " \n", "..."])
def test_empty_captions_score_0(empty: str, capfd: pytest.CaptureFixture[str]) -> None:
    scores = caption_scores([empty, *CANDIDATES[1:]], REFERENCES)
    assert scores.cider_rows[0] == 0 < min(scores.cider_rows[1:])
    assert caption_scores([empty] * 4, REFERENCES).bleu4 == 0
    assert capfd.readouterr().out == ""


@needs_library
@pytest.mark.parametrize(
    ("candidates", "references", "said"),
    [
        ([], [], "0 captions"),
        (["a dog"], [], "1 captions for 0 rows"),
        (["a dog"], [["a"], ["b"]], "1 captions for 2 rows"),
        (["a dog", "a cat"], [["a dog"], []], "row 2"),
        (["a dog", "a cat"], [[" .", ""], ["a cat"]], "row 1"),
    ],
)
def test_refuses_what_cannot_be_scored(candidates: list[str], references: list[list[str]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        caption_scores(candidates, references)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(UsageError, match=r"pip install 'llama-adapter\[eval\]'"):
        caption_scores(CANDIDATES, REFERENCES)


TOKENS = {
    "A man's dog doesn't run.": "a man 's dog does n't run",
    "The dogs' bowls, James's boys; the women's": "the dogs bowls james 's boys the women 's",
    "I can't; he won't, they cannot": "i ca n't he wo n't they can not",
    "They're gonna say we'll, I've, I'd, I'm": "they 're gon na say we 'll i 've i 'd i 'm",
    "It shouldn't've": "it should n't 've",
    "the men’s shirt says “cool” — or ‘hot’ …": "the men 's shirt says cool or hot",
    "\"A dog,\" he said; 'a cat' -- no: ``a cow''": "a dog he said a cat no a cow",
    "A dog runs. The grass is green. A sky .": "a dog runs the grass is green a sky",
    "the letter T. and plan B.": "the letter t. and plan b.",
    "wait.. what...? wow!!! really?!": "wait what wow !!! really ?!",
    "a T-shirt, a tri-colored 10-year-old": "a t-shirt a tri-colored 10-year-old",
    "blue/green and/or tape_dispenser": "blue/green and/or tape_dispenser",
    "1,000 people at 10:30, 2.5 feet, 1/2": "1,000 people at 10:30 2.5 feet 1/2",
    "it costs $5 & 50% off": "it costs $ 5 & 50 % off",
    "a man (in red) with a [red] hat": "a man -lrb- in red -rrb- with a -lsb- red -rsb- hat",
    "the U.S. flag at 5 p.m. with Mr. Smith": "the u.s. flag at 5 p.m. with mr. smith",
    "rock 'n' roll at six o'clock in the '80s": "rock 'n' roll at six o'clock in the '80s",
    "a - b\tc\nd": "a b c d",
    "a café": "a café",
    "": "",
}


@pytest.mark.parametrize(("text", "tokens"), TOKENS.items())
def test_tokens(text: str, tokens: str) -> None:
    assert " ".join(caption_tokens(text)) == tokens


@needs_library
@pytest.mark.skipif(shutil.which("java") is None, reason="the real one runs on Java")
def test_tokens_are_those_of_the_real_tokenizer() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    real = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(TOKENS) if text})
    assert [tokens for (tokens,) in real.values()] == [tokens for tokens in TOKENS.values() if tokens]


# ---- questions ----


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes.", "yes"),
        (" The  two\n dogs ", "2 dogs"),
        ("none", "0"),
        ("Ten", "10"),
        ("an apple and a pear", "apple and pear"),
        ("A", "a"),
        ("dont", "don't"),
        ("don’t", "don't"),
        ("whats", "what's"),
        ("couldnt've", "couldn't've"),
        ("well", "well"),
        ("its", "its"),
        ("3.5 m.", "3.5 m"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("tape_dispenser", "tape dispenser"),
        ("black/white (striped)", "black white striped"),
        ("x-ray!", "x ray"),
        ("?", ""),
        ("", ""),
    ],
)
def test_normalise_answer(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


answer = st.one_of(
    st.text(alphabet=string.ascii_letters + "01,.;_-/'?! \n", max_size=14),
    st.lists(
        st.sampled_from(
            ["A", "the", "One", "ten", "dont", "wouldn't've", "yall'd've", "3.5", "1,000", "red,", "_x"]
        )
    ).map(" ".join),
)


@given(st.one_of(answer, st.text(max_size=12)))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


@given(answer)
def test_case_outer_spaces_and_a_full_stop_are_irrelevant(text: str) -> None:
    normal = normalise_answer(text)
    for same in (text.upper(), text.lower(), f"  {text}\n", text + ".", f" {text} . "):
        assert normalise_answer(same) == normal
        if normal:
            assert is_right(same, text) and is_right(text, same)


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("Two.", "2", True),
        ("the red", "Red", True),
        ("reddish", "red", False),
        ("red", "red, blue", False),
        ("blue,red", "red, blue", True),
        ("Papers, book, tape dispenser, scissor.", "book, scissor, papers, tape_dispenser", True),
        ("book, scissor, papers", "book, scissor, papers, tape_dispenser", False),
        ("night_stand", "night stand", True),
        ("1,2", "2, 1", True),
        ("1,000", "1000", True),
        ("", "red", False),
        ("", "A", False),
        ("B", "A", False),
        ("<", ">", False),
        (" <", "<", True),
    ],
)
def test_is_right(given: str, expected: str, right: bool) -> None:
    assert is_right(given, expected) is right


@given(st.lists(st.sampled_from(["lamp", "tv_stand", "Red", "the box", "2"]), min_size=1), st.data())
def test_lists_are_right_in_any_order(items: list[str], data: st.DataObject) -> None:
    expected = ", ".join(items)
    shuffled = data.draw(st.permutations(items))
    assert is_right(",".join(shuffled).replace("_", " "), expected)
    assert not is_right(", ".join([*shuffled, "sofa"]), expected)


@pytest.mark.parametrize(
    ("question", "expected", "kind"),
    [
        ("is there a red shape in the image?", "no", "yes/no"),
        ("Does the image not contain a circle?", "Yes.", "yes/no"),
        ("How many colours does the curtain have?", "4", "how many"),
        ("what is the number of drawers?", "3", "how many"),
        ("What color is the shape?", "red", "colour"),
        ("what is the colour of the rectangle", "blue", "colour"),
        ("what are the colours visible?", "white, brown", "colour"),
        ("what is the third tray handle colour?", "green", "colour"),
        ("Which colour is the chair?", "red", "colour"),
        ("what shape is present?", "circle", "shape"),
        ("what is the blue shape?", "triangle", "shape"),
        ("what's the shape of the red thing?", "circle", "shape"),
        ("what is the blue colour object on the stand?", "box", "other"),
        ("what is in blue colour?", "can_of_beer", "other"),
        ("what is below the colorful painting?", "printer", "other"),
        ("what is left of the lamp?", "sofa", "other"),
    ],
)
def test_question_type(question: str, expected: str, kind: str) -> None:
    assert question_type(question, expected) == kind


# ---- shares ----


@given(st.integers(1, 10_000), st.data())
def test_interval_solves_its_equation(rows: int, data: st.DataObject) -> None:
    """Its ends are the shares p that are 1.96 of their standard errors away from the measured share."""
    right = data.draw(st.integers(0, rows))
    low, high = accuracy_interval(right, rows)
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= right / rows <= high + 1e-12
    for p in (low, high):
        assert (right / rows - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / rows, abs=1e-12)


def test_known_interval() -> None:
    assert accuracy_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert accuracy_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)  # the same


@pytest.mark.parametrize(("right", "rows"), [(0, 0), (-1, 5), (6, 5)])
def test_interval_refuses_what_is_no_share(right: int, rows: int) -> None:
    with pytest.raises(UsageError, match="right answers of"):
        accuracy_interval(right, rows)
