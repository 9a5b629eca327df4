"""Which adapter is trained: the plan, and the model that is loaded by it.

Shapes: F features of a picture.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.common.processes import running_processes
from llama_adapter.common.progress import RowProgress
from llama_adapter.data.records import PictureFile
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.methods.config import AdapterConfig
from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.methods.projection import Projection, VisionConfig
from llama_adapter.methods.table import METHODS, PARTS, option_names, parse_options
from llama_adapter.model import LlamaAdapter
from llama_adapter.training.reader import Lesson
from llama_adapter.training.settings import TrainingSettings
from llama_adapter.training.trainer import parameter_groups
from llama_adapter.vision.features import picture_features
from llama_adapter.vision.tower import VisionTower, load_tower
from llama_adapter.weights.catalogue import DEFAULT_BASE, DEFAULT_TOWER

TRAINED = "trained"  # the name of the adapter in training


@dataclass(frozen=True)
class AdapterPlan:
    """Which adapter is trained, and from what. The scripts make their options from these fields.

    Attributes:
        options: settings of the method's parts by name, such as ``prompt_length`` or ``rank``. A setting
            given as text is converted to its type.
    """

    base: str | None = None
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "continue from this adapter: name, folder or hub id (default: a new one)",
            "metavar": "ADAPTER",
        },
    )
    method: str | None = field(
        default=None,
        metadata={
            "help": f"what is trained: {', '.join(METHODS)}, or several joined by + (default: prompts, or "
            "that of --start-from, whose parts are kept)",
        },
    )
    adapted_layers: int | None = field(
        default=None, metadata={"help": "adapt the topmost L layers (default: N - N // 16)", "metavar": "L"}
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "text format: alpaca, brief, chat or scienceqa (default: alpaca, or that of --start-from)"
        },
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    images: bool = True
    tower: str | None = field(
        default=None,
        metadata={"help": f"name, folder, hub id or MODEL:TAG of an open_clip model ({DEFAULT_TOWER})"},
    )
    depths: Sequence[int] | None = field(
        default=None,
        metadata={
            "help": "depths of the tower, 0 for the picture's colours, -1 for what stands out in it "
            "(default: four, evenly spaced)",
            "metavar": "N",
        },
    )
    bottleneck: int | None = field(
        default=None, metadata={"help": "width of the projection's middle (128)", "metavar": "N"}
    )
    image_tokens: int | None = field(
        default=None, metadata={"help": "1 for all prompts, or K, one each (1)", "metavar": "N"}
    )
    reader_epochs: int | None = field(
        default=None,
        metadata={
            "help": "before training, teach the projection with a small network, in N passes over the rows "
            "with a picture (none)",
            "metavar": "N",
        },
    )
    cache: Path | None = field(
        default=None, metadata={"help": "where features are kept (the user's cache)", "metavar": "DIR"}
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "recompute each layer in the backward pass: less memory, a third more time"},
    )
    weights: str | Path | None = None
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.reader_epochs is not None and self.reader_epochs < 1:
            raise UsageError(f"--reader-epochs is {self.reader_epochs}; expected 1 or more")

    def given(self, *names: str) -> dict[str, Any]:
        """The values of some fields, without those that are None."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> AdapterPlan:
        """The plan made from keywords. One that is not a field is a setting of the method's parts.

        Raises:
            UsageError: a keyword that is neither.
        """
        fields = {own.name for own in dataclasses.fields(cls)}
        settings = {name for kind in METHODS for name in option_names(PARTS[kind].Config)}
        if unknown := sorted(set(options) - fields - settings):
            known = ", ".join(sorted((fields | settings) - {"options"}))
            raise UsageError(
                f"train has no option {unknown[0]!r}; it has {known}, and the fields of TrainingSettings"
            )
        chosen = {name: value for name, value in options.items() if name in fields}
        of_parts = {name: value for name, value in options.items() if name not in fields}
        return cls(**{**chosen, "options": {**chosen.get("options", {}), **of_parts}})


