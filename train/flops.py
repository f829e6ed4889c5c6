"""How many FLOPs a token costs, and how many the devices could do."""

import dataclasses
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from batiste.models import TransformerConfig
from batiste.sharding.devices import peak_flops
from batiste.train.optimizer import parameter_group

CALIBRATION_SIZE = 2048
CALIBRATION_RUNS = 5


def flops_per_token(
    config: TransformerConfig, params: Any, letters: Any, length: int, decoded: float = 1.0
) -> float:
    """Training FLOPs per token: 6 per weight in a matrix product, 12 per visible key and head dim.

    A forward product costs 2 per weight, the backward pass twice that; embeddings are looked up,
    not multiplied, unless they are the head too. A causal query sees half of the row on average, an
    encoder's all of it, a local one at most its window, on both sides in an encoder. Of the
    experts, those count that a token takes.
    Rematerialization is not counted (PaLM, arXiv:2204.02311, B).
    params: arrays or abstract ones. length: tokens per row. decoded: tokens of a decoder's row over
    those of its encoder's, which are the ones that count.
    """
    if config.form == "encoder_decoder":
        return _of_both(config, params, letters, length, decoded)
    multiplied = {"matrix", "head"} | ({"embedding"} if config.tied_embeddings else set())
    share = 1 if config.num_experts is None else config.experts_per_token / config.num_experts
    weights = sum(
        math.prod(leaf.shape) * (share if name.startswith("LE") else 1)
        for name, leaf in zip(jax.tree.leaves(letters), jax.tree.leaves(params), strict=True)
        if parameter_group(name) in multiplied and not name.startswith(("T", "P"))
    )
    sides = 2 if config.form == "encoder" else 1
    if config.shared_layers:  # One layer's, multiplied so many times.
        weights += (config.num_layers - 1) * sum(
            math.prod(leaf.shape) for leaf, name in zip(
                jax.tree.leaves(params["layers"]), jax.tree.leaves(letters["layers"]), strict=True)
            if parameter_group(name) in multiplied)
    # What a mixer of one's own does besides products with its weights is not counted.
    keys, attends = 0.0, config.mixer == "attention"
    for layer in range(config.num_layers):
        local = config.layer_pattern[layer % len(config.layer_pattern)] == "local"
        keys += attends * sides * (min(config.window, length / 2) if local else length / 2)
    if config.future_heads:  # Each makes all logits once more.
        weights += config.future_heads * config.model_dim * config.vocab_size
        keys += config.future_heads * keys / config.num_layers
    if config.generator_heads is not None:  # As many layers, each with fewer heads.
        keys += keys * config.generator_heads / config.num_heads
    dims = config.head_dim + (config.value_dim or config.head_dim)
    return 6 * weights + 6 * config.num_heads * dims * keys


def _of_both(
    config: TransformerConfig, params: dict, letters: dict, length: int, decoded: float
) -> float:
    """Of a token of the source: the encoder's, and the decoder's share, which attends to it too.

    Keys and values of the source are counted as if the decoder's tokens had them.
    """
    def part(tree: dict, of_encoder: bool) -> dict:
        return {
            name: leaf for name, leaf in tree.items() if name.startswith("encoder") == of_encoder}

    decoder = dataclasses.replace(config, form="decoder", encoder_layers=None)
    encoder = dataclasses.replace(config.encoder, tied_embeddings=False)
    total = flops_per_token(encoder, part(params, True), part(letters, True), length)
    total += decoded * flops_per_token(
        decoder, part(params, False), part(letters, False), int(length * decoded))
    across = config.num_layers * length  # Keys that a token of the decoder sees in the source.
    return total + decoded * 12 * config.num_heads * config.head_dim * across


def total_peak_flops(mesh: jax.sharding.Mesh, dtype: str) -> tuple[float | None, str]:
    """Peak FLOP/s of all devices of the mesh, and where the figure comes from.

    A device that the table does not know (a CPU) is measured: the median of a few square products
    in the compute dtype, accumulated in fp32. Not so in a run of several processes, which may share
    their cores or not: None.
    """
    device = mesh.devices.flat[0]
    known = peak_flops(device.device_kind)
    if known is not None:
        return known * mesh.size, f"data sheet of {device.device_kind}, bf16"
    if mesh.is_multi_process:
        return None, f"a {device.platform} is measured in runs of one process only"
    a = jax.device_put(jnp.ones((CALIBRATION_SIZE, CALIBRATION_SIZE), dtype), device)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a))
    seconds = []
    for _ in range(CALIBRATION_RUNS):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        seconds.append(time.perf_counter() - start)
    # Fake CPU devices share the same cores, so the mesh as a whole has no more than one of them.
    devices = 1 if device.platform == "cpu" else mesh.size
    rate = devices * 2 * CALIBRATION_SIZE**3 / statistics.median(seconds)
    return rate, f"measured here: {dtype} product of {CALIBRATION_SIZE} squares"
