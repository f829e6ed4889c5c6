"""--config and the flags of its fields: loads the file, and sets what ml_collections cannot.

ml_collections parses --config.NAME=VALUE by the field's type. It knows neither None, nor a field of
several types (a duration: steps or a fraction), nor a list of configs; these are set here, before.
"""

import ast
import dataclasses
import difflib
import pathlib
import re
import types
import typing
from typing import Any

from absl import flags
from ml_collections import config_flags

from batiste.fields import alternatives, type_name, types_of

HELP = "Python file with get_config; FILE:ARG passes it ARG. Each field of it is a flag."


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines --config and a flag for each field that `argv` overrides.

    What is set here is taken out of `argv`. Raises ValueError for a file that makes no config, for
    an unknown field, and for a value that is set here and cannot be.
    """
    flags.DEFINE_bool(
        "print_config", False, "Print the whole config as a Python file, and do nothing else.",
        flag_values=values)
    given = [argument.partition("=")[2] for argument in argv if _is_config(argument)]
    if not given:
        flags.DEFINE_string("config", None, HELP, flag_values=values)
        return
    config = load(given[-1])
    if not dataclasses.is_dataclass(config):
        flags.DEFINE_string("config", None, HELP, flag_values=values)
        raise ValueError(f"config={given[-1]}: get_config must return an Experiment, or a "
                         f"TaskConfig, got {type(config).__name__}")
    argv[:] = apply(config, argv)
    config_flags.DEFINE_config_dataclass(
        "config", config, HELP, values, sys_argv=argv, parse_fn=lambda text: config)


def _is_config(argument: str) -> bool:
    return re.match(r"--?config=", argument) is not None


def load(place: str) -> Any:
    """What get_config of FILE.py, or of FILE.py:ARG, returns; ValueError for whatever it raises."""
    from batiste.configs.user_code import own_errors, run_file

    path, *arguments = place.split(":", 1)
    get_config = getattr(run_file("config", path), "get_config", None)
    if get_config is None:
        raise ValueError(f"config={path}: has no get_config, which is to return an Experiment")
    with own_errors("config", path):
        return get_config(*arguments)


def apply(config: Any, argv: list[str]) -> list[str]:
    """Sets what ml_collections cannot on `config`; returns the arguments that are left to it.

    Lists of configs come first, so that --config.data.sources[1].weight finds its source.
    """
    left, last = [], {}
    for argument in _joined(argv, config):
        match = re.fullmatch(r"--?config\.([^=]+)=(.*)", argument, re.S)
        if match:
            last[match[1]] = (match[2], argument)
        else:
            left.append(argument)
    for name in [name for name in last if _makes_configs(config, name)]:
        _set(config, name, last.pop(name)[0])
    for name, (text, argument) in last.items():
        _, _, hint = find(config, name)
        kinds = [kind for kind in alternatives(hint) if kind is not types.NoneType]
        if text in ("None", "none") or len(kinds) > 1:
            _set(config, name, text)
        else:
            left.append(argument)
    return left


def _joined(argv: list[str], config: Any) -> list[str]:
    """The arguments with every override as --config.NAME=VALUE, whichever way it was written."""
    joined: list[str] = []
    for argument in argv:
        flag = re.fullmatch(r"--?(no)?config\.([^=]+)", argument)
        before = re.fullmatch(r"--?config\.([^=]+)", joined[-1]) if joined else None
        if before:
            joined[-1] += f"={argument}"
        elif flag and find(config, flag[2])[2] is bool:
            joined.append(f"--config.{flag[2]}={'false' if flag[1] else 'true'}")
        else:
            joined.append(argument)
    return joined


def _makes_configs(config: Any, name: str) -> bool:
    """Whether a field is a tuple of configs."""
    if "[" in name:
        return False
    hint = find(config, name)[2]
    return typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0])


def find(config: Any, name: str) -> tuple[Any, str, Any]:
    """Owner, name and declared type of the field with this dotted name.

    Raises ValueError, with the nearest name, where there is no such field, and with the way to make
    more of them where an index is past the end.
    """
    owner, walked = config, ""
    parts = re.findall(r"[^.\[\]]+|\[[^\]]*\]", name)
    for index, part in enumerate(parts):
        if part.startswith("["):
            owner = _item(owner, part, name, walked)
        elif not dataclasses.is_dataclass(owner) or part not in types_of(type(owner)):
            raise ValueError(unknown(config, name))
        elif index == len(parts) - 1:
            hint = types_of(type(owner))[part]
            if dataclasses.is_dataclass(hint):
                inside = ", ".join(f"--config.{name}.{field}" for field in types_of(hint))
                raise ValueError(f"--config.{name} is no single value; it consists of {inside}")
            return owner, part, hint
        else:
            owner = getattr(owner, part)
        walked += part if part.startswith("[") else f".{part}" if walked else part
    raise ValueError(f"--config.{name}: expected the whole tuple, as in --config."
                     f"{name.rpartition('[')[0]}=FIRST,SECOND")


def _item(values: Any, part: str, name: str, walked: str) -> Any:
    """The item of a tuple of configs that [INDEX] names; name: of the field that is looked for."""
    if not isinstance(values, tuple):
        raise ValueError(f"--config.{name}: --config.{walked} has no entries")
    number = part.strip("[]")
    if not number.isdigit() or int(number) >= len(values):
        raise ValueError(
            f"--config.{name}: entries of --config.{walked} are counted from 0 and there are "
            f"{len(values)}; --config.{walked}=FIRST,SECOND makes two, and so on")
    return values[int(number)]


def unknown(config: Any, name: str) -> str:
    """The message about a field that a config does not have, with the nearest one."""
    from batiste.configs.experiment import flatten

    names = list(flatten(config))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    last = [known for known in names if known.rsplit(".")[-1] == name.rsplit(".")[-1]]
    hint = f"; did you mean --config.{(last or near)[0]}?" if last or near else ""
    return f"unknown field --config.{name}{hint}"


def _set(config: Any, name: str, text: str) -> None:
    """Sets a field that is absent, of several types, or a tuple of configs.

    "none" is a word where a field is a string (model.remat has it among its choices).
    """
    owner, field, hint = find(config, name)
    kinds = alternatives(hint)
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return setattr(owner, field, tuple(kind(each) for each in _words(text)))
    if text in ("None", "none"):
        if types.NoneType in kinds:
            return setattr(owner, field, None)
        if hint is str and text == "none":
            return setattr(owner, field, text)
        raise ValueError(f"--config.{name}=None: expected a value, this field cannot be absent")
    for kind in (int, float):
        if kind in kinds:
            try:
                return setattr(owner, field, kind(text))
            except ValueError:
                continue
    raise ValueError(f"--config.{name}={text}: expected {type_name(hint)}")


def _words(text: str) -> list[str]:
    """The words of a list on the command line: a,b or ('a', 'b'); none of nothing or ()."""
    if text.startswith(("(", "[")):
        try:
            return [str(word) for word in ast.literal_eval(text)]
        except (SyntaxError, ValueError, TypeError):
            pass
    return [word for word in text.split(",") if word]


def find_file(argument: str, package: pathlib.Path) -> str:
    """Lets --config=configs/x.py be found in the package when not in the current directory."""
    match = re.fullmatch(r"--?config=([^:]+)((?::.*)?)", argument)
    if not match or pathlib.Path(match[1]).is_file():
        return argument
    if (package / match[1]).is_file():
        return f"--config={package / match[1]}{match[2]}"
    known = sorted(f"configs/{path.name}" for path in (package / "configs").glob("*.py")
                   if "def get_config" in path.read_text())
    near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"config={match[1]}: no such file; known are {', '.join(known)}{hint}")
