"""Llama 3 70B (Grattafiori et al. 2024, arXiv:2407.21783), 70,553,706,496 parameters, on C4.

    batiste train --config=configs/llama3_70b.py --workdir=runs/llama3_70b

For 1,024 accelerators of 80 GB or more (a TPU v5p 8x8x16) as data 128 x tensor 8: 8,388,608 tokens
a batch, 1.4 trillion (20 per parameter, Hoffmann et al. 2022, arXiv:2203.15556) in all, where the
published model saw 15 trillion. Not yet run. Data, tokenizer and all else: as in llama3_8b.

Sizes and peak learning rate: table 3 of the paper.
"""

import dataclasses

from batiste.configs import llama3_8b
from batiste.configs.experiment import Experiment
from batiste.sharding import MeshConfig


def get_config(arg: str | None = None) -> Experiment:
    """Llama 3 70B; takes no argument."""
    experiment = llama3_8b.get_config(arg)
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(
            experiment.model, num_layers=80, model_dim=8192, num_heads=64, mlp_dim=28_672,
        ),
        mesh=MeshConfig(tensor=8, zero=3),
        train=dataclasses.replace(
            experiment.train, num_steps=168_213, batch_size=1024, accumulation=4,
            schedule=dataclasses.replace(
                experiment.train.schedule, learning_rate=1.5e-4, warmup_steps=0.01189),
        ),
    )
