"""ScienceQA's problems as text: the official formats of questions and answers, and rows to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.examples import Example, encode_records
from llama_adapter.data.records import Record
from llama_adapter.data.templates import Turn
from llama_adapter.scienceqa.problems import LETTERS, Problem

DEFAULT_FORMAT = "QCM-A"

_INPUTS = {
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {choices}\n",
    "QCM": "Question: {question}\nContext: {context}\nOptions: {choices}\n",
    "QCML": "Question: {question}\nContext: {context}\nOptions: {choices}\nBECAUSE: {lecture}\n",
    "QCME": "Question: {question}\nContext: {context}\nOptions: {choices}\nBECAUSE: {solution}\n",
    "QCMLE": "Question: {question}\nContext: {context}\nOptions: {choices}\nBECAUSE: {lecture} {solution}\n",
    "QCLM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture}\nOptions: {choices}\n",
    "QCEM": "Question: {question}\nContext: {context}\nBECAUSE: {solution}\nOptions: {choices}\n",
    "QCLEM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture} {solution}\nOptions: {choices}\n",
}
# In "AL" follows the solution, in "AE" the lecture, as in the official script. "O" is ours: the option's
# text.
_OUTPUTS = {
    "A": "The answer is {letter}.",
    "AL": "The answer is {letter}. BECAUSE: {solution}",
    "AE": "The answer is {letter}. BECAUSE: {lecture}",
    "ALE": "The answer is {letter}. BECAUSE: {lecture} {solution}",
    "AEL": "The answer is {letter}. BECAUSE: {solution} {lecture}",
    "LA": "{lecture} The answer is {letter}.",
    "EA": "{solution} The answer is {letter}.",
    "LEA": "{lecture} {solution} The answer is {letter}.",
    "ELA": "{solution} {lecture} The answer is {letter}.",
    "O": "{option}",
}


def check_format(name: str) -> None:
    """Raise UsageError unless the format has an official name, or ends in "-O", which is ours."""
    given, _, wanted = name.partition("-")
    if given not in _INPUTS or wanted not in _OUTPUTS:
        raise UsageError(
            f"no format {name!r}; expected one of {', '.join(_INPUTS)}, then '-', then one of "
            f"{', '.join(_OUTPUTS)}, such as {DEFAULT_FORMAT} or QCM-ALE"
        )


def question_text(problem: Problem, format: str = DEFAULT_FORMAT, *, caption: bool = False) -> str:
    """The text before "Answer:", as the official create_one_example writes it.

    Args:
        caption: add the machine's caption of the picture after the hint.
    """
    check_format(format)
    context = " ".join([problem.hint or "", problem.caption if caption else ""]).strip() or "N/A"
    text = _INPUTS[format.partition("-")[0]].format(
        context=context, choices=_lettered(problem.choices), question=problem.question, **_reasons(problem)
    )
    return text.replace("  ", " ").removesuffix("\n")  # single spaces, as in the official script


def answer_text(problem: Problem, format: str = DEFAULT_FORMAT, *, choice: int | None = None) -> str:
    """The text after "Answer: ". With ``choice``, as if that were the right one."""
    check_format(format)
    choice = problem.answer if choice is None else choice
    text = _OUTPUTS[format.partition("-")[2]].format(
        letter=LETTERS[choice], option=problem.choices[choice], **_reasons(problem)
    )
    whole = f"Answer: {text}".replace("  ", " ").strip()  # single spaces, as in the official script
    return whole.removesuffix("BECAUSE:").rstrip().removeprefix("Answer:").removeprefix(" ")


def _reasons(problem: Problem) -> dict[str, str]:
    # As in the official script, a line break is written as backslash and n: a real one would end the text.
    return {name: getattr(problem, name).replace("\n", "\\n") for name in ("lecture", "solution")}


def _lettered(choices: Sequence[str]) -> str:
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def problem_records(
    problems: Sequence[Problem], format: str = DEFAULT_FORMAT, *, caption: bool = False, images: bool = True
) -> list[Record]:
    """The problems as training rows for the template "scienceqa", with or without their pictures."""
    return [
        Record(
            turns=(
                Turn("user", question_text(problem, format, caption=caption)),
                Turn("assistant", answer_text(problem, format)),
            ),
            row=number,
            images=(problem.image,) if images and problem.image is not None else (),
        )
        for number, problem in enumerate(problems, start=1)
    ]


def encode_problems(
    problems: Sequence[Problem],
    format: str = DEFAULT_FORMAT,
    *,
    caption: bool = False,
    images: bool = True,
    rivals: bool = False,
    **encoding: Any,
) -> list[Example]:
    """`problem_records` as tokens. With ``rivals``, each has the answers of its other choices as rivals.

    ``encoding``, and what is dropped: see `data.encode_records`.
    """
    how: dict[str, Any] = {"format": format, "caption": caption, "images": images}
    examples = encode_records(problem_records(problems, **how), **encoding)
    if not rivals:
        return examples
    others = [
        (row, replace(problem, answer=choice))
        for row, problem in enumerate(problems, start=1)
        for choice in range(len(problem.choices))
        if choice != problem.answer
    ]
    wrong = problem_records([problem for _, problem in others], **how)
    numbered = [replace(record, row=row) for record, (row, _) in zip(wrong, others, strict=True)]
    found: dict[int, list[Example]] = {}
    for example in encode_records(numbered, **encoding):
        found.setdefault(example.row, []).append(example)
    return [replace(example, rivals=tuple(found.get(example.row, ()))) for example in examples]
