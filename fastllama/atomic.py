"""Files that are either the old version or the complete new one, whatever kills the process."""

import os
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Make the names inside `folder` durable: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, make it durable, then rename it into place."""
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_folder(path.parent)
