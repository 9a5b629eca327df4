"""Which of transformers' decoders can be adapted: tries every causal family, tiny, with random weights.

    python -m benchmarks.families [FAMILY ...] [--json FILE]

A family works under three conditions. An untrained adapter leaves its logits unchanged, bit for bit. An
adapter whose gates are not zero changes them. Rows in one packed sequence get the logits that they get
separately, or packing is refused with the reason.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.commands.arguments import Parser, report
from llama_adapter.common.errors import UsageError, run_command

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel

# Settings that make a family small, under all names that configs have for them. A config takes those that it
# knows.
SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "lru_width", "embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "ffn_dim", "ffn_hidden_size", "d_inner"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "mlp_hidden_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "encoder_layers"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels", "attention_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **{"rotary_dim": 4, "attention_types": [[["global", "local"], 2]]},
    # How far back layers see: less than the length of the rows.
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"), 4),
    **{"local_attention": 4},
    # Mixtures of experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token"), 2
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("expert_intermediate_size", "share_expert_dim"), 16),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **{"moe_layer_start_index": 0},
    # Latent and sparse attention.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **{"index_n_heads": 4, "index_topk": 4, "o_groups": 2},
    # State spaces and linear attention.
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **{"mamba_d_ssm": 64, "n_mamba_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "block_multiple_of", "adapter_rank"), 8),
    **{"block_auto_adjust_ff_dim": False, "num_mem_blocks": 1},
    # Reformer, Gemma 3n and 4.
    **{"lsh_num_chunks_after": 0, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    **{"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
    **{"num_kv_shared_layers": 0, "global_head_dim": 16, "num_global_key_value_heads": 2},
    # Towers beside the decoder.
    **{"image_size": 16, "patch_size": 8, "num_channels": 3, "depth": 2, "out_hidden_size": 32},
    **{"projection_dim": 32, "audio_embed_dim": 32, "num_codebooks": 2, "audio_vocab_size": 64},
    **{"architecture": "test_efficientnet"},
}
# Tried in turn until one can be built and run: some families need sizes that others do not accept.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_experts_per_tok": 1},
    {"head_dim": 16},
    {"hidden_size_per_layer_input": 0},
    {"layer_types": ["full_attention"] * 4},
    {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 4},
    {"moe_num_experts": None, "num_experts": None},
)
STATUSES = ("works", "refused", "not_built", "wrong")
MOST_PARAMETERS = 20_000_000
ROWS = (11, 3, 14)  # tokens


class NotBuilt(Exception):
    """No tiny decoder of this family could be built or run here."""


@dataclass(frozen=True)
class Finding:
    """The result for a family.

    Attributes:
        status: works, refused, not_built, or wrong.
        reason: why it does not work; for one that works, why its rows can't be packed, or nothing.
    """

    status: str
    reason: str = ""


def main() -> int:
    parser = Parser(
        prog="python -m benchmarks.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="transformers' model_type (all)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was found as JSON")
    args = parser.parse_args()
    known = causal_families()
    for family in args.families:
        if family not in known:
            raise UsageError(
                f"family {family!r} is not a causal one of transformers; choose {', '.join(known)}"
            )
    findings = {}
    for family in args.families or known:
        findings[family] = finding = examine(family)
        print(f"{family:28} {finding.status:10} {finding.reason}", flush=True)
    results = summary(findings)
    print(", ".join(f"{results[status]} {status.replace('_', ' ')}" for status in STATUSES))
    report(results, args.json)
    return 1 if results["wrong"] else 0


def summary(findings: dict[str, Finding]) -> dict[str, Any]:
    """How many families have each status, and the result for each family."""
    counts = Counter(finding.status for finding in findings.values())
    return {
        **{status: counts[status] for status in STATUSES},
        "families": {family: asdict(finding) for family, finding in findings.items()},
    }


def causal_families() -> list[str]:
    """The model types that AutoModelForCausalLM of the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examine(family: str) -> Finding:
    """Build a tiny decoder of a family, adapt it, and check the conditions."""
    import torch

    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(0)
        try:
            decoder = build_tiny(family)
        except NotBuilt as error:
            return Finding("not_built", str(error))
        try:
            with torch.no_grad():
                return _try_adapter(decoder)
        except Exception as error:  # a family's own code may raise anything; the sweep goes on
            return Finding("wrong", _line(error))


