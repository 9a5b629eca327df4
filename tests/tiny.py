"""Tiny tokenizers of each kind, trained on a few lines, in place of downloaded ones."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction: Name three colours of the sky. ### Response: It is blue, grey and red in the evening.",
    "user assistant system: What is the answer? The answer is that it depends on the question.",
)

# ChatML, as in SmolLM2 and Qwen
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 tokens and a ChatML template. Decoding its ids gives any text back exactly."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_sentencepiece_tokenizer(
    *, words: Sequence[str] = (), specials: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer like those of LLaMA 1 and 2: a space before every text, byte fallback, BOS added, no chat.

    Args:
        words: words that are a single token, including the "▁" (a space) before them.
        specials: more control tokens.
    """
    specials = ["<unk>", "<s>", "</s>", *specials]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    merges = {(word[:end], word[end]): None for word in words for end in range(1, len(word))}
    merged = map("".join, merges)
    tokens = dict.fromkeys([*specials, *fallback, *characters, *merged])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(merges), byte_fallback=True, unk_token="<unk>")
    )
    backend.add_special_tokens(specials)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
