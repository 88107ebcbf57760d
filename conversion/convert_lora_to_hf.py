"""Adapter checkpoint -> HF PEFT adapter or merged HF model.

    python conversion/convert_lora_to_hf.py --mode adapter --adapter-ckpt STEP_DIR --hf-ckpt-path OUT

`adapter` needs no base model; `merged` streams the base. NeMo RL's flags work: without --mode and --adapter-only the
result is merged.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from conversion.command_line import add_debug, add_push, deliver, run_command, upload_of
from megatron_lora.config.command_line import Parser
from megatron_lora.config.schema_adapters import DTYPES
from megatron_lora.errors import UserError

# `megatron-lora export` and `merge` say by their names what is written.
MODES = {"export": "adapter", "merge": "merged"}
DESCRIPTIONS = {
    "adapter": "Write a checkpoint's adapter as an HF PEFT folder; the base model is not needed.",
    "merged": "Write a checkpoint's base and adapter, merged, as an HF model; the base is streamed.",
}
EXPERT_LAYOUTS = ("each", "packed")  # those of `lora.peft_format.ExpertLayout`
# NeMo RL's Python entry points, which its users import from its file of this name.
ENTRY_POINTS = ("export_lora_adapter_to_hf", "merge_lora_to_hf")


def __getattr__(name: str) -> Any:
    """They bring torch, for which a mistake in the command line does not wait."""
    if name not in ENTRY_POINTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("megatron_lora.conversion.export"), name)


def parse_args(argv: Sequence[str] | None = None, prog: str | None = None) -> Namespace:
    default = MODES.get((prog or "").rpartition(" ")[2])
    description = DESCRIPTIONS[default] if default is not None else __doc__
    parser = Parser(prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode", choices=("merged", "adapter"), default=default, help=f"default: {default or 'merged'}"
    )
    parser.add_argument("--adapter-only", action="store_true", help="the same as --mode adapter")
    parser.add_argument("--adapter-ckpt", "--lora-ckpt", required=True, help="a run's step_N folder")
    parser.add_argument("--hf-ckpt-path", required=True, help="the folder to write; must not exist")
    parser.add_argument("--hf-model-name", help="base model: hub name or HF folder; default: the one trained on")
    parser.add_argument("--base-ckpt", help="the base: HF folder or Megatron checkpoint")
    parser.add_argument("--dtype", help=f"merged: dtype to write, of {', '.join(DTYPES)}; default: the base's")
    parser.add_argument(
        "--uniform-scale",
        action="store_true",
        help="adapter: one alpha / r for all linears, for engines without patterns",
    )
    parser.add_argument(
        "--expert-layout",
        choices=EXPERT_LAYOUTS,
        help="adapter: factors of experts as one pair for each tensor of all of them (`packed`, the default: peft's "
        "target_parameters), or a pair for `each` expert's linears",
    )
    parser.add_argument("--check-logits", action="store_true", help="compare a forward of both sides; loads the base")
    add_push(parser)
    add_debug(parser)
    return parser.parse_args(argv)


def main(arguments: Namespace) -> None:
    mode = arguments.mode or ("adapter" if arguments.adapter_only else "merged")
    if arguments.adapter_only and mode != "adapter":
        raise UserError("--adapter-only and --mode merged contradict each other; give one of them")
    common = {
        "adapter_ckpt": arguments.adapter_ckpt,
        "hf_ckpt_path": arguments.hf_ckpt_path,
        "hf_model_name": arguments.hf_model_name,
        "base_ckpt": arguments.base_ckpt,
        "check_logits": arguments.check_logits,
    }
    if mode == "adapter":
        if arguments.dtype is not None:
            raise UserError("--dtype is for --mode merged; an adapter is written in the dtype it was trained in")
        from megatron_lora.conversion.export import export_lora_adapter_to_hf

        upload = upload_of(arguments)
        layout = arguments.expert_layout or "packed"
        exported = export_lora_adapter_to_hf(**common, uniform_scale=arguments.uniform_scale, expert_layout=layout)
        deliver(exported, upload)
    else:
        if arguments.expert_layout is not None:
            raise UserError("--expert-layout is for --mode adapter; a merged model has no factors")
        if arguments.uniform_scale:
            raise UserError("--uniform-scale is for --mode adapter; a merged model has no scale")
        from megatron_lora.conversion.export import merge_lora_to_hf

        upload = upload_of(arguments)
        deliver(merge_lora_to_hf(**common, dtype=arguments.dtype), upload)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit status. prog: what it was called by."""
    return run_command(main, parse_args, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
