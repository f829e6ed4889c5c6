"""Mixtral 8x7B (Jiang et al. 2024, arXiv:2401.04088), 46,702,792,704 parameters, on C4.

    batiste train --config=configs/mixtral_8x7b.py --workdir=runs/mixtral_8x7b

For 64 accelerators of 80 GB or more (a TPU v5p 4x4x4) as data 16 x expert 4: 4,194,304 tokens a
batch, 257 billion (20 per parameter that a token meets, 12.9 billion; Hoffmann et al. 2022,
arXiv:2203.15556) in all. Not yet run.

Data: TFDS prepares c4/en with Apache Beam, a job for a cluster. A copy prepared elsewhere with
file_format="array_record" is named by its directory:

    --config.data.sources[0].path=tfds:DIRECTORY

The tokenizer is a BPE of the published size, learned from the data. The published context is 32,768
tokens, and so is model.max_length; records here have 8,192. The paper does not say how the model
was trained: learning rate and warm-up are those of llama3_8b, the weight of the balance loss that
of Switch (arXiv:2101.03961), of the z-loss that of ST-MoE (arXiv:2202.08906).
"""

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import ObjectiveConfig, TrainConfig
from batiste.train.config import CheckpointConfig, EvaluationConfig
from batiste.train.schedule import ScheduleConfig


def get_config(arg: str | None = None) -> Experiment:
    """Mixtral 8x7B; takes no argument."""
    del arg
    return Experiment(
        model=TransformerConfig(
            vocab_size=32_000, num_layers=32, model_dim=4096, num_heads=32, num_kv_heads=8,
            head_dim=128, mlp_dim=14_336, max_length=32_768, num_experts=8, experts_per_token=2,
            norm_epsilon=1e-5, rope_base=1_000_000.0, tied_embeddings=False, init_stddev=0.02,
            dtype="bfloat16", remat="full", attention="auto",
        ),
        data=DataConfig(
            sources=(SourceConfig(path="tfds:c4/en"),), validation_fraction=0.0005,
            tokenizer="bpe", vocab_size=32_000, sequence_length=8192,
        ),
        mesh=MeshConfig(expert=4, zero=3),
        train=TrainConfig(
            num_steps=61_400, batch_size=512, accumulation=8,
            schedule=ScheduleConfig(learning_rate=3e-4, warmup_steps=0.03257),  # 2,000 steps
            objective=ObjectiveConfig(loss_chunk=512, balance_loss=0.01, router_z_loss=0.001),
            checkpoint=CheckpointConfig(every=500, keep_every=5000),
            evaluation=EvaluationConfig(every=500, max_batches=20),
        ),
    )
