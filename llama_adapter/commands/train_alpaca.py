"""Teach a frozen decoder to follow instructions: python -m train.alpaca --data FILE --output DIR"""

from __future__ import annotations

from collections.abc import Sequence

from llama_adapter.commands.arguments import Parser, add_model_options, positive_int, quieten_libraries
from llama_adapter.commands.next_steps import adapter_steps, question_of
from llama_adapter.commands.training_options import (
    adapter_plan,
    add_output_option,
    add_training_options,
    rows_kept_back,
    training_settings,
)


def main(words: Sequence[str] | None = None, *, program: str = "python -m train.alpaca") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data", required=True, help="Alpaca JSON, JSONL, chat messages, ShareGPT, or a hub data set"
    )
    add_output_option(parser)
    parser.add_argument("--split", default="train", help="split to read, if rows name one (train)")
    parser.add_argument("--limit", type=positive_int, help="use only the first N rows")
    parser.add_argument("--validation-rows", type=positive_int, default=500, help="rows kept back (500)")
    parser.add_argument("--max-length", type=positive_int, default=512, help="longest row, in tokens (512)")
    add_model_options(parser)
    add_training_options(parser)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.common.processes import running_processes
    from llama_adapter.training.recipes import read_source, train, validation_loss

    settings = training_settings(arguments)
    source = read_source(
        arguments.data,
        validation_rows=arguments.validation_rows,
        split=arguments.split,
        limit=arguments.limit,
        text_only=True,
    )
    quieten_libraries()
    model = train(
        source,
        output=arguments.output,
        plan=adapter_plan(arguments),
        settings=settings,
        split=arguments.split,
        max_length=arguments.max_length,
        resume=arguments.resume,
    )
    say = running_processes().say
    say(f"{arguments.output}: best validation loss {validation_loss(model):.4f} nats a token")
    scoring: list[object] = ["alpaca", "--data", arguments.data]
    scoring += rows_kept_back(arguments)
    say(adapter_steps(arguments, question=question_of(source.validation), scoring=scoring))
