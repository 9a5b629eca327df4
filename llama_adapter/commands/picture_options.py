"""The options that evaluations with pictures share, and loading what they describe."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_adapter.commands.arguments import (
    add_adapter_option,
    add_cache_option,
    add_image_root_option,
    add_model_options,
    load_model,
    positive_int,
    seed_number,
)
from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from llama_adapter.data.records import PictureFile, Record
    from llama_adapter.model import LlamaAdapter


def add_picture_scoring_options(parser: argparse.ArgumentParser, *, default_split: str) -> None:
    """Options for the rows, the pictures, the search, the model and its adapter."""
    parser.add_argument(
        "--data",
        required=True,
        help="a folder with captions.json or qa.json beside images/, a file, easy-vqa, or drawings:N",
    )
    parser.add_argument(
        "--split",
        help=f"split to read, if rows name one (with --validation-rows train, else {default_split})",
    )
    add_image_root_option(parser)
    parser.add_argument(
        "--validation-rows",
        type=positive_int,
        metavar="N",
        help="only the rows that train.vqa keeps back with the same number",
    )
    parser.set_defaults(default_split=default_split)
    parser.add_argument("--limit", type=positive_int, help="use at most N pictures, chosen with --seed (all)")
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="seed for choosing rows and exchanging pictures (0)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, help="questions answered at once (16)")
    parser.add_argument("--beams", type=positive_int, default=1, help="beams of the search; 1 is greedy (1)")
    add_cache_option(parser)
    add_adapter_option(parser)
    add_model_options(parser)


@dataclass(frozen=True)
class ToScore:
    """A model, the rows to ask it, and the features (F,) of their pictures, if the model sees pictures."""

    model: LlamaAdapter
    records: list[Record]
    features: dict[PictureFile, Tensor]


def load_records_to_score(arguments: argparse.Namespace) -> ToScore:
    """Load what `add_picture_scoring_options` describes. Raises UsageError if no row has a picture."""
    from llama_adapter.data.choosing import draw_pictures, split_records
    from llama_adapter.data.records import read_records
    from llama_adapter.model import NO_ADAPTER
    from llama_adapter.vision.features import picture_features

    split = arguments.split or ("train" if arguments.validation_rows else arguments.default_split)
    records, summary = read_records(arguments.data, image_root=arguments.image_root, split=split)
    print(summary, file=sys.stderr)
    if arguments.validation_rows is not None:  # split all rows, as train.vqa does
        _, records = split_records(records, validation_rows=arguments.validation_rows)
    blind = sum(not record.images for record in records)
    records = [record for record in records if record.images]
    if blind:
        print(f"{blind:,} without a picture left out", file=sys.stderr)
    if not records:
        raise UsageError(f"{arguments.data}: no row names a picture; score it with eval.alpaca")
    if arguments.limit is not None:
        records = draw_pictures(records, arguments.limit, seed=arguments.seed)
    model = load_model(arguments)
    model.set_adapter(model.answering_adapter(pictured=True))
    if model.active_adapter == NO_ADAPTER:
        raise UsageError("there is no adapter to score; name one with --adapter")
    if not model.sees():
        return ToScore(model, records, {})
    images = [image for record in records for image in record.images]
    return ToScore(model, records, picture_features(model.tower(), arguments.cache, images))
