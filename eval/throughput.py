"""What the adapter costs and how fast it trains: python -m eval.throughput [--suite NAME]

Contenders do the same work in turn, within one run, so that whatever else the machine does hits them alike.
Every time is a median over the rounds, every ratio the median of the rounds' ratios.

decoding: a token, the first token, a forward pass and transformers' generate(), with the adapter and without.
--json writes {"decode_vs_base", "forward_vs_base", "tokens_per_second"}: the first two are the time with the
adapter divided by the bare base's (1.03 is 3 % slower), the last is the adapter's.

training: an optimiser step on the same rows, packed as train.* does it and padded to the longest row; with
--peers also PEFT's AdaptionPrompt padded to the longest row and to 512 tokens, as the paper's authors pad.
--json writes {"rows_per_second"} and with --peers also {"training_vs_peft", "training_vs_pad512",
"training_vs_peft_processor", "training_vs_pad512_processor", "loss_difference", "training_memory_vs_peft",
"training_memory_mb", "checkpointed_memory_vs_peft"}: how many times more rows a second, the same by processor
time (for a machine that has other work), how far any two losses of a step lay apart, and the peak memory
above the frozen weights (packed, divided by PEFT's padded to the longest).

gpu (never part of all): a training step of LLaMA-7B's shape with random weights, on rows of Alpaca's lengths.
--json writes {"gpu_rows_per_second", "gpu_mfu", "gpu_floor_share", "gpu_peak_gb", "gpu_hours"}.

vision: from a photo's file to its features, that time as a share of an answer's, and a token with a picture
and without, by an adapter that sees. --json writes {"pictures_per_second", "picture_share",
"decode_with_picture"}.

scienceqa: problems a second in batches, by each way to answer, against one at a time by generation, by an
adapter that was trained on it. --json writes {"scienceqa_generate", "scienceqa_letter", "scienceqa_option"}:
how many times more.

serving: answers of eight clients at once, of one, and of one without the engine that lets several ask.
--json writes {"serving_ratio", "tokens_per_second_of_one", "tokens_per_second_of_8", "engine_vs_alone"}: the
first is how many times more tokens a second eight get than one, the last the engine's time to that without.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eval.examining import adapter_format, contenders, made_up_problems
from eval.gpu import gpu
from eval.training_memory import training_memory
from llama_adapter.arguments import (
    Parser,
    add_json_option,
    add_model_options,
    load_model,
    positive_int,
    report,
)
from llama_adapter.errors import UsageError, run_command

if TYPE_CHECKING:  # slow to import
    import torch
    from torch import Tensor

    from llama_adapter.data import Example, Record
    from llama_adapter.model import LlamaAdapter
    from llama_adapter.training import TrainingSettings

QUESTION_TOKENS = 64  # what is read before decoding starts
FORWARD_TOKENS = 300
PHOTO_SIZE = (640, 480)  # pixels
SCIENCEQA_ROUNDS = 3  # a round takes half a minute
ROW_TOKENS = 512  # the published length, to which the authors pad
PEFT, PEFT_512 = "PEFT, padded", f"PEFT, padded to {ROW_TOKENS}"

# Words of instruction, input and output of 32 rows of Alpaca, evenly spaced by length.
ALPACA_LENGTHS = (
    *((5, 0, 6), (11, 0, 3), (13, 1, 2), (7, 10, 1), (17, 0, 2), (8, 2, 10), (9, 0, 13), (10, 0, 13)),
    *((11, 0, 14), (8, 0, 19), (17, 6, 6), (9, 0, 22), (12, 10, 12), (4, 2, 31), (9, 0, 31), (13, 0, 31)),
    *((11, 16, 22), (5, 0, 48), (9, 0, 49), (8, 1, 54), (8, 0, 59), (9, 0, 62), (7, 1, 68), (14, 0, 66)),
    *(
        (11, 0, 74),
        (8, 0, 83),
        (7, 56, 34),
        (8, 0, 96),
        (10, 0, 103),
        (6, 0, 118),
        (12, 0, 135),
        (14, 2, 215),
    ),
)
WORDS = (
    *("a", "the", "of", "to", "in", "and", "is", "for", "that", "with", "list", "water", "energy.", "data;"),
    *("create", "between", "describe", "sentence", "different", "number", "people", "environment", "because"),
    *("technology", "however", "generate", "important", "company", "health,", "students:", "development"),
    *("provide", "example,", "customers", "understanding", "it.", "communication", "25", "sustainable"),
)


def main() -> None:
    parser = Parser(
        prog="python -m eval.throughput", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    from eval.serving import serving  # which needs this module

    suites: dict[str, Callable[[LlamaAdapter, argparse.Namespace], dict[str, float]]] = {
        "decoding": decoding,
        "training": training,
        "vision": vision,
        "scienceqa": scienceqa,
        "gpu": gpu,
        "serving": serving,
    }
    parser.add_argument("--suite", choices=(*suites, "all"), default="all", help="(all)")
    parser.add_argument("--peers", action="store_true", help="measure PEFT's AdaptionPrompt as well")
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
    add_model_options(parser)
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.new_tokens < 2:
        raise UsageError("new-tokens is 1; expected 2 or more, since the first is measured apart")
    untrained = argparse.Namespace(**{**vars(arguments), "adapter": arguments.adapter or "none"})

    import torch

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments if arguments.suite == "vision" else untrained)
    where = f"{model.decoder.device}, {str(model.decoder.dtype).removeprefix('torch.')}"
    print(f"base {model.base}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures: dict[str, float] = {}
    for name, suite in suites.items():
        if arguments.suite == name or (arguments.suite == "all" and name != "gpu"):
            print(f"\n{name}; load average at the start {os.getloadavg()[0]:.1f}")
            if name == "vision" and arguments.adapter is None:
                model = load_model(arguments)  # the shipped one
            figures |= suite(model, arguments)
    report(figures, arguments.json)


# --- measuring ----------------------------------------------------------------------------------------------


def alternate(contenders: Mapping[str, Callable[[int], Any]], *, rounds: int) -> dict[str, list[Any]]:
    """What each contender returns, round by round; each is called with the round's number.

    Who comes first changes from round to round. Round 0 warms up and is left out.
    """
    names = list(contenders)
    results: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = contenders[name](number)
            if number > 0:
                results[name].append(result)
    return results


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long ``work`` takes, what it leaves running on the device included."""
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(_ratios(times, to))


