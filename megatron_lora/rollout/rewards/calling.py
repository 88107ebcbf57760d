"""A user's function as a reward: its arguments by their names, one answer or a whole batch a call, plain or `async`."""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards.functions import Reward
from megatron_lora.rollout.user_code import hint

# (prompt, completion, answer, extra) of one sample.
Arguments = tuple[str, str, str, dict]

SAMPLE_NAMES = ("prompt", "completion", "answer", "extra")
BATCH_NAMES = ("prompts", "completions")
# verl's names of the same, where no column has them.
VERL_NAMES = {"solution_str": "completion", "ground_truth": "answer", "extra_info": "extra"}
LARGEST = 3.4e38  # of a 32-bit float, in which rewards are averaged
MAX_ERROR_CHARACTERS = 300


def to_number(value: Any) -> float | None:
    """A reward as a float; None abstains; of verl's results the "score". Raises TypeError or ValueError with what it is
    instead."""
    number: Any = value["score"] if isinstance(value, dict) and "score" in value else value
    return _one_number(number)


def _one_number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"a reward must be a number or None, got text {value[:40]!r}")
    if callable(getattr(value, "item", None)) and getattr(value, "size", None) is not None:
        try:
            value = value.item()  # numpy's and torch's numbers
        except (ValueError, RuntimeError) as error:
            raise TypeError(f"a reward must be one number or None, got a {type(value).__name__} of several") from error
    if not isinstance(value, int | float):
        if not hasattr(value, "__float__") or isinstance(value, complex):
            raise TypeError(f"a reward must be a number or None, got a {type(value).__name__}")
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a reward must be a finite number, got {value}")
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"a reward must fit a 32-bit float (3.4e38), got {str(value)[:40]}")
    return float(value)


class UserReward:
    """A user's function behind the call of a reward. Its parameters are filled by name.

    One answer a call: `prompt`, `completion`, `answer`, `extra`, and any column of the data row (or `num_tokens`).
    A batch a call, where it takes `completions` or `prompts`, as TRL calls it: lists of all answers of a step, columns
    as lists too. `**kwargs` takes every column. kwargs: the recipe's, bound. timeout_seconds: of one call of an `async`
    function, of which all samples' run side by side.

    takes_batch: whether `score` should get all samples at once. Raises UserError where it could never be called.
    """

    def __init__(self, function: Callable[..., Any], path: str, kwargs: dict[str, Any], timeout_seconds: float):
        self.function, self.path, self.kwargs, self.timeout_seconds = function, path, kwargs, timeout_seconds
        self.parameters = _parameters(function, path)
        self.takes_rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self.parameters.values())
        self.named = {
            name: parameter
            for name, parameter in self.parameters.items()
            if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        }
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004
        )
        self.is_batch = any(name in self.named for name in BATCH_NAMES)
        self.takes_batch = self.is_batch or self.is_async
        self._check()

    def _check(self) -> None:
        if inspect.isclass(self.function):
            raise UserError(f"reward function {self.path!r} is a class; name a function, or an object of that class")
        if taken := sorted(set(self.kwargs) & {*SAMPLE_NAMES, *BATCH_NAMES}):
            raise UserError(f"reward function {self.path!r}: kwargs sets {taken}, which each call sets; take it out")
        unknown = sorted(set(self.kwargs) - set(self.named))
        if unknown and not self.takes_rest:
            raise UserError(
                f"reward function {self.path!r} takes no argument {unknown[0]!r}, which kwargs sets"
                f"{hint(unknown[0], self.named)}"
            )
        open_names = set(self.named) - set(self.kwargs)
        takes_anything = len(self.parameters) > len(self.named)
        if not takes_anything and not open_names:
            raise UserError(
                f"reward function {self.path!r} takes no arguments; wanted some of "
                f"{', '.join(self._own_names)} or a column's name"
            )

    @property
    def _own_names(self) -> tuple[str, ...]:
        return (*BATCH_NAMES, "answer", "extra") if self.is_batch else SAMPLE_NAMES

    def columns_needed(self) -> list[str]:
        """Parameters without default that only a column of the rows can fill."""
        given = {*self.kwargs, "num_tokens", *self._own_names, *({} if self.is_batch else VERL_NAMES)}
        return [n for n, p in self.named.items() if p.default is inspect.Parameter.empty and n not in given]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises UserError where a parameter is neither given nor a column that any row has."""
        known = sorted(set(columns))
        for name in self.columns_needed():
            if name not in known:
                own = self._own_names
                raise UserError(
                    f"reward function {self.path!r} takes the argument {name!r}, which is neither one of "
                    f"{', '.join(own)} nor a column of the rows ({', '.join(known) or 'they have no others'})"
                    f"{hint(name, [*own, *known])}; rename it, give it a default, or set it in kwargs"
                )

    def __call__(self, prompt: str, completion: str, answer: str, extra: dict) -> Any:
        """One sample's value, as the function returns it."""
        [value] = self.score([(prompt, completion, answer, extra)])
        if isinstance(value, Exception):
            raise value
        return value

    def score(self, samples: Sequence[Arguments]) -> list[Any]:
        """A value for each sample, or the exception that its own call ended with. Raises what a batch call raises."""
        if self.is_batch:
            found = self._call(self._batch_values(samples))
            return as_list(asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found, len(samples))
        if self.is_async:
            return asyncio.run(self._side_by_side(samples))
        return [self._plain(sample) for sample in samples]

    def _plain(self, sample: Arguments) -> Any:
        try:
            found = self._call(_sample_values(sample))
            return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found
        except Exception as error:
            return error

    async def _side_by_side(self, samples: Sequence[Arguments]) -> list[Any]:
        return await asyncio.gather(*(self._in_time(sample) for sample in samples))

    async def _in_time(self, sample: Arguments) -> Any:
        try:
            return await asyncio.wait_for(self._call(_sample_values(sample)), self.timeout_seconds)
        except TimeoutError:
            return TimeoutError(f"timed out after {self.timeout_seconds:g} seconds")
        except Exception as error:
            return error

    def _batch_values(self, samples: Sequence[Arguments]) -> dict[str, Any]:
        names = dict.fromkeys(name for sample in samples for name in sample[3])
        values: dict[str, Any] = {name: [sample[3].get(name) for sample in samples] for name in names}
        prompts, completions, answers = ([sample[place] for sample in samples] for place in range(3))
        extras = [sample[3] for sample in samples]
        return values | {"prompts": prompts, "completions": completions, "answer": answers, "extra": extras}

    def _call(self, values: dict[str, Any]) -> Any:
        """Call with what the parameters name of `values`; a column that this row lacks is None."""
        if not self.named and not self.takes_rest:  # *args alone
            return self.function(*(values[name] for name in SAMPLE_NAMES))
        if not self.named and len(self.parameters) > 1:  # (*args, **kwargs): a wrapper that hides what it wraps
            return self.function(**{name: values[name] for name in SAMPLE_NAMES}, **self.kwargs)
        positional, keywords = [], {}
        given = values | self.kwargs
        for name, parameter in self.named.items():
            if name in given:
                value = given[name]
            elif name in VERL_NAMES and not self.is_batch:
                value = given[VERL_NAMES[name]]
            elif parameter.default is not inspect.Parameter.empty:
                value = parameter.default
            else:
                value = [None] * len(values["completions"]) if self.is_batch else None
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                positional.append(value)
            else:
                keywords[name] = value
        if self.takes_rest:
            keywords = {name: value for name, value in given.items() if name not in self.named} | keywords
        return self.function(*positional, **keywords)


