"""What `train.shipped` carries over, pieces, features and a base in its GGUF's size, and how it trains."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GgufConfig

from llama_adapter.commands import train_shipped
from llama_adapter.commands.train_shipped import (
    BASE,
    COMMON,
    CONTENTS,
    GGUF_FILE,
    SETS,
    STAGES,
    WEIGHTS_FILE,
    Stage,
    pack,
    read_pieces,
    replace_pictures,
    restore_base,
    restore_features,
    run,
    write_pieces,
    write_tied,
)
from llama_adapter.common.errors import UsageError
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.training import trainer as training
from llama_adapter.vision.features import FeatureCache
from llama_adapter.vision.tower import load_tower
from llama_adapter.weights.fetch import PROVENANCE
from tests.finished_runs import losses
from tests.mixed_sets import write_sets
from tests.tiny import build_tiny_tokenizer
from tests.tiny_gguf import build_tiny_gguf
from tests.tiny_models import build_tiny_tower_folder, draw_picture

# --- pieces -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    for name, size in (("wheels/one.whl", 5000), ("data/rows.json", 300), ("data/empty.json", 0)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(random.Random(name).randbytes(size))
    return folder


@pytest.fixture
def pieces(folder: Path, tmp_path: Path) -> Path:
    write_pieces(folder, tmp_path / "pieces", 1000)
    return tmp_path / "pieces"


def test_pieces_are_small_and_are_joined_exactly(folder: Path, pieces: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(pieces.glob("piece-*"))]
    assert len(sizes) > 5 and set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    assert read_pieces(pieces, tmp_path / "again") == tmp_path / "again"
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    again = tmp_path / "again"
    assert {path.relative_to(again) for path in again.rglob("*") if path.is_file()} == set(files)
    assert all((again / name).read_bytes() == path.read_bytes() for name, path in files.items())


def test_pieces_are_unpacked_once(pieces: Path, tmp_path: Path) -> None:
    again = read_pieces(pieces, tmp_path / "again")
    (again / "kept").touch()
    (pieces / CONTENTS).unlink()
    assert read_pieces(pieces, again) == again and (again / "kept").exists()


def test_a_piece_that_is_missing_or_damaged_is_named(pieces: Path, tmp_path: Path) -> None:
    content = (pieces / "piece-002").read_bytes()
    (pieces / "piece-002").write_bytes(content[:-1] + b"?")
    with pytest.raises(UsageError, match="piece-002 is damaged; carry it over again"):
        read_pieces(pieces, tmp_path / "again")
    (pieces / "piece-002").unlink()
    with pytest.raises(UsageError, match=r"1 of \d+ pieces are missing, first piece-002"):
        read_pieces(pieces, tmp_path / "again")
    (pieces / CONTENTS).unlink()
    with pytest.raises(UsageError, match=f"has no {CONTENTS}"):
        read_pieces(pieces, tmp_path / "again")
    assert not (tmp_path / "again").exists()


# --- features -----------------------------------------------------------------------------------------------


def test_features_stand_in_for_pictures(tmp_path: Path) -> None:
    tower = load_tower(str(build_tiny_tower_folder(tmp_path / "tower")))
    data = tmp_path / "data"
    pictures = [draw_picture(data / f"{colour}.png", colour) for colour in ("red", "green", "blue")]
    wanted = FeatureCache(tower, tmp_path / "here").encode(pictures)
    replace_pictures(data, FeatureCache(tower, tmp_path / "here"))
    assert all(path.stat().st_size < 100 for path in pictures)
    restore_features(data, tower)
    there = FeatureCache(tower, restore_features(data, tower))  # again, as a second call of the command does
    torch.testing.assert_close(there.encode(pictures), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.equal(wanted[0], wanted[1])


# --- the base -----------------------------------------------------------------------------------------------


def build_untied(path: Path, **settings: Any) -> Path:
    """A GGUF file whose embeddings and head are two matrices, with metadata of several types."""
    build_tiny_gguf(path, "qwen2", ("Q5_0", "Q8_0", "Q6_K"), tie_word_embeddings=False, **settings)
    plain = gguf.GGUFReader(path)
    whole = path.with_name("whole.gguf")
    writer = gguf.GGUFWriter(whole, "qwen2")
    for field in plain.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_string("general.name", "Tiny – größer")
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_array("tokenizer.ggml.tokens", ["one", "zwölf", "\u0120three"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 4])
    for tensor in plain.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole.replace(path)


def test_a_tied_file_has_the_head_in_the_place_of_the_embeddings(tmp_path: Path) -> None:
    source = build_untied(tmp_path / "source.gguf")
    write_tied(source, tmp_path / "tied.gguf")
    assert (tmp_path / "tied.gguf").stat().st_size < source.stat().st_size
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "tied.gguf")
    old = {tensor.name: tensor for tensor in before.tensors}
    new = {tensor.name: tensor for tensor in after.tensors}
    assert new.keys() == old.keys() - {"output.weight"}
    head, embeddings = old["output.weight"], old["token_embd.weight"]
    assert bytes(head.data) != bytes(embeddings.data)
    for name, tensor in new.items():
        same = head if name == "token_embd.weight" else old[name]
        assert tensor.tensor_type == same.tensor_type, name
        assert tensor.shape.tolist() == same.shape.tolist(), name
        assert bytes(tensor.data) == bytes(same.data), name
    kept = [name for name in before.fields if not name.startswith("GGUF.")]
    assert sorted(kept) == sorted(name for name in after.fields if not name.startswith("GGUF."))
    for name in kept:
        assert after.fields[name].contents() == before.fields[name].contents(), name
        assert after.fields[name].types == before.fields[name].types, name


def write_base(source: Path, folder: Path) -> Path:
    """The folder of the base that is fetched as a file with two matrices: the head's serves as both."""
    decoder = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    decoder.get_input_embeddings().weight = decoder.lm_head.weight
    decoder.config.tie_word_embeddings = True
    decoder.tie_weights()
    decoder.half().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    (folder / PROVENANCE).write_text("{}")
    return folder


