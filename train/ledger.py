"""The ledger of a run: one append-only JSONL of what happened when, across restarts.

Every line has `time` (seconds since the epoch), `clock` (seconds of a clock that never goes back,
comparable between lines of one boot of one machine) and `event`. Between a "start" and the last
line of that start the process is always in one phase, so that phases sum to the time that passed.
A "phase" line says how many seconds went to which phase since the one before it, which step was
complete by then, and which phase is next. `train/account.py` adds it all up.
"""

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from batiste.data.json_files import parse_json
from batiste.train.event_kinds import check_event
from batiste.train.lines import Lines, append

LEDGER_FILE = "ledger.jsonl"
PHASES = (
    "initialization", "data preparation", "restore", "compilation", "data wait", "step",
    "evaluation", "save blocked", "sampling", "idle",
)
# These take turns in every step: their seconds are summed, and written now and then.
LOOP_PHASES = ("data wait", "step")
FLUSH_SECONDS = 10.0  # The longest time that a kill leaves unbooked.
PULSE_SECONDS = 1.0  # How often the file's time of change says that the process is alive.
COMPILATION_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class Ledger:
    """Appends events and the time of phases; a context manager, which writes how it ended.

    workdir: None writes nothing, for all processes of a run but the first. started: the
    time.monotonic() at which the process began to work for this run, None for now. The first phase
    is "initialization". Nothing is written before `begin`, or `FLUSH_SECONDS` have passed: what is
    refused at once leaves nothing behind. A disk that is full or gone does not end the run; what
    could not be written is written later.
    """

    def __init__(self, workdir: str | os.PathLike | None, started: float | None = None):
        self._path = None if workdir is None else pathlib.Path(workdir, LEDGER_FILE)
        self._lines = None if workdir is None else Lines(self._path)
        self._flushed = time.monotonic()
        self._booked = self._flushed if started is None else started
        self._phase, self._seconds, self._step = "initialization", {}, None
        self._opened = False
        self._lock, self._closed = threading.RLock(), threading.Event()
        if self._path is None:
            return
        # When the process before was last alive: see `_beat`.
        alive = self._path.stat().st_mtime if self._path.exists() else None
        self._add("start", self._booked, boot=boot_id(), pid=os.getpid(), alive=alive)
        threading.Thread(target=self._beat, name="ledger", daemon=True).start()

    def begin(self, **facts: Any) -> None:
        """Writes an event "run" with what this start is made of: config, code, devices, data."""
        self._opened = True
        self.write("run", **facts)

    def write(self, event: str, **fields: Any) -> None:
        """Appends one event; on its way to the disk when this returns."""
        if self._path is None:
            return
        with self._lock:
            self._add(event, time.monotonic(), **fields)
            self._append()

    def enter(self, phase: str, was: str | None = None) -> None:
        """Ends a phase and begins the next; was: what the one that ends has turned out to be."""
        if self._path is None:
            return
        with self._lock:
            ended = was or self._phase
            self._book(ended)
            self._phase = phase
            if ended not in LOOP_PHASES or phase not in LOOP_PHASES:
                self._flush()

    def book(self, phase: str, seconds: float) -> None:
        """Moves seconds that have just passed from the phase that the process is in to another."""
        with self._lock:
            for name, moved in ((phase, seconds), (self._phase, -seconds)):
                self._seconds[name] = self._seconds.get(name, 0.0) + moved

    def reached(self, step: int) -> None:
        """Says that a step is complete; the first of a start is an event, for it has recovered."""
        if self._step is None:
            self.write("first step", step=step)
        self._step = step

    def close(self, reason: str, **fields: Any) -> None:
        """Books what is left and writes the event "end"; what comes later is not of this start."""
        with self._lock:
            if self._path is None or self._closed.is_set():
                return
            self._closed.set()
            self.enter("idle")
            self.write("end", reason=reason, **fields)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None and self._opened:
            text = " ".join(str(error).split())[:500]
            self.close("SIGINT" if kind is KeyboardInterrupt else "error",
                       error=f"{kind.__name__}: {text}")
        self._closed.set()

    def _beat(self) -> None:
        """Bounds what a kill leaves unbooked, and leaves a sign of life for the next start."""
        while not self._closed.wait(PULSE_SECONDS):
            self._pulse()

    def _pulse(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._closed.is_set():
                return
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self._opened = True
                self._book(self._phase)
                self._flush()
            elif self._opened:
                os.utime(self._path)

    def _book(self, phase: str) -> None:
        """Books the time since the last booking."""
        now = time.monotonic()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._booked
        self._booked = now

    def _flush(self) -> None:
        """Writes what is booked."""
        seconds = {name: round(value, 6) for name, value in self._seconds.items()}
        self._add("phase", self._booked, seconds=seconds, step=self._step, next=self._phase)
        self._seconds, self._flushed = {}, self._booked
        self._append()

    def _add(self, event: str, clock: float, **fields: Any) -> None:
        self._lines.add(_line(event, clock, fields))

    def _append(self) -> None:
        if self._opened:
            self._lines.write()


def _line(event: str, clock: float, fields: dict[str, Any]) -> str:
    now = time.time() - (time.monotonic() - clock)
    line = {"time": round(now, 6), "clock": round(clock, 6), "event": event, **fields}
    return json.dumps(line) + "\n"


def note(workdir: str | os.PathLike, event: str, **fields: Any) -> None:
    """Appends an event from outside of the run; nothing where the run has no ledger so far."""
    path = pathlib.Path(workdir, LEDGER_FILE)
    if path.is_file():
        append(path, _line(event, time.monotonic(), fields))


def read_ledger(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the events of a work directory in file order; torn lines are left out.

    A line says when to the microsecond, so that an equal one is a copy, and is left out too.

    Raises ValueError where there is no ledger, and for an event that is not as it was written.
    """
    path = pathlib.Path(workdir, LEDGER_FILE)
    if not path.is_file():
        raise ValueError(f"workdir={workdir}: no {LEDGER_FILE} there, so no run; expected the "
                         "--workdir of a `batiste train`")
    events: dict[bytes, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            event = parse_json(line, where, Any, allow_nan=True)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            check_event(event, where)
            events[line] = event
    return list(events.values())


def last_saved(workdir: str | os.PathLike) -> int | None:
    """The newest step that a run in `workdir` has saved and not gone back behind; None for none."""
    if not pathlib.Path(workdir, LEDGER_FILE).is_file():
        return None
    saved: list[int] = []
    for event in read_ledger(workdir):
        if event["event"] == "saved":
            saved.append(event["step"])
        elif event["event"] == "decision" and event["action"] == "roll_back":
            saved = [step for step in saved if step <= event["to"]]
    return max(saved, default=None)


def boot_id() -> str | None:
    """Names this boot of this machine, within which monotonic clocks compare; None if unknown."""
    path = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else None


def process_started() -> float | None:
    """The time.monotonic() at which this process was started; None if the system does not tell."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    # After the name in parentheses, which may hold anything: proc(5), field 22 is the start.
    ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


@contextlib.contextmanager
def compilation_booked(ledger: Ledger) -> Iterator[None]:
    """Books what jax takes to lower and compile to "compilation", whatever phase it happens in."""
    from jax import monitoring  # Whatever only reads a ledger needs no jax.

    def listen(event: str, seconds: float, **_) -> None:
        if event in COMPILATION_EVENTS:
            ledger.book("compilation", seconds)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)
