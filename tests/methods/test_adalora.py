"""AdaLoRA against PEFT's: logits, gradients, penalty, budget and the ranks that are kept; how it resumes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from llama_adapter.methods.adalora import AdaLora
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.model import LlamaAdapter
from llama_adapter.training.settings import TrainingSettings
from llama_adapter.training.trainer import Trainer
from tests.finished_runs import load_last_checkpoint
from tests.tiny_models import build_tiny_decoder, random_rows
from tests.train_tiny import rows

TARGETS = ("q_proj", "v_proj", "up_proj")
TOKENS = torch.stack(random_rows(7, 7))
STEPS = 20


class Pair:
    """The same tiny decoder with the same AdaLoRA of ours and of PEFT's, in float64."""

    def __init__(self, orthogonality: float = 0.5) -> None:
        decoder = build_tiny_decoder(dtype=torch.float64)
        self.ours = LlamaAdapter(copy.deepcopy(decoder), base="tiny")
        config = AdaLoraConfig(
            init_r=4,
            target_r=2,
            lora_alpha=8,
            tinit=2,
            tfinal=6,
            deltaT=3,
            total_step=STEPS,
            orth_reg_weight=orthogonality,
            target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        )
        self.theirs: Any = get_peft_model(decoder, config)
        adapter = self.ours.new_adapter(
            "adalora",
            method="adalora",
            adapted_layers=3,
            init_rank=4,
            target_rank=2,
            alpha=8.0,
            targets=TARGETS,
            prune_from=0.1,
            prune_until=0.7,
            prune_every=3,
            orthogonality=orthogonality,
            seed=1,
        ).double()
        adapter.requires_grad_(True)
        part = adapter.find(AdaLora)
        assert part is not None
        self.part = part
        generator = torch.Generator().manual_seed(2)
        self.pairs: list[tuple[Tensor, int, Tensor]] = []
        layers = list(self.theirs.base_model.model.model.layers)
        for name, own in part.named_parameters():
            site, _, kind = name.rpartition(".")
            nn.init.normal_(own, std=0.3, generator=generator)
            for index, layer in enumerate(layers):
                module = layer.get_submodule(site)
                which = {"right": module.lora_A, "values": module.lora_E, "left": module.lora_B}[kind]
                module.scaling["default"] = 8 * (4 + 1e-5) / 4  # they divide by the rank + 1e-5
                other = which["default"]
                other.data = own.data[index].clone().view(other.shape)
                self.pairs.append((own, index, other))

    def backward(self) -> tuple[Any, Any]:
        """The outputs of both, with the gradients of their losses and penalties."""
        ours = self.ours(TOKENS, labels=TOKENS, adapter="adalora")
        ours.loss.backward()
        if (penalty := self.part.penalty()) is not None:
            penalty.backward()
        theirs = self.theirs(TOKENS, labels=TOKENS)
        theirs.loss.backward()
        return ours, theirs


@pytest.mark.parametrize("orthogonality", [0.0, 0.5])
def test_it_computes_what_pefts_does(orthogonality: float) -> None:
    pair = Pair(orthogonality)
    ours, theirs = pair.backward()
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    penalty = pair.part.penalty()
    if orthogonality:
        assert penalty is not None
        assert float((ours.loss + penalty).detach()) == pytest.approx(float(theirs.loss.detach()), abs=1e-5)
    else:
        assert penalty is None
    for parameter, index, other in pair.pairs:
        assert parameter.grad is not None and other.grad is not None
        found = parameter.grad[index]
        torch.testing.assert_close(found, other.grad.view_as(found), rtol=0, atol=1e-5)


def test_it_keeps_the_ranks_that_pefts_keeps() -> None:
    pair = Pair()
    ours = torch.optim.SGD(pair.part.parameters(), lr=0.05)
    theirs = torch.optim.SGD([p for p in pair.theirs.parameters() if p.requires_grad], lr=0.05)
    counts = []
    for step in range(1, STEPS + 1):
        pair.backward()
        ours.step()
        theirs.step()
        pair.part.after_step(step, STEPS)
        pair.theirs.base_model.update_and_allocate(step)
        ours.zero_grad()
        theirs.zero_grad()
        count = 0
        for parameter, index, other in pair.pairs:
            if other.shape[-1] == 1:  # e
                mine = parameter[index] != 0
                assert mine.tolist() == (other.view(-1) != 0).tolist(), step
                count += int(mine.sum())
        counts.append(count)
    assert counts[:2] == [36, 36]
    assert counts[13:] == [18] * (STEPS - 13)
    assert 18 < counts[2] < 36 and 18 < counts[8] < counts[2]


