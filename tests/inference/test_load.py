"""Loading a trained model."""

from pathlib import Path

import pytest
import torch

from fastllama.inference.load import load_run


@pytest.mark.parametrize("path", ["/", "/nowhere", "nowhere"])
def test_error_for_a_path_without_a_run(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path} is not a run folder"):
        load_run(Path(path), torch.device("cpu"))
