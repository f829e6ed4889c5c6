"""Rotations as config.json spells them, old and new."""

import math
from collections.abc import Mapping
from typing import Any

from batiste.models import LLAMA3_FACTORS, YARN_TURNS, TransformerConfig, yarn_length


def read(
    theirs: Mapping[str, Any], base: float, local_base: float | None
) -> dict[str, Any]:
    """Our fields, from `rope_parameters` or `rope_theta` and `rope_scaling`.

    base, local_base: of a config that does not say; with a local base, global and local layers
    have rotations of their own. Raises ValueError for a scaling that is not known here.
    """
    given = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    own = local_base is not None
    nested = "full_attention" in given
    local = given.get("sliding_attention", {}) if nested else {}
    given = given["full_attention"] if nested else given
    fields = {"rope_base": float(given.get("rope_theta", theirs.get("rope_theta") or base))}
    if own:
        old = theirs.get("rope_local_base_freq") or local_base
        fields["local_rope_base"] = float(local.get("rope_theta", old))
    for parameters, known in ((local, ("default",)), (given, ("default", "linear", "llama3", "yarn"))):
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in known:
            raise ValueError(f"config.json: rope_type={kind!r}: expected one of {', '.join(known)}")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"config.json: partial_rotary_factor={parameters['partial_rotary_factor']}: "
                "expected 1.0, heads that are rotated whole"
            )
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return fields
    fields |= {"rope_scaling": kind, "rope_factor": float(given["factor"])}
    if kind == "llama3":
        factors = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        if factors != LLAMA3_FACTORS:
            raise ValueError(
                f"config.json: low_freq_factor, high_freq_factor={factors}: expected {LLAMA3_FACTORS}")
    if kind == "yarn":
        _check_yarn(given, fields["rope_factor"])
    if kind in ("llama3", "yarn"):
        fields["rope_original_length"] = int(given["original_max_position_embeddings"])
    return fields


def _check_yarn(given: Mapping[str, Any], factor: float) -> None:
    """Raises ValueError, naming the key, for a YaRN that is not the paper's."""
    known = {"beta_fast": YARN_TURNS[0], "beta_slow": YARN_TURNS[1], "truncate": True,
             "attention_factor": yarn_length(factor), "mscale": None, "mscale_all_dim": None}
    for key, value in known.items():
        found = given.get(key)
        same = found == value or (
            isinstance(value, float) and found is not None and math.isclose(found, value))
        if found is not None and not same:
            expected = "none" if value is None else value
            raise ValueError(f"config.json: {key}={found} of rope_type='yarn': expected {expected}")


def write(model: TransformerConfig, own_local: bool) -> dict[str, Any]:
    """Their keys, in both spellings: a reader of either finds its own."""
    scaling: dict[str, Any] = {"rope_type": model.rope_scaling or "default"}
    if model.rope_scaling is not None:
        scaling["factor"] = model.rope_factor
    if model.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": LLAMA3_FACTORS[0],
            "high_freq_factor": LLAMA3_FACTORS[1],
        }
    if model.rope_scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = model.rope_original_length
    full = scaling | {"rope_theta": model.rope_base}
    old = {"rope_theta": model.rope_base}
    if not own_local:
        return old | {"rope_parameters": full, "rope_scaling": full if model.rope_scaling else None}
    own = model.local_rope_base
    local_base = model.rope_base if own is None else own
    local = {"rope_type": "default", "rope_theta": local_base}
    return old | {
        "rope_local_base_freq": local_base,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }
