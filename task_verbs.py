"""The verbs tune and embed: tasks on top of an encoder."""

import sys

from absl import flags

from batiste.verb_flags import (
    define_compilation_cache, define_config, define_trust, define_workdir, define_written_workdir,
    required,
)


def define_tune(values: flags.FlagValues, argv: list[str]) -> None:
    """The flags of `batiste tune`."""
    define_config(values, argv)
    define_written_workdir(values)
    define_trust(values)
    define_compilation_cache(values)
    flags.DEFINE_enum("resume", "auto", ("auto", "must", "never"), "Continue if there is a "
                      "checkpoint, or only then, or refuse to.", flag_values=values)


def tune(values: flags.FlagValues) -> int:
    """`batiste tune`."""
    from batiste import exit_codes, main, tuning
    from batiste.tasks import TaskConfig

    required(values, "config")
    if not isinstance(values.config, TaskConfig):
        raise ValueError(f"config: get_config must return a TaskConfig, got {type(values.config)}")
    workdir = required(values, "workdir")
    if values.trust_code and values.config.encoder is not None:
        main.load_experiment(values.config.encoder, trust_code=True)
    tuned = tuning.tune(values.config, workdir, values.resume, values.break_lock)
    if tuned.reason.startswith("SIG"):
        print(f"stopped by {tuned.reason} after step {tuned.step}, saved; the same command "
              "continues")
        return exit_codes.BY_REASON[tuned.reason]
    print(tuning.table(values.config, tuned))
    return 0


def define_embed(values: flags.FlagValues, argv: list[str]) -> None:
    """The flags of `batiste embed`."""
    del argv
    define_workdir(values)
    define_trust(values)
    define_compilation_cache(values)
    flags.DEFINE_string("to", None, "A .npy file for the vectors, instead of a line of JSON for "
                        "each text on the standard output.", flag_values=values)
    flags.DEFINE_integer("max_length", 256, "Tokens of a text; the rest is cut.", 4,
                         flag_values=values)


def embed(values: flags.FlagValues) -> int:
    """`batiste embed`: of each line of the standard input."""
    import json

    import numpy as np

    from batiste import tuning

    workdir = required(values, "workdir")
    embedder = tuning.embedder(workdir, values.max_length, values.trust_code)
    try:
        text = sys.stdin.read()
        text.encode()
    except UnicodeError:
        raise ValueError("standard input: is not UTF-8; expected a text on each line") from None
    texts = text.splitlines()
    if values.to is not None:
        np.save(values.to, embedder(texts))
        return 0
    for vectors_BD in embedder.stream(texts):
        for vector_D in vectors_BD:
            print(json.dumps([round(float(value), 6) for value in vector_D]), flush=True)
    return 0
