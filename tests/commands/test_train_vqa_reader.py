"""``train.vqa --reader-epochs``: the projection is taught by a reader before the decoder is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter.commands.train_vqa import main
from llama_adapter.common.errors import UsageError
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.weights.catalogue import DEFAULT_TOWER
from tests.tiny_models import build_tiny_base, build_tiny_tower_folder, draw_picture

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
NO_STEP = ("--max-steps", "1", "--learning-rate", "1e-9", "--rate", "projection=1e-9")
READER_LINE = re.compile(
    r"reader: loss ([\d.]+) nats a word on 8 rows kept back; ([\d.]+) with another row's picture"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, an adapter that sees, and pictures of a single colour with questions."""
    folder = tmp_path_factory.mktemp("reader")
    build_tiny_base(folder / "weights" / "tiny-base")
    build_tiny_tower_folder(folder / "weights" / DEFAULT_TOWER)
    rows = []
    for number in range(12):
        for name, colour in COLOURS.items():
            file = f"{name}-{number}.png"
            draw_picture(folder / "data" / "images" / file, tuple(max(0, v - 6 * number) for v in colour))
            rows.append({"image": file, "question": "What colour?", "answer": name})
    (folder / "data" / "qa.json").write_text(json.dumps(rows))
    main(words(folder, folder / "start", "--bottleneck", "8", "--template", "brief"))
    return folder


def words(place: Path, output: Path, *more: str, learning_rate: str = "0.05") -> list[str]:
    given: dict[str, Any] = {"--data": place / "data", "--output": output, "--base": "tiny-base"}
    given |= {"--weights": place / "weights", "--cache": place / "cache", "--validation-rows": 8}
    given |= {"--epochs": 2, "--warmup-epochs": 0, "--batch-size": 5, "--learning-rate": learning_rate}
    return [str(part) for pair in given.items() for part in pair] + list(more)


def refusal(arguments: list[str]) -> str:
    with pytest.raises(UsageError) as told:
        main(arguments)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_new_projection_is_taught(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(words(place, tmp_path / "without", *NO_STEP))
    main(words(place, tmp_path / "with", *NO_STEP, "--reader-epochs", "150"))
    line = READER_LINE.search(capsys.readouterr().err)
    assert line is not None
    with_its_own, with_another = map(float, line.groups())
    assert with_its_own < 0.5 < with_another
    without, taught = (load_adapter(tmp_path / name).projection for name in ("without", "with"))
    assert not torch.allclose(taught.down.weight, without.down.weight, atol=1e-3)
    assert torch.allclose(taught.up.weight, without.up.weight, atol=1e-6)


def test_an_adapter_that_sees_keeps_its_tokens_in_a_wider_projection(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = str(place / "start")
    on = ["--start-from", start, "--reader-epochs", "20", "--bottleneck", "24"]
    main(words(place, tmp_path / "on", *NO_STEP, *on))
    share = re.search(r"reader: new image tokens explain ([\d.]+)%", capsys.readouterr().err)
    assert share is not None and float(share[1]) > 90
    before, after = load_adapter(start), load_adapter(tmp_path / "on")
    assert before.config.vision is not None and after.config.vision is not None
    assert (before.config.vision.bottleneck, after.config.vision.bottleneck) == (8, 24)
    assert torch.allclose(after.prompts.embeddings, before.prompts.embeddings, atol=1e-6)


@pytest.mark.parametrize("left", [1, 0])
def test_a_run_that_was_cut_off_goes_on_from_what_the_reader_taught(
    left: int, place: Path, tmp_path: Path
) -> None:
    """Also if it was cut off before its first checkpoint."""
    taught = ("--reader-epochs", "5", "--checkpoint-every", "2")
    main(words(place, tmp_path / "whole", *taught))
    main(words(place, tmp_path / "cut", *taught))
    for file in sorted((tmp_path / "cut" / "checkpoints").glob("step-*.pt"))[left:]:
        file.unlink()
        file.with_suffix(".json").unlink()
    main(words(place, tmp_path / "cut", *taught, "--resume"))
    final = "adapter_model.safetensors"
    assert (tmp_path / "cut" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
    changed = words(place, tmp_path / "cut", "--reader-epochs", "6", "--checkpoint-every", "2", "--resume")
    assert "reader_epochs" in refusal(changed)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--reader-epochs", "0"], "--reader-epochs is 0; expected 1 or more"),
        (
            ["--reader-epochs", "1", "--no-images"],
            "--reader-epochs is for pictures, which --no-images leaves",
        ),
        (["--start-from", "START", "--bottleneck", "9"], "leave it out, or widen it with --reader-epochs"),
        (
            ["--start-from", "START", "--bottleneck", "7", "--reader-epochs", "1"],
            "has 8; it can be made wider, but not narrower",
        ),
        (["--limit", "11", "--reader-epochs", "1"], "no word is in 4 or more answers (3 questions"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_and_leave_nothing(more: list[str], told: str, place: Path, tmp_path: Path) -> None:
    start = str(place / "start")
    given = [word.replace("START", start) for word in more]
    assert told in refusal(words(place, tmp_path / "run", *given))
    assert not (tmp_path / "run").exists()
