"""What every config is made of: known fields, each of a type, each with a text that says what it is.

A config is a dataclass that derives from `Config`. A field that it does not have is refused where
it is set, and `check_types` refuses a value of another type by the field's dotted name.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import math
import re
import reprlib
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Any

# The words of a message, by the type that a field declares.
NAMES = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}


class Config:
    """Base of the config dataclasses: a field that does not exist is refused where it is set."""

    def __new__(cls, *values: Any, **fields: Any) -> "Config":
        """A config; TypeError, with the nearest name, for a field that its class does not have."""
        for name in fields:
            if name not in cls.__dataclass_fields__:
                raise TypeError(unknown_field(cls, name))
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:
            raise AttributeError(unknown_field(type(self), name))
        object.__setattr__(self, name, value)


def unknown_field(kind: type, name: str) -> str:
    """The message about a field that a config class does not have."""
    near = difflib.get_close_matches(name, kind.__dataclass_fields__, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else (
        f"; its fields are {', '.join(kind.__dataclass_fields__)}")
    return f"{kind.__name__} has no field {name!r}{hint}"


@functools.cache
def types_of(kind: type) -> dict[str, Any]:
    """The declared type of each field of a config class."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def check_types(config: Any, prefix: str = "") -> None:
    """Raises ValueError, naming `prefix` and the field, for a value that is not of its field's type.

    A bool is no number, a list is no tuple, and neither NaN nor infinity is a number. A whole
    number stands for a float, too. Configs inside a config are checked with it.
    """
    for name, hint in types_of(type(config)).items():
        _check(prefix + name, getattr(config, name), hint)


def _check(name: str, value: Any, hint: Any) -> None:
    kinds = alternatives(hint)
    if value is None and types.NoneType in kinds:
        return
    kinds = [kind for kind in kinds if kind is not types.NoneType]
    for kind in kinds:
        if typing.get_origin(kind) is tuple and isinstance(value, tuple):
            for index, item in enumerate(value):
                _check(f"{name}[{index}]", item, typing.get_args(kind)[0])
            return
        if dataclasses.is_dataclass(kind) and isinstance(value, kind):
            check_types(value, f"{name}.")
            return
    if not any(_is_one(value, kind) for kind in kinds):
        raise ValueError(f"{name}={reprlib.repr(value)}: expected {type_name(hint)}")


def _is_one(value: Any, kind: Any) -> bool:
    """Whether a value is of a type that is neither a tuple nor a config."""
    if kind is float:
        return type(value) is int or (isinstance(value, float) and math.isfinite(value))
    return type(value) is kind


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a declared type allows, one or several."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def type_name(hint: Any) -> str:
    """A declared type in words."""
    words = []
    for kind in alternatives(hint):
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            items = item.__name__ if dataclasses.is_dataclass(item) else NAMES[item].split()[-1]
            words.append(f"a tuple of {items}s, such as (…,)")
        elif kind is types.NoneType:
            words.append("None")
        else:
            words.append(NAMES[kind] if kind in NAMES else f"a {kind.__name__}")
    return " or ".join(words)


def texts(kind: type) -> dict[str, str]:
    """What each field of a config class is, from the comments beside it or the class's docstring.

    A comment stands at the end of the field's line, or in the lines right above it. In the
    docstring an entry is `name: text`, or `name, other: text`, at the beginning of a sentence.
    """
    found = dict(_docstring_entries(kind))
    source = textwrap.dedent(inspect.getsource(kind))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    own_line = [line.lstrip().startswith("#") for line in source.splitlines()]
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = node.lineno - 1
        while own_line[above - 1]:
            above -= 1
        said = [comments[line] for line in (*range(above + 1, node.lineno), node.end_lineno)
                if line in comments]
        if said:
            found[node.target.id] = " ".join(said)
    return found


def _docstring_entries(kind: type) -> Iterator[tuple[str, str]]:
    """Field and text of every entry in a class's docstring."""
    names = kind.__dataclass_fields__
    word = rf"(?:{'|'.join(names)})\b"
    entry = re.compile(rf"(?:^|(?<=[.;] ))({word}(?:, {word})*): ")
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(kind.__doc__)):
        _, *entries = entry.split(" ".join(paragraph.split()))
        for fields, text in zip(entries[::2], entries[1::2], strict=True):
            for name in fields.split(", "):
                yield name, text.strip()
