"""Laws of the loss in chunks: it is that of all logits, and moves the head once each way."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossings import computations
from flax import nnx

from batiste.models import (
    LossRules, Rows, Transformer, TransformerConfig, token_losses, vocabulary_sums,
)
from batiste.sharding import MeshConfig, laid_out, make_mesh, spec

# B 8, T 56, D 24, V 40: of a device's 7, 14, 28 or 56 places a chunk of 16 has 2, 4, 8 or 16, so
# that on each mesh the last chunk is shorter.
SHAPE, CHUNK = (8, 56), 16
RULES = LossRules(label_smoothing=0.1, z_loss=0.01)
MODEL = TransformerConfig(
    vocab_size=40, num_layers=1, model_dim=24, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8,
    max_length=56, logit_soft_cap=2.0, norm="layer",
)
MESHES = {
    "one device": MeshConfig(data=1),
    "data 8, zero 3": MeshConfig(data=8, zero=3),
    "data 2, tensor 4, zero 2": MeshConfig(data=2, tensor=4, zero=2),
    "slice 2, data 2, tensor 2, zero 1": MeshConfig(slice=2, data=2, tensor=2, zero=1),
    "stage 4, context 2": MeshConfig(data=1, stage=4, context=2),
    "data 2, stage 2, tensor 2, zero 3": MeshConfig(data=2, stage=2, tensor=2, zero=3),
    "context 4, tensor 2": MeshConfig(data=1, context=4, tensor=2),
    "data 2, context 2, expert 2, zero 3": MeshConfig(data=2, context=2, expert=2, zero=3),
}


def model_of(dtype: str, tied: bool):
    """The model's structure and parameters, its head large enough for the soft cap to bend."""
    config = dataclasses.replace(MODEL, dtype=dtype, tied_embeddings=tied, init_stddev=0.5)
    return nnx.split(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)


def rows(dtype: str) -> Rows:
    """Features, targets, and weights of which many are 0."""
    random = np.random.default_rng(0)
    x_BTD = jnp.asarray(random.normal(size=(*SHAPE, MODEL.model_dim)), dtype)
    targets_BT = jnp.asarray(random.integers(0, MODEL.vocab_size, SHAPE), jnp.int32)
    return Rows(x_BTD, targets_BT, jnp.asarray(random.integers(0, 3, SHAPE), jnp.float32))


def loss_of(graphdef, chunk: int | None, scale=None):
    """The loss times `scale`, and the rows' cross-entropies."""
    def loss(params, x_BTD, targets_BT, weights_BT):
        model, batch = nnx.merge(graphdef, params), Rows(x_BTD, targets_BT, weights_BT)
        if chunk is None:
            sums = vocabulary_sums(model.logits(x_BTD), targets_BT)
            each = [(x_BT * weights_BT).sum(axis=1) for x_BT in token_losses(sums, RULES)]
            total, cross_entropy_B = each[0].sum(), each[1]
        else:
            total, cross_entropy_B = model.chunked_loss(batch, scale, RULES, chunk)
        return total if scale is None else total * scale, cross_entropy_B

    return loss


def gradients_of(loss):
    """((loss, cross-entropies), gradients of the parameters and of the features), to be jitted."""
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@functools.cache
def unchunked(dtype: str, tied: bool):
    """The same of all logits at once, by autodiff on one device."""
    graphdef, params = model_of(dtype, tied)
    return jax.jit(gradients_of(loss_of(graphdef, None)))(params, *rows(dtype))


def lowered(name: str, dtype: str, tied: bool):
    """The chunked loss and its gradients on a mesh, lowered, and its arguments there."""
    layout = MESHES[name]
    mesh = make_mesh(layout, jax.devices()[:1] if name == "one device" else None)
    graphdef, params = model_of(dtype, tied)

    def put(leaf, partition):
        return jax.device_put(leaf, jax.NamedSharding(mesh, partition))

    params = jax.tree.map(
        lambda param: param.replace(put(param.get_value(), spec(
            param.get_metadata("letters"), zero=layout.zero >= 3)))
        if param.get_metadata("letters") in ("VD", "DV") else param,
        params, is_leaf=lambda node: isinstance(node, nnx.Param))
    x_BTD, *rest = rows(dtype)
    arguments = (
        params, put(x_BTD, spec("BTD", between_blocks=True)), *(put(x, spec("BS")) for x in rest))
    with jax.set_mesh(mesh), laid_out(layout):
        return jax.jit(gradients_of(loss_of(graphdef, CHUNK))).lower(*arguments), arguments


