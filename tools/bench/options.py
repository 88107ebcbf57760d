"""Options that several of the benchmark's command lines have."""

import argparse
from pathlib import Path

import torch

from megatron_lora.errors import UserError


def build_parser(tool: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m tool`, which shows the module's docstring as it is, with --device."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {tool}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser


def add_step_size(parser: argparse.ArgumentParser) -> None:
    """What a training step is made of."""
    parser.add_argument("--rows", type=int, help="sequences of a step; default: the shape's")
    parser.add_argument("--length", type=int, help="tokens of a sequence; default: the shape's")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters")


def check_out(out: Path) -> None:
    """Raises UserError where what is to be written exists."""
    if out.exists():
        raise UserError(f"{out} exists; name another --out")


def check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no GPU; use --device cpu and a tiny shape to try the tool out")
