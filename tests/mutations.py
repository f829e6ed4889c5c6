"""Seeded damage of files: bits, cuts, types, numbers and keys, as accidents and attackers make it."""

import contextlib
import json
import pathlib
import random
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

from batiste import command_line

NUMBERS = (0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**40, 2**63, -(2**63), 10**9, 10**30,
           0.0, -0.5, 0.5, 1e-320, 1e308, float("nan"), float("inf"))
TEXTS = ("", "x", "\x1b[31mred\x07", "../../etc/passwd", "/dev/zero", "\0", "a\nb", "\ud800",
         "x" * 5000, "\u202e\u0000", "0", "NaN", "full_attention", "1e9")


def mutate_json(draw: random.Random, data: bytes) -> bytes:
    """A JSON file with one value, key or nesting changed; sometimes its bytes instead."""
    if draw.random() < 0.25:
        return mutate_bytes(draw, data)
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        value = _changed(draw, value)
    text = json.dumps(value)
    if draw.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + ", " + text[1:]  # Every key twice.
    return text.encode()


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """The same with bits flipped, cut, or a piece of it removed, repeated, or replaced."""
    changed = bytearray(data)
    start = draw.randrange(len(changed) + 1)
    end = min(len(changed), start + draw.choice((1, 2, 4, 8, 64, 4096)))
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.choice((1, 1, 3, 20))):
            if changed:
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del changed[start:]
    elif kind == 2:
        del changed[start:end]
    elif kind == 3:
        changed[start:start] = changed[start:end] * draw.choice((1, 3))
    elif kind == 4:
        changed[start:end] = draw.randbytes(end - start)
    else:
        number = draw.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
        changed[start:start + 8] = number.to_bytes(8, "little")
    return bytes(changed)


def _changed(draw: random.Random, value: Any) -> Any:
    """One place of a value changed."""
    places = list(_places(value))
    if not places:
        return _junk(draw)
    container, key = draw.choice(places)
    old = container[key]
    kind = draw.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = {str: [old], list: {"0": old}, dict: [old]}.get(type(old), str(old))
    elif kind == 2 and isinstance(old, int | float):
        container[key] = draw.choice((old + 1, -old, old * 2**20, float(old), old / 3, old - 1))
    elif kind == 3 and isinstance(container, dict):
        container[draw.choice((*container, "extra", ""))] = _junk(draw)
    elif kind == 4:
        other, name = draw.choice(places)
        container[key], other[name] = other[name], container[key]
    else:
        container[key] = _junk(draw)
    return value


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Each container and key; of long ones the first, and no deeper than files are."""
    if not isinstance(value, dict | list) or depth > 8:
        return
    for key in list(value if isinstance(value, dict) else range(len(value)))[:200]:
        yield value, key
        yield from _places(value[key], depth + 1)


def _junk(draw: random.Random) -> Any:
    nested: Any = 0
    for _ in range(draw.choice((3, 100, 900))):
        nested = [nested]
    return draw.choice((None, True, False, [], {}, [None], [[]], {"a": {}}, nested, list(range(100)),
                        draw.choice(NUMBERS), draw.choice(NUMBERS), draw.choice(TEXTS)))


@contextlib.contextmanager
def bounded(seconds: float = 30.0, more_bytes: int = 2 * 2**30) -> Iterator[None]:
    """Ends with an error what takes longer, or allocates more than the process has now and this."""
    def stop(*_):
        raise TimeoutError(f"took more than {seconds} s")

    used = int(pathlib.Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + more_bytes, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.signal(signal.SIGALRM, before)


def outcome(action: Callable[[], Any]) -> str:
    """"read" or "refused"; for all that is no single line of our own, what came instead."""
    try:
        with bounded():
            action()
    except Exception as error:
        line = command_line._line(error)
        if line is None:
            return f"{type(error).__name__}: {str(error)[:200]!r} (not raised here)"
        if "\n" in line or not line.isprintable() or len(line) > 2000:
            return f"no single printable line: {line[:300]!r}"
        return "refused"
    return "read"
