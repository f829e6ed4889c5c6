"""A step's statistics as one line of metrics.jsonl, and what the detector reads of it."""

from typing import Any

import numpy as np

from batiste.train.health_statistics import HealthStatistics

DIGITS = 4  # Significant ones; a line of the quickstart has 2.3 kB.
BY_PARAMETER = ("gradient", "parameter", "update")
BY_LAYER = (
    "rms", "largest", "entropy", "logit", "dead", "router_load", "router_idle", "router_spread",
)
SCALARS = ("loss", "gradient_norm", "learning_rate")


def health_record(
    statistics: HealthStatistics, metrics: dict[str, float], seconds: float, wait: float,
    targets: dict[str, float],
) -> dict[str, Any]:
    """Returns the record, JSON as it is but for what is not finite; the detector sees no more.

    gradient, parameter, update: norms by name, lists by layer where it is stacked. BY_LAYER: lists.
    row_loss, row_checksum: lists by row. SCALARS: of `metrics`. seconds: since the record of the
    step before; wait: of them, until the batch was there. targets: `target_record`.
    """
    record: dict[str, Any] = {name: metrics[name] for name in SCALARS}
    record |= {"seconds": _rounded(seconds), "wait": _rounded(wait)}
    for name in BY_PARAMETER:
        norms = getattr(statistics, name)
        record[name] = {key: _rounded(norm) for key, norm in sorted(norms.items())}
    for name in BY_LAYER:
        values_L = getattr(statistics, f"{name}_L")
        if values_L is not None:
            record[name] = _rounded(values_L)
    record["row_loss"] = _rounded(statistics.loss_B)
    record["row_checksum"] = np.asarray(statistics.checksum_B).astype(int).tolist()
    record["targets"] = targets
    return record


def target_record(batch: Any) -> dict[str, float]:
    """What the targets of a batch are, beside its inputs: shares of those that have a weight.

    next: the input that follows, as they are where the next token is predicted; same: the input
    itself; after: the one after the next. NumPy on the host, before the batch is placed; of several
    processes each sees its own rows. Empty where nothing has a weight.
    """
    tokens_BT, targets_BT = (np.asarray(each)[:, :-2] for each in (batch.tokens_BT, batch.targets_BT))
    weighted_BT = np.asarray(batch.weights_BT)[:, :-2] > 0
    if not weighted_BT.any():
        return {}
    shifted = {"next": np.asarray(batch.tokens_BT)[:, 1:-1], "same": tokens_BT,
               "after": np.asarray(batch.tokens_BT)[:, 2:]}
    return {name: _rounded((targets_BT == each)[weighted_BT].mean())
            for name, each in shifted.items()}


def _rounded(values: Any) -> Any:
    values = np.asarray(values, np.float64)
    if values.ndim == 0:
        return float(f"{values:.{DIGITS}g}")
    return [float(f"{value:.{DIGITS}g}") for value in values]
