"""Local steps = workers alone and the outer formula; compression; what is sent and refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch
from crossings import crossings
from step_checks import BATCH, alone, largest_error, place_batch, start, train_config
from test_resume import tiny_experiment
from test_slices import FOUR, MESHES, SMALL, compiled, shares

from batiste.configs.experiment import Experiment
from batiste.data import Batch
from batiste.evaluation import make_row_losses
from batiste.main import evaluate, train
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import Checkpoints, ObjectiveConfig
from batiste.train.compression import BLOCK, decode, encode
from batiste.train.config import CheckpointConfig
from batiste.train.local_steps import LocalStepsConfig, exchanged_bytes, make_exchange
from batiste.train.metrics import read_metrics


def local(config, **fields):
    """The same run with local steps."""
    return dataclasses.replace(config, local=LocalStepsConfig(**fields))


def plain_sgd(num_steps: int):
    """No momentum, no clipping: a step is linear in the gradient."""
    config = train_config("sgd")
    config.num_steps = num_steps
    config.optimizer = dataclasses.replace(config.optimizer, momentum=0.0, clip_norm=None)
    return config


def test_a_local_step_and_a_plain_exchange_are_a_synchronous_step():
    tokens = BATCH.weights_BT.sum(axis=1).reshape(2, -1).sum(axis=1)
    assert tokens[0] == tokens[1]  # Otherwise a mean over slices is not that over tokens.
    config = plain_sgd(3)
    expected = alone(config)
    own = local(config, steps=1, outer_learning_rate=1.0, outer_momentum=0.0)
    mesh, program, step = start(own, MeshConfig(slice=2, data=2, tensor=2, zero=1))
    state, batch = program.initialize(), place_batch(mesh)
    for wanted in expected.history["loss"]:
        state, metrics = step(state, batch)
        assert metrics["loss"].shape == (2,)
        np.testing.assert_allclose(float(metrics["loss"].mean()), wanted, rtol=1e-6)
    # A unit of fp32's last place at 1 is 1.2e-7; three steps on other machines gave 1.01e-6.
    assert largest_error(jax.device_get(state.params), expected.params) <= 2e-6


STEPS, OUTER = 5, dict(steps=2, outer_learning_rate=0.7, outer_momentum=0.9)


@functools.cache
def two_workers_by_hand():
    """What DiLoCo is: two runs on one device each, and the outer formula in NumPy float64."""
    config = dataclasses.replace(train_config("sgd"), num_steps=STEPS)
    mesh, program, step = start(config, MeshConfig(data=1), jax.devices()[:1], SMALL)
    halves = [Batch(*(x[rows] for x in BATCH[:5])) for rows in (np.s_[:4], np.s_[4:])]
    batches = [place_batch(mesh, half) for half in halves]
    states = [program.initialize() for _ in halves]
    anchor = jax.device_get(states[0].params)
    momentum = jax.tree.map(lambda x: np.zeros(x.shape), anchor)
    losses = []
    for number in range(1, STEPS + 1):
        states, metrics = zip(*(step(state, batch) for state, batch in zip(states, batches)))
        losses.append([float(each["loss"]) for each in metrics])
        if number % OUTER["steps"] and number != STEPS:
            continue
        ways = [jax.tree.map(np.subtract, anchor, jax.device_get(state.params)) for state in states]
        mean = jax.tree.map(lambda a, b: (a.astype(np.float64) + b) / 2, *ways)
        momentum = jax.tree.map(lambda m, g: OUTER["outer_momentum"] * m + g, momentum, mean)
        anchor = jax.tree.map(
            lambda x, m, g: np.float32(
                x - OUTER["outer_learning_rate"] * (g + OUTER["outer_momentum"] * m)),
            anchor, momentum, mean)
        restart = jax.device_put([anchor, anchor], jax.devices()[0])
        states = [state._replace(params=params) for state, params in zip(states, restart)]
    return np.array(losses), anchor


@pytest.mark.parametrize("zero", [0, 3])
def test_local_steps_are_two_workers_and_the_outer_formula(zero):
    config = local(dataclasses.replace(train_config("sgd"), num_steps=STEPS), **OUTER)
    program, step, batch, text = compiled(config, FOUR, zero, SMALL)
    crossed = crossings(text, 2, 4)
    assert crossed and all(conditional for *_, conditional in crossed)
    state, losses, sent = program.initialize(), [], []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(np.asarray(metrics["loss"]))
        sent.append(float(metrics["slice_bytes"]))
    assert step.jitted._cache_size() == 1
    losses_by_hand, anchor = two_workers_by_hand()
    np.testing.assert_allclose(losses, losses_by_hand, rtol=1e-6)
    assert largest_error(jax.device_get(state.params), anchor) <= 1e-6
    exchanged = sum(size for _, size, _ in crossed)
    # The last step exchanges, though it is the first since the last exchange.
    assert sent == [0, exchanged, 0, exchanged, exchanged]
    assert exchanged == 4 * sum(size for _, size in shares(program, FOUR))


@pytest.mark.parametrize("shape", [(3, 700), (2, 5), (2, BLOCK)])
def test_int8_is_within_half_a_step_of_every_block(shape):
    random = np.random.default_rng(0)
    # Blocks of very different sizes, and one of zeros.
    x = random.normal(size=shape) * np.exp(5 * np.sin(np.arange(shape[1]) // BLOCK))
    x[0, :BLOCK] = 0
    x = x.astype(np.float32)
    sent = encode(jnp.asarray(x), "int8", 1.0)
    assert sent[0].dtype == jnp.int8
    received = np.asarray(decode(sent, shape, "int8"))
    for start_of in range(0, shape[1], BLOCK):
        block, got = x[:, start_of:start_of + BLOCK], received[:, start_of:start_of + BLOCK]
        bound = np.abs(block).max(axis=1, keepdims=True) / 254
        assert (np.abs(block - got) <= bound * (1 + 1e-5)).all()
    assert np.abs(x - received).max() > 0
    codes, scales = (array.size * array.dtype.itemsize for array in sent)
    block = min(BLOCK, shape[1])
    assert (codes, scales) == (shape[0] * -(-shape[1] // block) * block, 4 * codes // block)


def test_top_k_keeps_the_largest_of_each_row_and_all_if_asked():
    x = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32)
    received = np.asarray(decode(encode(jnp.asarray(x), "top_k", 0.1), x.shape, "top_k"))
    for row, got in zip(x, received):
        kept = np.argsort(-np.abs(row))[:5]
        want = np.zeros_like(row)
        want[kept] = row[kept]
        np.testing.assert_array_equal(got, want)
    everything = decode(encode(jnp.asarray(x), "top_k", 1.0), x.shape, "top_k")
    np.testing.assert_array_equal(everything, x)


EXCHANGED = TransformerConfig(
    vocab_size=600, num_layers=3, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=6, mlp_dim=24,
    max_length=16, bias="all",
)


def exchanges(fields, times: int, sizes=MESHES[1]):
    """What `times` exchanges alone do to random ways of two slices.

    Returns the program, the anchors after each, the ways that each slice went in all, the last
    residual, the bytes that were counted and what crosses in the compiled text.
    """
    plain = dict(steps=1, outer_learning_rate=1.0, outer_momentum=0.0)
    config = local(train_config("sgd"), **plain, **fields)
    mesh, program, _ = start(config, MeshConfig(**sizes), model=EXCHANGED)
    letters, random = program.letters, np.random.default_rng(0)
    exchange = make_exchange(config.local, letters, 0)
    with jax.set_mesh(mesh):
        state = program.initialize()
        run = (state.params, state.optimizer_state, state.workers.params, state.workers.residual)
        places = jax.tree.map(lambda leaf: leaf.sharding, run)
        jitted = jax.jit(exchange, out_shardings=places).lower(*run).compile()
        anchors = [jax.device_get(state.params)]
        ways = jax.tree.map(np.zeros_like, jax.device_get(state.workers.params))
        for _ in range(times):
            way = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), ways)
            ways = jax.tree.map(np.add, ways, way)
            own = jax.tree.map(lambda a, w: a[None] - w, anchors[-1], way)
            run = jitted(*run[:2], jax.device_put(own, places[2]), run[3])
            anchors.append(jax.device_get(run[0]))
    counted = exchanged_bytes(config.local, mesh, letters, program.abstract_state.params)
    crossed = crossings(jitted.as_text(), 2, 8)
    return program, anchors, ways, jax.device_get(run[3]), counted, crossed


@pytest.mark.parametrize("fields,entry", [
    (dict(compression="int8"), None), (dict(compression="top_k", kept_fraction=0.05), 8)], ids=str)
def test_what_compression_loses_arrives_later(fields, entry):
    """The anchor has gone all the way that slices went on average, but for the last residual."""
    program, anchors, ways, residual, counted, crossed = exchanges(fields, 4)
    gone = jax.tree.map(np.subtract, anchors[0], anchors[-1])
    want = jax.tree.map(lambda way, left: (way - left).mean(axis=0), ways, residual)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), gone, want)
    assert max(np.abs(left).max() for left in jax.tree.leaves(residual)) > 1e-3
    # Half of what a gather yields on two slices, which is what a device has itself.
    size = 0
    for name, share in shares(program, MESHES[1]):
        rows = EXCHANGED.num_layers if name[0] == "L" else 1
        row, block = share // rows, min(BLOCK, share // rows)
        blocks = -(-row // block)
        size += rows * (blocks * (block + 4) if entry is None else entry * math.ceil(0.05 * row))
    assert {kind for kind, *_ in crossed} == {"all-gather"}
    assert counted == size == sum(sent for _, sent, _ in crossed)
    plain = 4 * sum(share for _, share in shares(program, MESHES[1]))
    assert counted < 0.3 * plain


def test_residual_and_what_was_sent_are_the_whole_bit_for_bit():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 600)).astype(np.float32))
    for compression in ("int8", "top_k"):
        received = decode(encode(x, compression, 0.1), x.shape, compression)
        np.testing.assert_array_equal((x - received) + received, x)


def test_all_entries_kept_is_no_compression():
    _, plain, *_ = exchanges({}, 2)
    _, kept, _, residual, *_ = exchanges(dict(compression="top_k", kept_fraction=1.0), 2)
    assert largest_error(kept[-1], plain[-1]) <= 1e-6
    assert all((left == 0).all() for left in jax.tree.leaves(residual))


@functools.cache
def loss_after_training(steps: int | None, **fields) -> float:
    """Cross-entropy of a batch, in nats per token, after 128 steps that learn it by heart."""
    config = local(train_config("adamw"), steps=steps, **fields)
    config.num_steps, config.schedule.learning_rate = 128, 3e-3
    mesh, program, step = start(config, MeshConfig(slice=2, data=1), jax.devices()[:2], SMALL)
    state, batch = program.initialize(), place_batch(mesh)
    for _ in range(config.num_steps):
        state, _ = step(state, batch)
    row_losses = make_row_losses(program, mesh, ObjectiveConfig())
    losses_B = row_losses(state.params, batch, np.ones(40, np.float32)).nats_B
    return float(np.sum(losses_B)) / float(BATCH.weights_BT.sum())


@pytest.mark.parametrize("fields,band", [
    (dict(), 1.05),  # 0.23 here, and 0.35 of synchronous steps.
    (dict(compression="int8"), 1.05),  # 0.23.
    # 0.60. With the default momentum of 0.9 and 0.1 kept it is 1.77: what arrives late overshoots.
    (dict(compression="top_k", kept_fraction=0.25, outer_momentum=0.6), 2.0),
], ids=str)
def test_local_steps_learn(fields, band):
    synchronous = loss_after_training(None)
    assert synchronous < 0.5  # From ln 40 = 3.7.
    assert loss_after_training(4, **fields) <= band * synchronous


def test_resuming_amid_local_steps_is_bit_equal(tmp_path):
    config = local(train_config("adamw"), steps=4, compression="int8")
    config.num_steps = 8
    mesh, program, step = start(config, MeshConfig(**FOUR, zero=3), jax.devices()[:4], SMALL)
    batches = [
        place_batch(mesh, make_batch(8, 12, 40, number)) for number in range(8)]
    checkpoints, state = Checkpoints(tmp_path, CheckpointConfig()), program.initialize()
    for number, batch in enumerate(batches):
        if number == 6:  # After one exchange, and amid the steps before the next.
            checkpoints.save(number, state, {})
            checkpoints.finish(number, state, {})
        state, _ = step(state, batch)
    assert any(np.abs(left).max() > 0 for left in jax.tree.leaves(state.workers.residual))
    resumed = checkpoints.restore(6, program.abstract_state)
    checkpoints.close()
    for batch in batches[6:]:
        resumed, _ = step(resumed, batch)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


def test_slices_drop_different_entries():
    """With the same rows in both slices, dropout alone tells them apart."""
    model = dataclasses.replace(SMALL, dropout=0.2)
    config = local(plain_sgd(4), steps=4)
    mesh, program, step = start(config, MeshConfig(**FOUR), jax.devices()[:4], model)
    twice = Batch(*(np.concatenate([x[:4], x[:4]]) for x in BATCH[:5]))
    _, metrics = step(program.initialize(), place_batch(mesh, twice))
    one, other = metrics["loss"]
    assert one != other


@pytest.mark.slow
def test_bfloat16_and_float16_run_in_slices():
    for dtype, fields in (("bfloat16", {}), ("float16", {}), ("float16", dict(steps=2))):
        model = dataclasses.replace(SMALL, dtype=dtype, num_kv_heads=2)
        config = local(train_config("adamw"), **fields)
        sizes = MeshConfig(slice=2, data=1, tensor=2)
        mesh, program, step = start(config, sizes, jax.devices()[:4], model)
        state, batch = program.initialize(), place_batch(mesh)
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(jnp.mean(metrics["loss"])))
        assert losses[2] < losses[0]
        if dtype == "float16":
            assert float(jnp.mean(metrics["skipped"])) == 0


def test_bytes_per_device_of_local_steps():
    """Each slice has its own parameters and moments; outer momentum and residuals are shares."""
    config = local(train_config("adamw"), steps=2, compression="int8")
    for zero in (0, 1, 3):
        _, program, _ = start(config, MeshConfig(**FOUR, zero=zero), jax.devices()[:4], SMALL)
        state = program.abstract_state

        def on_device(tree):
            return sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))

        whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        share = sum(size for _, size in shares(program, FOUR))
        params, moments = (share if zero >= 3 else whole), 2 * (share if zero >= 1 else whole)
        assert on_device(state.params) == on_device(state.workers.params) == params
        counts = len([x for x in jax.tree.leaves(state.workers.optimizer_state) if x.ndim == 1])
        assert on_device(state.workers.optimizer_state) == moments + counts
        assert on_device(state.optimizer_state) == on_device(state.workers.residual) == share


@pytest.mark.parametrize("fields,message", [
    (dict(steps=0), "train.local.steps: expected >= 1"),
    (dict(compression="int8"), "train.local.compression='int8'.*set train.local.steps"),
    (dict(steps=2, compression="zip"), "train.local.compression"),
    (dict(steps=2, kept_fraction=0.0), "train.local.kept_fraction"),
    (dict(steps=2, outer_momentum=1.0), "train.local.outer_momentum"),
    (dict(steps=2, outer_learning_rate=0.0), "train.local.outer_learning_rate"),
    (dict(steps=2), "train.local.steps=2 .*mesh.slice=1: set mesh.slice"),
])
def test_local_steps_that_cannot_be_are_refused(fields, message):
    experiment = Experiment()
    experiment.train.local = LocalStepsConfig(**fields)
    with pytest.raises(ValueError, match=message):
        experiment.validate()


@pytest.mark.slow
def test_a_run_with_local_steps_from_end_to_end(tmp_path):
    """What is trained, evaluated, restored and refused, by the front door."""
    (tmp_path / "corpus").mkdir()
    for index in range(40):
        text = "".join(f"{index * line} is {index} times {line}\n" for line in range(30))
        (tmp_path / "corpus" / f"{index}.txt").write_text(text)
    experiment = tiny_experiment(f"{tmp_path}/corpus/*.txt")
    experiment.mesh = MeshConfig(slice=2, tensor=1)
    experiment.train.local = LocalStepsConfig(steps=4, compression="int8")
    experiment.train.num_steps = 10
    result = train(experiment, tmp_path / "run")
    assert result.step == 10
    records = [each for each in read_metrics(tmp_path / "run") if each["kind"] == "train"]
    sent = [each["slice_bytes"] for each in records]
    assert [number for number, each in enumerate(sent, 1) if each] == [4, 8, 10]
    assert len(set(sent)) == 2 and all(math.isfinite(each["loss"]) for each in records)
    assert evaluate(tmp_path / "run").loss == pytest.approx(result.validation.loss, rel=1e-6)
    experiment.mesh = MeshConfig(slice=4)
    with pytest.raises(ValueError, match="mesh.slice was 2, is 4"):
        train(experiment, tmp_path / "run")
