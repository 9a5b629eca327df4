"""Tiny weights for the tests of the commands, and what ``train.vqa`` makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_adapter.model import LlamaAdapter
from llama_adapter.quantization import stored
from llama_adapter.weights.fetch import PROVENANCE
from tests.commands.console import ADAPTER, BASE, SEEING, make_adapter
from tests.commands.vqa_runs import build_place, train_all_kinds
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_decoder, build_tiny_tower_folder, sight_of


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tiny weights by the names of the real ones, where every command of this file looks for them."""
    folder, cache = (tmp_path_factory.mktemp(name) for name in ("weights", "cache"))
    tokenizer = build_tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    for name, width in ((BASE, 32), ("other-base", 64)):
        decoder = build_tiny_decoder(hidden_size=width, max_position_embeddings=600, **sizes)
        decoder.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == BASE:
            make_adapter(folder / ADAPTER, decoder, base=BASE)
            build_tiny_tower_folder(folder / "tiny-tower")
            sight = sight_of(folder, "tiny-tower")
            make_adapter(folder / SEEING, decoder, base=BASE, vision=sight)
    (folder / BASE / PROVENANCE).write_text('{"file_bytes": {}}')  # as if `fetch` had made it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ADAPTER_WEIGHTS", str(folder))
        patch.setattr(stored, "cache_folder", lambda: cache)
        yield folder


@pytest.fixture(scope="module")
def model(weights: Path) -> LlamaAdapter:
    return LlamaAdapter.from_pretrained(ADAPTER, quantize="auto")  # as commands that answer load it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights and data for ``train.vqa`` and ``eval.vqa``."""
    return build_place(tmp_path_factory.mktemp("vqa"))


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    return train_all_kinds(place)
