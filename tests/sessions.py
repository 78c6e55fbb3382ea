"""Sessions for tests that train without a run folder."""

from pathlib import Path
from typing import Any, cast

from rich.console import Console

from fastllama.checkpoints.state import TrainProgress
from fastllama.config import Config
from fastllama.data.dataset import Dataset
from fastllama.distributed.fsdp import resolve_by_memory
from fastllama.distributed.world import World
from fastllama.run_folder import RunFolder
from fastllama.training.session import Session
from fastllama.training.setup import Start


def bare_session(
    config: Config, world: World, dataset: Dataset | None = None, run: Path = Path("no-run")
) -> Session:
    """A session of `config` that prints nothing. Without a `dataset` it cannot read batches."""
    return Session(
        config=config,
        given=config,
        memory="",
        run=RunFolder(run),
        dataset=cast(Any, dataset),
        world=world,
        console=Console(quiet=True),
        flight_records=None,
        identity={},
    )


def resolved_session(config: Config, world: World, dataset: Dataset | None = None) -> Session:
    """A session that prints nothing, with `parallel.reshard_after_forward` resolved."""
    return bare_session(resolve_by_memory(config, world)[0], world, dataset)


def fresh_start(progress: TrainProgress | None = None) -> Start:
    """The start of a run without a checkpoint."""
    return Start(progress or TrainProgress(), checkpoint=None, unusable={})
