"""The costs of an adapter, and the speed of training: python -m benchmarks.throughput [--suite NAME]

Contenders do the same work in turn within one run, so that other work on the machine affects all alike. Every
time is a median over the rounds, and every ratio the median of the rounds' ratios. Only for training does
--json give ratios over all rounds together, since each round has other rows.

decoding: a token, the first token, a forward pass and transformers' generate(), with the adapter and without.
--json writes {"decode_vs_base", "forward_vs_base", "tokens_per_second"}. The first two are the time with the
adapter divided by the bare base's (1.03 is 3 % slower); the last is the adapter's.
With --quantize, or with a GGUF file as --base, it also measures a token of the quantised base without an
adapter, in turn with float32, with CTranslate2's int8 if it is installed, and with reading memory. --json
then has {"int8_vs_float32", "bandwidth_share", "tokens_per_second", "peer_tokens_per_second"} of these. The
second is the speed at which weights are read, divided by the speed of the memory. With a GGUF file it also
has {"gguf_memory_vs_file"}: the bytes of all of the decoder's weights and buffers, divided by the file's.

training: an optimiser step on the same rows, packed as train.* does it, in turn with a step padded to the
longest row. With --peers it is also compared with PEFT's AdaptionPrompt, padded to the longest row and to 512
tokens (as the paper's authors pad), and with packed steps that use gradient checkpointing. Each has a process
of its own. --json writes {"rows_per_second"} and, with --peers, {"training_vs_peft", "training_vs_pad512",
"training_vs_peft_processor", "training_vs_pad512_processor", "loss_difference", "training_memory_vs_peft",
"training_memory_mb", "checkpointed_memory_vs_peft"}: how many times more rows a second; the same by processor
time (for a machine with other work); the largest difference between two losses of a step; and the peak memory
above the frozen weights (packed, divided by that of PEFT padded to the longest row).

training --method lora --peers: the same with LoRA, packed, in turn with PEFT's own LoRA padded to the longest
row. --json then writes {"rows_per_second", "lora_vs_peft", "lora_vs_peft_processor", "lora_loss_difference",
"lora_memory_vs_peft"}. With --method ia3 they are those of IA3.

training --quantize int8: packed steps on the quantised base, in turn with packed steps on the base in floats.
--json writes {"rows_per_second", "training_vs_float32", "training_vs_float32_processor",
"frozen_memory_vs_float32"}: how many times more rows a second; the same by processor time; and the bytes of
the frozen weights, divided by those in float32.

large --quantize int4 (never part of all): a base with LLaMA-7B's shape and random weights answers. --json
writes {"large_tokens_per_second", "large_peak_gb"}. The second is the peak memory of the process.

gpu (never part of all): a training step with LLaMA-7B's shape and random weights, on rows with the lengths of
Alpaca's. --json writes {"gpu_rows_per_second", "gpu_mfu", "gpu_floor_share", "gpu_peak_gb", "gpu_hours"}.

vision: the time from a photo's file to its features, that time as a share of an answer's time, and a token
with a picture and without, by an adapter that sees. --json writes {"pictures_per_second", "picture_share",
"decode_with_picture"}.

scienceqa: problems a second in batches, for each way to answer, compared with generating one answer at a
time, by an adapter that was trained on ScienceQA. --json writes {"scienceqa_generate", "scienceqa_letter",
"scienceqa_option"}: how many times more.

serving: answers to eight clients at once, to one, and to one without the engine that serves several. --json
writes {"serving_ratio", "tokens_per_second_of_one", "tokens_per_second_of_8", "engine_vs_alone"}. The first
is how many times more tokens a second eight clients get than one; the last is the time with the engine
divided by that without.

demo: the time from `python -m demo` to the page and to its first answer, and its peak memory. --json writes
{"demo_seconds_to_page", "demo_seconds_to_answer", "demo_memory_mb"}.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.examining import scienceqa
from benchmarks.gpu import gpu
from benchmarks.large import large
from benchmarks.measuring import alternate, ratio, seconds_of, show
from benchmarks.quantized import quantized_decoding
from benchmarks.serving import serving
from benchmarks.starting import demo
from benchmarks.training import training
from benchmarks.ways_to_train import build_peft
from llama_adapter.commands.arguments import (
    Parser,
    add_json_option,
    add_model_options,
    load_model,
    positive_int,
    report,
)
from llama_adapter.common.errors import UsageError, run_command
from llama_adapter.weights.catalogue import SMALL_BASE

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from llama_adapter.model import LlamaAdapter

QUESTION_TOKENS = 64  # what is read before decoding starts
FORWARD_TOKENS = 300
PHOTO_SIZE = (640, 480)  # pixels


def main() -> None:
    parser = Parser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    suites: dict[str, Callable[[LlamaAdapter, argparse.Namespace], Mapping[str, float | None]]] = {
        "decoding": decoding,
        "training": training,
        "vision": vision,
        "scienceqa": scienceqa,
        "gpu": gpu,
        "large": large,
        "serving": serving,
        "demo": demo,
    }
    parser.add_argument("--suite", choices=(*suites, "all"), default="all", help="(all)")
    parser.add_argument("--peers", action="store_true", help="measure PEFT's own adapter as well")
    parser.add_argument(
        "--method",
        choices=("prompts", "lora", "ia3"),
        default="prompts",
        help="what the suite training trains (prompts)",
    )
    parser.add_argument(
        "--adapter",
        help="name, folder or hub id (default: an untrained one, no less work; for vision, the shipped one)",
    )
    parser.add_argument("--pairs", type=positive_int, default=30, help="rounds of decoding (30)")
    parser.add_argument("--new-tokens", type=positive_int, default=32, help="tokens of an answer (32)")
    parser.add_argument("--steps", type=positive_int, default=20, help="rounds of training (20)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="rows of a training step (8)")
    parser.add_argument("--data", help="rows to train on (default: made-up ones with Alpaca's lengths)")
    parser.add_argument("--threads", type=positive_int, help="threads of torch (default: its own choice)")
    add_model_options(parser, base=SMALL_BASE)
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.base is None and arguments.adapter is None:
        arguments.base = SMALL_BASE
    if arguments.new_tokens < 2:
        raise UsageError("new-tokens is 1; expected 2 or more, since the first is measured separately")
    untrained = argparse.Namespace(**{**vars(arguments), "adapter": arguments.adapter or "none"})

    import torch

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments if arguments.suite == "vision" else untrained)
    where = f"{model.decoder.device}, {str(model.decoder.dtype).removeprefix('torch.')}"
    print(f"base {model.base}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures: dict[str, float | None] = {}
    for name, suite in suites.items():
        if arguments.suite == name or (arguments.suite == "all" and name not in ("gpu", "large")):
            print(f"\n{name}; load average at the start {os.getloadavg()[0]:.1f}")
            if name == "vision" and arguments.adapter is None:
                model = load_model(arguments)  # the shipped one
            figures |= suite(model, arguments)
    report(figures, arguments.json)


# --- decoding -----------------------------------------------------------------------------------------------


def decoding(model: LlamaAdapter, arguments: argparse.Namespace) -> Mapping[str, float | None]:
    """The adapter's cost to someone who asks."""
    import torch

    from llama_adapter.decoding.sampling import Sampling
    from llama_adapter.decoding.streams import stream_tokens
    from llama_adapter.model import NO_ADAPTER
    from llama_adapter.quantization.linear import format_of

    device, new_tokens, pairs = model.decoder.device, arguments.new_tokens, arguments.pairs
    if model.active_adapter == NO_ADAPTER:
        torch.nn.init.constant_(model.new_adapter("untrained", seed=0).prompts.gates, 0.1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.shape.vocab_size, (1, FORWARD_TOKENS), generator=generator).to(device)
    question = tokens[:, :QUESTION_TOKENS]
    names = {"bare base": NO_ADAPTER, "adapter": model.active_adapter}

    def prepared(name: str) -> Callable[..., Any]:
        return partial(model, adapter=model.project(name))

    def answer(prepare: Callable[[], Callable[..., Any]], _: int) -> tuple[float, float]:
        """Seconds to the first token, and for each one after it."""
        sampling = Sampling(max_new_tokens=new_tokens, temperature=0)
        started = time.perf_counter()
        stream = stream_tokens(prepare(), question, sampling, ())
        next(stream)
        first = time.perf_counter()
        for _ in stream:
            pass
        return first - started, (time.perf_counter() - first) / (new_tokens - 1)

    def forward(name: str, _: int) -> float:
        with torch.inference_mode():
            return seconds_of(lambda: model(tokens, adapter=name, use_cache=False), device)

    def generate(name: str, _: int) -> float:
        exactly: dict[str, Any] = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        mask = torch.ones_like(question)
        options = {**exactly, "attention_mask": mask, "do_sample": False, "pad_token_id": 0}
        return seconds_of(lambda: model.generate(question, adapter=name, **options), device) / new_tokens

    loops = {label: partial(answer, partial(prepared, name)) for label, name in names.items()}
    if arguments.peers:
        peer = build_peft(model)
        loops["PEFT"] = partial(answer, lambda: peer)
    answers = alternate(loops, rounds=pairs)
    first = {label: [times[0] for times in answers[label]] for label in answers}
    decode = {label: [times[1] for times in answers[label]] for label in answers}
    passes = alternate({label: partial(forward, name) for label, name in names.items()}, rounds=pairs)
    show("decoding, a token", decode)
    show(f"to the first token, {QUESTION_TOKENS} read", first)
    show(f"forward pass, {FORWARD_TOKENS} tokens", passes)
    whole = alternate({label: partial(generate, name) for label, name in names.items()}, rounds=pairs)
    show("transformers' generate(), a token", whole)
    figures: dict[str, float | None] = {
        "decode_vs_base": ratio(decode["adapter"], decode["bare base"]),
        "forward_vs_base": ratio(passes["adapter"], passes["bare base"]),
        "tokens_per_second": 1 / statistics.median(decode["adapter"]),
    }
    if format_of(model.decoder) is not None:
        figures |= quantized_decoding(model, arguments)
    return figures


