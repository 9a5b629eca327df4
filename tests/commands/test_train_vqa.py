"""train.vqa, eval.captions and eval.vqa from the command line, on a tiny base and a tiny tower."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.captions
import eval.vqa
import llama_adapter.training.trainer
import train.alpaca
import train.vqa
from llama_adapter.common.errors import UsageError, run_command
from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.model import LlamaAdapter
from llama_adapter.weights.catalogue import DEFAULT_TOWER
from tests.conftest import CHECKOUT
from tests.finished_runs import losses
from tests.pasted import run_pasted
from tests.tiny_models import build_tiny_base, build_tiny_tower_folder, draw_picture

TEXT = CHECKOUT / "examples" / "instructions.jsonl"
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, and pictures of a single colour with questions and with captions."""
    folder = tmp_path_factory.mktemp("vqa")
    build_tiny_base(folder / "weights" / "tiny-base")
    build_tiny_tower_folder(folder / "weights" / DEFAULT_TOWER)
    questions, captions = [], []
    for (name, colour), number in itertools.product(COLOURS.items(), range(6)):
        file = f"{name}-{number}.png"
        shade = tuple(max(0, value - 8 * number) for value in colour)
        for data in ("questions", "captions"):
            draw_picture(folder / data / "images" / file, shade)
        split = {"split": "test" if number == 5 else "train"}
        questions.append({"image": file, "question": "What colour?", "answer": name, **split})
        questions.append(
            {"image": file, "question": "Is it red?", "answer": "yes" if name == "red" else "no", **split}
        )
        captions.append({"image": file, "captions": [f"It is {name} .", f"A {name} square ."]})
    (folder / "questions" / "qa.json").write_text(json.dumps(questions))
    (folder / "captions" / "captions.json").write_text(json.dumps(captions))
    return folder


def options(place: Path, output: Path, *more: str) -> list[str]:
    given: dict[str, Any] = {"--data": place / "questions", "--output": output, "--base": "tiny-base"}
    given |= {"--weights": place / "weights", "--cache": place / "cache", "--template": "brief"}
    given |= {"--epochs": 2, "--warmup-epochs": 0.5, "--batch-size": 6, "--learning-rate": 0.1}
    given |= {"--validation-rows": 4, "--validate-every": 100, "--prompt-length": 3}
    if "--no-images" not in more:
        given["--bottleneck"] = 8
    return [str(part) for pair in given.items() for part in pair] + list(more)


def options_to_go_on(place: Path, output: Path, start: Path, *more: str) -> list[str]:
    """Options that start from an adapter, without those that it settles."""
    words = options(place, output, "--start-from", str(start))
    pairs = zip(words[::2], words[1::2], strict=True)
    settled = {"--template", "--bottleneck", "--prompt-length"}
    return [word for pair in pairs if pair[0] not in settled for word in pair] + list(more)


def score(place: Path, adapter: Path, *more: str) -> list[str]:
    given = {"--adapter": adapter, "--weights": place / "weights", "--cache": place / "cache"}
    return [str(part) for pair in given.items() for part in pair] + list(more)


