"""Continues prompts of unequal length, token by token, with a KV cache."""

import collections
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from batiste.inference.config import SamplingConfig
from batiste.inference.sampling import sample
from batiste.models import Cache, Transformer, letters_tree
from batiste.sharding import compiler_options

# Tokens that a cache has room for at first, if so many may come; it doubles when it is full.
FIRST_ROOM = 256
# The programs of the last models and ways to sample, which a second call finds again. They are
# compared and not hashed: the static part of a model holds its config, which may be changed.
_RECENT: collections.deque[tuple[Any, Any]] = collections.deque(maxlen=4)


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int],
    config: SamplingConfig, whole_prompts: bool = False, start_ids: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Yields, step by step, the next token of each prompt; None for a row that has ended.

    prompts: token ids, at least one each; where there is an encoder, what it reads, and start_ids is
    what the decoder begins with. A row ends with any of `stop_ids` (which is not yielded), after
    `config.max_tokens`, or when the model's max_length is full. What a row draws depends on its own
    prompt, its index and the seed alone, not on the rows beside it. whole_prompts: each token of a
    prompt sees all of it, as a prefix language model was trained; otherwise those before it.
    Raises ValueError for an encoder, when a prompt is empty or leaves no room, and for start_ids
    that no decoder beside an encoder begins with, or for none where one does.
    """
    config.validate()
    if model.config.form == "encoder":
        raise ValueError(
            "model.form='encoder' sees all of a text and continues none: generate with a model of "
            "another form, or `batiste evaluate` this one"
        )
    max_length = model.config.max_length
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    reads = model.config.form == "encoder_decoder"
    if reads != bool(start_ids):
        raise ValueError(f"start_ids={list(start_ids)}: expected what the decoder begins with beside "
                         f"an encoder, and nothing otherwise; model.form={model.config.form!r}")
    least, most = (0, max_length) if reads else (1, max_length - 1)
    if lengths_B.min() < least or lengths_B.max() > most:
        raise ValueError(
            f"prompts of {lengths_B.tolist()} tokens: expected {least} to {most} each, to leave "
            f"room within model.max_length={max_length}"
        )
    tokens_BT = np.zeros((len(prompts), max(1, lengths_B.max())), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    graphdef, params = nnx.split(model, nnx.Param)
    (device, *_) = jax.tree.leaves(params)[0].devices()
    options = compiler_options(device, letters_tree(params))
    prefill, grow, decode = _programs(
        graphdef, repr(model.config), config, options, whole_prompts)
    keys_B = jax.random.split(jax.random.key(config.seed), len(prompts))
    start = functools.partial(prefill, params)
    if reads:
        sources = tokens_BT, lengths_B
        tokens_BT = np.tile(np.array(start_ids, np.int32), (len(prompts), 1))
        lengths_B = np.full_like(lengths_B, len(start_ids))
        start = functools.partial(start, sources=sources)
    budget = max_length if config.max_tokens is None else config.max_tokens
    longest = int(lengths_B.max())
    room = _room(min(longest + budget, max(longest + 1, FIRST_ROOM)), max_length)
    token_B, cache = start(tokens_BT, lengths_B, keys_B, room=room)
    ended_B = np.zeros(len(prompts), bool)
    for step in range(budget):
        host_B = np.asarray(token_B)
        ended_B |= np.isin(host_B, stop_ids) | (lengths_B + step >= max_length)
        if ended_B.all():
            return
        yield [None if ended else int(token) for token, ended in zip(host_B, ended_B, strict=True)]
        if step + 1 == budget:
            return
        if longest + step >= room and room < max_length:
            room = _room(room + 1, max_length)
            cache = grow(cache, room)
        token_B, cache = decode(params, token_B, cache, keys_B)


def _room(tokens: int, max_length: int) -> int:
    """The size of a cache for so many tokens: a power of two, so that few programs are compiled."""
    return min(1 << (tokens - 1).bit_length(), max_length)


def _programs(
    graphdef: Any, model: str, config: SamplingConfig, options: dict[str, bool] | None,
    whole_prompts: bool,
) -> tuple[Any, Any, Any]:
    """Prefill, grow and decode of a model: those of an earlier call, where there was one alike.

    model: its config in words, since `graphdef` holds the config itself, which may be changed.
    """
    wanted = graphdef, model, copy.deepcopy(config), options, whole_prompts
    for known, programs in list(_RECENT):
        if known == wanted:
            return programs
    programs = _compiled(graphdef, wanted[2], options, whole_prompts)
    _RECENT.append((wanted, programs))
    return programs


def _compiled(
    graphdef: Any, config: SamplingConfig, options: dict[str, bool] | None, whole_prompts: bool
) -> tuple[Any, Any, Any]:
    """Prefill, grow and decode; the cache that the last is given becomes the one it returns."""
    def draw(model, x_BD, keys_B, length_B):
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, length_B)
        return sample(model.logits(x_BD[:, None])[:, 0], keys_B, config)

    jit = functools.partial(jax.jit, compiler_options=options)

    @functools.partial(jit, static_argnames="room")
    def prefill(params, tokens_BT, lengths_B, keys_B, sources=None, *, room):
        model = nnx.merge(graphdef, params)
        if sources is None:
            cache = model.empty_cache(tokens_BT.shape[0], room)
        else:
            source_BS, sizes_B = sources
            real_BS = jnp.arange(source_BS.shape[1])[None] < sizes_B[:, None]
            cache = model.read(source_BS, real_BS.astype(jnp.int32), room)
        x_BTD, cache = model.extend(tokens_BT, cache, lengths_B if whole_prompts else None)
        x_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return draw(model, x_BD, keys_B, lengths_B), cache._replace(length_B=lengths_B)

    @functools.partial(jit, static_argnums=1)
    def grow(cache: Cache, room: int) -> Cache:
        more = room - cache.k_LBSKH.shape[2]
        k_LBSKH, v_LBSKH = (
            jnp.pad(x, [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)])
            for x in (cache.k_LBSKH, cache.v_LBSKH))
        return cache._replace(k_LBSKH=k_LBSKH, v_LBSKH=v_LBSKH)

    @functools.partial(jit, donate_argnames="cache")
    def decode(params, token_B, cache, keys_B):
        model = nnx.merge(graphdef, params)
        x_BTD, cache = model.extend(token_B[:, None], cache)
        return draw(model, x_BTD[:, 0], keys_B, cache.length_B), cache

    return prefill, grow, decode