# --- all of it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The pieces of made-up sets and of a tiny base, and what they were made from."""
    place = tmp_path_factory.mktemp("carried")
    data = write_sets(place / "sets")
    tokens = len(build_tiny_tokenizer())
    source = place / "source.gguf"
    build_tiny_gguf(
        source,
        "qwen2",
        ("Q8_0",),
        tie_word_embeddings=False,
        vocab_size=tokens,
        max_position_embeddings=1024,
    )
    base = write_base(source, place / "weights" / BASE)
    tower = build_tiny_tower_folder(place / "tower")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ADAPTER_WEIGHTS", str(base.parent))
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.setattr(train_shipped, "DEPTHS", (0, 1, 2))
        patch.setattr(train_shipped, "DEFAULT_TOWER", str(tower))
        patch.setattr(train_shipped, "DRAWINGS", {"drawings": "drawings:8", "colours": "drawings:8:colours"})
        pack(data, source, place / "pieces", 20_000)
        yield SimpleNamespace(data=data, base=base, tower=tower, pieces=place / "pieces")


def test_all_that_a_stage_reads_is_carried_over(carried: SimpleNamespace, tmp_path: Path) -> None:
    assert max(path.stat().st_size for path in carried.pieces.rglob("piece-*")) <= 20_000
    data = read_pieces(carried.pieces / "data", tmp_path / "data")
    used = {
        Path(part.split("{data}/")[1].split("=")[0])
        for stage in STAGES
        for part in stage.options.split()
        if "{data}/" in part
    }
    assert Path("scienceqa") in used and all((data / name).exists() for name in used)
    for name in used - {Path("scienceqa")}:
        rows = json.loads((data / name).read_text())
        assert rows, name
        pictures = [data / row["image"] for row in rows if "image" in row]
        assert all(path.stat().st_size < 100 for path in pictures), name
    val = json.loads((data / "scienceqa" / "pid_splits.json").read_text())["val"]
    assert val == json.loads((carried.data / "scienceqa" / "pid_splits.json").read_text())["val"][::5]
    kept = {path.name for path in (data / "flickr8k" / "images").iterdir()}
    assert kept == {"flickr0.png", "flickr2.png", "flickr3.png"}, "not that of val"


def test_the_base_is_restored_byte_for_byte(carried: SimpleNamespace, tmp_path: Path) -> None:
    unpacked = read_pieces(carried.pieces / "base", tmp_path / "unpacked")
    assert (unpacked / GGUF_FILE).is_file() and not (unpacked / WEIGHTS_FILE).exists()
    restore_base(unpacked, tmp_path / "base")
    files = {path.name for path in carried.base.iterdir()} - {PROVENANCE}
    for name in files:
        assert (tmp_path / "base" / name).read_bytes() == (carried.base / name).read_bytes(), name
    assert not (tmp_path / "base" / GGUF_FILE).exists()
    (tmp_path / "base" / WEIGHTS_FILE).unlink()
    restore_base(unpacked, tmp_path / "base")
    assert not (tmp_path / "base" / WEIGHTS_FILE).exists(), "it is not made again"


def test_the_rows_alone_are_those_that_are_carried_over(carried: SimpleNamespace, tmp_path: Path) -> None:
    train_shipped.main(["rows", "--data", str(carried.data), "--output", str(tmp_path / "mix")])
    data = read_pieces(carried.pieces / "data", tmp_path / "data")
    written = {path.name for path in (tmp_path / "mix").iterdir()}
    assert {"alpaca.json", "coco.json", "sums.json"} < written
    for name in written:
        rows = json.loads((tmp_path / "mix" / name).read_text())
        assert rows == json.loads((data / name).read_text()), name
        assert all((carried.data / row["image"]).is_file() for row in rows if "image" in row), name


