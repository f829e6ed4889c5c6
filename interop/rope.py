"""Rotations as config.json spells them, old and new."""

import math
from collections.abc import Mapping
from typing import Any

from batiste.data.json_files import check_json, shown
from batiste.models import LLAMA3_FACTORS, YARN_TURNS, TransformerConfig, yarn_length

SCALINGS = ("default", "linear", "llama3", "yarn")
KINDS = {
    "rope_type": str | None, "type": str | None, "rope_theta": float | None, "factor": float | None,
    "original_max_position_embeddings": int | None, "low_freq_factor": float | None,
    "high_freq_factor": float | None, "partial_rotary_factor": float | None,
    "beta_fast": float | None, "beta_slow": float | None, "truncate": bool | None,
    "attention_factor": float | None, "mscale": float | None, "mscale_all_dim": float | None,
}


def read(theirs: Mapping[str, Any], local_base: float | None) -> dict[str, Any]:
    """Our fields, from `rope_parameters` or `rope_theta` and `rope_scaling`.

    Args:
        theirs: A config with the class's defaults.
        local_base: Of local layers, where a config does not say; None where they are as the others.

    Raises:
        ValueError: For a scaling that is not known here, and keys that it lacks.
    """
    given, local, key = _parameters(theirs, nested=local_base is not None)
    fields = {"rope_base": _positive(given, "rope_theta", theirs["rope_theta"])}
    if local_base is not None:
        old = theirs.get("rope_local_base_freq") or local_base
        fields["local_rope_base"] = _positive(local, "rope_theta", old)
    _check_kind(local, theirs, ("default",), key)
    kind = _check_kind(given, theirs, SCALINGS, key)
    if kind == "default":
        return fields
    # As `transformers`: a length that the scaling does not say is the model's.
    length = given.get("original_max_position_embeddings") or theirs["max_position_embeddings"]
    if local_base is None:
        length = theirs.get("original_max_position_embeddings") or length
    ratio = theirs["max_position_embeddings"] / length if kind == "yarn" else None
    fields |= {"rope_scaling": kind, "rope_factor": _positive(given, "factor", ratio)}
    if kind == "llama3":
        factors = tuple(_positive(given, name) for name in ("low_freq_factor", "high_freq_factor"))
        if factors != LLAMA3_FACTORS:
            raise ValueError(
                f"config.json: low_freq_factor, high_freq_factor={factors}: expected {LLAMA3_FACTORS}")
    if kind == "yarn":
        _check_yarn(given, fields["rope_factor"])
    if kind in ("llama3", "yarn"):
        fields["rope_original_length"] = length
    return fields


def _parameters(
    theirs: Mapping[str, Any], nested: bool
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Of all layers, or of global and local ones where a family has a rotation for each; the key."""
    new, old = theirs.get("rope_parameters"), theirs.get("rope_scaling")
    key = "rope_scaling" if old and not nested else "rope_parameters"
    given, local = (old or {}) if key == "rope_scaling" else (new or {}), {}
    kinds = ("full_attention", "sliding_attention")
    if not nested:
        if given.keys() & set(kinds):
            raise ValueError(f"config.json: {key} has rotations by kind of layer, of which a "
                             f"{theirs.get('model_type')} has one")
    else:
        flat = sorted(given.keys() - set(kinds))
        if flat:
            raise ValueError(f"config.json: rope_parameters.{flat[0]}: expected {' and '.join(kinds)}")
        check_json(given, dict.fromkeys(kinds, dict | None), "config.json", "rope_parameters")
        given, local = ((given.get(kind) or {}) for kind in kinds)
        given = given | (old or {})
    for parameters, name in ((given, key), (local, f"{key}.sliding_attention")):
        check_json(parameters, KINDS, "config.json", name)
    return given, local, key


def _check_kind(
    given: Mapping[str, Any], theirs: Mapping[str, Any], known: tuple[str, ...], key: str
) -> str:
    """The kind of scaling; ValueError for one that is not known, or heads rotated in part."""
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in known:
        raise ValueError(f"config.json: {key}: rope_type={shown(kind)}: expected one of "
                         f"{', '.join(known)}")
    for parameters in (given, theirs):
        partial = parameters.get("partial_rotary_factor")
        if partial is not None and partial != 1:
            raise ValueError(f"config.json: partial_rotary_factor={partial}: expected 1.0, heads "
                             "that are rotated whole")
    return kind


def _positive(given: Mapping[str, Any], name: str, left_out: float | None = None) -> float:
    value = left_out if given.get(name) is None else given[name]
    if value is None:
        raise ValueError(f"config.json: rope_type={shown(given.get('rope_type', given.get('type')))} "
                         f"has no {name}, of which it is made")
    if not value > 0:
        raise ValueError(f"config.json: {name}={value} of a rotation: expected a number above 0")
    return float(value)


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
