"""How many of NeMo RL's recipes resolve here, and what keeps the others out.

    python -m tools.nemo_rl_recipes CLONE [--list]

CLONE: a checkout of github.com/NVIDIA-NeMo/RL. Counted are the SFT, DPO and GRPO recipes for text below
`examples/configs`; to resolve is to be read, with its defaults, into a checked recipe. Models and data are not looked
at.
"""

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_lora.config.loader import load_recipe
from megatron_lora.config.schema import ALGORITHMS
from megatron_lora.config.yaml_reader import read_yaml
from megatron_lora.errors import UserError

# Other modalities and other algorithms, by the words of the file's name and folders.
LEFT_OUT = frozenset("vlm audio avlm omni asr distillation xtoken rm reward gym ppo gdpo genrm".split())


@dataclass(frozen=True)
class Found:
    """refusal: why the recipe does not resolve, "" where it does. asynchronous: whether it is of asynchronous GRPO."""

    path: Path
    refusal: str
    asynchronous: bool


def recipes(clone: Path) -> Iterator[Path]:
    """The recipes that are counted."""
    root = clone / "examples" / "configs"
    if not root.is_dir():
        raise UserError(f"{clone} holds no examples/configs; give a checkout of NVIDIA-NeMo/RL")
    for path in sorted(root.rglob("*.yaml")):
        words = set(re.split(r"[^a-z]+", str(path.relative_to(root)).lower()))
        if not words & LEFT_OUT and algorithm_of(path) is not None:
            yield path


def algorithm_of(path: Path, depth: int = 0) -> str | None:
    """The section that a recipe or the first of its defaults has."""
    content = read_yaml(path.read_text(), str(path))
    if not isinstance(content, dict) or depth > 10:
        return None
    found = next((name for name in ALGORITHMS if content.get(name) is not None), None)
    defaults = content.get("defaults") or []
    for name in [defaults] if isinstance(defaults, str) else defaults:
        base = path.parent / name
        found = found or (algorithm_of(base, depth + 1) if base.is_file() else None)
    return found


def resolve(path: Path) -> Found:
    try:
        grpo = load_recipe(path).recipe.grpo
        return Found(path, "", grpo is not None and grpo.async_grpo.enabled)
    except UserError as error:
        return Found(path, str(error), False)


def reasons(refusal: str) -> set[str]:
    """The keys that a refusal names, for counting."""
    return set(re.findall(r"(?:unknown key )?\b([a-z_]+(?:\.[A-Za-z_0-9]+)+)(?==| is | has |;|:)", refusal)) or {
        refusal.splitlines()[0][:100]
    }


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--list", action="store_true", help="every recipe that does not resolve, and why")
    options = parser.parse_args(arguments)
    try:
        found = [resolve(path) for path in recipes(options.clone)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    refused = [entry for entry in found if entry.refusal]
    asynchronous = sum(entry.asynchronous for entry in found)
    print(f"{len(found) - len(refused)} of {len(found)} recipes resolve")
    print(f"{asynchronous} of them ask for asynchronous GRPO, for which policy.generation.servers.urls is to be added")
    for key, count in Counter(key for entry in refused for key in reasons(entry.refusal)).most_common(25):
        print(f"{count:5}  {key}")
    if options.list:
        for entry in refused:
            print(f"{entry.path.relative_to(options.clone)}: {entry.refusal}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
