"""Score ScienceQA as the paper does: python -m eval.scienceqa --adapter DIR --data DIR --split test

With --predictions FILE it scores the answers of any model: the official results.json, or LLaVA's JSONL.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.commands.arguments import (
    Parser,
    add_adapter_option,
    add_cache_option,
    add_json_option,
    add_model_options,
    load_model,
    positive_int,
    report,
    seed_number,
)
from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:
    from llama_adapter.scienceqa.grading import Grades
    from llama_adapter.scienceqa.problems import Problem

ROTATED = "mean over rotations"
SHUFFLED, NO_PICTURES, BARE_BASE = CONTROLS = ("shuffled pictures", "no pictures", "bare base")


def main(words: Sequence[str] | None = None, *, program: str = "python -m eval.scienceqa") -> None:
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument(
        "--data", required=True, help="the official folder (problems.json, ...), or the hub's layout"
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="what is scored (test)"
    )
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="score these answers; no model is loaded"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write results in the official layout; a file that is there already is continued",
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="use at most N problems, chosen with --seed (all)"
    )
    parser.add_argument(
        "--validation-rows",
        type=positive_int,
        metavar="N",
        help="of the split train, only the problems that train.scienceqa keeps back with the same number",
    )
    parser.add_argument(
        "--answer",
        choices=("generate", "letter", "option"),
        help="how the adapter answers: in its own words, or with the likeliest letter or option text "
        "(default: the way that its config records as best, else letter)",
    )
    parser.add_argument(
        "--rotations",
        choices=("no", "yes", "both"),
        help="yes: the mean over rotations of the choices, so that their order does not decide; both: score "
        "with and without it, and say which is better (default: the adapter's config says which is better, "
        "else no)",
    )
    parser.add_argument(
        "--format", help="format of the question, by its official name (default: the adapter's)"
    )
    parser.add_argument(
        "--caption",
        action=argparse.BooleanOptionalAction,
        help="add the machine's caption of a picture to the context (default: as the adapter was trained)",
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, help="problems answered at once (16)")
    parser.add_argument(
        "--official-fallback",
        action="store_true",
        help="where no answer can be read, draw a choice as the official script does (default: it is wrong)",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="score other problems' pictures, no pictures, the bare base and chance as well",
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of everything that is drawn (0)")
    add_cache_option(parser)
    add_adapter_option(parser)
    add_model_options(parser)
    add_json_option(parser)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.scienceqa.grading import grade, guess_unread, read_predictions
    from llama_adapter.scienceqa.problem_texts import check_format
    from llama_adapter.scienceqa.problems import split_problems
    from llama_adapter.scienceqa.reading import read_problems

    if arguments.format is not None:
        check_format(arguments.format)
    problems, summary = read_problems(arguments.data, arguments.split)
    print(summary, file=sys.stderr)
    if arguments.validation_rows is not None:
        if arguments.split != "train":
            raise UsageError(f"--validation-rows is for --split train; the split is {arguments.split}")
        _, problems = split_problems(problems, validation_rows=arguments.validation_rows)
    if arguments.limit is not None and arguments.limit < len(problems):
        drawn = set(random.Random(arguments.seed).sample(range(len(problems)), arguments.limit))
        problems = [problem for number, problem in enumerate(problems) if number in drawn]

    if arguments.predictions is not None:
        rows = {arguments.predictions.name: read_predictions(arguments.predictions, problems)}
        why = "--predictions loads no model; score the adapter itself with --adapter"
        missing = {name: why for name in CONTROLS}
    else:
        rows, missing = _ask(arguments, problems, summary.fingerprint)
    if arguments.official_fallback:
        rows = {name: guess_unread(found, problems, seed=arguments.seed) for name, found in rows.items()}
    grades = {name: grade(problems, found) for name, found in rows.items()}
    _print(grades, problems, controls=arguments.controls)
    if ROTATED in grades:
        own, rotated = (grades[name].shares["AVG"].percent for name in (next(iter(grades)), ROTATED))
        better = "the mean over rotations" if rotated > own else "the problems' own order"
        moved = sum(rows[ROTATED][pid] != found for pid, found in next(iter(rows.values())).items())
        print(f"own order {own:.2f}, rotations {rotated:.2f}: {better} is better; {moved:,} answers differ")
    if arguments.controls:
        for name, reason in missing.items():
            print(f"control missing: {name}: {reason}")
    main_row = next(iter(grades.values()))
    figures: dict[str, Any] = {name: round(share.percent, 2) for name, share in main_row.shares.items()}
    figures |= {"rows": len(problems), "unread": main_row.unread}
    if ROTATED in grades:
        figures["AVG_rotations"] = round(grades[ROTATED].shares["AVG"].percent, 2)
    for name, key in ((SHUFFLED, "IMG_shuffled"), (NO_PICTURES, "IMG_no_picture")):
        if name in grades and "IMG" in grades[name].shares:
            figures[key] = round(grades[name].shares["IMG"].percent, 2)
    report(figures, arguments.json)


def _ask(
    arguments: argparse.Namespace, problems: list[Problem], fingerprint: str
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Predictions of the adapter and of the requested controls, and for each missing control the reason."""
    from llama_adapter.common.progress import RowProgress
    from llama_adapter.model import NO_ADAPTER
    from llama_adapter.scienceqa.examining import Examination, examine
    from llama_adapter.scienceqa.problems import shuffle_pictures
    from llama_adapter.surface.folders import shipped_adapters
    from llama_adapter.surface.named_adapters import AUTO
    from llama_adapter.vision.features import picture_features

    if arguments.adapter in (None, AUTO):  # the one for such questions, where it is here
        arguments.adapter = next(iter(shipped_adapters(arguments.base, arguments.weights, "scienceqa")), AUTO)
    model = load_model(arguments)
    model.set_adapter(model.answering_adapter(pictured=True))
    name = model.active_adapter
    weights = ""
    features = None
    if name != NO_ADAPTER:
        adapter = model.get_adapter(name)
        weights = hashlib.sha256(
            b"".join(tensor.cpu().numpy().tobytes() for tensor in adapter.state_dict().values())
        ).hexdigest()
        learnt = adapter.config.training.get("data", {})
        if arguments.validation_rows is not None and learnt.get("fingerprint", fingerprint) != fingerprint:
            print(
                f"{arguments.data} differs from the data that {name} was trained on, pictures included: "
                "--validation-rows may keep back other problems than its training did",
                file=sys.stderr,
            )
        if model.sees():
            features = picture_features(
                model.tower(), arguments.cache, [p.image for p in problems if p.image is not None]
            )
            pictured = sum(p.has_image is True for p in problems)
            if lost := pictured - sum(p.image is not None for p in problems):
                print(
                    f"{lost:,} of {pictured:,} problems with a picture are asked without it: it is not here"
                )
    best = Examination.best_for(model)
    way = arguments.answer or best.way
    examination = Examination(
        way,
        arguments.format or best.format,
        best.caption if arguments.caption is None else arguments.caption,
        arguments.rotations == "yes"
        or (arguments.rotations is None and way != "generate" and best.rotations),
    )
    print(
        f"adapter {name}, answers by {examination.way}, format {examination.format}"
        + (", with captions" if examination.caption else "")
        + (", mean over rotations" if examination.rotations else "")
    )
    made_from = {"adapter": weights, "base": model.base, "data": fingerprint, "split": arguments.split}
    rows, outputs = {}, {}
    rows[name], outputs[name] = examine(
        model,
        problems,
        examination,
        features=features,
        batch_size=arguments.batch_size,
        output=arguments.output,
        made_from=made_from,
        progress=RowProgress(name, len(problems)),
    )
    if arguments.rotations == "both":
        rows[ROTATED], _ = examine(
            model,
            problems,
            replace(examination, rotations=True),
            features=features,
            batch_size=arguments.batch_size,
            progress=RowProgress(ROTATED, len(problems)),
        )
    if not arguments.controls:
        return rows, {}
    controls: dict[str, tuple[list[Problem], Any, str]] = {}
    missing = {}
    if not features:
        why = f"{name} can't see pictures" if features is None else "no problem has its picture here"
        missing = {SHUFFLED: why, NO_PICTURES: why}
    else:
        controls[NO_PICTURES] = (problems, None, name)
        try:
            shuffled = shuffle_pictures(problems, seed=arguments.seed)
            controls = {SHUFFLED: (shuffled, features, name), **controls}
        except UsageError as error:
            missing[SHUFFLED] = str(error)
    if name != NO_ADAPTER:
        controls[BARE_BASE] = (problems, None, NO_ADAPTER)
    else:
        missing[BARE_BASE] = "the bare base is what is scored"
    for label, (asked, seen, adapter_name) in controls.items():
        rows[label], _ = examine(
            model,
            asked,
            examination,
            features=seen,
            adapter=adapter_name,
            batch_size=arguments.batch_size,
            progress=RowProgress(label, len(asked)),
        )
    return rows, missing


