"""The cost of training, computed from formulas: python -m benchmarks.scaling --shape llama-70b --gpus 8

It prints memory by part, the traffic between GPUs in a step, and hours, by the formulas of docs/scaling.md.
Tests compare the formulas with what small decoders really compute and hold in memory.

With --data it counts batches of rows: their tokens packed and padded, and how many times more PEFT's
AdaptionPrompt and LoRA have to multiply on a base of this shape. LoRA's own small products are left out.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass

from llama_adapter.commands.arguments import Parser, add_json_option, positive_int, report
from llama_adapter.common.errors import UsageError, run_command
from llama_adapter.weights.catalogue import SMALL_BASE

EPOCHS, ROWS = 5, 52_002  # the paper's training
BATCH = 64
# The tokens and labelled tokens of such a batch of Alpaca, packed, by --data alpaca_data.json --batch-size
# 64.
TOKENS, LABELLED = 5405, 3734
COUNTED_ROWS, ROW_TOKENS = 4000, 512


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of Llama's kind."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_value_heads: int
    head: int
    vocabulary: int
    tied: bool = False

    @property
    def layer_parameters(self) -> int:
        """The parameters of one layer's seven matrices."""
        attention = 2 * self.heads * self.head + 2 * self.key_value_heads * self.head
        return self.hidden * (attention + 3 * self.feed_forward)

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        norms = self.hidden * (2 * self.layers + 1)
        return self.layers * self.layer_parameters + (2 - self.tied) * self.head_parameters + norms

    def saved_by_a_layer(self, *, width: int, attention_width: int) -> int:
        """Bytes for each token that the backward pass needs of an adapted layer, in numbers of ``width``
        bytes.

        These are: the inputs of the two norms, in float32; the MLP's gate before and after its nonlinearity,
        and the other factor; the queries, keys, values, output and normaliser of attention. Those of
        attention (keys and values repeated for each head) are numbers of ``attention_width`` bytes: 4 on a
        CPU.
        """
        norms = 2 * 4 * self.hidden + 2 * 4
        feed_forward = 3 * width * self.feed_forward
        attention = 4 * attention_width * self.heads * self.head + 2 * 4 * self.heads
        prompts_read = attention_width * self.heads * self.head
        return norms + feed_forward + attention + prompts_read


SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "llama-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-70b": Shape(80, 8192, 28672, 64, 8, 128, 32000),
}


@dataclass(frozen=True)
class Machine:
    """Assumptions about each GPU.

    Attributes:
        flops: FLOP/s that matrix products reach in training.
        gather: bytes/s that each GPU receives while a layer is gathered.
    """

    flops: float = 0.5 * 989e12
    gather: float = 300e9


