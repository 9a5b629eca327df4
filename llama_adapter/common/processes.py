"""The processes of one run, as `accelerate launch` starts them: which one this is, and how they communicate.

Every process holds the whole adapter and computes its share of each batch. All add up their gradients and
make the same step. Adding them takes one call a step: an adapter has about a million parameters, so the
buckets of DistributedDataParallel would gain nothing. Without its wrapper, a process may also have no row, or
no picture, in a batch. The frozen decoder is either whole in every process or sharded by FSDP, which gathers
each layer when it is needed. It has no gradient to add up.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # slow to import, and a single process does not need it
    from accelerate import Accelerator

Made = TypeVar("Made")


@dataclass(frozen=True)
class Processes:
    """All processes of a run. By default there is only this one.

    Attributes:
        index: the number of this process, from 0.
        count: how many processes there are.
        sharded: whether the decoder's weights are spread over the processes. All then have to make their
            forward passes together.
        accelerator: accelerate's object for communication; None for a single process.
    """

    index: int = 0
    count: int = 1
    sharded: bool = False
    accelerator: Accelerator | None = None

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.index == 0

    def say(self, text: object, *, file: TextIO | None = None) -> None:
        """Print a line once for all processes (to ``file``, by default standard output)."""
        if self.main:
            print(text, file=file)

    def shard(self, decoder: nn.Module) -> None:
        """Spread a decoder's weights over the processes, in place, if the run is sharded."""
        if not self.sharded or self.accelerator is None:
            return
        from torch.distributed.fsdp import FSDPModule

        if isinstance(decoder, FSDPModule):
            return
        # accelerate shards a model only together with an optimiser, so it gets one with nothing to do.
        self.accelerator.prepare(decoder, torch.optim.SGD(decoder.parameters(), lr=1.0))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor that has the same shape in each."""
        if self.accelerator is None:
            return values
        summed: Tensor = self.accelerator.reduce(values, reduction="sum")
        return summed

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.accelerator is None:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over all processes. A gradient that no process has stays None."""
        if self.accelerator is None:
            return
        parameters = list(parameters)
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        parts = [there.to(parameters[0].device), *(gradient.flatten().float() for gradient in gradients)]
        summed = self.sum(torch.cat(parts)).split([part.numel() for part in parts])
        for parameter, anywhere, total in zip(parameters, summed[0].tolist(), summed[1:], strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if anywhere else None

    def from_main(self, make: Callable[[], Made]) -> Made:
        """Run `make` in the main process and give its result to all.

        After an error there, the others exit too.
        """
        if self.accelerator is None:
            return make()
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [None, False]
        if self.main:
            try:
                box = [make(), True]
            finally:
                broadcast_object_list(box)
        else:
            broadcast_object_list(box)
            if not box[1]:
                raise SystemExit(2)
        made: Made = box[0]
        return made

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body in the main process first, so that the others find what it cached."""
        if self.accelerator is None:
            yield
            return
        with self.accelerator.main_process_first():
            yield


@lru_cache(maxsize=1)
def running_processes() -> Processes:
    """The processes of this run. The first call joins the group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import Accelerator, DistributedType

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    # A thread of the group that releases a tensor while Python shuts down aborts the process (pytorch pull
    # request 179291): a finished run would exit as a failed one. So the group is ended before Python exits.
    atexit.register(accelerator.end_training)
    return Processes(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.distributed_type == DistributedType.FSDP,
        accelerator,
    )
