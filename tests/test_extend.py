"""Parts of one's own: each in one file, named by one field; the page about them, and what is refused.

That nothing leaks through mixers, positions, norms and activations of one's own, and that cached
decoding is the full forward with them, is among the laws of tests/test_model.py.
"""

import dataclasses
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from flax import nnx
from step_checks import alone, check_equal, three_steps, train_config
from test_resume import corpus, losses, tiny_experiment

from batiste.configs.experiment import Experiment, flatten
from batiste.configs.own_parts import load_own_parts
from batiste.data import RecordObjective
from batiste.main import evaluate, generate, train
from batiste.models import Transformer, TransformerConfig, resolve_attention
from batiste.sharding import MeshConfig

__all__ = ["corpus"]  # A fixture.
ROOT = pathlib.Path(__file__).parents[1]
OWN = ROOT / "docs/extend"
PAGE = (ROOT / "docs/extend.md").read_text()
MODEL = TransformerConfig(
    vocab_size=40, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24,
    max_length=16,
)


def own(**fields) -> TransformerConfig:
    """The model with parts of its own, known to the rooms."""
    model = dataclasses.replace(MODEL, **fields)
    load_own_parts(Experiment(model))
    return model


@pytest.mark.parametrize("mixer,mesh", [
    ("GatedRecurrence", MeshConfig(data=2, tensor=4, zero=2)),
    ("LSTM", MeshConfig(data=8, zero=3)),
])
def test_a_mesh_has_the_numbers_of_one_device(mixer, mesh):
    model = own(mixer=f"{OWN}/recurrent.py:{mixer}", positions="none")
    config = train_config("sgd")
    check_equal(three_steps(config, mesh, model), alone(config, model))


@pytest.mark.parametrize("fields", [
    {"model.activation": "snake.py:SNAKE"}, {"model.norm": "mean_size.py:mean_size"},
    {"model.positions": "half_rope.py:HALF"}, {"model.layer_pattern": ("blocks.py:blocks",)},
    {"data.objectives": (RecordObjective("backwards.py:backwards", rate=0.5),)},
    {"train.optimizer.kind": "signed.py:signed"},
], ids=lambda fields: next(iter(fields)))
def test_each_part_trains_by_one_line_and_is_not_what_it_stands_for(
        fields, corpus, tmp_path_factory, usual):
    experiment = small(corpus)
    for name, value in fields.items():
        *path, last = name.split(".")
        owner = experiment
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, placed(value))
    workdir = tmp_path_factory.mktemp("own")
    assert train(experiment, workdir).step == 4
    found = losses(workdir)
    assert all(np.isfinite(loss) for loss in found.values())
    assert found != usual


def placed(value):
    """The value with its files where they are."""
    if isinstance(value, str):
        return f"{OWN}/{value}"
    if isinstance(value, RecordObjective):
        return dataclasses.replace(value, kind=placed(value.kind))
    return tuple(map(placed, value))


def small(corpus: str) -> Experiment:
    """Four steps of a very small model."""
    experiment = tiny_experiment(corpus)
    experiment.train.num_steps, experiment.train.checkpoint.every = 4, 2
    experiment.train.schedule.warmup_steps = 1
    return experiment


@pytest.fixture(scope="module")
def usual(corpus, tmp_path_factory) -> dict:
    """The losses of the same run without parts of its own."""
    workdir = tmp_path_factory.mktemp("usual")
    train(small(corpus), workdir)
    return losses(workdir)


@pytest.mark.slow
def test_a_run_remembers_its_parts_and_refuses_to_go_on_with_others(corpus, tmp_path):
    code = (OWN / "recurrent.py").read_text()
    path = tmp_path / "mine.py"
    path.write_text(code)
    experiment, workdir = small(corpus), tmp_path / "run"
    experiment.model.mixer = f"{path}:GatedRecurrence"
    assert train(experiment, workdir).step == 4
    assert np.isfinite(evaluate(workdir).loss)
    assert len(generate(workdir, ["a", "bcd"])) == 2
    path.write_text(code + "# Another thought.\n")
    with pytest.raises(ValueError, match="runs .*mine.py, .* or has changed: .*--trust_code"):
        evaluate(workdir)
    experiment.train.num_steps = 5
    longer = ["train.num_steps"]
    with pytest.raises(ValueError, match="own code was .*mine.py=.* is .*mine.py="):
        train(experiment, workdir, resume_override=longer)
    assert train(experiment, workdir, resume_override=[*longer, "own code"]).step == 5
    assert np.isfinite(evaluate(workdir).loss)


@pytest.mark.parametrize("name,message", [
    ("nowhere.py:LSTM", "model.mixer=nowhere.py: no such file; expected FILE.py:NAME"),
    (f"{OWN}/recurrent.py:GRU", "recurrent.py has no 'GRU'"),
    ("lstm", "model.mixer='lstm': expected one of attention.*or FILE.py:NAME of your own"),
])
def test_a_part_that_is_not_there_is_one_line(name, message):
    with pytest.raises(ValueError, match=message):
        Experiment(dataclasses.replace(MODEL, mixer=name)).validate()


@pytest.mark.parametrize("model,mesh,message", [
    ({"attention_soft_cap": 3.0}, {}, "model.attention_soft_cap=3.0 does not know model.mixer="),
    ({}, {"stage": 3}, "mesh.stage=3 does not know model.mixer="),
    ({"attention": "v6e"}, {}, "not certified for model.mixer="),
])
def test_what_is_not_proven_of_a_mixer_is_refused(model, mesh, message):
    experiment = Experiment(own(mixer=f"{OWN}/recurrent.py:LSTM", positions="none"))
    experiment.data.vocab_size = 40
    experiment.data.sequence_length = 16
    experiment.model = dataclasses.replace(experiment.model, **model)
    experiment.mesh = dataclasses.replace(experiment.mesh, **mesh)
    with pytest.raises(ValueError, match=message):
        experiment.validate()
        resolve_attention(experiment.model, "TPU v6 lite", {})


def test_the_page_names_every_file_and_fields_that_there_are():
    files = {path.name for path in OWN.glob("*.py")}
    assert files == set(re.findall(r"\(extend/(\w+\.py)\)", PAGE))
    fields = set(flatten(Experiment()))
    for path in OWN.glob("*.py"):
        for field in re.findall(r"--config\.([\w.\[\]]+)=", path.read_text()):
            assert re.sub(r"\[.*", "", field) in fields, f"{path.name}: {field}"


def test_the_comparison_is_of_equal_parameters():
    counts = []
    scope = runpy.run_path(str(OWN / "compare.py"))
    for mixer in scope["WIDTHS"]:
        experiment = scope["get_config"](mixer)
        experiment.validate()
        model = nnx.eval_shape(lambda config=experiment.model: Transformer(config, rngs=nnx.Rngs(0)))
        counts.append(sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))))
    assert len(counts) == 3 and max(counts) < 1.002 * min(counts)
