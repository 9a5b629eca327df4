"""``train.vqa`` from the command line, on a tiny base and a tiny tower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.vqa
import llama_adapter.training.trainer
import train.alpaca
import train.vqa
from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.model import LlamaAdapter
from llama_adapter.weights.catalogue import DEFAULT_TOWER
from tests.commands.vqa_runs import (
    TEXT,
    options,
    options_to_go_on,
    refusal,
    run,
    score,
)
from tests.finished_runs import losses
from tests.pasted import run_pasted


@pytest.mark.parametrize(
    ("data", "more", "script"),
    [
        ("questions", [], "vqa"),
        ("captions", ["--limit", "12"], "captions"),
        ("questions", ["--no-images"], "vqa"),
        ("text", [], "alpaca"),
    ],
)
def test_the_commands_that_it_ends_with_work(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: str,
    more: list[str],
    script: str,
) -> None:
    source = TEXT if data == "text" else place / data
    given = options(place, tmp_path / "run", "--max-steps", "1", *more)
    given[given.index("--data") + 1] = str(source)
    if data == "text":
        del given[given.index("--bottleneck") : given.index("--bottleneck") + 2]
    run(train.vqa, given)
    ask, _, score = run_pasted(capsys.readouterr().out, monkeypatch)
    assert score[:2] == ["eval", script]
    assert ("--image" in ask) == (data != "text" and "--no-images" not in more)


def test_it_learns_from_a_mix_that_the_adapter_remembers(trained: Path) -> None:
    # 30 questions less 4, 36 captions less 4 and half of 20 rows of text, in batches of 6, four times.
    measured = losses(trained)
    assert len(measured) == 4 * 12
    assert sum(measured[-6:]) < 0.8 * sum(measured[:6])
    config = load_adapter(trained).config
    assert config.template == "brief" and config.base == "tiny-base"
    assert config.vision is not None
    assert (config.vision.tower, config.vision.depths, config.vision.bottleneck) == (DEFAULT_TOWER, (1, 2), 8)
    sources = config.training["data"]["sources"]
    assert [(source["source"], source["weight"]) for source in sources] == [
        ("questions", 1.0),
        ("captions", 1.0),
        (TEXT.name, 0.5),
    ]
    assert len({source["fingerprint"] for source in sources}) == 3


def test_the_control_without_pictures_is_an_adapter_for_text(place: Path, tmp_path: Path) -> None:
    run(
        train.vqa,
        options(place, tmp_path / "blind", "--no-images", "--max-steps", "2", "--cache", "/dev/null"),
    )
    assert load_adapter(tmp_path / "blind").config.vision is None
    assert len(losses(tmp_path / "blind")) == 2


def test_rows_are_also_shown_without_their_pictures(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []

    class Stopped(Exception): ...

    def stop(self: Any, **_: Any) -> float:
        trainers.append(self)
        raise Stopped

    monkeypatch.setattr("llama_adapter.training.trainer.Trainer.run", stop)
    with pytest.raises(Stopped):
        run(train.vqa, options(place, tmp_path / "run", "--text-of", f"{place / 'questions'}=2"))
    (trainer,) = trainers
    seeing = [example for example in trainer.train_examples if example.images]
    blind = [example for example in trainer.train_examples if not example.images]
    assert {e.row for e in seeing} == {e.row for e in blind}, "the same rows are kept back"
    assert [trainer.occurrences[trainer.train_examples.index(e)] for e in (seeing[0], blind[0])] == [1, 2]
    assert list(trainer.validation_examples) == ["questions", "questions (text)"]
    assert [source["images"] for source in trainer.data["sources"]] == [True, False]


def test_yes_and_no_are_shown_as_often(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Counter[str]] = {}
    accumulate = llama_adapter.training.trainer.accumulate_gradient

    def note(model: LlamaAdapter, examples: Sequence[Example], **kwargs: Any) -> float:
        for example in examples:
            words = [token for token in example.labels if token != IGNORED]
            shown.setdefault(output.name, Counter())[model.tokenizer.decode(words)] += 1  # type: ignore[union-attr]
        return accumulate(model, examples, **kwargs)

    monkeypatch.setattr("llama_adapter.training.trainer.accumulate_gradient", note)
    for more in ((), ("--balance-yes-no",)):
        output = tmp_path / f"run{len(more)}"
        run(train.vqa, options(place, output, *more))
    kept, even = (
        {word.partition("<")[0].strip(): n for word, n in shown[name].items()} for name in ("run0", "run1")
    )
    assert kept["no"] / kept["yes"] > 1.5 > even["no"] / even["yes"]
    assert sum(even.values()) == sum(kept.values())


def test_training_starts_from_an_adapter(place: Path, trained: Path, tmp_path: Path) -> None:
    once = ("--max-steps", "1", "--learning-rate", "1e-9")
    run(train.vqa, options_to_go_on(place, tmp_path / "on", trained, *once))
    before, after = load_adapter(trained), load_adapter(tmp_path / "on")
    assert after.config.vision == before.config.vision and after.config.template == "brief"
    for name, tensor in before.state_dict().items():
        assert (after.state_dict()[name] - tensor).abs().max() < 1e-6, name
    assert losses(tmp_path / "on")[0] < 0.8 * losses(trained)[0]


@pytest.mark.parametrize("more", [["0"], ["-1", "0"]], ids=["colours", "figure and colours"])
def test_depths_can_be_added_to_the_adapter_that_it_starts_from(
    place: Path, trained: Path, tmp_path: Path, more: list[str]
) -> None:
    once = ("--max-steps", "1", "--learning-rate", "1e-9", "--rate", "projection=1e-9")
    words = options_to_go_on(place, tmp_path / "on", trained, *once)
    assert "sees with the depths 1 2; lower ones can be added, but none taken away" in refusal(
        train.vqa, [*words, "--depths", "0", "1"]
    )
    run(train.vqa, [*words, "--depths", *more, "1", "2"])
    before, after = load_adapter(trained), load_adapter(tmp_path / "on")
    assert before.config.vision and after.config.vision
    assert before.config.vision.depths == (1, 2)
    assert after.config.vision.depths == (*map(int, more), 1, 2)
    added = after.config.vision.feature_width - before.config.vision.feature_width
    features = torch.randn(4, after.config.vision.feature_width)
    found, expected = after.projection(features), before.projection(features[:, added:])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    weight = after.projection.down.weight[:, :added]
    assert 0 < weight.abs().max() < 1e-6, "what is added is learnt"


def test_an_adapter_is_trained_on_with_scales_and_biases_which_it_keeps(
    place: Path, trained: Path, tmp_path: Path
) -> None:
    def on(output: Path, start: Path, *more: str) -> list[str]:
        return options_to_go_on(place, output, start, "--max-steps", "2", *more)

    run(train.vqa, on(tmp_path / "tuned", trained, "--rate", "scales=0.01", "--method", "prompts+scales"))
    tuned = load_adapter(tmp_path / "tuned")
    assert tuned.scales.values.abs().max() > 1e-3
    run(train.vqa, on(tmp_path / "again", tmp_path / "tuned", "--rate", "scales=1e-9"))
    again = load_adapter(tmp_path / "again")
    assert (again.scales.values - tuned.scales.values).abs().max() < 1e-6
    run(
        eval.vqa,
        score(place, tmp_path / "again", "--data", str(place / "questions"), "--max-new-tokens", "4"),
    )


def test_an_adapter_for_text_learns_to_see(place: Path, tmp_path: Path) -> None:
    text = ["--output", str(tmp_path / "text"), "--data", str(TEXT), "--base", "tiny-base", "--weights"]
    text += [str(place / "weights"), "--validation-rows", "4", "--max-steps", "2", "--prompt-length", "3"]
    run(train.alpaca, text)
    words = options(place, tmp_path / "sees", "--start-from", str(tmp_path / "text"), "--max-steps", "1")
    run(train.vqa, [word for word in words if word not in ("--prompt-length", "3")])
    before, after = load_adapter(tmp_path / "text"), load_adapter(tmp_path / "sees")
    assert before.config.vision is None and after.config.vision is not None
    assert after.config.template == "brief"
    assert (after.prompts.embeddings - before.prompts.embeddings).abs().max() < 0.2, "one step away"


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(place: Path, tmp_path: Path) -> None:
    mix = ("--data", f"{TEXT}=0.5", "--max-steps", "6", "--checkpoint-every", "2")
    run(train.vqa, options(place, tmp_path / "whole", *mix))
    run(train.vqa, options(place, tmp_path / "cut", *mix))
    folder = tmp_path / "cut" / "checkpoints"
    for name in ("step-0000006.pt", "step-0000006.json"):
        (folder / name).unlink()  # as the folder was after step 4
    run(train.vqa, options(place, tmp_path / "cut", *mix, "--resume"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    final = "adapter_model.safetensors"
    assert (tmp_path / "cut" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
    changed = ("--data", f"{TEXT}=0.7", *mix[2:])
    assert "data sources" in refusal(train.vqa, options(place, tmp_path / "cut", *changed, "--resume"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--data", "rows.json=x"], "--data rows.json=x: 'x' is not a weight; expected SOURCE=NUMBER"),
        (["--data", "rows.json="], "'' is not a weight"),
        (["--text-of", "rows.json=x"], "--text-of rows.json=x: 'x' is not a weight"),
        (["--data", "rows.json=0"], "the weight is 0; expected one above 0 and below 1000"),
        (["--data", "rows.json=-1"], "the weight is -1"),
        (["--data", "rows.json=nan"], "the weight is nan"),
        (["--data", "rows.json=1e9"], "the weight is 1e+09"),
        (["--data", "rows.json=2"], "rows.json: no such file or folder"),
        (["--split", "nothing"], "has no split 'nothing'; its splits are test, train"),
        (["--tower", "nothing"], "no tower 'nothing'"),
        (
            ["--depths", "1", "9"],
            "has the depths 1 to 2, 0 (the picture's colours) and -1 (what stands out from its border), "
            "lowest first; 1, 9 given",
        ),
        (["--image-tokens", "2"], "image tokens: 2 given; choose 1, or one for each of the 3 prompts"),
        (["--bottleneck", "0"], "bottleneck: 0 given; choose 1 or more"),
        (["--rate", "projection=0"], "--rate projection is 0.0; expected a number above 0"),
        (["--rate", "projection"], "argument --rate: projection: expected GROUP=VALUE"),
        (["--option", "rank"], "argument --option: rank: expected NAME=VALUE"),
        (["--option", "rank=3"], "method 'prompts' has no option 'rank'; it has prompt_length"),
        (["--option", "prompt_length=many"], "option prompt_length=many: expected a value of type int"),
        (["--rate", "scales=0.1"], "no group 'scales'; it has prompts, gates, projection"),
        (["--method", "prompts+nothing"], "there is no 'nothing'; choose among prompts, "),
        (["--image-root", "/nowhere"], "/nowhere/red-0.png: there is no such file"),
        (["--start-from", "nothing"], "no adapter 'nothing'"),
        (["--resume"], "no run to resume"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_and_leave_nothing(more: list[str], told: str, place: Path, tmp_path: Path) -> None:
    assert told in refusal(train.vqa, options(place, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_parts_of_the_adapter_that_it_starts_from_are_kept(
    place: Path, trained: Path, tmp_path: Path
) -> None:
    words = options_to_go_on(place, tmp_path / "run", trained, "--method", "scales")
    assert "--method scales leaves out 'prompts'" in refusal(train.vqa, words)


def test_what_start_from_settles_cannot_be_given(place: Path, trained: Path, tmp_path: Path) -> None:
    words = options(place, tmp_path / "run", "--start-from", str(trained))
    assert "--prompt-length is settled by --start-from" in refusal(train.vqa, words)


def test_options_for_pictures_need_pictures(place: Path, tmp_path: Path) -> None:
    words = options(place, tmp_path / "run")
    words[words.index("--data") + 1] = str(TEXT)
    assert refusal(train.vqa, words) == "--bottleneck is for pictures, and no row has one; leave it out"


def test_rows_of_pictures_are_not_for_train_alpaca(place: Path, tmp_path: Path) -> None:
    data = ["--data", str(place / "questions"), "--output", str(tmp_path / "run"), "--base", "tiny-base"]
    said = refusal(train.alpaca, [*data, "--weights", str(place / "weights")])
    assert "row 1 names a picture; that is for train.vqa" in said