def _try_adapter(decoder: PreTrainedModel) -> Finding:
    import torch

    from llama_adapter.methods.packed_attention import Segment
    from llama_adapter.model import LlamaAdapter

    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (1, length), generator=generator) for length in ROWS]
    expected = [decoder(row, use_cache=False).logits for row in rows]
    try:
        model = LlamaAdapter(decoder, base="tiny")
    except UsageError as error:
        return Finding("refused", str(error).split("cannot be adapted: ")[-1])
    adapter = model.new_adapter("new", prompt_length=3, seed=0)
    for row, logits in zip(rows, expected, strict=True):
        if not torch.equal(model(row, use_cache=False).logits, logits):
            return Finding("wrong", "an untrained adapter changes the logits")
    adapter.prompts.gates.fill_(1.0)
    adapted = [model(row, use_cache=False).logits for row in rows]
    if any(torch.allclose(a, b, atol=1e-3) for a, b in zip(adapted, expected, strict=True)):
        return Finding("wrong", "an adapter changes nothing")
    ends = [sum(ROWS[: number + 1]) for number in range(len(ROWS))]
    segments = tuple(Segment(end - length, end) for end, length in zip(ends, ROWS, strict=True))
    try:
        packed = model(torch.cat(rows, 1), segments=segments, use_cache=False).logits
    except UsageError as error:
        return Finding("works", str(error))
    difference = (packed - torch.cat(adapted, 1)).abs().max() / packed.abs().max()
    if not difference <= 1e-4:
        return Finding("wrong", f"packed rows come out otherwise than alone (by {difference:.1e})")
    return Finding("works")


def build_tiny(family: str) -> PreTrainedModel:
    """A decoder of the family that runs, with weights of many sizes.

    Raises:
        NotBuilt: none of `VARIANTS` could be built and run.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    first: Exception | None = None
    for variant in VARIANTS:
        try:
            config = _shrink(CONFIG_MAPPING[family], variant)
            if hasattr(config, "is_decoder"):
                config.is_decoder = True
            with torch.device("meta"):
                count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if count > MOST_PARAMETERS:
                raise NotBuilt(f"its tiny form has {count:,} parameters")
            decoder = AutoModelForCausalLM.from_config(config).eval()
            _randomise(decoder)
            with torch.no_grad():
                decoder(torch.arange(3, 9)[None], use_cache=False)
            return decoder
        except Exception as error:
            first = first or error
    assert first is not None
    raise NotBuilt(_line(first)) from first


def _shrink(config_class: Any, variant: dict[str, Any]) -> Any:
    return config_class(**_small(config_class, {**SIZES, **variant}))


def _small(config_class: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The settings that a config class has, including those of its parts."""
    from transformers import CONFIG_MAPPING

    known = {field.name for field in fields(config_class)}
    names = config_class.attribute_map
    settings = {names.get(name, name): value for name, value in sizes.items()}
    settings = {name: value for name, value in settings.items() if name in known}
    for name, spec in config_class.sub_configs_defaults.items():
        if name not in known:
            continue
        if spec.model_type is not None:
            part = {"model_type": spec.model_type, **_small(CONFIG_MAPPING[spec.model_type], sizes)}
        else:
            part = _small(spec.config_class, sizes)
        settings[name] = part
    return settings


def _randomise(decoder: PreTrainedModel) -> None:
    """Make the weights larger and the norms uneven.

    With transformers' own, a forgotten norm would not show.
    """
    import torch

    with torch.no_grad():
        for parameter in decoder.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 2 or (parameter.ndim == 2 and parameter.shape[0] > 2):
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.2)
    decoder.tie_weights()


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' advice about configs and towers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


if __name__ == "__main__":
    sys.exit(run_command(main))
