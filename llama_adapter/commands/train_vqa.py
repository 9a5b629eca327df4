"""Teach an adapter to see: python -m train.vqa --data SOURCE [--data SOURCE=WEIGHT ...] --output DIR"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapter.commands.arguments import Parser, add_model_options, positive_int
from llama_adapter.commands.next_steps import adapter_steps, question_of
from llama_adapter.commands.training_options import (
    add_training_options,
    add_vision_options,
    encode_rows,
    load_model_to_train,
    training_settings,
)
from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:
    from llama_adapter.data.records import Example, Record


def main(words: Sequence[str] | None = None, *, program: str = "python -m train.vqa") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="SOURCE[=WEIGHT]",
        help="rows with pictures (question and answer, captions, LLaVA's conversations), a folder with "
        "captions.json or qa.json beside images/, easy-vqa, or rows of text; a weight of 0.5 shows half of "
        "its rows in an epoch, other ones each time, and 2 each row twice",
    )
    parser.add_argument(
        "--text-of",
        action="append",
        default=[],
        metavar="SOURCE[=WEIGHT]",
        help="as --data, its rows shown without their pictures: of a few photos, answers are learnt by heart",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder of the run and of the best adapter"
    )
    parser.add_argument("--split", default="train", help="of rows that name one (train)")
    parser.add_argument(
        "--image-root", type=Path, help="where names of pictures start (default: by the data)"
    )
    parser.add_argument("--limit", type=positive_int, help="use the first so many rows of each source only")
    parser.add_argument(
        "--validation-rows", type=positive_int, default=100, help="rows kept back of each source (100)"
    )
    parser.add_argument(
        "--balance-yes-no",
        action="store_true",
        help="show a question's rows with yes as often as those with no, so that its wording tells nothing",
    )
    parser.add_argument("--max-length", type=positive_int, default=512, help="tokens a row, cut there (512)")
    add_model_options(parser)
    add_vision_options(parser)
    add_training_options(parser)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to say that an option is wrong.
    from llama_adapter.common.processes import running_processes
    from llama_adapter.data.records import balance_yes_no, read_records, split_records
    from llama_adapter.training.trainer import Trainer

    settings = training_settings(arguments)
    processes = running_processes()
    sources = [(*_weighted("--data", text), arguments.images) for text in arguments.data]
    sources += [(*_weighted("--text-of", text), False) for text in arguments.text_of]
    train: list[list[Record]] = []
    validation: list[list[Record]] = []
    pictured: list[bool] = []  # whether a source's rows have pictures, shown or not
    facts: list[dict[str, object]] = []
    for source, weight, images in sources:
        records, summary = read_records(source, image_root=arguments.image_root, split=arguments.split)
        processes.say(summary, file=sys.stderr)
        parts = split_records(records[: arguments.limit], validation_rows=arguments.validation_rows)
        pictured.append(any(record.images for record in parts[1]))
        for part, whole in zip(parts, (train, validation), strict=True):
            # Pictures are left out after the split, which is by pictures.
            whole.append(part if images else [dataclasses.replace(row, images=()) for row in part])
        facts.append(
            {
                "source": Path(source).name,
                "fingerprint": summary.fingerprint,
                "weight": weight,
                "images": images,
                "read": summary.facts(),
            }
        )

    model, features = load_model_to_train(
        arguments, [image for part in (*train, *validation) for record in part for image in record.images]
    )
    assert model.tokenizer is not None
    train_examples: list[Example] = []
    occurrences: list[float] = []
    validation_examples: dict[str, list[Example]] = {}
    for (source, weight, images), fact, part, kept in zip(sources, facts, train, validation, strict=True):
        name = Path(source).name + ("" if images or not arguments.images else " (text)")
        examples, trained_on = encode_rows(
            part, model, f"{name}, to train on", max_length=arguments.max_length
        )
        balance = (
            balance_yes_no(examples, model.tokenizer) if arguments.balance_yes_no else [1.0] * len(examples)
        )
        train_examples += examples
        occurrences += [weight * own for own in balance]
        examples, kept_back = encode_rows(kept, model, f"{name}, kept back", max_length=arguments.max_length)
        validation_examples.setdefault(name, []).extend(examples)
        fact |= {"train": trained_on.facts(), "validation": kept_back.facts()}
    trainer = Trainer(
        model,
        "trained",
        train_examples,
        validation_examples,
        settings,
        arguments.output,
        data={
            "sources": facts,
            "split": arguments.split,
            "balance_yes_no": arguments.balance_yes_no,
            "max_length": arguments.max_length,
            "start_from": arguments.start_from,
        },
        features=features,
        occurrences=occurrences,
    )
    best = trainer.run(resume=arguments.resume)
    processes.say(f"{arguments.output}: best validation loss {best:.4f} nats a token")
    shown = next((number for number, (_, _, images) in enumerate(sources) if images), 0)
    scoring = [_scoring_script(validation[shown], pictured=pictured[shown]), "--data", sources[shown][0]]
    # Of all rows others are kept back than of the first few.
    rows = "--validation-rows" if arguments.limit is None else "--limit"
    scoring += [rows, arguments.validation_rows, "--split", arguments.split]
    if pictured[shown]:
        for option in ("image_root", "cache"):
            if (value := getattr(arguments, option)) is not None:
                scoring += [f"--{option.replace('_', '-')}", value]
    question = question_of(validation[shown], images=any(record.images for record in validation[shown]))
    processes.say(adapter_steps(arguments, question=question, scoring=scoring))


def _scoring_script(rows: list[Record], *, pictured: bool) -> object:
    """Which of eval's scripts scores rows like these."""
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
        raise UsageError(f"{option} {text}: {number!r} is no weight; expected SOURCE=NUMBER") from None
    if not 0 < weight < 1000:
        raise UsageError(f"{option} {text}: the weight is {weight:g}; expected one above 0 and below 1000")
    return source, weight