# --- vision -------------------------------------------------------------------------------------------------


def vision(model: LlamaAdapter, arguments: argparse.Namespace) -> dict[str, float]:
    """What a picture costs to someone who asks about it."""
    import torch

    from llama_adapter.decoding.sampling import Sampling
    from llama_adapter.decoding.streams import stream_tokens

    if not model.sees():
        print("left out: the adapter can't see pictures; name one that can with --adapter")
        return {}
    photo, device = _photo(), model.decoder.device
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(model.shape.vocab_size, (1, QUESTION_TOKENS), generator=generator).to(device)
    sampling = Sampling(max_new_tokens=arguments.new_tokens, temperature=0)

    def encode(_: int) -> float:
        return seconds_of(lambda: model.encode_images(photo), device)

    def answer(features: Tensor | None, _: int) -> tuple[float, float]:
        """Seconds of the whole answer, and of each token after the first."""
        started = time.perf_counter()
        owners = None if features is None else torch.zeros(1, dtype=torch.long)
        projected = model.project(image_features=features, image_owners=owners)
        stream = stream_tokens(partial(model, adapter=projected), question, sampling, ())
        next(stream)
        first = time.perf_counter()
        for _ in stream:
            pass
        end = time.perf_counter()
        return end - started, (end - first) / (arguments.new_tokens - 1)

    features = model.encode_images(photo)
    contenders: dict[str, Callable[[int], Any]] = {
        "without a picture": partial(answer, None),
        "with a picture": partial(answer, features),
        "encoding": encode,
    }
    times = alternate(contenders, rounds=arguments.pairs)
    tokens = {name: [t[1] for t in times[name]] for name in list(contenders)[:2]}
    show("decoding, a token", tokens)
    show(f"a photo of {PHOTO_SIZE[0]}x{PHOTO_SIZE[1]}, file to features", {"encoding": times["encoding"]})
    whole = [seconds for seconds, _ in times["with a picture"]]
    shares = [e / (e + w) for e, w in zip(times["encoding"], whole, strict=True)]
    print(f"\nits share of an answer of {arguments.new_tokens} tokens: {statistics.median(shares):.1%}")
    return {
        "pictures_per_second": 1 / statistics.median(times["encoding"]),
        "picture_share": statistics.median(shares),
        "decode_with_picture": ratio(tokens["with a picture"], tokens["without a picture"]),
    }


def _photo() -> bytes:
    """A JPEG with something in it everywhere."""
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise(PHOTO_SIZE, 60).convert("RGB").save(file, "JPEG")
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(main))
