"""Shakespeare, character by character, on a laptop CPU or one accelerator.

    batiste train --config=configs/shakespeare.py --workdir=runs/shakespeare

Data: the TFDS data set tiny_shakespeare (1.1 MB), downloaded by name: TFDS needs the network, and
TensorFlow once to prepare it. The same text as a file needs neither:

    batiste train --config=configs/shakespeare.py:input.txt --workdir=runs/shakespeare

The model of nanoGPT's train_shakespeare_char.py (10.9 M parameters with this vocabulary), in
batches of 16,384 tokens. Not yet run; nanoGPT reports a validation loss of 1.47 nats per character.
"""

from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig
from batiste.inference import SamplingConfig
from batiste.models import TransformerConfig
from batiste.train import TrainConfig
from batiste.train.config import EvaluationConfig, StopConfig
from batiste.train.optimizer import OptimizerConfig
from batiste.train.schedule import ScheduleConfig


def get_config(arg: str | None = None) -> Experiment:
    """arg: where the text is, in the words of data.sources[0].path; None is TFDS."""
    return Experiment(
        # The vocabulary is what a character tokenizer keeps of this text: 65 characters, and the
        # 256 bytes, BOS and padding that every tokenizer of batiste has.
        model=TransformerConfig(
            vocab_size=384, num_layers=6, model_dim=384, num_heads=6, num_kv_heads=6, head_dim=64,
            mlp_dim=1536, max_length=256, activation="gelu", norm="layer", positions="learned",
            dropout=0.2, init_stddev=0.02, attention="auto",
        ),
        data=DataConfig(
            sources=(SourceConfig(path=arg or "tfds:tiny_shakespeare"),), validation_fraction=0.1,
            tokenizer="characters", vocab_size=384, sequence_length=256,
        ),
        train=TrainConfig(
            num_steps=5000, batch_size=64,
            optimizer=OptimizerConfig(beta2=0.99),
            schedule=ScheduleConfig(learning_rate=1e-3, warmup_steps=0.02),
            evaluation=EvaluationConfig(every=250),
            stop=StopConfig(patience=8),
        ),
        sample=SamplingConfig(max_tokens=200, prompts=("ROMEO:", "First Citizen:")),
    )
