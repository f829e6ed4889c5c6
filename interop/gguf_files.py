"""GGUF, the one-file format of llama.cpp: weights dequantized, by their names in `transformers`."""

import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from batiste.data.json_files import check_json, shown
from batiste.interop.files import Entry
from batiste.interop.gguf_header import GGUFTensor, read_header
from batiste.interop.gguf_tokenizer import bring_tokenizer

SUFFIX = ".gguf"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}
# Their key, after the architecture and a dot, and ours in a config.json.
KEYS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
REAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
WHOLE = (*(key for key in KEYS if key not in REAL), "rope.dimension_count", "attention.value_length")
# What llama.cpp too does without in no file of these architectures.
NEEDED = ("block_count", "embedding_length", "feed_forward_length", "context_length",
          "attention.head_count", "attention.layer_norm_rms_epsilon")
FLOATS = {0: np.float32, 1: np.float16}
KINDS = {"general.architecture": str | None} | {
    f"tokenizer.ggml.{key}": kind | None for key, kind in {
        "model": str, "pre": str, "tokens": list[str], "merges": list[str], "token_type": list[int],
        "add_bos_token": bool, "bos_token_id": int, "eos_token_id": int, "padding_token_id": int,
    }.items()} | {"tokenizer.chat_template": str | None}
# The first has the rows of a table beside it, the others are the head dim once more.
IMPLIED = ("vocab_size", "rope.dimension_count", "attention.value_length")
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QUANTIZED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GGUFile:
    """A GGUF file as `Tensors` are of a directory, with the config.json that it implies, `theirs`.

    Raises ValueError for what is no such file, or is of a model that is not known here.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._said, tensors = read_header(path, _sizes(path))
        check_json(self._said, KINDS, str(path))
        self._architecture = self._needed("general.architecture")
        if self._architecture not in ARCHITECTURES:
            raise ValueError(f"{path}: general.architecture={shown(self._architecture)}: expected "
                             f"one of {', '.join(ARCHITECTURES)}")
        self._tensors = {self._name(each.name): each for each in tensors}
        self.entries = {name: self._entry(each) for name, each in self._tensors.items()}
        self.theirs = self._config()

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32: one that was quantized has the values that it stands for."""
        import gguf

        tensor, shape = self._tensors[name], self.entries[name].shape
        kind = gguf.GGMLQuantizationType(tensor.kind)
        data = np.memmap(self._path, np.uint8, "r", tensor.start, (tensor.size,))
        if kind in FLOATS:
            data = data.view(FLOATS[kind])
        else:
            data = data.reshape(math.prod(shape[:-1]), -1)
        values = gguf.dequantize(data, kind).reshape(shape)
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        found = re.search(r"self_attn\.([qk])_proj\.weight$", name)
        if self._architecture != "llama" or found is None:
            return values
        # llama.cpp rotates neighbours: of each head's rows, the halves come one after the other.
        split = values.reshape(self.theirs[heads[found[1]]], -1, 2, shape[1])
        return split.swapaxes(1, 2).reshape(shape)

    def bring(self, folder: pathlib.Path) -> list[str]:
        """Writes what belongs to a model besides its weights; returns the files' names."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.theirs, indent=2) + "\n")
        return ["config.json", *bring_tokenizer(self._said, folder)]

    def _needed(self, name: str) -> Any:
        if self._said.get(name) is None:
            raise ValueError(f"{self._path}: {name} is missing in its metadata")
        return self._said[name]

    def _name(self, name: str) -> str:
        layer = LAYER.fullmatch(name)
        if layer is not None and layer[2] in PARTS:
            return f"model.layers.{layer[1]}.{PARTS[layer[2]]}.{layer[3]}"
        end, _, rest = name.partition(".")
        if layer is None and rest == "weight" and end in ENDS:
            return f"{ENDS[end]}.weight"
        hint = ("; RoPE scaled as by Llama 3.1 is read from safetensors only"
                if end == "rope_freqs" else "")
        raise ValueError(f"{self._path}: a tensor {name}, which is not known here{hint}")

    def _entry(self, tensor: GGUFTensor) -> Entry:
        import gguf

        kind = gguf.GGMLQuantizationType(tensor.kind).name
        if kind not in QUANTIZED:
            raise ValueError(f"{self._path}: {tensor.name} is {kind}: expected one of "
                             f"{', '.join(QUANTIZED)}")
        return Entry(self._path, np.dtype(np.float32), tensor.shape, tensor.start)

    def _config(self) -> dict[str, Any]:
        """The config.json; a key of the architecture that it does not know is refused by name."""
        prefix = self._architecture + "."
        own = {name.removeprefix(prefix): value for name, value in self._said.items()
               if name.startswith(prefix)}
        unknown = own.keys() - KEYS.keys() - set(IMPLIED)
        if unknown:
            raise ValueError(f"{self._path}: {prefix}{min(unknown)}={own[min(unknown)]!r} is not "
                             "known here")
        for name in NEEDED:
            self._needed(prefix + name)
        check_json(own, dict.fromkeys(WHOLE, int | None) | dict.fromkeys(REAL, float | None),
                   str(self._path), self._architecture)
        values = {KEYS[name]: _short(value) for name, value in own.items() if name in KEYS}
        if values["num_attention_heads"] < 1:
            raise ValueError(f"{self._path}: {prefix}attention.head_count: expected at least 1")
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        for name in IMPLIED[1:]:
            if own.get(name, values["head_dim"]) != values["head_dim"]:
                raise ValueError(f"{self._path}: {prefix}{name}={own[name]}: expected the head "
                                 f"dim, {values['head_dim']}")
        ids = {f"{ours}_token_id": self._said.get(f"tokenizer.ggml.{key}_token_id")
               for ours, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
        if "model.embed_tokens.weight" not in self.entries:
            raise ValueError(f"{self._path}: token_embd.weight is missing")
        return values | {key: value for key, value in ids.items() if value is not None} | {
            "model_type": self._architecture,
            "architectures": [ARCHITECTURES[self._architecture]], "dtype": "float32",
            "vocab_size": self.entries["model.embed_tokens.weight"].shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self.entries,
        }


def _short(value: Any) -> Any:
    """A float32 of the metadata as it was written: 1e-05 and not 9.999999747e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _sizes(path: pathlib.Path) -> dict[int, tuple[int, int]]:
    """Entries and bytes of a block, by the number of a tensor's type."""
    try:
        import gguf
    except ImportError:
        raise ValueError("a GGUF file needs the package gguf: pip install 'batiste[hf]'") from None
    if not path.is_file():
        raise ValueError(f"from={path}: no such file")
    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