def load_to_train(
    plan: AdapterPlan,
    settings: TrainingSettings,
    images: Iterable[PictureFile] = (),
    *,
    output: Path,
    resume: bool = False,
    lesson: Lesson | None = None,
) -> tuple[LlamaAdapter, dict[PictureFile, Tensor]]:
    """Load the model with the adapter that is to be trained.

    Joins the other processes of the run, if there are any.

    Args:
        images: the pictures of all rows. Without any, a new adapter is for text only.
        output, resume: the run's folder, and whether to resume it. A resumed run keeps the date that its chat
            template wrote.
        lesson: what a reader teaches the projection first, in the plan's ``reader_epochs``.

    Returns:
        the model, whose active adapter is named "trained", and the features (F,) of each picture.

    Raises:
        UsageError: options that contradict each other or ``start_from``, or something that can't be loaded.
    """
    processes = running_processes()
    # A decoder to be sharded may not fit one accelerator as a whole: it is moved in shards when training
    # begins.
    device = "cpu" if processes.sharded and plan.device is None else plan.device
    where: dict[str, Any] = {
        "weights": plan.weights,
        "device": device,
        "dtype": plan.dtype,
        "quantize": plan.quantize,
    }
    sight = plan.given("tower", "depths", "bottleneck", "image_tokens")
    images = list(dict.fromkeys(images))
    if (of_pictures := {**sight, **plan.given("reader_epochs")}) and not images:
        option = next(iter(of_pictures)).replace("_", "-")
        if not plan.images:
            raise UsageError(f"--{option} is for pictures, which --no-images leaves out; give one of the two")
        raise UsageError(f"--{option} is for pictures, and no row has one; leave it out")
    chosen = plan.given("adapted_layers", "template", "method")
    start = None
    if plan.start_from is None:
        model = LlamaAdapter.from_base(DEFAULT_BASE if plan.base is None else plan.base, **where)
    else:
        model = LlamaAdapter.from_pretrained(plan.start_from, base=plan.base, **where)
        start = model.get_adapter(model.active_adapter)
        chosen = _inherited(start.config, plan, sight) | chosen
    if resume:
        chosen["template_date"] = _date_of_run(output)
    texts = {name: value for name, value in plan.options.items() if isinstance(value, str)}
    chosen |= {**plan.options, **parse_options(chosen.get("method", "prompts"), texts)}
    tower = None
    if images:
        if chosen.get("vision") is None:
            tower, chosen["vision"] = _new_sight(plan, sight, model.decoder.device)
        else:
            tower = model.tower()
            if plan.bottleneck is not None:
                chosen["vision"] = _with_wider_bottleneck(plan, chosen["vision"])
            if plan.depths is not None:
                tower, chosen["vision"] = _with_more_depths(plan, chosen["vision"], model.decoder.device)
    if start is not None:
        model.delete_adapter(model.active_adapter)  # the new one may have the same name
    adapter = model.new_adapter(TRAINED, seed=settings.seed, **chosen)
    parameter_groups(adapter, settings)  # finds a mistyped rate before the long work starts
    features: dict[PictureFile, Tensor] = {}
    if tower is not None:
        with processes.main_first():  # the others then find the features in the cache
            features = picture_features(tower, plan.cache, images)
        projection = adapter.find(Projection)
        assert projection is not None
        projection.fit(features.values())
    if start is not None:
        for part in start.parts:
            own = adapter.find(type(part))
            assert own is not None  # `_inherited` has kept it
            own.take_over(part)
    if lesson is not None and plan.reader_epochs is not None:
        # Also if the run is resumed: it may have been cut off before its first checkpoint.
        projection, former = adapter.find(Projection), None if start is None else start.find(Projection)
        assert projection is not None
        _teach_projection(projection, former, lesson, features, plan.reader_epochs, settings.seed)
    if plan.gradient_checkpointing:
        checkpoint_activations(model.decoder)
    return model, features


