"""Toy tasks that tiny encoders learn, for the laws of tasks."""

import dataclasses
import random

import jax
import numpy as np
from flax import nnx

from batiste.data import load_tokenizer, text_reader
from batiste.models import Transformer, TransformerConfig
from batiste.sharding import MeshConfig
from batiste.tasks import Example, Given, HeadConfig, Task, TaskConfig

READER = text_reader(load_tokenizer("bytes"))
# Dims that data 4 and tensor 2 divide, all different: D 24, N 6, K 2, H 4, F 40.
ENCODER = TransformerConfig(
    form="encoder", vocab_size=258, num_layers=2, model_dim=24, num_heads=6, num_kv_heads=2,
    head_dim=4, mlp_dim=40, max_length=40, token_types=2, norm="layer", bias="all",
)
HEADS = (
    HeadConfig("letter", "sequence", ("a", "e", "o"), pool="first", balanced_loss=True,
               focal=1.0),
    HeadConfig("has", "multilabel", ("a_or_e", "e_or_o"), weight=0.5),
    HeadConfig("case", "tags", ("lower", "number"), weight=2.0),
    HeadConfig("number", "span", longest=4),
)
PAIRS = (HeadConfig("same", "similarity", temperature=0.1),)


def examples(count: int, seed: int) -> list[Example]:
    """Words of one vowel, most often "a", with a number among them: all heads can be told."""
    draw, found = random.Random(seed), []
    for index in range(count):
        letter = draw.choices("aeo", (5, 2, 2))[0]
        words = [f"{draw.choice('bdgk')}{letter}" * draw.randint(1, 2)
                 for _ in range(draw.randint(2, 4))]
        place, number = draw.randrange(len(words) + 1), str(draw.randint(1, 999))
        words.insert(place, number)
        text = " ".join(words)
        start = len(" ".join(words[:place])) + (place > 0)
        labels = {
            "letter": letter, "has": ["a_or_e"] * (letter in "ae") + ["e_or_o"] * (letter in "eo"),
            "case": ["number" if word.isdigit() else "lower" for word in words],
            "number": [[start, start + len(number)]],
        }
        # Heads have labels for examples of their own.
        if index % 3 == 0:
            del labels[("has", "case", "number")[index // 3 % 3]]
        found.append(Example(text, None, labels))
    return found


def letters(count: int, seed: int) -> list[Example]:
    """The same with labels for the first head alone."""
    return [dataclasses.replace(each, labels={"letter": each.labels["letter"]})
            for each in examples(count, seed)]


def pairs(count: int, seed: int) -> list[Example]:
    """Two texts of the same letter in another case, and now and then of two letters."""
    draw, found = random.Random(seed), []
    for index in range(count):
        letter = chr(ord("a") + index % 12)
        same = index % 5 > 0
        other = letter if same else chr(ord("a") + (index + 5) % 12)
        found.append(Example(letter * draw.randint(2, 5), other.upper() * draw.randint(2, 5),
                             {"same": same}))
    return found


def task_config(**changes) -> TaskConfig:
    """Sixteen examples a step on one device, without dropout."""
    config = TaskConfig(
        heads=HEADS, max_length=36, dropout=0.0, num_steps=80, batch_size=16,
        mesh=MeshConfig(data=1))
    config.schedule.learning_rate, config.schedule.warmup_steps = 1e-2, 10
    return dataclasses.replace(config, **changes)


def given(train: list[Example], validation: list[Example]) -> Given:
    """What `tune` is given: an encoder that has learned nothing yet."""
    def weights():
        drawn = nnx.state(Transformer(ENCODER, rngs=nnx.Rngs(5)), nnx.Param)
        return jax.device_get(nnx.to_pure_dict(drawn))

    return Given(ENCODER, READER, train, validation, weights)


def make_task(config: TaskConfig, train=None, validation=None, devices=1) -> Task:
    """A task on the first devices."""
    of = pairs if config.apart else examples
    train = of(96, 1) if train is None else train
    validation = of(48, 2) if validation is None else validation
    return Task(config, given(train, validation), jax.devices()[:devices])


def run_steps(task: Task, count: int):
    """The state after so many steps from the start, and the last metrics."""
    state, metrics = task.begin(), None
    for _, batch in zip(range(count), task.batches(0)):
        state, metrics = task.train_step(state, batch)
    return state, jax.device_get(metrics)


def assert_close(one, other, tolerance: float) -> None:
    """Every array of two trees agrees within `tolerance` of its largest number."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max(initial=0) <= tolerance * max(1.0, np.abs(a).max(initial=0))
