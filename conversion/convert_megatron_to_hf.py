"""Megatron checkpoint of a whole model -> HF model.

python conversion/convert_megatron_to_hf.py --megatron-ckpt-path DIR --hf-ckpt-path OUT
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from conversion.command_line import add_debug, add_push, deliver, run_command, upload_of
from megatron_lora.config.command_line import Parser
from megatron_lora.conversion.whole_model import convert_megatron_to_hf


def parse_args(argv: Sequence[str] | None = None, prog: str | None = None) -> Namespace:
    parser = Parser(prog=prog, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megatron-ckpt-path",
        required=True,
        help="what convert_hf_to_megatron.py wrote, or a run's step_N folder of full fine-tuning",
    )
    parser.add_argument("--hf-ckpt-path", required=True, help="the folder to write; must not exist")
    parser.add_argument("--hf-model-name", help="config and tokenizer; default: beside the weights, or the run's model")
    add_push(parser)
    add_debug(parser)
    return parser.parse_args(argv)


def main(arguments: Namespace) -> None:
    upload = upload_of(arguments)
    folder = convert_megatron_to_hf(
        megatron_ckpt_path=arguments.megatron_ckpt_path,
        hf_ckpt_path=arguments.hf_ckpt_path,
        hf_model_name=arguments.hf_model_name,
    )
    deliver(folder, upload)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit status. prog: what it was called by."""
    return run_command(main, parse_args, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
