"""Tiny models as the hub has them, each with the special tokens and the template of its family."""

import json
import pathlib

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import RobertaProcessing, TemplateProcessing

TEXTS = [f"document {n} of many:\n\treturn {n * 17}, 'so on' * {n % 7}\n" for n in range(160)]
DECODER = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2,
               num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
               initializer_range=0.5)
END = "<|endoftext|>"


def tokenizer_of(specials: list[str], normalizer=None) -> Tokenizer:
    """A byte-level BPE with these tokens first."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


def _gpt2():
    """BOS is the end, and there is no padding."""
    tokenizer = tokenizer_of([END])
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=64, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0, initializer_range=0.5)
    return tokenizer, transformers.GPT2LMHeadModel(config), {"bos_token": END, "eos_token": END}


def _qwen2():
    """No BOS, and padding is the end."""
    tokenizer = tokenizer_of([END, "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    config = transformers.Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0, **DECODER)
    return tokenizer, transformers.Qwen2ForCausalLM(config), {
        "bos_token": None, "eos_token": END, "pad_token": END}


def _llama3():
    """BOS is not the end, of which the model has several, and there is no padding."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = tokenizer_of(specials)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)])
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=[1, 2], **DECODER)
    return tokenizer, transformers.LlamaForCausalLM(config), {
        "bos_token": specials[0], "eos_token": specials[1]}


ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def _roberta_tokenizer() -> Tokenizer:
    tokenizer = tokenizer_of(ROBERTA)
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}


def _codet5():
    """RoBERTa's tokenizer, its template around a source, and a decoder that begins with <pad>."""
    tokenizer = _roberta_tokenizer()
    config = transformers.T5Config(
        vocab_size=tokenizer.get_vocab_size(), d_model=16, d_kv=8, d_ff=24, num_layers=1,
        num_decoder_layers=1, num_heads=2, initializer_factor=4.0, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=1)
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():  # Of its initial parameters, the source hardly changes what is written.
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return tokenizer, model, NAMED


def _bart():
    """A decoder that begins with </s>, and is made to write <s> first."""
    tokenizer = _roberta_tokenizer()
    config = transformers.BartConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=64, init_std=0.5, forced_eos_token_id=None)
    model = transformers.BartForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = 0
    return tokenizer, model, NAMED


KINDS = {"gpt2": _gpt2, "qwen2": _qwen2, "llama3": _llama3, "codet5": _codet5, "bart": _bart}


def write_directory(kind: str, folder: pathlib.Path):
    """Writes config, weights and tokenizer of a kind; returns the model of `transformers`."""
    torch.manual_seed(0)
    tokenizer, model, settings = KINDS[kind]()
    folder.mkdir(parents=True)
    model.eval().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model