@dataclass(frozen=True)
class Plan:
    """Training a shape on some GPUs in bfloat16, with the base sharded over all of them or whole in each."""

    shape: Shape
    gpus: int
    batch: int
    prompts: int = 10
    sharded: bool = True
    checkpointed: bool = False
    machine: Machine = Machine()

    @property
    def adapted(self) -> int:
        return self.shape.layers - self.shape.layers // 16

    @property
    def trained(self) -> int:
        """The number of the adapter's parameters."""
        return self.adapted * (self.prompts * self.shape.hidden + self.shape.heads)

    @property
    def tokens(self) -> float:
        """The packed tokens of a batch on one GPU."""
        return TOKENS * self.batch / BATCH / self.gpus

    @property
    def labelled(self) -> float:
        return LABELLED * self.batch / BATCH / self.gpus

    def memory(self) -> dict[str, float]:
        """Bytes on each GPU by part."""
        shape = self.shape
        saved = shape.saved_by_a_layer(width=2, attention_width=2)
        if self.checkpointed:
            activations = self.tokens * (2 * shape.hidden * self.adapted + saved)
        else:
            activations = self.tokens * saved * self.adapted
        parts = {"base": 2 * shape.parameters / (self.gpus if self.sharded else 1)}
        if self.sharded:  # the current layer, the next one, and the head
            parts["gathered layers"] = 2 * (2 * shape.layer_parameters + shape.head_parameters)
        parts["adapter, its gradient and AdamW"] = 16.0 * self.trained
        parts["activations"] = activations
        # Two bytes in the decoder's output, four in the loss, where the gradient overwrites them.
        parts["logits and their gradient"] = 6 * self.labelled * shape.vocabulary
        return parts

    def traffic(self) -> dict[str, float]:
        """The bytes that each GPU receives in a step, by purpose."""
        others = (self.gpus - 1) / self.gpus
        weights = 2 * (self.shape.layers * self.shape.layer_parameters + self.shape.head_parameters) * others
        backward = 2 * (self.adapted * self.shape.layer_parameters + self.shape.head_parameters) * others
        parts = {"weights, forward": weights, "weights, backward": backward} if self.sharded else {}
        return {**parts, "gradient of the adapter": 2 * 4 * self.trained * others}

    @property
    def flop(self) -> float:
        """FLOP of a step on one GPU: forward (twice with checkpointing), backward for activations only."""
        shape = self.shape
        passes = shape.layers + self.adapted * (2 if self.checkpointed else 1)
        return 2 * self.tokens * shape.layer_parameters * passes + 4 * self.labelled * shape.head_parameters

    def seconds(self) -> tuple[float, float]:
        """The time for a step's computing, and for its traffic, as if each were alone."""
        return self.flop / self.machine.flops, sum(self.traffic().values()) / self.machine.gather

    def hours(self) -> tuple[float, float]:
        """Hours of the paper's training: with all traffic hidden behind computing, and with none."""
        steps = EPOCHS * -(-ROWS // self.batch)
        computing, traffic = self.seconds()
        return steps * max(computing, traffic) / 3600, steps * (computing + traffic) / 3600


def count_batches(data: str, base: str, size: int, shape: Shape) -> dict[str, float]:
    """Means over batches of a file: tokens, and PEFT's products divided by those of a packed batch."""
    from llama_adapter.data.examples import encode_records
    from llama_adapter.data.records import read_records
    from llama_adapter.methods.decoder import load_tokenizer
    from llama_adapter.packing.pack import pack
    from llama_adapter.weights import locations

    records, _ = read_records(data)
    records = random.Random(1).sample(records, min(COUNTED_ROWS, len(records)))
    tokenizer = load_tokenizer(locations.resolve(base, kind="base"))
    rows = encode_records(records, template="alpaca", tokenizer=tokenizer, max_length=ROW_TOKENS)
    batches = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    if not batches:
        raise UsageError(f"{data}: {len(rows)} rows are fewer than a batch of {size}; lower --batch-size")
    packs = [pack(batch) for batch in batches]
    count = len(batches)
    tokens = sum(packed.input_ids.numel() for packed in packs) / count
    labelled = sum(packed.targets.numel() for packed in packs) / count
    padded = sum(size * max(len(row.input_ids) for row in batch) for batch in batches) / count
    layers = shape.layers * shape.layer_parameters
    # PEFT computes the logits of every token and, with prompts, the queries of each adapted layer twice.
    adapted = shape.layers - shape.layers // 16
    lora = layers + shape.head_parameters
    peft = lora + adapted * shape.hidden * shape.heads * shape.head
    packed_products = tokens * layers + labelled * shape.head_parameters
    return {
        "packed": tokens,
        "labelled": labelled,
        "padded": padded,
        "products_vs_peft": padded * peft / packed_products,
        "products_vs_peft_lora": padded * lora / packed_products,
        "products_vs_pad512": size * ROW_TOKENS * peft / packed_products,
    }


def main() -> None:
    parser = Parser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--shape", choices=SHAPES, default="llama-70b", help="(llama-70b)")
    parser.add_argument("--gpus", type=positive_int, default=8, help="(8)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="rows in a step on all GPUs (64)")
    parser.add_argument("--whole", action="store_true", help="keep the whole base in each GPU, not sharded")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--data", help="count batches of these rows instead")
    parser.add_argument("--base", default=SMALL_BASE, help=f"its tokenizer counts tokens ({SMALL_BASE})")
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.data is not None:
        shape = SHAPES[arguments.shape]
        counts = count_batches(arguments.data, arguments.base, arguments.batch_size, shape)
        for name, value in counts.items():
            print(f"{name:<20} {value:10,.2f}")
        report(counts, arguments.json)
        return
    plan = Plan(
        SHAPES[arguments.shape],
        arguments.gpus,
        arguments.batch_size,
        sharded=not arguments.whole,
        checkpointed=arguments.gradient_checkpointing,
    )
    how = "whole in each" if arguments.whole else "sharded over all"
    print(
        f"{arguments.shape}: {plan.shape.parameters / 1e9:.2f}e9 parameters, {how} of {plan.gpus} GPUs; "
        f"{plan.trained / 1e6:.2f}e6 trained; {plan.batch} rows a step, {plan.tokens:,.0f} tokens a GPU"
    )
    memory, traffic = plan.memory(), plan.traffic()
    for title, parts in (("memory of a GPU", memory), ("into a GPU, a step", traffic)):
        print(f"{title:<44} {sum(parts.values()) / 1e9:9.2f} GB")
        for name, value in parts.items():
            print(f"    {name:<40} {value / 1e9:9.2f}")
    computing, moving = plan.seconds()
    best, worst = plan.hours()
    print(
        f"a step: computing {computing:.3f} s at {plan.machine.flops / 1e12:.0f} TFLOP/s, "
        f"traffic {moving:.3f} s at {plan.machine.gather / 1e9:.0f} GB/s"
    )
    print(f"{EPOCHS} epochs of {ROWS:,} rows: {best:.2f} to {worst:.2f} hours")
    figures = {"memory_gb": sum(memory.values()) / 1e9, "traffic_gb": sum(traffic.values()) / 1e9}
    report({**figures, "hours_least": best, "hours_most": worst}, arguments.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
