"""What the forward pass keeps for the backward pass, read off the model's own derivative.

The features of a small stand-in of the model are differentiated, abstractly: `jax.vjp` returns its
residuals, which are what a scan over layers stacks up in memory. The stand-in's dims have sizes of
their own, so that each residual's shape spells its letters. What a policy of rematerialization
saves is thereby not restated here, and cannot differ from what the model does.
"""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from batiste.models import Beside, Transformer, TransformerConfig
from batiste.sharding import spec

PERIODS = 3
ROWS = 7


class Saved(NamedTuple):
    """Arrays that are kept for each row of the batch: `count` of these letters and item size.

    per_layer: kept by every repetition of the layer pattern, else once. letters may name a dim
    twice (T for keys as well: the reference attention's probabilities); "1" is a dim of one, "h"
    half a head dim, other small letters are those of `latent_sizes`, "W" rows of a token among the
    experts. whole: lies as the products of a block need it and not as it does between blocks.
    """

    letters: str
    itemsize: int
    per_layer: bool
    whole: bool
    count: int


def saved_arrays(model: TransformerConfig) -> list[Saved]:
    """What the forward pass of this model (its remat policy included) keeps for each row."""
    stand_in, sizes = _stand_in(model)
    abstract = nnx.eval_shape(lambda: Transformer(stand_in, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)

    def residuals(params: Any, tokens_BT: jax.Array, segments_BT: jax.Array) -> list[jax.Array]:
        def features(params):
            source = (tokens_BT, segments_BT, segments_BT) if model.encoder_layers else (None,) * 3
            return nnx.merge(graphdef, params).features(
                tokens_BT, segments_BT, segments_BT, beside=Beside(None, None, *source))

        return jax.tree.leaves(jax.vjp(features, params)[1])

    tokens = jax.ShapeDtypeStruct((ROWS, sizes["T"]), jnp.int32)
    leaves = jax.eval_shape(residuals, params, tokens, tokens)
    read = functools.partial(_read, stand_in, sizes)
    found = collections.Counter(filter(None, map(read, leaves)))
    return [entry._replace(count=count) for entry, count in sorted(found.items())]


def _stand_in(model: TransformerConfig) -> tuple[TransformerConfig, dict[str, int]]:
    """The model with sizes that differ from each other; head dim and grouping stay its own.

    The remainder of the depth after whole repetitions of the layer pattern stays, too.
    """
    group = model.num_heads // model.num_kv_heads
    K = next(size for size in (5, 11, 13, 17) if size * group not in (ROWS, PERIODS))
    sizes = {"T": 136, "D": 58, "K": K, "N": K * group, "G": group, "F": 62, "V": 74}
    # These stay the model's own, so that none of them can be taken for another of another size.
    if model.embedding_dim is not None:
        sizes["R"] = 46
    sizes |= {"H": model.head_dim, "C": model.experts_per_token, "E": model.num_experts or 1}
    pattern = len(model.layer_pattern)
    changed = dataclasses.replace(
        model, vocab_size=sizes["V"], model_dim=sizes["D"], num_heads=sizes["N"],
        num_kv_heads=K, mlp_dim=sizes["F"], max_length=sizes["T"], scan_unroll=1,
        num_layers=PERIODS * pattern + model.num_layers % pattern, dropout=0.0,
        embedding_dim=model.embedding_dim and sizes["R"],
        encoder_layers=model.encoder_layers and PERIODS, generator_heads=None,
    )
    return changed, sizes


def _read(model: TransformerConfig, sizes: dict[str, int], leaf: Any) -> Saved | None:
    """The letters of a residual; None for weights and other arrays that no row has."""
    per_layer = leaf.shape[:1] == (PERIODS,)
    shape = leaf.shape[1:] if per_layer else leaf.shape
    tokens = ROWS * sizes["T"]
    leading = {ROWS: "B", tokens: "BT", tokens * sizes["C"]: "BTW"}
    if not shape or shape[0] not in leading:
        return None
    letters = leading[shape[0]]
    by_size = {size: name for name, size in latent_sizes(model).items()}
    by_size |= {size: letter for letter, size in reversed(sizes.items())} | {1: "1"}
    by_size |= {sizes["H"] // 2: "h"}
    for size in shape[1:]:
        letters += by_size[size]
    # A block's products read x in the compute dtype after it was made whole over `tensor`; what
    # else is saved of it lies between blocks: norms in fp32, and a rematerialized block's input.
    product_input = leaf.dtype == model.dtype and model.remat == "none" and model.dtype != "float32"
    whole = product_input or bool(set(letters) & set("NKFGHW"))
    return Saved(letters, leaf.dtype.itemsize, per_layer, whole, 1)


def latent_sizes(model: TransformerConfig) -> dict[str, int]:
    """Sizes that latent attention has and no letter tells apart, each by a small letter."""
    if model.latent_rank is None:
        return {}
    rotated, own = model.rope_dim, model.head_dim - model.rope_dim
    ranks = {"r": model.latent_rank, "d": model.latent_rank + rotated}
    ranks |= {} if model.query_rank is None else {"q": model.query_rank}
    return ranks | {"o": rotated, "p": rotated // 2, "n": own, "v": model.value_dim,
                    "u": own + model.value_dim}


def expert_rows(model: TransformerConfig, devices: int) -> int:
    """Rows that experts have room for, for each token of a device: the most that can be sent."""
    if model.num_experts is None:
        return 1
    return devices * min(model.experts_per_token, model.num_experts // devices)


def bytes_per_row(
    entry: Saved, model: TransformerConfig, length: int, sizes: dict[str, int]
) -> float:
    """Bytes of one such array for one row of the batch on a device of a mesh with these sizes."""
    dims = model.sizes | {
        "T": length, "G": model.num_heads // model.num_kv_heads, "1": 1, "h": model.head_dim // 2,
        "W": expert_rows(model, sizes["expert"]), "C": model.experts_per_token,
    } | latent_sizes(model)
    total = float(entry.itemsize)
    split: set[str] = set()
    for letter in entry.letters[1:]:
        total *= dims[letter]
        if letter in "1GWCE" or letter.islower():
            continue
        (axes,) = spec(letter, between_blocks=not entry.whole)
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            total /= 1 if axis in split else sizes[axis]
            split.add(axis)
    return total * entry.count
