"""1,100,048,384 parameters in the shape of TinyLlama, trained on C4.

    batiste train --config=configs/c4_1b.py --workdir=runs/c4_1b

For 16 accelerators of 32 GB or more: 2,097,152 tokens a batch, 22 billion (20 per parameter,
Hoffmann et al. 2022, arXiv:2203.15556) in all. Not yet run.

Data: TFDS prepares c4/en with Apache Beam, a job for a cluster. A copy prepared elsewhere with
file_format="array_record" is named by its directory:

    --config.data.sources[0].path=tfds:DIRECTORY

The tokenizer is a BPE of TinyLlama's size, learned from the data. Shape, batch and optimization are
those of TinyLlama (Zhang et al. 2024, arXiv:2401.02385), which saw 3 trillion tokens.
"""

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import ObjectiveConfig, TrainConfig
from batiste.train.config import CheckpointConfig, EvaluationConfig
from batiste.train.schedule import ScheduleConfig


def get_config(arg: str | None = None) -> Experiment:
    """TinyLlama's shape on C4; takes no argument."""
    del arg
    return Experiment(
        model=TransformerConfig(
            vocab_size=32_000, num_layers=22, model_dim=2048, num_heads=32, num_kv_heads=4,
            head_dim=64, mlp_dim=5632, max_length=2048, norm_epsilon=1e-5, tied_embeddings=False,
            init_stddev=0.02, dtype="bfloat16", remat="full", attention="auto",
        ),
        data=DataConfig(
            sources=(SourceConfig(path="tfds:c4/en"),), validation_fraction=0.0005,
            tokenizer="bpe", vocab_size=32_000, sequence_length=2048,
        ),
        mesh=MeshConfig(zero=3),
        train=TrainConfig(
            num_steps=10_490, batch_size=1024, accumulation=8,
            schedule=ScheduleConfig(learning_rate=4e-4, warmup_steps=0.1907),  # 2,000 steps
            objective=ObjectiveConfig(loss_chunk=512),
            checkpoint=CheckpointConfig(every=500, keep_every=2000),
            evaluation=EvaluationConfig(every=500, max_batches=20),
        ),
    )
