"""Raw text to batches: prepare a corpus once, then read any batch of it by its step.

`prepare` reads documents, holds some out, trains a tokenizer, packs records and stores them;
`Loader` gives the batch of a step. This room runs on the host alone and never imports jax.
"""

from batiste.data.config import DataConfig, SourceConfig
from batiste.data.file_hashes import damage, hash_files, read_signed, write_signed
from batiste.data.huggingface_tokenizer import pack as pack_tokenizer
from batiste.data.loader import Loader
from batiste.data.order import position
from batiste.data.packing import Batch
from batiste.data.prepare import prepare
from batiste.data.prepared import Prepared, load_prepared
from batiste.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batch", "DataConfig", "Loader", "Prepared", "SourceConfig", "Tokenizer", "damage",
    "hash_files", "load_prepared", "load_tokenizer", "pack_tokenizer", "position", "prepare",
    "read_signed", "write_signed",
]
