"""A process group without other processes."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def rank_0_of_8() -> Iterator[None]:
    """A fake process group: this process is rank 0 of 8, and collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()
