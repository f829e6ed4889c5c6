"""What a run writes down as it goes: metrics.jsonl, and events for TensorBoard.

metrics.jsonl holds one strict JSON object per line: "step", "kind" and numbers; those of kind
"health" are lists by layer, and objects of such lists by parameter (train/health_record.py). JSON
has no NaN or infinity, and a diverged run must be readable, so they are written as the strings
"nan", "inf" and "-inf", which `read_metrics` turns back into floats.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from batiste.data.json_files import parse_json
from batiste.train.event_kinds import check_record
from batiste.train.ledger import Ledger
from batiste.train.lines import Lines, complain
from batiste.train.thinning import EVERY, thin

METRICS_FILE = "metrics.jsonl"
KINDS = ("train", "validation")
HEALTH = "health"
SAID_AT_MOST = 4  # Ranges of steps, in a line.


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
        record = parse_json(line, place, Any)
        check_record(record, place)
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


def _ranges(steps: Iterable[int]) -> list[list[int]]:
    """Ascending steps as [first, last] of those that follow each other."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ranges


def _tokens_of(record: dict[str, Any]) -> float:
    """Of a step; records of before padding was left out count the targets that have a weight."""
    return record.get("real_tokens", record.get("tokens", 0.0))


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard event files in a work directory.

    A step is counted from 1: the record of step n is of the run after n updates. Opening it to
    continue after `steps_done` removes what the run had written for later steps, which are about to
    be computed again; TensorBoard hides them too. A record is on its way to the disk when `write`
    returns (flushed), so a killed process loses at most the record it was writing. A disk that is
    full does not end the run; what could not be written is written later.

    workdir: None writes nothing, for all processes of a run but the first. config: by dotted name,
    for TensorBoard. look_back: health records that a continued run looks at again; older ones are
    thinned out (train/thinning.py), None keeps them. `reached` is the last step that was recorded
    before. A step is recorded once: of several records the last is kept; `repeated` says how many
    others there were, and `missing` which steps, as [first, last], have no training record though
    the run has done them.
    """

    def __init__(self, workdir: str | os.PathLike | None, steps_done: int,
                 config: dict[str, Any] | None = None, look_back: int | None = None):
        self._look_back, self._looks = look_back, 0
        self._lines = self._tensorboard = None
        self.reached, self.missing, self.repeated = steps_done, [], 0
        if workdir is None:
            return
        from batiste.train.tensorboard import TensorBoard  # 0.3 s that only a writer needs.

        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        temporary = path.with_suffix(".tmp")
        records = read_all(workdir)
        self.reached = max((record["step"] for record in records), default=steps_done)
        done = [record for record in records if record["step"] <= steps_done]
        kept = {(record["step"], record["kind"]): record for record in done}
        self.repeated = len(done) - len(kept)
        self.missing = _ranges(
            step for step in range(1, steps_done + 1) if (step, "train") not in kept)
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(map(_encode, kept.values()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._lines, self._tensorboard = Lines(path), TensorBoard(workdir, steps_done, config)
        self._looks = sum(record["kind"] == HEALTH and "gradient" in record
                          for record in kept.values())
        self._tokens = sum(
            _tokens_of(record) for record in kept.values() if record["kind"] == "train")

    def say_what_is_missing(self, ledger: Ledger) -> None:
        """Writes to the ledger, and in one line, what was wrong with the records before."""
        if not self.missing and not self.repeated:
            return
        ledger.write("records", missing=self.missing, repeated=self.repeated)
        steps = ", ".join(f"{first}-{last}" if first < last else str(first)
                          for first, last in self.missing[:SAID_AT_MOST])
        more = ", ..." if len(self.missing) > SAID_AT_MOST else ""
        wrong = [f"it lacks steps {steps}{more}"] if self.missing else []
        wrong += [f"{self.repeated} of its records were there twice"] if self.repeated else []
        complain(f"{METRICS_FILE} is not what the run wrote: {' and '.join(wrong)}; the run "
                 "continues, and its curves do without what is gone")

    def write(self, step: int, kind: str = "train", **values: float) -> None:
        """Writes one record; `values` are scalars (loss in nats per token, rates per second).

        Raises:
            ValueError: `kind` is neither train nor validation.
        """
        if kind not in KINDS:
            raise ValueError(f"kind of a metrics record: expected {' or '.join(KINDS)}, "
                             f"got {kind!r}")
        if self._lines is None:
            return
        values = {name: float(value) for name, value in values.items()}
        self._write({"step": int(step), "kind": kind, **values})
        shown = {f"{kind}/{name}": value for name, value in values.items()}
        if kind == "train":
            self._tokens += _tokens_of(values)
            shown["train/tokens_in_all"] = self._tokens
        self._tensorboard.write(int(step), shown)

    def write_health(self, step: int, record: dict[str, Any]) -> None:
        """Writes what a step measured of its own health; by layer to TensorBoard, now and then."""
        if self._lines is None:
            return
        self._write({"step": int(step), "kind": HEALTH, **record})
        self._tensorboard.write_layers(int(step), record)
        self._looks += 1
        if self._look_back is not None and self._looks % EVERY == 0:
            thin(self._lines.path, self._look_back)

    def close(self) -> None:
        """Closes the files."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._lines.add(_encode(record))
        self._lines.write()
