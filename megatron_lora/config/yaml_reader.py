"""YAML as recipes write it: `1e-5` is a number, `010` ten, a key given twice a mistake. Jinja templates stay."""

import re
from typing import Any

import yaml

from megatron_lora.config.show import show
from megatron_lora.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars and without silently dropped duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # none of SafeLoader's: those below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        node.value = [self._with_space(node, *item) for item in node.value]
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if key is None or isinstance(key, bool):
                problem = f"the key {show(key)} is no text; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)

    def _with_space(self, mapping: yaml.MappingNode, key: yaml.Node, value: yaml.Node) -> tuple[yaml.Node, yaml.Node]:
        """`{kind:exact}`, which YAML takes for the key `kind:exact` without a value, means `{kind: exact}`."""
        if not (mapping.flow_style and isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)):
            return key, value
        if key.style is not None or value.style is not None or value.value != "" or ":" not in key.value:
            return key, value
        name, text = key.value.split(":", 1)
        return yaml.ScalarNode("tag:yaml.org,2002:str", name), yaml.compose(text, Loader=_RecipeLoader) or value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """YAML 1.2: `010` is ten, `0o10` eight."""
        text = self.construct_scalar(node).replace("_", "").lower()
        digits = text.lstrip("+-")
        base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2], 10)
        number = int(digits if base == 10 else digits[2:], base)
        return -number if text.startswith("-") else number


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _RecipeLoader.construct_yaml_int)
# Without YAML 1.1's sexagesimal numbers (1:30), octal ones (010) and dates, all of which are text or decimal here.
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)", list("yYnNtTfFoO")),
    ("int", r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", "<<", ["<"]),
):
    _RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML. source: what to call it in a message. Raises UserError with the line where it is malformed."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if problem == "but found another document":
            raise UserError(f"{source}{where} begins a second document (---); keep one of them") from error
        line = text.splitlines()[mark.line] if mark is not None and mark.line < len(text.splitlines()) else ""
        problem = _in_plain_words(str(problem), str(getattr(error, "context", "")), line)
        raise UserError(f"{source}{where} is not YAML: {problem}") from error


def _in_plain_words(problem: str, context: str, line: str) -> str:
    """What PyYAML says of a line, with the mend where it is a known trap."""
    alias = re.search(r"undefined alias '([^']+)'", problem)
    if alias is not None:
        return (
            f"no &{alias[1]} stands above *{alias[1]} in this file (anchors do not reach over defaults: write "
            "${section.key} there); a text that begins with * stands in quotes: '*_proj'"
        )
    if context == "while scanning an alias":
        return "a text that begins with * stands in quotes: '*_proj'"
    if "'\\t' that cannot start any token" in problem:
        return f"{problem}; indent with spaces, not with a tab"
    if "${" in line and problem.endswith("but got '{'"):
        return "${...} between { and } stands in quotes: {key: '${section.key}'}"
    if problem == "mapping values are not allowed here":
        return f"{problem}: mend the indentation, or put a text that holds ': ' in quotes"
    return problem


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
