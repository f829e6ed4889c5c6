"""Pipelines in whole runs: checkpoints on other meshes, samples, refusals, a TPU's compiler."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from step_checks import place_batch, start, train_config
from test_pipeline import DEEP
from test_resume import corpus, losses, tiny_experiment

from batiste.configs.experiment import Experiment
from batiste.main import evaluate, generate, train
from batiste.sharding import MeshConfig, layer_order
from batiste.train import Checkpoints, from_checkpoint
from batiste.train.config import CheckpointConfig

__all__ = ["corpus"]  # A fixture.


def more_steps(program, step, mesh, state):
    """Losses of two more steps, and the state after."""
    batch, history = place_batch(mesh), []
    for _ in range(2):
        state, metrics = step(state, batch)
        history.append(float(metrics["loss"]))
    return state, history


def test_layers_are_stored_stage_by_stage():
    assert layer_order(8, 2, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert layer_order(6, 3, 1).tolist() == list(range(6))
    assert layer_order(12, 2, 3).tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


@pytest.mark.slow
@pytest.mark.parametrize("kind,others", [
    ("adamw", [MeshConfig(tensor=2), MeshConfig(stage=4, tensor=2, micro_batches=4, zero=1)]),
    ("adafactor", [MeshConfig(stage=2, micro_batches=2, interleave=2, zero=3)]),
])
def test_a_checkpoint_continues_on_other_stages(kind, others, tmp_path):
    config, stored = train_config(kind), MeshConfig(stage=2, micro_batches=2, interleave=3)
    mesh, program, step = start(config, stored, model=DEEP)
    state, _ = more_steps(program, step, mesh, program.initialize())
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(2, state, {})
    checkpoints.finish(2, state, {})
    _, expected = more_steps(program, step, mesh, state)
    for other in others:
        mesh, program, step = start(config, other, model=DEEP)
        restored = checkpoints.restore(2, program.abstract_state)
        restored = from_checkpoint(program, restored, stored)
        for leaf, abstract in zip(
                jax.tree.leaves(restored), jax.tree.leaves(program.abstract_state), strict=True):
            assert leaf.sharding == abstract.sharding
        _, history = more_steps(program, step, mesh, restored)
        # Adafactor divides by what is nearly zero for a bias: rounding shows.
        np.testing.assert_allclose(history, expected, rtol=1e-6 if kind == "adamw" else 1e-5)
    checkpoints.close()


def four_steps(corpus: str, mesh: MeshConfig) -> Experiment:
    """Four layers; no dropout, which micro-batches draw anew each; the likeliest byte as sample."""
    experiment = tiny_experiment(corpus)
    experiment.model.num_layers, experiment.model.dropout = 4, 0.0
    experiment.train.num_steps, experiment.sample.temperature = 4, 0.0
    experiment.mesh = mesh
    return experiment


@pytest.mark.slow
def test_a_run_changes_its_stages_evaluates_and_samples(corpus, tmp_path):
    alone, piped = tmp_path / "alone", tmp_path / "piped"
    result = train(four_steps(corpus, MeshConfig()), alone)
    experiment = four_steps(corpus, MeshConfig(stage=4, micro_batches=4))
    experiment.train.stop.flops = 1.0  # One step, the least there is.
    assert train(experiment, piped).step == 1
    experiment = four_steps(corpus, MeshConfig(stage=2, micro_batches=2, interleave=2, zero=1))
    piped_result = train(experiment, piped, resume="must")
    assert piped_result.step == 4
    for key, loss in losses(alone).items():
        assert losses(piped)[key] == pytest.approx(loss, rel=1e-6), key
    # `train` measures and samples on the run's mesh, the other two on one of `data` alone.
    assert piped_result.validation.loss == pytest.approx(result.validation.loss, rel=1e-6)
    assert evaluate(piped).loss == pytest.approx(result.validation.loss, rel=1e-6)
    texts = generate(alone, experiment.sample.prompts)
    assert generate(piped, experiment.sample.prompts) == texts
    samples = [workdir.joinpath("report.md").read_text().split("## Samples")[1].split("##")[0]
               for workdir in (alone, piped)]
    assert samples[0] == samples[1] and texts[0] in samples[0]


def experiment_on(mesh: MeshConfig, **model) -> Experiment:
    """A valid one on eight devices, but for what is changed."""
    experiment = Experiment(mesh=mesh)
    experiment.model = dataclasses.replace(experiment.model, **{"num_layers": 12, **model})
    return experiment


@pytest.mark.parametrize("mesh,model,message", [
    (dict(stage=4), dict(num_layers=6), "num_layers=6 is not.*mesh.stage=4.*multiple of 4"),
    (dict(stage=2, interleave=4, micro_batches=4), {}, "mesh.interleave=4: choose a multiple of 8"),
    (dict(stage=4, interleave=3, micro_batches=6), {}, "micro_batches=6.*mesh.stage=4.*choose 8"),
    (dict(micro_batches=2), {}, "mesh.micro_batches=2 has no effect.*raise mesh.stage"),
    (dict(interleave=2), {}, "mesh.interleave=2 has no effect"),
    (dict(stage=2, micro_batches=0), {}, "mesh.micro_batches=0: expected at least 1"),
    (dict(stage=2, micro_batches=8), {}, r"= 16 seq.*mesh.data=4 \* mesh.micro_batches=8.*of 32"),
    (dict(stage=4, tensor=2), dict(vocab_size=4100), "model.vocab_size=4100.*mesh.stage=4"),
    (dict(stage=2), dict(model_dim=12), "model.model_dim=12.*by 8.*samples.*multiple of 8"),
])
def test_a_pipeline_that_cannot_be_is_refused_in_one_line(mesh, model, message):
    experiment_on(MeshConfig(stage=2, micro_batches=2, interleave=2)).validate_on(8)
    with pytest.raises(ValueError, match=message) as error:
        experiment_on(MeshConfig(**mesh), **model).validate_on(8)
    assert "\n" not in str(error.value)


def test_the_fused_loss_refuses_stages():
    experiment = experiment_on(MeshConfig(stage=2))
    experiment.train.objective.fused = True
    with pytest.raises(ValueError, match="vocabulary split over mesh.stage=2"):
        experiment.validate()


@pytest.mark.slow
@pytest.mark.parametrize("mesh,pattern", [
    (dict(stage=4, tensor=2, micro_batches=4), ("local", "global", "global")),
    (dict(stage=2, data=2, tensor=2, micro_batches=4, interleave=2, zero=2), ("global",)),
])
def test_a_pipeline_with_kernels_compiles_for_a_tpu(mesh, pattern):
    from test_tpu import MODEL, compile_step  # Skips where there is no libtpu.

    window = 128 if "local" in pattern else None
    model = dataclasses.replace(
        MODEL, num_layers=8, attention="v5e", layer_pattern=pattern, window=window)
    text = compile_step("v5e:2x4", MeshConfig(**mesh), model, optimized=False)[1].as_text()
    assert "tpu_custom_call" in text
    # Each way, a micro-batch of 4 rows (2 with data 2), half of its time with tensor 2.
    rows = 16 // 4 // mesh.get("data", 1)
    sent = re.findall(r"collective-permute-start.*? = \(([a-z]+\d+\[[\d,]*\])", text)
    assert set(sent) == {f"bf16[{rows},128,256]"} and len(sent) == 2
    assert "all-to-all" not in text