def test_data_that_lack_a_set_are_refused(tmp_path: Path) -> None:
    for name in SETS[:-1]:
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=f"has no folder '{SETS[-1]}'"):
        pack(tmp_path, tmp_path / "base.gguf", tmp_path / "parcel", 1000)
    assert not (tmp_path / "parcel").exists()


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_has_options_that_its_script_takes(stage: Stage, tmp_path: Path) -> None:
    script = importlib.import_module(f"llama_adapter.commands.{stage.script.replace('.', '_')}")
    words = f"{stage.options} {COMMON} --max-minutes 0.10".format(data=tmp_path / "nothing").split()
    with pytest.raises(UsageError, match=str(tmp_path / "nothing")):
        script.main([*words, "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


class TrainingHere:
    """A training in this process. It is over once it has been started."""

    def __init__(self, command: list[str]) -> None:
        script = importlib.import_module(f"llama_adapter.commands.{command[2].replace('.', '_')}")
        self.command, self.code = command, 0
        try:
            script.main(command[3:])
        except KeyboardInterrupt:
            self.code = 130
        except UsageError as error:
            print(error)
            self.code = 1

    def poll(self) -> int:
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        if self.code == 130 and timeout is not None:  # as if it had gone on until it was stopped
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.code

    def send_signal(self, number: int) -> None:
        assert number == signal.SIGTERM


@pytest.fixture
def train(
    carried: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[float], Path]:
    """Runs the command for so many minutes, with one stage that sees. Returns the output folder."""
    stage = Stage(
        "tiny",
        "train.vqa",
        f"--base {BASE} --data {{data}}/coco.json --data {{data}}/names.json --template chat "
        f"--data {{data}}/alpaca.json --tower {carried.tower} --depths 0 1 2 --batch-size 8 --max-length 300 "
        "--method prompts+lora --validation-rows 1 --learning-rate 0.01 --device cpu",
    )
    monkeypatch.setattr(train_shipped, "STAGES", (stage,))
    monkeypatch.setattr(train_shipped, "COMMON", COMMON.replace("--epochs 20", "--epochs 2"))
    monkeypatch.setattr(
        train_shipped,
        "subprocess",
        SimpleNamespace(Popen=TrainingHere, TimeoutExpired=subprocess.TimeoutExpired),
    )

    def call(minutes: float) -> Path:
        run(carried.pieces, tmp_path / "shipped", minutes)
        return tmp_path / "shipped"

    return call


def test_a_training_that_fails_is_named_after_the_others_have_ended(
    train: Callable[[float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [stage] = train_shipped.STAGES
    wrong = Stage("wrong", stage.script, f"{stage.options} --rate nothing=1")
    monkeypatch.setattr(train_shipped, "STAGES", (wrong, stage))
    with pytest.raises(UsageError, match=r"^wrong: the training ended with exit code 1$"):
        train(60)
    assert load_adapter(tmp_path / "shipped" / "tiny").config.training["step"] >= 4
    assert not (tmp_path / "shipped" / "wrong").exists()


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal end the training after so many steps."""
    accumulate, done = training.accumulate_gradient, 0

    def act(*args: Any, **kwargs: Any) -> float:
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*args, **kwargs)

    monkeypatch.setattr(training, "accumulate_gradient", act)


def test_it_trains_without_the_pictures_and_leaves_adapters_in_float16(
    train: Callable[[float], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = train(60)
    assert f"{output / 'tiny'}: finished" in capsys.readouterr().out
    steps = len(losses(output / "runs" / "tiny"))
    adapter = load_adapter(output / "tiny")
    assert steps >= 4 and adapter.config.training["step"] == steps
    settings = json.loads((output / "runs" / "tiny" / "run.json").read_text())["settings"]
    assert 50 < settings["max_minutes"] < 60
    weights = load_file(output / "tiny" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    train(60)
    assert len(losses(output / "runs" / "tiny")) == steps, "a finished training is not begun again"


def test_the_same_command_goes_on_with_a_training_that_was_cut_off(
    train: Callable[[float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(UsageError, match="tiny: the time was too short for a first adapter; call again"):
            train(60)
    assert len(losses(tmp_path / "shipped" / "runs" / "tiny")) == 2
    output = train(50)
    assert len(losses(output / "runs" / "tiny")) >= 4
    assert load_adapter(output / "tiny").config.training["step"] >= 4


def test_the_best_so_far_of_a_training_that_was_cut_off_is_written(
    train: Callable[[float], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    often = COMMON.replace("--epochs 20", "--epochs 2").replace("--validate-every 250", "--validate-every 1")
    monkeypatch.setattr(train_shipped, "COMMON", often)
    stop_at(3, monkeypatch)
    output = train(60)
    assert f"{output / 'tiny'}: the best so far" in capsys.readouterr().out
    assert load_adapter(output / "tiny").config.training["step"] <= 3
    assert not (output / "runs" / "tiny" / "finished").exists()
