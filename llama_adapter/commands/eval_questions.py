"""Count right answers to plain questions: python -m eval.questions [--adapter NAME] [--base NAME]

Asks 60 questions of our own with short answers (facts, arithmetic, grammar, extraction, yes or no, lists,
code). Each is asked by itself and answered greedily, in the template that the adapter was trained with; the
bare base uses its own chat template. Rules check the answers, and wrong ones are shown.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from llama_adapter.commands.arguments import (
    Parser,
    add_adapter_option,
    add_json_option,
    add_model_options,
    load_model,
    positive_int,
    report,
)


def main(words: Sequence[str] | None = None, *, program: str = "python -m eval.questions") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="other questions, as JSONL in the same form"
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="use at most N questions, the same ones every time"
    )
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="questions at once (16)")
    add_adapter_option(parser)
    add_model_options(parser)
    add_json_option(parser)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.answering.questions import OWN_QUESTIONS, load_questions
    from llama_adapter.answering.records_answered import answer_records
    from llama_adapter.common.progress import RowProgress
    from llama_adapter.data.records import Record
    from llama_adapter.data.templates import Turn

    questions = load_questions(arguments.data or OWN_QUESTIONS)
    if arguments.limit is not None and arguments.limit < len(questions):
        chosen = random.Random(0).sample(range(len(questions)), arguments.limit)
        questions = [questions[i] for i in sorted(chosen)]
    model = load_model(arguments)
    records = [
        Record((Turn("user", question.question), Turn("assistant", question.right[0])), row)
        for row, question in enumerate(questions, start=1)
    ]
    answers = answer_records(
        model,
        records,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        progress=RowProgress("questions", len(records)),
    )
    marks = [question.is_right(answer) for question, answer in zip(questions, answers, strict=True)]
    for question, answer, right in zip(questions, answers, marks, strict=True):
        if not right:
            print(f"{question.kind}: {question.question}")
            print(f"    said      {' / '.join(answer.splitlines()) or '(nothing)'}")
            print(f"    expected  {' / '.join(question.right[0].splitlines())}")
    sys.stdout.flush()

    kinds = list(dict.fromkeys(question.kind for question in questions))
    figures: dict[str, int | float] = {"right": sum(marks), "questions": len(marks)}
    print(f"\n{model.answering_adapter()} on {model.base}, template {model.template()}")
    for kind in kinds:
        of_kind = [right for question, right in zip(questions, marks, strict=True) if question.kind == kind]
        print(f"{kind:<12}{sum(of_kind):>4} of {len(of_kind)}")
        figures[f"right_{kind.replace(' ', '_')}"] = sum(of_kind)
    print(f"{'all':<12}{sum(marks):>4} of {len(marks)}")
    report(figures, arguments.json)