def test_the_budget_falls_as_pefts_does() -> None:
    pair = Pair()
    allocator: Any = pair.theirs.base_model.rankallocator
    first, last = 2, 14
    budgets = [pair.part.budget(step, first, last) for step in range(first, last + 1)]
    assert budgets == [allocator.budget_schedule(step)[0] for step in range(first, last + 1)]
    assert (budgets[0], budgets[-1]) == (36, 18)


@torch.no_grad()
def test_ranks_that_are_gone_everywhere_are_not_kept_for_inference() -> None:
    model = LlamaAdapter(build_tiny_decoder(), base="tiny")
    part = model.new_adapter(
        "adalora", method="adalora", adapted_layers=2, init_rank=4, target_rank=2, targets=("v_proj",), seed=1
    ).find(AdaLora)
    assert part is not None
    site = "self_attn.v_proj"
    values = part.get_parameter(f"{site}.values")
    values.copy_(torch.tensor([[0.0, 5.0, 0.0, 7.0], [0.0, 0.0, 3.0, 0.0]]))
    live = model(TOKENS, adapter="adalora").logits
    kept = model.project("adalora")
    assert [tensor.shape for tensor in kept.parts[AdaLora].values()] == [(1, 2, 2, 32), (1, 2, 16, 2)]
    torch.testing.assert_close(model(TOKENS, adapter=kept).logits, live, rtol=0, atol=1e-5)
    values.zero_()
    nothing = model(TOKENS, adapter=model.project("adalora")).logits
    assert nothing.equal(model(TOKENS, adapter="none").logits)


# --- trained ------------------------------------------------------------------------------------------------

SETTINGS = TrainingSettings(
    epochs=3, warmup_epochs=1, batch_size=4, learning_rate=0.02, validate_every=6, checkpoint_every=2
)
EXAMPLES = [dataclasses.replace(example, images=()) for example in rows(16)[0]]


def trainer(output: Path, **options: Any) -> Trainer:
    model = LlamaAdapter(build_tiny_decoder(), base="tiny")
    model.new_adapter(
        "trained",
        method="prompts+adalora",
        init_rank=4,
        target_rank=1,
        targets=("q_proj", "v_proj"),
        prune_every=1,
        seed=1,
        **options,
    )
    return Trainer(model, "trained", EXAMPLES, {"made": EXAMPLES[:4]}, SETTINGS, output, {"source": "made"})


class Stopped(Exception):
    """Stands for a machine that goes away."""


@pytest.mark.parametrize("step", [4, 7, 9])
def test_a_training_that_was_cut_goes_on_exactly(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path / "whole").run()
    after_step = AdaLora.after_step

    def stop(part: AdaLora, now: int, total: int) -> None:
        if now == step:
            raise Stopped
        after_step(part, now, total)

    with monkeypatch.context() as patch:
        patch.setattr(AdaLora, "after_step", stop)
        with pytest.raises(Stopped):
            trainer(tmp_path / "cut").run()
    trainer(tmp_path / "cut").run(resume=True)
    whole, cut = (load_last_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert whole["adapter"].keys() == cut["adapter"].keys()
    assert all(value.equal(cut["adapter"][name]) for name, value in whole["adapter"].items())
    kept = whole["parts"]["adalora"]
    assert all(value.equal(cut["parts"]["adalora"][name]) for name, value in kept.items())


def test_its_penalty_makes_its_matrices_orthogonal(tmp_path: Path) -> None:
    apart = []
    for weight in (0.0, 10.0):
        training = trainer(tmp_path / str(weight), orthogonality=weight)
        training.run()
        part = training.model.get_adapter("trained").find(AdaLora)
        assert part is not None
        part.config = dataclasses.replace(part.config, orthogonality=1.0)
        penalty = part.penalty()
        assert penalty is not None
        apart.append(float(penalty.detach()))
    assert apart[1] < 0.8 * apart[0]


def test_its_folder_has_nothing_of_its_training_and_the_target_s_ranks(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    part = load_adapter(tmp_path).find(AdaLora)
    assert part is not None and part.training_state() == {}
    ends = {name.rpartition(".")[2] for name in part.state_dict()}
    assert ends == {"right", "values", "left"}
    parts = load_last_checkpoint(tmp_path)["parts"]
    assert sum(int(kept.sum()) for kept in parts["adalora"].values()) == 2 * 3
    values = [
        value for name, value in load_last_checkpoint(tmp_path)["adapter"].items() if name.endswith("values")
    ]
    assert sum(int((value != 0).sum()) for value in values) == 2 * 3
