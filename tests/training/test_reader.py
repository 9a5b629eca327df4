"""The reader that teaches a projection in the decoder's place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import PictureFile, Record
from llama_adapter.data.turns import Turn
from llama_adapter.methods.projection import Projection
from llama_adapter.training.reader import PictureRow, picture_rows, teach_projection
from tests.tiny_models import VISION, build_tiny_model

FEATURES = VISION.feature_width


def new_projection() -> Projection:
    adapter = build_tiny_model().new_adapter("sees", vision=VISION, seed=1)
    projection = adapter.find(Projection)
    assert projection is not None
    return projection


def asked_pictures(count: int, *, seed: int) -> tuple[list[PictureRow], dict[PictureFile, Tensor]]:
    """Pictures whose first feature is their size and whose second is their colour, asked for one of them."""
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
    result = teach_projection(
        new_projection(), rows, kept_back, {**features, **more}, epochs=40, seed=0, progress=told.append
    )
    assert result.rows == len(kept_back)
    assert result.loss < 0.35 < 0.69 < result.exchanged  # nats; a guess between two words costs 0.69
    assert told == sorted(told)
    assert "on 120 rows kept back" in str(result)


def test_only_the_lower_layer_changes_and_a_seed_decides_how() -> None:
    rows, features = asked_pictures(20, seed=1)
    before, *after = (new_projection() for _ in range(4))
    state = torch.get_rng_state()
    for projection, seed in zip(after, (0, 0, 1), strict=True):
        teach_projection(projection, rows, [], features, epochs=10, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    former, learnt = before.state_dict(), after[0].state_dict()
    assert {name for name in former if not torch.equal(former[name], learnt[name])} == {
        "down.weight",
        "down.bias",
    }
    assert torch.equal(after[0].down.weight, after[1].down.weight)
    assert not torch.equal(after[0].down.weight, after[2].down.weight)
    assert after[0].down.weight.grad is None


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


def test_words_that_are_too_rare_are_told() -> None:
    rows, features = asked_pictures(1, seed=1)
    with pytest.raises(
        UsageError, match=r"the reader has 2 questions .* or leave out --reader-epochs"
    ) as told:
        teach_projection(new_projection(), rows, [], features, epochs=1, seed=0)
    assert "\n" not in str(told.value)


def test_nothing_kept_back_is_said() -> None:
    rows, features = asked_pictures(20, seed=1)
    result = teach_projection(new_projection(), rows, [], features, epochs=1, seed=0)
    assert str(result) == "no row was kept back"
