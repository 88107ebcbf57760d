"""Where compiled kernels are kept, so that the next run does not compile them again."""

import os
from pathlib import Path


def keep_compiled_kernels() -> None:
    """TorchInductor's own place is under /tmp, which a new container or a reboot empties; vLLM and Triton keep theirs
    in the user's home already. A place that the user has set stays, and so does a home that cannot be written to."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = root / "megatron-lora" / "torchinductor"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place))
