"""What is saved, pushed and loaded again: by us, by transformers' and TRL's trainers, under PEFT's names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from llama_adapter.methods import checkpoint
from llama_adapter.methods.checkpoint import read_config
from llama_adapter.model import LlamaAdapter
from llama_adapter.surface import folders
from tests.refusals import refusal
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_base, build_tiny_decoder, build_tiny_model, random_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer."""
    return build_tiny_base(tmp_path_factory.mktemp("weights") / "tiny-base", max_position_embeddings=128)


@pytest.fixture
def model(base: Path) -> LlamaAdapter:
    model = LlamaAdapter.from_base(str(base), device="cpu")
    for seed, name in enumerate(("first", "second"), start=1):
        adapter = model.new_adapter(name, prompt_length=3, seed=seed)
        torch.nn.init.normal_(adapter.prompts.gates, generator=torch.Generator().manual_seed(seed))
    return model


def logits(model: LlamaAdapter, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.stack(random_rows(7)), **given).logits


# --- folders ------------------------------------------------------------------------------------------------


def test_transformers_keywords_of_saving_are_taken(model: LlamaAdapter, tmp_path: Path) -> None:
    state = {f"module.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(
        save_directory=tmp_path / "mine", safe_serialization=True, state_dict=state, max_shard_size="1GB"
    )
    again = LlamaAdapter.from_pretrained(tmp_path / "mine", device="cpu")
    assert torch.equal(again.get_adapter("mine").prompts.gates, model.get_adapter("second").prompts.gates + 1)
    model.save_pretrained(tmp_path / "other-process", is_main_process=False)
    assert not (tmp_path / "other-process").exists()
    model.save_pretrained(tmp_path / "both", selected_adapters=["first", "second"])
    for name in ("first", "second"):
        loaded = LlamaAdapter.from_pretrained(tmp_path / "both" / name, device="cpu")
        assert torch.equal(loaded.get_adapter(name).prompts.gates, model.get_adapter(name).prompts.gates)
    for wrong, said in (
        ({"safe_serialization": False}, "only written as safetensors"),
        ({"state_dict": {}}, "state_dict has no adapters.second."),
        ({"nonsense": 1}, "does not know nonsense"),
    ):
        assert said in refusal(lambda wrong=wrong: model.save_pretrained(tmp_path / "no", **wrong))
    assert not (tmp_path / "no").exists()


def test_a_config_under_its_former_name_is_read_and_replaced(model: LlamaAdapter, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "llama_adapter_config.json").rename(tmp_path / "adapter_config.json")
    again = LlamaAdapter.from_pretrained(tmp_path, device="cpu", adapter_name="mine")
    torch.testing.assert_close(logits(again), logits(model))
    assert again.active_adapter == "mine"
    again.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "llama_adapter_config.json",
        "adapter_model.safetensors",
    }


def test_an_adapter_of_peft_is_loaded_as_it_is(tmp_path: Path) -> None:
    tokens = torch.stack(random_rows(7))
    tokenizer = build_tiny_tokenizer()
    decoder = build_tiny_decoder(vocab_size=len(tokenizer))
    decoder.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora: Any = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft = get_peft_model(decoder, lora)
    with torch.no_grad():
        expected = peft(input_ids=tokens).logits
    peft.save_pretrained(tmp_path / "theirs")
    message = refusal(lambda: LlamaAdapter.from_pretrained(tmp_path / "theirs", device="cpu"))
    assert "PEFT's config does not say what its base is" in message
    path = tmp_path / "theirs" / "adapter_config.json"
    values = {**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}
    path.write_text(json.dumps(values))
    model = LlamaAdapter.from_pretrained(tmp_path / "theirs", device="cpu")
    with torch.no_grad():
        assert torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-4)
    config = model.get_adapter("theirs").config
    assert (config.template, config.base) == ("chat", str(tmp_path / "base"))
    assert read_config(tmp_path / "theirs") == config
    # From here on it is one of ours.
    model.save_pretrained(tmp_path / "ours")
    model.load_adapter(tmp_path / "ours")
    with torch.no_grad():
        assert torch.allclose(model(input_ids=tokens, adapter="ours").logits, expected, atol=1e-4)


def test_others_do_not_take_an_adapter_folder_for_their_own(model: LlamaAdapter, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        lambda: pipeline("text-generation", model=str(tmp_path)),
        lambda: PeftModel.from_pretrained(build_tiny_decoder(), str(tmp_path)),
    ):
        with pytest.raises((OSError, ValueError)) as error:
            load()
        assert not isinstance(error.value, KeyError)


