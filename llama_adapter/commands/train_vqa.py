"""Teach an adapter to see: python -m train.vqa --data SOURCE [--data SOURCE=WEIGHT ...] --output DIR"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_adapter.commands.arguments import (
    Parser,
    add_image_root_option,
    add_model_options,
    positive_int,
    quieten_libraries,
)
from llama_adapter.commands.next_steps import adapter_steps, question_of
from llama_adapter.commands.training_options import (
    adapter_plan,
    add_output_option,
    add_training_options,
    add_vision_options,
    rows_kept_back,
    training_settings,
)
from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:
    from llama_adapter.data.records import Record


def main(words: Sequence[str] | None = None, *, program: str = "python -m train.vqa") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="SOURCE[=WEIGHT]",
        help="rows with pictures (question and answer, captions, LLaVA's conversations), a folder with "
        "captions.json or qa.json beside images/, easy-vqa, drawings:N (N pictures drawn by our code, four "
        "questions each), objects:SOURCE (yes/no questions about what is in its photos), or rows of text; a "
        "weight of 0.5 uses half of the rows in each epoch, different ones each time, and 2 uses each row "
        "twice",
    )
    parser.add_argument(
        "--text-of",
        action="append",
        default=[],
        metavar="SOURCE[=WEIGHT]",
        help="as --data, but without the pictures: answers about few photos would be learnt by heart",
    )
    add_output_option(parser)
    parser.add_argument("--split", default="train", help="split to read, if rows name one (train)")
    add_image_root_option(parser)
    parser.add_argument("--limit", type=positive_int, help="use only the first N rows of each source")
    parser.add_argument(
        "--validation-rows", type=positive_int, default=100, help="rows kept back of each source (100)"
    )
    parser.add_argument(
        "--balance-yes-no",
        action="store_true",
        help="use a question's rows with yes as often as those with no, so that its words tell nothing",
    )
    parser.add_argument("--max-length", type=positive_int, default=512, help="longest row, in tokens (512)")
    add_model_options(parser)
    add_vision_options(parser, more=["reader_epochs"])
    add_training_options(parser)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.common.processes import running_processes
    from llama_adapter.training.recipes import read_source, train, validation_loss

    settings = training_settings(arguments)
    named = [(*_weighted("--data", text), arguments.images) for text in arguments.data]
    named += [(*_weighted("--text-of", text), False) for text in arguments.text_of]
    sources = [
        read_source(
            data,
            validation_rows=arguments.validation_rows,
            split=arguments.split,
            limit=arguments.limit,
            image_root=arguments.image_root,
            weight=weight,
            images=images,
        )
        for data, weight, images in named
    ]
    quieten_libraries()
    model = train(
        sources,
        output=arguments.output,
        plan=adapter_plan(arguments),
        settings=settings,
        split=arguments.split,
        max_length=arguments.max_length,
        balance_answers=arguments.balance_yes_no,
        resume=arguments.resume,
    )
    say = running_processes().say
    say(f"{arguments.output}: best validation loss {validation_loss(model):.4f} nats a token")
    # The commands below use the first source whose pictures are shown.
    data, shown = next(
        ((data, source) for (data, _, _), source in zip(named, sources, strict=True) if source.images),
        (named[0][0], sources[0]),
    )
    scoring = [_scoring_script(shown.validation, pictured=shown.pictured), "--data", data]
    scoring += rows_kept_back(arguments)
    if shown.pictured:
        for option in ("image_root", "cache"):
            if (value := getattr(arguments, option)) is not None:
                scoring += [f"--{option.replace('_', '-')}", value]
    question = question_of(shown.validation, images=any(record.images for record in shown.validation))
    say(adapter_steps(arguments, question=question, scoring=scoring))


def _scoring_script(rows: Sequence[Record], *, pictured: bool) -> object:
    """Which of the eval scripts scores rows of this kind."""
    from llama_adapter.data.templates import CAPTION_QUESTIONS

    captions = all(row.images and row.turns[0].text in CAPTION_QUESTIONS for row in rows)
    return ("captions" if captions else "vqa") if pictured else "alpaca"


def _weighted(option: str, text: str) -> tuple[str, float]:
    source, mark, number = text.rpartition("=")
    if not mark:
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        raise UsageError(f"{option} {text}: {number!r} is not a weight; expected SOURCE=NUMBER") from None
    if not 0 < weight < 1000:
        raise UsageError(f"{option} {text}: the weight is {weight:g}; expected one above 0 and below 1000")
    return source, weight
