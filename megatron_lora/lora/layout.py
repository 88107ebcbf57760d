"""Where each adapter factor lives: blocks and segments of a fused linear, rows of B, and the slices of a TP rank.

Pure tables and tensor functions: no megatron, no torch.distributed. The convention is docs/architecture.md, "Adapters":
for y = W x + s B A x, `lora_A` is [R, in] and `lora_B` is [out, R], with B's rows in Megatron's TP=1 order.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe_json
from megatron_lora.lora.model_spec import HFPart, LinearSpec, ModelSpec
from megatron_lora.lora.model_tables import PATHS

Axis = Literal["rank", "in", "out"]
FactorKey = Literal["A", "B", "magnitude"]


@dataclass(frozen=True)
class Factor:
    """One kind of tensor that an adapter trains.

    key: what it is in the arithmetic. name: behind its linear's name in a checkpoint, and the parameter's in a module.
    axes: what each of its axes runs along; its shape, its rows of each HF linear and its place under tensor
    parallelism follow from that. peft_name: behind an HF linear's name in a PEFT file. lora_plus: whether LoRA+ raises
    its learning rate. dtype: its own, whatever the run's adapters are in; None for theirs.
    """

    key: FactorKey
    name: str
    axes: tuple[Axis, ...]
    peft_name: str
    lora_plus: bool = False
    dtype: torch.dtype | None = None


A = Factor("A", "lora_A", ("rank", "in"), "lora_A.weight")
B = Factor("B", "lora_B", ("out", "rank"), "lora_B.weight", lora_plus=True)
# Close to the norms of the base's rows: in 16 bits its updates would be lost.
MAGNITUDE = Factor("magnitude", "magnitude", ("out",), "lora_magnitude_vector", dtype=torch.float32)
FACTORS = {factor.key: factor for factor in (A, B, MAGNITUDE)}
# The table of factors of each adapter type, in the order in which a module holds them.
FACTORS_OF_TYPE: dict[str, tuple[Factor, ...]] = {"lora": (A, B), "dora": (A, B, MAGNITUDE)}

ADAPTER_FILE = "adapter.json"
ADAPTER_FORMAT = "megatron-lora-adapter"
ADAPTER_VERSION = 1


def segments_of(kind: str, shapes: ModelSpec) -> tuple[str, ...]:
    """The HF linears that a fused linear covers, in HF order."""
    return shapes.linear(kind).segments


def features(kind: str, shapes: ModelSpec) -> tuple[int, int]:
    """(in features, out features) of a whole fused linear (TP=1, no vocabulary padding)."""
    linear = shapes.linear(kind)
    return linear.in_features, linear.out_features


def segment_rows(kind: str, shapes: ModelSpec, segment: str) -> Tensor:
    """[rows] int64: the rows of B (global order) that belong to one HF linear, in that linear's own row order."""
    return rows_of_part(shapes.linear(kind), segment)


def rows_of_part(linear: LinearSpec, segment: str) -> Tensor:
    """`segment_rows` of a linear, or of the part of one that a rank holds."""
    grid = torch.arange(linear.out_features).view(linear.groups, -1)
    start = 0
    for part in linear.parts:
        stop = start + part.rows // linear.groups
        if part.segment == segment:
            return _in_hf_order(part, grid[:, start:stop])
        start = stop
    raise KeyError(segment)


