"""Training in one call, from rows to an adapter. The training scripts read their options and call this.

    from llama_adapter import train

    model = train("rows.json", output="runs/mine", epochs=3, learning_rate=0.01)
    print(model.chat("Give three tips for staying healthy."))

`train` reads the rows (`read_source`), loads the decoder with the adapter (`load_to_train`), encodes the rows
(`encode_rows`) and runs the `Trainer`.

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
from llama_adapter.data.records import (
    EncodeSummary,
    Example,
    PictureFile,
    Record,
    balance_yes_no,
    encode_and_count,
    expect_text,
    read_records,
    split_records,
)
from llama_adapter.data.sources import source_name
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.methods.projection import Projection, VisionConfig
from llama_adapter.methods.table import METHODS, PARTS, option_names, parse_options
from llama_adapter.model import LlamaAdapter
from llama_adapter.training.trainer import Trainer, TrainingSettings, parameter_groups
from llama_adapter.vision.features import picture_features
from llama_adapter.vision.tower import VisionTower, load_tower
from llama_adapter.weights.catalogue import DEFAULT_BASE, DEFAULT_TOWER

TRAINED = "trained"  # the name of the adapter in training


@dataclass(frozen=True)
class AdapterPlan:
    """Which adapter is trained, and from what. The scripts make their options from these fields.

    Attributes:
        options: settings of the method's parts by name, such as ``prompt_length`` or ``rank``. A setting
        given
            as text is converted to its type.
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
        default=None, metadata={"help": "depths of the tower (default: four, evenly spaced)", "metavar": "N"}
    )
    bottleneck: int | None = field(
        default=None, metadata={"help": "width of the projection's middle (128)", "metavar": "N"}
    )
    image_tokens: int | None = field(
        default=None, metadata={"help": "1 for all prompts, or K, one each (1)", "metavar": "N"}
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

    def given(self, *names: str) -> dict[str, Any]:
        """Those of these fields that have a value."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Source:
    """Rows of one source, read and split.

    Attributes:
        name: the last part of the source's path or id.
        train, validation: the rows to train on, and those kept back.
        facts: facts about the reading that are saved with the run.
        weight: how often each row is used in an epoch, on average.
        images: whether pictures are shown.
        pictured: whether the rows have pictures, shown or not.
    """

    name: str
    train: Sequence[Record]
    validation: Sequence[Record]
    facts: Mapping[str, Any]
    weight: float = 1.0
    images: bool = True
    pictured: bool = False


def read_source(
    data: str | Path,
    *,
    validation_rows: int = 100,
    split: str | None = "train",
    limit: int | None = None,
    image_root: str | Path | None = None,
    weight: float = 1.0,
    images: bool = True,
    text_only: bool = False,
) -> Source:
    """Read rows and keep some back for validation. Reports on standard error what was found.

    Args:
        data: anything that `read_records` reads: a file, a folder, a data set on the hub.
        validation_rows: how many rows are kept back. Rows with the same pictures or the same question stay
            together.
        split: read only rows of this split, and rows that name none.
        limit: use at most this many rows, the first ones.
        image_root: the folder that relative names of pictures start from; by default the file's folder.
        weight, images: see `Source`.
        text_only: refuse rows with pictures.

    Raises:
        UsageError: data that can't be read or split, and what to do about it.
    """
    records, summary = read_records(data, image_root=image_root, split=split)
    running_processes().say(summary, file=sys.stderr)
    if text_only:
        expect_text(records, data)
    train, validation = split_records(records[:limit], validation_rows=validation_rows)
    pictured = any(record.images for record in validation)
    if not images:  # removed after the split, which keeps rows of the same picture together
        train = [dataclasses.replace(record, images=()) for record in train]
        validation = [dataclasses.replace(record, images=()) for record in validation]
    return Source(
        name=source_name(data),
        train=train,
        validation=validation,
        facts={"source": source_name(data), "fingerprint": summary.fingerprint, "read": summary.facts()},
        weight=weight,
        images=images,
        pictured=pictured,
    )


def train(
    data: str | Path | Source | Sequence[str | Path | Source],
    *,
    output: str | Path,
    base: str | None = None,
    method: str | None = None,
    validation_rows: int = 100,
    split: str = "train",
    limit: int | None = None,
    image_root: str | Path | None = None,
    balance_answers: bool = False,
    max_length: int = 512,
    settings: TrainingSettings | None = None,
    plan: AdapterPlan | None = None,
    resume: bool = False,
    **options: Any,
) -> LlamaAdapter:
    """Train an adapter on rows. The folder ``output`` becomes the adapter's folder.

    Args:
        data: where the rows are, or the result of `read_source`; or a list of these. With several sources,
        the
            best adapter has the lowest validation loss on average over the sources.
        output: folder of the run and of the best adapter.
        base: name, folder or hub id of a decoder; None takes the default, or that of ``start_from``.
        method: what is trained, such as "prompts+lora"; None takes prompts, or that of ``start_from``.
        validation_rows, split, limit, image_root: as in `read_source`, for each source that is not read yet.
        balance_answers: let each question be answered with yes as often as with no.
        max_length: tokens of a row; longer rows are cut.
        settings: how to train. Use this or single ``options``.
        plan: which adapter. Use this or ``base``, ``method`` and single ``options``.
        resume: continue the run in ``output`` exactly.
        **options: fields of `TrainingSettings` (``epochs``, ``learning_rate`` ...), of `AdapterPlan`
            (``template``, ``start_from``, ``device``, ``tower`` ...), and settings of the method's parts
            (``rank``, ``prompt_length`` ...).

    Returns:
        the model. The adapter that was best on the validation rows is loaded and active.

    Raises:
        UsageError: anything wrong with the data, the settings or the folder, in one line.
        KeyboardInterrupt: after Ctrl-C, which first saves a checkpoint to resume from.
    """
    of_settings = {own.name for own in dataclasses.fields(TrainingSettings)} & set(options)
    of_plan = {name: value for name, value in options.items() if name not in of_settings}
    of_plan |= {name: value for name, value in (("base", base), ("method", method)) if value is not None}
    if settings is not None and of_settings:
        raise UsageError(f"train: settings is given, and {min(of_settings)} beside it; put that into it")
    if plan is not None and of_plan:
        raise UsageError(f"train: plan is given, and {min(of_plan)} beside it; put that into it")
    if settings is None:
        settings = TrainingSettings(**{name: options[name] for name in of_settings})
    if plan is None:
        plan = _plan(of_plan)
    given = [data] if isinstance(data, (str, Path, Source)) else list(data)
    several = not isinstance(data, (str, Path, Source))
    sources = [
        own
        if isinstance(own, Source)
        else read_source(
            own,
            validation_rows=validation_rows,
            split=split,
            limit=limit,
            image_root=image_root,
            images=plan.images,
        )
        for own in given
    ]
    if not sources:
        raise UsageError("data: there is nothing to train on; give a file, or several")
    pictures = [
        image
        for source in sources
        for record in (*source.train, *source.validation)
        for image in record.images
    ]
    model, features = load_to_train(plan, settings, pictures, output=Path(output), resume=resume)
    assert model.tokenizer is not None
    train_examples: list[Example] = []
    occurrences: list[float] = []
    validation_examples: dict[str, list[Example]] = {}
    facts = []
    for source in sources:
        name = source.name + ("" if source.images or not plan.images else " (text)")
        prefix = f"{name}, " if several else ""
        examples, trained_on = encode_rows(source.train, model, f"{prefix}to train on", max_length=max_length)
        balance = balance_yes_no(examples, model.tokenizer) if balance_answers else [1.0] * len(examples)
        train_examples += examples
        occurrences += [source.weight * own for own in balance]
        examples, kept_back = encode_rows(
            source.validation, model, f"{prefix}kept back", max_length=max_length
        )
        validation_examples.setdefault(name, []).extend(examples)
        counts = {"train": trained_on.facts(), "validation": kept_back.facts()}
        own = {"weight": source.weight, "images": source.images} if several else {}
        facts.append({**source.facts, **own, **counts})
    weighted = any(often != 1 for often in occurrences)
    described = {"sources": facts, "balance_yes_no": balance_answers} if several else facts[0]
    trainer = Trainer(
        model,
        TRAINED,
        train_examples,
        validation_examples,
        settings,
        Path(output),
        data={**described, "split": split, "max_length": max_length, "start_from": plan.start_from},
        features=features or None,
        occurrences=occurrences if several or weighted else None,
    )
    trainer.run(resume=resume)
    load_best(model, Path(output))
    return model


def load_best(model: LlamaAdapter, output: Path) -> None:
    """Replace the adapter of a run's last step by the best one, and choose it."""
    best = load_adapter(output)
    model.delete_adapter(TRAINED)
    model.add_adapter(TRAINED, best)


def validation_loss(model: LlamaAdapter) -> float:
    """The validation loss of the active adapter, which `train` has made, in nats a token to four digits."""
    return float(model.get_adapter(model.active_adapter).config.training["validation_loss"])


def _plan(options: Mapping[str, Any]) -> AdapterPlan:
    """The plan made from keywords. One that is not a field of the plan is a setting of the method's parts."""
    fields = {own.name for own in dataclasses.fields(AdapterPlan)}
    theirs = {name for kind in METHODS for name in option_names(PARTS[kind].Config)}
    unknown = sorted(set(options) - fields - theirs)
    if unknown:
        known = ", ".join(sorted((fields | theirs) - {"options"}))
        raise UsageError(
            f"train has no option {unknown[0]!r}; it has {known}, and the fields of TrainingSettings"
        )
    chosen = {name: value for name, value in options.items() if name in fields}
    of_parts = {name: value for name, value in options.items() if name not in fields}
    chosen["options"] = {**chosen.get("options", {}), **of_parts}
    return AdapterPlan(**chosen)


def load_to_train(
    plan: AdapterPlan,
    settings: TrainingSettings,
    images: Iterable[PictureFile] = (),
    *,
    output: Path,
    resume: bool = False,
) -> tuple[LlamaAdapter, dict[PictureFile, Tensor]]:
    """Load the model with the adapter that is to be trained.

    Joins the other processes of the run, if there are any.

    Args:
        images: the pictures of all rows. Without any, a new adapter is for text only.
        output, resume: the run's folder, and whether to resume it. A resumed run keeps the date that its chat
            template wrote.

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
    chosen = plan.given("adapted_layers", "template", "method")
    sight = plan.given("tower", "depths", "bottleneck", "image_tokens")
    images = list(dict.fromkeys(images))
    if sight and not plan.images:
        option = next(iter(sight)).replace("_", "-")
        raise UsageError(f"--{option} is for pictures, which --no-images leaves out; give one of the two")
    start = None
    if plan.start_from is None:
        model = LlamaAdapter.from_base(DEFAULT_BASE if plan.base is None else plan.base, **where)
    else:
        model = LlamaAdapter.from_pretrained(plan.start_from, base=plan.base, **where)
        start = model.get_adapter(model.active_adapter)
        config = start.config
        kept = [name for name in plan.options if name in config.options]
        if settled := [*plan.given("adapted_layers"), *kept, *(sight if config.vision is not None else ())]:
            option = settled[0].replace("_", "-")
            raise UsageError(f"--{option} is settled by --start-from {plan.start_from}; leave it out")
        inherited = {name: getattr(config, name) for name in ("adapted_layers", "template", "method")}
        chosen = {**inherited, **config.options, "vision": config.vision, **chosen}
        if chosen["template"] == config.template:
            chosen["template_date"] = config.template_date
        missing = [kind for kind in config.method.split("+") if kind not in chosen["method"].split("+")]
        if missing:
            raise UsageError(
                f"--method {plan.method} leaves out {missing[0]!r}, which --start-from {plan.start_from} "
                "has; name it too"
            )
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
        adapter.load_state_dict(start.state_dict(), strict=False)  # parts that are new keep their values
    if plan.gradient_checkpointing:
        checkpoint_activations(model.decoder)
    return model, features


def encode_rows(
    records: Sequence[Record], model: LlamaAdapter, name: str, *, max_length: int
) -> tuple[list[Example], EncodeSummary]:
    """Encode records for the model's active adapter. Reports what became of them, under a name."""
    assert model.tokenizer is not None
    examples, summary = encode_and_count(
        records,
        template=model.template(),
        tokenizer=model.tokenizer,
        max_length=max_length,
        date=model.template_date(),
    )
    say_encoded(name, summary)
    return examples, summary


def say_encoded(name: str, summary: EncodeSummary) -> None:
    """Report on standard error what became of the rows, and warn if most of them are lost."""
    running_processes().say(f"{name}: {summary}", file=sys.stderr)
    if summary.warning is not None:
        running_processes().say(f"{name}: {summary.warning}", file=sys.stderr)


def _date_of_run(output: Path) -> str | None:
    """The date that the chat template wrote when a run was started, or None."""
    try:
        adapter = json.loads((output / "run.json").read_text(encoding="utf-8"))["adapter"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # opening the run's folder will report what is wrong
    return adapter.get("template_date") if isinstance(adapter, dict) else None


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
