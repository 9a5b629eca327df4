"""A small CLIP: its pairs, its training, its scores, and the two commands."""

from __future__ import annotations

import functools
import json
import random
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.clip
import train.clip
from llama_adapter.__main__ import main
from llama_adapter.common.errors import UsageError
from llama_adapter.data.drawings import drawing_captions
from llama_adapter.training import clip_training
from llama_adapter.training.clip_training import ClipSettings, train_clip
from llama_adapter.vision import contrastive
from llama_adapter.vision.contrastive import (
    Pair,
    build_clip,
    load_clip,
    read_names,
    read_pairs,
    retrieval,
    save_clip,
    zero_shot,
)
from llama_adapter.vision.tower import load_tower
from tests.finished_runs import losses
from tests.tiny_models import build_tiny_tower_folder, draw_picture

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (230, 230, 20)}
SETTINGS = ClipSettings(
    epochs=6, batch_size=4, learning_rate=3e-3, trunk_learning_rate=1e-3, warmup_steps=2, checkpoint_every=2
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower to start from, and squares of one colour with captions and with names."""
    folder = tmp_path_factory.mktemp("clip")
    build_tiny_tower_folder(folder / "weights" / "start", "cnn", size=64)
    rows, names = [], {}
    for colour, value in COLOURS.items():
        for number in range(4):
            file = f"{colour}-{number}.png"
            for data in ("captions", "names"):
                draw_picture(folder / data / "images" / file, tuple(max(0, v - 5 * number) for v in value))
            split = "val" if number == 3 else "train"
            rows.append({"image": file, "captions": [f"a {colour} one", f"it is {colour}"], "split": split})
            names[file] = f"{colour} square {number}"
    (folder / "captions" / "captions.json").write_text(json.dumps(rows))
    (folder / "names" / "names.json").write_text(json.dumps(names))
    return folder


def build(place: Path) -> Any:
    torch.manual_seed(0)
    return build_clip(place / "weights" / "start", embed_dim=16, text_width=32, text_layers=1)


def fit(place: Path, output: Path, *, resume: bool = False, **changes: Any) -> Any:
    clip = build(place)
    settings = ClipSettings(**{**vars(SETTINGS), **changes})
    pairs = read_pairs(str(place / "captions"))
    train_clip(clip, pairs, settings, output, data={}, validate=dict, resume=resume)
    return clip


# --- pairs --------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_the_split(place: Path) -> None:
    train, val = (read_pairs(str(place / "captions"), split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (12, 4)
    assert val[0] == Pair(place / "captions" / "images" / "red-3.png", ("a red one", "it is red"))
    with pytest.raises(UsageError, match="has no split 'test'; its splits are train, val"):
        read_pairs(str(place / "captions"), split="test")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"image": "b.png", "question": "?", "answer": "!"}', "row 2: expected 'image' and 'captions'"),
        ('"b.png"', "row 2: expected an object"),
        ('{"image": 5, "captions": ["x"]}', "row 2: field 'image': expected the name of a picture file"),
        ('{"image": "b.png", "captions": "a dog"}', "row 2: field 'captions': expected a list of texts"),
    ],
)
def test_a_row_without_captions_is_named(row: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "a.png", "captions": ["x"]}\n' + row)
    with pytest.raises(UsageError, match=reason):
        read_pairs(str(path))


def test_pictures_of_shapes_are_put_into_words(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"image": "1.png", "question": "what color is the shape?", "answer": "teal"},
        {"image": "1.png", "question": "is there a circle?", "answer": "no"},
        {"image": "1.png", "question": "what shape is in the image?", "answer": "triangle"},
        {"image": "2.png", "question": "what is the blue shape?", "answer": "circle"},
    ]
    assert contrastive.shape_pairs(rows) == [
        Pair(Path("1.png"), ("a teal triangle", "a triangle that is teal", "a picture of a teal triangle."))
    ], "the colour of the second one is not told"


def test_drawings_come_with_captions() -> None:
    pairs = read_pairs("drawings:3", split="test")
    assert [(pair.picture, pair.texts) for pair in pairs] == list(drawing_captions("drawings:3", "test"))


def test_names_are_read_from_their_file(place: Path, tmp_path: Path) -> None:
    names = read_names(place / "names")
    assert names[1] == Pair(place / "names" / "images" / "red-1.png", ("a photo of a red square 1.",))
    for content in (None, "[]", "{", '"x"'):
        if content is not None:
            (tmp_path / "names.json").write_text(content)
        with pytest.raises(UsageError, match=r"names\.json: expected an object of files and their names"):
            read_names(tmp_path)


# --- the model ----------------------------------------------------------------------------------------------


def test_it_starts_from_the_tower_and_comes_back_from_its_folder(place: Path, tmp_path: Path) -> None:
    clip, start = build(place), load_clip(place / "weights" / "start")
    for name, tensor in start.visual.trunk.state_dict().items():
        assert torch.equal(tensor, clip.visual.trunk.state_dict()[name]), name
    save_clip(clip, tmp_path)
    again = load_clip(tmp_path)
    for name, tensor in clip.state_dict().items():
        expected = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(again.state_dict()[name], expected), name
    tower = load_tower(str(tmp_path))  # it works like any other tower
    assert tower.encode(torch.zeros(1, 3, 64, 64)).shape == (1, tower.feature_width)


def test_a_name_that_comes_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"1.png": "crane", "2.png": "dog", "3.png": "crane"}')
    assert [pair.picture.name for pair in read_names(tmp_path)] == ["1.png", "2.png"]  # type: ignore[union-attr]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an open_clip folder"):
        load_clip(tmp_path)
    build_tiny_tower_folder(tmp_path)
    with pytest.raises(UsageError, match="its picture side is not an EfficientNet of timm"):
        build_clip(tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="not an open_clip folder"):
        load_clip(tmp_path)


# --- training -----------------------------------------------------------------------------------------------


def test_it_learns_to_tell_colours(place: Path, tmp_path: Path) -> None:
    clip = fit(place, tmp_path, epochs=30, crop=1.0)
    measured = losses(tmp_path)
    assert len(measured) == 90
    assert sum(measured[-10:]) < 0.6 * sum(measured[:10])
    scores = retrieval(clip, read_pairs(str(place / "captions"), split="val"))
    assert scores["text_to_image_r1"] >= 0.5, "by chance a quarter"
    saved = load_clip(tmp_path).state_dict()
    assert torch.equal(saved["logit_scale"], clip.state_dict()["logit_scale"].half().float())


def test_frozen_blocks_stay_as_they_are(place: Path, tmp_path: Path) -> None:
    clip = fit(place, tmp_path, frozen_blocks=3)
    start = load_clip(place / "weights" / "start").visual.trunk.state_dict()
    same = {
        name for name, tensor in clip.visual.trunk.state_dict().items() if torch.equal(tensor, start[name])
    }
    low = {n for n in start if n.startswith(("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2"))}
    assert same == low
    with pytest.raises(UsageError, match="frozen-blocks is 9; the picture side has"):
        fit(place, tmp_path / "second", frozen_blocks=9)


@pytest.fixture(scope="module")
def whole_run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Any, Path]]:
    """A function that gives a CLIP after a whole run with some blocks frozen, and the run's folder."""

    @functools.cache
    def run(frozen_blocks: int) -> tuple[Any, Path]:
        output = tmp_path_factory.mktemp("whole") / "run"
        return fit(place, output, frozen_blocks=frozen_blocks), output

    return run


@pytest.mark.parametrize(("step", "frozen_blocks"), [(1, 0), (4, 0), (5, 0), (5, 2)])
def test_a_killed_run_goes_on_exactly(
    step: int,
    frozen_blocks: int,
    place: Path,
    whole_run: Callable[[int], tuple[Any, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(Exception):
        pass

    whole, folder = whole_run(frozen_blocks)
    draw = clip_training.draw_batch
    with monkeypatch.context() as patch:

        def kill(pairs: Any, now: int, settings: Any) -> Any:
            if now == step:
                raise Killed
            return draw(pairs, now, settings)

        patch.setattr(clip_training, "draw_batch", kill)
        with pytest.raises(Killed):
            fit(place, tmp_path / "killed", frozen_blocks=frozen_blocks)
    resumed = fit(place, tmp_path / "killed", frozen_blocks=frozen_blocks, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert losses(tmp_path / "killed") == losses(folder)


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = clip_training.draw_batch

    def interrupt(pairs: Any, now: int, settings: Any) -> Any:
        if now == 4:
            signal.raise_signal(signal.SIGINT)
        return draw(pairs, now, settings)

    with monkeypatch.context() as patch:
        patch.setattr(clip_training, "draw_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(place, tmp_path, checkpoint_every=100)
    assert len(losses(tmp_path)) == 5
    with pytest.raises(UsageError, match="was started with model embed_dim = 16"):
        torch.manual_seed(0)
        clip = build_clip(place / "weights" / "start", embed_dim=8, text_width=32, text_layers=1)
        settings = ClipSettings(**{**vars(SETTINGS), "checkpoint_every": 100})
        pairs = read_pairs(str(place / "captions"))
        train_clip(clip, pairs, settings, tmp_path, data={}, validate=dict, resume=True)
    fit(place, tmp_path, checkpoint_every=100, resume=True)
    assert len(losses(tmp_path)) == 18


def test_a_batch_has_no_two_pictures_with_the_same_texts_if_it_can() -> None:
    pairs = [Pair(Path(str(n)), (f"{n % 5} a", f"{n % 5} b")) for n in range(20)]
    batches = [clip_training.draw_batch(pairs, step, ClipSettings(batch_size=4)) for step in range(40)]
    for drawn in batches:
        assert len({number % 5 for number, _ in drawn}) == 4
        assert all(text in pairs[number].texts for number, text in drawn)
    assert {number for drawn in batches for number, _ in drawn} == set(range(20))
    drawn = clip_training.draw_batch(pairs, 0, ClipSettings(batch_size=8))
    assert len({number for number, _ in drawn}) == 8 and len({number % 5 for number, _ in drawn}) == 5


@pytest.mark.parametrize("blocks", [1, 3])
def test_what_frozen_blocks_give_is_computed_once_and_is_the_same(
    blocks: int, place: Path, tmp_path: Path
) -> None:
    clip, pairs = build(place).eval(), read_pairs(str(place / "captions"))
    settings = ClipSettings(**{**vars(SETTINGS), "frozen_blocks": blocks, "crops": 1})
    with clip_training.Crops(clip, pairs, settings, tmp_path) as crops:
        states = crops.states(5, 0)
        pixels = crops.cut(5, 5)
        with torch.no_grad():
            expected, given = clip.encode_image(pixels[None]), crops.encode(states[None])
        assert torch.allclose(given, expected, atol=2e-2 * float(expected.abs().max()))
        clip.visual.trunk.conv_stem.weight.data.zero_()
        assert torch.equal(crops.states(5, 0), states), "not computed again"
        assert not torch.equal(crops.states(6, 0), states)
        assert (tmp_path / clip_training.CROPS_FILE).exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch_size": 50}, "12 pairs are fewer than a batch of 50"),
        ({"batch_size": 0}, "batch-size is 0; expected 1 or more"),
        ({"crop": 1.5}, "crop is 1.5; expected a share above 0"),
        ({"frozen_blocks": -1}, "frozen-blocks is -1"),
        ({"max_steps": 0}, "--max-steps is 0; expected 1 or more"),
        ({"warmup_steps": -1}, "--warmup-steps is -1; expected 0 or more"),
        ({"seed": 2**60}, "--seed is 1152921504606846976; expected 0 to"),
        ({"learning_rate": -1.0}, "learning-rate is -1.0; expected a number, 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    changes: dict[str, Any], reason: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason):
        fit(place, tmp_path / "none", **changes)
    assert not (tmp_path / "none").exists()


# --- scoring ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_what_counting_gives(place: Path) -> None:
    clip = build(place).eval()
    pairs = read_pairs(str(place / "captions"))
    random.Random(1).shuffle(pairs)
    pictures = contrastive.encode_images(clip, [pair.picture for pair in pairs])
    texts = [(text, number) for number, pair in enumerate(pairs) for text in pair.texts]
    encoded = contrastive.encode_texts(clip, [text for text, _ in texts])
    found = dict.fromkeys(("text_to_image_r1", "text_to_image_r5", "image_to_text_r5"), 0)
    for (_, owner), text in zip(texts, encoded, strict=True):
        order = sorted(range(len(pairs)), key=lambda n: -float(pictures[n] @ text))
        found["text_to_image_r1"] += owner == order[0]
        found["text_to_image_r5"] += owner in order[:5]
    for number, picture in enumerate(pictures):
        order = sorted(range(len(texts)), key=lambda n: -float(encoded[n] @ picture))
        found["image_to_text_r5"] += any(texts[n][1] == number for n in order[:5])
    scores = retrieval(clip, pairs)
    for name, count in found.items():
        of = len(texts) if name.startswith("text") else len(pairs)
        assert scores[name] == pytest.approx(count / of)
    first = contrastive.encode_texts(clip, [pair.texts[0] for pair in pairs])
    nearest = [max(range(len(pairs)), key=lambda n: float(first[n] @ picture)) for picture in pictures]
    hits = sum(own == found for own, found in enumerate(nearest))
    assert zero_shot(clip, pairs) == pytest.approx(hits / len(pairs))


# --- the commands -------------------------------------------------------------------------------------------


def run(module: Any, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        module.main()


def test_the_commands_train_and_score(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ("--weights", place / "weights")
    names = ("--names", place / "names", "--kept-names", 4)
    data = ("--data", place / "captions", "--retrieval", place / "captions")
    sizes = ("--embed-dim", 16, "--text-width", 32, "--text-layers", 1)
    steps = ("--epochs", 1, "--batch-size", 8, "--warmup-steps", 1)
    run(train.clip, *data, *names, "--output", tmp_path / "run", "--start", "start", *sizes, *steps, *weights)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in rows) == 3, "12 captions and 12 of 16 names, 8 a step"
    printed = capsys.readouterr().out
    scored, see = (line.partition("llama")[2] for line in printed.splitlines() if line.startswith("    "))
    assert f" eval clip --model {tmp_path / 'run'} --retrieval {place / 'captions'} --names " in scored
    assert f" --tower {tmp_path / 'run'} --output {tmp_path / 'run-sees'} " in see
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["llama-adapter", *shlex.split(scored[scored.index("eval") :])])
        assert main() == 0
    capsys.readouterr()

    json_file = tmp_path / "scores.json"
    run(
        *(eval.clip, "--model", tmp_path / "run", "--retrieval", place / "captions", *names),
        *("--json", json_file),
    )
    scores = json.loads(json_file.read_text())
    assert set(scores) == {
        *(f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)),
        "zero_shot",
    }
    assert scores["image_to_text_r10"] == 1.0, "of 8 texts"
    printed = capsys.readouterr().out
    assert "4 pictures, 8 texts" in printed and "zero-shot among 4 names" in printed
    # The file has half precision; scores in training had full precision.
    last = [row for row in rows if "zero_shot" in row][-1]
    assert scores["text_to_image_r5"] == pytest.approx(last["text_to_image_r5"], abs=0.2)


@pytest.mark.parametrize(
    ("module", "arguments", "reason"),
    [
        (eval.clip, ("--model", "start"), "nothing to score"),
        (eval.clip, ("--model", "none-such", "--names", "x"), "none-such"),
        (train.clip, ("--data", "nowhere", "--output", "x"), "nowhere"),
    ],
)
def test_the_commands_refuse(module: Any, arguments: tuple[str, ...], reason: str, place: Path) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        run(module, *arguments, "--weights", place / "weights")
    assert "\n" not in str(error.value)