def _ratios(times: Sequence[float], to: Sequence[float]) -> list[float]:
    return [time / other for time, other in zip(times, to, strict=True)]


def show(what: str, times: Mapping[str, Sequence[float]]) -> None:
    """Print a table of times in seconds; the first contender is what the others are compared to."""
    first, *_ = times
    print(f"\n{what:<34} {'median ms':>10}  {'to ' + first:>16}  {'middle half of the rounds':>26}")
    for name, values in times.items():
        line = f"  {name:<32} {1000 * statistics.median(values):>10.2f}"
        if name != first:
            ratios = _ratios(values, times[first])
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            line += f"  {middle:>16.3f}  {f'{low:.3f} to {high:.3f}':>26}"
        print(line)


# --- decoding -----------------------------------------------------------------------------------------------


def decoding(model: LlamaAdapter, arguments: argparse.Namespace) -> dict[str, float]:
    """The adapter's cost to someone who asks."""
    import torch

    from llama_adapter.generate import stream_tokens
    from llama_adapter.model import NO_ADAPTER
    from llama_adapter.sampling import Sampling

    device, new_tokens, pairs = model.decoder.device, arguments.new_tokens, arguments.pairs
    if model.active_adapter == NO_ADAPTER:
        torch.nn.init.constant_(model.new_adapter("untrained", seed=0).gates, 0.1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.shape.vocab_size, (1, FORWARD_TOKENS), generator=generator).to(device)
    question = tokens[:, :QUESTION_TOKENS]
    names = {"bare base": NO_ADAPTER, "adapter": model.active_adapter}

    def prepared(name: str) -> Callable[..., Any]:
        return partial(model, adapter=name, **model.project(name))

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
    return {
        "decode_vs_base": ratio(decode["adapter"], decode["bare base"]),
        "forward_vs_base": ratio(passes["adapter"], passes["bare base"]),
        "tokens_per_second": 1 / statistics.median(decode["adapter"]),
    }


# --- vision -------------------------------------------------------------------------------------------------


def vision(model: LlamaAdapter, arguments: argparse.Namespace) -> dict[str, float]:
    """What a picture costs to someone who asks about it."""
    import torch

    from llama_adapter.generate import stream_tokens
    from llama_adapter.sampling import Sampling

    if not model.sees():
        print("left out: the adapter knows nothing of pictures; name one that does with --adapter")
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
        stream = stream_tokens(partial(model, **projected), question, sampling, ())
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


