"""Policies of both backends in many layouts: the processes of a backend and world size are started once for all tests
that run."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import Case, case_rows
from tests.support.four_bit import save_dequantized, save_four_bit
from tests.support.launch import RanksFailed, run_module
from tests.support.models import save_model
from tests.support.reference import (
    DELTA_TARGETS,
    EXPERTS,
    LATENT_TARGETS,
    MAMBA_TARGETS,
    TARGETS,
    Training,
    save_adapter,
    train,
)
from tools.smollm2 import cached_model

ADAPTERS: dict[str, dict[str, Any]] = {
    "shared": {},
    "own": {"share_a": False},
    "query_value": {"targets": ["q_proj", "v_proj"], "share_a": False},
    "attention": {"targets": TARGETS[:4]},
    "experts": {"targets": TARGETS[:4], "parameters": EXPERTS},
    "router": {"targets": TARGETS[:4], "parameters": ["mlp.gate.weight"]},
    "router_experts": {"targets": TARGETS[:4], "parameters": [*EXPERTS, "mlp.gate.weight"]},
    "shared_experts": {"targets": TARGETS[:4], "parameters": EXPERTS, "share_experts": True},
    "latent": {"targets": LATENT_TARGETS},
    "delta": {"targets": DELTA_TARGETS},
    # peft takes names of an MLP for parameters of the experts.
    "delta_attention": {"targets": [*TARGETS[:4], *DELTA_TARGETS[len(TARGETS) :]]},
    "delta_experts": {"targets": [*TARGETS[:4], *DELTA_TARGETS[len(TARGETS) :]], "parameters": EXPERTS},
    "mamba": {"targets": MAMBA_TARGETS},
    "mamba_experts": {"targets": MAMBA_TARGETS, "parameters": ["mixer.experts.up_proj", "mixer.experts.down_proj"]},
    "dora": {"use_dora": True},
    "dora_own": {"use_dora": True, "share_a": False},
    "dora_query_value_head": {"use_dora": True, "targets": ["q_proj", "v_proj", "lm_head"], "share_a": False},
    "saved": {"share_a": False, "modules_to_save": ["embed_tokens", "input_layernorm", "model.norm", "lm_head"]},
    "head": {"targets": [*TARGETS, "lm_head"]},
    # Of a trained model: its text stays text.
    "small": {"std": 0.01},
    "unlike": {
        "targets": ["q_proj", "v_proj", "down_proj"],
        "share_a": False,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "layers_to_transform": [1, 3],
    },
}


# A family's name with this at its end: its linears in bitsandbytes' 4-bit form.
STORED = "_nf4"


class Room:
    """Bases and adapters as Hugging Face folders, written when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def base(self, family: str) -> Path:
        if family == "smollm2":
            return cached_model()
        path = self.folder / family
        if path.is_dir():
            return path
        if family.endswith(STORED):
            return save_four_bit(self.base(family.removesuffix(STORED)), path, double=True)
        return save_model(path, family)

    def trained_base(self, case: Case) -> Path:
        """The base as the case's run computes with it: in 4 bits, it is another."""
        if case.peft.get("quantization") is None:
            return self.base(case.family)
        double = bool(case.peft.get("double_quantization"))
        path = self.folder / f"{case.family}_dequantized_{double}"
        return path if path.is_dir() else save_dequantized(self.base(case.family), path, double=double)

    def adapter(self, family: str, name: str) -> Path:
        path = self.folder / f"{family}_{name}"
        return path if path.is_dir() else save_adapter(self.base(family), path, **ADAPTERS[name])


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(tmp_path_factory.mktemp("bases"))


# Backend and number of ranks.
Group = tuple[str, int]


def _group(case: Case) -> Group:
    return case.backend, case.ranks


class Workers:
    """Runs every collected case of a backend and world size at once, and keeps what each rank found."""

    def __init__(self, items: list[pytest.Item], room: Room, folder: Path):
        self.room = room
        self.folder = folder
        self.failures: dict[Group, str] = {}
        self.cases: dict[Group, dict[str, Case]] = {}
        for item in items:
            parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()  # type: ignore[attr-defined]
            for value in parameters:
                while isinstance(value, Case):
                    known = self.cases.setdefault(_group(value), {}).setdefault(value.name, value)
                    assert known == value, f"two different cases are called {value.name}"
                    value = value.needs

    def found(self, case: Case) -> list[dict[str, Any]]:
        """What each rank found. Raises RanksFailed where the processes ended before."""
        group = _group(case)
        if group not in self.failures:
            for other in self.cases[group].values():
                if other.needs is not None and _group(other.needs) != group:
                    self.found(other.needs)
            self._run(group)
        paths = [self.folder / f"{case.name}.{rank}.pt" for rank in range(case.ranks)]
        if not all(path.is_file() for path in paths):
            raise RanksFailed(f"no result for {case.name}: {self.failures[group]}")
        return [torch.load(path, weights_only=False) for path in paths]

    def _run(self, group: Group) -> None:
        backend, ranks = group
        request = self.folder / f"{backend}_{ranks}.json"
        cases = self.cases[group].values()
        request.write_text(json.dumps({case.name: self._filled(case) for case in cases}))
        try:
            self.failures[group] = ""
            run_module("tests.distributed.worker", request, self.folder, str(ranks))
        except RanksFailed as failure:
            self.failures[group] = str(failure)

    def _filled(self, case: Case) -> dict[str, Any]:
        own = None if case.adapter in (None, "drawn") else str(self.room.adapter(case.family, str(case.adapter)))
        return asdict(case) | {
            "backend": case.backend,
            "base_folder": str(self.room.base(case.family)),
            "adapter_folder": own,
            "learning_rate": case.learning_rate,
            "adam_eps": case.adam_eps,
        }


@pytest.fixture(scope="session")
def workers(request: pytest.FixtureRequest, room: Room, tmp_path_factory: pytest.TempPathFactory) -> Workers:
    return Workers(request.session.items, room, tmp_path_factory.mktemp("found"))


@pytest.fixture
def ranks_found(case: Case, workers: Workers) -> list[dict[str, Any]]:
    """What each rank found in the case of this test."""
    return workers.found(case)


@pytest.fixture
def found(ranks_found: list[dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 found in the case of this test."""
    return ranks_found[0]


@pytest.fixture(scope="session")
def reference(room: Room) -> Callable[..., Training]:
    """Ten steps of transformers + peft with the base and adapter of a case; the same case is trained once."""
    known: dict[str, Training] = {}

    def trained(case: Case, num_steps: int = 10, **options: Any) -> Training:
        asked = case.options if case.family == "smollm2" else {}
        base = room.trained_base(case)
        # What peft starts itself has values of its own.
        fresh = case.options.get("fresh")
        key = repr((base.name, case.adapter, asked, fresh, num_steps, options))
        if key not in known:
            starts = case.adapter is not None and fresh is None
            adapter = room.adapter(case.family, str(case.adapter)) if starts else None
            share_a = ADAPTERS.get(str(case.adapter), {"share_a": False}).get("share_a", True)
            torch.set_num_threads(1)
            share_experts = ADAPTERS.get(str(case.adapter), {}).get("share_experts", False)
            own = {"lr": case.learning_rate, "eps": case.adam_eps, "share_a": share_a, "share_experts": share_experts}
            known[key] = train(
                base, adapter, case_rows(case.family, asked)[:num_steps], **own | {"fresh": fresh} | options
            )
        return known[key]

    return trained
