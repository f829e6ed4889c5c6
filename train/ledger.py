"""The ledger of a run: one append-only JSONL of what happened when, across restarts."""

import json
import pathlib
import time
from typing import Any

LEDGER_FILE = "ledger.jsonl"


class Ledger:
    """Appends events; each line has `time` (seconds since the epoch), `event`, and its fields.

    workdir: None writes nothing, for all processes of a run but the first.
    """

    def __init__(self, workdir: pathlib.Path | None):
        self._path = None if workdir is None else pathlib.Path(workdir, LEDGER_FILE)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._last_lap = time.perf_counter()

    def write(self, event: str, **fields: Any) -> None:
        """Appends one event; on its way to the disk when this returns."""
        if self._path is None:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "event": event, **fields}) + "\n")

    def lap(self, phase: str) -> None:
        """Books the seconds since the previous lap (or since opening) to a phase."""
        now = time.perf_counter()
        self.write("phase", name=phase, seconds=now - self._last_lap)
        self._last_lap = now

    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds of each phase over all starts of the run, in order of first appearance.

        What a kill cut short is missing: at most the time since the lap before it.
        """
        seconds: dict[str, float] = {}
        for line in self._path.read_bytes().split(b"\n")[:-1]:
            event = json.loads(line)
            if event["event"] == "phase":
                seconds[event["name"]] = seconds.get(event["name"], 0.0) + event["seconds"]
        return seconds


def last_saved(workdir: pathlib.Path) -> int | None:
    """The newest step that a run in `workdir` has ever saved, by its ledger; None for none."""
    path = pathlib.Path(workdir, LEDGER_FILE)
    if not path.is_file():
        return None
    events = map(json.loads, path.read_bytes().split(b"\n")[:-1])
    return max((event["step"] for event in events if event["event"] == "saved"), default=None)
