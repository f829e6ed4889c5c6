"""Raw text to batches: prepare a corpus once, then read any batch of it by its step.

`prepare` reads documents, holds some out, trains a tokenizer, packs records and stores them;
`Loader` gives the batch of a step. This room runs on the host alone and never imports jax.
"""

from batiste.data.config import DataConfig, SourceConfig
from batiste.data.file_hashes import damage, hash_files, read_signed, write_signed
from batiste.data.huggingface_tokenizer import can_pack
from batiste.data.huggingface_tokenizer import pack as pack_tokenizer
from batiste.data.loader import Loader
from batiste.data.objectives import Transform, transform_of
from batiste.data.order import Order, position
from batiste.data.packing import Batch
from batiste.data.pairs import target_length
from batiste.data.prepare import prepare
from batiste.data.prepared import Prepared, load_prepared
from batiste.data.record_objective import OWN_KINDS, RecordObjective, kinds_of
from batiste.data.special_tokens import encode_prompt, special_ids, special_tokens
from batiste.data.text_reader import PackedReader, Read, TextReader, text_reader
from batiste.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "OWN_KINDS", "Batch", "DataConfig", "Loader", "Order", "PackedReader", "Prepared", "Read",
    "RecordObjective", "SourceConfig", "TextReader", "Tokenizer", "Transform", "can_pack", "damage",
    "encode_prompt", "hash_files", "kinds_of", "load_prepared", "load_tokenizer", "pack_tokenizer",
    "position", "prepare", "read_signed", "special_ids", "special_tokens", "target_length",
    "text_reader", "transform_of", "write_signed",
]