def assert_equal(actual, expected, rtol: float) -> None:
    """Within rtol of an array's typical element."""
    def compare(path, mine, theirs):
        mine, theirs = (np.asarray(x, np.float64) for x in (mine, theirs))
        error = np.sqrt(np.mean(np.square(mine - theirs)))
        assert error <= rtol * np.sqrt(np.mean(np.square(theirs))), (path, error)

    jax.tree_util.tree_map_with_path(compare, jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize("name", MESHES)
def test_chunks_on_a_mesh_equal_all_logits_on_one_device(name):
    tied = name.startswith(("data 2", "context"))
    step, arguments = lowered(name, "float32", tied)
    assert_equal(step.compile()(*arguments), unchunked("float32", tied), 1e-6)


@pytest.mark.parametrize("name", ["one device", "data 2, stage 2, tensor 2, zero 3"])
def test_a_compute_dtype_of_half_the_bytes_rounds_as_all_logits_do(name):
    step, arguments = lowered(name, "bfloat16", tied=False)
    assert_equal(step.compile()(*arguments), unchunked("bfloat16", False), 6e-3)


def test_float16_gradients_do_not_vanish():
    """Scaled by 2^14 and made of probabilities whose gradients float16 does not hold."""
    graphdef, params = model_of("float16", tied=False)
    given = rows("float16")
    tiny = given._replace(weights_BT=given.weights_BT * 2.0**-20)
    want = unchunked("float32", False)[1]
    for outside, factor in ((2.0**14, 1.0), (2.0**13, 0.5)):
        loss = loss_of(graphdef, CHUNK, jnp.float32(2.0**14))


        def scaled(*operands, loss=loss, factor=factor):
            total, rest = loss(*operands)
            return total * factor, rest

        _, gradients = jax.jit(gradients_of(scaled))(params, *tiny)
        unscaled = jax.tree.map(lambda g: np.asarray(g, np.float64) / outside * 2.0**20, gradients)
        assert_equal(unscaled, want, 6e-3)


def moves_of_the_head(text: str, vocabulary: int) -> list[tuple[str, str, str]]:
    """Kind, shape of the result, computation of every collective of an array with dims D and V."""
    kinds, found = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute", []
    for name, lines in computations(text).items():
        for line in lines:
            match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
            shapes = re.findall(rf"f32\[(\d+,{vocabulary})\]", match[1]) if match else ()
            found += [(match[2], shape, name) for shape in shapes]
    return sorted(found)


@pytest.mark.parametrize("name,moves", [
    ("data 8, zero 3", [("all-gather", "24,40"), ("reduce-scatter", "3,40")]),
    ("data 2, tensor 4, zero 2", [("reduce-scatter", "12,10")]),
    ("slice 2, data 2, tensor 2, zero 1", [("all-reduce", "24,20")]),
])
def test_the_head_is_gathered_once_and_its_gradient_reduced_once(name, moves):
    text = lowered(name, "float32", tied=False)[0].compile().as_text()
    assert any(" while(" in line for line in text.splitlines())
    found = moves_of_the_head(text, MODEL.vocab_size // MESHES[name].tensor)
    assert found == [(*move, "ENTRY") for move in moves]


def test_all_logits_never_exist():
    text = lowered("one device", "float32", tied=False)[0].as_text()
    rows_of_all, chunk = "x".join(map(str, (*SHAPE, 40))), f"{SHAPE[0]}x{CHUNK}x40"
    assert f"tensor<{chunk}xf32>" in text and f"tensor<{rows_of_all}xf32>" not in text
