"""Several slices = one device; what crosses between slices, exactly; local steps and compression."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch
from jax.sharding import NamedSharding, PartitionSpec
from test_sharding import (
    BATCH, WIDE, on_one_device, root_mean_square, start, three_steps, train_config,
)

from batiste.configs.experiment import Experiment
from batiste.data import Batch
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig, make_mesh, place
from batiste.train import Checkpoints
from batiste.train.compression import BLOCK, decode, encode
from batiste.train.config import CheckpointConfig
from batiste.train.local_steps import LocalStepsConfig, exchanged_bytes, make_exchange

MESHES = [dict(slice=2, data=4), dict(slice=2, data=2, tensor=2)]
# Two slices of two devices, for laws that need no more.
FOUR = dict(slice=2, data=2)
SMALL = TransformerConfig(
    vocab_size=40, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=6, mlp_dim=24,
    max_length=16,
)


def worst_error(mine, theirs) -> float:
    """The largest relative error of a parameter; see test_sharding.py for the floor."""
    return max(jax.tree.leaves(jax.tree.map(
        lambda a, b: root_mean_square(a - b) / max(root_mean_square(b), 0.01), mine, theirs)))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_slices_equal_one_device(sizes, zero):
    history, params = three_steps(train_config("sgd"), MeshConfig(**sizes, zero=zero))
    history_alone, params_alone = on_one_device("sgd")
    np.testing.assert_allclose(history, history_alone, rtol=1e-6)
    assert worst_error(params, params_alone) <= 1e-6


def test_micro_batches_and_four_slices_equal_one_device():
    config = train_config("sgd", accumulation=2)
    history, params = three_steps(config, MeshConfig(slice=4, data=1, tensor=2, zero=1))
    history_alone, params_alone = on_one_device("sgd")
    np.testing.assert_allclose(history, history_alone, rtol=1e-6)
    assert worst_error(params, params_alone) <= 1e-6


def replica_groups(line: str) -> list[list[int]]:
    """Which devices a collective of a compiled program's text joins, in any of XLA's notations."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
        return [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]

    def ids(dims, order):
        iota = np.arange(math.prod(dims)).reshape(dims)
        return iota.transpose([int(i) for i in order.split(",")] if order else range(len(dims)))

    def numbers(text):
        return [int(i) for i in text.split(",")]

    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return ids(numbers(iota[2]), iota[3]).reshape(numbers(iota[1])).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}",
        line)
    sizes = [int(size) for size in re.findall(r"=(\d+)", named[1])]
    axes = [int(axis) for axis in re.findall(r"'axis_(\d+)'", named[4])]
    devices = ids(numbers(named[2]) if named[2] else sizes, named[3]).reshape(sizes)
    size = math.prod(sizes[axis] for axis in axes)
    return np.moveaxis(devices, axes, range(len(sizes) - len(axes), len(sizes))).reshape(
        -1, size).tolist()


def test_groups_are_read_in_every_notation():
    want = [[0, 4], [1, 5], [2, 6], [3, 7]]
    for text in ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "replica_groups=[4,2]<=[2,4]T(1,0)",
                 "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}",
                 "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}",
                 "source_target_pairs={{0,4},{1,5},{2,6},{3,7}}"):
        assert replica_groups(text) == want
    assert replica_groups("replica_groups=[2,4]<=[8]") == [[0, 1, 2, 3], [4, 5, 6, 7]]


