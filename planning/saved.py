"""What the forward pass keeps for the backward pass, read off the model's own derivative.

The features of a small stand-in of the model are differentiated, abstractly: `jax.vjp` returns its
residuals, which are what a scan over layers stacks up in memory. The stand-in's dims have sizes of
their own, so that each residual's shape spells its letters. What a policy of rematerialization
saves is thereby not restated here, and cannot differ from what the model does.

A size that spells no letter is "?": such an array is left out of the account, which says so.
"""

import collections
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from batiste.models import Beside, Transformer, TransformerConfig
from batiste.sharding import spec

ROWS = 7
# Repetitions of each stack of layers in the stand-in: residuals of its scan have them in front.
DEPTHS = {"dense_layers": 2, "layers": 3, "encoder_layers": 4}
UNKNOWN = "?"


class Saved(NamedTuple):
    """Arrays that are kept for each row of the batch: `count` of these letters and item size.

    stack: whose repetitions each keep them, one of DEPTHS; "" where they are kept once. letters
    may name a dim twice (T for keys as well: the reference attention's probabilities); "1" is a
    dim of one, "h" half a head dim, other small letters are those of `other_sizes`, "W" rows of a
    token among the experts. whole: lies as the products of a block need it and not as it does
    between blocks. generator: belongs to the generator beside a discriminator.
    """

    letters: str
    itemsize: int
    stack: str
    whole: bool
    count: int
    generator: bool = False


def saved_arrays(model: TransformerConfig) -> list[Saved]:
    """What the forward pass of this model (its remat policy included) keeps for each row."""
    arrays = _of_stack(model)
    if model.generator_heads is None:
        return arrays
    return arrays + [each._replace(generator=True) for each in _of_stack(model.generator)]


def _of_stack(model: TransformerConfig) -> list[Saved]:
    """The same of the model alone, without a generator beside it."""
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
    # These stay the model's own, and no other size may be taken for one of them.
    own = {"G": group, "H": model.head_dim, "C": model.experts_per_token, "E": model.num_experts or 1}
    taken = {1, ROWS, model.head_dim // 2, *DEPTHS.values(), *own.values(),
             *other_sizes(dataclasses.replace(model, num_experts=None, dense_mlp_dim=None)).values()}
    sizes: dict[str, int] = {}

    def choose(letter: str, first: int, step: int, factors: tuple[int, ...] = (1,)) -> int:
        sizes[letter] = next(
            size for size in itertools.count(first, step)
            if not any(size * factor in taken for factor in factors))
        taken.update(sizes[letter] * factor for factor in factors)
        return sizes[letter]

    choose("T", 136, 8)
    choose("K", 5, 6, (1, group))
    sizes["N"] = sizes["K"] * group
    choose("D", 58, 2)
    choose("F", 62, 2, (1, max(1, model.shared_experts)))
    choose("V", 74, 2)
    dense, pattern = choose("m", 86, 2), len(model.layer_pattern)
    if model.embedding_dim is not None:
        choose("R", 46, 2)
    depth = DEPTHS["layers"] * pattern + (model.num_layers - model.dense_layers) % pattern
    changed = dataclasses.replace(
        model, vocab_size=sizes["V"], model_dim=sizes["D"], num_heads=sizes["N"],
        num_kv_heads=sizes["K"], mlp_dim=sizes["F"], max_length=sizes["T"], scan_unroll=1,
        num_layers=depth + (DEPTHS["dense_layers"] if model.dense_layers else 0),
        dense_layers=model.dense_layers and DEPTHS["dense_layers"],
        dense_mlp_dim=model.dense_mlp_dim and dense, dropout=0.0,
        embedding_dim=model.embedding_dim and sizes["R"],
        encoder_layers=model.encoder_layers and DEPTHS["encoder_layers"], generator_heads=None,
    )
    return changed, sizes | own


