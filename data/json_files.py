"""The one door for JSON that this process did not write itself: bounded, typed, one line on a fault.

A file of somebody else may be cut, mistyped, or made to harm: Python's reader takes NaN, keeps the
last of two equal keys, recurses as deep as brackets are nested, and what it returns has any type.
"""

import json
import math
import pathlib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

MAX_BYTES = 16_000_000  # The index of the largest published mixtures has 9 MB.
MAX_TOKENIZER_BYTES = 128_000_000  # Gemma 3's tokenizer.json has 33 MB.
MAX_DEPTH = 64
MAX_DIGITS = 64  # tokenizer_config.json says model_max_length=10^30, which is no number of 64 bits.
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false",
         list: "a list", dict: "an object", types.NoneType: "null"}
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: pathlib.Path | str, kind: Any = dict, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file.

    Args:
        path: The file; its name begins every error.
        kind: What the value must be, see `check_json`.
        max_bytes: A larger file is refused before it is read.

    Raises:
        ValueError: One line that names the file, the key, what was expected and what is there.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file, or not a regular one")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path}: has more than {max_bytes:,} bytes, which none of its kind has")
    return parse_json(data, str(path), kind)


def parse_json(
    data: bytes | str, where: str, kind: Any = dict, allow_nan: bool = False
) -> Any:
    """The value of a JSON text (a file, or one line of a file).

    Args:
        data: The text.
        where: What an error begins with, such as "metrics.jsonl, line 3".
        kind: What the value must be, see `check_json`.
        allow_nan: Takes the numbers NaN, Infinity and -Infinity, as Python writes them.

    Raises:
        ValueError: For what is no JSON, has a key twice, is nested deeper than 64 brackets or has a
            number of more than 64 digits, and for what `check_json` refuses.
    """
    def number(text: str) -> float:
        value = float(text)
        if not allow_nan and not math.isfinite(value):
            raise _Fault(f"{text[:20]} is no finite number")
        return value

    def whole(text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise _Fault(f"a number of {len(text)} digits")
        return int(text)

    try:
        data = data.encode() if isinstance(data, str) else data
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object, parse_int=whole,
                           parse_float=number, parse_constant=number)
        _check_nesting(value, has_surrogates=SURROGATE.search(data) is not None)
    except _Fault as error:
        raise ValueError(f"{where}: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: brackets are nested more than {MAX_DEPTH} deep") from None
    except UnicodeError:
        raise ValueError(f"{where}: no JSON: its bytes are not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON: {error}; is the file cut short or edited?") from None
    check_json(value, kind, where)
    return value


def check_json(value: Any, kind: Any, where: str, key: str = "") -> None:
    """Raises ValueError, naming the key, where a value of JSON has another type than expected.

    Args:
        value: What was read.
        kind: `int` (of 64 bits, no bool), `float` (also a whole number), `str`, `bool`, `list`,
            `dict`, `None`, `Any`; `list[KIND]`, `dict[str, KIND]`; `KIND | KIND` or a tuple of kinds,
            of which the first of the value's outermost type counts; or a mapping of keys to kinds,
            where one that may be null may also be left out, and other keys are free.
        where: What the error begins with.
        key: The place of the value within the file, such as "rope_scaling.factor".
    """
    fitting = next((each for each in _alternatives(kind) if _accepts(value, each)), _NOTHING)
    if fitting is _NOTHING:
        named = f"{key}={shown(value)}" if key else shown(value)
        raise ValueError(f"{where}: {named}: expected {_say(kind)}")
    if isinstance(fitting, Mapping):
        _check_keys(value, fitting, where, key)
    origin, inner = typing.get_origin(fitting), typing.get_args(fitting)
    if origin is list:
        for index, each in enumerate(value):
            check_json(each, inner[0], where, f"{key}[{index}]")
    if origin is dict:
        for name, each in value.items():
            check_json(each, inner[1], where, _joined(key, name))


def shown(value: Any, limit: int = 60) -> str:
    """A value as an error shows it: on one line, no control characters, not too long."""
    if isinstance(value, (list, dict)):
        return NAMES[type(value)]
    text = json.dumps(value) if value is None or isinstance(value, bool) else ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


class _Fault(Exception):
    """What is wrong inside the JSON, before its file is named."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise _Fault(f"{shown(name)} is there twice")
        made[name] = value
    return made


def _check_nesting(value: Any, has_surrogates: bool) -> None:
    """Refuses depth, on which later code would recurse, and texts that UTF-8 cannot hold."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise _Fault(f"brackets are nested more than {MAX_DEPTH} deep")
        if has_surrogates:
            for each in level:
                "".join(each if isinstance(each, (str, dict)) else "").encode()
        containers = [each for each in level if isinstance(each, (list, dict))]
        level = [inner for each in containers
                 for inner in (each.values() if isinstance(each, dict) else each)
                 if has_surrogates or isinstance(inner, (list, dict))]
        depth += 1


_NOTHING = object()


def _check_keys(value: dict[str, Any], kinds: Mapping[str, Any], where: str, key: str) -> None:
    for name, kind in kinds.items():
        if name not in value and not any(_accepts(None, each) for each in _alternatives(kind)):
            raise ValueError(f"{where}: {_joined(key, name)} is missing; expected {_say(kind)}")
        check_json(value.get(name), kind, where, _joined(key, name))


def _alternatives(kind: Any) -> tuple[Any, ...]:
    if isinstance(kind, tuple):
        return kind
    unions = (types.UnionType, typing.Union)
    return typing.get_args(kind) if typing.get_origin(kind) in unions else (kind,)


def _accepts(value: Any, kind: Any) -> bool:
    """Whether a value has the outermost type of a kind that has no alternatives."""
    if kind is Any:
        return True
    if isinstance(kind, Mapping):
        return isinstance(value, dict)
    kind = types.NoneType if kind is None else typing.get_origin(kind) or kind
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, int) and -(2**63) <= value < 2**63
    return isinstance(value, (int, float) if kind is float else kind)


def _say(kind: Any) -> str:
    several = _alternatives(kind)
    if len(several) > 1:
        return " or ".join(map(_say, several))
    if kind is Any or isinstance(kind, Mapping):
        return "a value" if kind is Any else NAMES[dict]
    if typing.get_origin(kind) is list:
        return f"a list, of {_say(typing.get_args(kind)[0])} each"
    return NAMES[types.NoneType if kind is None else typing.get_origin(kind) or kind]


def _joined(key: str, name: str) -> str:
    name = name if name.isprintable() and len(name) <= 100 else shown(name)
    return f"{key}.{name}" if key else name