def _in_hf_order(part: HFPart, rows: Tensor) -> Tensor:
    """The rows of a part, given group by group [groups, rows of a group], one after the other as HF has them."""
    groups = rows.shape[0]
    if part.gated:
        return rows.view(groups, 2, -1, part.gated).transpose(1, 2).reshape(-1)
    if part.blocks:
        return torch.cat([block.reshape(-1) for block in rows.split([size // groups for size in part.blocks], 1)])
    return rows.reshape(-1)


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of A that serve some segments of one linear, with one scale.

    alpha and use_rslora are what `scale` came from: alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, eq. 5).
    """

    segments: tuple[str, ...]
    start: int
    stop: int
    scale: float
    alpha: float
    use_rslora: bool = False

    @classmethod
    def build(cls, segments: Sequence[str], start: int, rank: int, alpha: float, use_rslora: bool = False) -> "Block":
        """A block of `rank` rows from `start`. Raises UserError for a rank below 1 or an alpha of 0."""
        if rank < 1:
            raise UserError(f"an adapter's rank must be at least 1, got {rank}; set dim (r) to 1 or more")
        if alpha == 0 or not math.isfinite(alpha):
            raise UserError(f"an adapter's alpha must be finite and not 0, got {alpha}: it adds nothing to the base")
        scale = alpha / (math.sqrt(rank) if use_rslora else rank)
        return cls(tuple(segments), start, start + rank, scale, float(alpha), use_rslora)

    @property
    def rank(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ModuleLayout:
    """One adapted linear. name: its full Megatron name with the global layer number, e.g.
    `decoder.layers.3.self_attention.linear_qkv`, or `output_layer`; of one expert with its number in the layer behind
    it, `decoder.layers.3.mlp.experts.linear_fc1.7`, and without where all experts of the layer share it."""

    name: str
    kind: str
    blocks: tuple[Block, ...]

    @property
    def rank(self) -> int:
        """R: rows of A, columns of B."""
        return self.blocks[-1].stop

    @property
    def layer(self) -> int | None:
        """The global layer number; None for the output layer."""
        return None if self.kind == "output_layer" else int(self.name.split(".")[2])

    @property
    def expert(self) -> int | None:
        """The number of the expert in its layer; None where it is no expert's, or of all experts of the layer."""
        return expert_of(self.name)

    def experts(self, shapes: ModelSpec) -> tuple[int | None, ...]:
        """The experts whose linear it adapts, several where they share it; None alone where it is no expert's."""
        return shapes.linear(self.kind).expert_numbers if self.expert is None else (self.expert,)

    def in_features(self, shapes: ModelSpec) -> int:
        return features(self.kind, shapes)[0]

    def out_features(self, shapes: ModelSpec) -> int:
        return features(self.kind, shapes)[1]

    def scales(self) -> Tensor:
        """[R] fp32: the scale of each rank row of A."""
        return torch.cat([torch.full((block.rank,), block.scale, dtype=torch.float32) for block in self.blocks])

    @property
    def scale(self) -> float | None:
        """The scale of all blocks, None where they differ."""
        scales = {block.scale for block in self.blocks}
        return scales.pop() if len(scales) == 1 else None

    def factor_shape(self, factor: Factor, shapes: ModelSpec) -> tuple[int, ...]:
        """The shape of the whole factor (TP=1, no vocabulary padding)."""
        sizes = {"rank": self.rank, "in": self.in_features(shapes), "out": self.out_features(shapes)}
        return tuple(sizes[axis] for axis in factor.axes)

    def num_trained(self, factor: Factor, shapes: ModelSpec) -> int:
        """Entries of one factor that train: all, but for output rows (of a block's ranks) that no block serves."""
        mask = self.b_mask(shapes) if "out" in factor.axes else None
        if mask is None:
            return math.prod(self.factor_shape(factor, shapes))
        return int(mask.sum()) if "rank" in factor.axes else int(mask.any(1).sum())

    def b_mask(self, shapes: ModelSpec) -> Tensor | None:
        """[out, R] bool: the entries of B that may be non-zero; None where all may."""
        names = set(segments_of(self.kind, shapes))
        if all(set(block.segments) == names for block in self.blocks):
            return None
        mask = torch.zeros(self.out_features(shapes), self.rank, dtype=torch.bool)
        for block in self.blocks:
            for segment in block.segments:
                mask[segment_rows(self.kind, shapes, segment), block.start : block.stop] = True
        return mask


def module_name(kind: str, layer: int | None, expert: int | None = None) -> str:
    """The full Megatron name of a linear; layer is None for the output layer, expert of one expert's."""
    name = kind if layer is None else f"decoder.layers.{layer}.{PATHS[kind]}"
    return name if expert is None else f"{name}.{expert}"


def expert_of(name: str) -> int | None:
    """The number of the expert in a linear's full Megatron name, if it has one."""
    number = name.rpartition(".")[2]
    return int(number) if number.isdigit() else None


def without_expert(name: str) -> str:
    """A linear's full Megatron name without the number of the expert, if it has one."""
    linear, _, number = name.rpartition(".")
    return linear if number.isdigit() else name


def build_layout(
    name: str, rank: int, alpha: float, shapes: ModelSpec, segments: Sequence[str] | None = None
) -> ModuleLayout:
    """The layout of a new adapter on the linear `name`: one block, A shared among its segments (None: all of them)."""
    layer = name.split(".")[2] if name.startswith("decoder.layers.") else None
    in_any_layer = without_expert(name if layer is None else name.replace(f".{layer}.", ".*.", 1))
    kind = next((linear.kind for linear in shapes.linears if linear.name == in_any_layer), None)
    if kind is None:
        kinds = ", ".join(linear.kind for linear in shapes.linears)
        raise UserError(f"{name} is not a linear that can carry an adapter; their names end in {kinds}")
    covered = [name for name in segments_of(kind, shapes) if segments is None or name in segments]
    block = Block.build(covered, 0, rank, alpha)
    return ModuleLayout(name=name, kind=kind, blocks=(block,))


@dataclass
class AdapterSpec:
    """All that an exporter needs besides the tensors; `adapter.json` beside the distributed checkpoint.

    settings: the run's adapter settings (dim, alpha, dropout, ...), kept for the reader and for `lora_dropout`.
    base_fingerprint: `conversion.fingerprint.fingerprint_base` of the base's HF folder; None where unknown.
    saved: modules that train whole (peft's `modules_to_save`), as HF tensor name -> shape; each lies under that name
    among the adapter's tensors.
    residual: the factors are added to what `principal.residual_reader` leaves of the base (PiSSA), not to the base.
    """

    base_model_name: str
    shapes: ModelSpec
    modules: list[ModuleLayout]
    base_fingerprint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    type: str = "lora"
    residual: bool = False
    saved: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors that each module has."""
        return FACTORS_OF_TYPE[self.type]

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """`<module>.<factor>` -> its full shape, in the order of `modules`; then what is `saved`."""
        factors = {
            f"{module.name}.{factor.name}": module.factor_shape(factor, self.shapes)
            for module in self.modules
            for factor in self.factors
        }
        return factors | self.saved

    def num_parameters(self, module: ModuleLayout) -> int:
        """Entries of a module's factors that train."""
        return sum(module.num_trained(factor, self.shapes) for factor in self.factors)

    @property
    def num_trainable(self) -> int:
        """Parameters that train, each counted once."""
        return sum(map(self.num_parameters, self.modules)) + sum(map(math.prod, self.saved.values()))

    def of_module(self, module: ModuleLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A module's own factors, by factor name, from those of the whole adapter."""
        return {factor.name: tensors[f"{module.name}.{factor.name}"] for factor in self.factors}

    def to_json(self) -> dict[str, Any]:
        return {"format": ADAPTER_FORMAT, "version": ADAPTER_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str = ADAPTER_FILE) -> "AdapterSpec":
        """Raises UserError naming `source` for another format, version or adapter type, or a field that is missing."""
        if not isinstance(content, Mapping) or content.get("format") != ADAPTER_FORMAT:
            raise UserError(f"{source} does not describe a Megatron-LoRA adapter (no format={ADAPTER_FORMAT!r} in it)")
        if content.get("version") != ADAPTER_VERSION:
            raise UserError(
                f"{source} has version {content.get('version')!r}, this release reads version {ADAPTER_VERSION}; "
                "use the release that wrote it"
            )
        if content.get("type") not in FACTORS_OF_TYPE:
            raise UserError(
                f"{source} holds an adapter of type {content.get('type')!r}; supported: {', '.join(FACTORS_OF_TYPE)}"
            )
        try:
            modules = [
                ModuleLayout(
                    module["name"],
                    module["kind"],
                    tuple(Block(**{**block, "segments": tuple(block["segments"])}) for block in module["blocks"]),
                )
                for module in content["modules"]
            ]
            shapes = describe_json(content["shapes"])
            for module in modules:
                known = shapes.linear(module.kind).segments
                if any(segment not in known for block in module.blocks for segment in block.segments):
                    raise KeyError(module.name)
            return cls(
                base_model_name=content["base_model_name"],
                shapes=shapes,
                modules=modules,
                base_fingerprint=content["base_fingerprint"],
                settings=dict(content["settings"]),
                type=content["type"],
                residual=bool(content.get("residual", False)),
                saved={name: tuple(shape) for name, shape in content.get("saved", {}).items()},
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{source} is damaged: {type(error).__name__}: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write the spec as JSON to the file `path`, whole or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path | str) -> "AdapterSpec":
        """Read what `save` wrote. Raises UserError where the file is missing, no JSON, or of another version."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path} does not exist; is this a checkpoint of an adapter, written completely?")
        try:
            content = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not readable JSON ({error}); the checkpoint is damaged") from error
        return cls.from_json(content, str(path))
