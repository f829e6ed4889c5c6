"""What a run makes of its prompts, by step: samples.jsonl, and TensorBoard's text."""

import json
import os
import pathlib
from typing import Any

from batiste.data.json_files import parse_json
from batiste.train.lines import append

SAMPLES_FILE = "samples.jsonl"
KIND = {"step": int, "prompt": str, "text": str}  # Of a line of it.


def write_samples(
    workdir: str | os.PathLike, step: int, samples: list[tuple[str, str]]
) -> None:
    """Appends (prompt, text that followed) of a step to samples.jsonl, and shows it in TensorBoard."""
    from batiste.train.tensorboard import TensorBoard  # 0.3 s that only a writer needs.

    if not samples:
        return
    workdir = pathlib.Path(workdir)
    lines = [json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n"
             for prompt, text in samples]
    append(workdir / SAMPLES_FILE, "".join(lines))
    board = TensorBoard(workdir, step)
    board.write_texts(step, {f"samples/{number}": _as_code(prompt + text)
                             for number, (prompt, text) in enumerate(samples)})
    board.close()


def _as_code(text: str) -> str:
    """Markdown that shows a text as it is: TensorBoard renders what it is given."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def read_samples(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The samples of a work directory, by step; of one step and prompt the last that was written.

    Each is {"step": int, "prompt": str, "text": str}; what is not such a line is left out.
    """
    path = pathlib.Path(workdir, SAMPLES_FILE)
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            sample = parse_json(line, SAMPLES_FILE, KIND)
        except ValueError:
            continue
        found[sample["step"], sample["prompt"]] = {name: sample[name] for name in KIND}
    return [found[key] for key in sorted(found, key=lambda key: key[0])]
