"""The line on the terminal that says how far a run is, or lines in a log."""

import collections
import contextlib
import math
import sys
import time
from typing import TextIO


def mfu_formula_line(flops_per_token: float, peak_flops: float | None) -> str:
    """Returns the line that says how MFU is computed, or why it is not.

    `flops_per_token`: of forward and backward; `peak_flops`: FLOP/s of all devices of the run, None
    where unknown. MFU: model FLOPs utilization, Chowdhery et al. 2022 (arXiv:2204.02311), app. B.
    """
    if peak_flops is None:
        return (f"MFU is left out: the peak FLOP/s of this device is unknown "
                f"({flops_per_token:.4g} training FLOPs per token)")
    return ("MFU = tokens/s × training FLOPs per token / peak FLOP/s "
            f"= tokens/s × {flops_per_token:.4g} / {peak_flops:.4g}")


class Progress:
    """The state of a run in one line, updated in place on a terminal, now and then in a log.

    Rates are over the last `WINDOW` updates and start with the second one, so that compilation,
    which the first update waits for, is in none of them.
    """

    WINDOW = 50
    SECONDS_BETWEEN_LINES = 10.0  # where the stream is not a terminal

    def __init__(self, total_steps: int, *, flops_per_token: float,
                 peak_flops: float | None, stream: TextIO = sys.stderr):
        self._total_steps = total_steps
        self._tokens = 0
        self._mfu_per_rate = None if peak_flops is None else flops_per_token / peak_flops
        self._stream = stream
        self._recent = collections.deque(maxlen=self.WINDOW)
        self._last_line_at = -math.inf

    def update(self, steps_done: int, loss: float, tokens: float) -> None:
        """Says that `steps_done` steps of the whole run are complete.

        loss, tokens: of the last one; padding is no token.
        """
        now = time.monotonic()
        self._tokens += tokens
        self._recent.append((now, steps_done, self._tokens))
        line = self._line(steps_done, loss)
        if self._stream.isatty():
            # \r to the start of the line, ESC [K erases what a longer line left behind.
            self._say(f"\r{line}\x1b[K")
        elif (now - self._last_line_at >= self.SECONDS_BETWEEN_LINES
              or steps_done == self._total_steps):
            self._say(line + "\n")
            self._last_line_at = now

    def note(self, text: str) -> None:
        """Writes a line that stays, between the states of the run."""
        erase = "\r\x1b[K" if self._stream.isatty() else ""
        self._say(f"{erase}{text}\n")

    def close(self) -> None:
        """Ends the line on a terminal, so that what is printed next starts on its own."""
        if self._stream.isatty() and self._recent:
            self._say("\n")

    @property
    def steps_per_second(self) -> float | None:
        """Rate over the recent updates, None before there are two."""
        return self._rate_of(1)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all devices per second, None before there are two updates."""
        return self._rate_of(2)

    def _rate_of(self, place: int) -> float | None:
        """What grows in this place of the recent updates, per second."""
        if not self._recent or self._recent[-1][0] == self._recent[0][0]:
            return None
        first, last = self._recent[0], self._recent[-1]
        return (last[place] - first[place]) / (last[0] - first[0])

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization in [0, 1], None where the rate or the peak is unknown."""
        rate = self.tokens_per_second
        return None if rate is None or self._mfu_per_rate is None else rate * self._mfu_per_rate

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # A log may be on the disk that is full.
            self._stream.write(text)
            self._stream.flush()

    def _line(self, steps_done: int, loss: float) -> str:
        parts = [f"step {steps_done:,}/{self._total_steps:,}", f"loss {loss:.4f}"]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
            if self.mfu is not None:
                parts.append(f"MFU {self.mfu:.1%}")
            left = (self._total_steps - steps_done) / self.steps_per_second
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Returns a duration to two units: "42 s", "3 min 20 s", "2 h 05 min", "4 d 03 h"."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes == 0:
        return f"{seconds:.0f} s"
    if hours == 0:
        return f"{minutes} min {int(seconds) % 60:02d} s"
    if hours < 24:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"
