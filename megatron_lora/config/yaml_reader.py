"""YAML as recipes write it: `1e-5` is a number, a key given twice is a mistake, Jinja templates are left alone."""

import re
from typing import Any

import yaml

from megatron_lora.errors import UserError


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's floats and without silently dropped duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML. source: what to call it in a message. Raises UserError with the line where it is malformed."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{source}{where} is not YAML: {getattr(error, 'problem', None) or error}") from error


def protect_templates(value: Any) -> Any:
    """Escape `${` in Jinja templates, so that OmegaConf takes it for text."""
    return _map_text(value, lambda text: _escape(text) if _is_template(text) else text)


def protect_text(value: Any) -> Any:
    """Escape `${` in resolved text that is no template, so that reading it again gives the same."""
    return _map_text(value, lambda text: text if _is_template(text) else _escape(text))


def _map_text(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _is_template(text: str) -> bool:
    return "{%" in text or "{{" in text


def _escape(text: str) -> str:
    return re.sub(r"(\\*)\$\{", lambda match: match.group(1) * 2 + r"\${", text)
