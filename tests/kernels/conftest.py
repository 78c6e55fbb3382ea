"""Settings of the kernels' tests."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Handing work as small as theirs to another thread takes longer than doing it."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a launcher allocates and no kernel writes is NaN."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*arguments: object, **options: object) -> Tensor:
            x = allocate(*arguments, **options)
            if x.is_floating_point():
                # PyTorch's own code allocates leaves as well.
                x.detach().fill_(torch.nan)
            return x

        return allocate_nan

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
