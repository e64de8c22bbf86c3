"""One piece of work, several processes: `torchrun --nproc-per-node 4 --no-python bittern evaluate ...`.

What a process does is settled by its rank and the number of processes alone. Processes meet through files, and wait
for one another at barriers; no tensor travels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

_PATIENCE = timedelta(days=1)  # one process may have drawn all its pictures before the others have one
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A process among several.

    Attributes:
        rank: its number, from zero.
        world: how many there are.
        local_rank: its number on its machine, which is that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prepares, collects and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of some items: every `world`-th."""
        return list(items[self.rank :: self.world])

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def device(self, device: str) -> str:
        """The device of this process where the user named no GPU by its number."""
        return f"cuda:{self.local_rank}" if self.world > 1 and device == "cuda" else device


@contextmanager
def joined() -> Iterator[Shard]:
    """The shard that torchrun made this process; the only one where nobody launched several."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Shard()
        return
    # torchrun tells a process its place in no other way.
    shard = Shard(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield shard
    finally:
        dist.destroy_process_group()
