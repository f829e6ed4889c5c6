"""Scalars for TensorBoard, without TensorFlow."""

import os
import pathlib
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from batiste.train.lines import complain

FOLDER = "tensorboard"


class TensorBoard:
    """Writes event files into `workdir`/tensorboard, which hide what was there after `steps_done`.

    Not tensorboardX's own SummaryWriter: its thread ends at the first write that fails, and its queue
    of ten then blocks the run for ever. Where a disk takes no more, values are left out until it does;
    metrics.jsonl has them.
    """

    def __init__(self, workdir: pathlib.Path, steps_done: int):
        self._folder, self._steps_done = workdir / FOLDER, steps_done
        self._writer, self._complained = None, False

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars; on their way to the disk when this returns."""
        try:
            writer = self._open(step)
            for name, value in values.items():
                writer.write_event(Event(
                    step=step, wall_time=time.time(), summary=scalar(name, value, display_name=name)))
            writer.flush()
        except OSError as error:
            self._writer = None  # A torn event ends a file: the next one begins another.
            if not self._complained:
                complain(f"{self._folder} cannot be written ({error.strerror}); curves have a gap")
            self._complained = True

    def _open(self, step: int) -> EventsWriter:
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # The file's name is the time in seconds: another within one would overwrite the file.
            suffix = f".from_step_{step}"
            self._writer = EventsWriter(os.path.join(self._folder, "events"), suffix)
            first = self._steps_done + 1
            self._writer.write_event(Event(step=first, file_version="brain.Event:2"))
            self._writer.write_event(
                Event(step=first, session_log=SessionLog(status=SessionLog.START)))
            self._complained = False
        return self._writer

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
