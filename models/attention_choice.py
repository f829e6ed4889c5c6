"""Which attention a model uses: the reference or a chip's kernels, settled once and said."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax

from batiste.models.all_to_all_attention import all_to_all_attention
from batiste.models.config import TransformerConfig
from batiste.models.ring_attention import ring_attention
from batiste.pallas_kernels import (
    AttentionMask, Operands, Options, certified, decode_is_certified, flash_attention, flash_decode,
    fused_cross_entropy, reference_attention,
)
from batiste.sharding import context_size, layout, per_device, spec


class OneOf(NamedTuple):
    """A mask that is known when the program runs: that of `masks` at `index`, an int32."""

    masks: tuple[AttentionMask, ...]
    index: jax.Array

    @property
    def query_segments_BT(self) -> jax.Array | None:
        """The same for all of them."""
        return self.masks[0].query_segments_BT


def resolve_attention(
    config: TransformerConfig, device_kind: str, axis_sizes: Mapping[str, int]
) -> tuple[TransformerConfig, str]:
    """The config with "auto" settled for a device, and the line that says what was chosen and why.

    axis_sizes: the mesh's. Raises ValueError where a kernel is asked for that is not certified for
    this model, is another device's, or does not know the mesh.
    """
    chip = certified.chip_of(device_kind)
    if config.attention == "reference":
        return config, "attention: reference, as configured"
    if config.attention != "auto":
        _check(config, config.attention, axis_sizes)
        if config.attention != chip:
            own = "none" if chip is None else repr(chip)
            raise ValueError(
                f"model.attention={config.attention!r} is another device's kernel: {device_kind} has "
                f"{own}; choose model.attention='auto' or 'reference'"
            )
        return config, f"attention: the kernels of {chip}, as configured"
    if chip is None:
        reason = f"no kernel is certified for {device_kind}"
        return _replaced(config, "reference"), f"attention: reference ({reason})"
    try:
        _check(config, chip, axis_sizes)
    except ValueError as error:
        return _replaced(config, "reference"), f"attention: reference ({error})"
    return _replaced(config, chip), f"attention: the kernels of {chip}"


def settled_here(config: TransformerConfig) -> str:
    """What "auto" is on the default device and the ambient mesh; says once which, and why."""
    device = jax.config.jax_default_device
    if not isinstance(device, jax.Device):
        device = jax.devices(device)[0]
    mesh = jax.sharding.get_abstract_mesh()
    config, line = resolve_attention(config, device.device_kind, mesh.shape)
    _say_once(line)
    return config.attention


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def attention(
    implementation: str,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask | OneOf,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """out_BTNH and lse_BTN by the chosen implementation; `options` as in `reference_attention`.

    Where the mesh has `context`, rows are in the order of `time_order`.
    """
    if isinstance(mask, OneOf):
        masked = functools.partial(_masked, implementation, options)
        branches = [functools.partial(masked, each) for each in mask.masks]
        return jax.lax.switch(mask.index, branches, q_BTNH, k_BSKH, v_BSKH)
    if implementation == "reference" and context_size() == 1:
        return reference_attention(q_BTNH, k_BSKH, v_BSKH, mask, **options)
    if options.pop("bias_BNTS", None) is not None:
        raise ValueError(
            f"model.positions='relative' does not know model.attention={implementation!r} or "
            "mesh.context > 1: choose model.attention='reference' and mesh.context=1"
        )
    names = ("sinks_N", "alibi_slopes_N", "dropout_seeds_BN")
    arrays = {name: options.pop(name) for name in names}
    operands = (q_BTNH, k_BSKH, v_BSKH, mask, arrays)
    if context_size() > 1:
        return _across_context(implementation, options, operands)
    attend = _decode if _can_decode(implementation, q_BTNH, k_BSKH, mask) else _flash
    kernel = functools.partial(attend, implementation, options)
    return _on_each_device(kernel, operands, "BSKH")


def _across_context(implementation: str, options: dict, operands: tuple):
    """Attention over rows of which each device along `context` has a share."""
    mask, arrays = operands[3:]
    if mask.query_offset_B is not None:
        raise ValueError(
            f"mesh.context={context_size()} does not know decoding: its cache is whole on every "
            "device; generate with mesh.context=1"
        )
    if layout().context_exchange == "all_to_all":
        attend = functools.partial(
            _reference if implementation == "reference" else _flash, implementation, options
        )
        kernel = functools.partial(all_to_all_attention, attend)
        return _on_each_device(kernel, operands, "BTKH", whole=("query_segments_BT",))
    for name, given in (("dropout", arrays["dropout_seeds_BN"]), ("block sparsity", mask.sparsity)):
        if given is not None:
            raise ValueError(
                f"mesh.context_exchange='ring' does not know {name}, which goes by places in whole "
                "rows: choose mesh.context_exchange='all_to_all'"
            )

    def kernel(q_BTNH, k_BSKH, v_BSKH, mask, arrays):
        fixed = Options(**options, chip=implementation, interpret=False)
        return ring_attention(fixed, Operands(q_BTNH, k_BSKH, v_BSKH, mask, **arrays))

    return _on_each_device(kernel, operands, "BTKH")


def _masked(implementation, options, mask, q_BTNH, k_BSKH, v_BSKH):
    return attention(implementation, q_BTNH, k_BSKH, v_BSKH, mask, **options)


def _can_decode(chip: str, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask) -> bool:
    """Whether this is one new token a row that the decoding kernel takes; else it is a tile."""
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]
    one_each = q_BTNH.shape[1] == 1 and mask.query_offset_B is not None and mask.causal
    return (
        one_each and set(certified.conditions(mask)) <= {"causal", "window", "offset"}
        and decode_is_certified(chip, q_BTNH.dtype.name, q_BTNH.shape[3], N // K)
    )


def _flash(chip, options, q_BTNH, k_BSKH, v_BSKH, mask, arrays):
    return flash_attention(q_BTNH, k_BSKH, v_BSKH, mask, chip=chip, **options, **arrays)


def _reference(_, options, q_BTNH, k_BSKH, v_BSKH, mask, arrays):
    return reference_attention(q_BTNH, k_BSKH, v_BSKH, mask, **options, **arrays)


def _decode(chip, options, q_BTNH, k_BSKH, v_BSKH, mask, arrays):
    """One new token a row, at the place that its offset says."""
    out_BNH, lse_BN = flash_decode(
        q_BTNH[:, 0], k_BSKH, v_BSKH, mask.query_offset_B + 1, window=mask.window, chip=chip,
        scale=options["scale"], soft_cap=options["soft_cap"], sinks_N=arrays["sinks_N"],
        alibi_slopes_N=arrays["alibi_slopes_N"],
    )
    return out_BNH[:, None], lse_BN[:, None]


def _on_each_device(kernel, operands, keys: str, whole: tuple[str, ...] = ()):
    """Each device attends with its own share: XLA cannot split a kernel by itself.

    keys: the letters of k and v, "BSKH" where every device has the keys of whole rows. whole: what
    of the mask is of whole rows although its letters say a share.
    """
    mask, arrays = operands[3:]

    def specs(names, named):
        letters = {name: name.split("_")[-1] for name in names}
        return {
            name: None if named(name) is None
            else spec(letters[name].replace("T", "S") if name in whole else letters[name])
            for name in names
        }

    fields = [f.name for f in dataclasses.fields(mask) if not f.metadata.get("static")]
    mask_specs = dataclasses.replace(mask, **specs(fields, functools.partial(getattr, mask)))
    in_specs = (spec("BTNH"), spec(keys), spec(keys), mask_specs, specs(arrays, arrays.get))
    out_specs = (spec("BTNH"), spec("BTN"))
    return per_device(kernel, in_specs, out_specs)(*operands)


def fused_losses(
    chip: str, x_BTD: jax.Array, head: jax.Array, targets_BT: jax.Array, options: Mapping
) -> tuple[jax.Array, jax.Array]:
    """`fused_cross_entropy` of a batch: loss and cross-entropy of each token, float32 BT."""
    if chip not in certified.CHIPS:
        raise ValueError(
            f"train.objective.fused=True needs a chip's kernels, but model.attention={chip!r}: "
            f"choose one of {', '.join(certified.CHIPS)}, or set train.objective.loss_chunk instead"
        )

    def kernel(x_BTD, head, targets_BT):
        x_MD, targets_M = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
        losses = fused_cross_entropy(x_MD, head, targets_M, chip=chip, **options)
        return tuple(loss_M.reshape(targets_BT.shape) for loss_M in losses)

    in_specs = (spec("BTD"), jax.sharding.PartitionSpec(), spec("BT"))
    return per_device(kernel, in_specs, (spec("BT"),) * 2)(x_BTD, head, targets_BT)


def _check(config: TransformerConfig, chip: str, axis_sizes: Mapping[str, int]) -> None:
    own = [kind for kind in config.layer_pattern if kind not in ("global", "local")]
    for field, value, refused in (
        ("form", "encoder_decoder", config.form == "encoder_decoder"),
        ("positions", "relative", config.positions == "relative"),
        ("layer_pattern", own, bool(own)),
        ("mixer", config.mixer, config.mixer != "attention"),
    ):
        if refused:
            raise ValueError(
                f"attention={chip!r} is not certified for model.{field}={value!r}: choose "
                "attention='reference'"
            )
    for kind in config.layer_pattern:
        window = ("window",) if kind == "local" else ()
        masks = [("causal", *window, "segments"), ("causal", *window, "offset")]
        if config.form == "encoder":
            masks = [(*window, "segments")]
        if axis_sizes.get("context", 1) > 1:  # The pairs of chunks of a ring.
            masks += [("segments",), ("causal", *window, "segments", "offset")]
        for mask in masks:
            cached = config.latent_rank is not None and "offset" in mask
            size = config.latent_rank + config.rope_dim if cached else config.head_dim
            certified.check(chip, mask, config.dtype, size)


def _replaced(config: TransformerConfig, attention: str) -> TransformerConfig:
    return dataclasses.replace(config, attention=attention)
