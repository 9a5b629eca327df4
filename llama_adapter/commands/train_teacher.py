"""Write the answers that a classifier finds most likely, to train on in place of people's own:
python -m train.teacher --data SOURCE --output FILE.json

The classifier reads a question's words together with its picture. It is fitted to other rows, and its answer
replaces the row's own. With --more-pictures, questions are also asked about other pictures: with few
pictures, an adapter would otherwise learn by heart which answers belong to which picture. The classifier is
not fitted to the rows that train.vqa keeps back from FILE.json with the same --validation-rows. Their answers
are replaced too, so the validation loss shows how well the adapter follows the classifier. eval.vqa on SOURCE
shows how often it gives people's answers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapter.commands.arguments import (
    Parser,
    add_cache_option,
    add_image_root_option,
    add_weights_option,
    positive_int,
    quieten_libraries,
)
from llama_adapter.commands.next_steps import steps_text
from llama_adapter.common.errors import UsageError
from llama_adapter.weights.catalogue import DEFAULT_TOWER

if TYPE_CHECKING:
    from torch import Tensor

    from llama_adapter.data.records import PictureFile, Record
    from llama_adapter.data.teacher import QuestionRow


def main(words: Sequence[str] | None = None, *, program: str = "python -m train.teacher") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data", required=True, metavar="SOURCE", help="rows of {image, question, answer}, or without image"
    )
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write, for train.vqa --data")
    parser.add_argument("--split", default="train", help="split to read, if rows name one (train)")
    add_image_root_option(parser)
    parser.add_argument(
        "--validation-rows", type=positive_int, default=100, help="rows that train.vqa keeps back (100)"
    )
    parser.add_argument(
        "--tower", help=f"name, folder, hub id or MODEL:TAG of an open_clip model ({DEFAULT_TOWER})"
    )
    parser.add_argument(
        "--more-pictures",
        type=positive_int,
        default=0,
        metavar="N",
        help="ask each question to train on about N other pictures too, chosen at random, and write those "
        "rows last (none)",
    )
    parser.add_argument("--no-images", action="store_true", help="use only the words of the questions")
    add_cache_option(parser)
    add_weights_option(parser)
    arguments = parser.parse_args(words)
    for option, given in (("--tower", arguments.tower), ("--more-pictures", arguments.more_pictures)):
        if arguments.no_images and given:
            raise UsageError(f"{option} is for pictures, which --no-images leaves out; give one of the two")

    if not arguments.output.absolute().parent.is_dir():
        raise UsageError(
            f"--output {arguments.output}: there is no folder {arguments.output.parent}; make it"
        )
    source = Path(arguments.data).resolve()
    if arguments.output.resolve() in (source, source / "qa.json"):
        raise UsageError(
            f"--output {arguments.output} is --data; people's answers would be lost: name another"
        )
    quieten_libraries()

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.answering.scoring import accuracy_interval, is_right
    from llama_adapter.common.files import write_json
    from llama_adapter.common.progress import RowProgress
    from llama_adapter.data.choosing import split_records
    from llama_adapter.data.records import read_records
    from llama_adapter.data.teacher import answer_from_other_rows, directions
    from llama_adapter.vision.features import picture_features
    from llama_adapter.vision.tower import load_tower

    records, summary = read_records(arguments.data, image_root=arguments.image_root, split=arguments.split)
    print(summary, file=sys.stderr)
    parts = split_records(records, validation_rows=arguments.validation_rows)
    asked, kept_back = ([_question_row(record, arguments.data) for record in part] for part in parts)

    pictures = [] if arguments.no_images else [row.picture for row in asked + kept_back if row.picture]
    directed: dict[PictureFile, Tensor] = {}
    if pictures:
        tower = load_tower(arguments.tower or DEFAULT_TOWER, weights=arguments.weights)
        directed = directions(picture_features(tower, arguments.cache, pictures))
    more_pictures = arguments.more_pictures
    with_pictures = sum(row.picture is not None for row in asked)
    progress = RowProgress("rows", len(asked) + more_pictures * with_pictures)
    answered, more, theirs = answer_from_other_rows(
        asked, directed, kept_back=kept_back, more_pictures=more_pictures, progress=progress
    )
    for name, part, given in (("to train on", asked, answered), ("kept back", kept_back, theirs)):
        right = sum(is_right(new.answer, row.answer) for row, new in zip(part, given, strict=True))
        low, high = accuracy_interval(right, len(part))
        print(
            f"{len(part):,} rows {name}: the classifier gives their own answer to {right / len(part):.1%} "
            f"(95 % interval {low:.1%} to {high:.1%})"
        )

    taught = {id(record): row for record, row in zip([*parts[0], *parts[1]], answered + theirs, strict=True)}
    # In the old order, with the added rows last and none of them kept back, so train.vqa keeps back the same
    # rows.
    rows = [*(taught[id(record)] for record in records), *more]
    write_json(
        arguments.output,
        [
            {
                "image": str(row.picture.absolute()) if row.picture else None,
                "question": row.question,
                "answer": row.answer,
            }
            for row in rows
        ],
    )
    taught_rows = ["--data", arguments.output, "--validation-rows", arguments.validation_rows]
    run = arguments.output.with_suffix("")
    run = run if run != arguments.output else run.with_name(f"{run.name}-run")
    more_words = ["--no-images"] if arguments.no_images else []
    if arguments.tower is not None:
        more_words += ["--tower", arguments.tower]
    if arguments.weights is not None:
        more_words += ["--weights", arguments.weights]
    words = ["train", "vqa", *taught_rows, "--output", run, *more_words]
    print(steps_text([("train an adapter on these rows", words)]))


def _question_row(record: Record, source: str) -> QuestionRow:
    from llama_adapter.data.teacher import QuestionRow

    picture = next(iter(record.images), None)
    alone = len(record.turns) == 2 and not record.turns[0].input and len(record.images) <= 1
    if not alone or isinstance(picture, bytes):
        raise UsageError(
            f"{source}: row {record.row} is more than a question with an answer about one picture file; "
            "expected rows of {image, question, answer}"
        )
    return QuestionRow(record.turns[0].text, record.turns[1].text, picture)
