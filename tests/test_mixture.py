"""A mixture of experts = the naive formula, on one device and on meshes that split the experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossings import replica_groups, without_groups_of_one
from flax import nnx
from step_checks import (
    BATCH, alone, check_bytes_per_device, check_equal, collectives, parameters, place_batch, start,
    three_steps, train_config,
)

from batiste.configs.experiment import Experiment
from batiste.models import Transformer, TransformerConfig
from batiste.models.mixture import Mixture
from batiste.models.router import route
from batiste.sharding import MeshConfig, make_mesh, place, shardings
from batiste.train.checkpoint import Checkpoints
from batiste.train.config import CheckpointConfig
from batiste.train.flops import flops_per_token

# D 32, N 8, K 4, H 6, F 24, V 40, T 16, E 8, C 3, and 2 layers with a shared expert.
MODEL = TransformerConfig(
    vocab_size=40, num_layers=2, model_dim=32, num_heads=8, num_kv_heads=4, head_dim=6, mlp_dim=24,
    max_length=16, num_experts=8, experts_per_token=3, shared_experts=1, router_bias=True,
)
MESHES = [
    MeshConfig(expert=8), MeshConfig(data=2, expert=4), MeshConfig(expert=4, tensor=2),
    MeshConfig(data=2, expert=2, tensor=2), MeshConfig(data=2, expert=2, tensor=2, zero=3),
    MeshConfig(context=2, expert=2, tensor=2),
]


def name_of(mesh_config: MeshConfig) -> str:
    """For the test's id."""
    return " ".join(f"{name}{size}" for name, size in vars(mesh_config).items() if size)


# The layer.

VARIANTS = {
    "softmax": {},
    "sigmoid, biased": dict(expert_scores="sigmoid"),
    "one expert a token": dict(experts_per_token=1, router_bias=False),
    "in groups": dict(expert_scores="sigmoid", expert_groups=4, groups_per_token=2),
    "no gate": dict(activation="relu2", router_bias=False),
}


def layer(**changes) -> tuple[dict, Mixture]:
    """A Mixture and its parameters, those in float64."""
    mixture = Mixture(dataclasses.replace(MODEL, **changes), rngs=nnx.Rngs(3))
    if mixture.router_bias_E is not None:
        mixture.router_bias_E[...] = jnp.linspace(-0.5, 0.5, 8)
    params = nnx.to_pure_dict(nnx.state(mixture, nnx.Param))
    return {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}, mixture


