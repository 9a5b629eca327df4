"""train.scienceqa and eval.scienceqa on a tiny base and a tiny tower."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.scienceqa
import train.scienceqa
from llama_adapter.answering.records_answered import answer_likelihoods, answer_records
from llama_adapter.common.errors import UsageError
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.methods.config import ScienceQAConfig
from llama_adapter.model import LlamaAdapter
from llama_adapter.scienceqa.examining import WAYS, Examination, best_way, examine
from llama_adapter.scienceqa.grading import grade
from llama_adapter.scienceqa.problem_texts import answer_text, problem_records
from llama_adapter.scienceqa.problems import Problem, rotate_choices, split_problems
from llama_adapter.scienceqa.reading import read_problems
from llama_adapter.weights.catalogue import DEFAULT_TOWER
from tests.finished_runs import losses
from tests.pasted import run_pasted
from tests.science import build_problems, write_official
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import (
    VISION,
    build_tiny_base,
    build_tiny_model,
    build_tiny_tower_folder,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("science")
    build_tiny_base(folder / "weights" / "tiny-base", max_position_embeddings=2048)
    build_tiny_tower_folder(folder / "weights" / DEFAULT_TOWER)
    write_official(folder / "data", build_problems(folder, rows=40))
    return folder


@pytest.fixture(scope="module")
def problems(place: Path) -> list[Problem]:
    return read_problems(place / "data", "test")[0]


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    model = build_tiny_model(
        dtype=torch.float64, tokenizer=build_tiny_tokenizer(), vision=VISION, max_position_embeddings=2048
    )
    adapter = model.get_adapter("tiny")
    adapter.config = type(adapter.config)(**{**vars(adapter.config), "template": "scienceqa"})
    return model


def features_of(problems: list[Problem]) -> dict[Any, torch.Tensor]:
    pictures = dict.fromkeys(p.image for p in problems if p.image is not None)
    generator = torch.Generator().manual_seed(2)
    return {picture: torch.randn(VISION.feature_width, generator=generator) for picture in pictures}


def run(module: Any, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        module.main()


# --- likelihoods --------------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_each_answer_alone(model: LlamaAdapter, problems: list[Problem]) -> None:
    features = features_of(problems)
    records = problem_records(problems)
    texts = [[answer_text(p, "QCM-O", choice=n) for n in range(len(p.choices))] for p in problems]
    whole = answer_likelihoods(model, records, texts, features=features)
    assert {len(several) for several in whole} > {2}
    for size in (1, 300):
        again = answer_likelihoods(model, records, texts, features=features, max_tokens=size)
        for several, others in zip(whole, again, strict=True):
            assert several == pytest.approx(others, abs=1e-5)  # logits are compared as float32
    tokenizer = model.tokenizer
    assert tokenizer is not None
    for record, several, found in zip(records, texts, whole, strict=True):
        question = f"{record.turns[0].text}\nAnswer:"
        for text, likelihood in zip(several, found, strict=True):
            ids = tokenizer.encode(question, add_special_tokens=False)
            answer = [*tokenizer.encode(" " + text, add_special_tokens=False), tokenizer.eos_token_id]
            seen: dict[str, Any] = {}
            if record.images:
                seen = {"image_features": torch.stack([features[image] for image in record.images])}
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer]), **seen).logits[0]
            logs = logits[len(ids) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            assert likelihood == pytest.approx(float(logs.sum()), abs=1e-3)


# --- examining ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_result_does_not_depend_on_the_batch(
    way: str, model: LlamaAdapter, problems: list[Problem]
) -> None:
    features = features_of(problems)
    examination = Examination(way)
    results = [
        examine(model, problems, examination, features=features, batch_size=size) for size in (1, 3, 16)
    ]
    assert results[0] == results[1] == results[2]
    alone: dict[str, int] = {}
    for problem in problems:
        alone |= examine(model, [problem], examination, features=features)[0]
    assert results[0][0] == alone


def test_a_way_that_can_be_rotated_wins_a_tie() -> None:
    assert best_way({"generate": 70.0, "letter": 30.0, "option": 70.0}) == "option"
    assert best_way({"generate": 70.0, "letter": 70.0, "option": 60.0}) == "letter"
    assert best_way({"generate": 70.1, "letter": 30.0, "option": 70.0}) == "generate"


@pytest.mark.parametrize("way", ["letter", "option"])
def test_rotations_are_each_asked_alone_and_averaged(
    way: str, model: LlamaAdapter, problems: list[Problem]
) -> None:
    features = features_of(problems)
    plain, rotated = Examination(way), Examination(way, rotations=True)
    shares = rotated.rotated_shares(model, problems, features=features)
    found = rotated.likelihoods(model, problems, features=features)
    for problem, several, mean in zip(problems, shares, found, strict=True):
        count = len(problem.choices)
        total = [0.0] * count
        for places, own in enumerate(several):
            order = [(number + places) % count for number in range(count)]
            moved = dataclasses.replace(problem, choices=tuple(problem.choices[n] for n in order), answer=0)
            (alone,) = plain.likelihoods(model, [moved], features=features)
            weights = torch.tensor(alone, dtype=torch.double).softmax(0)
            for number, share in zip(order, weights.tolist(), strict=True):
                assert own[number] == pytest.approx(share, abs=1e-5)
                total[number] += share / count
        assert [math.exp(value) for value in mean] == pytest.approx(total, abs=1e-5)
        assert sum(map(math.exp, mean)) == pytest.approx(1)


def test_a_rotation_keeps_the_right_choice(problems: list[Problem]) -> None:
    for problem in problems:
        right = problem.choices[problem.answer]
        rotated = [rotate_choices(problem, places) for places in range(len(problem.choices))]
        assert rotated[0] == problem
        assert {own.choices[own.answer] for own in rotated} == {right}
        assert len({own.answer for own in rotated}) == len(problem.choices)
    with pytest.raises(UsageError, match="generated answer has no mean over rotations"):
        Examination("generate", rotations=True)


def test_without_features_nothing_is_seen(model: LlamaAdapter, problems: list[Problem]) -> None:
    records = problem_records(problems, images=False)
    said = answer_records(model, records, max_new_tokens=16)
    _, outputs = examine(model, problems, Examination("generate"))
    assert list(outputs.values()) == said


def test_an_interrupted_examination_goes_on(
    model: LlamaAdapter, problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_adapter.scienceqa.examining.KEPT_EVERY", 4)
    output = tmp_path / "results.json"
    asked: list[str] = []
    answer = Examination.answer

    def count(self: Examination, model: Any, some: list[Problem], **options: Any) -> Any:
        if len(asked) == 8:
            asked.append("interrupted")
            raise KeyboardInterrupt
        asked.extend(p.pid for p in some)
        return answer(self, model, some, **options)

    monkeypatch.setattr(Examination, "answer", count)
    made_from = {"data": "these"}
    with pytest.raises(KeyboardInterrupt):
        examine(model, problems, Examination(), output=output, made_from=made_from)
    kept = json.loads(output.read_text())
    assert kept["count"] == 8 and set(kept["results"]) == set(asked[:8])
    predictions, _ = examine(model, problems, Examination(), output=output, made_from=made_from)
    assert sorted(asked[:8] + asked[9:]) == sorted(p.pid for p in problems), "each once"
    assert predictions == examine(model, problems, Examination())[0]
    assert json.loads(output.read_text())["count"] == len(problems)
    for changed, reason in (
        ({"data": "others"}, "has results of another data"),
        ({"data": "these", "adapter": "x"}, "has results of another adapter"),
    ):
        with pytest.raises(UsageError, match=reason):
            examine(model, problems, Examination(), output=output, made_from=changed)
    with pytest.raises(UsageError, match="has results of other problems"):
        examine(model, problems[1:], Examination(), output=output, made_from=made_from)
    output.write_text("[]")
    with pytest.raises(UsageError, match="is no results file"):
        examine(model, problems, Examination(), output=output, made_from=made_from)


def test_a_way_that_is_none_is_refused() -> None:
    with pytest.raises(
        UsageError, match="no way to answer 'guess'; expected one of generate, letter, option"
    ):
        Examination("guess")


# --- the commands -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    output = place / "trained"
    run(train.scienceqa, *options(place, output))
    return output


def options(place: Path, output: Path, *more: object) -> list[object]:
    given: dict[str, Any] = {"--data": place / "data", "--output": output, "--base": "tiny-base"}
    given |= {"--weights": place / "weights", "--cache": place / "cache", "--epochs": 3}
    given |= {"--warmup-epochs": 0.5, "--batch-size": 6, "--learning-rate": 0.1, "--validation-rows": 12}
    given |= {"--prompt-length": 3, "--orders": 2}
    if "--no-images" not in more:
        given["--bottleneck"] = 8
    return [part for pair in given.items() for part in pair] + list(more)


def test_training_records_what_scoring_needs(trained: Path, place: Path) -> None:
    config = load_adapter(trained).config
    assert config.template == "scienceqa" and config.vision is not None
    assert config.scienceqa is not None and config.scienceqa.answer in WAYS
    assert config.scienceqa.format == "QCM-A" and config.training["data"]["orders"] == 2
    measured = losses(trained)
    assert len(measured) == 3 * 5, "28 to 30 problems, each once an epoch whatever the orders"
    assert sum(measured[-5:]) < 0.9 * sum(measured[:5])


def test_the_table_is_printed_and_written(
    trained: Path, place: Path, tmp_path: Path, problems: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--data", place / "data", "--weights", place / "weights", "--cache", place / "cache")
    results, figures = tmp_path / "results.json", tmp_path / "figures.json"
    run(
        *(eval.scienceqa, "--adapter", trained, *common, "--controls"),
        *("--output", results, "--json", figures),
    )
    printed = capsys.readouterr().out
    for line in ("shuffled pictures", "no pictures", "bare base", "always ", "chance", "LLaMA-Adapter 7B"):
        assert line in printed
    made = json.loads(figures.read_text())
    predictions = {pid: int(n) for pid, n in json.loads(results.read_text())["results"].items()}
    shares = grade(problems, predictions).shares
    assert made["AVG"] == round(shares["AVG"].percent, 2) and made["rows"] == len(problems)
    assert {"IMG_shuffled", "IMG_no_picture", "unread"} <= set(made)

    run(eval.scienceqa, *common[:2], "--predictions", results, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == {name: value for name, value in made.items() if not name.startswith("IMG_")}

    kept = ("--split", "train", "--validation-rows", 12, "--limit", 5, "--answer", "option")
    run(eval.scienceqa, "--adapter", trained, *common, *kept, "--json", figures)
    assert json.loads(figures.read_text())["rows"] == 5
    run(eval.scienceqa, "--adapter", "none", "--base", "tiny-base", *common, "--limit", 3)
    assert "adapter none" in capsys.readouterr().out


def test_the_best_way_is_what_training_recorded(model: LlamaAdapter) -> None:
    assert (
        Examination.best_for(model) == Examination.best_for(model, "none") == Examination("letter", "QCM-A")
    )
    adapter = model.get_adapter("tiny")
    before = adapter.config
    learnt = ScienceQAConfig("QCM-O", caption=True, answer="option")
    adapter.config = dataclasses.replace(before, scienceqa=learnt)
    try:
        assert Examination.best_for(model, "tiny") == Examination("option", "QCM-O", caption=True)
        rotated = dataclasses.replace(learnt, rotations=True)
        adapter.config = dataclasses.replace(before, scienceqa=rotated)
        assert Examination.best_for(model) == Examination("option", "QCM-O", caption=True, rotations=True)
    finally:
        adapter.config = before


def test_training_by_rivals_learns_to_tell_the_choices_apart(place: Path, tmp_path: Path) -> None:
    more = ("--rivals", "--format", "QCM-O", "--epochs", 8, "--no-images")
    run(train.scienceqa, *options(place, tmp_path / "run", *more))
    assert load_adapter(tmp_path / "run").config.training["data"]["rivals"] is True
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line["loss"] for line in lines if "loss" in line]
    assert sum(measured[-5:]) < 0.8 * sum(measured[:5])


def test_without_pictures_the_adapter_is_one_for_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(train.scienceqa, *options(place, tmp_path / "run", "--no-images", "--max-steps", 1))
    assert load_adapter(tmp_path / "run").config.vision is None
    common = ("--data", place / "data", "--weights", place / "weights", "--json", tmp_path / "f.json")
    capsys.readouterr()
    run(eval.scienceqa, "--adapter", tmp_path / "run", *common, "--controls")
    assert "IMG_shuffled" not in json.loads((tmp_path / "f.json").read_text())
    printed = capsys.readouterr().out
    assert printed.count("can't see pictures") == 2 and "control missing: no pictures: " in printed


def test_controls_that_cannot_be_had_are_named_below_the_table(
    trained: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = build_problems(tmp_path, rows=2)
    first = next(row["image"] for row in splits["test"] if row["image"])
    same = [{**row, "image": first if row["image"] else None} for row in splits["test"]]
    folder = write_official(tmp_path / "data", {"test": same})
    common = ("--weights", place / "weights", "--cache", place / "cache", "--controls", "--split", "test")
    run(eval.scienceqa, "--adapter", trained, "--data", folder, *common, "--output", tmp_path / "r.json")
    printed = capsys.readouterr().out
    assert "no pictures   " in printed and "bare base   " in printed and "chance   " in printed
    assert "control missing: shuffled pictures: all rows have the same picture" in printed

    shutil.rmtree(folder / "images")
    run(eval.scienceqa, "--adapter", "none", "--base", "tiny-base", "--data", folder, *common)
    printed = capsys.readouterr().out
    assert "control missing: bare base: the bare base is what is scored" in printed
    run(eval.scienceqa, "--adapter", trained, "--data", folder, *common)
    printed = capsys.readouterr().out
    pictured = sum(row["image"] is not None for row in same)
    assert f"{pictured} of {pictured} problems with a picture are asked without it" in printed
    assert "control missing: no pictures: no problem has its picture here" in printed

    run(eval.scienceqa, "--predictions", tmp_path / "r.json", "--data", folder, *common)
    printed = capsys.readouterr().out
    assert "chance   " in printed and printed.count("--predictions loads no model") == 3


def test_the_commands_that_a_training_ends_with_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(train.scienceqa, *options(place, tmp_path / "run", "--max-steps", 1))
    ask, _, score = run_pasted(capsys.readouterr().out, monkeypatch)
    assert "--image" in ask and "Options: (A)" in ask[1]
    assert score[:2] == ["eval", "scienceqa"] and score[score.index("--validation-rows") + 1] == "12"


def test_too_few_problems_name_the_option_to_change(place: Path, tmp_path: Path) -> None:
    few = write_official(tmp_path / "few", {"train": build_problems(tmp_path, rows=24)["train"]})
    with pytest.raises(UsageError, match="24 problems cannot be split into 400") as error:
        run(train.scienceqa, "--data", few, "--output", tmp_path / "run", "--base", "tiny-base")
    assert "--validation-rows 2," in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--format", "QCM"), "no format 'QCM'"),
        (("--split", "val", "--validation-rows", 3), "--validation-rows is for --split train"),
        (("--predictions", "x.json"), "x.json: cannot be read"),
    ],
)
def test_mistakes_are_told(arguments: tuple[object, ...], reason: str, place: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        run(eval.scienceqa, "--data", place / "data", "--weights", place / "weights", *arguments)


def test_problems_with_pictures_can_come_up_more_often(place: Path, tmp_path: Path) -> None:
    problems = read_problems(place / "data", "train")[0]
    train_rows, kept = split_problems(problems, validation_rows=12)
    seen = sum(problem.image is not None for problem in train_rows)
    assert 0 < seen < len(train_rows) and kept
    more = ("--picture-weight", 4, "--epochs", 1, "--orders", 1)
    run(train.scienceqa, *options(place, tmp_path / "run", *more))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == math.ceil((len(train_rows) + 3 * seen) / 6)
