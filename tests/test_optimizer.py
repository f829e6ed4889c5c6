"""Laws of the optimizers: what each does to a parameter follows from the letters of its dims."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste.train.optimizer import (FACTOR_MINIMUM, KINDS, MUON_UPDATE_RMS, OptimizerConfig,
                                     is_decayed, make_optimizer, optimizer_letters,
                                     parameter_group)
from batiste.train.schedule import ScheduleConfig, make_schedule

# Every size differs. D and F pass Adafactor's threshold, so both of its branches run.
SIZES = dict(L=3, E=2, D=130, N=4, H=6, F=140, V=150)
LETTERS = {
    "embedding": "VD", "head": "DV", "final_norm": "D",
    "query": "LDNH", "output": "LNHD", "up": "LDF", "down": "LFD",
    "norm": "LD", "query_bias": "LNH", "up_bias": "LF", "sinks": "LN",
    "experts": "LEDF", "router": "LDE",
}
GROUPS = {
    "embedding": ("embedding",), "head": ("head",),
    "matrix": ("query", "output", "up", "down", "experts", "router"),
    "vector": ("final_norm", "norm", "query_bias", "up_bias", "sinks"),
}
RATE = 0.01
PLAIN = dict(weight_decay=0.0, clip_norm=None)


def tree(seed, letters_tree=LETTERS):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=[SIZES[letter] for letter in letters]), jnp.float32)
            for name, letters in letters_tree.items()}


@functools.cache  # compiling takes most of the time of these tests
def compiled(fields, letters):
    optimizer = make_optimizer(OptimizerConfig(*fields), lambda step: RATE, dict(letters))
    return jax.jit(optimizer.init), jax.jit(optimizer.update)


def updates_of(config, params, gradients, letters_tree=LETTERS):
    """The updates of consecutive steps, `params` held fixed."""
    init, update = compiled(dataclasses.astuple(config), tuple(letters_tree.items()))
    state, history = init(params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        history.append(updates)
    return history


@pytest.mark.parametrize("kind", KINDS)
def test_a_stacked_update_is_each_layers_own_update(kind):
    config = OptimizerConfig(kind=kind, clip_norm=None)
    params, gradients = tree(0), [tree(1), tree(2)]
    # Layers of very different size, so that any statistic shared between them shows.
    gradients = [{name: x * jnp.arange(1.0, 4.0).reshape(-1, *[1] * (x.ndim - 1)) ** 3
                  if LETTERS[name][0] == "L" else x for name, x in g.items()} for g in gradients]
    stacked = updates_of(config, params, gradients)
    for layer in range(SIZES["L"]):
        def alone(values):
            return {name: x[layer] if LETTERS[name][0] == "L" else x for name, x in values.items()}
        own = updates_of(config, alone(params), [alone(g) for g in gradients],
                         {name: letters.removeprefix("L") for name, letters in LETTERS.items()})
        for together, single in zip(stacked, own):
            for name, update in alone(together).items():
                np.testing.assert_allclose(update, single[name], rtol=2e-4, atol=2e-6,
                                           err_msg=f"{name}, layer {layer}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quadratic_falls_under_jit(kind):
    letters = {name: LETTERS[name] for name in ("embedding", "query", "norm")}
    params, target = tree(3, letters), tree(4, letters)

    def loss(params):
        return sum(jnp.sum((params[name] - target[name]) ** 2) for name in letters)

    optimizer = make_optimizer(OptimizerConfig(kind=kind, **PLAIN), lambda step: 0.02, letters)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, start = optimizer.init(params), loss(params)
    for _ in range(60):
        params, state = step(params, state)
    assert loss(params) < 0.6 * start


def test_the_letters_say_the_group_and_the_decay():
    for group, names in GROUPS.items():
        for name in names:
            assert parameter_group(LETTERS[name]) == group, name
            assert is_decayed(LETTERS[name]) == (group != "vector"), name
    assert {parameter_group(letters) for letters in ("", "L", "LE", "LEF", "LKH", "LH")} == {
        "vector"}
    assert parameter_group("TD") == "embedding"
    assert {parameter_group(letters) for letters in ("LDKH", "LKHD", "LDR", "LRNH")} == {"matrix"}
    with pytest.raises(ValueError, match="'LDFV'.*input and an output"):
        parameter_group("LDFV")


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_decoupled_and_touches_exactly_what_maps(kind):
    params, gradients = tree(0), [tree(1)]
    (plain,) = updates_of(OptimizerConfig(kind=kind, **PLAIN), params, gradients)
    config = OptimizerConfig(kind=kind, clip_norm=None)
    (decayed,) = updates_of(config, params, gradients)
    for name in LETTERS:
        if name in GROUPS["vector"]:
            np.testing.assert_array_equal(decayed[name], plain[name])
        else:
            np.testing.assert_allclose(decayed[name] - plain[name],
                                       -RATE * config.weight_decay * params[name], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_multiplier_scales_its_group_exactly_and_no_other(kind):
    params, gradients = tree(0), [tree(1)]
    config = OptimizerConfig(kind=kind, clip_norm=None)
    (plain,) = updates_of(config, params, gradients)
    factors = dict(embedding=2.0, head=0.5, matrix=0.25, vector=4.0)  # powers of two: exact
    scaled_config = dataclasses.replace(
        config, **{f"{group}_multiplier": factor for group, factor in factors.items()})
    (scaled,) = updates_of(scaled_config, params, gradients)
    for group, names in GROUPS.items():
        for name in names:
            np.testing.assert_array_equal(scaled[name], factors[group] * plain[name], name)


def test_a_multiplier_of_zero_freezes():
    letters = {"embedding": "VD", "head": "DV"}
    (updates,) = updates_of(OptimizerConfig(head_multiplier=0.0), tree(0, letters),
                            [tree(1, letters)], letters)
    assert not updates["head"].any() and updates["embedding"].all()


def test_clipping_is_by_value_and_then_by_the_norm_of_everything():
    letters = {"embedding": "VD", "query_bias": "LNH"}
    params, gradient = tree(0, letters), tree(1, letters)
    plain_sgd = OptimizerConfig(kind="sgd", momentum=0.0, **PLAIN)

    def clipped(**fields):
        config = dataclasses.replace(plain_sgd, **fields)
        (updates,) = updates_of(config, params, [gradient], letters)
        return jax.tree.map(lambda update: -update / RATE, updates)

    by_value = jax.tree.map(lambda g: np.clip(g, -0.3, 0.3), gradient)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in by_value.values()))
    assert norm > 2
    for expected, fields in ((gradient, {}), (gradient, dict(clip_norm=1e6)),
                             (by_value, dict(clip_value=0.3)),
                             (jax.tree.map(lambda g: g * (2 / norm), by_value),
                              dict(clip_value=0.3, clip_norm=2.0))):
        jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5),
                     clipped(**fields), expected)


def by_the_paper(kind, w, gradients):
    """The updates of a matrix in NumPy, t counted from 1, before decay and learning rate."""
    m, v, v_row, v_col = np.zeros_like(w), np.zeros_like(w), np.zeros(len(w)), np.zeros(w.shape[1])
    for t, g in enumerate(gradients, start=1):
        match kind:
            case "adamw":
                m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g**2
                yield m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.7**t)) + 0.1)
            case "lion":
                yield np.sign(0.8 * m + 0.2 * g)
                m = 0.7 * m + 0.3 * g
            case "sgd":
                m = 0.6 * m + g
                yield m
            case "adafactor":
                decay = 1 - t**-0.8
                v_row = decay * v_row + (1 - decay) * np.mean(g**2, 1)
                v_col = decay * v_col + (1 - decay) * np.mean(g**2, 0)
                u = g / np.sqrt(np.outer(v_row, v_col) / v_row.mean())
                yield u / max(1, np.sqrt(np.mean(u**2))) * np.sqrt(np.mean(w**2))
            case "muon":
                m = 0.6 * m + 0.4 * g
                x = 0.6 * m / (1 - 0.6**(t + 1)) + 0.4 * g / (1 - 0.6**t)  # Nesterov
                x = x / np.linalg.norm(x)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                yield x * 0.2 * np.sqrt(max(x.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_follows_its_paper(kind):
    letters = {"up": "DF"}
    params, gradients = tree(0, letters), [tree(seed, letters) for seed in (1, 2, 3)]
    gradients[2]["up"] = 5 * gradients[2]["up"]  # so that Adafactor clips
    config = OptimizerConfig(kind=kind, beta1=0.8, beta2=0.7, epsilon=0.1 if kind == "adamw" else
                             1e-8, momentum=0.6, **PLAIN)
    wanted = by_the_paper(kind, np.asarray(params["up"], np.float64),
                          [np.asarray(g["up"], np.float64) for g in gradients])
    for updates, update in zip(updates_of(config, params, gradients, letters), wanted,
                               strict=True):
        np.testing.assert_allclose(updates["up"], -RATE * update, rtol=1e-3, atol=2e-6)


def test_the_schedule_scales_update_and_decay_of_every_step():
    letters = {"query": "LDNH", "norm": "LD"}
    params, gradient = tree(0, letters), tree(1, letters)
    schedule = make_schedule(ScheduleConfig(learning_rate=RATE, warmup_steps=2), 4)
    optimizer = make_optimizer(OptimizerConfig(), schedule, letters)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    constant = updates_of(OptimizerConfig(), params, [gradient] * 4, letters)
    for step, reference in enumerate(constant):
        updates, state = update(gradient, state, params)
        for name in letters:
            np.testing.assert_allclose(
                updates[name], schedule(step) / RATE * reference[name], rtol=1e-5)


def test_muon_orthogonalizes_from_the_input_to_the_output_dims():
    (updates,) = updates_of(OptimizerConfig(kind="muon", **PLAIN), tree(0), [tree(1)])
    inputs = dict(query=1, output=2, up=1, down=1, experts=1, router=1)
    for name, input_dims in inputs.items():
        batch = 2 if name == "experts" else 1
        size = np.prod(updates[name].shape[batch:batch + input_dims])
        matrices = np.asarray(updates[name]).reshape(
            np.prod(updates[name].shape[:batch]), size, -1) / RATE
        for matrix in matrices:
            # The Newton-Schulz iteration lands every singular value near 1 (0.7 to 1.2), times
            # sqrt(max(fans)) × 0.2: the update's root mean square is then about 0.2.
            singular = np.linalg.svd(matrix, compute_uv=False)
            relative = singular / (MUON_UPDATE_RMS * np.sqrt(max(matrix.shape)))
            assert 0.3 < relative.min() and relative.max() < 1.3, name
            assert 0.13 < np.sqrt(np.mean(matrix**2)) < 0.25, name


def test_muon_leaves_embedding_head_and_vectors_to_adam():
    (muon,), (adam,) = (updates_of(OptimizerConfig(kind=kind, **PLAIN), tree(0), [tree(1)])
                        for kind in ("muon", "adamw"))
    for name in LETTERS:
        same = np.allclose(muon[name], adam[name], rtol=1e-6)
        assert same == (name not in GROUPS["matrix"]), name


@pytest.mark.parametrize("kind", KINDS)
def test_state_letters_name_every_dim_of_every_moment(kind):
    params = jax.eval_shape(lambda: tree(0))
    optimizer = make_optimizer(OptimizerConfig(kind=kind), lambda step: RATE, LETTERS)
    state = jax.eval_shape(optimizer.init, params)
    letters = optimizer_letters(optimizer, params, LETTERS)
    assert jax.tree.structure(letters) == jax.tree.structure(state)
    for leaf, name in zip(jax.tree.leaves(state), jax.tree.leaves(letters), strict=True):
        if name:
            assert leaf.shape == tuple(SIZES[letter] for letter in name)
        else:
            assert leaf.size <= 3  # counts, Adafactor's placeholders, Muon's three coefficients
    moments = dict(adamw=2, lion=1, sgd=1)
    if kind in moments:
        named = sorted(name for name in jax.tree.leaves(letters) if name)
        assert named == sorted(list(LETTERS.values()) * moments[kind])


def test_adafactor_keeps_the_letters_of_the_dims_it_keeps_even_when_sizes_are_equal():
    # Equal sizes cannot be told apart by shape: F is dropped from the rows and D from the columns.
    letters = {"up": "LDF", "query": "LDNH"}
    params = {"up": jax.ShapeDtypeStruct((3, 256, 256), jnp.float32),
              "query": jax.ShapeDtypeStruct((3, 64, 8, 200), jnp.float32)}
    optimizer = make_optimizer(OptimizerConfig(kind="adafactor"), lambda step: RATE, letters)
    factored = optimizer_letters(optimizer, params, letters)[2][0]
    assert (factored.v_row["up"], factored.v_col["up"], factored.v["up"]) == ("LD", "LF", "")
    assert (factored.v_row["query"], factored.v["query"]) == ("", "LDNH")

    gradient = {"up": jnp.broadcast_to(jnp.arange(1.0, 257.0).reshape(1, 256, 1), (3, 256, 256)),
                "query": jnp.ones((3, 64, 8, 200))}
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    state = jax.jit(optimizer.update)(gradient, optimizer.init(zeros), zeros)[1][2][0]
    assert np.ptp(state.v_row["up"][0]) > 0 and np.ptp(state.v_col["up"][0]) == 0


def test_letters_of_the_wrong_rank_are_refused_with_the_path_of_the_parameter():
    letters = {"block": {"up_LDF": "LDF"}}
    optimizer = make_optimizer(OptimizerConfig(), lambda step: RATE, letters)
    params = {"block": {"up_LDF": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
    with pytest.raises(ValueError, match=r"\['block'\]\['up_LDF'\].*2 for shape \(2, 3\).*'LDF'"):
        optimizer_letters(optimizer, params, letters)


def test_adafactor_refuses_so_many_layers_that_it_would_factor_across_them():
    params = {"norm": jnp.ones((FACTOR_MINIMUM, 4))}
    message = r"train\.optimizer\.kind.*128 stacked layers \(and experts\), got 128"
    with pytest.raises(ValueError, match=message):
        updates_of(OptimizerConfig(kind="adafactor"), params, [params], {"norm": "LD"})


@pytest.mark.parametrize(("fields", "message"), [
    ({"kind": "adam"}, r"kind: expected one of .*got 'adam'; did you mean 'adamw'"),
    ({"beta1": 1.0}, r"beta1: expected in \[0, 1\), got 1\.0"),
    ({"momentum": -0.1}, r"momentum: expected"), ({"epsilon": 0.0}, r"epsilon: expected > 0"),
    ({"clip_norm": 0.0}, r"clip_norm: .*None means no clipping"),
    ({"clip_value": -1.0}, r"clip_value: expected > 0"),
    ({"weight_decay": float("nan")}, r"weight_decay=nan: expected a finite number"),
    ({"matrix_multiplier": -1.0}, r"matrix_multiplier: expected >= 0"),
])
def test_a_wrong_field_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=r"train\.optimizer\." + message):
        make_optimizer(OptimizerConfig(**fields), lambda step: RATE, LETTERS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_is_that_of_the_step_and_not_of_the_updates_made(kind):
    """An update after three that were skipped, by the state that these have left as it was."""
    params, gradient = tree(0), tree(1)
    schedule = make_schedule(ScheduleConfig(learning_rate=RATE, warmup_steps=2), 6)
    optimizer = make_optimizer(OptimizerConfig(kind=kind), schedule, LETTERS)
    (constant,) = updates_of(OptimizerConfig(kind=kind), params, [gradient])
    updates, _ = jax.jit(optimizer.update)(
        gradient, optimizer.init(params), params, step=jnp.int32(3))
    for name in LETTERS:
        np.testing.assert_allclose(
            updates[name], schedule(3) / RATE * constant[name], rtol=1e-5, atol=1e-9)
