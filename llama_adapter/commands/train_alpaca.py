"""Teach a frozen decoder to follow instructions: python -m train.alpaca --data FILE --output DIR"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llama_adapter.commands.arguments import Parser, add_model_options, positive_int
from llama_adapter.commands.next_steps import adapter_steps, question_of
from llama_adapter.commands.training_options import (
    add_training_options,
    encode_rows,
    load_model_to_train,
    training_settings,
)


def main(words: Sequence[str] | None = None, *, program: str = "python -m train.alpaca") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data", required=True, help="Alpaca JSON, JSONL, chat messages, ShareGPT, or a hub data set"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder of the run and of the best adapter"
    )
    parser.add_argument("--split", default="train", help="of rows that name one (train); others count")
    parser.add_argument("--limit", type=positive_int, help="use the first so many rows only")
    parser.add_argument("--validation-rows", type=positive_int, default=500, help="rows kept back (500)")
    parser.add_argument("--max-length", type=positive_int, default=512, help="tokens a row, cut there (512)")
    add_model_options(parser)
    add_training_options(parser)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to say that an option is wrong.
    from llama_adapter.common.processes import running_processes
    from llama_adapter.data.records import expect_text, read_records, split_records
    from llama_adapter.training.trainer import Trainer

    settings = training_settings(arguments)
    processes = running_processes()
    records, summary = read_records(arguments.data, split=arguments.split)
    processes.say(summary, file=sys.stderr)
    expect_text(records, arguments.data)
    train, validation = split_records(records[: arguments.limit], validation_rows=arguments.validation_rows)
    model, _ = load_model_to_train(arguments)
    train_examples, trained_on = encode_rows(train, model, "to train on", max_length=arguments.max_length)
    validation_examples, kept_back = encode_rows(
        validation, model, "kept back", max_length=arguments.max_length
    )
    data = {
        "source": Path(arguments.data).name,
        "fingerprint": summary.fingerprint,
        "split": arguments.split,
        "read": summary.facts(),
        "train": trained_on.facts(),
        "validation": kept_back.facts(),
        "max_length": arguments.max_length,
        "start_from": arguments.start_from,
    }
    kept = {data["source"]: validation_examples}
    trainer = Trainer(model, "trained", train_examples, kept, settings, arguments.output, data)
    best = trainer.run(resume=arguments.resume)
    processes.say(f"{arguments.output}: best validation loss {best:.4f} nats a token")
    scoring: list[object] = ["alpaca", "--data", arguments.data]
    # Of all rows others are kept back than of the first few.
    rows = "--validation-rows" if arguments.limit is None else "--limit"
    scoring += [rows, arguments.validation_rows, "--split", arguments.split]
    processes.say(adapter_steps(arguments, question=question_of(validation), scoring=scoring))
