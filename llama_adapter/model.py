"""LlamaAdapter: a frozen decoder and its adapters, as one object that behaves like a transformers model.

Shapes: B rows, T tokens, L adapted layers, H heads, K prompts, d head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.hub import PushToHubMixin

from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import Picture, open_picture
from llama_adapter.data.templates import Turn, encode_question, end_token_ids, question_turn, stop_strings
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import Answer, Request, stream_tokens
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.attention import (
    LivePrompts,
    ProjectedPrompts,
    Prompts,
)
from llama_adapter.methods.checkpoint import adapter_folder, load_adapter, read_config, save_adapter
from llama_adapter.methods.config import AdapterConfig, VisionConfig, default_adapted_layers
from llama_adapter.methods.decoder import (
    attention_layers,
    choose_device,
    choose_dtype,
    decoder_shape,
    input_sizes,
    load_decoder,
    load_tokenizer,
    prepare_decoder,
)
from llama_adapter.methods.packed_attention import Segment, mask_of_segments, segment_positions
from llama_adapter.methods.tuning import listen, tuning_width
from llama_adapter.weights import locations

if TYPE_CHECKING:  # slow to import, and text alone does without
    from llama_adapter.vision.tower import VisionTower

_PROJECTED = ("prompt_keys", "prompt_values", "tuning")  # what `LlamaAdapter.project` gives
NO_ADAPTER = "none"  # the name that stands for the bare base
_LOADING_A_TOWER = threading.Lock()  # no model's own: a model can be copied and pickled
_NOT_NAMES = {NO_ADAPTER, "", *dir(nn.ModuleDict())}  # what torch's container of modules calls its own


class LlamaAdapter(nn.Module, GenerationMixin, PushToHubMixin):
    """A frozen decoder with adapters that are added, chosen, switched off and dropped by name.

    Every call takes ``adapter=NAME`` (``"none"`` is the bare base), so that several threads can use different
    adapters at once; without it the one chosen by `set_adapter` answers. What this class does not define
    is the decoder's own (``device``, ``dtype``, ``gradient_checkpointing_enable`` ...).

    Attributes:
        decoder: the frozen transformers model.
        tokenizer: the base's, or None where there is none.
        adapters: the loaded ones by name.
        active_adapter: name of the one that answers by default.
        base: name, folder or hub id of the decoder, as adapters saved from here will call it.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        base: str | None = None,
        weights: str | Path | None = None,
    ) -> None:
        """Wrap a decoder that is already loaded.

        Args:
            base: what adapters saved from here shall call it.
            weights: where the names of vision towers are looked for (see `locations.weights_folders`).

        Raises:
            UsageError: the decoder's family cannot be adapted, with the reason.
        """
        super().__init__()
        self.decoder = prepare_decoder(decoder)
        self.tokenizer = tokenizer
        self.base = base or str(decoder.config._name_or_path)
        self.shape = decoder_shape(decoder.config)
        self.weights = weights
        self._towers: dict[Any, VisionTower] = {}  # a plain dict: a tower is no part of the model's state
        self.adapters = nn.ModuleDict()
        self.active_adapter = NO_ADAPTER
        self.config = decoder.config
        self.generation_config = decoder.generation_config
        # Trainer and accelerate save and load the adapters; the base with its tied weights stays where it is.
        self._keys_to_ignore_on_save = {f"decoder.{name}" for name in decoder.state_dict()}
        self.register_state_dict_post_hook(_leave_out_decoder)
        self.register_load_state_dict_post_hook(_expect_no_decoder)

    # --- loading and saving ---------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: str,
        *,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> LlamaAdapter:
        """Load a decoder, with no adapter yet.

        Args:
            base: a name in the weights folders, a folder, or a hub id of any decoder of transformers.
            weights: where names are looked for (see `locations.weights_folders`).
            device: cpu, cuda, mps; None takes the fastest there is.
            dtype: float32, bfloat16, float16; None takes what is fast on the device.

        Raises:
            UsageError: not found, gated, or of a family that cannot be adapted.
        """
        found = locations.resolve(base, kind="base", weights=weights)
        chosen = choose_device(device)
        decoder = load_decoder(found, device=chosen, dtype=choose_dtype(dtype, chosen))
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
    ) -> LlamaAdapter:
        """Load an adapter and the base that it was trained for (or ``base``, which must have its shape).

        Args:
            adapter: a name in the weights folders, a folder, or a hub id. Others as in `from_base`.

        Raises:
            UsageError: as `from_base`, and whatever keeps the adapter from fitting.
        """
        found = locations.resolve(str(adapter), kind="adapter", weights=weights)
        folder = adapter_folder(found)
        config = read_config(folder)
        model = cls.from_base(base or config.base, weights=weights, device=device, dtype=dtype)
        model.load_adapter(folder, name=_name_of(adapter))
        return model

    def load_adapter(
        self, adapter: str | Path, *, name: str | None = None, weights: str | Path | None = None
    ) -> str:
        """Load one more adapter onto this base and choose it; returns its name (by default the folder's)."""
        folder = adapter_folder(locations.resolve(str(adapter), kind="adapter", weights=weights))
        name = name or _name_of(adapter)
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

    # --- adapters by name -----------------------------------------------------------------------------------

    def new_adapter(
        self,
        name: str,
        *,
        prompt_length: int = 10,
        adapted_layers: int | None = None,
        template: str = "alpaca",
        vision: VisionConfig | None = None,
        bias_tuning: bool = False,
        seed: int | None = None,
    ) -> Adapter:
        """Add an untrained adapter, which leaves the base's answers as they are, and choose it.

        Its prompts start as noise of the size that each layer's attention reads from tokens. The paper's
        N(0, 1) is larger where norms make that small (three times in SmolLM2), and the softmax over such keys
        settles on one prompt, which leaves the others with little gradient. Image tokens start so, too.

        Args:
            prompt_length: K, prompts in each adapted layer.
            adapted_layers: L, the topmost ones; None takes N - N // 16 of N.
            template: how turns are written for it.
            vision: how it sees; None makes an adapter for text alone.
            bias_tuning: train a scale and a bias of each linear projection as well (LLaMA-Adapter V2, see
                `llama_adapter.methods.tuning`).
            seed: makes the prompts the same every time, on one device in one dtype.
        """
        if adapted_layers is None:
            adapted_layers = default_adapted_layers(self.shape.num_layers)
        config = AdapterConfig(
            base=self.base,
            shape=self.shape,
            adapted_layers=adapted_layers,
            prompt_length=prompt_length,
            template=template,
            vision=vision,
            tuning_width=tuning_width(self.decoder) if bias_tuning else 0,
        )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        adapter = Adapter(config, generator)
        with torch.no_grad():
            sizes = torch.tensor(input_sizes(self.decoder)[-adapted_layers:])
            adapter.prompts.mul_(sizes[:, None, None])
            if adapter.projection is not None and adapter.projection.sizes is not None:
                adapter.projection.sizes.mul_(sizes[:, None])
        self.add_adapter(name, adapter)
        return adapter

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Add an adapter under a name and choose it.

        Raises:
            UsageError: a name that is taken or cannot be one, or an adapter of another base.
        """
        if name in self.adapters:
            raise UsageError(f"adapter name {name!r} is taken; delete that one first")
        if name in _NOT_NAMES or "." in name:
            raise UsageError(f"adapter name {name!r} cannot be used; choose another, without dots")
        if adapter.config.shape != self.shape:
            raise UsageError(
                f"adapter {name!r} was trained for base {adapter.config.base!r} ({adapter.config.shape}); "
                f"{self.base!r} is {self.shape}; give its own base"
            )
        if adapter.tuning is not None:
            if adapter.config.tuning_width != (width := tuning_width(self.decoder)):
                raise UsageError(
                    f"adapter {name!r} has {adapter.config.tuning_width} scales and biases a layer; "
                    f"{self.base!r} has room for {width}; give its own base"
                )
            listen(self.decoder)
        self.adapters[name] = adapter.to(self.decoder.device)
        self.active_adapter = name

    def set_adapter(self, name: str) -> None:
        """Choose the adapter that answers by default; ``"none"`` is the bare base."""
        self.active_adapter = self._name(name)

    def delete_adapter(self, name: str) -> None:
        """Drop an adapter; where it was the active one, the bare base answers."""
        self.get_adapter(name)
        del self.adapters[name]
        if self.active_adapter == name:
            self.active_adapter = NO_ADAPTER

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Within it, the bare base answers."""
        before, self.active_adapter = self.active_adapter, NO_ADAPTER
        try:
            yield
        finally:
            self.active_adapter = before

    def _name(self, name: str | None) -> str:
        name = self.active_adapter if name is None else name
        if name != NO_ADAPTER:
            self.get_adapter(name)
        return name

    def get_adapter(self, name: str) -> Adapter:
        """A loaded adapter by name. Raises UsageError, naming what there is, for any other."""
        if name not in self.adapters:
            there = ", ".join([*self.adapters, NO_ADAPTER])
            raise UsageError(f"no adapter {name!r} is loaded; there are {there}")
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    # --- computing ------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        adapter: str | None = None,
        prompt_keys: Tensor | None = None,
        prompt_values: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        tuning: Tensor | None = None,
        image_features: Tensor | None = None,
        image_owners: Tensor | None = None,
        segments: tuple[Segment, ...] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The decoder's own forward, with the prompts of an adapter in its attention.

        Args:
            input_ids: (B, T). attention_mask: (B, T), padding on either side.
            position_ids: (B, T); by default counted from the mask (or the segments), since the prompts' term
                depends on the position that a query was rotated to.
            labels: (B, T), -100 where there is no loss; the output then has ``loss``.
            adapter: the adapter's name; None takes the active one.
            prompt_keys, prompt_values: (B or 1, L, H, K, d) from `project`, in place of ``adapter``.
            prompt_mask: (B, K), False where a row has fewer prompts than others; None: all have as many.
            tuning: (B or 1, L, S) from `project`, of an adapter with scales and biases, beside its keys.
                In a packed sequence (1, L, S): all rows have the same.
            image_features: (I, F) from `encode_images`, of the pictures of all rows; None: there are none.
            image_owners: (I,) the row (in a packed sequence the set of prompts) that each belongs to; None
                gives every row one.
            segments: the rows of a packed sequence (B = 1), which see each other no more than apart.
            **kwargs: whatever the decoder's forward takes.
        """
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            tokens = input_ids if input_ids is not None else inputs_embeds
            assert tokens is not None
            position_ids = _positions(attention_mask)[:, -tokens.shape[1] :]
        if labels is not None and attention_mask is not None and attention_mask.ndim == 2:
            # Padding predicts nothing: on the left it would be made to guess a row's first token.
            behind_padding = F.pad(attention_mask[:, :-1] == 0, (1, 0))
            labels = labels.masked_fill(behind_padding, -100)
        if segments is not None and position_ids is None:
            position_ids = segment_positions(segments).to(self.decoder.device)
        if segments is not None:
            attention_mask = mask_of_segments(self.decoder.device)
        prompts: Prompts | None
        if prompt_keys is not None and prompt_values is not None:
            if segments is not None and tuning is not None and len(tuning) > 1:
                raise UsageError(f"{len(tuning)} sets of scales and biases for a packed sequence; give one")
            first = self.shape.num_layers - prompt_keys.shape[1]
            prompts = ProjectedPrompts(prompt_keys, prompt_values, first, prompt_mask, tuning)
        else:
            tokens = input_ids if input_ids is not None else inputs_embeds
            assert tokens is not None
            sets = len(tokens) if segments is None else 1 + max(segment.prompts for segment in segments)
            prompts = self._prompts(adapter, image_features, image_owners, sets)
        output: CausalLMOutputWithPast = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            prompts=prompts,
            segments=segments,
            **kwargs,
        )
        return output

    def _prompts(
        self, name: str | None, features: Tensor | None, owners: Tensor | None, sets: int
    ) -> LivePrompts | None:
        name = self._name(name)
        if features is not None and len(features) == 0:
            features = None
        if name == NO_ADAPTER and features is None:
            return None
        if features is not None:
            self._vision(name)
            if len(features) != (sets if owners is None else len(owners)):
                raise UsageError(
                    f"{len(features)} pictures for {sets} rows; give image_owners, a row for each"
                )
            features = features.to(self.decoder.device)
            owners = (torch.arange(sets) if owners is None else owners).to(features.device)
        adapter = self.get_adapter(name)
        prompts = adapter(features, owners, sets)
        return LivePrompts(prompts, adapter.gates, adapter.config.first_layer, tuning=adapter.tuning)

    @torch.no_grad()
    def project(
        self,
        adapter: str | None = None,
        *,
        image_features: Tensor | None = None,
        image_owners: Tensor | None = None,
        rows: int = 1,
    ) -> dict[str, Tensor]:
        """The prompts' keys and values of every adapted layer, computed once for many forward passes.

        They carry no gradient and live with the caller, so they cannot leak into a later training step.

        Args:
            image_features, image_owners: as in `forward`.
            rows: B, of the forward passes; it counts only where there are pictures.

        Returns:
            ``prompt_keys`` and ``prompt_values``, each (1, L, H, K, d), with pictures (B, ...), and
            ``tuning``, (1 or B, L, S), of an adapter that has one, for `forward`; empty for the base.
        """
        live = self._prompts(adapter, image_features, image_owners, rows)
        if live is None:
            return {}
        layers = attention_layers(self.decoder)[live.first_layer :]
        pairs = [live.of_layer(layer) for layer in layers]
        keys, values = (torch.stack(tensors, dim=1) for tensors in zip(*pairs, strict=True))
        projected = {"prompt_keys": keys, "prompt_values": values}
        if live.tuning is not None:
            projected["tuning"] = live.tuning.to(keys.dtype, copy=True).expand(len(keys), *live.tuning.shape)
        return projected

    # --- pictures -------------------------------------------------------------------------------------------

    def _vision(self, name: str) -> VisionConfig:
        if name == NO_ADAPTER:
            raise UsageError("the bare base knows nothing of pictures; choose an adapter that does")
        vision = self.get_adapter(name).config.vision
        if vision is None:
            raise UsageError(
                f"adapter {name!r} knows nothing of pictures; choose one that was trained on them"
            )
        return vision

    def sees(self, adapter: str | None = None) -> bool:
        """Whether an adapter (the active one) was trained on pictures."""
        name = self._name(adapter)
        return name != NO_ADAPTER and self.get_adapter(name).config.vision is not None

    def tower(self, adapter: str | None = None) -> VisionTower:
        """The vision tower of an adapter (the active one), loaded when it is first asked for.

        Raises:
            UsageError: an adapter without one, or a tower that is not the one it was trained with.
        """
        from llama_adapter.vision.tower import load_tower

        name = self._name(adapter)
        vision = self._vision(name)
        key = (vision.tower_fingerprint, vision.depths)
        with _LOADING_A_TOWER:
            if key not in self._towers:
                tower = load_tower(
                    vision.tower, depths=vision.depths, weights=self.weights, device=self.decoder.device
                )
                if tower.fingerprint != vision.tower_fingerprint:
                    raise UsageError(
                        f"adapter {name!r} was trained with a tower {vision.tower!r} of fingerprint "
                        f"{vision.tower_fingerprint}; the one here has {tower.fingerprint}: get the right one"
                    )
                self._towers[key] = tower
            return self._towers[key]

    def encode_images(
        self, images: Picture | Sequence[Picture], *, adapter: str | None = None, allow_urls: bool = False
    ) -> Tensor:
        """The features of pictures for an adapter, (I, F): of files, their contents, or opened pictures.

        Raises:
            UsageError: what is no picture, or an adapter that knows nothing of them.
        """
        single = isinstance(images, (str, Path, bytes, Image.Image))
        several = cast("Sequence[Picture]", [images] if single else images)
        tower = self.tower(adapter)
        if not several:
            return torch.zeros(0, tower.feature_width)
        opened = (open_picture(image, allow_urls=allow_urls) for image in several)
        return tower.encode(tower.prepare(opened))

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        adapter: str | None = None,
        image_features: Tensor | None = None,
        image_owners: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` with every decoding it knows, answered by ``adapter``.

        ``image_features`` and ``image_owners`` are those of `forward`; or give what `project` made of them.
        """
        name = self._name(adapter)
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        rows = next((len(tokens) for tokens in given if tokens is not None), 1)
        # One copy a row: beams and returned sequences are multiplied and reordered along the first dimension.
        if "prompt_keys" not in kwargs:
            kwargs |= self.project(name, image_features=image_features, image_owners=image_owners, rows=rows)
        for key in set(_PROJECTED) & set(kwargs):
            kwargs[key] = kwargs[key].expand(rows, *kwargs[key].shape[1:])
        return super().generate(inputs, *args, adapter=name, **kwargs)

    def _get_candidate_generator(  # type: ignore[override]
        self, *, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        # An assistant model guesses ahead without our prompts: it has another shape, or does not know them.
        ours = ("adapter", *_PROJECTED)
        theirs = {name: value for name, value in model_kwargs.items() if name not in ours}
        return super()._get_candidate_generator(model_kwargs=theirs, **kwargs)

    # --- answering ------------------------------------------------------------------------------------------

    def stream_chat(
        self,
        turns: str | Sequence[Turn],
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
    ) -> Answer:
        """The answer to a question, or to a conversation that ends with one, as a stream of text.

        No token is computed until it is iterated; closing it stops the work. An answer that reaches the end
        of the decoder's context ends there.

        Args:
            image: a picture or several: files, their contents, opened ones, or features of `encode_images`.

        Raises:
            UsageError: an empty question, one longer than the decoder's context, or what is no picture.
        """
        request = self.prepare_request(turns, image=image, adapter=adapter, sampling=sampling)

        def tokens() -> Iterator[int]:
            forward = functools.partial(self, adapter=NO_ADAPTER, **request.project())
            yield from stream_tokens(forward, request.question, request.sampling, request.end_ids)

        return Answer(tokens(), self._tokenizer(), request.stop_strings)

    def prepare_request(
        self,
        turns: str | Sequence[Turn],
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
    ) -> Request:
        """All that it takes to answer, whoever does it. Arguments and errors are those of `stream_chat`."""
        name = self._name(adapter)
        features: dict[str, Any] = {}
        if image is not None:
            encoded = image if isinstance(image, Tensor) else self.encode_images(image, adapter=name)
            owners = torch.zeros(len(encoded), dtype=torch.long)
            features = {"image_features": encoded, "image_owners": owners}
        ids = self.encode_question(turns, adapter=name)
        sampling = sampling or Sampling()
        if self.context_length is not None:
            room = self.context_length - len(ids)
            if room < 1:
                limit = self.context_length
                raise UsageError(f"the question has {len(ids)} tokens, the base reads {limit}; shorten it")
            sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        template = self.template(name)
        return Request(
            question=torch.tensor([ids], device=self.decoder.device),
            project=functools.partial(self.project, name, **features),
            sampling=sampling,
            end_ids=end_token_ids(template, self._tokenizer()),
            stop_strings=stop_strings(template),
        )

    def chat(
        self,
        turns: str | Sequence[Turn],
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
    ) -> str:
        """The whole answer to a question, or to a conversation that ends with one. See `stream_chat`."""
        answer = self.stream_chat(turns, image=image, adapter=adapter, sampling=sampling)
        for _ in answer:
            pass
        return answer.text

    def encode_question(self, turns: str | Sequence[Turn], *, adapter: str | None = None) -> list[int]:
        """Token ids of a question in the text format of an adapter; the bare base has its own chat template.

        Raises:
            UsageError: an empty question, or a model without a tokenizer.
        """
        turns = [question_turn(turns)] if isinstance(turns, str) else list(turns)
        if turns:
            question_turn(turns[-1].text)
        return encode_question(turns, self.template(adapter), self._tokenizer())

    @property
    def context_length(self) -> int | None:
        """How many tokens the decoder reads, question and answer together; None where it sets no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or None

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise UsageError("this model was made without a tokenizer; pass one to LlamaAdapter(...)")
        return self.tokenizer

    def template(self, adapter: str | None = None) -> str:
        """Name of the text format in which an adapter (the active one) is asked."""
        name = self._name(adapter)
        if name != NO_ADAPTER:
            return self.get_adapter(name).config.template
        has_own = self.tokenizer is not None and self.tokenizer.chat_template
        return "chat" if has_own else "alpaca"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "decoder":
                raise
            return getattr(self.decoder, name)


def _positions(mask: Tensor) -> Tensor:
    """Each token's place among the real ones, (B, T); padding behind them counts on, as in the base."""
    real = mask != 0
    behind = real.flip(-1).cumsum(-1).flip(-1) == 0
    return ((real | behind).cumsum(-1) - 1).clamp_min(0)


def _name_of(adapter: str | Path) -> str:
    """The name that an adapter gets by default: its folder's, made fit for one."""
    name = Path(str(adapter)).resolve().name.replace(".", "_")
    return f"{name}_" if name in _NOT_NAMES else name


def _leave_out_decoder(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}decoder.")]:
        del state[name]


def _expect_no_decoder(module: nn.Module, incompatible: Any) -> None:
    missing = [name for name in incompatible.missing_keys if not name.startswith("decoder.")]
    incompatible.missing_keys[:] = missing
