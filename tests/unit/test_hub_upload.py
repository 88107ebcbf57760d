"""--push-to-hub against a hub of this test's own: what is sent, where to, and what is refused before any work."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conversion.command_line import deliver, upload_of
from conversion.convert_lora_to_hf import parse_args
from megatron_lora.errors import UserError


class Hub(ThreadingHTTPServer):
    """The hub's answers to huggingface_hub. repositories: name -> whether it is private. files: what was committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_right":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/whoami-v2":
            self._answer(200, {"name": "me", "type": "user", "auth": {}})
        else:
            name = self.path.removeprefix("/api/models/").split("?")[0]
            if name in self.server.repositories:
                self._answer(200, {"id": name, "private": self.server.repositories[name], "siblings": []})
            else:
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self._body()
        if self.server.refuses:
            self._answer(403, {"error": "no right to write"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.server.repositories.setdefault(name, asked.get("visibility") == "private")
            self._answer(200, {"url": f"{self.server.address}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = [
                {"path": entry["path"], "uploadMode": "regular", "shouldIgnore": False}
                for entry in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid, name = "a" * 40, self.path.removeprefix("/api/models/").split("/commit/")[0]
            url = f"{self.server.address}/{name}/commit/{oid}"
            self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the terminal is pytest's."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield server
        server.shutdown()


def arguments(*more: str) -> Any:
    return parse_args(["--adapter-ckpt", "step_1", "--hf-ckpt-path", "out", *more])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0\1\2")
    return tmp_path


@pytest.mark.parametrize(("more", "private"), [((), True), (("--public",), False)])
def test_every_file_goes_into_a_repository_that_is_private_unless_asked(
    more: tuple[str, ...], private: bool, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload = upload_of(arguments("--push-to-hub", "team/model", *more))
    assert hub.repositories == {} and hub.files == {}
    deliver(str(folder), upload)
    assert hub.repositories == {"team/model": private}
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert capsys.readouterr().out == f"{folder}\n{hub.address}/team/model\n"


def test_a_repository_that_exists_is_used(hub: Hub, folder: Path) -> None:
    hub.repositories["team/model"] = True
    deliver(str(folder), upload_of(arguments("--push-to-hub", "team/model")))
    assert len(hub.files) == 2
    hub.repositories["team/open"] = False
    with pytest.raises(UserError, match="exists and is public; say --public"):
        upload_of(arguments("--push-to-hub", "team/open"))


def test_what_cannot_be_uploaded_is_refused_before_the_export(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="wanted OWNER/NAME"):
        upload_of(arguments("--push-to-hub", "model"))
    with pytest.raises(UserError, match="--public is for --push-to-hub"):
        upload_of(arguments("--public"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="the hub refuses: "):
        upload_of(arguments("--push-to-hub", "team/model"))
    monkeypatch.setattr("megatron_lora.conversion.hub_upload.get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token .* set HF_TOKEN"):
        upload_of(arguments("--push-to-hub", "team/model"))
    assert upload_of(arguments()) is None


def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_go_on(hub: Hub, folder: Path) -> None:
    upload = upload_of(arguments("--push-to-hub", "team/model"))
    hub.refuses = True
    with pytest.raises(UserError, match=f"is written, but .* failed: .*hf upload team/model {folder}"):
        deliver(str(folder), upload)
