"""Training in one call, from rows to an adapter. The training scripts read their options and call this.

    from llama_adapter import train

    model = train("rows.json", output="runs/mine", epochs=3, learning_rate=0.01)
    print(model.chat("Give three tips for staying healthy."))

`train` reads the rows (`read_source`), loads the decoder with the adapter (`load_to_train`), encodes the rows
(`encode_rows`) and runs the `Trainer`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.common.processes import running_processes
from llama_adapter.data.choosing import expect_text, split_records
from llama_adapter.data.examples import EncodeSummary, Example, balance_yes_no, encode_and_count
from llama_adapter.data.records import Record, read_records
from llama_adapter.data.sources import source_name
from llama_adapter.model import LlamaAdapter
from llama_adapter.training.plan import TRAINED, AdapterPlan, load_best, load_to_train
from llama_adapter.training.reader import Lesson, picture_rows
from llama_adapter.training.settings import TrainingSettings
from llama_adapter.training.trainer import Trainer


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
        data: where the rows are, or the result of `read_source`; or a list of these. With several sources the
            best adapter has the lowest validation loss on average over the sources.
        output: folder of the run and of the best adapter.
        base: name, folder, hub id or GGUF file of a decoder; None: the default, or that of ``start_from``.
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
        plan = AdapterPlan.of(of_plan)
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
    lesson = None
    if plan.reader_epochs is not None and pictures:
        asked = [row for source in sources for row in picture_rows(source.train)]
        lesson = Lesson(asked, [row for source in sources for row in picture_rows(source.validation)])
    model, features = load_to_train(
        plan, settings, pictures, output=Path(output), resume=resume, lesson=lesson
    )
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
        data={
            **described,
            "split": split,
            "max_length": max_length,
            "start_from": plan.start_from,
            **plan.given("reader_epochs"),
        },
        features=features or None,
        occurrences=occurrences if several or weighted else None,
    )
    trainer.run(resume=resume)
    load_best(model, Path(output))
    return model


def validation_loss(model: LlamaAdapter) -> float:
    """The validation loss of the active adapter, which `train` has made, in nats a token to four digits."""
    return float(model.get_adapter(model.active_adapter).config.training["validation_loss"])


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
