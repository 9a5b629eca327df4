"""Loading a model from a folder or the hub, and saving its adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from llama_adapter.common.errors import UsageError
from llama_adapter.common.gguf_reading import gguf_read_once
from llama_adapter.methods.card import write_card
from llama_adapter.methods.checkpoint import (
    STATE_FILE,
    STATE_PREFIX,
    WEIGHTS_FILE,
    adapter_folder,
    base_of,
    encode_config,
    load_adapter,
    load_state_file,
    read_config,
    save_adapter,
    template_of,
)
from llama_adapter.methods.decoder import (
    HUB_OPTIONS,
    choose_device,
    choose_dtype,
    load_decoder,
    load_tokenizer,
)
from llama_adapter.quantization import formats
from llama_adapter.surface.adapter_dict import module_name
from llama_adapter.surface.named_adapters import AUTO, NO_ADAPTER, NamedAdapters, default_name
from llama_adapter.weights import locations
from llama_adapter.weights.catalogue import DEFAULT_BASE, SHIPPED

if TYPE_CHECKING:
    from typing_extensions import Self

# Options of transformers' from_pretrained that are passed on to it, beside `HUB_OPTIONS`.
_DECODER_OPTIONS = frozenset(
    {"attn_implementation", "device_map", "gguf_file", "key_mapping", "low_cpu_mem_usage", "max_memory"}
    | {"offload_buffers", "offload_folder", "quantization_config", "tp_plan", "use_safetensors", "variant"}
)
_ADAPTER_OPTIONS = frozenset(
    {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
)


class Folders(NamedAdapters):
    """The part of `LlamaAdapter` that loads and saves."""

    model_tags: Sequence[str] = ()  # for the card that `push_to_hub` writes

    @classmethod
    def from_base(
        cls,
        base: str,
        *,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a decoder, without an adapter.

        Args:
            base: a name in the weights folders, a folder, a hub id, or a GGUF file of a decoder of
                transformers.
            weights: where names are looked for (see `locations.weights_folders`).
            device: cpu, cuda or mps. None takes the fastest one available.
            dtype: float32, bfloat16 or float16, by name or as a torch dtype. None takes what is fast on the
                device.
            quantize: the format of the decoder's weights: int8, int4 or nf4. "auto" is int8 on a CPU. None
                and "none" keep them as they are, those of a GGUF file in its blocks.
            **options: those of transformers' ``from_pretrained``: ``device_map``, ``quantization_config``,
                ``revision``, ``token``, ``cache_dir``, ``trust_remote_code`` and others.

        Raises:
            UsageError: not found, gated, of a family that can't be adapted, or an unknown option.
        """
        if "torch_dtype" in options:  # its name before transformers 5
            dtype = options.pop("torch_dtype") if dtype is None else dtype
        _check_options("from_base", options, _DECODER_OPTIONS | HUB_OPTIONS)
        if device is not None and options.get("device_map") is not None:
            raise UsageError("device and device_map given; give one of them")
        found = locations.resolve(str(base), kind="base", weights=weights)
        chosen = choose_device(None if device is None else str(device))
        with gguf_read_once():
            decoder = load_decoder(
                found, device=chosen, dtype=choose_dtype(dtype, chosen), quantize=quantize, **options
            )
            tokenizer = load_tokenizer(
                found, **{n: v for n, v in options.items() if n in HUB_OPTIONS or n == "gguf_file"}
            )
        name = locations.name_of(found, kind="base", weights=weights)
        model = cls(decoder, tokenizer, base=name, weights=weights)
        if quantize == formats.AUTO:  # not chosen by anyone, and as good as what adapters were trained on
            model._precisions_told.add(formats.AS_IT_IS)
        return model

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path = AUTO,
        *,
        base: str | None = None,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        adapter_name: str | None = None,
        is_trainable: bool = True,
        **options: Any,
    ) -> Self:
        """Load an adapter and the base that it was trained for (or ``base``, which must have the same shape).

        Args:
            adapter: a name in the weights folders, a folder, or a hub id. ``"auto"`` loads the shipped
                adapters for text and for pictures, and the right one answers each question. A folder saved
                by the trainers of transformers or TRL works too; if it has several adapters, all are loaded.
                So do PEFT's folders of LoRA, IA3 and AdaptionPrompt.
            adapter_name: what to call it; None takes the folder's name.
            is_trainable: False freezes it.
            **options: as in `from_base`; ``revision`` and ``subfolder`` are those of the adapter.

        Raises:
            UsageError: as `from_base`, or an adapter that does not fit the base.
        """
        if isinstance(adapter, nn.Module):
            raise UsageError(
                "from_pretrained takes an adapter's folder or hub id first, given a model; to put an adapter "
                "on a decoder that is loaded, use LlamaAdapter(decoder, tokenizer).load_adapter(folder)"
            )
        _check_options("from_pretrained", options, _DECODER_OPTIONS | HUB_OPTIONS | {"torch_dtype"})
        if adapter == AUTO:
            own = {"device": device, "dtype": dtype, "quantize": quantize, **options}
            if adapter_name is not None:
                raise UsageError(
                    f"adapter_name is {adapter_name!r}; with adapter='auto' there are two, whose names stay"
                )
            return cls._with_shipped(base, weights=weights, is_trainable=is_trainable, **own)
        found = locations.resolve(str(adapter), kind="adapter", weights=weights)
        folder = adapter_folder(found, **{n: v for n, v in options.items() if n in _ADAPTER_OPTIONS})
        named = base_of(folder) if base is None else base
        own = {n: v for n, v in options.items() if n not in ("revision", "subfolder")}
        model = cls.from_base(named, weights=weights, device=device, dtype=dtype, quantize=quantize, **own)
        model.load_adapter(folder, adapter_name or default_name(adapter), is_trainable=is_trainable)
        if not (folder / WEIGHTS_FILE).is_file():  # a folder that a trainer saved
            others = list(load_state_file(folder / STATE_FILE).items())[1:]
            for name, other in others:
                model.add_adapter(name, other.requires_grad_(is_trainable))
            model.set_adapter(adapter_name or default_name(adapter))
        return model

    @classmethod
    def _with_shipped(
        cls, base: str | None, *, weights: str | Path | None, is_trainable: bool, **options: Any
    ) -> Self:
        """A base (by default `DEFAULT_BASE`) with its shipped adapters for text and pictures."""
        base = DEFAULT_BASE if base is None else base
        folders = shipped_adapters(base, weights)
        if not folders:
            raise UsageError(
                f"no adapter is shipped for base {base!r}; name one of your own, or take the "
                "bare base with from_base"
            )
        model = cls.from_base(base, weights=weights, **options)
        for name, folder in folders.items():
            model.load_adapter(folder, name, is_trainable=is_trainable)
        model.set_adapter(AUTO)
        return model

    def load_adapter(
        self,
        adapter: str | Path,
        name: str | None = None,
        *,
        weights: str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        adapter_name: str | None = None,
        is_trainable: bool = True,
        **options: Any,
    ) -> str:
        """Load one more adapter onto this base and choose it. Returns its name (by default the folder's).

        Args:
            name, adapter_name: what to call it.
            dtype: of its weights; None keeps them in float32, in which they are trained.
            is_trainable: False freezes it.
            **options: ``revision``, ``subfolder``, ``token``, ``cache_dir`` and other options of the hub.
                ``device_map`` and ``trust_remote_code`` have no effect: an adapter is loaded to the base's
                device, and has no code.

        Raises:
            UsageError: not found, or an adapter that does not fit the base.
        """
        if options.get("quantization_config") is not None:
            raise UsageError("quantization_config is the base's: give it to from_base or from_pretrained")
        options = {n: v for n, v in options.items() if n not in ("quantization_config", "device_map")}
        options.pop("trust_remote_code", None)
        _check_options("load_adapter", options, _ADAPTER_OPTIONS)
        found = locations.resolve(str(adapter), kind="adapter", weights=weights)
        loaded = load_adapter(
            adapter_folder(found, **options),
            self.decoder,
            base=self.base,
            template=template_of(self.tokenizer),
        ).requires_grad_(is_trainable)
        if dtype is not None:
            loaded.to(choose_dtype(dtype, self.device))
        name = name or adapter_name or default_name(adapter)
        self.add_adapter(name, loaded)
        return name

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        adapter: str | None = None,
        selected_adapters: Sequence[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> None:
        """Write an adapter (by default the active one) to a folder: two files, a few MB. The base is not
        saved.

        Args:
            selected_adapters: as in PEFT: one name is the same as ``adapter``; several are each saved to a
                folder of their own inside this one.
            state_dict: the model's state dict, if this process holds only a part of the tensors.
            is_main_process: False writes nothing.
            max_shard_size: has no effect: an adapter is one file.
            **options: for `push_to_hub`, with ``repo_id``.
        """
        if not safe_serialization:
            raise UsageError("safe_serialization=False given; adapters are only written as safetensors")
        if options and not push_to_hub:
            raise UsageError(f"save_pretrained does not know {', '.join(options)}")
        if selected_adapters is not None and len(selected_adapters) != 1:
            for name in selected_adapters:
                self.save_pretrained(
                    Path(save_directory) / name,
                    adapter=name,
                    state_dict=state_dict,
                    is_main_process=is_main_process,
                )
            return
        name = self.answering_adapter(selected_adapters[0] if selected_adapters else adapter)
        if name == NO_ADAPTER:
            raise UsageError("there is no adapter to save; add one, or choose one with set_adapter")
        saved = self.get_adapter(name)
        saved.config = replace(saved.config, shape=self.shape)  # the vocabulary may have been resized
        tensors = None if state_dict is None else _tensors_of(name, saved, state_dict)
        if is_main_process:
            save_adapter(saved, save_directory, tensors)
            if push_to_hub:
                self.push_to_hub(options.pop("repo_id", Path(save_directory).name), adapter=name, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter: str | None = None,
        commit_message: str = "Upload adapter",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] = (),
        max_shard_size: int | str | None = None,
        safe_serialization: bool = True,
    ) -> str:
        """Upload an adapter (by default the active one) to the hub. Returns the address of the commit.

        A card is added unless the repository has one. Arguments are those of transformers.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder, adapter=adapter, safe_serialization=safe_serialization)
            if not api.file_exists(repo_id, "README.md", revision=revision):
                write_card(folder, read_config(folder), repo_id, tags=[*self.model_tags, *tags])
            return str(
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                )
            )

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """Add tags to the card that `push_to_hub` writes."""
        given = [tags] if isinstance(tags, str) else tags
        self.model_tags = [*dict.fromkeys([*self.model_tags, *given])]

    # --- the state dict -------------------------------------------------------------------------------------

    def _keep_base_out_of_state(self) -> None:
        """Make Trainer and accelerate save and load only the adapters, not the base."""
        self._keys_to_ignore_on_save = {f"decoder.{name}" for name in self.decoder.state_dict()}
        self.register_state_dict_post_hook(_write_state)
        self.register_load_state_dict_pre_hook(_expect_configs)
        self.register_load_state_dict_post_hook(_expect_no_decoder)


def shipped_adapters(
    base: str | None = None, weights: str | Path | None = None, *kinds: str
) -> dict[str, Path]:
    """The folders of the adapters that are shipped for a base, by name, as far as they are here.

    ``kinds`` are fields of `Shipped`; by default text and vision. Raises UsageError for a base (by default
    `DEFAULT_BASE`) that is not found.
    """
    found = locations.resolve(DEFAULT_BASE if base is None else base, kind="base", weights=weights)
    shipped = SHIPPED.get(locations.name_of(found, kind="base", weights=weights))
    there = locations.list_weights("adapter", weights)
    kinds = kinds or ("text", "vision")
    names = [] if shipped is None else [getattr(shipped, kind) for kind in kinds]
    return {name: there[name] for name in names if name in there}


def _write_state(model: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}decoder.")]:
        del state[name]
    for name in model.adapters:
        config = replace(model.get_adapter(name).config, shape=model.shape)
        encoded = encode_config(config, active=name == model.active_adapter)
        state[f"{prefix}{STATE_PREFIX}{module_name(name)}.config"] = encoded


def _expect_configs(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in model.adapters:  # each must have its config; torch checks whether the tensors fit
        state.pop(f"{prefix}{STATE_PREFIX}{module_name(name)}.config", None)


def _expect_no_decoder(module: nn.Module, incompatible: Any) -> None:
    missing = [name for name in incompatible.missing_keys if not name.startswith("decoder.")]
    incompatible.missing_keys[:] = missing


def _tensors_of(name: str, adapter: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors in a model's state dict. Their names may start with a wrapper's ``module.``."""
    found = {}
    for own in adapter.state_dict():
        key = f"{STATE_PREFIX}{module_name(name)}.{own}"
        given = next((given for given in state if given == key or given.endswith(f".{key}")), None)
        if given is None:
            raise UsageError(f"state_dict has no {key}; give the whole model's state, or leave it out")
        found[own] = state[given]
    return found


def _check_options(what: str, options: dict[str, Any], known: frozenset[str] | set[str]) -> None:
    if unknown := sorted(set(options) - known):
        raise UsageError(
            f"{what} does not know the option {unknown[0]!r}; it takes {', '.join(sorted(known))}"
        )
