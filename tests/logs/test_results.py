"""Scalars that the host reads one update late."""

import torch

from fastllama.logs.results import LateScalars


def test_receive_returns_the_last_sent_values() -> None:
    late = LateScalars()
    late.send(torch.tensor([1.0, 2.0]))
    late.send(torch.tensor([3.0, 4.5]))
    assert late.receive() == [3.0, 4.5]
