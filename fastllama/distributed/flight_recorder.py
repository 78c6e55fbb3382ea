"""NCCL's flight recorder: each process writes its last collectives when one times out."""

import os
from pathlib import Path

DUMP_VARIABLE = "TORCH_FR_DUMP_TEMP_FILE"

# Each setting: the name of its variable, an older name that torch also reads, and the value.
_COLLECTIVES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"
_DUMP = ("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"
_DUMP_NAMES = (DUMP_VARIABLE, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def record_collectives(folder: Path) -> str:
    """Make the next process group record its collectives. Variables set by the user stay.

    Returns:
        The path of the dumps; torch appends the rank.
    """
    settings = _COLLECTIVES, _DUMP, (_DUMP_NAMES, str(folder.resolve() / "flight-recorder-"))
    for names, value in settings:
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value
    return dump_path() or ""


def dump_path() -> str | None:
    """The path of the dumps without the rank, or None if nothing is recorded."""
    return next((os.environ[name] for name in _DUMP_NAMES if name in os.environ), None)
