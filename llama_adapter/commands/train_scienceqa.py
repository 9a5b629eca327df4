"""Train an adapter on ScienceQA: python -m train.scienceqa --data DIR --output DIR

After training, the ways to answer are compared on the problems kept back. The adapter's config records the
best one, and eval.scienceqa uses it by default.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from llama_adapter.commands.arguments import (
    Parser,
    add_model_options,
    positive_float,
    positive_int,
    quieten_libraries,
)
from llama_adapter.commands.next_steps import adapter_steps
from llama_adapter.commands.training_options import (
    adapter_plan,
    add_output_option,
    add_training_options,
    add_vision_options,
    training_settings,
)

PAPER_EPOCHS = 30  # as in the paper's ablations on ScienceQA (section 4.4)


def main(words: Sequence[str] | None = None, *, program: str = "python -m train.scienceqa") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data", required=True, help="the official folder (problems.json, ...), or the hub's layout"
    )
    add_output_option(parser)
    parser.add_argument(
        "--format",
        default="QCM-A",
        help="official name of the format of question and answer (QCM-A); QCM-O answers in the option's text",
    )
    parser.add_argument(
        "--caption", action="store_true", help="add the machine's caption of a picture to the context"
    )
    parser.add_argument(
        "--orders",
        type=positive_int,
        default=1,
        help="show each problem with N orders of its choices, in turn (1: only as it is)",
    )
    parser.add_argument(
        "--rivals",
        action="store_true",
        help="also train the right answer to be more likely than the answers of the other choices",
    )
    parser.add_argument(
        "--picture-weight",
        type=positive_float,
        default=1.0,
        metavar="W",
        help="show problems with a picture W times as often as those without (1)",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="use only the first N problems")
    parser.add_argument(
        "--validation-rows",
        type=positive_int,
        default=400,
        help="problems of the training split kept back (400)",
    )
    parser.add_argument(
        "--max-length", type=positive_int, default=512, help="cut rows after this many tokens (512)"
    )
    add_model_options(parser)
    add_vision_options(parser)
    add_training_options(parser)
    parser.set_defaults(epochs=PAPER_EPOCHS, template="scienceqa")
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.common.processes import running_processes
    from llama_adapter.common.progress import RowProgress
    from llama_adapter.data.examples import EncodeSummary
    from llama_adapter.methods.checkpoint import save_adapter
    from llama_adapter.methods.config import ScienceQAConfig
    from llama_adapter.scienceqa.examining import WAYS, Examination, best_way, examine
    from llama_adapter.scienceqa.grading import grade
    from llama_adapter.scienceqa.problem_texts import check_format, encode_problems, question_text
    from llama_adapter.scienceqa.problems import shuffle_choices, split_problems
    from llama_adapter.scienceqa.reading import read_problems
    from llama_adapter.training.plan import load_best, load_to_train
    from llama_adapter.training.recipes import say_encoded
    from llama_adapter.training.trainer import Trainer

    check_format(arguments.format)
    settings = training_settings(arguments)
    processes = running_processes()
    problems, summary = read_problems(arguments.data, "train")
    processes.say(summary, file=sys.stderr)
    train, validation = split_problems(problems[: arguments.limit], validation_rows=arguments.validation_rows)
    shown = [train, *([shuffle_choices(p, seed=n) for p in train] for n in range(1, arguments.orders))]
    images = [p.image for p in (*train, *validation) if p.image is not None] if arguments.images else []
    quieten_libraries()
    model, features = load_to_train(
        adapter_plan(arguments), settings, images, output=arguments.output, resume=arguments.resume
    )
    assert model.tokenizer is not None
    adapter = model.get_adapter("trained")
    asked = ScienceQAConfig(arguments.format, caption=arguments.caption)
    adapter.config = dataclasses.replace(adapter.config, scienceqa=asked)
    encode = {
        "caption": arguments.caption,
        "images": arguments.images,
        "rivals": arguments.rivals,
        "template": model.template(),
        "tokenizer": model.tokenizer,
        "max_length": arguments.max_length,
        "date": model.template_date(),
    }
    examples = [e for some in shown for e in encode_problems(some, arguments.format, **encode)]
    kept_back = encode_problems(validation, arguments.format, **encode)
    trained_on = EncodeSummary.count(len(train) * len(shown), examples, arguments.max_length)
    say_encoded("to train on", trained_on)
    validated = EncodeSummary.count(len(validation), kept_back, arguments.max_length)
    say_encoded("kept back", validated)
    data = {
        "source": Path(arguments.data).name,
        "fingerprint": summary.fingerprint,
        "format": arguments.format,
        "caption": arguments.caption,
        "orders": arguments.orders,
        "rivals": arguments.rivals,
        "picture_weight": arguments.picture_weight,
        "train": trained_on.facts(),
        "validation": validated.facts(),
        "max_length": arguments.max_length,
        "start_from": arguments.start_from,
    }
    trainer = Trainer(
        model,
        "trained",
        examples,
        {"kept back": kept_back},
        settings,
        arguments.output,
        data=data,
        features=features,
        occurrences=[(arguments.picture_weight if e.images else 1) / arguments.orders for e in examples],
    )
    best = trainer.run(resume=arguments.resume)
    processes.say(f"{arguments.output}: best validation loss {best:.4f} nats a token")

    load_best(model, arguments.output)
    adapter = model.get_adapter("trained")
    right = {}
    for way in WAYS:
        predictions, _ = examine(
            model,
            validation,
            Examination(way, arguments.format, arguments.caption),
            features=features or None,
            progress=RowProgress(way, len(validation)),
        )
        right[way] = grade(validation, predictions).shares["AVG"].percent
        processes.say(f"{way:<10} {right[way]:.2f} % of {len(validation):,} problems kept back")
    answer = best_way(right)
    rotations = False
    if answer != "generate":
        predictions, _ = examine(
            model,
            validation,
            Examination(answer, arguments.format, arguments.caption, rotations=True),
            features=features or None,
            progress=RowProgress(f"{answer}, rotated", len(validation)),
        )
        rotated = grade(validation, predictions).shares["AVG"].percent
        processes.say(f"{answer}, mean over rotations: {rotated:.2f} %")
        rotations = rotated > right[answer]
    asked = dataclasses.replace(asked, answer=answer, rotations=rotations)
    adapter.config = dataclasses.replace(adapter.config, scienceqa=asked)
    if processes.main:
        save_adapter(adapter, arguments.output)
    scoring: list[object] = ["scienceqa", "--data", arguments.data, "--split", "train"]
    # With --limit, other problems are kept back than of all problems.
    scoring += ["--validation-rows" if arguments.limit is None else "--limit", arguments.validation_rows]
    if arguments.cache is not None:
        scoring += ["--cache", arguments.cache]
    shortest = min(validation, key=lambda p: (arguments.images and p.image is None, len(p.question)))
    question: list[object] = [question_text(shortest, arguments.format, caption=arguments.caption)]
    if arguments.images and isinstance(shortest.image, Path):
        question += ["--image", shortest.image]
    processes.say(adapter_steps(arguments, question=question, scoring=scoring))