def _print(grades: dict[str, Grades], problems: list[Problem], *, controls: bool) -> None:
    from llama_adapter.scienceqa.grading import PUBLISHED, Share
    from llama_adapter.scienceqa.problems import GROUPS, LETTERS, groups_of

    def line(label: str, cells: list[str]) -> None:
        print(f"{label:<27}" + "".join(f"{cell:>8}" for cell in cells))

    first = next(iter(grades.values()))
    line("", list(GROUPS))
    for label, found in grades.items():
        line(label, [f"{found.shares[n].percent:.2f}" if n in found.shares else "-" for n in GROUPS])
    shares: dict[str, Share] = first.shares
    line("rows", [f"{shares[n].rows:,}" if n in shares else "0" for n in GROUPS])
    for label, side in (("95 % interval from", 0), ("to", 1)):
        line(label, [f"{shares[n].interval[side]:.2f}" if n in shares else "-" for n in GROUPS])
    if controls:
        members = {name: [p for p in problems if name in groups_of(p)] for name in GROUPS}
        commonest = max(range(len(LETTERS)), key=lambda n: sum(p.answer == n for p in problems))
        line(
            f"always {LETTERS[commonest]}",
            [
                f"{100 * sum(p.answer == commonest for p in m) / len(m):.2f}" if m else "-"
                for m in members.values()
            ],
        )
        line(
            "chance",
            [
                f"{100 * sum(1 / len(p.choices) for p in m) / len(m):.2f}" if m else "-"
                for m in members.values()
            ],
        )
    print("published, on the official test split:")
    for label, published in PUBLISHED.items():
        cells = [f"{value:.2f}" for value in published]
        line(label, ["-"] * (len(GROUPS) - len(cells)) + cells)
    for count, what in (
        (first.subject_unknown, "subject unknown: in no column of subjects"),
        (first.grade_unknown, "grade unknown: in no column of grades"),
        (sum(p.hint is None for p in problems), "hint unknown: neither TXT nor NO"),
        (sum(p.has_image is None for p in problems), "picture unknown: neither IMG nor NO"),
        (first.unread, "answers could not be read"),
    ):
        if count:
            print(f"{count:,} {what}")
