"""What every section of the recipe's schema is built from: the base class and the number types."""

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A section of a recipe. Attribute names are the recipe's keys; unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def _integral(value: Any) -> Any:
    """YAML reads `1e6` as a float; where an integer is wanted and the value is whole, that is what was meant."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number_from_text(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` (no dot) as text; where a number is wanted, that is what was meant."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def numbers_from_text(value: Any) -> Any:
    """`number_from_text` through the lists and dicts of free-form keyword arguments."""
    if isinstance(value, dict):
        return {key: numbers_from_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers_from_text(item) for item in value]
    return number_from_text(value)


# A path, or a name where one may stand in its place; `~` at its beginning is the home folder.
Place = Annotated[str, AfterValidator(os.path.expanduser)]
Int = Annotated[int, BeforeValidator(_integral)]
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
"""What NumPy, torch and vLLM all take."""
Float = Annotated[float, BeforeValidator(number_from_text)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
"""At least 0 and below 1."""
KeywordArguments = Annotated[dict[str, Any], BeforeValidator(numbers_from_text)]


def _environment(value: Any) -> Any:
    """Environment variables are text; YAML reads `1` and `true` as something else."""
    if not isinstance(value, dict):
        return {} if value is None else value
    plain = str | int | float
    return {str(key): str(item) if isinstance(item, plain) else item for key, item in value.items()}


Environment = Annotated[dict[str, str], BeforeValidator(_environment)]
Period = Annotated[int, BeforeValidator(lambda value: 0 if value == -1 else _integral(value)), Field(ge=0)]
"""Steps between events; 0 or NeMo RL's -1: never."""
