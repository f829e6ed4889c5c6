"""The verbs of the command line: what flags each has, and what each does with them."""

import pathlib
import re
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

from batiste import exit_codes
from batiste.exchange_verbs import define_export, define_import, export, import_
from batiste.task_verbs import define_embed, define_tune, embed, tune
from batiste.verb_flags import (
    connect_processes, define_compilation_cache, define_config, define_processes, define_trust,
    define_workdir, define_written_workdir, given_experiment, required, trust,
)


class Verb(NamedTuple):
    """How a verb is written and what it does, for `batiste --help`; its flags; and it itself."""

    usage: str
    about: str
    define: Callable[[flags.FlagValues, list[str]], None]
    call: Callable[[flags.FlagValues], int]


def _define_prepare(values: flags.FlagValues, argv: list[str]) -> None:
    define_config(values, argv)
    define_written_workdir(values)


def _prepare(values: flags.FlagValues) -> int:
    from batiste import main

    prepared = main.prepare(
        given_experiment(values), required(values, "workdir"), values.break_lock)
    for split in ("train", "validation"):
        print(f"{split}: {prepared.num_records(split):,} records, {prepared.num_bytes(split):,} bytes")
    print(prepared.directory)
    return 0


def _define_train(values: flags.FlagValues, argv: list[str]) -> None:
    _define_prepare(values, argv)
    define_processes(values)
    define_trust(values)
    define_compilation_cache(values)
    flags.DEFINE_string(
        "resume", "auto", "auto: continue if there is a checkpoint; must: demand one; never: "
        "refuse to find one.", flag_values=values)
    flags.DEFINE_list(
        "resume_override", [], "What may differ from the checkpoint's on purpose: fields of the "
        "config (train.schedule.learning_rate,...), data, tokenizer.", flag_values=values)
    flags.DEFINE_bool(
        "force", False, "Train although the memory will not suffice.", flag_values=values)


def _train(values: flags.FlagValues) -> int:
    from batiste import main
    from batiste.train.ledger import process_started

    workdir = required(values, "workdir")
    if values.config is None:
        experiment = main.load_experiment(workdir, values.trust_code)
    else:
        experiment = given_experiment(values)
    prints = connect_processes(values)
    result = main.train(experiment, workdir, values.resume, values.resume_override, values.force,
                        process_started(), values.break_lock)
    if result.validation is None:
        if prints:
            print(f"stopped by {result.reason} after step {result.step}, saved; the same command "
                  "continues")
        return exit_codes.BY_REASON[result.reason]
    if not prints:
        return 0
    if result.reason == "patience":
        print(f"stopped early after step {result.step}: the validation loss no longer falls")
    print_perplexity(result.validation)
    report = pathlib.Path(workdir, "report.md")
    samples = re.search(r"^## Samples\n.*?(?=^## )", report.read_text(), re.S | re.M)
    print(f"\n{samples[0]}" if samples else "", f"report: {report}", sep="\n")
    return 0


def _define_reading(values: flags.FlagValues, argv: list[str]) -> None:
    del argv
    define_workdir(values)


def _doctor(values: flags.FlagValues) -> int:
    from batiste.train.diagnosis import write_diagnosis

    say_text(write_diagnosis(required(values, "workdir")))
    return 0


def _doctor_checkpoints(values: flags.FlagValues) -> int:
    from batiste.train.manifest import verify_all

    found = verify_all(required(values, "workdir"))
    for step, problem in found.items():
        print(f"step {step}: {problem or 'every file is what was written'}")
    return exit_codes.FAILED if any(found.values()) else exit_codes.DONE


def _define_report(values: flags.FlagValues, argv: list[str]) -> None:
    _define_reading(values, argv)
    flags.DEFINE_multi_string(
        "runs", [], "Work directories to compare; or all of them after `report`.",
        flag_values=values)


def _report(values: flags.FlagValues) -> int:
    from batiste.train.page import report

    runs = [*([values.workdir] if values.workdir is not None else []), *values.runs]
    text, page = report(*(runs or [required(values, "workdir")]))
    say_text(f"{text}\n\n{page}\n")
    return 0


