"""Write `megatron_lora/lora/families.json`: megatron-bridge's own mapping of every decoder that transformers knows too.

    python -m tools.bridge_families            # writes the file
    python -m tools.bridge_families --check    # exit status 1 where the file is not what bridge says

Reading the file takes neither bridge nor Megatron-Core, so an export needs neither.
"""

import argparse
import json
import sys
from types import SimpleNamespace
from typing import Any

from megatron_lora.lora.families import FAMILIES_FILE
from megatron_lora.runtime.cpu import install_cpu_stand_ins
from megatron_lora.runtime.transformer_engine import import_bridge


def bridge_families() -> dict[str, dict[str, Any]]:
    """HF model_type -> its class in transformers, bridge's class for it, and [mapping, Megatron name, HF name or names]
    of each kind of parameter. Where a registry cannot be had from a default config, `failed` says why."""
    install_cpu_stand_ins()
    import_bridge()
    from megatron.bridge.models.conversion import model_bridge
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    classes = {causal_lm.__name__: config for config, causal_lm in known.items()}
    result: dict[str, dict[str, Any]] = {}
    for source, build in model_bridge.get_model_bridge._exact_types.items():  # type: ignore[attr-defined]
        architecture = source if isinstance(source, str) else source.__name__
        if architecture not in classes:
            continue
        config = classes[architecture]
        bridge = build(None)
        entry: dict[str, Any] = {"architecture": architecture, "bridge": type(bridge).__name__}
        try:
            entry["parameters"] = _parameters(bridge, config())
        except Exception as error:  # any bridge's own code
            entry["failed"] = f"{type(error).__name__}: {error}"
        result[config.model_type] = entry
    return dict(sorted(result.items()))


def _parameters(bridge: Any, config: Any) -> list[list[Any]]:
    # What megatron-bridge sets before it asks for a registry.
    bridge.hf_config, bridge.hf_pretrained = config, SimpleNamespace(config=config)
    mappings = bridge.mapping_registry().mappings
    return [[type(mapping).__name__, mapping.megatron_param, mapping.hf_param] for mapping in mappings]


def as_text(families: dict[str, dict[str, Any]]) -> str:
    """JSON with one parameter a line."""
    blocks = []
    for name, entry in families.items():
        fields = [f"  {json.dumps(key)}: {json.dumps(entry[key])}" for key in entry if key != "parameters"]
        if "parameters" in entry:
            rows = ",\n".join(f"   {json.dumps(row)}" for row in entry["parameters"])
            fields.append(f'  "parameters": [\n{rows}\n  ]')
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(fields) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    text = as_text(bridge_families())
    if not arguments.check:
        FAMILIES_FILE.write_text(text)
        return 0
    if FAMILIES_FILE.read_text() == text:
        return 0
    print(f"{FAMILIES_FILE} is not what the installed megatron-bridge says; run python -m tools.bridge_families")
    return 1


if __name__ == "__main__":
    sys.exit(main())
