"""Converting a fetched file, for a base of a few thousand weights in the published files' format."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_adapter.weights.catalogue import CATALOGUE, DEFAULT_BASE

WIDTH, HIDDEN, HEADS, KV_HEADS = 32, 64, 4, 2
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|fim_prefix|>")
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 in GGUF: Q8_0 matrices, a separate head, and unused embeddings."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, "ab", *ADDED, *(f"[PAD{number}]" for number in range(262, 288))]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    types = (
        [normal] * 257 + [control] * 3 + [gguf.TokenType.USER_DEFINED, control] + [gguf.TokenType.UNUSED] * 26
    )
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(CHAT_TEMPLATE)
    generator = np.random.default_rng(0)
    small = WIDTH * KV_HEADS // HEADS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (small, WIDTH), "attn_v": (small, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH)}
    shapes |= {"ffn_down": (WIDTH, HIDDEN)}
    matrices = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    matrices |= {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH)}
    for name, shape in matrices.items():
        values = generator.normal(size=shape, scale=0.1).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("attn_q", "attn_k", "attn_v"):
        bias = generator.normal(size=shapes[name][0], scale=0.1).astype(np.float32)
        writer.add_tensor(f"blk.0.{name}.bias", bias)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    CATALOGUE["qwen2.5-coder-0.5b-instruct"].convert(tiny_gguf, folder)
    return folder


def test_the_weights_are_the_files_in_half_precision_with_one_matrix_for_both_ends(
    tiny_gguf: Path, converted: Path
) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    assert AutoModelForCausalLM.from_pretrained(converted).dtype == torch.float16
    assert decoder.get_input_embeddings().weight is decoder.get_output_embeddings().weight
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    own = dict(decoder.named_parameters())
    for theirs, name in (("output", "model.embed_tokens"), ("blk.0.ffn_up", "model.layers.0.mlp.up_proj")):
        tensor = stored[f"{theirs}.weight"]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        # Half precision has 11 bits, more than a scale and a small integer need.
        torch.testing.assert_close(own[f"{name}.weight"].data, values, rtol=2**-11, atol=1e-7)


def test_answers_end_at_either_end_token(converted: Path) -> None:
    generation = AutoModelForCausalLM.from_pretrained(converted).generation_config
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation.eos_token_id == ends and generation.pad_token_id == ends[1]
    assert not generation.do_sample


def test_the_tokenizer_is_what_the_authors_publish(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        ("<|im_end|>", "<|endoftext|>", None)
    )
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.model_max_length) == (257, 262, 64)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.tokenize("ab12") == ["ab", "1", "2"]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")  # NFC
    assert tokenizer.encode("[PAD270]") == [index for part in "[PAD270]" for index in tokenizer.encode(part)]
    ids = tokenizer.encode("<tool_call><|fim_prefix|><|im_end|>")
    assert len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call><|fim_prefix|>"


def test_the_default_base_can_be_fetched() -> None:
    assert CATALOGUE[DEFAULT_BASE].kind == "base"
