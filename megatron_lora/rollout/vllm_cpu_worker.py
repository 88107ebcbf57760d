"""vLLM's CPU worker with a name of its own for the shared memory of its tensor-parallel group."""

import os

from vllm.v1.worker.cpu_worker import CPUWorker

from megatron_lora.rollout.vllm_engine import SHM_IDENTIFIER


class RolloutCPUWorker(CPUWorker):
    """vLLM names the shared memory after what follows the last colon of the init method. Under `external_launcher`
    that is the same for every engine on the machine, so two of them would write into each other's, and a killed run's
    leftover would break the next. The process group exists already, so the address itself is not used."""

    def init_device(self) -> None:
        self.distributed_init_method = f"env://:{os.environ[SHM_IDENTIFIER]}"
        super().init_device()
