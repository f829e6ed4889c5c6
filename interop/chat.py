"""A conversation as the tokens that a model was taught to answer, by its own template."""

import os
import pathlib
from collections.abc import Mapping, Sequence


def chat_tokens(folder: pathlib.Path, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of messages ({"role": "user", "content": TEXT}), up to where the answer begins.

    folder: with the model's tokenizer and its chat template. Raises ValueError where there is no
    template, and for what it does not take. What looks like a special token in a message is one, as
    `transformers` has it.
    """
    # Or it says when it is imported that it would like to have torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "a chat template needs the package transformers: pip install 'batiste[hf]'") from None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{folder} has no chat template, so its model was not taught to chat: leave --chat out")
    try:
        return list(tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False))
    except Exception as error:  # Whatever the template of somebody else raises.
        raise ValueError(f"the chat template in {folder} refused the messages: {error}") from None
