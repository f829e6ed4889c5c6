"""Parts of your own, named FILE.py:NAME in a config: read once, and put where rooms look names up."""

import pathlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import xxhash

from batiste.configs.user_code import module_name, run_file
from batiste.data import OWN_KINDS as OBJECTIVES
from batiste.models import ACTIVATIONS, LAYER_KINDS, MIXERS, NORMS, TURNS
from batiste.train import OWN_KINDS as OPTIMIZERS


def load_own_parts(experiment: Any) -> None:
    """Makes every FILE.py:NAME of an experiment known to the room that looks it up.

    Raises ValueError, naming the field, where there is no such file or nothing of that name in it.
    """
    for field, name, table in _own(experiment):
        if name not in table:
            path, _, attribute = name.rpartition(":")
            module = load_module(field, path)
            if not hasattr(module, attribute):
                raise ValueError(f"{field}={name!r}: {path} has no {attribute!r}")
            table[name] = getattr(module, attribute)


def own_files(experiment: Any) -> list[str]:
    """Every file that parts of an experiment's own come from."""
    return sorted({name.rpartition(":")[0] for _, name, _ in _own(experiment)})


def own_code(experiment: Any) -> dict[str, str]:
    """The hash of each file that parts of an experiment's own come from."""
    return {path: xxhash.xxh3_128_hexdigest(pathlib.Path(path).read_bytes())
            for path in own_files(experiment)}


def _own(experiment: Any) -> Iterator[tuple[str, str, dict]]:
    """Field, name and table of what is not batiste's own."""
    model = experiment.model
    named: list[tuple[str, str, Mapping]] = [
        ("model.mixer", model.mixer, MIXERS),
        ("model.activation", model.activation, ACTIVATIONS),
        ("model.norm", model.norm, NORMS),
        ("model.positions", model.positions, TURNS),
        ("train.optimizer.kind", experiment.train.optimizer.kind, OPTIMIZERS),
        *(("model.layer_pattern", kind, LAYER_KINDS) for kind in model.layer_pattern),
        *((f"data.objectives[{index}].kind", objective.kind, OBJECTIVES)
          for index, objective in enumerate(experiment.data.objectives)),
    ]
    yield from (each for each in named if ":" in str(each[1]))


def load_module(field: str, path: str) -> ModuleType:
    """The module that a file is, read once; ValueError, naming the field, where there is none."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"{field}={path}: no such file; expected FILE.py:NAME, the file as seen from "
                         f"{pathlib.Path.cwd()}")
    name = module_name(path)
    return sys.modules[name] if name in sys.modules else run_file(field, path)
