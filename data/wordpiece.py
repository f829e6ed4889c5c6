"""BERT's tokenizer (arXiv:1810.04805, WordPiece) from the vocab.txt that older models come with."""

import pathlib

from batiste.data.json_files import read_json

VOCABULARY = "vocab.txt"
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SETTINGS = {f"{kind}_token": (str, {"content": str}, None) for kind in SPECIAL} | {
    "tokenize_chinese_chars": bool | None, "strip_accents": bool | None,
    "do_lower_case": bool | None}
LONGEST_WORD = 100  # Characters; a longer word is unknown, as in BERT's own code.


def wordpiece_json(folder: pathlib.Path, tokenizers) -> str:
    """The tokenizer.json of a directory that has a vocab.txt, one token a line.

    How text is normalized is taken from tokenizer_config.json, as `transformers` names it.
    tokenizers: the package. Raises ValueError where the vocabulary lacks a token that BERT needs.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path, SETTINGS) if path.is_file() else {}
    try:
        lines = (folder / VOCABULARY).read_text(encoding="utf-8").split("\n")
    except UnicodeError as error:
        raise ValueError(f"{folder / VOCABULARY}: is no UTF-8: {error}") from None
    vocabulary = {token: index for index, token in enumerate(lines) if token}
    special = {kind: _content(settings.get(f"{kind}_token")) or usual
               for kind, usual in SPECIAL.items()}
    for kind in ("unk", "cls", "sep"):
        if special[kind] not in vocabulary:
            raise ValueError(f"{folder / VOCABULARY}: has no {special[kind]!r}, the {kind}_token "
                             "that rows are made with")
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(
        vocabulary, unk_token=special["unk"], max_input_chars_per_word=LONGEST_WORD))
    made.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
        strip_accents=settings.get("strip_accents"), lowercase=settings.get("do_lower_case") is not False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece(prefix="##")
    begin, between = special["cls"], special["sep"]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {between}:0",
        pair=f"{begin}:0 $A:0 {between}:0 $B:1 {between}:1",
        special_tokens=[(token, vocabulary[token]) for token in (begin, between)])
    made.add_special_tokens([token for token in special.values() if token in vocabulary])
    return made.to_str()


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
