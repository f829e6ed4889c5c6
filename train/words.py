"""What has happened to a run, in words: one sentence for each event of its ledger."""

from typing import Any

HIDDEN = ("at", "time", "clock", "event")


def sentence(event: dict[str, Any]) -> str:
    """An event of the ledger as a sentence; of a kind that is not known, its fields by name."""
    name = event.get("event")
    try:
        said = SENTENCES[name](event) if name in SENTENCES else None
    except (KeyError, TypeError, ValueError, AttributeError):
        said = None  # Written by another version: its fields are shown instead.
    return said or fields_in_words(event)


def fields_in_words(event: dict[str, Any]) -> str:
    """The fields of an event, "name value", without what every event has."""
    fields = {name: value for name, value in event.items()
              if name not in HIDDEN and value not in (None, "", [], {})}
    return ", ".join(f"{name.replace('_', ' ')} {in_words(value)}" for name, value in fields.items())


def in_words(value: Any) -> str:
    """A value of JSON as a person would write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {in_words(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(in_words, value))
    return str(value)


def _finding(event: dict[str, Any]) -> str:
    where = [] if event["layer"] is None else [f"in layer {event['layer']}"]
    where += [] if event["parameter"] is None else [f"at {event['parameter']}"]
    if event["examples"]:
        where.append(f"records {in_words(event['examples'][:4])}")
    place = f" ({', '.join(where)})" if where else ""
    done = {"log": "", "stop": " The run was stopped.", "skip": " The update was skipped."}
    return (f"{event['kind'].replace('_', ' ')} at step {event['step']:,}{place}: {event['cause']} "
            f"Evidence: {in_words(event['evidence'])}. Try: {event['remedy']}."
            f"{done.get(event.get('policy'), '')}")


def _decision(event: dict[str, Any]) -> str:
    because = f"because of {event['kind'].replace('_', ' ')} at step {event['step']:,}"
    if event["action"] == "roll_back":
        first, last = event["skip_records"]
        return (f"Rolled back to step {event['to']:,} {because}; records {first:,} to "
                f"{last - 1:,} of the order are not read again.")
    return f"The learning rate is halved from step {event['since']:,} on, {because}."


def _saved(event: dict[str, Any]) -> str:
    size = f", {event['bytes'] / 1e6:,.1f} MB" if event.get("bytes") else ""
    return f"Checkpoint of step {event['step']:,} saved in {event['seconds']:,.1f} s{size}."


def _save_failed(event: dict[str, Any]) -> str:
    again = f" ({event['in_a_row']} in a row)" if event["in_a_row"] > 1 else ""
    return f"The checkpoint of step {event['step']:,} could not be saved{again}: {event['why']}"


def _started(event: dict[str, Any]) -> str:
    begun = f"Continued from step {event['step']:,}" if event["step"] else "Started from step 0"
    parts = [f"checkpoint {step} was passed over ({why})"
             for step, why in event["passed_over"].items()]
    parts += [f"changed: {in_words(event['changed'])}"] if event["changed"] else []
    return f"{'; '.join([begun, *parts])}."


def _finished(event: dict[str, Any]) -> str:
    measured = event["validation"]
    loss = f", validation loss {in_words(measured['loss'])}" if measured else ""
    return f"Finished after step {event['step']:,} ({event['reason']}){loss}."


SENTENCES = {
    "finding": _finding, "decision": _decision, "saved": _saved, "save_failed": _save_failed,
    "started": _started, "finished": _finished,
    "supervise": lambda event: event["says"],
}
