"""A process of its own that fills in a chat template: somebody else's program, under limits.

Run by path, so that it imports nothing of the package; reads one JSON object from its input, and
writes another, {"ids": [...]} or {"error": why}, as the last line of its output.
"""

import json
import resource
import sys

MOST_BYTES = 2 << 30  # Of memory, beyond what it takes to import the package.


def main() -> None:
    """Answers one request: folder, messages, seconds (of CPU) and characters (of text)."""
    asked = json.load(sys.stdin)
    sys.modules["torch"] = None  # Nothing here needs it, and importing it takes most of the time.
    try:
        import transformers
    except ImportError:
        answer = {"error": "a chat template needs the package transformers: "
                           "pip install 'batiste[hf]'"}
    else:
        answer = _answered(transformers, asked)
    print("\n" + json.dumps(answer))


def _answered(transformers, asked: dict) -> dict:
    folder = asked["folder"]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Whatever the package raises of files that are damaged.
        return {"error": f"{folder}: transformers cannot read the tokenizer: {_line(error)}"}
    if tokenizer.chat_template is None:
        return {"error": f"{folder} has no chat template, so its model was not taught to chat: leave "
                         "--chat out"}
    _limit(asked["seconds"])
    try:
        text = tokenizer.apply_chat_template(
            asked["messages"], add_generation_prompt=True, tokenize=False)
    except MemoryError:
        return {"error": f"the chat template in {folder} takes more than {MOST_BYTES >> 30} GiB"}
    except Exception as error:  # Whatever the template of somebody else raises.
        return {"error": f"the chat template in {folder} refused the messages: {_line(error)}"}
    if len(text) > asked["characters"]:
        return {"error": f"the chat template in {folder} makes {len(text):,} characters: expected at "
                         f"most {asked['characters']:,}"}
    return {"ids": list(tokenizer(text, add_special_tokens=False)["input_ids"])}


def _limit(seconds: int) -> None:
    """Ends this process by a signal after so much more CPU time; on Linux bounds its memory, too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until, until))
    if sys.platform != "linux":  # Others count what was only reserved, or do not hold to it.
        return
    with open("/proc/self/statm") as sizes:
        taken = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_BYTES, taken + MOST_BYTES))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


if __name__ == "__main__":
    main()
