"""`batiste completion bash|zsh`: a script that completes verbs, flags and the fields of configs."""

from collections.abc import Mapping
from typing import Any

from absl import flags

SHELLS = ("bash", "zsh")
# After an equals sign and for words that are no flags the shell completes file names by itself.
SCRIPT = """{start}# Completion of `batiste` for {shell}: source it, or put
#     source <(batiste completion {shell})
# into the file that the shell reads when it starts.
_batiste() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
        return
    fi
    case "$word" in -*) ;; *) return ;; esac
    case "$verb" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -o nospace -F _batiste batiste
"""
ZSH_START = "autoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str, verbs: Mapping[str, Any]) -> str:
    """The script; verbs: name to `Verb`."""
    if shell not in SHELLS:
        raise ValueError(f"completion {shell!r}: expected one of {', '.join(SHELLS)}")
    names = sorted({name.split()[0] for name in verbs} | {"completion", "help"})
    cases = "\n".join(f"        {name}) words=\"{' '.join(_flags_of(name, each))}\" ;;"
                      for name, each in verbs.items() if " " not in name)
    return SCRIPT.format(
        start=ZSH_START if shell == "zsh" else "", shell=shell, verbs=" ".join(names), cases=cases)


def _flags_of(name: str, verb: Any) -> list[str]:
    """Every flag of a verb, with an equals sign where a value follows."""
    values = flags.FlagValues()
    verb.define(values, [name])
    words = [f"--{flag}" if values[flag].boolean else f"--{flag}=" for flag in values]
    if "config" in values:
        words += [f"--config.{field}=" for field in _fields(name)]
    return sorted(words)


def _fields(name: str) -> list[str]:
    """The fields of the config that a verb takes."""
    from batiste.configs.experiment import Experiment, flatten

    if name != "tune":
        return list(flatten(Experiment()))
    from batiste.tasks import TaskConfig

    return list(flatten(TaskConfig()))
