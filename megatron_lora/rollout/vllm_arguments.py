"""What vLLM itself says of the arguments that its engine would be given, asked before any weight loads.

In a process of its own: importing vLLM and checking arguments write into the environment that the trainer keeps.
"""

import difflib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from megatron_lora.errors import UserError

KEY = "policy.generation.vllm_kwargs"
# What the child prints its answer after; libraries print too.
_ANSWER = "vLLM's answer: "


def check_arguments(arguments: Mapping[str, Any], given: Mapping[str, Any], positions: int | None) -> None:
    """Raise UserError for what vLLM would refuse at its start. given: the recipe's `vllm_kwargs`, a part of
    `arguments`. positions: `max_position_embeddings` of the model."""
    reason = _refusal(arguments)
    if reason is None:
        return
    if positions is not None and arguments["max_model_len"] > positions and "max_model_len" in reason:
        raise UserError(
            f"answers of up to {arguments['max_model_len']} tokens with their prompts "
            f"(policy.max_total_sequence_length) are longer than the model's {positions} positions "
            "(max_position_embeddings), which vLLM refuses; lower it, or stretch the model's positions with "
            "policy.hf_config_overrides"
        )
    raise UserError(f"{KEY}={dict(given)}: vLLM does not take it: {reason}")


def _refusal(arguments: Mapping[str, Any]) -> str | None:
    found = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps(dict(arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
        env=os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(arguments["tensor_parallel_size"])},
    )
    lines = [line for line in found.stdout.decode(errors="replace").splitlines() if line.startswith(_ANSWER)]
    # Without an answer vLLM does not start here at all, which its start says better than this process could.
    return json.loads(lines[-1].removeprefix(_ANSWER)) if lines else None


def _main() -> None:
    arguments = pickle.load(sys.stdin.buffer)
    print(_ANSWER + json.dumps(_asked(arguments)))


def _asked(arguments: dict[str, Any]) -> str | None:
    import dataclasses
    import inspect

    from pydantic import ValidationError
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in dataclasses.fields(EngineArgs)}
    known = names | set(inspect.signature(LLM.__init__).parameters)
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            return f"it has no argument {name!r}" + (f"; did you mean {near[0]}?" if near else "")
    try:
        EngineArgs(**{name: value for name, value in arguments.items() if name in names}).create_engine_config()
    except ValidationError as error:
        return "; ".join(".".join(map(str, part["loc"])) + f": {part['msg']}" for part in error.errors())
    except (TypeError, ValueError) as error:
        return str(error)
    return None


if __name__ == "__main__":
    _main()
