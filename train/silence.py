"""Keeps Orbax, TensorStore and asyncio from printing what a save that fails says in one line."""

import functools
import logging
import pathlib
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any


def silence_orbax() -> None:
    """Keeps Orbax from printing the traceback of a failed save: it is reported in one line."""
    logger = logging.getLogger("absl")
    if not any(isinstance(each, _OrbaxFailures) for each in logger.filters):
        logger.addFilter(_OrbaxFailures())
        # What it had still wanted to do when the first write failed, and other writes that did.
        logging.getLogger("asyncio").addFilter(_of_no_orbax_write)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        sys.unraisablehook = functools.partial(_pass_on_but_late_writes, sys.unraisablehook)


def _of_no_orbax_write(record: logging.LogRecord) -> bool:
    """Whether asyncio's message is not of a write of Orbax's whose failure nobody asked for."""
    if "exception was never retrieved" not in record.getMessage() or not record.exc_info:
        return True
    frames = traceback.extract_tb(record.exc_info[2])
    return not any("orbax" in pathlib.Path(frame.filename).parts for frame in frames)


def _pass_on_but_late_writes(hook: Callable, unraisable: Any) -> None:
    """Calls `hook`, but not for a write of TensorStore's that ends after its save has failed.

    From a thread of C++ it wants to tell the event loop of that save, which is closed.
    """
    late = unraisable.exc_type is RuntimeError and (
        str(unraisable.exc_value) == "Event loop is closed")
    if not (late and threading.current_thread() is not threading.main_thread()):
        hook(unraisable)


class _OrbaxFailures(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        return not any(known in text for known in (
            "background save thread", "_SignalingThread.run() raised", "Failed to write metadata"))
