"""A small model of Python code, from nothing, on a laptop CPU.

    batiste train --config=configs/quickstart.py --workdir=runs/quickstart

Data: the standard library of the running interpreter. On 2 cores: about 5 minutes.
"""

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig
from batiste.inference import SamplingConfig
from batiste.models import TransformerConfig
from batiste.train import TrainConfig


def get_config(arg: str | None = None) -> Experiment:
    """The quickstart."""
    del arg
    experiment = Experiment(
        model=TransformerConfig(num_layers=4, model_dim=256, num_heads=4, num_kv_heads=4,
                                head_dim=64, mlp_dim=768, scan_unroll=4),
        data=DataConfig(),
        train=TrainConfig(num_steps=400),
        sample=SamplingConfig(prompts=("def ", "import ", "class ")),
    )
    return experiment
