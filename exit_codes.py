"""What a process ends with, and whether starting it again can help: all codes in one place."""

import signal

DONE = 0
FAILED = 1  # A person's mistake, in one line; or a defect, with a traceback.
USAGE = 2
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE  # Nobody reads what it prints any more.
PREEMPTED = 128 + signal.SIGTERM  # Saved and committed.
# Free numbers above those of signals; XPK starts again what ends with 127 or more.
LOST_PEER = 200
UNAVAILABLE = 201
BY_REASON = {"SIGINT": INTERRUPTED, "SIGTERM": PREEMPTED}
# What jax says of machines and networks, and not of the program.
TRANSIENT = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED")
_MEANINGS = {
    DONE: "done", FAILED: "failed, as it says above", USAGE: "told how to use it",
    INTERRUPTED: "interrupted by SIGINT", BROKEN_PIPE: "nobody read its output any more", PREEMPTED: "stopped by SIGTERM, saved",
    LOST_PEER: "another process of the run was lost",
    UNAVAILABLE: "a device or the network was not available",
}


def retryable(code: int) -> bool:
    """Whether the same command may do better; code: as subprocess has it, -n is signal n."""
    return meaning(code).startswith("killed") or code in (PREEMPTED, LOST_PEER, UNAVAILABLE)


def meaning(code: int) -> str:
    """What a code says, in a few words."""
    if code in _MEANINGS:
        return _MEANINGS[code]
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals) and number != signal.SIGINT:
        return f"killed by {signal.Signals(number).name}"
    return f"ended with {code}"


def transient(error: BaseException) -> bool:
    """Whether jax says that it was a machine or the network, and not the program."""
    # By name, so that nobody has to import jax to ask. What gloo (the network between CPUs) says is
    # passed on as UNKNOWN, with the reason inside.
    text = str(error)
    return type(error).__name__ == "JaxRuntimeError" and (
        text.startswith(TRANSIENT) or "gloo" in text.lower())


def transient_line(error: BaseException) -> str:
    """One line of a transient error: what was said, and that another start may help."""
    text = " ".join(str(error).split())
    return (f"error: {_MEANINGS[UNAVAILABLE]}: {text[:300]}; start the same command again, it "
            "continues from the last checkpoint")
