"""GPT-2 small (Radford et al. 2019), 124,439,808 parameters, trained on C4.

    batiste train --config=configs/gpt2_124m.py --workdir=runs/gpt2_124m

For 8 accelerators of 16 GB or more: 524,288 tokens a batch, 10 billion in all. Not yet run.

Data: TFDS prepares c4/en with Apache Beam, a job for a cluster. A copy prepared elsewhere with
file_format="array_record" is named by its directory:

    --config.data.sources[0].path=tfds:DIRECTORY

The published tokenizer is a byte-level BPE and not a SentencePiece model; a BPE of the same size is
learned from the data instead. The optimization is that of GPT-3 125M (Brown et al. 2020,
arXiv:2005.14165, table 2.1 and appendix B); GPT-2's was not published.
"""

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import ObjectiveConfig, TrainConfig
from batiste.train.config import CheckpointConfig, EvaluationConfig
from batiste.train.schedule import ScheduleConfig


def get_config(arg: str | None = None) -> Experiment:
    """GPT-2 small; takes no argument."""
    del arg
    return Experiment(
        model=TransformerConfig(
            vocab_size=50_257, num_layers=12, model_dim=768, num_heads=12, num_kv_heads=12,
            head_dim=64, mlp_dim=3072, max_length=1024, activation="gelu", norm="layer",
            norm_epsilon=1e-5, bias="all", positions="learned", init_stddev=0.02, dtype="bfloat16",
            attention="auto",
        ),
        data=DataConfig(
            sources=(SourceConfig(path="tfds:c4/en"),), validation_fraction=0.0005,
            tokenizer="bpe", vocab_size=50_257, sequence_length=1024,
        ),
        mesh=MeshConfig(zero=1),
        train=TrainConfig(
            num_steps=19_073, batch_size=512, accumulation=4,
            schedule=ScheduleConfig(learning_rate=6e-4, warmup_steps=0.0375),  # 375 M tokens
            objective=ObjectiveConfig(loss_chunk=256),
            checkpoint=CheckpointConfig(every=1000, keep_every=5000),
            evaluation=EvaluationConfig(every=500, max_batches=20),
        ),
    )
