"""Every preset loads, says how it is launched, and has the published size and its golden shardings.

`python tests/test_configs.py --update` writes the golden files anew; read what changed.
"""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import shlex
import sys

import jax
import pytest
from jax.sharding import AbstractMesh

from batiste import command_line, main
from batiste.configs.experiment import Experiment, flatten, from_dict
from batiste.sharding import AXES
from batiste.train import make_program

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if "def get_config" in path.read_text())
# Parameters as published, and the devices that each docstring says it is meant for.
PRESETS = {
    "gpt2_124m": (124_439_808, 8),
    "c4_1b": (1_100_048_384, 16),
    "llama3_1b": (1_235_814_400, 16),
    "llama3_8b": (8_030_261_248, 64),
    "llama3_70b": (70_553_706_496, 1024),
    "mixtral_8x7b": (46_702_792_704, 64),
}
MOST_FIELDS = 150


def load(name: str) -> Experiment:
    return importlib.import_module(f"batiste.configs.{name}").get_config()


def abstract_program(name: str):
    """The preset laid out on as many devices as it is meant for, none of which is needed."""
    experiment, (_, devices) = load(name), PRESETS[name]
    mesh = AbstractMesh(experiment.mesh.shape(devices), AXES)
    return make_program(experiment.model, experiment.train, mesh, experiment.mesh)


def by_path(tree) -> dict[str, object]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def sharding_table(name: str) -> str:
    """One line per parameter: path, letters, shape, its sharding, that of its optimizer state."""
    program = abstract_program(name)
    state = program.abstract_state
    mesh = next(iter(jax.tree.leaves(state.params))).sharding.mesh
    lines = ["mesh " + " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
             + f" zero={program.layout.zero}"]
    letters, moments = by_path(program.letters), by_path(state.optimizer_state)
    for path, leaf in by_path(state.params).items():
        of_state = sorted({str(moment.sharding.spec) for where, moment in moments.items()
                           if where.endswith("/" + path)})
        lines.append(f"{path} {letters[path]} {leaf.shape} {leaf.sharding.spec} "
                     f"state {' '.join(of_state)}")
    return "\n".join(lines) + "\n"


def goldens() -> dict[str, str]:
    """What each golden file should hold now."""
    tables = {f"sharding_{name}.txt": sharding_table(name) for name in PRESETS}
    return tables | {"config_fields.txt": "\n".join(flatten(Experiment())) + "\n"}


def test_the_presets_are_the_configs_of_more_than_a_laptop():
    assert set(NAMES) - set(PRESETS) == {"objectives", "quickstart", "shakespeare"}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_valid_where_it_is_meant_to_run(name):
    load(name).validate_on(PRESETS[name][1] if name in PRESETS else 1)


class Launched(Exception):
    """Raised in place of training."""


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_holds_the_command_that_launches_it(name, monkeypatch):
    def launched(experiment, workdir, *others):
        raise Launched(experiment, workdir)

    monkeypatch.setattr(main, "train", launched)
    docstring = importlib.import_module(f"batiste.configs.{name}").__doc__
    command = re.search(r"^ {4}(batiste train .*)$", docstring, re.M)[1]
    assert f"--config=configs/{name}.py " in command
    with pytest.raises(Launched) as caught:
        command_line.run(shlex.split(command))
    assert caught.value.args == (load(name), f"runs/{name}")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_its_size_and_batch_and_has_them(name):
    published, _ = PRESETS[name]
    docstring = importlib.import_module(f"batiste.configs.{name}").__doc__
    leaves = jax.tree.leaves(abstract_program(name).abstract_state.params)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == published
    assert f"{published:,}" in docstring
    experiment = load(name)
    tokens = experiment.train.batch_size * experiment.data.sequence_length
    assert f"{tokens:,} tokens a" in " ".join(docstring.split())


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_json(name):
    experiment = load(name)
    restored = from_dict(Experiment, json.loads(json.dumps(dataclasses.asdict(experiment))))
    assert restored == experiment


def test_an_unknown_field_in_json_is_named():
    stored = dataclasses.asdict(Experiment())
    stored["model"]["num_lairs"] = 3
    with pytest.raises(ValueError, match="TransformerConfig has no field num_lairs"):
        from_dict(Experiment, stored)


@pytest.mark.parametrize("file", [f"sharding_{name}.txt" for name in PRESETS])
def test_the_derived_shardings_are_the_golden_ones(file):
    name = file.removeprefix("sharding_").removesuffix(".txt")
    assert sharding_table(name) == (GOLDEN / file).read_text()


def test_the_fields_are_frozen_and_few():
    fields = list(flatten(Experiment()))
    assert fields == (GOLDEN / "config_fields.txt").read_text().split()
    assert len(fields) <= MOST_FIELDS


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    for file_name, content in goldens().items():
        (GOLDEN / file_name).write_text(content)
