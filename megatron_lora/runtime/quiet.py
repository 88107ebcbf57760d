"""Keep the libraries' chatter out of a run's terminal: warnings and errors stay, known noise goes."""

import logging
import multiprocessing
import warnings

NOISY_LOGGERS = ("megatron", "nemo", "transformers", "torch.distributed", "torch.utils.cpp_extension", "peft")
NOISE = (
    r".*\.grad attribute of a Tensor that is not a leaf.*",
    r".*Apex is not installed.*",
    r".*torch_dtype.*is deprecated.*",
    r".*MCore's async save is deprecated.*",
    r".*GPTModel IS DEPRECATED.*",
    r".*transformer_engine.*not installed.*",
    r".*TypedStorage is deprecated.*",
    r".*_get_pg_default_device.*",
    r".*`torch.jit.script` is deprecated.*",
)


def quiet_libraries(is_main: bool) -> None:
    """Called once at start. Ranks other than the first say only what is an error."""
    level = logging.WARNING if is_main else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    if not is_main:
        warnings.filterwarnings("ignore")


def end_children() -> None:
    """Megatron's checkpoint writers keep helper processes alive; without this they outlive the run and hold its
    output open."""
    for child in multiprocessing.active_children():
        child.terminate()
        child.join(timeout=5)
