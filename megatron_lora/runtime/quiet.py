"""Keep the libraries' chatter out of a run's terminal: warnings and errors stay, known noise goes."""

import logging
import multiprocessing
import os
import warnings

NOISE = (
    r".*\.grad attribute of a Tensor that is not a leaf.*",
    r".*is deprecated.*",
    r".*torch.distributed is disabled, unavailable or uninitialized.*",
    r".*The argument order of load has been changed.*",
    r".*invalid escape sequence.*",  # a first import compiles its modules
)


def quiet_libraries(is_main: bool) -> None:
    """Called once at start. Ranks other than the first say only what is an error."""
    level = logging.WARNING if is_main else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("megatron", "torch.distributed", "torch.utils.cpp_extension", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    if not is_main:
        warnings.filterwarnings("ignore")


def end_children() -> None:
    """Megatron's checkpoint writers keep helper processes alive; without this they outlive the run and hold its
    output open."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join(timeout=5)
