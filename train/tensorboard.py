"""Scalars, texts and the config for TensorBoard, without TensorFlow."""

import math
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import hparams, scalar, text

from batiste.train.lines import complain

FOLDER = "tensorboard"
# Norms of 32 layers are 10 kB a step: shown at steps that grow by 1 %, 800 of the first 100,000.
GROWTH = 1.01
BY_PARAMETER = ("gradient", "parameter", "update")
BY_LAYER = (
    "rms", "largest", "entropy", "logit", "dead", "router_load", "router_idle", "router_spread",
)


class TensorBoard:
    """Writes event files into `workdir`/tensorboard, which hide what was there after `steps_done`.

    Not tensorboardX's own SummaryWriter: its thread ends at the first write that fails, and its queue
    of ten then blocks the run for ever. Where a disk takes no more, values are left out until it does;
    metrics.jsonl has them.

    config: by dotted name, shown among the hyperparameters; None shows none.
    """

    def __init__(self, workdir: pathlib.Path, steps_done: int, config: dict[str, Any] | None = None):
        self._folder, self._steps_done = workdir / FOLDER, steps_done
        self._writer, self._complained, self._config = None, False, config
        self._next_layers = steps_done + 1

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars; on their way to the disk when this returns."""
        self._add(step, [scalar(name, value, display_name=name) for name, value in values.items()])

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Adds Markdown texts likewise."""
        self._add(step, [text(name, value) for name, value in texts.items()])

    def write_layers(self, step: int, record: dict[str, Any]) -> None:
        """Adds what a health record says of each layer, at steps that are farther and farther apart."""
        if step < self._next_layers:
            return
        self._next_layers = max(step + 1, math.ceil(step * GROWTH))
        values = {f"{name}/layer_{layer:02d}": value
                  for name in BY_LAYER for layer, value in enumerate(record.get(name) or ())}
        for name in BY_PARAMETER:
            values |= norms_of_layers(f"{name}_norm", record[name])
        self.write(step, values)

    def _add(self, step: int, summaries: Iterable[Summary]) -> None:
        try:
            writer = self._open(step)
            for summary in summaries:
                writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))
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
            suffix = f".from_step_{step}.{time.time_ns() % 10**9:09d}"
            self._writer = EventsWriter(os.path.join(self._folder, "events"), suffix)
            first = self._steps_done + 1
            self._writer.write_event(Event(step=first, file_version="brain.Event:2"))
            self._writer.write_event(
                Event(step=first, session_log=SessionLog(status=SessionLog.START)))
            for summary in _hyperparameters(self._config):
                self._writer.write_event(
                    Event(step=first, wall_time=time.time(), summary=summary))
            self._complained = False
        return self._writer

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


def norms_of_layers(title: str, norms: dict[str, Any]) -> dict[str, float]:
    """The norm of all stacked parameters of each layer together, and of each other parameter."""
    stacked = [np.asarray(norm, float) for norm in norms.values() if isinstance(norm, list)]
    together = np.sqrt(sum(np.square(norm) for norm in stacked)) if stacked else ()
    values = {f"{title}/layer_{layer:02d}": float(norm) for layer, norm in enumerate(together)}
    return values | {f"{title}/{name}": norm for name, norm in norms.items()
                     if not isinstance(norm, list)}


def _hyperparameters(config: dict[str, Any] | None) -> tuple[Summary, ...]:
    """The config for TensorBoard's own page of it, where runs are compared, and as a text."""
    if config is None:
        return ()
    values = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
              for name, value in config.items() if value is not None}
    rows = [f"| `{name}` | `{value}` |" for name, value in config.items()]
    table = "\n".join(["| field | value |", "|---|---|", *rows])
    # Without the end of a session, which would say that a run that goes on is over.
    experiment, started, _ = hparams(values, {"validation/loss": 0.0, "train/loss": 0.0})
    return experiment, started, text("config", table)
