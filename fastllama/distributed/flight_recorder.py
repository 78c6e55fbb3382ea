"""NCCL's flight recorder: the last collectives of each process, written when one times out."""

import os
from pathlib import Path

DUMP_VARIABLE = "TORCH_FR_DUMP_TEMP_FILE"

# A variable, the names it had before, and its value; torch reads the old names as well.
_COLLECTIVES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"
_DUMP = ("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"
_DUMP_NAMES = (DUMP_VARIABLE, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def record_collectives(folder: Path) -> str:
    """Have the process group to come record; what the user has set in the environment stays.

    Returns:
        The path of the dumps, to which torch appends the rank.
    """
    settings = _COLLECTIVES, _DUMP, (_DUMP_NAMES, str(folder.resolve() / "flight-recorder-"))
    for names, value in settings:
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value
    return dump_path() or ""


def dump_path() -> str | None:
    """The path of the dumps without the rank, or None where nothing is recorded."""
    return next((os.environ[name] for name in _DUMP_NAMES if name in os.environ), None)