# --- options of loading -------------------------------------------------------------------------------------


def test_transformers_options_of_loading_are_taken(model: LlamaAdapter, base: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "mine")
    options: dict[str, Any] = {
        "device_map": {"": "cpu"},
        "revision": "main",
        "token": None,
        "quantization_config": None,
        "trust_remote_code": False,
        "cache_dir": tmp_path / "cache",
        "attn_implementation": "eager",
    }
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        again = LlamaAdapter.from_pretrained(tmp_path / "mine", dtype=dtype, **options)
        assert (
            again.dtype == torch.bfloat16
            and again.get_adapter("mine").prompts.embeddings.dtype == torch.float32
        )
    assert again.config._attn_implementation.endswith("eager")
    assert again.load_adapter(tmp_path / "mine", "second", dtype=torch.bfloat16, revision="main", token=None,
                              device_map="auto", trust_remote_code=True) == "second"  # fmt: skip
    assert again.get_adapter("second").prompts.embeddings.dtype == torch.bfloat16
    older = LlamaAdapter.from_base(str(base), torch_dtype=torch.bfloat16, device=torch.device("cpu"))
    assert older.dtype == torch.bfloat16
    frozen = LlamaAdapter.from_pretrained(tmp_path / "mine", device="cpu", is_trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_options_that_nobody_knows_are_refused(model: LlamaAdapter, base: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for load in (
        lambda **options: LlamaAdapter.from_base(str(base), **options),
        lambda **options: LlamaAdapter.from_pretrained(tmp_path, **options),
        lambda **options: model.load_adapter(tmp_path, "new", **options),
    ):
        assert "does not know the option 'nonsense'" in refusal(lambda load=load: load(nonsense=1))
    both = {"device": "cpu", "device_map": "cpu"}
    assert "give one of them" in refusal(lambda: LlamaAdapter.from_base(str(base), **both))
    assert "dtype 'float7' is not known" in refusal(lambda: LlamaAdapter.from_base(str(base), dtype="float7"))
    assert "the base's" in refusal(
        lambda: model.load_adapter(tmp_path, quantization_config={"load_in_8bit": 1})
    )
    given_a_model: Any = build_tiny_decoder()
    assert "load_adapter(folder)" in refusal(lambda: LlamaAdapter.from_pretrained(given_a_model))


def test_a_revision_of_the_hub_is_asked_for(
    model: LlamaAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "snapshot" / "deep")
    asked: dict[str, Any] = {}

    def snapshot(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.update(options, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    model.load_adapter("owner/name", subfolder="deep", revision="v2", token="secret", cache_dir="/c")
    assert {name: asked[name] for name in ("revision", "token", "cache_dir")} == {
        "revision": "v2",
        "token": "secret",
        "cache_dir": "/c",
    }
    assert "deep/adapter_model.safetensors" in asked["patterns"]


# --- other people's trainers --------------------------------------------------------------------------------


def trainer(model: LlamaAdapter, folder: Path, **settings: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in random_rows(*[8] * 4)]
    arguments = TrainingArguments(
        str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **settings,
    )
    return Trainer(model, arguments, train_dataset=rows)


def test_what_transformers_trainer_saves_is_an_adapter_folder(model: LlamaAdapter, tmp_path: Path) -> None:
    model.set_adapter("first")
    trainer(model, tmp_path).save_model(str(tmp_path / "final"))
    again = LlamaAdapter.from_pretrained(tmp_path / "final", device="cpu")
    assert list(again.adapters) == ["final", "second"] and again.active_adapter == "final"
    torch.testing.assert_close(logits(again), logits(model))
    torch.testing.assert_close(logits(again, adapter="second"), logits(model, adapter="second"))
    assert read_config(tmp_path / "final") == model.get_adapter("first").config
    assert again.load_adapter(tmp_path / "final", "more") == "more"


def test_a_checkpoint_of_a_trainer_is_one_too_and_can_be_resumed(base: Path, tmp_path: Path) -> None:
    def fresh() -> LlamaAdapter:
        model = LlamaAdapter.from_base(str(base), device="cpu")
        torch.nn.init.ones_(model.new_adapter("mine", seed=1).prompts.gates)
        return model

    whole = fresh()
    trainer(whole, tmp_path, max_steps=4, save_steps=2).train()
    middle = LlamaAdapter.from_pretrained(tmp_path / "checkpoint-2", device="cpu")
    assert middle.active_adapter == "checkpoint-2"
    assert not torch.equal(logits(middle), logits(whole)) and not torch.equal(logits(middle), logits(fresh()))
    resumed = fresh()
    trainer(resumed, tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed), logits(whole), rtol=0, atol=1e-6)


def test_a_state_whose_config_cannot_be_read_is_refused(model: LlamaAdapter, tmp_path: Path) -> None:
    state = model.state_dict()
    save_file({**state, "adapters.first.config": torch.zeros(3, dtype=torch.uint8)},
              tmp_path / "model.safetensors")  # fmt: skip
    assert "adapter 'first': its config" in refusal(lambda: LlamaAdapter.from_pretrained(tmp_path))
    del state["adapters.second.prompts.gates"]
    save_file(state, tmp_path / "model.safetensors")
    assert "'prompts.gates' is missing" in refusal(lambda: LlamaAdapter.from_pretrained(tmp_path))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "not an adapter folder" in refusal(lambda: LlamaAdapter.from_pretrained(tmp_path))


# --- a vocabulary that was resized --------------------------------------------------------------------------


def test_tokens_that_are_added_leave_an_adapter_usable(base: Path, tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    model = LlamaAdapter.from_base(str(base), device="cpu")
    before = model.new_adapter("before")
    tokenizer.add_tokens(["<x>"])
    model.resize_token_embeddings(len(tokenizer))
    after = model.new_adapter("after")
    assert after.config.shape.vocab_size == model.shape.vocab_size == len(tokenizer)
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())
    model.save_pretrained(tmp_path / "before", adapter="before")
    assert read_config(tmp_path / "before").shape == model.shape
    assert before.config.shape == model.shape
    model.save_pretrained(tmp_path / "after")
    with pytest.warns(UserWarning, match=r"trained with 321 tokens.*resize_token_embeddings\(321\)") as told:
        small = LlamaAdapter.from_pretrained(tmp_path / "after", base=str(base), device="cpu")
    assert len(told) == 1
    assert torch.isfinite(logits(small)).all()


# --- the hub ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True], ids=["new", "with a card"])
def test_pushing_uploads_the_two_files_and_a_card(
    model: LlamaAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    uploaded: dict[str, str] = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id: str, name: str, **_: Any) -> bool:
            assert name == "README.md"
            return there

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            uploaded.update({p.name: p.read_text(errors="ignore") for p in folder_path.iterdir()})
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(folders, "HfApi", Hub)
    model.base = "owner/the-base"
    model.get_adapter("second").config = checkpoint.AdapterConfig(
        **{**vars(model.get_adapter("second").config), "base": "owner/the-base"}
    )
    model.add_model_tags(["sft"])
    assert model.push_to_hub("owner/mine", private=True).endswith("/commit/1")
    card = uploaded.pop("README.md", None)
    assert set(uploaded) == {"llama_adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(uploaded["llama_adapter_config.json"])["base"] == "owner/the-base"
    assert (card is None) == there
    if card is not None:
        data = ModelCard(card).data
        assert data.base_model == "owner/the-base" and data.library_name == "llama-adapter"
        assert data.pipeline_tag == "text-generation" and "sft" in data.tags
        assert 'LlamaAdapter.from_pretrained("owner/mine")' in card
    uploaded.clear()
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="owner/again")
    assert "llama_adapter_config.json" in uploaded


# --- parts of the base that are elsewhere -------------------------------------------------------------------


def test_offloaded_embeddings_leave_the_adapter_on_a_real_device(base: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = LlamaAdapter.from_base(
        str(base), device_map={**places, "model.layers": "cpu"}, offload_folder=tmp_path
    )
    assert model.decoder.device.type == "meta" and model.device.type == "cpu"
    adapter = model.new_adapter("new", seed=1)
    embeddings = adapter.prompts.embeddings
    assert embeddings.device.type == "cpu" and torch.isfinite(embeddings).all()
    torch.nn.init.ones_(adapter.prompts.gates)
    whole = build_tiny_model(vocab_size=320, names=())
    same = whole.new_adapter("new", seed=1)
    torch.nn.init.ones_(same.prompts.gates)
    torch.testing.assert_close(logits(model), logits(whole))
    assert model.chat("Hi", max_new_tokens=3, temperature=0) is not None
    model(torch.stack(random_rows(5)), labels=torch.stack(random_rows(5))).loss.backward()
    gradient = adapter.prompts.embeddings.grad
    assert gradient is not None and gradient.abs().max() > 0