def _define_supervise(values: flags.FlagValues, argv: list[str]) -> None:
    del argv
    flags.DEFINE_multi_string(
        "command", None, "The command to supervise, a word each; or all of it after --.",
        flag_values=values)
    flags.DEFINE_integer("retries", 5, "Starts in a row without a new committed step before giving "
                         "up.", 0, flag_values=values)
    flags.DEFINE_float("wait", 1.0, "Seconds before the first of them; doubled for each further.",
                       0.0, flag_values=values)
    flags.DEFINE_float("longest_wait", 300.0, "Seconds at most.", 0.0, flag_values=values)
    flags.DEFINE_float("grace", 120.0, "Seconds from SIGTERM to SIGKILL.", 0.0, flag_values=values)


def _supervise(values: flags.FlagValues) -> int:
    from batiste.supervise import Patience, Supervisor, flag_of

    command = values.command or []
    # Only what is needed here: whatever else is wrong with them, the command says.
    workdir = flag_of(command, "workdir")
    if command[:1] != ["train"] or not workdir:
        raise ValueError(f"got {' '.join(command) or 'no command'!r} to supervise: expected the "
                         "command after two dashes, as in batiste supervise -- train --workdir=DIR")
    patience = Patience(values.retries, values.wait, values.longest_wait, values.grace)
    supervisor = Supervisor(
        [sys.executable, "-m", "batiste", *command], pathlib.Path(workdir), patience)
    return supervisor.run(flag_of(command, "resume") or "auto")


def _define_plan(values: flags.FlagValues, argv: list[str]) -> None:
    define_config(values, argv)
    flags.DEFINE_string("topology", None, "TPUs, such as v5p:4x4x4.", flag_values=values)
    flags.DEFINE_string("gpu", None, "GPUs, such as h200:8.", flag_values=values)
    flags.DEFINE_bool(
        "cpu", False, "The CPU of this machine, measured for 12 seconds.", flag_values=values)
    flags.DEFINE_float(
        "tokens", None, "Token budget; the config's steps, if left out.", 1.0, flag_values=values)
    flags.DEFINE_float(
        "price_per_chip_hour", None, "For the cost of the budget.", 0.0, flag_values=values)
    flags.DEFINE_bool(
        "compile", False, "Compile the best plan for the TPUs and compare.", flag_values=values)
    flags.DEFINE_bool(
        "apply", False, "Print only the overrides of the best plan, to paste.", flag_values=values)


def _plan(values: flags.FlagValues) -> int:
    from batiste import forecast
    from batiste.planning import Budget, gpu_machine, tpu_machine

    experiment = given_experiment(values)
    places = [name for name in ("topology", "gpu", "cpu") if values[name].value]
    if len(places) != 1:
        raise ValueError(f"expected one of --topology, --gpu and --cpu, got {places or 'none'}")
    machine = None
    if not values.cpu:
        machine = tpu_machine(values.topology) if values.topology else gpu_machine(values.gpu)
    tokens, config = values.tokens, experiment.train
    if tokens is None:
        tokens = config.num_steps * config.batch_size * experiment.data.sequence_length
    budget = Budget(tokens, values.price_per_chip_hour)
    print(forecast.plan(experiment, machine, budget, values.compile, values.apply))
    return 0


def _define_evaluate(values: flags.FlagValues, argv: list[str]) -> None:
    del argv
    define_workdir(values)
    define_processes(values)
    define_trust(values)
    define_compilation_cache(values)


def _evaluate(values: flags.FlagValues) -> int:
    from batiste import main

    workdir = trust(values)
    prints = connect_processes(values)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # jax takes it, for training alone to ask about.
    result = main.evaluate(workdir)
    if prints:
        print_perplexity(result)
    return 0


