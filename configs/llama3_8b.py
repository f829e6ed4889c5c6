"""Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783), 8,030,261,248 parameters, on C4.

    batiste train --config=configs/llama3_8b.py --workdir=runs/llama3_8b

For 64 accelerators of 80 GB or more (a TPU v5p 4x4x4) as data 16 x tensor 4: 4,194,304 tokens a
batch, 160 billion (20 per parameter, Hoffmann et al. 2022, arXiv:2203.15556) in all, where the
published model saw 15 trillion. Not yet run.

Data: TFDS prepares c4/en with Apache Beam, a job for a cluster. A copy prepared elsewhere with
file_format="array_record" is named by its directory:

    --config.data.sources[0].path=tfds:DIRECTORY

The published tokenizer is a byte-level BPE and not a SentencePiece model; a BPE of the same size is
learned from the data instead. Peak learning rate: table 3 of the paper. Warm-up, decay to a tenth
and weight decay: its scaling-law runs (section 3.2.1). Betas: Llama 2 (arXiv:2307.09288).
"""

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import ObjectiveConfig, TrainConfig
from batiste.train.config import CheckpointConfig, EvaluationConfig
from batiste.train.schedule import ScheduleConfig


def get_config(arg: str | None = None) -> Experiment:
    """Llama 3 8B; takes no argument."""
    del arg
    return Experiment(
        model=TransformerConfig(
            vocab_size=128_256, num_layers=32, model_dim=4096, num_heads=32, num_kv_heads=8,
            head_dim=128, mlp_dim=14_336, max_length=8192, norm_epsilon=1e-5, rope_base=500_000.0,
            tied_embeddings=False, init_stddev=0.02, dtype="bfloat16", remat="full",
            attention="auto",
        ),
        data=DataConfig(
            sources=(SourceConfig(path="tfds:c4/en"),), validation_fraction=0.0005,
            tokenizer="bpe", vocab_size=128_256, sequence_length=8192,
        ),
        mesh=MeshConfig(tensor=4, zero=3),
        train=TrainConfig(
            num_steps=38_147, batch_size=512, accumulation=8,
            schedule=ScheduleConfig(learning_rate=3e-4, warmup_steps=0.05243),  # 2,000 steps
            objective=ObjectiveConfig(loss_chunk=512),
            checkpoint=CheckpointConfig(every=500, keep_every=5000),
            evaluation=EvaluationConfig(every=500, max_batches=20),
        ),
    )
