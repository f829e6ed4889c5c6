"""How far a long piece of work is: a bar on a terminal, a line now and then in a log."""

import sys
import time

LINE_SECONDS = 5.0


class Progress:
    """Shows the rate and the time left of work whose `total` bytes may be unknown (None)."""

    def __init__(self, label: str, total: int | None):
        self._label, self._total, self._done = label, total, 0
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm
            self._bar = tqdm(desc=label, total=total, unit="B", unit_scale=True, leave=False)

    def update(self, count: int) -> None:
        """Counts `count` more bytes as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        line = f"{self._label}: {self._done / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s"
        if not self._total:
            return line
        left = max(self._total - self._done, 0) / max(rate, 1e-9)
        return f"{line}, {100 * self._done / self._total:.0f} %, {left:.0f} s left"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()
