"""Whether this machine has a login for W&B and SwanLab, as their clients look for it; whether it is valid, only their
servers know."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

from megatron_lora.config.schema_run import LoggerConfig

_WITHOUT_LOGIN = ("offline", "local", "disabled", "dryrun")


def login_notices(logger: LoggerConfig) -> list[str]:
    """One for each tracker that logs in and would find nothing to do so with."""
    found = {"wandb": _wandb_has_login, "swanlab": _swanlab_has_login}
    return [
        f"logger.{name}_enabled=true, and this machine has no login for it: before the first step the run will end, "
        f"unless `{name} login` or {name.upper()}_API_KEY gives one, or {name.upper()}_MODE=offline is set"
        for name, has_login in found.items()
        if getattr(logger, f"{name}_enabled")
        and os.environ.get(f"{name.upper()}_MODE") not in _WITHOUT_LOGIN
        and not os.environ.get(f"{name.upper()}_API_KEY")
        and not has_login()
    ]


def _wandb_has_login() -> bool:
    """A line of netrc for its server, or a token of an identity provider."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    home = Path.home()
    paths = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [home / ".netrc", home / "_netrc"]
    for path in paths:
        try:
            if netrc.netrc(path).authenticators(host or "") is not None:
                return True
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError):
            return True  # W&B reads it its own way
    return False


def _swanlab_has_login() -> bool:
    folder = os.environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab"
    return (Path(folder) / ".netrc").is_file()
