"""Generates with a tiny model in two processes, first whole, then sharded. A test launches it."""

from __future__ import annotations

import os
import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_adapter.common.processes import running_processes
from tests.tiny_models import VISION, build_tiny_model


def main() -> None:
    running = running_processes()
    assert running.count == 2
    # The processes read and write different numbers of tokens.
    generator = torch.Generator().manual_seed(running.index)
    rows = torch.randint(3, 60, (1 + running.index, 4 + 3 * running.index), generator=generator)
    features = torch.randn(len(rows), 6, generator=generator)
    ways = [
        {"max_new_tokens": 3 + 5 * running.index},
        {"max_new_tokens": 6 - 2 * running.index, "num_beams": 2},
        {"max_new_tokens": 4, "image_features": features},
        {"max_new_tokens": 4, "adapter": "none"},
    ]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = build_tiny_model(vision=VISION)
    whole = [model.generate(rows, **options, **way) for way in ways]
    assert not torch.equal(whole[2], whole[3]), "the adapter must change the answer"

    mesh = init_device_mesh("cpu", (running.count,))
    for layer in model.decoder.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model.decoder, mesh=mesh, reshard_after_forward=True)
    sharded = [model.generate(rows, **options, **way) for way in ways]
    same = all(map(torch.equal, whole, sharded))
    print(f"process {running.index}: the same tokens: {same}", flush=True)
    os._exit(0 if same else 1)  # DTensor's caches keep gloo's threads alive past the end of the group


if __name__ == "__main__":
    sys.exit(main())