def _define_generate(values: flags.FlagValues, argv: list[str]) -> None:
    _define_evaluate(values, argv)
    flags.DEFINE_multi_string("prompt", None, "Text to continue; may be repeated.", flag_values=values)
    flags.DEFINE_bool(
        "chat", False, "Answer each prompt, by the chat template that was imported.", flag_values=values)
    flags.DEFINE_float("temperature", None, "0 is greedy.", 0.0, flag_values=values)
    flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens.", 1, flag_values=values)
    flags.DEFINE_float("top_p", None, "Keep the likeliest tokens up to p.", flag_values=values)
    flags.DEFINE_integer("seed", None, "Another seed, another text.", flag_values=values)
    flags.DEFINE_integer("max_tokens", None, "Stop after so many.", 1, flag_values=values)


def _generate(values: flags.FlagValues) -> int:
    import dataclasses

    from batiste import main

    workdir = trust(values)
    config = main.load_experiment(workdir).sample
    given = {name: values[name].value for name in
             ("temperature", "top_k", "top_p", "seed", "max_tokens") if values[name].present}
    config = dataclasses.replace(config, **given)
    try:
        config.validate()
    except ValueError as error:
        raise ValueError(re.sub(r"^sample\.(\w+)=", r"--\1=", str(error))) from None
    prompts = values.prompt if values.prompt else list(config.prompts)
    say = say_text if connect_processes(values) else lambda text: None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # As for `evaluate`.
    if len(prompts) == 1:
        say("" if values.chat else prompts[0])
        main.generate(workdir, prompts, config, lambda text: say(text[0]), values.chat)
        say("\n")
        return 0
    texts = main.generate(workdir, prompts, config, chat=values.chat)
    for prompt, text in zip(prompts, texts, strict=True):
        say(f"=== {prompt!r}\n{'' if values.chat else prompt}{text}\n")
    return 0


def say_text(text: str) -> None:
    """Prints text of a model or a file: into a file or a pipe as it is, on a terminal escaped."""
    from batiste.data.printable import printable

    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def print_perplexity(result) -> None:
    """One line; of a discriminator another one."""
    error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
    print(f"validation: loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
          f"{result.bits_per_byte:.4f}{error} bits per byte, {result.tokens:,} tokens")
    if result.detection is not None:
        loss, accuracy, trivial = result.detection
        print(f"discriminator: loss {loss:.4f} nats per token, accuracy {accuracy:.4f}, always "
              f"'original' {trivial:.4f}; the line before is of its generator")


VERBS = {
    "plan": Verb(
        "--config=FILE --topology=TPU", "memory, time and cost of every mesh, before a run",
        _define_plan, _plan),
    "prepare": Verb(
        "--config=FILE --workdir=DIR", "raw text to tokenized records", _define_prepare, _prepare),
    "train": Verb(
        "--config=FILE --workdir=DIR", "prepare, train, evaluate, sample; again: continue",
        _define_train, _train),
    "supervise": Verb("-- train --workdir=DIR ...", "start a run again until it is done",
                      _define_supervise, _supervise),
    "evaluate": Verb(
        "--workdir=DIR", "loss, perplexity, bits per byte", _define_evaluate, _evaluate),
    "report": Verb("DIR [DIR ...]", "how a run went, as a page; of several, beside each other",
                   _define_report, _report),
    "doctor": Verb("--workdir=DIR", "what went wrong, where, and what to try", _define_reading,
                   _doctor),
    "doctor checkpoints": Verb(
        "--workdir=DIR", "read every byte of every checkpoint", _define_reading,
        _doctor_checkpoints),
    "import": Verb("--from=DIR --workdir=DIR", "a model in Hugging Face's format to a work directory",
                   define_import, import_),
    "export": Verb("--workdir=DIR --to=DIR", "and back; --verify=DIR checks what was written",
                   define_export, export),
    "tune": Verb("--config=FILE --workdir=DIR", "train a task on an encoder, and measure it",
                 define_tune, tune),
    "embed": Verb("--workdir=DIR < LINES", "a unit vector of each line", define_embed, embed),
    "generate": Verb("--workdir=DIR --prompt=TEXT", "stream text", _define_generate, _generate),
}
