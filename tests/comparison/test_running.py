"""What a run of a comparison measures, and the sizes of methods."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter.common.errors import UsageError
from llama_adapter.comparison.own_answers import answer_as_base, kept_apart, loss_of_answers
from llama_adapter.comparison.running import RESULT_FILE, rates_of, rows_per_second, start
from llama_adapter.comparison.sizes import choose_sizes
from llama_adapter.data.examples import IGNORED
from llama_adapter.data.records import Record
from llama_adapter.data.templates import Turn
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import projections_of
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_model


def test_the_bases_own_answers_are_what_it_says() -> None:
    model = build_tiny_model(tokenizer=build_tiny_tokenizer(), max_position_embeddings=1024)
    (example,) = answer_as_base(model, ["What is the answer?"], max_new_tokens=6)
    answer = [label for label in example.labels if label != IGNORED]
    question = torch.tensor([example.input_ids[: -len(answer)]])
    said = model.generate(question, adapter="none", do_sample=False, max_new_tokens=6)
    assert said[0, question.shape[1] :].tolist()[: len(answer)] == answer and len(answer) > 1
    assert example.input_ids[: question.shape[1]] == model.encode_question(
        "What is the answer?", adapter="none"
    )


def test_the_loss_of_the_bases_own_answers_is_that_of_a_padded_pass() -> None:
    model = build_tiny_model(tokenizer=build_tiny_tokenizer(), max_position_embeddings=1024)
    examples = answer_as_base(model, ["What is the answer?", "Why?"], max_new_tokens=6)
    losses = {}
    for name in ("none", "tiny"):
        summed = count = 0.0
        for example in examples:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            tokens = int((labels[:, 1:] != IGNORED).sum())
            summed += tokens * float(model(input_ids=ids, labels=labels, adapter=name).loss.detach())
            count += tokens
        losses[name] = summed / count
    found = {name: loss_of_answers(model, examples, adapter=name) for name in losses}
    assert found == pytest.approx(losses, abs=1e-5) and abs(losses["tiny"] - losses["none"]) > 1e-3
    assert loss_of_answers(model, [], adapter="tiny") is None
    model.new_adapter("untrained")
    assert loss_of_answers(model, examples, adapter="untrained") == found["none"]


def test_a_question_that_a_row_asks_is_left_out() -> None:
    everything = kept_apart([])
    row = Record((Turn("user", f" {everything[3].upper()}\n"), Turn("assistant", "Yes.")), 1)
    assert kept_apart([row]) == everything[:3] + everything[4:]


def test_parts_keep_the_proportion_of_their_usual_rates() -> None:
    assert rates_of("prompts", 0.02) == {}
    assert rates_of("lora", 0.02) == {}
    assert rates_of("prompts+lora", 0.02) == pytest.approx({"lora": 0.002})
    assert rates_of("prompts", 0.02, seeing=True) == pytest.approx({"projection": 0.002})


def test_rows_a_second_leave_validations_out() -> None:
    metrics: list[dict[str, Any]] = [{"step": 1, "seconds": 9}, {"step": 2, "seconds": 11}]
    metrics += [{"step": 2, "validation_loss": 1.0}, {"step": 3, "seconds": 99}, {"step": 4, "seconds": 101}]
    assert rows_per_second(metrics, batch_size=8) == 4
    assert rows_per_second(metrics[:1], batch_size=9) == 1


@pytest.mark.parametrize(
    "method",
    [
        *("prompts", "prefix", "lora", "adalora", "bottleneck", "prompts+lora", "prompts+scales", "ia3"),
        *("top-layers", "selected"),
    ],
)
def test_methods_are_sized_alike(method: str) -> None:
    model = build_tiny_model()
    layout = Layout(model.shape, 3, projections_of(model.decoder, 3))
    sizes = choose_sizes(method, 20_000, model.decoder, layout)
    if method == "selected":
        total = sum(own.numel() for own in model.decoder.model.layers.parameters())
        assert sizes["share"] * total == pytest.approx(min(20_000, total), rel=1e-3)
        return
    if method == "top-layers":
        assert sizes == {"top_layers": 3}, "a layer has about 7,700 weights"
        return
    counts = []
    for change in (-1, 0, 1):
        changed = {name: size + change for name, size in sizes.items() if name != "target_rank"}
        adapter = model.new_adapter(f"sized{change}", method=method, adapted_layers=3, **changed)
        counts.append(sum(parameter.numel() for parameter in adapter.parameters()))
    if method == "ia3":
        assert not sizes
    elif method == "adalora" or len(sizes) == 1:
        off = [abs(count - 20_000) for count in counts]
        assert off[1] == min(off)
    else:
        assert counts[0] < 20_000 < counts[2]


def fail(kind: str) -> dict[str, float]:
    if kind == "usage":
        raise UsageError("no such thing")
    if kind == "bug":
        raise ZeroDivisionError("over\nnothing")
    return {"loss": math.inf, "other": 1.5}


@pytest.mark.parametrize(
    ("kind", "value", "error"),
    [
        ("usage", None, "no such thing"),
        ("bug", None, "ZeroDivisionError: over nothing"),
        ("none", {"loss": None, "other": 1.5}, None),
    ],
)
def test_a_process_writes_what_it_came_to(
    tmp_path: Path, kind: str, value: dict[str, float] | None, error: str | None
) -> None:
    result = tmp_path / "run" / RESULT_FILE
    process = start(fail, kind, result=result, log=tmp_path / "run" / "log.txt")
    process.join()
    assert json.loads(result.read_text()) == {"value": value, "error": error}
    assert ("Traceback" in (tmp_path / "run" / "log.txt").read_text()) == (kind == "bug")
