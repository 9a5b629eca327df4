"""Train a small CLIP whose picture side serves as a tower: python -m train.clip --data SOURCE --output DIR"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llama_adapter.commands.arguments import (
    Parser,
    add_device_option,
    add_weights_option,
    positive_int,
    quieten_libraries,
    seed_number,
)
from llama_adapter.commands.field_options import add_fields, given_fields
from llama_adapter.commands.next_steps import steps_text
from llama_adapter.common.errors import UsageError
from llama_adapter.weights import locations

START = "efficientnet-lite0-imagenet"  # a name of the catalogue: weights trained on ImageNet


def main(words: Sequence[str] | None = None, *, program: str = "python -m train.clip") -> None:
    from llama_adapter.training.clip_training import ClipSettings, train_clip

    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="SOURCE",
        help="rows of pictures with captions or a name, a folder with captions.json, easy-vqa, or drawings:N",
    )
    parser.add_argument(
        "--names", metavar="FOLDER", help="names.json beside images/: pictures with one name each"
    )
    parser.add_argument(
        "--kept-names", type=positive_int, default=100, help="names kept back for zero-shot scoring (100)"
    )
    parser.add_argument(
        "--retrieval", metavar="SOURCE", help="captions; their split val is scored after each epoch"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the run and of the model")
    parser.add_argument("--start", default=START, help=f"tower to start from: name or folder ({START})")
    parser.add_argument("--embed-dim", type=positive_int, default=256, help="width of the embeddings (256)")
    parser.add_argument("--text-width", type=positive_int, default=96, help="width of the text side (96)")
    parser.add_argument("--text-layers", type=positive_int, default=3, help="layers of the text side (3)")
    add_device_option(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    add_weights_option(parser)
    add_fields(parser, ClipSettings, special={"seed": {"type": seed_number}})
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    import torch

    from llama_adapter.methods.decoder import choose_device
    from llama_adapter.vision.contrastive import (
        build_clip,
        read_names,
        read_pairs,
        retrieval,
        split_names,
        zero_shot,
    )

    quieten_libraries()
    settings = ClipSettings(**given_fields(arguments, ClipSettings))

    def tell(summary: object) -> None:
        print(summary, file=sys.stderr)

    pairs = [pair for source in arguments.data for pair in read_pairs(source, tell=tell)]
    names = read_names(arguments.names) if arguments.names is not None else []
    kept, rest = split_names(names, arguments.kept_names) if names else ([], [])
    pairs += rest
    asked = read_pairs(arguments.retrieval, split="val", tell=tell) if arguments.retrieval is not None else []
    texts = sum(len(pair.texts) for pair in pairs)
    tell(f"to train on: {len(pairs):,} pictures, {texts:,} texts; kept back: {len(kept):,} names")
    start = locations.resolve(arguments.start, kind="tower", weights=arguments.weights)
    if not Path(start).is_dir():
        raise UsageError(f"--start {arguments.start}: give a folder, or a name in the weights folders")
    torch.manual_seed(settings.seed)
    clip = build_clip(
        Path(start),
        embed_dim=arguments.embed_dim,
        text_width=arguments.text_width,
        text_layers=arguments.text_layers,
    ).to(choose_device(arguments.device))

    def validate() -> dict[str, float]:
        figures = retrieval(clip, asked) if asked else {}
        return {**figures, "zero_shot": zero_shot(clip, kept)} if kept else figures

    data = {"sources": [Path(source).name for source in arguments.data], "start": Path(start).name}
    train_clip(clip, pairs, settings, arguments.output, data=data, validate=validate, resume=arguments.resume)
    print(arguments.output)
    weights = [] if arguments.weights is None else ["--weights", arguments.weights]
    scoring = ["--retrieval", arguments.retrieval or arguments.data[0]]
    if arguments.retrieval is None:
        scoring += ["--split", "train"]
    if arguments.names is not None:
        scoring += ["--names", arguments.names, "--kept-names", arguments.kept_names]
    see = ["--data", arguments.data[0], "--tower", arguments.output]
    run = arguments.output.with_name(f"{arguments.output.name}-sees")
    print(
        steps_text(
            [
                ("score it", ["eval", "clip", "--model", arguments.output, *scoring, *weights]),
                ("train an adapter that sees with it", ["train", "vqa", *see, "--output", run, *weights]),
            ]
        )
    )
