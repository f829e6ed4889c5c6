"""Attention and two recurrences with as many parameters, by the same loop.

    for mixer in attention GatedRecurrence LSTM; do
      batiste train --config=docs/extend/compare.py:$mixer --workdir=runs/compare/$mixer
    done

Each takes some minutes on two cores; docs/extend.md has the results of a tenth of the steps.
"""

import pathlib

from batiste.configs.experiment import Experiment
from batiste.configs.quickstart import get_config as quickstart

# F that gives a layer 12 D² parameters without a gate: 4 D² + 2 D F, 6 D F, and 9 D² + 2 D F.
WIDTHS = {"attention": 512, "GatedRecurrence": 256, "LSTM": 192}


def get_config(mixer: str = "attention") -> Experiment:
    """The quickstart with ReLU², and what mixes tokens exchanged."""
    config = quickstart()
    config.model.activation, config.model.mlp_dim = "relu2", WIDTHS[mixer]
    if mixer != "attention":
        config.model.positions, config.model.qk_norm = "none", False
        config.model.mixer = f"{pathlib.Path(__file__).with_name('recurrent.py')}:{mixer}"
    return config
