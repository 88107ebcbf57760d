"""The same training in transformers + peft: what every layout is measured against."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, TopKLogitsWarper, TopPLogitsWarper

from megatron_lora.data.batch import Row
from tests.support.forced_experts import forced_experts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# transformers' tensors of all experts of a layer.
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# With latent attention and shared experts; a model has q_proj or q_a_proj and q_b_proj.
LATENT_TARGETS = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", *TARGETS[3:]]
# With linear attention; a model has two of these projections (Qwen3-Next) or four (Qwen3.5).
DELTA_TARGETS = [*TARGETS, "out_proj", "in_proj_qkvz", "in_proj_ba"]
DELTA_TARGETS += ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]
# With Mamba: of its experts the shared one alone.
MAMBA_TARGETS = [*TARGETS, "in_proj"]
SHARED_A = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
RANK, ALPHA = 4, 8


@dataclass
class Training:
    """losses and gradient norms before each update, and the adapter (PEFT names) at the end."""

    losses: list[float]
    grad_norms: list[float]
    adapter: dict[str, torch.Tensor]


def save_adapter(
    model_folder: Path,
    folder: Path,
    seed: int = 1,
    targets: list[str] | None = None,
    share_a: bool = True,
    std: float = 0.1,
    parameters: list[str] | None = None,
    share_experts: bool = False,
    **settings: Any,
) -> Path:
    """An HF PEFT adapter, B away from zero, and DoRA's magnitudes from the norms. share_a: q, k, v have one A and gate,
    up another; else each its own. std: of the factors' entries. parameters: peft's `target_parameters`. share_experts:
    experts of a layer have the same factors. settings: more of peft's; modules_to_save are not as in the base."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=_within_language(base, targets or TARGETS),
        task_type="CAUSAL_LM",
        target_parameters=parameters,
        **settings,
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or ".modules_to_save." in name:
                parameter.mul_(1 + torch.randn_like(parameter) * 0.1)
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * std)
    if share_a:
        tie_shared_factors(model)
    if share_experts:
        tie_experts(model)
        untie_experts(model)
    model.save_pretrained(folder)
    return folder


def _within_language(model: Any, targets: list[str]) -> list[str] | str:
    """A vision tower has linears of the same names."""
    seeing = hasattr(model.config, "vision_config")
    return rf"(.*language_model\..*\.)?({'|'.join(targets)})" if seeing else targets


class _ForEach(torch.nn.Module):
    """One factor as that of all experts, each in its place in peft's tensor."""

    def __init__(self, experts: int, by_column: bool):
        super().__init__()
        self.experts, self.by_column = experts, by_column

    def forward(self, one: torch.Tensor) -> torch.Tensor:
        return one.repeat_interleave(self.experts, 1) if self.by_column else one.repeat(self.experts, 1)


