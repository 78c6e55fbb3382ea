"""What a run computes with, decided for its device: `training.dtype` and `training.compile`."""

import dataclasses

from fastllama.config import Config
from fastllama.distributed.compilation import missing_compiler
from fastllama.distributed.world import World
from fastllama.model.dtype_choice import faster_dtype


def resolve_computation(config: Config, world: World) -> Config:
    """Decide "auto" of `training.dtype` and `training.compile`, for all ranks alike."""

    def resolved() -> Config:
        training, on_cuda = config.training, world.device.type == "cuda"
        dtype, compiles = training.dtype, training.compile
        if dtype == "auto":
            dtype = faster_dtype(world.device)
        if compiles == "auto":
            compiles = on_cuda or missing_compiler() is None
        training = dataclasses.replace(training, dtype=dtype, compile=compiles)
        return dataclasses.replace(config, training=training)

    return world.from_main(resolved)