def naive(config: TransformerConfig, params: dict, x_BTD: np.ndarray) -> np.ndarray:
    """Every token through every expert, in float64; those that it did not choose count nothing."""
    logits_BTE = x_BTD @ params["router_DE"]
    scores_BTE = 1 / (1 + np.exp(-logits_BTE))
    if config.expert_scores == "softmax":
        scores_BTE = np.exp(logits_BTE) / np.exp(logits_BTE).sum(axis=-1, keepdims=True)
    preference_BTE = scores_BTE + params.get("router_bias_E", 0)
    if config.expert_groups > 1:
        by_group = np.sort(preference_BTE.reshape(*preference_BTE.shape[:2], 4, 2)).sum(axis=-1)
        worse = by_group.argsort(axis=-1).argsort(axis=-1) < 4 - config.groups_per_token
        preference_BTE = np.where(np.repeat(worse, 2, axis=-1), -np.inf, preference_BTE)
    chosen_BTE = preference_BTE.argsort(axis=-1).argsort(axis=-1) >= 8 - config.experts_per_token
    weights_BTE = chosen_BTE * scores_BTE
    if config.experts_per_token > 1:
        weights_BTE /= weights_BTE.sum(axis=-1, keepdims=True)
    h_BTEF = np.einsum("btd,edf->btef", x_BTD, params["up_EDF"])
    if config.gated:
        gate_BTEF = np.einsum("btd,edf->btef", x_BTD, params["gate_EDF"])
        h_BTEF = h_BTEF * gate_BTEF / (1 + np.exp(-gate_BTEF))
    else:
        h_BTEF = np.maximum(h_BTEF, 0) ** 2
    return np.einsum("bte,btef,efd->btd", weights_BTE, h_BTEF, params["down_EFD"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_is_the_formula_in_value_and_gradient(variant):
    """The gradient by finite differences of the float64 formula along a random direction."""
    params, mixture = layer(**VARIANTS[variant])
    random = np.random.default_rng(5)
    arrays = params | {name: random.normal(size=(3, 5, 32)) for name in ("x", "cotangent")}
    graphdef = nnx.graphdef(mixture)

    def value(arrays):
        weights = {name: leaf for name, leaf in arrays.items() if name in params}
        state = nnx.state(mixture, nnx.Param)
        nnx.replace_by_pure_dict(state, weights)
        out_BTD, _ = nnx.merge(graphdef, state)(arrays["x"], None, between_blocks=True)
        return (out_BTD * arrays["cotangent"]).sum(), out_BTD

    single = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in arrays.items()}
    (_, out_BTD), gradients = jax.jit(jax.value_and_grad(value, has_aux=True))(single)
    np.testing.assert_allclose(out_BTD, naive(mixture.config, params, arrays["x"]), atol=2e-6)
    gradients.pop("cotangent")
    for name, gradient in gradients.items():
        direction = random.normal(size=gradient.shape)

        def along(step, name=name, direction=direction):
            moved = arrays | {name: arrays[name] + step * direction}
            out_BTD = naive(mixture.config, {key: moved[key] for key in params}, moved["x"])
            return (out_BTD * arrays["cotangent"]).sum()

        if name == "router_bias_E":
            assert not gradient.any()
            continue
        slope = (along(1e-6) - along(-1e-6)) / 2e-6
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert size > 0 and abs((gradient * direction).sum() - slope) < 1e-6 * size, name


LEANINGS = {
    "as initialized": np.zeros(8),
    "all tokens to one device": np.array([9.0, 9, 9, 9, 0, 0, 0, 0]),
    "all tokens to the last experts": np.array([0.0, 0, 0, 0, 0, 9, 9, 9]),
}


@pytest.mark.parametrize("mesh_config", MESHES[:4], ids=name_of)
def test_an_expert_mesh_equals_one_device_token_for_token(mesh_config):
    """However unbalanced: with all tokens on one device, nothing is dropped."""
    params, mixture = layer()
    x_BTD = np.random.default_rng(7).normal(size=(8, 12, 32)).astype(np.float32)
    graphdef, state = nnx.split(mixture, nnx.Param)
    mesh = make_mesh(mesh_config)

    def run(state, x_BTD):
        mixture = nnx.merge(graphdef, state)
        chosen_BTC, *_ = route(
            x_BTD, mixture.router_DE[...], mixture.router_bias_E[...], jnp.ones((8, 12)), MODEL,
            between_blocks=True,
        )
        return chosen_BTC, mixture(x_BTD, None, between_blocks=True)[0]

    alone, sharded = jax.jit(run), jax.jit(run)
    for leaning, bias_E in LEANINGS.items():
        params["router_bias_E"] = bias_E
        state["router_bias_E"][...] = jnp.asarray(bias_E, jnp.float32)
        chosen_BTC, out_BTD = alone(state, x_BTD)
        with jax.set_mesh(mesh):
            letters = jax.tree.map(lambda param: param.get_metadata("letters"), state,
                                   is_leaf=lambda node: isinstance(node, nnx.Param))
            split = jax.device_put(state, shardings(mesh, letters))
            mine_BTC, mine_BTD = sharded(split, place(mesh, x_BTD, "BTD"))
        np.testing.assert_array_equal(mine_BTC, chosen_BTC, err_msg=leaning)
        np.testing.assert_allclose(mine_BTD, out_BTD, atol=1e-6, err_msg=leaning)
        np.testing.assert_allclose(out_BTD, naive(MODEL, params, np.float64(x_BTD)), atol=2e-6)


def test_the_routers_losses_are_the_formulas():
    """DeepSeek-V3's equations 17 to 20 and ST-MoE's 5, over the tokens that are not padding."""
    config = dataclasses.replace(MODEL, expert_scores="sigmoid", experts_per_token=2)
    random = np.random.default_rng(1)
    x_BTD = random.normal(size=(3, 7, 32)).astype(np.float32)
    router_DE = random.normal(size=(32, 8)).astype(np.float32) / 3
    lengths_B = [7, 4, 0]
    real_BT = np.float32(np.arange(7)[None] < np.array(lengths_B)[:, None])
    chosen_BTC, _, sums = route(x_BTD, router_DE, None, real_BT, config, between_blocks=True)
    for row, length in enumerate(lengths_B):
        logits_TE = np.float64(x_BTD[row, :length]) @ router_DE
        load_E = np.bincount(np.asarray(chosen_BTC[row, :length]).ravel(), minlength=8)
        np.testing.assert_array_equal(sums.load_BE[row], load_E)
        if length == 0:
            assert sums.balance_B[row] == sums.z_B[row] == 0
            continue
        scores_TE = 1 / (1 + np.exp(-logits_TE))
        share_E = (scores_TE / scores_TE.sum(axis=1, keepdims=True)).mean(axis=0)
        balance = (8 / (2 * length) * load_E * share_E).sum()
        z = (np.log(np.exp(logits_TE).sum(axis=1)) ** 2).mean()
        np.testing.assert_allclose([sums.balance_B[row], sums.z_B[row]], [balance, z], rtol=1e-5)


# The step.


def config_of(kind: str, accumulation: int = 1):
    """Three steps with both losses of the router, and a bias that moves visibly."""
    config = train_config(kind, accumulation)
    config.objective.balance_loss, config.objective.router_z_loss = 0.1, 0.01
    config.optimizer.router_bias_rate = 0.01
    return config


@pytest.mark.parametrize("mesh_config", [
    mesh if index % 2 else pytest.param(mesh, marks=pytest.mark.slow)
    for index, mesh in enumerate(MESHES)
], ids=name_of)
def test_sharded_equals_unsharded_and_takes_the_bytes_of_the_arithmetic(mesh_config):
    run = three_steps(config_of("sgd"), mesh_config, MODEL)
    check_equal(run, alone(config_of("sgd"), MODEL))
    assert np.abs(run.params["layers"]["mixture"]["router_bias_E"]).max() > 0.005
    check_bytes_per_device(run.mesh, run.program, run.state, moments=1)


@pytest.mark.slow
def test_muon_shards():
    run = three_steps(config_of("muon"), MESHES[4], MODEL)
    for name, expected in alone(config_of("muon"), MODEL).history.items():
        np.testing.assert_allclose(run.history[name], expected, rtol=1e-5)


def test_micro_batches_equal_one_batch():
    """Also the bias, whose rule is a sign of the load of the whole batch."""
    run = three_steps(config_of("sgd", 2), MeshConfig(data=2, expert=2, tensor=2), MODEL)
    check_equal(run, alone(config_of("sgd"), MODEL))


def first_load(params) -> np.ndarray:
    """Tokens of BATCH at each expert of the first layer, by the model's own routing."""
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(model, state)
    _, output = model.features(BATCH.tokens_BT, BATCH.positions_BT, BATCH.segments_BT)
    return np.asarray(output.router.load_BE.sum(axis=1))


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor", "muon"])
def test_a_step_moves_the_bias_by_the_rate_and_nothing_else_does(kind):
    config = config_of(kind)
    config.optimizer.weight_decay = 0.5
    mesh, program, step = start(config, MeshConfig(data=1), jax.devices()[:1], MODEL)
    state = program.initialize()
    bias_LE = np.linspace(-0.2, 0.2, 16, dtype=np.float32).reshape(2, 8)
    state.params["layers"]["mixture"]["router_bias_E"] = jnp.asarray(bias_LE)
    load_LE = first_load(jax.device_get(state.params))
    assert load_LE.sum() == 2 * 3 * (BATCH.segments_BT != 0).sum()
    state, metrics = step(state, jax.tree.map(jnp.asarray, BATCH))
    moved_LE = bias_LE + 0.01 * np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
    np.testing.assert_allclose(
        state.params["layers"]["mixture"]["router_bias_E"], moved_LE, atol=1e-7)
    worst = (load_LE.max(axis=1) / load_LE.mean(axis=1)).max()
    np.testing.assert_allclose(metrics["router_load"], worst, rtol=1e-6)


def test_the_bias_alone_balances_the_load_and_survives_a_checkpoint(tmp_path):
    config = train_config("sgd")
    config.optimizer.router_bias_rate = 0.01
    for group in ("embedding", "head", "matrix", "vector"):
        setattr(config.optimizer, f"{group}_multiplier", 0.0)
    mesh, program, step = start(config, MeshConfig(data=2, expert=4), model=MODEL)
    state = program.initialize()
    leaning = jnp.zeros((2, 8), jnp.float32).at[:, :2].set(0.1)
    state.params["layers"]["mixture"]["router_bias_E"] = place(mesh, leaning, "LE")
    batch, worst = place_batch(mesh), []
    for _ in range(15):
        state, metrics = step(state, batch)
        worst.append(float(metrics["router_load"]))
    # So few tokens (63 at the mean expert) leave the rule to swing a few steps around the balance.
    assert worst[0] > 2 and max(worst[-4:]) < 1.5, worst
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(15, state, {})
    checkpoints.finish(15, state, {})
    restored = checkpoints.restore(15, program.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    checkpoints.close()


# What it costs.


def test_all_to_alls_run_over_experts_alone_and_carry_the_copies():
    """On a CPU each device sends each expert a run as long as its tokens; see test_tpu.py."""
    model = dataclasses.replace(MODEL, scan_unroll=2)
    mesh, program, step = start(config_of("adamw"), MeshConfig(data=2, expert=4), model=model)
    batch = place_batch(mesh)
    with jax.set_mesh(mesh):
        text = step.jitted.lower(program.abstract_state, batch).compile().as_text()
    # Sums within groups of one (the stages) cost nothing.
    moved = collectives(without_groups_of_one(text))
    # There and back, forward and backward, in each of two layers, of 12 tokens on each device.
    assert moved.pop("all-to-all") == 2 * 2 * 2 * (8 * 12 * 32 * 4)
    groups = [replica_groups(line) for line in text.splitlines() if " all-to-all(" in line]
    assert groups and all(group == [[0, 1, 2, 3], [4, 5, 6, 7]] for group in groups)
    # Gradients: those of experts are a quarter each, and reduced over data alone.
    gradients = 4 * sum(
        leaf.size // (4 if name in ("LEDF", "LEFD") else 1)
        for name, leaf in parameters(program) if name != "LE"
    ) + 4 * 40 * 32
    slack = 64 * len(parameters(program))
    assert gradients <= moved.pop("all-reduce") <= gradients + slack
    # The router is stored in parts, and whole where it is used, like everybody's loads.
    router = 2 * 32 * 8 * 4
    assert router <= moved.pop("all-gather") <= 2 * router + slack
    assert moved == {}


def test_flops_count_the_experts_that_a_token_takes():
    _, program, _ = start(config_of("sgd"), MeshConfig(data=1), jax.devices()[:1], MODEL)
    flops = flops_per_token(MODEL, program.abstract_state.params, program.letters, 12)
    attention = 32 * (8 + 4 + 4 + 8) * 6
    weights = 2 * (attention + 32 * 8 + (3 + 1) * 3 * 32 * 24) + 40 * 32
    assert flops == 6 * weights + 12 * 8 * 6 * 2 * (12 / 2)


def test_cached_decoding_equals_the_full_forward():
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    tokens_BT = jax.random.randint(jax.random.key(1), (3, 9), 0, 40)
    full = model(tokens_BT)
    cache, pieces = model.empty_cache(3, 16), []
    for start_, end in ((0, 4), (4, 5), (5, 9)):
        x_BTD, cache = model.extend(tokens_BT[:, start_:end], cache)
        pieces.append(x_BTD)
    cached = model.logits(jnp.concatenate(pieces, axis=1))
    np.testing.assert_allclose(cached, full, atol=2e-5 * float(jnp.abs(full).max()))


@pytest.mark.parametrize("changes,message", [
    ({"model.experts_per_token": 9}, "model.experts_per_token=9: expected 1 to model.num_expe"),
    ({"model.expert_groups": 3}, "model.expert_groups=3 must divide.*choose one of .1, 2, 4."),
    ({"model.expert_groups": 4, "model.groups_per_token": 5}, "groups_per_token=5: expected 1 to"),
    ({"model.expert_groups": 4, "model.groups_per_token": 1, "model.experts_per_token": 3},
     "room for model.experts_per_token=3 in groups of 2"),
    ({"mesh.expert": 3}, "model.num_experts=8 is not divisible by mesh.expert=3"),
    ({"model.num_experts": None}, "mesh.expert=2 has no experts.*use mesh.data"),
    ({"model.bias": "all"}, "model.bias='all': experts have no biases"),
    ({"model.shared_experts": -1}, "model.shared_experts=-1: expected at least 0"),
    ({"model.expert_scores": "softmx"}, "model.expert_scores='softmx'.*did you mean 'softmax'"),
    ({"model.num_experts": None, "mesh.expert": 1, "model.router_bias": True},
     "model.router_bias=True has no effect without experts"),
    ({"model.num_experts": None, "mesh.expert": 1, "train.objective.balance_loss": 0.1},
     "train.objective.balance_loss=0.1 has no effect without experts"),
    ({"train.optimizer.router_bias_rate": -1.0}, "router_bias_rate: expected >= 0"),
])
def test_what_cannot_be_is_refused(changes, message):
    experiment = Experiment()
    for name, value in ({"model.num_experts": 8, "mesh.expert": 2} | changes).items():
        *path, field = name.split(".")
        setattr(functools.reduce(getattr, path, experiment), field, value)
    with pytest.raises(ValueError, match=message):
        experiment.validate()
