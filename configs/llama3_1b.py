"""Llama 3.2 1B, 1,235,814,400 parameters, on C4: a variant of llama3_8b.

    batiste train --config=configs/llama3_1b.py --workdir=runs/llama3_1b

For 16 accelerators of 32 GB or more: 1,048,576 tokens a batch, 25 billion (20 per parameter) in
all. Not yet run. Data and tokenizer: as in llama3_8b.

Sizes and RoPE scaling are those of the model card (Llama 3.2, September 2024). The published model
was pruned and distilled from the 8B one, so its training is no guide for one from scratch: the
learning rate is that of the 8B model. Positions reach 8,192 here and 131,072 in the published
model, whose parameters are the same: --config.model.max_length=131072.
"""

import dataclasses

from batiste.configs import llama3_8b
from batiste.configs.experiment import Experiment
from batiste.sharding import MeshConfig


def get_config(arg: str | None = None) -> Experiment:
    """Llama 3.2 1B; takes no argument."""
    experiment = llama3_8b.get_config(arg)
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(
            experiment.model, num_layers=16, model_dim=2048, head_dim=64, mlp_dim=8192,
            rope_scaling="llama3", rope_factor=32.0, tied_embeddings=True,
        ),
        mesh=MeshConfig(zero=3),
        train=dataclasses.replace(
            experiment.train, num_steps=23_571, batch_size=128, accumulation=4,
            schedule=dataclasses.replace(experiment.train.schedule, warmup_steps=0.08485),
        ),
    )
