"""What is said of trackers that log in, by what this machine has."""

from pathlib import Path

import pytest

from megatron_lora.config.schema_run import LoggerConfig
from megatron_lora.reporting.logins import login_notices


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without logins, an environment without keys."""
    names = ["NETRC", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "SWANLAB_SAVE_DIR"]
    names += [f"{tracker}_{name}" for tracker in ("WANDB", "SWANLAB") for name in ("MODE", "API_KEY")]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def said() -> list[str]:
    return [
        notice.partition("_")[0] for notice in login_notices(LoggerConfig(wandb_enabled=True, swanlab_enabled=True))
    ]


def test_what_is_missing_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said() == ["logger.wandb", "logger.swanlab"] and login_notices(LoggerConfig()) == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert said() == ["logger.swanlab"]
    monkeypatch.setenv("SWANLAB_API_KEY", "key")
    assert said() == []


def test_files_of_their_clients_count(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (home / ".swanlab").mkdir()
    (home / ".swanlab" / ".netrc").write_text("machine api.swanlab.cn login user password key\n")
    assert said() == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert said() == ["logger.wandb"]