def _inherited(config: AdapterConfig, plan: AdapterPlan, sight: Mapping[str, Any]) -> dict[str, Any]:
    """What a new adapter takes over from the one that it starts from.

    Raises:
        UsageError: the plan gives something that is settled by it, or leaves out a part of it.
    """
    kept = [name for name in plan.options if name in config.options]
    # The projection can be widened only if its tokens are matched again (`_teach_projection`).
    grows = {"depths"} if plan.reader_epochs is None else {"depths", "bottleneck"}
    seen = [] if config.vision is None else [name for name in sight if name not in grows]
    if settled := [*plan.given("adapted_layers"), *kept, *seen]:
        option = settled[0].replace("_", "-")
        more = ", or widen it with --reader-epochs" if option == "bottleneck" else ""
        raise UsageError(f"--{option} is settled by --start-from {plan.start_from}; leave it out{more}")
    kinds = config.method.split("+")
    if plan.method is not None and (missing := [k for k in kinds if k not in plan.method.split("+")]):
        raise UsageError(
            f"--method {plan.method} leaves out {missing[0]!r}, which --start-from {plan.start_from} "
            "has; name it too"
        )
    inherited = {name: getattr(config, name) for name in ("adapted_layers", "template", "method", "vision")}
    if plan.template in (None, config.template):
        inherited["template_date"] = config.template_date
    return {**inherited, **config.options}


def load_best(model: LlamaAdapter, output: Path) -> None:
    """Replace the adapter of a run's last step by the best one, and choose it."""
    best = load_adapter(output)
    model.delete_adapter(TRAINED)
    model.add_adapter(TRAINED, best)


def _date_of_run(output: Path) -> str | None:
    """The date that the chat template wrote when a run was started, or None."""
    try:
        adapter = json.loads((output / "run.json").read_text(encoding="utf-8"))["adapter"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # opening the run's folder will report what is wrong
    return adapter.get("template_date") if isinstance(adapter, dict) else None


def _with_more_depths(
    plan: AdapterPlan, vision: VisionConfig, device: torch.device
) -> tuple[VisionTower, VisionConfig]:
    """The tower with the plan's depths, where an adapter to start from sees with the last of them."""
    assert plan.depths is not None
    known = vision.depths
    if tuple(plan.depths[-len(known) :]) != known:
        raise UsageError(
            f"--depths {' '.join(map(str, plan.depths))}: --start-from {plan.start_from} sees with the "
            f"depths {' '.join(map(str, known))}; lower ones can be added, but none taken away"
        )
    tower = load_tower(vision.tower, depths=plan.depths, weights=plan.weights, device=device)
    return tower, dataclasses.replace(vision, depths=tower.depths, feature_width=tower.feature_width)


def _with_wider_bottleneck(plan: AdapterPlan, vision: VisionConfig) -> VisionConfig:
    """The config with the plan's bottleneck, if that is not narrower than ``start_from`` has it."""
    assert plan.bottleneck is not None
    if plan.bottleneck < vision.bottleneck:
        raise UsageError(
            f"--bottleneck {plan.bottleneck}: --start-from {plan.start_from} has {vision.bottleneck}; it can "
            "be made wider, but not narrower"
        )
    return dataclasses.replace(vision, bottleneck=plan.bottleneck)


def _teach_projection(
    projection: Projection,
    former: Projection | None,
    lesson: Lesson,
    features: Mapping[PictureFile, Tensor],
    epochs: int,
    seed: int,
) -> None:
    """Teach a projection with a reader, in place, and report how well that went.

    The tokens are then matched to those of the ``former`` projection, if there is one, since the decoder can
    read these.
    """

    def teach() -> dict[str, Tensor]:
        progress = RowProgress("reader", epochs * len(lesson.rows))
        result = lesson.teach(projection, features, epochs=epochs, seed=seed, progress=progress)
        print(f"reader: {result}", file=sys.stderr)
        if former is not None:
            seen = torch.stack(list(features.values()))
            with torch.no_grad():
                tokens = former(seen[:, -former.config.feature_width :])
            share = projection.match(seen, tokens)
            print(f"reader: new image tokens explain {share:.1%} of the old ones' variance", file=sys.stderr)
        return {name: value.cpu() for name, value in projection.state_dict().items()}

    projection.load_state_dict(running_processes().from_main(teach))


def _new_sight(
    plan: AdapterPlan, sight: dict[str, Any], device: torch.device
) -> tuple[VisionTower, VisionConfig]:
    tower = load_tower(
        sight.pop("tower", DEFAULT_TOWER),
        depths=sight.pop("depths", None),
        weights=plan.weights,
        device=device,
    )
    vision = VisionConfig(
        tower=tower.name,
        tower_fingerprint=tower.fingerprint,
        depths=tower.depths,
        feature_width=tower.feature_width,
        **sight,
    )
    return tower, vision
