"""A config for people: as a Python file that makes it again, and as a list of its fields' texts."""

import dataclasses
import textwrap
from typing import Any

from batiste.data.printable import printable
from batiste.fields import Config, texts, type_name, types_of

WIDTH = 100


def as_python(config: Config, command: str) -> str:
    """A Python file whose get_config returns this very config, every field written out.

    command: what printed it, for the file's docstring.
    """
    imports: dict[str, set[str]] = {}
    body = _expression(config, 1, imports)
    lines = [f"from {module} import {', '.join(sorted(names))}"
             for module, names in sorted(imports.items())]
    return (f'"""Printed by `{command}`: every field as it was resolved."""\n\n'
            + "\n".join(lines)
            + "\n\n\ndef get_config(arg=None):\n"
            f'    """The config; takes no argument."""\n    return {body}\n')


def _expression(value: Any, depth: int, imports: dict[str, set[str]]) -> str:
    """A value as an expression; notes in `imports` the classes that it names, by module."""
    inside, end = "    " * (depth + 1), "    " * depth
    if dataclasses.is_dataclass(value):
        kind = type(value)
        imports.setdefault(kind.__module__, set()).add(kind.__name__)
        fields = "".join(
            f"{inside}{name}={_expression(getattr(value, name), depth + 1, imports)},\n"
            for name in types_of(kind))
        return f"{kind.__name__}(\n{fields}{end})"
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        items = "".join(f"{inside}{_expression(item, depth + 1, imports)},\n" for item in value)
        return f"(\n{items}{end})"
    return repr(value)


def field_list(config: Config) -> str:
    """Every field as its flag, with its value in this config, its type and what it is."""
    return "\n".join(_groups(config, "config"))


def _groups(config: Config, prefix: str) -> list[str]:
    """The lines of a config's own fields, and then those of the configs inside it."""
    said, own, inside = texts(type(config)), [], []
    for name, hint in types_of(type(config)).items():
        value, flag = getattr(config, name), f"{prefix}.{name}"
        if dataclasses.is_dataclass(value):
            inside += _groups(value, flag)
            continue
        several = isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])
        shown = f"{len(value)} of them" if several else _as_flag(value)
        own.append(f"  --{flag}={shown}  ({type_name(hint)})")
        own += textwrap.wrap(said[name], WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for index, item in enumerate(value if several else ()):
            inside += _groups(item, f"{flag}[{index}]")
    title = f"\n{prefix} ({type(config).__name__}):"
    return [title, *own, *inside] if own else inside


def _as_flag(value: Any) -> str:
    """A value as it is written after the equals sign."""
    return printable(value) if isinstance(value, str) and value else repr(value)
