"""vLLM's CPU worker with a name of its own for the shared memory of its tensor-parallel group, and one that reports the
experts of its tokens."""

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.v1.worker.cpu_worker import CPUWorker

from megatron_lora.rollout.vllm_engine import SHM_IDENTIFIER


class ReportingCPUWorker(CPUWorker):
    """Reports the experts of its tokens where it is asked to."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        if self.model_config.enable_return_routed_experts:
            _record_experts(self.model_runner.get_model())


class RolloutCPUWorker(ReportingCPUWorker):
    """vLLM names the shared memory after what follows the last colon of the init method. Under `external_launcher`
    that is the same for every engine on the machine, so two of them would write into each other's, and a killed run's
    leftover would break the next. The process group exists already, so the address itself is not used."""

    def init_device(self) -> None:
        self.distributed_init_method = f"env://:{os.environ[SHM_IDENTIFIER]}"
        super().init_device()


def _record_experts(model: Any) -> None:
    """vLLM records what its routers choose, and on a CPU the product of the experts chooses for itself: what it is
    about to choose is recorded before it."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    for module in model.modules():
        if isinstance(module, MoERunner):
            router: Any = module.router
            experts: Any = module.routed_experts
            experts.forward_monolithic = _recording(experts, router.capture_fn)


def _recording(experts: Any, record: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts

    compute = experts.forward_monolithic

    def forward(x: Tensor, router_logits: Tensor, **others: Any) -> Tensor:
        _, chosen = select_experts(
            hidden_states=x,
            router_logits=router_logits,
            top_k=experts.top_k,
            use_grouped_topk=experts.use_grouped_topk,
            renormalize=experts.renormalize,
            topk_group=experts.topk_group,
            num_expert_group=experts.num_expert_group,
            custom_routing_function=experts.custom_routing_function,
            scoring_func=experts.scoring_func,
            routed_scaling_factor=experts.routed_scaling_factor,
            e_score_correction_bias=experts.e_score_correction_bias,
        )
        record(chosen)
        return compute(x=x, router_logits=router_logits, **others)

    return forward
