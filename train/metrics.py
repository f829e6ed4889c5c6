"""What a run writes down as it goes: metrics.jsonl, TensorBoard events, a line on the terminal.

metrics.jsonl holds one strict JSON object per line: "step", "kind" and numbers; those of kind
"health" are lists by layer, and objects of such lists by parameter (train/health_record.py). JSON
has no NaN or infinity, and a diverged run must be readable, so they are written as the strings
"nan", "inf" and "-inf", which `read_metrics` turns back into floats.
"""

import collections
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
KINDS = ("train", "validation")
HEALTH = "health"


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of KINDS of metrics.jsonl in file order, empty if there is no file.

    Each is {"step": int, "kind": str, name: float, ...}. A last line without its end, torn by a
    killed process, is left out.

    Raises:
        ValueError: any other line is not a record.
    """
    return [record for record in read_all(workdir) if record["kind"] != HEALTH]


def read_health(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of kind "health" likewise; ValueError as in `read_metrics`."""
    return [record for record in read_all(workdir) if record["kind"] == HEALTH]


def read_all(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of every kind."""
    path = pathlib.Path(workdir, METRICS_FILE)
    if not path.exists():
        return []
    # The part after the last newline is empty, or the torn line.
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_decode(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _decode(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        step, kind = record.pop("step"), record.pop("kind")
        if kind == HEALTH:
            return {"step": step, "kind": kind, **_each(float, record)}
        return {"step": step, "kind": kind,
                **{name: float(value) for name, value in record.items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place}: expected a JSON object with step, kind and numbers, got "
                         f"{line[:80]!r}; remove the line to continue") from error


def _encode(record: dict[str, Any]) -> str:
    return json.dumps(_each(_strict, record), allow_nan=False, separators=(",", ":")) + "\n"


def _strict(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _each(call: Callable[[Any], Any], value: Any) -> Any:
    """`call` applied to every number or string of a record."""
    if isinstance(value, dict):
        return {name: _each(call, part) for name, part in value.items()}
    return [_each(call, part) for part in value] if isinstance(value, list) else call(value)


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard event files in a work directory.

    A step is counted from 1: the record of step n is of the run after n updates. Opening it to
    continue after `steps_done` removes what the run had written for later steps, which are about to
    be computed again; TensorBoard hides them too. A record is on its way to the disk when `write`
    returns (flushed), so a killed process loses at most the record it was writing.

    workdir: None writes nothing, for all processes of a run but the first. `reached` is the last
    step that was recorded before.
    """

    def __init__(self, workdir: str | os.PathLike | None, steps_done: int):
        self._file = self._tensorboard = None
        self.reached = steps_done
        if workdir is None:
            return
        import tensorboardX  # costs 0.3 s, and only a process that writes needs it

        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        temporary = path.with_suffix(".tmp")
        records = read_all(workdir)
        self.reached = max((record["step"] for record in records), default=steps_done)
        kept = [record for record in records if record["step"] <= steps_done]
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(map(_encode, kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")
        # The file's name is the time in seconds: a restart within one would overwrite the file.
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / TENSORBOARD_FOLDER), purge_step=steps_done + 1,
            filename_suffix=f".from_step_{steps_done}")

    def write(self, step: int, kind: str = "train", **values: float) -> None:
        """Writes one record; `values` are scalars (loss in nats per token, rates per second).

        Raises:
            ValueError: `kind` is neither train nor validation.
        """
        if kind not in KINDS:
            raise ValueError(f"kind of a metrics record: expected {' or '.join(KINDS)}, "
                             f"got {kind!r}")
        if self._file is None:
            return
        values = {name: float(value) for name, value in values.items()}
        self._file.write(_encode({"step": int(step), "kind": kind, **values}))
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, int(step))

    def write_health(self, step: int, record: dict[str, Any]) -> None:
        """Writes what a step measured of its own health; to metrics.jsonl alone."""
        if self._file is not None:
            self._file.write(_encode({"step": int(step), "kind": HEALTH, **record}))
            self._file.flush()

    def close(self) -> None:
        """Writes out what is buffered and closes the files."""
        if self._file is None:
            return
        self._file.close()
        self._tensorboard.close()


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

    def __init__(self, total_steps: int, *, tokens_per_step: int, flops_per_token: float,
                 peak_flops: float | None, stream: TextIO = sys.stderr):
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._mfu_per_rate = None if peak_flops is None else flops_per_token / peak_flops
        self._stream = stream
        self._recent = collections.deque(maxlen=self.WINDOW)
        self._last_line_at = -math.inf

    def update(self, steps_done: int, loss: float) -> None:
        """Says that `steps_done` steps of the whole run are complete, the last with `loss`."""
        now = time.monotonic()
        self._recent.append((now, steps_done))
        line = self._line(steps_done, loss)
        if self._stream.isatty():
            # \r to the start of the line, ESC [K erases what a longer line left behind.
            self._stream.write(f"\r{line}\x1b[K")
        elif (now - self._last_line_at >= self.SECONDS_BETWEEN_LINES
              or steps_done == self._total_steps):
            self._stream.write(line + "\n")
            self._last_line_at = now
        self._stream.flush()

    def note(self, text: str) -> None:
        """Writes a line that stays, between the states of the run."""
        erase = "\r\x1b[K" if self._stream.isatty() else ""
        self._stream.write(f"{erase}{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line on a terminal, so that what is printed next starts on its own."""
        if self._stream.isatty() and self._recent:
            self._stream.write("\n")
            self._stream.flush()

    @property
    def steps_per_second(self) -> float | None:
        """Rate over the recent updates, None before there are two."""
        if not self._recent or self._recent[-1][0] == self._recent[0][0]:
            return None
        (start, first), (end, last) = self._recent[0], self._recent[-1]
        return (last - first) / (end - start)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all devices per second, None before there are two updates."""
        rate = self.steps_per_second
        return None if rate is None else rate * self._tokens_per_step

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization in [0, 1], None where the rate or the peak is unknown."""
        rate = self.tokens_per_second
        return None if rate is None or self._mfu_per_rate is None else rate * self._mfu_per_rate

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
