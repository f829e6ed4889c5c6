"""Several processes as one run: they wait for each other, agree, and fail together."""

import json
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # jax's coordination service has no public door

WAIT_SECONDS = 600
VISIBLE_SECONDS = 15  # A network file system may show a new file a little later elsewhere.
_meetings: list[str] = []


def is_first() -> bool:
    """Whether this process is the one that writes; it is where there is only one."""
    return distributed.global_state.client is None or jax.process_index() == 0


def check_connected() -> None:
    """Raises ValueError where devices of other processes are seen that were never connected."""
    if jax.process_count() > 1 and distributed.global_state.client is None:
        raise ValueError(
            f"the devices belong to {jax.process_count()} processes that do not know each other: "
            "start each with --distributed (in a program: batiste.sharding.connect())"
        )


def together(
    what: str, call: Callable[[], str] = str, seconds: float = WAIT_SECONDS
) -> list[str]:
    """Calls `call` in every process and returns, when all are done, what each returned.

    All processes make the same calls of this function, in the same order. seconds: how long to wait
    for the slowest. Raises, in all of them, a ValueError that says in which process `call` raised
    what; where it raised, its own exception.
    """
    client = distributed.global_state.client
    if client is None:
        return [call()]
    _meetings.append(what)
    place = f"batiste/{len(_meetings):06}"
    error, outcome = None, {}
    try:
        outcome["said"] = call()
    except Exception as raised:
        error = raised
        outcome["failed"] = " ".join(str(raised).split()) or type(raised).__name__
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(outcome))
    try:
        client.wait_at_barrier(place, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as late:
        raise error or ValueError(
            f"{what}: not all {jax.process_count()} processes were done after {seconds:g} s; see "
            f"what the others printed ({' '.join(str(late).split())[:200]})"
        ) from None
    if error is not None:
        raise error
    said = {int(key.rsplit("/", 1)[1]): json.loads(value)
            for key, value in client.key_value_dir_get(place)}
    for index, outcome in sorted(said.items()):
        if "failed" in outcome:
            raise ValueError(f"process {index} could not {what}: {outcome['failed']}")
    return [outcome["said"] for _, outcome in sorted(said.items())]


def agree(values: dict[str, Any]) -> None:
    """Raises ValueError, naming what differs, where a process has other `values` than process 0."""
    texts = {name: repr(value) for name, value in values.items()}
    first, *others = map(json.loads, together("compare itself", lambda: json.dumps(texts)))
    for index, other in enumerate(others, start=1):
        changed = [f"{name} is {other.get(name, 'absent')} and not {first.get(name, 'absent')}"
                   for name in sorted(first.keys() | other.keys())
                   if first.get(name) != other.get(name)]
        if changed:
            raise ValueError(f"process {index} differs from process 0: {'; '.join(changed)}; start "
                             "all processes alike, on one shared file system")


def check_shared(directory: pathlib.Path) -> None:
    """Raises ValueError where a process does not see what process 0 writes in `directory`."""
    path = directory / ".shared"

    def write() -> str:
        token = secrets.token_hex(8)
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(token)
        return token

    if distributed.global_state.client is None:
        return
    token = together(f"write to {directory}", write if is_first() else str)[0]
    try:
        together(f"see what process 0 wrote in {directory}", lambda: _await_text(path, token))
    finally:
        if is_first():
            path.unlink(missing_ok=True)


def _await_text(path: pathlib.Path, text: str) -> str:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (path.is_file() and path.read_text() == text):
        if time.monotonic() > deadline:
            raise ValueError("--workdir must be on a file system that all processes share")
        time.sleep(0.2)
    return text
