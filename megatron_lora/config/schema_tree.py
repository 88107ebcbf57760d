"""Walking the schema: which keys a section has, and which section a dotted path leads to."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from megatron_lora.config.schema_base import Section


def section_of(annotation: Any) -> type[Section] | None:
    """The section inside a field's type (`S`, `S | None`, `list[S]`), or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in get_args(annotation):
        found = section_of(argument)
        if found is not None:
            return found
    return None


def is_list_of_sections(annotation: Any) -> bool:
    """Whether a field holds a list of sections (possibly null)."""
    if getattr(annotation, "__origin__", None) is list:
        return section_of(annotation) is not None
    return any(is_list_of_sections(argument) for argument in get_args(annotation))


def walk_fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted path, field) of every key below `section`, sections themselves included; list items are not entered."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field
        child = section_of(field.annotation)
        if child is not None and not is_list_of_sections(field.annotation):
            yield from walk_fields(child, f"{path}.")


def section_at(root: type[Section], path: tuple[str | int, ...]) -> type[Section] | None:
    """The section at `path` (list indices allowed), or None where the path leaves the schema."""
    section: type[Section] | None = root
    for part in path:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return None
        section = section_of(section.model_fields[part].annotation)
    return section
