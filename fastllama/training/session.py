"""The values that all parts of a training share."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fastllama.config import Config
from fastllama.data.dataset import Dataset
from fastllama.data.packing import Packing
from fastllama.distributed.world import World
from fastllama.run_folder import RunFolder


@dataclass(frozen=True)
class Session:
    """The part of one process in a training, from start to exit. Nothing in it changes."""

    config: Config
    """Options, with "auto" of `parallel` resolved by memory."""
    given: Config
    """Options as the user gave them."""
    memory: str
    """One phrase: what `parallel` was resolved to, and why."""
    run: RunFolder
    dataset: Dataset
    world: World
    console: Console
    flight_records: str | None
    """Where NCCL's flight recorder writes, without the rank; None if it is off."""
    identity: dict[str, Any]
    """The options that all sessions of a run share, as `run_identity` lists them."""

    @property
    def packing(self) -> Packing | None:
        """How documents are kept apart; None if they may mix."""
        return Packing.of(self.config, self.dataset)