# --- scienceqa ----------------------------------------------------------------------------------------------


def scienceqa(model: LlamaAdapter, _: argparse.Namespace) -> dict[str, float]:
    """How fast ScienceQA's problems are answered."""
    learnt = adapter_format(model)
    if learnt is None:
        print("left out: the adapter was not trained on ScienceQA; name one that was with --adapter")
        return {}
    problems = made_up_problems(WORDS)
    times = alternate(contenders(model, problems, learnt=learnt), rounds=SCIENCEQA_ROUNDS)
    show(f"a problem, of {len(problems):,}", times)
    one = times.pop("generate, one at a time")
    return {f"scienceqa_{way}": ratio(one, seconds) for way, seconds in times.items()}


# --- training -----------------------------------------------------------------------------------------------


def training(model: LlamaAdapter, arguments: argparse.Namespace) -> dict[str, float]:
    """Optimiser steps on the same rows by different means; each means trains an adapter of its own."""
    from llama_adapter.training import TrainingSettings

    device, size = model.decoder.device, arguments.batch_size
    settings = TrainingSettings(batch_size=size)
    examples = rows_to_train_on(model, arguments, count=size * (arguments.steps + 1))
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    losses: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}  # seconds, which other processes' work leaves as they are

    def learner(label: str, way: WayToTrain) -> Callable[[int], float]:
        optimizer = way.optimizer(settings)
        losses[label], processor[label] = [], []

        def step(number: int) -> float:
            started = time.process_time()

            def work() -> None:
                losses[label].append(way.gradient(batches[number]))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            seconds = seconds_of(work, device)
            processor[label].append(time.process_time() - started)
            return seconds

        return step

    ways = ways_to_train(model, peers=arguments.peers)
    times = alternate({label: learner(label, way) for label, way in ways.items()}, rounds=arguments.steps)
    show(f"a training step of {size} rows", times)
    rows = size * arguments.steps
    print()
    for label, values in times.items():
        apart = max(abs(a - b) for a, b in zip(losses[label], losses["packed"], strict=True))
        seconds = statistics.median(processor[label][1:])
        print(
            f"  {label:<24} {rows / sum(values):7.3f} rows/s {seconds:8.2f} processor seconds a step   "
            f"losses within {apart:.1e} of packed ones"
        )
    figures = {"rows_per_second": rows / sum(times["packed"])}
    if arguments.peers:
        figures["training_vs_peft"] = ratio(times[PEFT], times["packed"])
        figures["training_vs_pad512"] = ratio(times[PEFT_512], times["packed"])
        figures["training_vs_peft_processor"] = ratio(processor[PEFT][1:], processor["packed"][1:])
        figures["training_vs_pad512_processor"] = ratio(processor[PEFT_512][1:], processor["packed"][1:])
        figures["loss_difference"] = max(
            abs(value - losses["packed"][number])
            for label in ways
            for number, value in enumerate(losses[label])
        )
        figures |= training_memory(arguments, device)
    return figures


@dataclass(frozen=True)
class WayToTrain:
    """What is trained, and how its gradient comes about: the function adds it and returns the loss."""

    parameters: Sequence[torch.nn.Parameter]
    gradient: Callable[[Sequence[Example]], float]

    def optimizer(self, settings: TrainingSettings) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            self.parameters,
            lr=settings.peak_learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )


def ways_to_train(model: LlamaAdapter, *, peers: bool) -> dict[str, WayToTrain]:
    """Untrained adapters that start alike, each with its own way to a gradient."""
    from llama_adapter.packing import accumulate_gradient
    from llama_adapter.training import TrainingSettings

    device = model.decoder.device

    def packed(batch: Sequence[Example]) -> float:
        return accumulate_gradient(
            model, batch, device=device, max_tokens=TrainingSettings().max_tokens, adapter="packed"
        )

    def padded(
        forward: Callable[..., Any], length: int | None = None
    ) -> Callable[[Sequence[Example]], float]:
        def gradient(batch: Sequence[Example]) -> float:
            loss: Tensor = forward(**pad(batch, length, device), use_cache=False).loss
            loss.backward()
            return float(loss.detach())

        return gradient

    untrained = {name: list(model.new_adapter(name, seed=0).parameters()) for name in ("packed", "padded")}
    ways = {
        "packed": WayToTrain(untrained["packed"], packed),
        "padded": WayToTrain(untrained["padded"], padded(partial(model, adapter="padded"))),
    }
    if peers:
        for label, length in ((PEFT, None), (PEFT_512, ROW_TOKENS)):
            peer = build_peft(model, like="packed")
            trainable = [parameter for parameter in peer.parameters() if parameter.requires_grad]
            ways[label] = WayToTrain(trainable, padded(peer, length))
    return ways


