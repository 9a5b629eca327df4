"""A model from a folder or the hub, and its adapters back to one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.checkpoint import adapter_folder, load_adapter, read_config, save_adapter
from llama_adapter.methods.decoder import choose_device, choose_dtype, load_decoder, load_tokenizer
from llama_adapter.surface.named_adapters import NO_ADAPTER, NamedAdapters, default_name
from llama_adapter.weights import locations

if TYPE_CHECKING:
    from typing_extensions import Self


class Folders(NamedAdapters):
    """Loading and saving of `LlamaAdapter`."""

    @classmethod
    def from_base(
        cls,
        base: str,
        *,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
    ) -> Self:
        """Load a decoder, with no adapter yet.

        Args:
            base: a name in the weights folders, a folder, or a hub id of a decoder of transformers.
            weights: where names are looked for (see `locations.weights_folders`).
            device: cpu, cuda, mps; None takes the fastest there is.
            dtype: float32, bfloat16, float16; None takes what is fast on the device.
            quantize: int8 or int4, the format that the decoder's weights are kept in; None: as they are.

        Raises:
            UsageError: not found, gated, or of a family that cannot be adapted.
        """
        found = locations.resolve(base, kind="base", weights=weights)
        chosen = choose_device(device)
        decoder = load_decoder(found, device=chosen, dtype=choose_dtype(dtype, chosen), quantize=quantize)
        name = locations.name_of(found, kind="base", weights=weights)
        return cls(decoder, load_tokenizer(found), base=name, weights=weights)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        base: str | None = None,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
    ) -> Self:
        """Load an adapter and the base that it was trained for (or ``base``, which must have its shape).

        Args:
            adapter: a name in the weights folders, a folder, or a hub id. Others as in `from_base`.

        Raises:
            UsageError: as `from_base`, and whatever keeps the adapter from fitting.
        """
        found = locations.resolve(str(adapter), kind="adapter", weights=weights)
        folder = adapter_folder(found)
        config = read_config(folder)
        model = cls.from_base(
            base or config.base, weights=weights, device=device, dtype=dtype, quantize=quantize
        )
        model.load_adapter(folder, name=default_name(adapter))
        return model

    def load_adapter(
        self, adapter: str | Path, *, name: str | None = None, weights: str | Path | None = None
    ) -> str:
        """Load one more adapter onto this base and choose it; returns its name (by default the folder's)."""
        folder = adapter_folder(locations.resolve(str(adapter), kind="adapter", weights=weights))
        name = name or default_name(adapter)
        self.add_adapter(name, load_adapter(folder))
        return name

    def save_pretrained(self, folder: str | Path, *, adapter: str | None = None, **_: Any) -> None:
        """Write an adapter (the active one) to a folder: two files, a few MB. The base is not written.

        Further keywords, which `push_to_hub` passes for models in several files, have no use here.
        """
        name = self._name(adapter)
        if name == NO_ADAPTER:
            raise UsageError("there is no adapter to save; add one, or choose one with set_adapter")
        save_adapter(self.get_adapter(name), folder)
