"""Laws of all config classes: fields are known, of their types, described, and survive copies.

The classes are found, not listed: every dataclass that an experiment or a task consists of.
"""

import copy
import dataclasses
import json
import math
import pickle
import typing

import numpy as np
import pytest

from batiste.configs.experiment import Experiment, flatten, from_dict
from batiste.data import RecordObjective
from batiste.fields import Config, alternatives, check_types, texts, types_of
from batiste.tasks import HeadConfig, TaskConfig
from batiste.train import TrainConfig


def inner(hint) -> list[type]:
    """The config classes that a declared type speaks of."""
    kinds = [part for kind in alternatives(hint) for part in (kind, *typing.get_args(kind))]
    return [kind for kind in kinds if dataclasses.is_dataclass(kind)]


def classes() -> list[type]:
    found = [Experiment, TaskConfig]
    for kind in found:
        found += [each for hint in types_of(kind).values() for each in inner(hint)
                  if each not in found]
    return list(dict.fromkeys(found))


CLASSES = classes()
OWNERS = {"experiment": Experiment, "task": TaskConfig}


def make(owner: str) -> Config:
    """A config with something in every tuple of configs."""
    if owner == "task":
        return TaskConfig(heads=(HeadConfig(classes=("a", "b")),))
    experiment = Experiment()
    experiment.data.objectives = (RecordObjective(),)
    return experiment


def places(config: Config, prefix: str = "") -> list[tuple[str, Config, str]]:
    """Dotted name, owner and name of every field, of configs inside a config too."""
    found = []
    for name in types_of(type(config)):
        value = getattr(config, name)
        found.append((prefix + name, config, name))
        if isinstance(value, Config):
            found += places(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Config):
                    found += places(item, f"{prefix}{name}[{index}].")
    return found


def wrong_values(hint) -> list:
    """Values of other types than the declared one."""
    kinds = alternatives(hint)
    wrong = [object(), {"a": 1}, b"1", 1j, np.int32(3), [1], ["a"]]
    if float not in kinds:
        wrong += [2.5]
    else:
        wrong += [math.nan, math.inf, -math.inf, np.float32(1)]
    if not {int, float} & set(kinds):
        wrong += [3]
    if str not in kinds:
        wrong += ["3", "1e-3", ""]
    if bool not in kinds:
        wrong += [True]
    if type(None) not in kinds:
        wrong += [None]
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            wrong += [(object(),), ([],), (None,)]
    return wrong


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_field_that_there_is_not_is_refused_where_it_is_set_and_where_it_is_given(kind):
    assert issubclass(kind, Config)
    config = kind()
    for name in types_of(kind):
        wrong = name + "_"
        with pytest.raises(AttributeError, match=rf"{kind.__name__} has no field '{wrong}'"):
            setattr(config, wrong, 1)
        with pytest.raises(TypeError, match=rf"{kind.__name__} has no field '{wrong}'"):
            kind(**{wrong: 1})
        assert wrong not in vars(config)
    with pytest.raises(AttributeError, match="; its fields are "):
        config.zzzzzzzz = 1


def test_the_nearest_field_is_named():
    with pytest.raises(AttributeError, match="TrainConfig has no field 'num_step'; did you mean "
                                             "'num_steps'"):
        Experiment().train.num_step = 12


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_copies_are_equal_and_as_strict(kind):
    config = kind()
    for copied in (dataclasses.replace(config), copy.copy(config), copy.deepcopy(config),
                   pickle.loads(pickle.dumps(config)),
                   from_dict(kind, json.loads(json.dumps(dataclasses.asdict(config))))):
        assert copied == config and copied is not config
        with pytest.raises(AttributeError):
            copied.no_such_field = 1
    with pytest.raises(TypeError, match="no_such_field"):
        dataclasses.replace(config, no_such_field=1)


@pytest.mark.parametrize("owner", OWNERS)
def test_a_value_of_another_type_is_refused_by_name_wherever_it_is(owner):
    config, seen = make(owner), 0
    config.validate() if owner == "task" else config.validate_on(1)
    for name, holder, field in places(config):
        right = getattr(holder, field)
        for value in wrong_values(types_of(type(holder))[field]):
            setattr(holder, field, value)
            with pytest.raises(ValueError) as error:
                config.validate()
            assert str(error.value).startswith((f"{name}=", f"{name}[0]=")), (name, value)
            assert ": expected " in str(error.value)
            seen += 1
        setattr(holder, field, right)
    config.validate()
    assert seen > 1000 or owner == "task" and seen > 300


@pytest.mark.parametrize("name", ["model", "data", "mesh", "train", "train.optimizer",
                                  "train.schedule", "train.health", "train.local",
                                  "train.loss_scale", "sample"])
def test_a_part_that_is_validated_alone_checks_its_types(name):
    part = Experiment()
    for each in name.split("."):
        part = getattr(part, each)
    for field in types_of(type(part)):
        changed = dataclasses.replace(part, **{field: object()})
        with pytest.raises(ValueError, match=rf"^{name}\.{field}="):
            changed.validate()


def test_whole_numbers_stand_for_floats_and_tuples_are_as_long_as_they_like():
    experiment = Experiment()
    experiment.train.schedule.learning_rate = 1
    experiment.model.layer_pattern = ("global",) * 5
    check_types(experiment)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_is(kind):
    said = texts(kind)
    single = {name for name, hint in types_of(kind).items() if not inner(hint)}
    assert single <= set(said)
    assert all(len(said[name]) > 8 for name in single)


def test_a_text_is_the_comment_beside_or_above_the_field_or_its_entry_in_the_docstring():
    said = texts(TrainConfig)
    assert said["num_steps"] == "updates of the whole run"
    assert said["faults"] == "what to do to a run on purpose (train/faults.py)."
    assert texts(type(Experiment().data.sources[0]))["weight"].startswith("the share of the train")
    assert texts(type(Experiment().model))["form"].startswith("decoder: sees the past; encoder: ")


def test_every_field_is_reached_from_the_command_lines_names():
    names = {name for name, holder, field in places(make("experiment"))
             if not inner(types_of(type(holder))[field]) or getattr(holder, field) == ()}
    assert names == set(flatten(make("experiment")))
