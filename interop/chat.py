"""A conversation as the tokens that a model was taught to answer, by its own template."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from batiste.interop import chat_process

# A template is a program of whoever published the model. Published ones take milliseconds, and make
# some thousand characters of a message more.
RENDER_SECONDS = 10  # Of CPU time; starting and reading the tokenizer do not count.
MOST_CHARACTERS = 1 << 20
STARTED_SECONDS = 600  # Of wall time, all in all, on a busy machine.


def chat_tokens(folder: pathlib.Path, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of messages ({"role": "user", "content": TEXT}), up to where the answer begins.

    folder: with the model's tokenizer and its chat template, which is run in a process of its own
    with limits of time, memory and size. Raises ValueError where there is no template, for what it
    does not take, and for one that goes beyond the limits. What looks like a special token in a
    message is one, as `transformers` has it.
    """
    asked = {"folder": str(folder), "messages": list(messages), "seconds": RENDER_SECONDS,
             "characters": MOST_CHARACTERS + sum(len(each["content"]) for each in messages)}
    # Or it says when it is imported that it would like to have torch.
    environment = os.environ | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "HF_HUB_OFFLINE": "1"}
    # -P: the folder of the file is not one to import from.
    command = [sys.executable, "-P", chat_process.__file__]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, env=environment,
            timeout=STARTED_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template in {folder} was not filled in within "
                         f"{STARTED_SECONDS} s: leave --chat out") from None
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        raise ValueError(f"the chat template in {folder} takes more than {RENDER_SECONDS} s: leave "
                         "--chat out")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise ValueError(f"the chat template in {folder} could not be filled in: process ended with "
                         f"{done.returncode}: {last[:300]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["ids"]
