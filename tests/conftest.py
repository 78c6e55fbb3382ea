"""Fixtures of all tests. Kernels run on a GPU, or in Triton's interpreter if there is none."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.workspace import Workspace

if not torch.cuda.is_available():
    # Triton reads this when the tests import it, later.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def deterministic_mode() -> Iterator[None]:
    """Turn on PyTorch's deterministic mode for one test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> "Workspace":
    """A folder with the data, tokenizer and recipe of a tiny run."""
    from tests.workspace import make_workspace

    return make_workspace(tmp_path_factory.mktemp("workspace"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
