"""Signals that ask a run to stop, and on which step several processes then stop together."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

_calls = itertools.count(1)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str | None]]:
    """Gives the function that the loop asks after every step: the signal that wants it to stop.

    SIGINT and SIGTERM count; a second one of a kind ends the process at once. Several processes all
    ask the same number of times, and all get the same answers: a signal to any of them stops them
    after the same step, and is called SIGTERM.
    """
    if jax.distributed.is_initialized():
        # jax's preemption service has taken SIGTERM, and its handler is the one to call.
        with _handlers([signal.SIGINT], lambda _: os.kill(os.getpid(), signal.SIGTERM)):
            yield _agreed
        return
    received: list[str] = []
    with _handlers([signal.SIGINT, signal.SIGTERM], received.append):
        yield lambda: received[0] if received else None


def _agreed() -> str | None:
    # It answers yes to one call, counted from 1, that no process has made yet when the signal
    # comes. Steps would not do as the count: a signal before the first of a continued run is for 1.
    reached = multihost_utils.reached_preemption_sync_point(next(_calls))
    return "SIGTERM" if reached else None


@contextlib.contextmanager
def _handlers(numbers: list[int], receive: Callable[[str], object]) -> Iterator[None]:
    """Calls `receive` with the name of a signal; after one, the previous handler is back."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may install handlers (a notebook may use another).
        return
    previous = {}

    def handle(number, frame):
        signal.signal(number, previous[number])
        receive(signal.Signals(number).name)

    for number in numbers:
        previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
