"""The tokenizer in a GGUF file's metadata, as a tokenizer.json and what lies beside it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from batiste.data.json_files import shown

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # llama.cpp's types of tokens.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Where `tokenizer.ggml.pre` cuts text before merging: a regex, or GPT-2's after single digits.
CUTS = {
    "gpt-2": None, "smollm": None, "llama-bpe": SPLIT.replace("DIGITS", r"\p{N}{1,3}"),
    "qwen2": SPLIT.replace("DIGITS", r"\p{N}"),
}


def bring_tokenizer(said: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
    """Writes the tokenizer, its settings and the chat template; returns the files' names.

    said: the file's metadata. Raises ValueError for a tokenizer that is not byte-level BPE, or cuts
    text in a way that is not known here. A file without a tokenizer has none to write.
    """
    kind = said.get("tokenizer.ggml.model")
    if kind is None:
        return []
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model={kind!r}: expected 'gpt2', a byte-level BPE; "
                         "import the model's directory with its tokenizer.json instead")
    pre = said.get("tokenizer.ggml.pre")
    if pre not in CUTS:
        raise ValueError(f"tokenizer.ggml.pre={pre!r}: expected one of {', '.join(CUTS)}")
    pieces = _checked(said)
    settings = {}
    for ours, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        index = said.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            settings[ours] = pieces[index]
    ends = [said.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(index for index in ends if index is not None))
    files = {"tokenizer.json": _tokenizer(said, pre), "tokenizer_config.json": json.dumps(settings)}
    if said.get("tokenizer.chat_template") is not None:
        files["chat_template.jinja"] = said["tokenizer.chat_template"]
    if len(ends) > 1:  # Of a turn or a message, besides the text's.
        files["generation_config.json"] = json.dumps({"eos_token_id": ends})
    for name, text in files.items():
        (folder / name).write_text(text)
    return list(files)


def _checked(said: Mapping[str, Any]) -> list[str]:
    """The tokens; ValueError where types, merges or special tokens are not of them."""
    pieces, merges = (said.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    if not pieces or merges is None:
        raise ValueError("tokenizer.ggml.tokens or tokenizer.ggml.merges is missing or empty")
    types = said.get("tokenizer.ggml.token_type")
    if types is not None and len(types) != len(pieces):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries, but there are "
                         f"{len(pieces)} tokens")
    for key in ("bos", "eos", "padding"):
        index = said.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and not 0 <= index < len(pieces):
            raise ValueError(f"tokenizer.ggml.{key}_token_id={index}: expected less than "
                             f"{len(pieces)}, the number of tokens")
    known = set(pieces)
    if len(known) != len(pieces):
        raise ValueError("tokenizer.ggml.tokens has a token twice")
    for merge in merges:
        parts = merge.split(" ")
        if len(parts) != 2 or not {*parts, "".join(parts)} <= known:
            raise ValueError(f"tokenizer.ggml.merges has {shown(merge)}, which is not two tokens "
                             "that make a third")
    return pieces


def _tokenizer(said: Mapping[str, Any], pre: str) -> str:
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        from tokenizers.processors import TemplateProcessing
    except ImportError:
        raise ValueError(
            "a GGUF file's tokenizer needs the package tokenizers: pip install 'batiste[hf]'"
        ) from None
    pieces = said["tokenizer.ggml.tokens"]
    types = said.get("tokenizer.ggml.token_type") or [1] * len(pieces)
    vocab = {piece: index for index, piece in enumerate(pieces) if types[index] != UNUSED}
    merges = [tuple(each.split(" ")) for each in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    cut = CUTS[pre]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if cut is not None:
        steps.append(pre_tokenizers.Split(Regex(cut), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    adding = {CONTROL: tokenizer.add_special_tokens, USER_DEFINED: tokenizer.add_tokens}
    for kind, add in adding.items():
        special = kind == CONTROL
        add([AddedToken(piece, special=special, normalized=False)
             for piece, type_of in zip(pieces, types, strict=True) if type_of == kind])
    bos = said.get("tokenizer.ggml.bos_token_id")
    if said.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=[pieces[bos], "$A"], special_tokens=[(pieces[bos], bos)])
    return tokenizer.to_str()