def _expert_factors(model: torch.nn.Module) -> list[tuple[Any, int, bool]]:
    """(the linear that holds it, number of experts, whether it is B) of each factor on experts."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    return [
        (holder["default"], wrapper.num_experts, is_b)
        for wrapper in wrappers
        for holder, is_b in ((wrapper.lora_A, False), (wrapper.lora_B, True))
    ]


def tie_experts(model: torch.nn.Module) -> None:
    """All experts of a layer train the first one's factors."""
    for holder, count, is_b in _expert_factors(model):
        whole = holder.weight.detach()
        holder.weight = torch.nn.Parameter((whole[:, ::count] if is_b else whole[: len(whole) // count]).clone())
        parametrize.register_parametrization(holder, "weight", _ForEach(count, is_b), unsafe=True)


def untie_experts(model: torch.nn.Module) -> None:
    """Each expert holds a copy of what it trained."""
    for holder, _, _ in _expert_factors(model):
        parametrize.remove_parametrizations(holder, "weight")


def tie_shared_factors(model: torch.nn.Module) -> None:
    """One Parameter object as A of the linears that a fused adapter covers."""
    for module in model.modules():
        for names in SHARED_A:
            present = [getattr(module, name) for name in names if hasattr(getattr(module, name, None), "lora_A")]
            for linear in present[1:]:
                linear.lora_A["default"].weight = present[0].lora_A["default"].weight


def make_rows(num_rows: int, vocab_size: int, seed: int = 3, longest: int = 30) -> list[Row]:
    """Random rows of different lengths; the first third of each carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        length = int(torch.randint(8, longest, (1,), generator=generator))
        ids = torch.randint(3, vocab_size, (length,), generator=generator)
        mask = torch.arange(length) >= max(1, length // 3)
        rows.append(Row(input_ids=ids, target_mask=mask, index=index))
    return rows


def token_logps(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """[S - 1] log-probabilities of a row's tokens from the second on."""
    logits = model(row.input_ids[None]).logits[0, :-1].float()
    return F.log_softmax(logits, -1).gather(1, row.input_ids[1:, None]).squeeze(1)


def sum_of_target_logps(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    """The log-probabilities of all rows' target tokens, summed, in one batch: padding on the right of a causal model
    is seen by nothing. Tokens go to the experts that the rows name."""
    ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    mask = pad_sequence([row.target_mask for row in rows], batch_first=True)
    with forced_experts(model, rows):
        logits = model(ids).logits
    logps = F.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * mask[:, 1:]).sum()


def balancing_loss(model: Any, rows: list[Row]) -> torch.Tensor:
    """Load balancing (Fedus et al. 2021, eq. 4) of each row alone, summed over layers, the mean over tokens."""
    chosen, total = model.config.num_experts_per_tok, sum(len(row) for row in rows)
    loss = torch.zeros(())
    for row in rows:
        for logits in model(row.input_ids[None], output_router_logits=True).router_logits:
            scores = logits.softmax(-1)
            counts = torch.zeros_like(scores).scatter(1, scores.topk(chosen).indices, 1.0).sum(0)
            loss = loss + len(row) / total * logits.shape[1] * (counts / counts.sum() * scores.mean(0)).sum()
    return loss


def train(
    model_folder: Path,
    adapter_folder: Path | None,
    steps: list[list[Row]],
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    max_norm: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.98),
    share_a: bool = True,
    lora_plus_ratio: float = 1.0,
    eps: float = 1e-8,
    fresh: dict[str, Any] | None = None,
    share_experts: bool = False,
    balancing: float = 0.0,
) -> Training:
    """AdamW over the steps' rows, mean over target tokens; full fine-tuning without an adapter folder.

    share_a: q, k, v train one A and gate, up another, as a fused adapter does; else each its own, as peft does.
    lora_plus_ratio: B's learning rate over lr. fresh: settings of peft for an adapter that it starts itself.
    balancing: coefficient of the routers' auxiliary loss.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    if fresh is not None:
        settings: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**settings | fresh))
        started = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}
    if adapter_folder is not None:
        model = PeftModel.from_pretrained(model, adapter_folder, is_trainable=True)
        if share_a:
            tie_shared_factors(model)
        if share_experts:
            tie_experts(model)
    # There is no dropout; in evaluation bitsandbytes' linears take bfloat16 products on some CPUs.
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    faster = {parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    # Megatron decays matrices only.
    groups = [
        {"params": [p for p in parameters if p.dim() > 1 and p not in faster], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p in faster], "weight_decay": weight_decay, "lr": lr * lora_plus_ratio},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    losses, norms = [], []
    for rows in steps:
        optimizer.zero_grad()
        count = sum(row.num_targets for row in rows)
        loss = -sum_of_target_logps(model, rows) / count
        if balancing:
            loss = loss + balancing * balancing_loss(model, rows)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
        optimizer.step()
    if fresh is not None:
        return Training(losses, norms, _changes(model, started))
    wanted = ("lora_", ".modules_to_save.") if adapter_folder is not None else ("",)
    if share_experts:
        untie_experts(model)
    # Files hold a tied head once, and a shared A under the name of each of its linears.
    named = model.named_parameters(remove_duplicate=adapter_folder is None)
    state = {stored_name(name): value.detach().clone() for name, value in named if any(w in name for w in wanted)}
    return Training(losses, norms, state)


def _changes(model: Any, started: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By linear, what training has added to s B A, and the trained copies of whole modules under their own names."""
    changes = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            now, before = (
                source[f"{name}.lora_B.default.weight"] @ source[f"{name}.lora_A.default.weight"]
                for source in (dict(model.named_parameters()), started)
            )
            changes[name] = (module.scaling["default"] * (now - before)).detach()
    saved = {
        name.replace(".modules_to_save.default.", "."): value.detach().clone()
        for name, value in model.named_parameters()
        if ".modules_to_save." in name
    }
    return changes | saved


def changes_of(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same of an exported adapter (without patterns)."""
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    end = ".lora_A.weight"
    names = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    changes = {name: scale * (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}{end}"]) for name in names}
    return changes | {name: value for name, value in tensors.items() if ".lora_" not in name}


def cut_logits(logits: torch.Tensor, targets: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """logits [S, vocabulary] after transformers' top-k and then its top-p, but a target [S] is never cut."""
    cut: Any = logits.clone()
    for warper in (TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        cut = warper(torch.empty(0, dtype=torch.int64), cut)  # type: ignore[arg-type]
    return cut.scatter(1, targets[:, None], logits.gather(1, targets[:, None]))


def of_targets(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[S] log-probabilities of targets [S] under logits [S, vocabulary]."""
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)


def stored_name(name: str) -> str:
    """A parameter's name in a PEFT file."""
    return (
        name.replace(".modules_to_save.default", "")
        .replace(".default", "")
        .replace("magnitude_vector.weight", "magnitude_vector")
    )
