"""The reader that teaches a projection in the decoder's place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import PictureFile, Record
from llama_adapter.data.turns import Turn
from llama_adapter.methods.projection import Projection
from llama_adapter.training.reader import Lesson, PictureRow, picture_rows
from tests.tiny_models import VISION, build_tiny_model

FEATURES = VISION.feature_width


def new_projection() -> Projection:
    adapter = build_tiny_model().new_adapter("sees", vision=VISION, seed=1)
    projection = adapter.find(Projection)
    assert projection is not None
    return projection


def asked_pictures(count: int, *, seed: int) -> tuple[list[PictureRow], dict[PictureFile, Tensor]]:
    """Pictures whose first feature is their size and whose second is their colour, asked for each."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[PictureRow] = []
    features: dict[PictureFile, Tensor] = {}
    for number in range(count):
        picture = Path(f"{seed}-{number}.png")
        features[picture] = torch.randn(FEATURES, generator=generator)
        large, red = (features[picture][:2] > 0).tolist()
        rows.append(PictureRow(picture, ("what", "size"), ("large" if large else "small",)))
        rows.append(PictureRow(picture, ("what", "colour"), ("red" if red else "blue",)))
    return rows, features


def test_a_projection_learns_what_pictures_show() -> None:
    rows, features = asked_pictures(300, seed=1)
    kept_back, more = asked_pictures(60, seed=2)
    told: list[int] = []
    lesson = Lesson(rows, kept_back)
    result = lesson.teach(new_projection(), {**features, **more}, epochs=40, seed=0, progress=told.append)
    assert result.rows == len(kept_back)
    assert result.exchanged is not None
    assert result.loss < 0.35 < 0.69 < result.exchanged  # nats; a guess between two words costs 0.69
    assert told == sorted(told) and told[-1] == 40 * len(rows)
    assert re.fullmatch(
        r"loss 0\.\d{3} nats a word on 120 rows kept back; \d\.\d{3} with another row's picture \(.*\)",
        str(result),
    )


def test_only_the_lower_layer_changes_and_a_seed_decides_how() -> None:
    rows, features = asked_pictures(20, seed=1)
    before, *after = (new_projection() for _ in range(4))
    state = torch.get_rng_state()
    for projection, seed in zip(after, (0, 0, 1), strict=True):
        Lesson(rows, []).teach(projection, features, epochs=10, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    former, learnt = before.state_dict(), after[0].state_dict()
    changed = {name for name in former if not torch.equal(former[name], learnt[name])}
    assert changed == {"down.weight", "down.bias"}
    assert torch.equal(after[0].down.weight, after[1].down.weight)
    assert not torch.equal(after[0].down.weight, after[2].down.weight)
    assert after[0].down.weight.grad is None


def test_each_pass_reads_every_row_once_with_new_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, features = asked_pictures(20, seed=1)
    # Of very different sizes: the noise is measured in each feature's own standard deviations.
    spread = torch.logspace(-1, 3, FEATURES)
    features = {picture: values * spread for picture, values in features.items()}
    projection, read = new_projection(), []
    projection.fit(features.values())
    hidden = projection.hidden
    monkeypatch.setattr(projection, "hidden", lambda features: read.append(features) or hidden(features))
    Lesson(rows, []).teach(projection, features, epochs=3, seed=0)
    pictures = torch.stack(list(features.values()))
    noises = []
    for noisy in read:
        differences = (noisy[:, None] - pictures) * projection.scale  # (rows, pictures, F)
        nearest = differences.square().sum(2).argmin(1)
        assert nearest.bincount().tolist() == [2] * len(pictures)  # each is asked about twice
        noises.append(differences[range(len(rows)), nearest])
        deviations = noises[-1].std(0)
        assert deviations.min() > 0.15 and deviations.max() < 0.5
    assert len(noises) == 3
    assert not torch.equal(noises[0].sort(0).values, noises[1].sort(0).values)


def test_rows_are_questions_about_one_picture() -> None:
    one, other = Path("one.png"), Path("other.png")
    asked, said = Turn("user", "What IS it?"), Turn("assistant", "A dog.")
    context = Turn("assistant", "A cat.", learnt=False)
    records = [
        Record((Turn("system", "Be brief."), asked, said, asked, context), 1, (one,)),
        Record((asked, said), 2, (one, other)),
        Record((asked, said), 3),
    ]
    assert picture_rows(records) == [PictureRow(one, ("what", "is", "it"), ("a", "dog"))]


def test_words_that_are_too_rare_are_told_and_their_rows_left_out() -> None:
    rows, features = asked_pictures(1, seed=1)
    with pytest.raises(UsageError, match=r"no word is in 4 or more answers \(2 questions") as told:
        Lesson(rows, [])
    assert "\n" not in str(told.value)
    rare = PictureRow(rows[0].picture, ("what",), ("unique",))
    lesson = Lesson([*rows * 4, rare], [rare])
    assert lesson.rows == rows * 4 and lesson.kept_back == []
    result = lesson.teach(new_projection(), features, epochs=1, seed=0)
    assert str(result) == "no row kept back has a picture and a word that it knows"


def test_a_single_picture_cannot_be_exchanged() -> None:
    rows, features = asked_pictures(20, seed=1)
    result = Lesson(rows, rows[:2]).teach(new_projection(), features, epochs=1, seed=0)
    assert result.exchanged is None
    assert str(result).endswith("nats a word on 2 rows kept back")