def run(module: Any, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        module.main()


def refusal(module: Any, arguments: list[str]) -> str:
    """The line with which a command refuses something."""
    with pytest.raises(UsageError) as error:
        run(module, arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


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


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """An adapter trained on questions, captions and text."""
    output = place / "trained"
    sources = ("--data", str(place / "captions"), "--data", f"{TEXT}=0.5")
    rates = ("--rate", "gates=0.2", "--rate", "projection=0.02")
    run(train.vqa, options(place, output, *sources, "--epochs", "4", *rates))
    return output


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


def test_answers_are_scored_against_both_controls(
    place: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    data = ("--data", str(place / "questions"), "--json", str(file), "--max-new-tokens", "4")
    run(eval.vqa, score(place, trained, *data))
    figures = json.loads(file.read_text())
    assert set(figures) == {"accuracy", "accuracy_shuffled", "accuracy_no_image", "rows"}
    assert figures["rows"] == 6, "of the split test"
    assert all(0 <= figures[name] <= 1 for name in figures if name != "rows")
    out, err = capsys.readouterr()
    for told in ("picture of another row", "no picture", "yes/no", "colour", "95 % interval"):
        assert told in out
    pattern = r"right where the answer is yes: (\S+)% of (\d); where the answer is no: (\S+)% of (\d)\n"
    [sides] = re.findall(pattern, out)
    yes_share, yes, no_share, no = map(float, sides)
    [kinds] = re.findall(r"^ +all +colour +yes/no\nadapter +\S+ +\S+ +(\S+)%\n", out, re.MULTILINE)
    assert yes > 0 and no > 0
    assert yes_share * yes + no_share * no == pytest.approx(float(kinds) * (yes + no), abs=1)
    assert "6 rows" in err

    run(eval.vqa, score(place, trained, *data, "--split", "train", "--limit", "4", "--json", "-"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 8, "of four pictures"
    run(eval.vqa, score(place, trained, *data, "--split", "train", "--validation-rows", "4"))
    assert json.loads(file.read_text())["rows"] == 4


def test_captions_are_scored_against_both_controls(
    place: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocoevalcap")
    file = tmp_path / "figures.json"
    data = ("--data", str(place / "captions"), "--json", str(file), "--max-new-tokens", "8", "--samples", "2")
    run(eval.captions, score(place, trained, *data, "--beams", "2"))
    figures = json.loads(file.read_text())
    assert {"cider", "bleu4", "cider_shuffled", "rows"} <= set(figures)
    assert figures["rows"] == 18, "rows that name no split belong to every one"
    out = capsys.readouterr().out
    assert out.count("a person  It is ") == 2 and "no picture" in out
    run(eval.captions, score(place, trained, *data, "--limit", "5"))
    assert json.loads(file.read_text())["rows"] == 5


class Answers:
    """Stands in for a model: answers with the colour of the picture, whatever the adapter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.beams: set[int] = set()
        monkeypatch.setattr("llama_adapter.answering.records_answered.answer_records", self)

    def __call__(self, model: Any, records: list[Any], *, beams: int, **_: Any) -> list[str]:
        self.asked += records
        self.beams.add(beams)
        return [f"{r.images[0].name.split('-')[0].title()}." if r.images else "blue" for r in records]


def test_the_figures_are_fractions_of_right_answers(
    place: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(monkeypatch)
    file = tmp_path / "figures.json"
    data = ("--data", str(place / "questions"), "--json", str(file))
    run(eval.vqa, score(place, trained, *data))
    assert json.loads(file.read_text()) == {
        "accuracy": 3 / 6,  # all answers with a colour are right, and none with yes or no
        "accuracy_shuffled": 0.0,
        "accuracy_no_image": 1 / 6,
        "rows": 6,
    }
    assert len(answers.asked) == 6 + 6 + 2, "the same question about the same picture is asked once"
    assert answers.beams == {1}


@pytest.mark.parametrize("data", ["questions", "captions"])
def test_the_rows_that_were_kept_back_are_scored(
    place: Path, trained: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a training without pictures, and if some rows have none."""
    pytest.importorskip("pycocoevalcap")
    name = {"questions": "qa.json", "captions": "captions.json"}[data]
    mixed = tmp_path / data
    mixed.mkdir()
    (mixed / "images").symlink_to(place / data / "images")
    rows = json.loads((place / data / name).read_text())
    rows[2:2] = [{"question": f"{n} and 1?", "answer": str(n + 1)} for n in range(10)]
    (mixed / name).write_text(json.dumps(rows))

    learnt: list[set[int]] = []

    class Stop(Exception):
        pass

    def stop(self: Any, **_: Any) -> float:
        learnt.append({example.row for example in self.train_examples})
        raise Stop

    monkeypatch.setattr("llama_adapter.training.trainer.Trainer.run", stop)
    kept = ("--data", str(mixed), "--validation-rows", "12")
    for more in ((), ("--no-images",)):
        with pytest.raises(Stop):
            run(train.vqa, options(place, tmp_path / "run", *kept, *more)[2:])
    assert learnt[0] == learnt[1]
    answers = Answers(monkeypatch)
    module = {"questions": eval.vqa, "captions": eval.captions}[data]
    run(module, score(place, trained, *kept, "--split", "train", "--beams", "3"))
    assert answers.beams == {3}
    assert answers.asked and not {record.row for record in answers.asked} & learnt[0]


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


def test_what_cannot_be_scored_is_told(
    place: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, captions = (("--data", str(place / name)) for name in ("questions", "captions"))
    said = refusal(eval.captions, score(place, trained, *questions, "--split", "test"))
    assert "row 11 holds no captions; score it with eval.vqa" in said
    for module in (eval.vqa, eval.captions):
        said = refusal(module, score(place, trained, "--data", str(TEXT)))
        assert "no row names a picture; score it with eval.alpaca" in said
        said = refusal(module, [*score(place, trained, *captions)[2:], "--base", "tiny-base"])
        assert "there is no adapter to score" in said
    run(eval.vqa, score(place, trained, *questions, "--limit", "1"))
    missing = "control missing: picture of another row: all rows have the same picture"
    assert missing in capsys.readouterr().out


def test_an_adapter_that_never_saw_is_scored_without_pictures(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = tmp_path / "blind"
    given = options(place, blind, "--no-images", "--max-steps", "1")
    said = refusal(train.vqa, [*given, "--bottleneck", "8"])
    assert said == "--bottleneck is for pictures, which --no-images leaves out; give one of the two"
    run(train.vqa, given)
    questions = ("--data", str(place / "questions"))
    run(eval.vqa, score(place, blind, *questions, "--json", str(tmp_path / "scores.json")))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["accuracy"] == scores["accuracy_shuffled"] == scores["accuracy_no_image"]
    assert scores["rows"] == 6 and "can't see pictures" in capsys.readouterr().out
    said = refusal(eval.captions, score(place, blind, "--data", str(place / "captions")))
    assert "all its captions are the same" in said


def test_rows_of_pictures_are_not_for_train_alpaca(place: Path, tmp_path: Path) -> None:
    data = ["--data", str(place / "questions"), "--output", str(tmp_path / "run"), "--base", "tiny-base"]
    said = refusal(train.alpaca, [*data, "--weights", str(place / "weights")])
    assert "row 1 names a picture; that is for train.vqa" in said


@pytest.mark.parametrize("module", ["train.vqa", "eval.vqa", "eval.captions"])
def test_a_mistake_is_one_line_and_code_2(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "nowhere.json"] + ["--output", "nowhere"] * (module == "train.vqa")
    for more, told in (
        (words, "nowhere.json: no such file or folder"),
        (["--nonsense"], f"{module} --help`"),
    ):
        assert run_command(lambda more=more: run(sys.modules[module], more)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and told in said


def test_as_a_process_too() -> None:
    command = [sys.executable, "-m", "eval.vqa", "--nonsense"]
    wrong = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
