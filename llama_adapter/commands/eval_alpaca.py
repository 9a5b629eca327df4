"""Score an adapter on instructions: python -m eval.alpaca --adapter DIR --data FILE

Prints the mean cross-entropy in nats over all response tokens (end tokens included), for the adapter and for
the bare base, on the same rows in the same text format. Also prints sample answers of both, side by side.
With --quantize it also prints the loss of the base in float32, and what quantization costs
("quantized_loss_difference", for the bare base).
"""

from __future__ import annotations

import argparse
import random
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_adapter.commands.arguments import (
    Parser,
    add_adapter_option,
    add_json_option,
    add_model_options,
    load_model,
    positive_int,
    report,
    seed_number,
)
from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:  # slow to import
    from llama_adapter.model import LlamaAdapter


def main(words: Sequence[str] | None = None, *, program: str = "python -m eval.alpaca") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument("--data", required=True, help="anything that train.alpaca reads")
    parser.add_argument(
        "--validation-rows",
        type=positive_int,
        help="only the rows that train.alpaca keeps back with the same number",
    )
    parser.add_argument(
        "--split", help="split to read, if rows name one (with --validation-rows train, else test)"
    )
    parser.add_argument("--limit", type=positive_int, help="use at most N rows, chosen with --seed (all)")
    parser.add_argument("--max-length", type=positive_int, default=512, help="longest row, in tokens (512)")
    parser.add_argument("--samples", type=int, default=10, help="answers shown side by side (10)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=96, help="tokens of an answer (96)")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed for choosing rows (0)")
    add_adapter_option(parser)
    add_model_options(parser)
    add_json_option(parser)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.common.progress import RowProgress
    from llama_adapter.data.choosing import expect_text, split_records
    from llama_adapter.data.examples import encode_and_count
    from llama_adapter.data.records import read_records
    from llama_adapter.decoding.sampling import Sampling
    from llama_adapter.model import NO_ADAPTER
    from llama_adapter.packing.losses import mean_answer_loss

    sampling = Sampling(max_new_tokens=arguments.max_new_tokens, temperature=0)
    split = arguments.split or ("train" if arguments.validation_rows else "test")
    records, summary = read_records(arguments.data, split=split)
    print(summary, file=sys.stderr)
    expect_text(records, arguments.data)
    if arguments.validation_rows is not None:
        _, records = split_records(records, validation_rows=arguments.validation_rows)
    draw = random.Random(arguments.seed)
    if arguments.limit is not None:
        records = draw.sample(records, min(arguments.limit, len(records)))
    model = load_model(arguments)
    adapter = model.answering_adapter()
    if adapter == NO_ADAPTER and arguments.quantize is None:
        raise UsageError("there is no adapter to score; name one with --adapter")
    scored = {"base": NO_ADAPTER} if adapter == NO_ADAPTER else {"base": NO_ADAPTER, "adapter": adapter}
    assert model.tokenizer is not None
    template = model.template()
    examples, encoded = encode_and_count(
        records,
        template=template,
        tokenizer=model.tokenizer,
        max_length=arguments.max_length,
        date=model.template_date(),
    )
    print(f"to score: {encoded}", file=sys.stderr)
    if encoded.warning is not None:
        print(encoded.warning, file=sys.stderr)

    def score(model: LlamaAdapter, name: str, label: str) -> tuple[float, int]:
        progress = RowProgress(label, len(examples))
        device = model.decoder.device
        return mean_answer_loss(model, examples, device=device, progress=progress, adapter=name)

    figures: dict[str, float] = {}
    for label, name in scored.items():
        figures[f"{label}_loss"], tokens = score(model, name, label)
    for record in draw.sample(records, min(arguments.samples, len(records))):
        *before, answer = record.turns
        print("-" * 110)
        _show("question", f"{before[-1].text}\n{before[-1].input}".strip())
        _show("bare base", model.chat(before, adapter=NO_ADAPTER, sampling=sampling))
        if "adapter" in scored:
            _show("adapter", model.chat(before, adapter=adapter, sampling=sampling))
        _show("in the data", answer.text)
    print("-" * 110)
    print(f"{len(examples):,} rows, {tokens:,} response tokens, template {template}")
    losses = ", ".join(f"{label} {figures[f'{label}_loss']:.4f}" for label in scored)
    print(f"nats a response token: {losses}")
    if arguments.quantize is not None:
        del model  # frees its memory before the other is loaded
        full = load_model(argparse.Namespace(**{**vars(arguments), "quantize": None, "dtype": "float32"}))
        for label, name in scored.items():
            figures[f"{label}_loss_float32"], _ = score(full, name, f"{label} in float32")
        lost = {label: figures[f"{label}_loss"] - figures[f"{label}_loss_float32"] for label in scored}
        figures["quantized_loss_difference"] = lost["base"]
        differences = ", ".join(f"{label} {loss:+.4f}" for label, loss in lost.items())
        print(f"{arguments.quantize} to float32, nats a response token: {differences}")
    report({**figures, "rows": len(examples), "tokens": tokens}, arguments.json)


def _show(label: str, text: str) -> None:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 94) or [""]]
    print("\n".join(f"{label if number == 0 else '':>13}  {line}" for number, line in enumerate(lines)))