def crossings(text: str, slices: int, devices: int) -> list[tuple[str, float, bool]]:
    """Every collective between slices: its kind, the bytes a device sends, whether it is conditional.

    Written from the definitions: a sum of n bytes over S devices takes 2 (S - 1) / S n, a gather of n
    bytes in all (S - 1) / S n. Each must join the same device of every slice.
    """
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    conditional, found = computations_in_a_condition(text), []
    for name, lines in computations(text).items():
        for line in lines:
            match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
            if match is None:
                continue
            groups = replica_groups(line)
            of_slices = [[i // (devices // slices) for i in group] for group in groups]
            if all(len(set(group)) == 1 for group in of_slices):
                continue
            assert all(sorted(group) == list(range(slices)) for group in of_slices), line
            size = sum(
                math.prod(int(dim) for dim in dims.split(",") if dim) * int(re.sub(r"\D", "", dtype)) // 8
                for dtype, dims in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", match[1])
            )
            share = (slices - 1) / slices
            sent = {"all-reduce": 2 * share * size, "all-gather": share * size}[match[2]]
            found.append((match[2], sent, name in conditional))
    return found


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a compiled program; the one that runs is called ENTRY."""
    found, lines = {}, []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = found.setdefault("ENTRY" if header[1] else header[2], [])
        lines.append(line)
    return found


def computations_in_a_condition(text: str) -> set[str]:
    """The computations that run only where a conditional chooses them."""
    all_of, always, queue = computations(text), set(), ["ENTRY"]
    while queue:
        name = queue.pop()
        if name in always:
            continue
        always.add(name)
        for line in all_of[name]:
            if " conditional(" not in line:
                queue += [each for each in re.findall(r"%([\w.\-]+)", line) if each in all_of]
    return set(all_of) - always


def parts(letters: str, sizes: dict[str, int]) -> int:
    """Among how many devices of a slice an array is split that is also split over data."""
    tensor = sizes.get("tensor", 1) if set(letters) & set("NKFV") else 1
    return tensor * (sizes["data"] if "D" in letters else 1)


def shares(program, sizes: dict[str, int]) -> list[tuple[str, int]]:
    """The letters of each parameter, and how many of its entries a device has a share of."""
    names, leaves = jax.tree.leaves(program.letters), jax.tree.leaves(program.abstract_state.params)
    return [(name, leaf.size // parts(name, sizes)) for name, leaf in zip(names, leaves)]


def compiled(config, sizes: dict[str, int], zero: int = 0, model=WIDE):
    """The program, the step, a batch, and the compiled text."""
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh, program, step = start(config, MeshConfig(**sizes, zero=zero), devices, model)
    batch = place(mesh, BATCH, Batch(*("BT",) * 5))
    with jax.set_mesh(mesh):
        text = step.jitted.lower(program.abstract_state, batch).compile().as_text()
    return program, step, batch, text


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("sizes", [*MESHES, dict(slice=4, data=2)], ids=str)
def test_only_shares_of_gradients_cross_and_their_bytes_are_reported(sizes, zero):
    program, step, batch, text = compiled(train_config("sgd"), sizes, zero)
    slices = sizes["slice"]
    crossed = crossings(text, slices, 8)
    assert {kind for kind, *_ in crossed} == {"all-reduce"}
    entries = sum(size for _, size in shares(program, sizes)) + 3  # And three sums of losses.
    sent = 2 * (slices - 1) / slices * 4 * entries
    assert sum(size for _, size, _ in crossed) == sent
    assert entries < sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params)) / 1.9
    assert float(step(program.initialize(), batch)[1]["slice_bytes"]) == sent


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
    alone = three_steps(config, MeshConfig(data=1), jax.devices()[:1])
    own = local(config, steps=1, outer_learning_rate=1.0, outer_momentum=0.0)
    mesh, program, step = start(own, MeshConfig(slice=2, data=2, tensor=2, zero=1))
    state, batch = program.initialize(), place(mesh, BATCH, Batch(*("BT",) * 5))
    for wanted, _ in alone[0]:
        state, metrics = step(state, batch)
        assert metrics["loss"].shape == (2,)
        np.testing.assert_allclose(float(metrics["loss"].mean()), wanted, rtol=1e-6)
    assert worst_error(jax.device_get(state.params), alone[1]) <= 1e-6


STEPS, OUTER = 5, dict(steps=2, outer_learning_rate=0.7, outer_momentum=0.9)


@functools.cache
def two_workers_by_hand():
    """What DiLoCo is: two runs on one device each, and the outer formula in NumPy float64."""
    config = dataclasses.replace(train_config("sgd"), num_steps=STEPS)
    mesh, program, step = start(config, MeshConfig(data=1), jax.devices()[:1], SMALL)
    halves = [Batch(*(x[rows] for x in BATCH)) for rows in (np.s_[:4], np.s_[4:])]
    batches = [place(mesh, half, Batch(*("BT",) * 5)) for half in halves]
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
        states = [state._replace(params=jax.device_put(anchor, jax.devices()[0])) for state in states]
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
    assert worst_error(jax.device_get(state.params), anchor) <= 1e-6
    exchanged = sum(size for _, size, _ in crossed)
    # The last step exchanges, though it is the first since the last exchange.
    assert sent == [0, exchanged, 0, exchanged, exchanged]
    assert exchanged == 4 * sum(size for _, size in shares(program, FOUR))


@pytest.mark.parametrize("shape", [(3, 700), (1, 5), (2, BLOCK)])
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
    max_length=16, bias=True,
)


def exchanges(fields, times: int, sizes=MESHES[1]):
    """What `times` exchanges alone do to random ways of two slices.

    Returns the anchors after each, the ways that each slice went in all, the last residual, the bytes
    that were counted and those in the compiled text.
    """
    config = local(train_config("sgd"), steps=1, outer_learning_rate=1.0, outer_momentum=0.0, **fields)
    mesh, program, _ = start(config, MeshConfig(**sizes), model=EXCHANGED)
    letters, random = program.letters, np.random.default_rng(0)
    abstract = program.abstract_state
    exchange = make_exchange(config.local, letters, 0)
    places = jax.tree.map(lambda leaf: leaf.sharding, (
        abstract.params, abstract.optimizer_state, abstract.workers.params, abstract.workers.residual))
    with jax.set_mesh(mesh):
        state = program.initialize()
        run = (state.params, state.optimizer_state, state.workers.params, state.workers.residual)
        jitted = jax.jit(exchange, out_shardings=places).lower(*run).compile()
        anchors, ways = [jax.device_get(state.params)], jax.tree.map(np.zeros_like, jax.device_get(run[2]))
        for _ in range(times):
            way = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), ways)
            ways = jax.tree.map(np.add, ways, way)
            own = jax.tree.map(lambda a, w: a[None] - w, anchors[-1], way)
            run = jitted(*run[:2], jax.device_put(own, places[2]), run[3])
            anchors.append(jax.device_get(run[0]))
    counted = exchanged_bytes(config.local, mesh, letters, abstract.params)
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
    assert worst_error(kept[-1], plain[-1]) <= 1e-6
    assert all((left == 0).all() for left in jax.tree.leaves(residual))


CONVERGENCE_STEPS = 32
# Loss of the anchor after 32 steps on one batch, relative to synchronous training: (band).
BANDS = {"none": 1.1, "int8": 1.1, "top_k": 1.1}


@functools.cache
def loss_after_training(steps: int | None, **fields) -> float:
    """Cross-entropy of the batch after a run that learns it by heart."""
    config = local(train_config("adamw"), steps=steps, **fields)
    config.num_steps, config.schedule.learning_rate = CONVERGENCE_STEPS, 1e-2
    mesh, program, step = start(config, MeshConfig(**FOUR), jax.devices()[:4], SMALL)
    state, batch = program.initialize(), place(mesh, BATCH, Batch(*("BT",) * 5))
    for _ in range(CONVERGENCE_STEPS):
        state, _ = step(state, batch)
    from batiste.evaluation import make_row_losses
    from batiste.train import ObjectiveConfig
    losses_B = make_row_losses(program, mesh, ObjectiveConfig())(state.params, batch)
    return float(jnp.sum(losses_B)) / float(BATCH.weights_BT.sum())


@pytest.mark.parametrize("compression", list(BANDS))
def test_local_steps_learn_as_well_as_synchronous_ones(compression):
    synchronous = loss_after_training(None)
    assert synchronous < 2.5  # From ln 40 = 3.7.
    loss = loss_after_training(4, compression=compression, kept_fraction=0.1)
    print(compression, loss, synchronous)
    assert loss <= BANDS[compression] * synchronous


def test_resuming_amid_local_steps_is_bit_equal(tmp_path):
    config = local(train_config("adamw"), steps=4, compression="int8")
    config.num_steps = 8
    mesh, program, step = start(config, MeshConfig(**FOUR, zero=3), jax.devices()[:4], SMALL)
    batches = [
        place(mesh, make_batch(8, 12, 40, number), Batch(*("BT",) * 5)) for number in range(8)]
    checkpoints, state = Checkpoints(tmp_path, CheckpointConfig()), program.initialize()
    for number, batch in enumerate(batches):
        if number == 6:  # After one exchange, and amid the steps before the next.
            checkpoints.save(number, state, {})
            checkpoints.wait()
        state, _ = step(state, batch)
    assert any(np.abs(left).max() > 0 for left in jax.tree.leaves(state.workers.residual))
    resumed = checkpoints.restore(6, program.abstract_state)
    anchor = checkpoints.restore_params(6, program.abstract_state.params)
    jax.tree.map(np.testing.assert_array_equal, anchor, resumed.params)
    checkpoints.close()
    for batch in batches[6:]:
        resumed, _ = step(resumed, batch)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


def test_slices_drop_different_entries():
    """With the same rows in both slices, dropout alone tells them apart."""
    model = dataclasses.replace(SMALL, dropout=0.2)
    config = local(plain_sgd(4), steps=4)
    mesh, program, step = start(config, MeshConfig(**FOUR), jax.devices()[:4], model)
    twice = Batch(*(np.concatenate([x[:4], x[:4]]) for x in BATCH))
    _, metrics = step(program.initialize(), place(mesh, twice, Batch(*("BT",) * 5)))
    one, other = metrics["loss"]
    assert one != other


def test_bfloat16_and_float16_run_in_slices():
    for dtype, fields in (("bfloat16", {}), ("float16", {}), ("float16", dict(steps=2))):
        model = dataclasses.replace(SMALL, dtype=dtype, num_kv_heads=2)
        config = local(train_config("adamw"), **fields)
        mesh, program, step = start(config, MeshConfig(slice=2, data=1, tensor=2), jax.devices()[:4], model)
        state, batch = program.initialize(), place(mesh, BATCH, Batch(*("BT",) * 5))
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(jnp.mean(metrics["loss"])))
        assert losses[2] < losses[0]
        if dtype == "float16":
            assert float(jnp.mean(metrics["skipped"])) == 0


def test_bytes_per_device_of_local_steps():
    """Each slice has its own parameters and moments; the outer momentum and residuals are shares."""
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


def test_shares_that_do_not_divide_are_refused():
    experiment = Experiment()
    experiment.mesh = MeshConfig(slice=2, data=4)
    experiment.model.model_dim = 258
    with pytest.raises(ValueError, match="model.model_dim=258 .*mesh.data=4.*mesh.slice=2"):
        experiment.validate_on(8)
    with pytest.raises(ValueError, match="dim D of size 18.*mesh.data=4"):
        start(train_config("sgd"), MeshConfig(slice=2, data=4),
              model=dataclasses.replace(SMALL, model_dim=18))


def test_a_slice_is_devices_in_a_row():
    mesh = make_mesh(MeshConfig(slice=4, tensor=2))
    assert [[device.id for device in each.flat] for each in mesh.devices] == [
        [0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="does not fit the 8 devices"):
        make_mesh(MeshConfig(slice=3))
