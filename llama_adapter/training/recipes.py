"""Training in one call, from rows to an adapter: what a training script does once its options are read.

    from llama_adapter import train

    model = train("rows.json", output="runs/mine", epochs=3, learning_rate=0.01)
    print(model.chat("Give three tips for staying healthy."))

`train` reads the rows (`read_source`), loads the decoder with the adapter (`load_to_train`), turns rows into
tokens (`encode_rows`) and runs the `Trainer`.

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
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.methods.projection import Projection, VisionConfig
from llama_adapter.methods.table import METHODS, PARTS, option_names, parse_options
from llama_adapter.model import LlamaAdapter
from llama_adapter.training.trainer import Trainer, TrainingSettings, parameter_groups
from llama_adapter.vision.features import picture_features
from llama_adapter.vision.tower import VisionTower, load_tower
from llama_adapter.weights.catalogue import DEFAULT_BASE, DEFAULT_TOWER

TRAINED = "trained"  # what the adapter in training is called


@dataclass(frozen=True)
class AdapterPlan:
    """Which adapter is trained, and on what. The options of the scripts are made from its fields.

    Attributes:
        options: settings of the method's parts by name, such as ``prompt_length`` or ``rank``; texts are read
            as what each setting is.
    """

    base: str | None = None
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "train this one on: name, folder or hub id (default: a new one)",
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
        default=None, metadata={"help": "topmost layers (default: N - N // 16)", "metavar": "L"}
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
        metadata={"help": "compute each layer again in the backward pass: less memory, a third more time"},
    )
    weights: str | Path | None = None
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None

    def given(self, *names: str) -> dict[str, Any]:
        """Those of these fields that were chosen."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Source:
    """Rows of one source, read and split.

    Attributes:
        name: the last part of where they come from.
        train, validation: the rows to train on, and those kept back.
        facts: what is kept of their reading with the run.
        weight: how often each row comes up in an epoch, on average.
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
    """Read rows and keep some back; says on standard error what was found.

    Args:
        data: whatever `read_records` reads: a file, a folder, a data set of the hub.
        validation_rows: how many are kept back; rows about the same pictures, or with the same question, stay
            on one side.
        split: only rows of this split; a row that names none belongs to every one.
        limit: use the first so many rows only.
        image_root: where relative names of pictures start; by default the folder of the file.
        weight, images: see `Source`.
        text_only: refuse rows with pictures.

    Raises:
        UsageError: data that cannot be read or split, with what to do about it.
    """
    records, summary = read_records(data, image_root=image_root, split=split)
    running_processes().say(summary, file=sys.stderr)
    if text_only:
        expect_text(records, data)
    train, validation = split_records(records[:limit], validation_rows=validation_rows)
    pictured = any(record.images for record in validation)
    if not images:  # left out after the split, which is by pictures
        train = [dataclasses.replace(record, images=()) for record in train]
        validation = [dataclasses.replace(record, images=()) for record in validation]
    return Source(
        name=Path(data).name,
        train=train,
        validation=validation,
        facts={"source": Path(data).name, "fingerprint": summary.fingerprint, "read": summary.facts()},
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
    """Train an adapter on rows; the folder ``output`` becomes its folder.

    Args:
        data: where rows are, or what `read_source` gives; or several of these, of which the best adapter is
            that of the least mean over the sources.
        output: folder of the run and of the best adapter.
        base: name, folder or hub id of a decoder; None takes the default, or that of ``start_from``.
        method: what is trained, as "prompts+lora"; None is prompts, or that of ``start_from``.
        validation_rows, split, limit, image_root: of each source that is still to be read, as in
            `read_source`.
        balance_answers: show a question's rows with yes as often as those with no.
        max_length: tokens of a row, which is cut there.
        settings: how to train, in place of single ``options``.
        plan: which adapter, in place of ``base``, ``method`` and single ``options``.
        resume: go on with the run in ``output``, exactly.
        **options: fields of `TrainingSettings` (``epochs``, ``learning_rate`` ...), of `AdapterPlan`
            (``template``, ``start_from``, ``device``, ``tower`` ...), and settings of the method's parts
            (``rank``, ``prompt_length`` ...).

    Returns:
        the model, with the best adapter on the validation rows loaded and active.

    Raises:
        UsageError: whatever is wrong with the data, the settings or the folder, in one line.
        KeyboardInterrupt: after a Ctrl-C, which leaves a checkpoint to resume from.
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
    """Put the best adapter of a run in the place of that of its last step, and choose it."""
    best = load_adapter(output)
    model.delete_adapter(TRAINED)
    model.add_adapter(TRAINED, best)


def validation_loss(model: LlamaAdapter) -> float:
    """That of the active adapter, which `train` gave, in nats a token, to four digits."""
    return float(model.get_adapter(model.active_adapter).config.training["validation_loss"])


def _plan(options: Mapping[str, Any]) -> AdapterPlan:
    """The plan that keywords give; what is no field of it is a setting of the method's parts."""
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
    """The model with the adapter that is to be trained.

    Joins the other processes of the run, where there are any.

    Args:
        images: the pictures of all rows; where there are none, a new adapter is one for text alone.
        output, resume: the run's folder; a resumed one keeps the day that its chat template wrote.

    Returns:
        the model, its active adapter named "trained"; and (F,) features of each picture.

    Raises:
        UsageError: options that do not go together, or do not fit ``start_from``; what cannot be loaded.
    """
    processes = running_processes()
    # Sharded, the whole of it may fit no accelerator: it goes there by shards, when the training begins.
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
        model.delete_adapter(model.active_adapter)  # its name may be the same
    adapter = model.new_adapter(TRAINED, seed=settings.seed, **chosen)
    parameter_groups(adapter, settings)  # a mistyped rate is told before long work
    features: dict[PictureFile, Tensor] = {}
    if tower is not None:
        with processes.main_first():  # the others find them in the cache
            features = picture_features(tower, plan.cache, images)
        projection = adapter.find(Projection)
        assert projection is not None
        projection.fit(features.values())
    if start is not None:
        adapter.load_state_dict(start.state_dict(), strict=False)  # new parts stay as they are
    if plan.gradient_checkpointing:
        checkpoint_activations(model.decoder)
    return model, features


def encode_rows(
    records: Sequence[Record], model: LlamaAdapter, name: str, *, max_length: int
) -> tuple[list[Example], EncodeSummary]:
    """Records as tokens for the model's active adapter; says what became of them, under a name."""
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
    """Say what became of rows as tokens, on standard error; warn where most are lost."""
    running_processes().say(f"{name}: {summary}", file=sys.stderr)
    if summary.warning is not None:
        running_processes().say(f"{name}: {summary.warning}", file=sys.stderr)


def _date_of_run(output: Path) -> str | None:
    """The day that the chat template wrote when a run was started, where it writes one."""
    try:
        adapter = json.loads((output / "run.json").read_text(encoding="utf-8"))["adapter"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the run's folder says what is wrong with it when it is opened
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
