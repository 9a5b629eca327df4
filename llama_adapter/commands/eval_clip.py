"""Score a CLIP: python -m eval.clip --model clip-mini --retrieval FOLDER --names FOLDER"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llama_adapter.commands.arguments import (
    Parser,
    add_device_option,
    add_json_option,
    add_weights_option,
    positive_int,
    quieten_libraries,
    report,
)
from llama_adapter.common.errors import UsageError
from llama_adapter.weights import locations


def main(words: Sequence[str] | None = None, *, program: str = "python -m eval.clip") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--model", default="clip-mini", help="name or folder of an open_clip model (clip-mini)"
    )
    parser.add_argument(
        "--retrieval", metavar="SOURCE", help="pictures with captions, each to be found from the other"
    )
    parser.add_argument("--split", default="val", help="split to read, if captions name one (val)")
    parser.add_argument("--names", metavar="FOLDER", help="names.json beside images/: zero-shot top-1")
    parser.add_argument(
        "--kept-names", type=positive_int, default=100, help="names that train.clip keeps back (100)"
    )
    add_device_option(parser)
    add_weights_option(parser)
    add_json_option(parser)
    arguments = parser.parse_args(words)
    if arguments.retrieval is None and arguments.names is None:
        raise UsageError("nothing to score: give --retrieval, --names or both")

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.methods.decoder import choose_device
    from llama_adapter.vision.contrastive import (
        load_clip,
        read_names,
        read_pairs,
        retrieval,
        split_names,
        zero_shot,
    )

    quieten_libraries()
    found = locations.resolve(arguments.model, kind="tower", weights=arguments.weights)
    clip = load_clip(Path(found)).to(choose_device(arguments.device))
    figures: dict[str, float] = {}
    if arguments.retrieval is not None:
        pairs = read_pairs(
            arguments.retrieval,
            split=arguments.split,
            tell=lambda summary: print(summary, file=sys.stderr),
        )
        figures |= retrieval(clip, pairs)
        print(f"{len(pairs):,} pictures, {sum(len(pair.texts) for pair in pairs):,} texts")
    if arguments.names is not None:
        kept, _ = split_names(read_names(arguments.names), arguments.kept_names)
        figures["zero_shot"] = zero_shot(clip, kept)
        print(f"zero-shot among {len(kept):,} names")
    for name, share in figures.items():
        print(f"{name:<20} {share:6.1%}")
    report(figures, arguments.json)
