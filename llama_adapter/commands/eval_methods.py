"""Compare methods on your own rows: python -m eval.methods --data FILE --methods A,B+C --output DIR

Each method is trained on the same rows in the same order, at --rates learning rates around its usual one. The
rate with the lowest loss on the rows kept back is then trained with --seeds seeds in total. Each run has a
process of its own. The results go to the output folder: results.json, a table (README.md) and plots. An
interrupted comparison is continued by the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_adapter.commands.arguments import Parser, add_model_options, positive_int, quieten_libraries
from llama_adapter.commands.field_options import add_fields
from llama_adapter.commands.training_options import add_settings, training_settings
from llama_adapter.common.errors import UsageError
from llama_adapter.weights.catalogue import SMALL_BASE


def main(words: Sequence[str] | None = None, *, program: str = "python -m eval.methods") -> None:
    from llama_adapter.training.plan import AdapterPlan

    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        help="rows that train.alpaca or train.vqa reads, or the official folder of ScienceQA; can be "
        "given several times",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the comparison")
    parser.add_argument(
        "--methods",
        required=True,
        metavar="A,B+C",
        help="methods with commas between them, such as prompts+lora",
    )
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds at the best rate (3)")
    parser.add_argument(
        "--rates",
        dest="rate_count",
        type=positive_int,
        default=3,
        help="learning rates to try, each sqrt(10) times the one before, around the method's usual one (3)",
    )
    parser.add_argument(
        "--rows", type=positive_int, default=2000, help="rows to train on, of each source (2000)"
    )
    parser.add_argument(
        "--validation-rows",
        type=positive_int,
        help="rows kept back, of each source (a fifth of --rows, but 16 to 200)",
    )
    parser.add_argument(
        "--parameters",
        type=positive_int,
        metavar="N",
        help="give methods that have a size about N parameters in the layers (default: their usual sizes)",
    )
    parser.add_argument("--max-length", type=positive_int, default=512, help="longest row, in tokens (512)")
    add_model_options(parser, base=SMALL_BASE)
    add_fields(parser, AdapterPlan, ("template", "tower", "cache"))
    training = parser.add_argument_group("training")
    add_settings(training, leave_out=("base_learning_rate", "learning_rate", "rates", "seed"))
    # Fewer than in the training scripts: a comparison has many runs.
    parser.set_defaults(epochs=1, warmup_epochs=0.1, batch_size=16, max_grad_norm=1.0)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.comparison.running import Setting, is_scienceqa
    from llama_adapter.comparison.sweep import Comparison

    methods = [method.strip() for method in arguments.methods.split(",") if method.strip()]
    if len(set(methods)) != len(methods) or not methods:
        raise UsageError(f"--methods {arguments.methods}: expected different ones, such as prompts,lora")
    template = arguments.template or ("scienceqa" if all(map(is_scienceqa, arguments.data)) else "alpaca")
    quieten_libraries()
    setting = Setting(
        data=tuple(arguments.data),
        rows=arguments.rows,
        validation_rows=arguments.validation_rows or min(200, max(16, arguments.rows // 5)),
        max_length=arguments.max_length,
        plan=AdapterPlan(
            base=arguments.base or SMALL_BASE,
            template=template,
            tower=arguments.tower,
            cache=arguments.cache,
            weights=arguments.weights,
            device=arguments.device,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
        ),
        training=training_settings(arguments),
        answers=arguments.output / "base-answers.json",
    )
    comparison = Comparison(
        setting,
        methods,
        seeds=arguments.seeds,
        rates=arguments.rate_count,
        parameters=arguments.parameters,
        output=arguments.output,
    )
    comparison.run()
    print((arguments.output / "README.md").read_text(encoding="utf-8"), end="")
    print(f"\n{arguments.output}: results.json, README.md, loss-vs-cost and curves as .png and .svg")
