"""HF PEFT adapter -> adapter checkpoint.

python conversion/import_hf_adapter.py --hf-adapter DIR --adapter-ckpt-path OUT
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from conversion.command_line import add_debug, run_command
from megatron_lora.config.command_line import Parser


def parse_args(argv: Sequence[str] | None = None, prog: str | None = None) -> Namespace:
    installed = (prog or "").startswith("megatron-lora ")
    description = "Write an HF PEFT adapter as a checkpoint of this project." if installed else __doc__
    parser = Parser(prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--hf-adapter", required=True, help="folder of adapter_config.json and its weights")
    parser.add_argument("--adapter-ckpt-path", required=True, help="the folder to write; must not exist")
    parser.add_argument("--hf-model-name", help="base model: hub name or HF folder; default: the adapter's own")
    parser.add_argument("--base-ckpt", help="the base's HF folder")
    add_debug(parser)
    return parser.parse_args(argv)


def main(arguments: Namespace) -> None:
    # Brings torch, for which a mistake in the command line does not wait.
    from megatron_lora.conversion.export import import_hf_adapter

    print(
        import_hf_adapter(
            hf_adapter=arguments.hf_adapter,
            adapter_ckpt_path=arguments.adapter_ckpt_path,
            hf_model_name=arguments.hf_model_name,
            base_ckpt=arguments.base_ckpt,
        )
    )


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit status. prog: what it was called by."""
    return run_command(main, parse_args, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
