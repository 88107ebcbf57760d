"""Shell completion: commands, recipes' flags, and every key of the schema with its choices."""

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_tree import section_of, walk_fields
from megatron_lora.errors import UserError

_RUN = ("--help", "--print-config", "--dry-run", "--debug")
_UPLOAD = ("--push-to-hub", "--public", "--debug")
_EXPORT = (
    *("--help", "--mode", "--adapter-only", "--adapter-ckpt", "--lora-ckpt", "--hf-ckpt-path", "--hf-model-name"),
    *("--base-ckpt", "--dtype", "--uniform-scale", "--expert-layout", "--check-logits", *_UPLOAD),
)
# Written down, and not asked of the commands' parsers: importing the tools takes seconds.
FLAGS = {
    "train": (*_RUN, "--nproc", "--nnodes", "--node-rank", "--master-addr", "--master-port"),
    "serve": (*_RUN, "--host", "--port"),
    "show": ("--help", "--rows", "--json"),
    "export": _EXPORT,
    "merge": _EXPORT,
    "import": ("--help", "--hf-adapter", "--adapter-ckpt-path", "--hf-model-name", "--base-ckpt", "--debug"),
}
_TAKE_KEYS = ("train", "serve", "show")
_BASH = """_megatron_lora() {
    local line="${COMP_LINE:0:COMP_POINT}"
    local current="${line##* }"
    local IFS=$'\\n'
    COMPREPLY=($(megatron-lora __complete "$current" "${COMP_WORDS[1]}" "$COMP_CWORD"))
    # bash replaces what follows the last = or : of the word alone.
    local head="${current%"${current##*[=:]}"}"
    COMPREPLY=("${COMPREPLY[@]#"$head"}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
}
complete -o default -F _megatron_lora megatron-lora"""
_ZSH = """(( $+functions[compdef] )) || { autoload -U compinit && compinit }
_megatron_lora() {
    local -a found
    found=("${(@f)$(megatron-lora __complete "${words[CURRENT]}" "${words[2]}" $((CURRENT - 1)))}")
    found=(${found:#})
    (( $#found )) || { _files; return }
    compadd -S '' -- ${(M)found:#*[=.]}
    compadd -- ${found:#*[=.]}
}
compdef _megatron_lora megatron-lora"""
_FISH = """function __megatron_lora
    set -l before (commandline -opc)
    megatron-lora __complete (commandline -ct) "$before[2]" (count $before)
end
complete -c megatron-lora -a '(__megatron_lora)'"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_USAGE = f"""usage: megatron-lora completion [{"|".join(_SCRIPTS)}]

Print the completion script of a shell, by default of $SHELL. bash and zsh: eval "$(megatron-lora completion bash)";
fish: megatron-lora completion fish | source"""


def script(arguments: Sequence[str]) -> str:
    """The script for a shell. Raises UserError for another one."""
    if {"-h", "--help"} & set(arguments):
        return _USAGE
    shell = arguments[0] if arguments else os.path.basename(os.environ.get("SHELL", "bash"))
    if shell not in _SCRIPTS:
        raise UserError(f"there is no completion for {shell}; the shells are {', '.join(_SCRIPTS)}")
    return _SCRIPTS[shell]


def complete(words: Sequence[str], commands: Sequence[str]) -> list[str]:
    """What may stand in place of a word. words: the word so far, the command, the word's number on the line."""
    current, command, number = (*words, "", "", "1")[:3]
    if number == "1":
        return [name for name in commands if name.startswith(current)]
    if command == "completion":
        return [shell for shell in _SCRIPTS if shell.startswith(current)]
    if current.startswith("-"):
        return [flag for flag in FLAGS.get(command, ()) if flag.startswith(current)]
    if command not in _TAKE_KEYS:
        return []
    key, equals, value = current.partition("=")
    fields = dict(walk_fields(Recipe))
    if equals:
        choices = _choices(fields[key].annotation) if key in fields else []
        return [f"{key}={choice}" for choice in choices if choice.startswith(value)]
    # One level at a time: `policy.` before the hundred keys below it.
    return sorted({_next_level(path, key, field.annotation) for path, field in fields.items() if path.startswith(key)})


def _next_level(path: str, typed: str, annotation: Any) -> str:
    end = path.find(".", len(typed))
    if end >= 0:
        return path[: end + 1]
    return f"{path}." if section_of(annotation) is not None else f"{path}="


def _choices(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if annotation is type(None):
        return ["null"]
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]
