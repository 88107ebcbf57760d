"""HF model -> Megatron checkpoint, which any layout loads.

python conversion/convert_hf_to_megatron.py --hf-model-name NAME --megatron-ckpt-path OUT
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from conversion.command_line import add_debug, run_command
from megatron_lora.config.command_line import Parser
from megatron_lora.conversion.whole_model import convert_hf_to_megatron


def parse_args(argv: Sequence[str] | None = None, prog: str | None = None) -> Namespace:
    parser = Parser(prog=prog, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model-name", required=True, help="hub name or HF folder")
    parser.add_argument("--megatron-ckpt-path", required=True, help="the folder to write; must not exist")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size meant for training: checked only")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages meant for training: checked only")
    add_debug(parser)
    return parser.parse_args(argv)


def main(arguments: Namespace) -> None:
    print(
        convert_hf_to_megatron(
            hf_model_name=arguments.hf_model_name,
            megatron_ckpt_path=arguments.megatron_ckpt_path,
            tp=arguments.tp,
            pp=arguments.pp,
        )
    )


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit status. prog: what it was called by."""
    return run_command(main, parse_args, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
