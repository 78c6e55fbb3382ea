"""`auto` of training.dtype and training.compile, by device, by speed and by compiler."""

import dataclasses
from typing import Any

import pytest
import torch

from fastllama.config import Config, TrainingConfig
from fastllama.distributed.world import World
from fastllama.training import computation
from fastllama.training.computation import resolve_computation


class Alone(World):
    """The world of a process that needs no group."""

    def from_main(self, compute: Any) -> Any:
        return compute()


@pytest.mark.parametrize(
    ("device", "faster", "compiler", "expected"),
    [
        ("cuda", "bfloat16", "", ("bfloat16", True)),
        ("cpu", "bfloat16", "true", ("bfloat16", True)),
        ("cpu", "float32", "true", ("float32", True)),
        ("cpu", "bfloat16", "no-such-compiler", ("bfloat16", False)),
    ],
)
def test_auto(
    device: str, faster: str, compiler: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computation, "faster_dtype", lambda device: faster)
    monkeypatch.setenv("CXX", compiler)
    world = Alone(0, 1, torch.device(device), None)  # type: ignore[arg-type]
    config = Config(training=TrainingConfig(dtype="auto", compile="auto"))
    training = resolve_computation(config, world).training
    assert (training.dtype, training.compile) == expected
    assert (config.training.dtype, config.training.compile) == ("auto", "auto")
    for dtype, compiles in (("float32", False), ("bfloat16", True)):
        asked = dataclasses.replace(config.training, dtype=dtype, compile=compiles)  # type: ignore[arg-type]
        asked_config = dataclasses.replace(config, training=asked)
        assert resolve_computation(asked_config, world) == asked_config
