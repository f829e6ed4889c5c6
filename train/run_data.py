"""Everything that a report says of one run, read from its work directory; no jax, no device."""

import dataclasses
import os
import pathlib
import statistics
from typing import Any

from batiste.data.json_files import read_json
from batiste.train.account import RUNNING, Account, read_account
from batiste.train.curves import as_number, read_records, tokens_of
from batiste.train.finished import FINISHED
from batiste.train.ledger import read_ledger
from batiste.train.progress import duration
from batiste.train.samples import read_samples

RECENT = 100  # Steps whose median is the rate of the headline.


@dataclasses.dataclass
class RunData:
    """A run as its work directory has it.

    config: by dotted name. chosen: the fields that are not at the defaults of their classes, None
    where the run was trained before that was written down. result: what the last evaluation of the
    whole validation split said.
    """

    name: str
    account: Account
    records: list[dict[str, Any]]
    config: dict[str, Any]
    chosen: list[str] | None
    result: dict[str, Any] | None
    samples: list[dict[str, Any]]
    findings: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """The last step that was completed."""
        return self.account.starts[-1].reached

    @property
    def total_steps(self) -> int | None:
        """How many steps the config asks for; None where there is no config."""
        return self.config.get("train.num_steps")

    @property
    def state(self) -> str:
        """"running", "done", or how it ended."""
        return self.account.starts[-1].ended

    def values(self, kind: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of a number in the records of a kind, by step."""
        points = ((record["step"], as_number(record.get(name))) for record in self.records
                  if record.get("kind") == kind)
        return sorted((step, value) for step, value in points if value is not None)

    def recent(self, name: str) -> float | None:
        """The median of a training number over the last steps; None where it was not recorded."""
        values = [value for _, value in self.values("train", name)[-RECENT:]]
        return statistics.median(values) if values else None


def read_run(workdir: str | os.PathLike) -> RunData:
    """Reads a work directory; ValueError where no run has been in it."""
    workdir = pathlib.Path(workdir)
    account = read_account(workdir)
    events = read_ledger(workdir)
    config = read_flat_config(workdir)
    return RunData(
        name=workdir.resolve().name, account=account, records=read_records(workdir),
        config=config, chosen=account.starts[-1].facts.get("set"),
        result=_result(events, config), samples=read_samples(workdir),
        findings=[event for event in events if event["event"] == "finding"],
    )


def _result(events: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, float] | None:
    """step, loss, bits_per_byte and standard_error at the end of a run, those that were measured."""
    ends = [event for event in events if event["event"] == FINISHED and event["validation"]]
    if not ends:
        return None
    names = ["loss"]
    if not any(name.startswith("data.objectives[") for name in config):
        names += ["bits_per_byte", "standard_error"]  # Others leave bytes out that nothing predicts.
    measured = {name: as_number(ends[-1]["validation"].get(name)) for name in names}
    if measured["loss"] is None:
        return None
    return {"step": ends[-1]["step"]} | {
        name: value for name, value in measured.items() if value is not None}


def read_flat_config(workdir: pathlib.Path, kind: Any = dict) -> dict[str, Any]:
    """The fields of config.json by dotted name, lists of parts by number; empty where there is none.

    kind: what must be in it, see `check_json`. Raises ValueError where the file is not what a run
    writes.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return {}
    return flat(read_json(path, kind))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; objects in lists are numbered, other lists are values."""
    if isinstance(config, list) and config and isinstance(config[0], dict):
        parts = [(f"{prefix}[{index}]", part) for index, part in enumerate(config)]
    elif isinstance(config, dict):
        parts = [(f"{prefix}.{key}" if prefix else key, part) for key, part in config.items()]
    else:
        return {prefix: config}
    return {name: value for key, part in parts for name, value in flat(part, key).items()}


@dataclasses.dataclass
class Number:
    """One number of the headline. value, note: text, "–" for what was not measured."""

    label: str
    value: str
    note: str = ""


def headline_numbers(run: RunData) -> list[Number]:
    """What to know of a run first: loss, bits per byte, tokens, parameters, MFU, time, findings."""
    tokens = tokens_of(run.records)[1]
    per_step = run.recent("real_tokens")
    parameters = run.account.starts[-1].facts.get("parameters")
    rate, mfu = run.recent("tokens_per_second"), run.recent("mfu")
    total = sum(run.account.seconds.values())
    kinds = sorted({str(event.get("kind")).replace("_", " ") for event in run.findings})
    return [
        _validation_loss(run), _bits_per_byte(run), _training_loss(run),
        Number("tokens", large(tokens), "" if per_step is None else f"{per_step:,.0f} a step"),
        Number("parameters", "–" if parameters is None else large(parameters)),
        Number("MFU", "–" if mfu is None else f"{mfu:.1%}",
               "" if rate is None else f"{rate:,.0f} tokens/s"),
        Number("time", duration(total), f"goodput {run.account.goodput:.1%}"),
        Number("findings", f"{len(run.findings)}", ", ".join(kinds[:3])),
    ]


def _validation_loss(run: RunData) -> Number:
    points = run.values("validation", "loss")
    finite = [point for point in points if point[1] == point[1]]
    note = "not evaluated so far"
    if finite:
        step, best = min(finite, key=lambda point: point[1])
        note = f"best {best:.4f} at step {step:,}"
    if run.result is not None:
        return Number("validation loss", f"{run.result['loss']:.4f}", note)
    return Number("validation loss", f"{points[-1][1]:.4f}" if points else "–", note)


def _bits_per_byte(run: RunData) -> Number:
    if run.result is not None and "bits_per_byte" in run.result:
        error = run.result.get("standard_error")
        return Number("bits per byte", f"{run.result['bits_per_byte']:.4f}",
                      "" if error is None else f"± {error:.4f}")
    points = run.values("validation", "bits_per_byte")
    return Number("bits per byte", f"{points[-1][1]:.4f}" if points else "–",
                  f"at step {points[-1][0]:,}" if points else "")


def _training_loss(run: RunData) -> Number:
    points = run.values("train", "loss")
    recent = run.recent("loss")
    return Number("training loss", "–" if recent is None else f"{recent:.4f}",
                  f"median of {min(len(points), RECENT)} steps" if points else "")


def state_in_words(run: RunData) -> str:
    """Where a run is: "running, step 1,200 of 5,000, 1 h 20 min left"."""
    of = "" if run.total_steps is None else f" of {run.total_steps:,}"
    words = [run.state, f"step {run.step:,}{of}"]
    rate, per_step = run.recent("tokens_per_second"), run.recent("real_tokens")
    if run.state == RUNNING and rate and per_step and run.total_steps:
        words.append(f"{duration(max(0, run.total_steps - run.step) * per_step / rate)} left")
    return ", ".join(words)


def large(number: float) -> str:
    """A count as a person reads it: 950, 12.3 k, 1.42 M, 8.03 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"
