"""What the load of experts says is wrong."""

from typing import Any

import numpy as np

from batiste.train.findings import Symptom
from batiste.train.series import ENOUGH, IN_A_ROW, Counts, Runs

IDLE = 0.5  # Of the experts.
# Experts over which the load spreads (exp of its entropy), of those that a token takes: 1 where all
# tokens take the same ones. In the quickstart with 4 experts and 2 of a token one expert is among the
# two of 97 % of the tokens from step 12 on, and the load spreads over 2.9 to 3.5: the others share
# what is left, and nothing has collapsed.
COLLAPSED = 1.25
# A router begins at random and may prefer some experts for a while.
SETTLED = 64  # Looks, or ENOUGH of a layer that was well.


class RouterRules:
    """Looks at records in order; settings: the flat config of the run."""

    def __init__(self, settings: dict[str, Any]):
        self._settings, self._runs, self._total = settings, Runs(), Counts()

    def look(self, by_layer: dict[str, np.ndarray]) -> list[Symptom]:
        """The first layer whose router has collapsed."""
        if "router_spread" not in by_layer:
            return []
        spread_L, idle_L = by_layer["router_spread"], by_layer["router_idle"]
        experts, chosen = (self._settings[f"model.{name}"]
                           for name in ("num_experts", "experts_per_token"))
        collapsed_L = (spread_L * experts < COLLAPSED * chosen) | (idle_L >= IDLE)
        collapsed_L &= experts > COLLAPSED * chosen
        looks_L = self._total.add("router", np.ones(len(spread_L), bool))
        settled_L = (looks_L > SETTLED) | (self._total.add("well", ~collapsed_L) >= ENOUGH)
        lasting = (self._runs.add("router", collapsed_L) >= IN_A_ROW) & settled_L
        if not lasting.any():
            return []
        layer = int(np.argmax(lasting))
        evidence = {"experts that the load spreads over": spread_L[layer] * experts,
                    "of": experts, "experts without a token": idle_L[layer]}
        return [Symptom("router_collapse", evidence, layer, "layers.mixture.router_DE")]
