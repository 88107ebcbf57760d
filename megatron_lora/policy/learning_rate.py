"""Learning rate and weight decay by optimizer step, on both backends: `policy.megatron_cfg.scheduler`."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_lora.config.schema import PolicyConfig


def build_scheduler(optimizer: Any, policy: PolicyConfig, num_steps: int) -> OptimizerParamScheduler:
    """Learning rate and weight decay by optimizer step; decays end at `num_steps` where the recipe names no end."""
    options, optim = policy.megatron_cfg.scheduler, policy.megatron_cfg.optimizer
    decay = options.lr_decay_iters or max(num_steps, options.lr_warmup_iters + 1)
    start = optim.weight_decay if options.start_weight_decay is None else options.start_weight_decay
    end = optim.weight_decay if options.end_weight_decay is None else options.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=min(options.lr_warmup_init, optim.lr),  # without a warmup it is no mistake to have it above
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=options.lr_warmup_iters,
        lr_decay_steps=decay,
        lr_decay_style=options.lr_decay_style,
        start_wd=start,
        end_wd=end,
        wd_incr_steps=max(num_steps, 1),
        wd_incr_style=options.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
