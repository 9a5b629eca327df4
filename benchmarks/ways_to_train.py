"""Ways to train the same adapter, beside each other: ours packed or padded, and PEFT's own."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import ROW_TOKENS
from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:  # slow to import
    import torch
    from torch import Tensor

    from llama_adapter.data.examples import Example
    from llama_adapter.model import LlamaAdapter
    from llama_adapter.training.settings import TrainingSettings

PACKED, CHECKPOINTED, PADDED = "packed", "packed, gradient checkpointing", "padded"
PEFT, PEFT_512 = "PEFT, padded", f"PEFT, padded to {ROW_TOKENS}"


@dataclass(frozen=True)
class WayToTrain:
    """What is trained, and how its gradient comes about: the function adds it and returns the loss."""

    parameters: Sequence[torch.nn.Parameter]
    gradient: Callable[[Sequence[Example]], float]

    def optimizer(self, settings: TrainingSettings) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            self.parameters,
            lr=settings.peak_learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )


def way_to_train(model: LlamaAdapter, label: str, method: str = "prompts") -> WayToTrain:
    """An untrained adapter of a method, the same for every label, and the label's way to its gradient."""
    from llama_adapter.methods.decoder import checkpoint_activations
    from llama_adapter.packing.losses import accumulate_gradient
    from llama_adapter.training.settings import TrainingSettings

    device, name = model.decoder.device, "untrained"
    adapter = model.new_adapter(name, method=method, seed=0)

    def packed(batch: Sequence[Example]) -> float:
        return accumulate_gradient(
            model, batch, device=device, max_tokens=TrainingSettings().max_tokens, adapter=name
        )

    def padded(
        forward: Callable[..., Any], length: int | None = None
    ) -> Callable[[Sequence[Example]], float]:
        def gradient(batch: Sequence[Example]) -> float:
            loss: Tensor = forward(**pad(batch, length, device), use_cache=False).loss
            loss.backward()
            return float(loss.detach())

        return gradient

    if label in (PEFT, PEFT_512):
        peer = build_peft(model, like=name)
        trainable = [parameter for parameter in peer.parameters() if parameter.requires_grad]
        return WayToTrain(trainable, padded(peer, ROW_TOKENS if label == PEFT_512 else None))
    if label == CHECKPOINTED:
        checkpoint_activations(model.decoder)
    ways = {PACKED: packed, CHECKPOINTED: packed, PADDED: padded(partial(model, adapter=name))}
    return WayToTrain(list(adapter.parameters()), ways[label])


def pad(batch: Sequence[Example], length: int | None, device: torch.device) -> dict[str, Tensor]:
    """A batch as transformers takes it, padded on the right to ``length`` or else to the longest row."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from llama_adapter.data.examples import IGNORED

    def filled(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
        missing = max(0, (length or 0) - padded.shape[1])
        return torch.nn.functional.pad(padded, (0, missing), value=fill).to(device)

    return {
        "input_ids": filled([example.input_ids for example in batch], 0),
        "attention_mask": filled([[1] * len(example.input_ids) for example in batch], 0),
        "labels": filled([example.labels for example in batch], IGNORED),
    }


def build_peft(model: LlamaAdapter, *, like: str | None = None) -> torch.nn.Module:
    """PEFT's adapter of the same method on the same frozen weights, of the same sizes in the same layers.

    Args:
        like: an untrained adapter from which it starts. PEFT's AdaptionPrompt has one gate a layer and no
            tanh; here it gets one a head, which its own multiplication takes as it is. What is left, g in
            place of tanh(g), is 1e-7 after some steps: the losses of both can be compared.
    """
    import torch

    try:
        from peft import AdaptionPromptConfig, PeftModel, get_peft_model
    except ImportError:
        raise UsageError("--peers compares with PEFT, which is not installed: pip install peft") from None

    from llama_adapter.methods.peft_writing import write_peft
    from llama_adapter.methods.sites import detach_sites

    adapter: Any = model.adapters[like or model.active_adapter]
    weights = {id(parameter): parameter for parameter in model.decoder.parameters()}
    decoder = copy.deepcopy(model.decoder, weights)  # the memo lets both share the weights
    decoder.set_attn_implementation("sdpa")
    detach_sites(decoder)
    if adapter.config.method != "prompts":
        with tempfile.TemporaryDirectory() as folder:
            write_peft(adapter, folder, model.decoder)
            return PeftModel.from_pretrained(decoder, folder, is_trainable=True)
    layers, length, _ = adapter.prompts.embeddings.shape
    config = AdaptionPromptConfig(adapter_len=length, adapter_layers=layers, task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for something's old name
            peer = get_peft_model(decoder, config)
    except ValueError as error:
        raise UsageError(f"--peers: PEFT cannot adapt this base: {error}") from None
    if like is not None:
        adapted = [module for module in peer.modules() if hasattr(module, "adaption_prompt")]
        own = adapter.prompts
        for module, prompts, gates in zip(adapted, own.embeddings, own.gates, strict=True):
            module.adaption_prompt.data.copy_(prompts[None])  # type: ignore[operator]
            module.adaption_gate = torch.nn.Parameter(gates.detach().clone()[:, None, None])
    return peer
