"""llama.cpp as a peer in the suite "decoding", with exactly the weights of our quantised decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from llama_adapter.model import LlamaAdapter
    from llama_adapter.quantization.linear import QuantizedWeight

FAMILIES = ("llama", "qwen2")  # whose GGUF files are written here
KINDS = {"int8": "Q8_0", "int4": "Q4_1"}  # our formats have the same numbers, scales and offsets


@contextmanager
def llama_cpp(
    model: LlamaAdapter, file: Path | None, question: list[int], new_tokens: int
) -> Iterator[Callable[[int], float] | None]:
    """llama.cpp's decoding. It gives seconds for each token after the first.

    None, after a line with the reason, if it is not available.

    Args:
        file: the GGUF file that the base is. None: one is written from the quantised decoder.
    """
    try:
        import xllamacpp  # llama.cpp in a wheel that needs no compiler
    except ImportError as error:
        print(f"llama.cpp left out: {error}; pip install xllamacpp")
        yield None
        return
    import torch

    family = model.decoder.config.model_type
    if file is None and family not in FAMILIES:
        print(f"llama.cpp left out: no GGUF file of the family {family} is written here")
        yield None
        return
    with TemporaryDirectory() as folder:
        if file is None:
            file = Path(folder) / "base.gguf"
            tensors = quantized_tensors(model.decoder)
            write_gguf(model.decoder.config, tensors, file, family, made_up_vocabulary=True)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = 2 * (len(question) + new_tokens)
        parameters.n_parallel = 1
        parameters.verbosity = -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        server = xllamacpp.Server(parameters)
        request = {
            "prompt": question,
            "n_predict": new_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
        }

        def answer(_: int) -> float:
            timings = server.handle_completions(request)["timings"]
            assert timings["predicted_n"] == new_tokens, timings
            return 1e-3 * float(timings["predicted_ms"]) / (new_tokens - 1)

        yield answer


def quantized_tensors(decoder: Any) -> Iterator[tuple[str, Any, str | None]]:
    """The tensors of a decoder in int8 or int4, as `write_gguf` takes them."""
    from llama_adapter.quantization.linear import QuantizedEmbedding, QuantizedLinear

    config = decoder.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, module in decoder.named_modules():
        if not isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            continue
        if name == "lm_head" and config.tie_word_embeddings:
            continue
        blocks = gguf_blocks(module.quantized)
        if config.model_type == "llama" and (count := heads.get(name.rsplit(".", 1)[-1])) is not None:
            # llama.cpp rotates neighbours: each head's two halves are interleaved.
            blocks = blocks.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(blocks.shape)
        yield f"{name}.weight", blocks.numpy(), KINDS[module.quantized.format]
    for name, value in decoder.state_dict().items():
        if ".quantized." not in name:
            yield name, value.float().numpy(), None


def gguf_blocks(weight: QuantizedWeight) -> Tensor:
    """A matrix in int8 or int4 as the blocks of Q8_0 or Q4_1: uint8 (N, bytes of a row)."""
    import torch

    stored = weight.rows(slice(None))
    assert stored.scales is not None
    halves = [half for half in (stored.scales, stored.offsets) if half is not None]
    parts = [half.contiguous().view(torch.uint8).unflatten(1, (-1, 2)) for half in halves]
    numbers = stored.numbers.contiguous().view(torch.uint8)
    return torch.cat((*parts, numbers.unflatten(1, (stored.scales.shape[1], -1))), dim=-1).flatten(1)


def write_gguf(
    config: Any,
    tensors: Iterable[tuple[str, Any, str | None]],
    path: Path,
    family: str,
    *,
    made_up_vocabulary: bool = False,
) -> None:
    """Write a decoder as a GGUF file without its tokenizer.

    Args:
        tensors: names in transformers, numpy arrays, and the kind of their blocks (None: float32).
        made_up_vocabulary: add tokens that mean nothing, since llama.cpp does not run without any.
    """
    import gguf

    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(config.eos_token_id)
    if made_up_vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
        writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
        writer.add_token_merges(["t 1"])
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, array, kind in tensors:
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert called is not None, name
        writer.add_tensor(called, array, raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
