"""Methods that train the decoder's own weights: full, top-layers, selected."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llama_adapter.common.errors import UsageError
from llama_adapter.common.processes import Processes
from llama_adapter.decoding.batch import Batch
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.checkpoint import WEIGHTS_FILE, load_adapter, save_adapter
from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.methods.merging import merge_adapter
from llama_adapter.methods.selected import Selected
from llama_adapter.methods.state import merge_states
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.packing.losses import answer_loss
from llama_adapter.packing.pack import pack
from llama_adapter.quantization.linear import quantize_decoder
from llama_adapter.training import trainer as training
from llama_adapter.training.settings import TrainingSettings
from llama_adapter.training.trainer import Trainer, parameter_groups
from tests.finished_runs import losses
from tests.packed import check_packed_as_alone
from tests.tiny_models import VISION, build_tiny_decoder, build_tiny_model
from tests.train_tiny import rows

EXAMPLES = [dataclasses.replace(example, images=()) for example in rows(8)[0]]
TOKENS = torch.tensor([[5, 9, 33, 7, 21, 2], [3, 44, 12, 60, 8, 2]])
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "top-layers": {"top_layers": 2},
    "selected": {"share": 0.1, "sample_rows": 3},
}
SETTINGS = TrainingSettings(
    epochs=2, warmup_epochs=1, batch_size=4, learning_rate=0.01, validate_every=2, checkpoint_every=1
)


def add(model: LlamaAdapter, method: str, *, stirred: bool = True) -> Adapter:
    """A new adapter of a method. Its changes are random; so is their choice, where there is one."""
    adapter = model.new_adapter(method, method=method, seed=3, **METHODS[method])
    if stirred:
        generator = torch.Generator().manual_seed(4)
        if (selected := adapter.find(Selected)) is not None:
            total = sum(math.prod(shape) for shape in selected.config.weights.values())
            selected.choose(torch.rand(total, generator=generator))
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.05, generator=generator)
    return adapter


def logits(model: Any, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=tokens, **options).logits
    return found


def trainer(model: LlamaAdapter, method: str, output: Path, **changes: Any) -> Trainer:
    settings = dataclasses.replace(SETTINGS, **changes)
    return Trainer(model, method, EXAMPLES, {"made": EXAMPLES[:4]}, settings, output, {"source": "made"})


@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_the_base_bit_for_bit_and_leaves_it_alone(method: str) -> None:
    model = build_tiny_model()
    with torch.no_grad():
        bare = logits(model, adapter=NO_ADAPTER)
        adapter = add(model, method, stirred=False)
        assert torch.equal(logits(model, adapter=method), bare)
        if method != "selected":  # which has not chosen weights yet
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.05)
            assert (logits(model, adapter=method) - bare).abs().max() > 1e-2
        assert torch.equal(logits(model, adapter=NO_ADAPTER), bare)
    assert not any(own.requires_grad for own in model.decoder.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_a_plain_decoder(method: str) -> None:
    model = build_tiny_model(dtype=torch.float64)
    adapter = add(model, method).double().requires_grad_(True)
    plain = merge_adapter(model.decoder, adapter).requires_grad_(True)
    loss = model(input_ids=TOKENS, labels=TOKENS, adapter=method).loss
    expected = plain(input_ids=TOKENS, labels=TOKENS).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    loss.backward()
    expected.backward()
    part: Any = adapter.parts[0]
    weights = {name: plain.get_parameter(name).grad for name in part.config.weights}
    if method == "selected":
        flat = torch.cat([gradient.flatten() for gradient in weights.values()])
        assert torch.allclose(part.changes.grad, flat[part.places.long()], atol=1e-12)
    else:
        for name, gradient in weights.items():
            assert torch.allclose(part.get_parameter(name).grad, gradient, atol=1e-12), name
    trained = {"full": 3, "top-layers": 2, "selected": 3}[method]
    assert adapter.config.adapted_layers == trained


@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_have_the_padded_loss_and_gradients(method: str) -> None:
    model = build_tiny_model(dtype=torch.float64)
    adapter = add(model, method).double().requires_grad_(True)
    check_packed_as_alone(model, method, adapter, EXAMPLES)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_gradients_whenever_it_is_switched_on(method: str) -> None:
    model = build_tiny_model()
    adapter = add(model, method).requires_grad_(True)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model.decoder)
        answer_loss(model, pack(EXAMPLES), adapter=method).sum().backward()
        gradients.append([own.grad.clone() for own in adapter.parameters()])
        adapter.zero_grad()
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_kept_in_a_folder(method: str, tmp_path: Path) -> None:
    model = build_tiny_model()
    adapter = add(model, method)
    save_adapter(adapter, tmp_path)
    loaded = load_adapter(tmp_path)
    assert loaded.config == adapter.config
    model.add_adapter("again", loaded)
    with torch.no_grad():
        assert torch.equal(logits(model, adapter="again"), logits(model, adapter=method))
    other = LlamaAdapter(build_tiny_decoder(seed=1), base="tiny")
    with pytest.raises(UsageError, match="this base has other ones; give the base that it was trained on"):
        other.add_adapter("again", load_adapter(tmp_path))
    assert list(other.adapters) == []
    half = LlamaAdapter(build_tiny_decoder().bfloat16(), base="tiny")
    half.add_adapter("again", load_adapter(tmp_path))
    with torch.no_grad():
        near = logits(half, adapter="again").float()
        far = logits(half, adapter=NO_ADAPTER).float()
        expected = logits(model, adapter=method)
    assert (near - expected).abs().mean() < 0.3 * (far - expected).abs().mean()


def test_places_that_are_none_of_the_base_are_refused(tmp_path: Path) -> None:
    model = build_tiny_model()
    save_adapter(add(model, "selected"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["selected.places"][-1] = 2**30
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UsageError, match="its file has positions that the base's weights do not have"):
        model.load_adapter(tmp_path, "again")
    tensors["selected.places"] = tensors["selected.places"].float()
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UsageError, match=r"'selected\.places' has numbers of type float32, expected int32"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_training_learns_and_resumes_exactly(method: str, tmp_path: Path) -> None:
    model = build_tiny_model()
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    adapter = add(model, method, stirred=False)
    best = trainer(model, method, tmp_path / "whole").run()
    first, *_, last = losses(tmp_path / "whole")
    assert last < first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.decoder.state_dict().items())
    kept = load_adapter(tmp_path / "whole")
    assert kept.config.training["validation_loss"] == round(best, 4)

    cut = build_tiny_model()
    add(cut, method, stirred=False)
    stopped = trainer(cut, method, tmp_path / "cut")
    state: list[Any] = []

    def stop(*_: Any) -> None:
        state.append(None)
        if len(state) == 2:
            raise KeyboardInterrupt

    cut.adapters[method].parts[0].after_step = stop  # type: ignore[union-attr,method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = build_tiny_model()
    resumed = add(again, method, stirred=False)
    trainer(again, method, tmp_path / "cut").run(resume=True)
    for (name, one), other in zip(adapter.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_merged_it_is_a_plain_decoder(method: str, family: str, tmp_path: Path) -> None:
    model = LlamaAdapter(build_tiny_decoder(family), base="tiny")
    adapter = add(model, method)
    merged = merge_adapter(model.decoder, adapter)
    expected = logits(model, adapter=method).detach()
    assert torch.allclose(logits(merged), expected, atol=1e-6)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    assert not any(own.requires_grad for own in merged.parameters())
    names = set(adapter.parts[0].config.weights)
    for name, own in merged.named_parameters():
        assert (own is model.decoder.get_parameter(name)) == (name not in names), name


@pytest.mark.parametrize("method", METHODS)
def test_its_rows_share_a_batch_with_no_other_adapter(method: str) -> None:
    model = build_tiny_model()
    add(model, method)
    own = [model.project(method) for _ in range(2)]
    with torch.no_grad():
        together = logits(model, adapter=merge_states(own))
        assert torch.allclose(together, logits(model, adapter=method), atol=1e-6)
    for other in (NO_ADAPTER, "tiny"):
        with pytest.raises(UsageError, match=f"{method}.* has a decoder of its own, so its rows"):
            merge_states([model.project(method), model.project(other)])
    batch = Batch(model)
    greedy = Sampling(temperature=0, max_new_tokens=3)
    batch.join(TOKENS[:1], model.project("tiny"), greedy)
    with pytest.raises(UsageError, match="has a decoder of its own"):
        batch.join(TOKENS[1:], model.project(method), greedy)
    batch.step()  # the other rows continue


@pytest.mark.parametrize("method", METHODS)
def test_it_generates_and_the_base_beside_it_too(method: str) -> None:
    model = build_tiny_model()
    adapter = add(model, method)
    plain = merge_adapter(model.decoder, adapter)
    for name, expected in ((method, plain), (NO_ADAPTER, None)):
        said = model.generate(TOKENS[:1], adapter=name, do_sample=False, max_new_tokens=5)
        if expected is not None:
            assert torch.equal(said, expected.generate(TOKENS[:1], do_sample=False, max_new_tokens=5))
    # Other libraries' trainers compute with parts of the decoder.
    model.set_adapter(method)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=TOKENS).last_hidden_state
        assert torch.allclose(hidden, plain.model(input_ids=TOKENS).last_hidden_state, atol=1e-6)
        reference = model.reference_model()
        assert torch.equal(logits(reference), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_the_model_has_its_own(method: str) -> None:
    model = build_tiny_model()
    add(model, method)
    again = copy.deepcopy(model)
    expected = logits(model, adapter=method).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.allclose(logits(again, adapter=method), expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_base_is_refused(method: str) -> None:
    decoder = build_tiny_decoder()
    quantize_decoder(decoder, "int8")
    model = LlamaAdapter(decoder, base="tiny")
    with pytest.raises(UsageError, match=f"{method} changes the base's own weights, and .* is quantised"):
        model.new_adapter("new", method=method)


def test_an_offloaded_decoder_is_refused() -> None:
    decoder = build_tiny_decoder()
    model = LlamaAdapter(decoder, base="tiny")
    model.new_adapter("own", method="full")
    cpu_offload(decoder, execution_device=torch.device("cpu"))
    with pytest.raises(UsageError, match="full changes the base's own weights, which were offloaded since"):
        logits(model, adapter="own")
    with pytest.raises(UsageError, match="is quantised, offloaded or missing here"):
        model.new_adapter("another", method="full")


def test_a_sharded_decoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny_model()
    add(model, "full")
    monkeypatch.setattr(training, "running_processes", lambda: Processes(sharded=True))
    with pytest.raises(UsageError, match="full trains the decoder's own weights, which cannot be sharded"):
        trainer(model, "full", tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "full+lora"}, "full trains the base's own weights and can't be combined; leave out"),
        ({"method": "prompts+selected"}, "can't be combined; leave out prompts"),
        ({"method": "full", "vision": VISION}, "can't be combined; leave out projection"),
        ({"method": "full", "adapted_layers": 2}, r"full says itself which it changes \(3 here\)"),
        ({"method": "top-layers", "top_layers": 4}, "top layers: 4 given; the decoder has 3"),
        ({"method": "top-layers", "top_layers": 0}, "top layers: 0 given; choose 1 or more"),
        ({"method": "top-layers", "layer_decay": 1.5}, "layer decay: 1.5 given"),
        ({"method": "selected", "share": 0.0}, "share: 0.0 given; choose a number above 0"),
        ({"method": "selected", "score": "size"}, "score: 'size' given; choose fisher or gradient"),
        ({"method": "selected", "sample_rows": 0}, "sample rows: 0 given; choose 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_tiny_model().new_adapter("new", **options)


# --- each one's own -----------------------------------------------------------------------------------------


def test_learning_rates_fall_with_depth() -> None:
    model = build_tiny_model()
    adapter = model.new_adapter("new", method="top-layers", top_layers=3, layer_decay=0.5)
    groups = parameter_groups(adapter, dataclasses.replace(SETTINGS, rates={"layer-1": 0.3}))
    peaks = dict(zip(adapter.parameter_groups(), (group["peak"] for group in groups), strict=True))
    assert peaks == pytest.approx({"layer-0": 0.0025, "layer-1": 0.3, "layer-2": 0.01})
    counted = sum(len(group["params"]) for group in groups)
    assert counted == len(list(adapter.parameters()))
    plain = model.new_adapter("plain", method="top-layers", top_layers=3)
    assert list(plain.parameter_groups()) == ["top-layers"] and not plain.rate_factors()


@pytest.mark.parametrize("score", ["fisher", "gradient"])
def test_the_weights_of_the_highest_scores_are_chosen(score: str, tmp_path: Path) -> None:
    model = build_tiny_model(dtype=torch.float64)
    adapter = model.new_adapter("own", method="selected", share=0.05, sample_rows=4, score=score).double()
    part: Any = adapter.parts[0]
    plain = merge_adapter(model.decoder, adapter).requires_grad_(True)
    total: Any = 0
    for example in EXAMPLES[::2]:
        plain.zero_grad()
        tokens, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        plain(input_ids=tokens, labels=labels).loss.backward()
        gradients = [plain.get_parameter(name).grad.flatten() for name in part.config.weights]
        total = total + torch.cat(gradients) ** (2 if score == "fisher" else 1)
    trainer(model, "own", tmp_path, max_steps=1).run()
    best = total.abs().topk(len(part.changes)).indices.sort().values
    assert len(set(part.places.tolist()) & set(best.tolist())) >= len(best) - 2  # float32 rounds the scores
    assert (part.places.diff() > 0).all() and part.changes.any()


def test_other_places_leave_the_former_ones_as_the_base_has_them() -> None:
    model = build_tiny_model()
    adapter = add(model, "selected")
    part: Any = adapter.parts[0]
    moved = copy.deepcopy(part.state_dict())
    moved["places"] = torch.arange(len(part.places), dtype=torch.int32)
    with torch.no_grad():
        logits(model, adapter="selected")
        part.load_state_dict(moved)
        after = logits(model, adapter="selected")
        model.add_adapter("fresh", copy.deepcopy(adapter))
        assert torch.equal(after, logits(model, adapter="fresh"))


def test_untrained_it_says_that_it_has_chosen_nothing() -> None:
    model = build_tiny_model()
    model.new_adapter("own", method="selected")
    with pytest.raises(UsageError, match="selected has not chosen its weights yet, which needs"):
        model(input_ids=TOKENS, labels=TOKENS)
