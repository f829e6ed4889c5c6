"""What the lines of ledger.jsonl and metrics.jsonl hold: the types that their readers count on."""

from typing import Any

from batiste.data.json_files import check_json, shown

# Of every event.
EVENT = {"event": str, "time": float, "clock": float}
# Of the events that are read again, by name; see data/json_files.py for what the kinds mean.
OF_EVENT: dict[str, dict[str, Any]] = {
    "start": {"boot": str | None, "pid": int, "alive": float | None},
    "phase": {"seconds": dict[str, float], "step": int | None, "next": str},
    "from": {"step": int, "reached": int},
    "first step": {"step": int},
    "end": {"reason": str},
    "exit": {"pid": int, "what": str},
    "started": {"passed_over": dict, "changed": list},
    "saved": {"step": int},
    "finished": {"reason": str, "step": int, "validation": dict | None},
    "decision": {"action": str, "kind": str | None, "step": int | None, "to": int | None,
                 "since": int | None, "skip_records": list[int] | None},
    "finding": {"kind": str, "step": int, "layer": int | None, "parameter": str | None,
                "examples": list[int], "evidence": dict[str, float | str], "cause": str,
                "remedy": str},
}
# Of every line of metrics. A number that is not finite is a string there.
RECORD = {"step": int, "kind": str}
NUMBERS = list[float | str] | None
BY_PARAMETER = dict[str, float | str | list[float | str]] | None
HEALTH_RECORD = {
    **dict.fromkeys(("gradient", "parameter", "update"), BY_PARAMETER),
    **dict.fromkeys(("rms", "largest", "entropy", "logit", "dead", "router_load", "router_idle",
                     "router_spread", "row_loss", "row_checksum"), NUMBERS),
    "targets": dict[str, float | str] | None,
    **dict.fromkeys(("loss", "gradient_norm", "learning_rate", "seconds", "wait"),
                    float | str | None),
}
NOT_FINITE = ("nan", "inf", "-inf")


def check_event(event: dict[str, Any], where: str) -> None:
    """Raises ValueError, naming `where` and the key, for an event of the ledger that is no such.

    What may be null, and is left out, is null afterwards.
    """
    check_json(event, EVENT, where)
    kinds = OF_EVENT.get(event["event"], {})
    check_json(event, kinds, where)
    for name in kinds:
        event.setdefault(name, None)
    if event.get("action") == "roll_back":
        check_json(event, {"to": int}, where)
    if event["event"] == "finding":
        _check_numbers(event["evidence"], where, "evidence")
    for name in ("time", "clock", "alive"):
        if not abs(event.get(name) or 0) < 1e11:
            raise ValueError(f"{where}: {name}={event[name]}: expected seconds")


def check_record(record: Any, where: str) -> None:
    """Raises ValueError, naming `where` and the key, for a line of metrics that is no record."""
    check_json(record, RECORD, where)
    if record["kind"] == "health":
        check_json(record, HEALTH_RECORD, where)
    else:
        check_json(record, {name: float | str for name in record if name not in RECORD}, where)
    for name, value in record.items():
        if name != "kind":
            _check_numbers(value, where, name)


def _check_numbers(value: Any, where: str, key: str) -> None:
    """Raises ValueError for a string that stands for no number."""
    if isinstance(value, str) and value not in NOT_FINITE:
        raise ValueError(f"{where}: {key}={shown(value)}: expected a number, or one of "
                         f"{', '.join(NOT_FINITE)}")
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inside:
        _check_numbers(each, where, key)
