"""Rows as TensorBoard events.

`SummaryWriter` of PyTorch is not used. Its thread writes in the background, so a full disk ends the
thread with a traceback, and all later events of the session are lost.
"""

import io
import itertools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from fastllama.logs.log_file import LogFile
from fastllama.logs.rows import Row

_counter = itertools.count()


def event_log(folder: Path, last_step: int) -> tuple[LogFile, Callable[[Row], bytes]]:
    """A new event file of a run that resumes after update `last_step`, and the encoder of its rows.

    TensorBoard then ignores the events of later updates in older files.

    Raises:
        ImportError, OSError: TensorBoard or the folder cannot be used.
    """
    # Imported here because the import takes time.
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    def record(*events: Event) -> bytes:
        content = io.BytesIO()
        writer = RecordWriter(content)
        for event in events:
            writer.write(event.SerializeToString())
        return content.getvalue()

    def encode(row: Row) -> bytes:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.cells().items()
            if value is not None and name not in ("step", "progress", "eta_s")
        ]
        summary = Summary(value=values)
        return record(Event(wall_time=time.time(), step=row.step, summary=summary))

    folder.mkdir(exist_ok=True)
    now = time.time()
    name = f"{int(now):010d}.{platform.node()}.{os.getpid()}.{next(_counter)}"
    start = SessionLog(status=SessionLog.START)
    header = record(
        Event(wall_time=now, file_version="brain.Event:2"),
        Event(wall_time=now, step=last_step + 1, session_log=start),
    )
    return LogFile(folder / f"events.out.tfevents.{name}", header), encode
