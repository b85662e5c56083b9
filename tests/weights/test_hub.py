"""The hub route against a hub of our own: an HTTP server that answers as the real one does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import init_params
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.tokenizer.files import load_tokenizer
from gpt2jax.weights import hub
from gpt2jax.weights.hf import load_hf, save_hf

TINY = GPT2Config(vocab_size=300, n_positions=16, n_embd=24, n_layer=2, n_head=2)
HEAD, OLD = "a" * 40, "b" * 40
REPO = "someone/tiny-gpt2"


class Hub(ThreadingHTTPServer):
    """Serves {revision: {file: bytes}} of one repository and notes which files were asked for."""

    def __init__(self, revisions: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions = revisions
        self.fetched: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        api = f"/api/models/{REPO}"
        if path.startswith("/api/models/someone/gated"):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path == api or path.startswith(f"{api}/"):
            return self.answer_about(path.removeprefix(api).strip("/"))
        _, owner, name, kind, revision, *file = path.split("/") if path.count("/") >= 5 else [""] * 6
        files = self.server.revisions.get(self.sha(revision), {})
        if f"{owner}/{name}" != REPO or kind != "resolve" or "/".join(file) not in files:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        content = files["/".join(file)]
        if self.command == "GET":
            self.server.fetched.append("/".join(file))
        etag = hashlib.sha256(content).hexdigest()
        self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.sha(revision)})

    def answer_about(self, rest: str) -> None:
        revision = rest.split("/")[1] if "/" in rest else "main"
        files = self.server.revisions.get(self.sha(revision))
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if rest.startswith("tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        about = {"id": REPO, "sha": self.sha(revision), "siblings": [{"rfilename": name} for name in files]}
        self.answer(200, json.dumps(about).encode())

    @staticmethod
    def sha(revision: str) -> str:
        return {"main": HEAD, "v1": OLD}.get(revision, revision)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    save_hf(folder / "new", TINY, init_params(TINY, seed=0), Tokenizer.gpt2(300))
    save_hf(folder / "old", TINY, init_params(TINY, seed=1))
    others = {"pytorch_model.bin": b"x" * 1000, "tf_model.h5": b"x" * 1000, "README.md": b"a model"}
    server = Hub({HEAD: {**files_of(folder / "new"), **others}, OLD: files_of(folder / "old")})
    yield server
    server.shutdown()
    server.server_close()


def download(cache: Path, endpoint: str, hub_id: str = REPO, revision: str | None = None, **environment: str):
    """Runs `download` in another process, since the client reads its settings when it is imported."""
    script = (
        "import runpy, sys\ndownload = runpy.run_path(sys.argv[1])['download']\n"
        "try:\n    print(download(sys.argv[2], revision=sys.argv[3] or None))\n"
        "except Exception as error:\n    print(f'{type(error).__name__}: {error}')\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, hub.__file__, hub_id, revision or ""],
        env={**clean, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def embedding(folder: str) -> np.ndarray:
    return np.asarray(load_hf(folder)[1]["wte"]["embedding"])


@pytest.mark.slow
def test_download_fetches_once_then_works_offline(server, tmp_path):
    server.fetched.clear()
    folder = download(tmp_path, server.url)
    np.testing.assert_array_equal(embedding(folder), init_params(TINY, 0)["wte"]["embedding"])
    assert set(server.fetched) == {
        name for name in server.revisions[HEAD] if "model" not in name or "safe" in name
    } - {"README.md"}
    assert load_tokenizer(folder).vocab_size == 300
    server.fetched.clear()
    assert download(tmp_path, server.url) == folder
    assert download(tmp_path, server.url, HF_HUB_OFFLINE="1") == folder
    assert download(tmp_path, "http://127.0.0.1:9") == folder  # nobody answers there
    assert not server.fetched


@pytest.mark.slow
def test_download_revisions(server, tmp_path):
    folder = download(tmp_path, server.url, revision="v1")
    np.testing.assert_array_equal(embedding(folder), init_params(TINY, 1)["wte"]["embedding"])
    assert OLD in folder
    assert download(tmp_path, server.url, revision=OLD, HF_HUB_OFFLINE="1") == folder
    assert download(tmp_path, server.url, revision="v1", HF_HUB_OFFLINE="1") == folder
    answer = download(tmp_path, server.url, revision="v9")
    assert answer.startswith("ValueError") and "'v9'" in answer and "branch" in answer


@pytest.mark.slow
def test_download_errors_say_what_to_do(server, tmp_path):
    answer = download(tmp_path, server.url, "someone/absent")
    assert answer.startswith("ValueError: there is no model someone/absent")
    answer = download(tmp_path, server.url, "someone/gated")
    assert answer.startswith("PermissionError: someone/gated is gated") and "log in" in answer
    answer = download(tmp_path, server.url, HF_HUB_OFFLINE="1")
    assert answer.startswith(f"ConnectionError: {REPO} is not in the cache") and "go online" in answer
    answer = download(tmp_path, "http://127.0.0.1:9")
    assert answer.startswith(f"ConnectionError: {REPO} is not in the cache")
    answer = download(tmp_path, server.url, "someone/-bad-..name")
    assert answer.startswith("ValueError") and "someone/-bad-..name" in answer


def test_needed_files_of_a_repository():
    config = ["config.json", "vocab.json"]
    every = ["model.safetensors", "pytorch_model.bin", *config, "onnx/model.onnx", "README.md"]
    assert hub.needed_files(every, REPO) == ["model.safetensors", *config]
    assert hub.needed_files(every[1:], REPO) == ["pytorch_model.bin", *config]
    index = "model.safetensors.index.json"
    sharded = [index, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", *every[1:]]
    assert hub.needed_files(sharded, REPO) == [index, "model-*-of-*.safetensors", *config]
    preset = ["model.weights.h5", "config.json", "assets/tokenizer/merges.txt", "task.json"]
    assert hub.needed_files(preset, REPO) == preset[:3]
    with pytest.raises(ValueError, match=f"{REPO}.*no weights.*model.safetensors"):
        hub.needed_files(["config.json", "model.onnx"], REPO)
