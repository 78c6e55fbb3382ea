"""Kernels run on a GPU where there is one, and in Triton's interpreter elsewhere."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.workspace import Workspace

if not torch.cuda.is_available():
    # Read when Triton is imported, which the tests do after this.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def deterministic_mode() -> Iterator[None]:
    """PyTorch's deterministic mode for one test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> "Workspace":
    """A folder with everything that a tiny run needs."""
    from tests.workspace import make_workspace

    return make_workspace(tmp_path_factory.mktemp("workspace"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