def _read(model: TransformerConfig, sizes: dict[str, int], leaf: Any) -> Saved | None:
    """The letters of a residual; None for weights and other arrays that no row has."""
    by_depth = {depth: stack for stack, depth in DEPTHS.items()}
    stack = by_depth.get(leaf.shape[0], "") if leaf.shape else ""
    shape = leaf.shape[1:] if stack else leaf.shape
    tokens = ROWS * sizes["T"]
    leading = {tokens * sizes["C"]: "BTW", tokens: "BT", ROWS: "B"}
    if not shape or shape[0] not in leading:
        return None
    letters = leading[shape[0]]
    by_size = {size: name for name, size in other_sizes(model).items()}
    by_size |= {size: letter for letter, size in reversed(sizes.items())} | {1: "1"}
    by_size |= {sizes["H"] // 2: "h"}
    for size in shape[1:]:
        letters += by_size.get(size, UNKNOWN)
    # A block's products read x in the compute dtype after it was made whole over `tensor`; what
    # else is saved of it lies between blocks: norms in fp32, and a rematerialized block's input.
    product_input = leaf.dtype == model.dtype and model.remat == "none" and model.dtype != "float32"
    whole = product_input or bool(set(letters) & set("NKFGHWsm"))
    return Saved(letters, leaf.dtype.itemsize, stack, whole, 1)


def other_sizes(model: TransformerConfig) -> dict[str, int]:
    """Sizes that only some models have and no letter tells apart, each by a small letter.

    s: of shared experts together; m: of the feed-forward in dense layers, which are the two that
    `tensor` splits. The others are those of latent attention.
    """
    wide = {}
    if model.num_experts is not None and model.shared_experts > 1:
        wide["s"] = model.shared_experts * model.mlp_dim
    if model.dense_mlp_dim is not None:
        wide["m"] = model.dense_mlp_dim
    if model.latent_rank is None:
        return wide
    rotated, own = model.rope_dim, model.head_dim - model.rope_dim
    ranks = {"r": model.latent_rank, "d": model.latent_rank + rotated}
    ranks |= {} if model.query_rank is None else {"q": model.query_rank}
    return wide | ranks | {
        "o": rotated, "p": rotated // 2, "n": own, "v": model.value_dim, "u": own + model.value_dim}


def expert_rows(model: TransformerConfig, devices: int) -> int:
    """Rows that experts have room for, for each token of a device: the most that can be sent."""
    if model.num_experts is None:
        return 1
    return devices * min(model.experts_per_token, model.num_experts // devices)


def bytes_per_row(
    entry: Saved, model: TransformerConfig, length: int, sizes: dict[str, int]
) -> float:
    """Bytes of one such array for one row of the batch on a device of a mesh with these sizes."""
    if UNKNOWN in entry.letters:
        return 0.0
    model = model.generator if entry.generator else model
    dims = model.sizes | {
        "T": length, "G": model.num_heads // model.num_kv_heads, "1": 1, "h": model.head_dim // 2,
        "W": expert_rows(model, sizes["expert"]), "C": model.experts_per_token,
    } | other_sizes(model)
    total = float(entry.itemsize)
    split: set[str] = set()
    for letter in entry.letters[1:]:
        total *= dims[letter]
        if letter in "1GWCE" or (letter.islower() and letter not in "sm"):
            continue
        name = "F" if letter in "sm" else letter
        (axes,) = spec(name, between_blocks=not entry.whole)
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            total /= 1 if axis in split else sizes[axis]
            split.add(axis)
    return total * entry.count


def repetitions(model: TransformerConfig, stack: str) -> float:
    """How often an array of a stack is kept: future heads, one block each, keep what layers do."""
    pattern = len(model.layer_pattern)
    counts = {
        "": 1, "dense_layers": model.dense_layers, "encoder_layers": model.encoder_layers or 0,
        "layers": (model.num_layers - model.dense_layers) // pattern + model.future_heads / pattern,
    }
    return counts[stack]
