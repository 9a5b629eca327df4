"""The processes of one run, as `accelerate launch` starts them: which one this is, and what they do together.

Every process holds the whole adapter, takes its share of each batch, and makes the same step from the sum of
all gradients. That sum is one call a step: an adapter has a million parameters, so there is nothing to be won
by DistributedDataParallel's buckets, and without its wrapper a process may have no row, or no picture, in a
batch. The frozen decoder is whole in every process, or with FSDP sharded over them, each layer gathered when
it is its turn; it has no gradient to be summed.
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

if TYPE_CHECKING:  # slow to import, and one process does without
    from accelerate import Accelerator

Made = TypeVar("Made")


@dataclass(frozen=True)
class Processes:
    """All processes of a run; the default is one process by itself.

    Attributes:
        index: this one's number, from 0.
        count: how many there are.
        sharded: whether the decoder's weights are spread over them, so that all have to compute in step.
        accelerator: what binds them together; None for one process.
    """

    index: int = 0
    count: int = 1
    sharded: bool = False
    accelerator: Accelerator | None = None

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.index == 0

    def say(self, text: object, *, file: TextIO | None = None) -> None:
        """Print a line (to ``file``, by default standard output), once for all of them."""
        if self.main:
            print(text, file=file)

    def shard(self, decoder: nn.Module) -> None:
        """Spread a decoder's weights over the processes, in place, where the run is to be sharded."""
        if not self.sharded or self.accelerator is None:
            return
        from torch.distributed.fsdp import FSDPModule

        if isinstance(decoder, FSDPModule):
            return
        # accelerate shards a model together with its optimiser only; this one has nothing to do.
        self.accelerator.prepare(decoder, torch.optim.SGD(decoder.parameters(), lr=1.0))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor of the same shape over all processes."""
        if self.accelerator is None:
            return values
        summed: Tensor = self.accelerator.reduce(values, reduction="sum")
        return summed

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any of them."""
        if self.accelerator is None:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over all processes; one that no process has stays None."""
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
        """What the main process makes, in all of them; an error there ends the others as well, silently."""
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
        """The main process does what is in it before the others: what it caches, they find."""
        if self.accelerator is None:
            yield
            return
        with self.accelerator.main_process_first():
            yield


@lru_cache(maxsize=1)
def running_processes() -> Processes:
    """Those that this process belongs to; the first call joins them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import Accelerator, DistributedType

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    # A thread of the group that still lets go of a tensor while Python shuts down aborts the process (pytorch
    # pull request 179291): a finished run would exit as a failed one. So the group ends before Python does.
    atexit.register(accelerator.end_training)
    return Processes(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.distributed_type == DistributedType.FSDP,
        accelerator,
    )