def score_samples(reward: Reward, samples: Sequence[Arguments]) -> list[tuple[float | None, str | None]]:
    """Each sample's (value, None), or (0, why it failed). A batch call that fails fails for all of them."""
    try:
        found = reward.score(samples) if isinstance(reward, UserReward) else [_plain(reward, s) for s in samples]
    except (Exception, SystemExit) as error:
        return [(0.0, describe(error))] * len(samples)
    return [_outcome(value) for value in found]


def describe(error: BaseException) -> str:
    """An exception as a few words for the log."""
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]


def _plain(reward: Reward, sample: Arguments) -> Any:
    try:
        return reward(*sample)
    except Exception as error:
        return error


def _outcome(value: Any) -> tuple[float | None, str | None]:
    try:
        if isinstance(value, Exception):
            raise value
        return to_number(value), None
    except Exception as error:
        return 0.0, describe(error)


def as_list(found: Any, count: int) -> list[Any]:
    """What a batch call returned as a list of `count` values. Raises TypeError or ValueError with what it is."""
    wanted = f"a batch reward must return a list of {count} numbers (None abstains), one for each completion"
    if found is None or isinstance(found, str | bytes | dict | set | frozenset):
        raise TypeError(f"{wanted}; got {'nothing' if found is None else 'a ' + type(found).__name__}")
    if callable(getattr(found, "tolist", None)):
        found = found.tolist()  # numpy's and torch's arrays
    try:
        values = list(found)
    except TypeError as error:
        raise TypeError(f"{wanted}; got a {type(found).__name__}") from error
    if len(values) != count:
        raise ValueError(f"{wanted}; got {len(values)}")
    return values


def _parameters(function: Callable[..., Any], path: str) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward function {path!r} does not tell its arguments; wrap it in a function of your own"
        ) from error


def _sample_values(sample: Arguments) -> dict[str, Any]:
    prompt, completion, answer, extra = sample
    return extra | {"prompt": prompt, "completion": completion, "answer": answer, "extra": extra}


async def _awaited(found: Any) -> Any:
    return await found if inspect.isawaitable(found) else found
