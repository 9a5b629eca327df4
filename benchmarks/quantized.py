"""Decoding with quantised weights, beside float32 and other programs, in the suite "decoding"."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.llama_cpp import llama_cpp
from benchmarks.measuring import alternate, ratio, show
from llama_adapter.weights import locations
from llama_adapter.weights.catalogue import SMALL_BASE

if TYPE_CHECKING:  # slow to import
    from llama_adapter.model import LlamaAdapter

QUESTION_TOKENS = 64
READ_BYTES = 1 << 28  # more than any cache holds, for measuring the speed of the memory


def quantized_decoding(model: LlamaAdapter, arguments: argparse.Namespace) -> dict[str, float | None]:
    """Measure a token with the quantised base, float32 and peers, and the memory's speed, all in turn."""
    import torch

    from llama_adapter.decoding.sampling import Sampling
    from llama_adapter.decoding.streams import stream_tokens
    from llama_adapter.quantization.kernels import load_kernels
    from llama_adapter.quantization.linear import format_of, kept_bytes, read_bytes

    quantized = str(format_of(model.decoder))
    plain = load_in_floats(arguments)
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(model.shape.vocab_size, (1, QUESTION_TOKENS), generator=generator)
    sampling = Sampling(max_new_tokens=arguments.new_tokens, temperature=0)
    matrix, vector = torch.ones(READ_BYTES // 4 // 1024, 1024), torch.ones(1024)

    def answer(contender: LlamaAdapter, _: int, calls: list[float] | None = None) -> float:
        """Seconds for each token after the first. ``calls`` is emptied when their time begins."""
        stream = stream_tokens(partial(contender, adapter="none"), question, sampling, ())
        next(stream)
        if calls is not None:
            calls.clear()
        first = time.perf_counter()
        for _ in stream:
            pass
        return (time.perf_counter() - first) / (arguments.new_tokens - 1)

    def read(_: int) -> float:
        """Seconds for a byte, in the fastest of three passes over a matrix that fits no cache."""
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            torch.mv(matrix, vector)
            seconds.append(time.perf_counter() - started)
        return min(seconds) / READ_BYTES

    contenders: dict[str, Callable[[int], float]] = {
        str(plain.decoder.dtype).removeprefix("torch."): partial(answer, plain),
        quantized: partial(answer, model),
        "reading": read,
    }
    base = locations.resolve(model.base, kind="base", weights=arguments.weights)
    file = locations.gguf_in(base)
    asked = question[0].tolist(), arguments.new_tokens
    same = file if quantized == "gguf" else None  # else its weights were quantised anew
    with _ctranslate2(base, *asked) as ctranslate2, llama_cpp(model, same, *asked) as llama:
        peers = {
            name: peer
            for name, peer in (("CTranslate2", ctranslate2), ("llama.cpp", llama))
            if peer is not None
        }
        contenders |= peers
        times = alternate(contenders, rounds=arguments.pairs)
    speed = times.pop("reading")
    show("decoding without an adapter, a token", times)
    full, ours, *_ = times.values()
    rates = [1 / statistics.median(times[name]) for name in peers]
    weights = read_bytes(model.decoder)
    shares = [weights / seconds * byte for seconds, byte in zip(ours, speed, strict=True)]
    print(
        f"\n{weights / 1e6:,.0f} MB of weights a token; memory is read at "
        f"{1e-9 / statistics.median(speed):.1f} GB/s, {statistics.median(shares):.0%} of it by {quantized}"
    )
    around: float | None = None
    kernels = load_kernels()
    if kernels is not None:  # else torch computes, which the line on standard error says
        with _watched(kernels, ("decode", "linear")) as compiled:
            others = [
                answer(model, 0, compiled) - sum(compiled) / (arguments.new_tokens - 1)
                for _ in range(arguments.pairs)
            ]
        around = statistics.median(others)
        print(f"around the compiled calls, Python and torch take {1e3 * around:.2f} ms of a token")
    figures = {
        f"{quantized}_vs_float32": ratio(full, ours),
        "bandwidth_share": statistics.median(shares),
        "tokens_per_second": 1 / statistics.median(ours),
        "seconds_around_kernels": around,
        "peer_tokens_per_second": max(rates, default=None),
    }
    if quantized == "gguf" and file is not None:
        kept, size = kept_bytes(model.decoder), file.stat().st_size
        figures["gguf_memory_vs_file"] = kept / size
        print(f"the decoder takes {kept / 1e6:,.1f} MB, {kept / size:.3f} times its file")
    return figures


def load_in_floats(arguments: argparse.Namespace) -> LlamaAdapter:
    """The base that --base, --weights, --device and --dtype ask for, its weights not quantised."""
    from transformers import GgufConfig

    from llama_adapter.commands.arguments import quieten_libraries
    from llama_adapter.model import LlamaAdapter

    quieten_libraries()
    base = SMALL_BASE if arguments.base is None else arguments.base
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("weights", "device", "dtype")}
    if locations.gguf_in(locations.resolve(base, kind="base", weights=arguments.weights)) is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    return LlamaAdapter.from_base(base, **options)


@contextmanager
def _watched(library: Any, names: tuple[str, ...]) -> Iterator[list[float]]:
    """Within it, the seconds of each call of these functions of a compiled library are put into the list."""
    seconds: list[float] = []
    usual = {name: getattr(library, name) for name in names}

    def watch(function: Callable[..., None], *arguments: Any) -> None:
        started = time.perf_counter()
        function(*arguments)
        seconds.append(time.perf_counter() - started)

    for name, function in usual.items():
        setattr(library, name, partial(watch, function))
    try:
        yield seconds
    finally:
        for name, function in usual.items():
            setattr(library, name, function)


@contextmanager
def _ctranslate2(base: str, question: list[int], new_tokens: int) -> Iterator[Callable[[int], float] | None]:
    """CTranslate2's int8 with the same weights.

    None, after a line with the reason, if it is not available.
    """
    try:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
    except ImportError as error:
        print(f"peer left out: {error}; pip install ctranslate2")
        yield None
        return
    import torch

    with TemporaryDirectory() as folder:
        converted = Path(folder) / "base"
        try:
            TransformersConverter(base).convert(str(converted), quantization="int8")
        except Exception as error:  # its converter may not fit the installed transformers
            print(f"peer left out: CTranslate2 cannot convert this base ({type(error).__name__}: {error})")
            yield None
            return
        generator: Any = ctranslate2.Generator(
            str(converted), compute_type="int8", intra_threads=torch.get_num_threads()
        )
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(base).convert_ids_to_tokens(question)

        def answer(_: int) -> float:
            """Seconds for each token after the first."""
            steps = generator.generate_tokens(
                tokens, max_length=new_tokens, min_length=new_tokens, end_token=[], sampling_topk=1
            )
            next(steps)
            first = time.perf_counter()
            count = sum(1 for _ in steps)
            return (time.perf_counter() - first) / count

        yield answer
