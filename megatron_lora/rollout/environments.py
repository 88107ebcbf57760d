"""Environments: the user's code that answers what the model wrote, turn by turn.

An environment is a class. One object belongs to one answer:

    class Calculator:
        def reset(self, prompt, answer, extra): ...     # once, before the first `step`
        def step(self, text): ...                       # the text that follows what the model wrote; None: the end

It lives in a worker process (`worker_pool.py`) during a call and as a pickle between calls, so one that hangs or ends
its process costs its own answer alone.
"""

import base64
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.rollout.user_code import absolute_path, import_object
from megatron_lora.rollout.worker_pool import Call, WorkerPool

LARGEST_STATE = 1 << 24
# A token is hardly ever of more characters; what is beyond is not sent to the trainer.
CHARACTERS_A_TOKEN = 16
MAX_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class EnvironmentSpec:
    """`env.environment`: plain data that a worker process can be sent."""

    path: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    timeout_seconds: float = 10.0
    max_result_tokens: int = 256


@dataclass
class Played:
    """One answer's environment between two turns. start: the arguments of `reset`. state: pickled; None: not begun."""

    start: tuple[str, str, dict]
    state: str | None = None


@dataclass(frozen=True)
class Result:
    """What follows what the model wrote; None: the answer is complete. error: why there is nothing; "" otherwise."""

    text: str | None
    error: str = ""


class Environments:
    """Steps the environments of many answers. Raises UserError where `spec` names none that can be built."""

    def __init__(self, spec: EnvironmentSpec, num_workers: int):
        load_environment(spec)
        self.spec = replace(spec, path=absolute_path(spec.path))
        self.pool = WorkerPool(
            "megatron_lora.rollout.environments:build_stepper", self.spec, "an environment", num_workers
        )

    def step(self, played: Sequence[Played], texts: Sequence[str]) -> list[Result]:
        """What each of them answers to what its model wrote. One that fails has an error, and its answer ends."""
        calls = [
            Call((one.start, one.state, text), self.spec.timeout_seconds)
            for one, text in zip(played, texts, strict=True)
        ]
        results = []
        for one, reply in zip(played, self.pool(calls), strict=True):
            text, state, error = (None, None, reply.error) if reply.error else reply.value
            one.state = state
            results.append(Result(text, error))
        return results

    def close(self) -> None:
        self.pool.close()


def load_environment(spec: EnvironmentSpec) -> Callable[[], Any]:
    """Makes a new one a call. Raises UserError where the first cannot be made, or has no `reset` and `step`."""
    environment = import_object(spec.path, "environment class")
    missing = [name for name in ("reset", "step") if not callable(getattr(environment, name, None))]
    if missing or not isinstance(environment, type):
        raise UserError(
            f"environment class {spec.path!r} is no class with reset(prompt, answer, extra) and step(text)"
            f"{': it has no ' + ' and no '.join(missing) if missing else ''}; see docs/environments.md"
        )
    try:
        environment(**spec.kwargs)
    except Exception as error:
        raise UserError(
            f"environment class {spec.path!r} cannot be built with env.environment.kwargs={spec.kwargs}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return lambda: environment(**spec.kwargs)


def build_stepper(spec: EnvironmentSpec) -> Callable[[tuple[tuple[str, str, dict], str | None, str]], list[Any]]:
    """For a worker process: (arguments of `reset`, state, text) -> [text, state, error]."""
    new_environment = load_environment(spec)
    longest = spec.max_result_tokens * CHARACTERS_A_TOKEN

    def step(call: tuple[tuple[str, str, dict], str | None, str]) -> list[Any]:
        start, state, written = call
        try:
            if state is None:
                environment = new_environment()
                environment.reset(*start)
            else:
                environment = pickle.loads(base64.b64decode(state))
            text = environment.step(written)
            if text is None:
                return [None, None, ""]
            if not isinstance(text, str):
                raise TypeError(f"step must return text or None, got a {type(text).__name__}")
            kept = pickle.dumps(environment)
            if len(kept) > LARGEST_STATE:
                raise ValueError(f"it takes {len(kept)} bytes between two turns, at most {LARGEST_STATE} are kept")
            return [text[:longest], base64.b64encode(kept).decode(), ""]
        except Exception as error:
            return [None, None, f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]]

    return step