def rows_to_train_on(model: LlamaAdapter, arguments: argparse.Namespace, *, count: int) -> list[Example]:
    """Rows of --data, drawn at random but the same in every run, or made-up ones."""
    from llama_adapter.data import encode_records, read_records

    draw = random.Random(0)
    if arguments.data is None:
        source = "made-up rows"
        records = [_made_up_record(draw, row) for row in range(1, count + 1)]
    else:
        records, summary = read_records(arguments.data)
        source = str(summary)
        records = draw.sample(records, min(len(records), 2 * count))  # some may have no answer in 512 tokens
    assert model.tokenizer is not None
    examples = encode_records(records, template="alpaca", tokenizer=model.tokenizer, max_length=ROW_TOKENS)[
        :count
    ]
    if len(examples) < count:
        raise UsageError(f"{source}: {count:,} are needed; ask for fewer --steps or a smaller --batch-size")
    mean = sum(len(example.input_ids) for example in examples) / count
    print(f"{source}: {count:,} of them, {mean:.0f} tokens each on average")
    return examples


def _made_up_record(draw: random.Random, row: int) -> Record:
    from llama_adapter.data import Record
    from llama_adapter.template import Turn

    instruction, given, output = (" ".join(draw.choices(WORDS, k=n)) for n in draw.choice(ALPACA_LENGTHS))
    return Record((Turn("user", instruction, given), Turn("assistant", output)), row)


def pad(batch: Sequence[Example], length: int | None, device: torch.device) -> dict[str, Tensor]:
    """A batch as transformers takes it, padded on the right to ``length`` or else to the longest row."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from llama_adapter.data import IGNORED

    def filled(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
        missing = max(0, (length or 0) - padded.shape[1])
        return torch.nn.functional.pad(padded, (0, missing), value=fill).to(device)

    return {
        "input_ids": filled([example.input_ids for example in batch], 0),
        "attention_mask": filled([[1] * len(example.input_ids) for example in batch], 0),
        "labels": filled([example.labels for example in batch], IGNORED),
    }


# --- peers --------------------------------------------------------------------------------------------------


def build_peft(model: LlamaAdapter, *, like: str | None = None) -> torch.nn.Module:
    """PEFT's AdaptionPrompt on the same frozen weights, with as many prompts in as many layers.

    Args:
        like: an untrained adapter from which it starts. PEFT has one gate a layer and no tanh; here it gets
            one a head, which its own multiplication takes as it is. What is left, g in place of tanh(g), is
            1e-7 after some steps: the losses of both can be compared.
    """
    import torch

    try:
        from peft import AdaptionPromptConfig, get_peft_model
    except ImportError:
        raise UsageError("--peers compares with PEFT, which is not installed: pip install peft") from None

    adapter: Any = model.adapters[like or model.active_adapter]
    weights = {id(parameter): parameter for parameter in model.decoder.parameters()}
    decoder = copy.deepcopy(model.decoder, weights)  # the memo lets both share the weights
    decoder.set_attn_implementation("sdpa")
    layers, length, _ = adapter.prompts.shape
    config = AdaptionPromptConfig(adapter_len=length, adapter_layers=layers, task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for something's old name
            peer = get_peft_model(decoder, config)
    except ValueError as error:
        raise UsageError(f"--peers: PEFT cannot adapt this base: {error}") from None
    if like is not None:
        adapted = [module for module in peer.modules() if hasattr(module, "adaption_prompt")]
        for module, prompts, gates in zip(adapted, adapter.prompts, adapter.gates, strict=True):
            module.adaption_prompt.data.copy_(prompts[None])  # type: ignore[operator]
            module.adaption_gate = torch.nn.Parameter(gates.detach().clone()[:, None, None])
    return peer


if __name__ == "__main__":
    sys.exit(run_command(main))
