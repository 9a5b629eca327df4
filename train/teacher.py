"""Write the likeliest answers to questions, to train on in place of single people's: python -m train.teacher
--data SOURCE --output FILE.json

A linear classifier of a question's words and its picture is fitted to other rows, and its answer takes the
place of the row's own. It is never fitted to the rows that train.vqa keeps back with the same
--validation-rows; these get its answers as well, for the validation loss. Score by the true ones: eval.vqa.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapter.arguments import Parser, add_weights_option, picture_features, positive_int
from llama_adapter.errors import UsageError, run_command
from train.options import DEFAULT_TOWER

if TYPE_CHECKING:
    from torch import Tensor

    from llama_adapter.data import PictureFile, Record
    from llama_adapter.teacher import QuestionRow


def main() -> None:
    parser = Parser(prog="python -m train.teacher", description=__doc__)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="rows of {image, question, answer}")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write, for train.vqa --data")
    parser.add_argument("--split", default="train", help="of rows that name one (train)")
    parser.add_argument(
        "--image-root", type=Path, help="where names of pictures start (default: by the data)"
    )
    parser.add_argument(
        "--validation-rows", type=positive_int, default=100, help="rows that train.vqa keeps back (100)"
    )
    parser.add_argument(
        "--tower", help=f"name, folder, hub id or MODEL:TAG of an open_clip model ({DEFAULT_TOWER})"
    )
    parser.add_argument("--no-images", action="store_true", help="go by the questions' words alone")
    parser.add_argument(
        "--folds", type=positive_int, default=8, help="parts that the rows are dealt into (8)"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where features are kept (the user's cache)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the parts and the order of the rows")
    add_weights_option(parser)
    arguments = parser.parse_args()
    if arguments.no_images and arguments.tower:
        raise UsageError("--tower is for pictures, which --no-images leaves out; give one of the two")

    # Slow to import, and not needed to say that an option is wrong.
    from llama_adapter.data import read_records, split_records
    from llama_adapter.files import write_json
    from llama_adapter.progress import RowProgress
    from llama_adapter.scoring import is_right
    from llama_adapter.teacher import Teacher, answers_from_other_rows
    from llama_adapter.vision import load_tower

    records, summary = read_records(arguments.data, image_root=arguments.image_root, split=arguments.split)
    print(summary, file=sys.stderr)
    rows = {record.row: _question_row(record, arguments.data) for record in records}
    parts = split_records(records, validation_rows=arguments.validation_rows)
    asked, kept_back = ([rows[record.row] for record in part] for part in parts)

    pictures = [] if arguments.no_images else [row.picture for row in rows.values() if row.picture]
    features: dict[PictureFile, Tensor] = {}
    if pictures:
        tower = load_tower(arguments.tower or DEFAULT_TOWER, weights=arguments.weights)
        features = picture_features(tower, arguments.cache, pictures)
    progress = RowProgress("rows", len(asked))
    answers = answers_from_other_rows(
        asked, features, folds=arguments.folds, seed=arguments.seed, progress=progress
    )
    theirs = Teacher(asked, features, seed=arguments.seed).answers(kept_back)
    for name, part, given in (("to train on", asked, answers), ("kept back", kept_back, theirs)):
        right = sum(is_right(answer, row.answer) for row, answer in zip(part, given, strict=True))
        print(f"{len(part):,} rows {name}: {right / len(part):.1%} answered, from others, as they are")

    taught = dict(zip((record.row for part in parts for record in part), [*answers, *theirs], strict=True))
    write_json(
        arguments.output,
        [
            {
                "image": str(row.picture.absolute()) if row.picture else None,
                "question": row.question,
                "answer": taught[number],
            }
            for number, row in rows.items()  # in their order, so that train.vqa keeps the same ones back
        ],
    )


def _question_row(record: Record, source: str) -> QuestionRow:
    from llama_adapter.teacher import QuestionRow

    picture = next(iter(record.images), None)
    if len(record.turns) != 2 or len(record.images) > 1 or isinstance(picture, bytes):
        raise UsageError(
            f"{source}: row {record.row} is no question with one answer about one picture file; "
            "expected rows of {image, question, answer}"
        )
    question, answer = record.turns
    return QuestionRow(question.text, answer.text, picture)


if __name__ == "__main__":
    sys.exit(run_command(main))
