"""Models on the Hub: the real client against a server on this machine that answers as the Hub
does."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from effreason.lm.hf import hub
from effreason.runtime.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
OLD, NEW = "1" * 40, "2" * 40
SMALL = ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json")
SMALL_CONFIG = {"config.json": b'{"model_type": "llama"}'}


class Hub(http.server.ThreadingHTTPServer):
    """Repositories by name: branches, tags and commits, each with its files; the paths that were
    requested."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.requested, self.down = [], False
        sharded = {file.name: file.read_bytes() for file in (FIXTURES / "qwen2_untied").iterdir()}
        newer = SMALL_CONFIG | {"tokenizer.json": b"{}", "model.safetensors": b"new",
                                "pytorch_model.bin": b"pickle", "original/tokenizer.json": b"other"}
        older = SMALL_CONFIG | {"model.safetensors": b"old"}
        self.repositories = {
            "good/model": {"main": (NEW, newer), "v1": (OLD, older), NEW: (NEW, newer),
                           OLD: (OLD, older)},
            "good/sharded": {"main": (NEW, sharded), NEW: (NEW, sharded)},
            "gated/model": {"main": (NEW, newer), NEW: (NEW, newer)},
            "pickled/model": {"main": (NEW, SMALL_CONFIG | {"pytorch_model.bin": b"pickle"})},
            "empty/model": {"main": (NEW, {"README.md": b"soon"})},
            "bare/model": {"main": (NEW, {"model.safetensors": b"weights"})},
        }

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(http.server.BaseHTTPRequestHandler):
    """The three calls of a download: information, list of files, file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):  # noqa: N802
        self.do_GET()

    def do_GET(self):  # noqa: N802
        path = urlsplit(self.path).path.strip("/")
        self.server.requested.append(path)
        parts = path.removeprefix("api/models/").split("/")
        name, what = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision"
        revision = parts[3] if len(parts) > 3 else "main"
        versions = self.server.repositories.get(name)
        if self.server.down:
            return self.answer(503)
        if name == "portal/model":
            return self.answer(200, b"<html>Welcome to our network</html>")
        if name == "private/model" and "Authorization" in self.headers:
            return self.answer(403, X_Error_Message="You are not allowed to read this")
        # as the Hub tells those who have not logged in
        if versions is None:
            return self.answer(401, X_Error_Code="RepoNotFound",
                               X_Error_Message="Invalid username or password.")
        if revision not in versions:
            return self.answer(404, X_Error_Code="RevisionNotFound",
                               X_Error_Message="Invalid rev id")
        commit, files = versions[revision]
        if what == "revision":
            listed = [{"rfilename": file} for file in files]
            return self.answer(200,
                               json.dumps({"id": name, "sha": commit, "siblings": listed}).encode())
        if what == "tree":
            listed = [{"type": "file", "path": file, "size": len(text),
                       "oid": hashlib.sha1(text).hexdigest()} for file, text in files.items()]
            return self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        # its description is public, its files are not
        if name.startswith("gated/"):
            return self.answer(403, X_Error_Code="GatedRepo",
                               X_Error_Message="Access is restricted")
        text = files["/".join(parts[4:])]
        return self.answer(200, text, ETag=f'"{hashlib.sha1(text).hexdigest()}"',
                           X_Repo_Commit=commit)


CLIENT = """
import json, sys
from effreason.runtime.errors import UserError
from effreason.lm.hf import hub
name, revision, wanted = json.loads(sys.argv[1])
try:
    directory, commit = hub.find(name, revision, {small})
    opened = sorted(str(file.relative_to(directory))
                    for file in directory.rglob("*") if file.is_file())
    fetched = hub.fetch(name, commit, wanted) if wanted else None
    print(json.dumps(dict(directory=str(directory), commit=commit, opened=opened,
                          fetched=str(fetched))))
except UserError as error:
    print(json.dumps(dict(error=str(error))))
"""


@pytest.fixture
def server():
    with Hub() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture
def client(server, tmp_path):
    """open(name, revision, wanted, **environment): the answer, in a process of its own: the library
    reads the places of the Hub and its cache when it is imported."""

    def run(source, *arguments, **environment):
        known = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"),
                 "HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": server.address,
                 "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_DISABLE_TELEMETRY": "1",
                 "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", source, *arguments], env=known | environment,
                              cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def find(name, revision=None, wanted=(), **environment):
        arguments = json.dumps([name, revision, list(wanted)])
        return run(CLIENT.replace("{small}", repr(SMALL)), arguments, **environment)

    find.run = run
    return find


def refused(answer, *expected):
    """One line, with these words in it."""
    message = answer["error"]
    assert "\n" not in message and len(message) < 400, message
    for words in expected:
        assert words in message, message


# What is found


def test_small_files_first_and_weights_when_they_are_wanted(server, client):
    pretrained = client("good/model")
    assert pretrained["commit"] == NEW and pretrained["opened"] == ["config.json", "tokenizer.json"]
    assert not any(path.endswith((".safetensors", ".bin")) for path in server.requested)
    pretrained = client("good/model", wanted=["model.safetensors"])
    assert pretrained["fetched"] == pretrained["directory"]
    assert (Path(pretrained["directory"]) / "model.safetensors").read_bytes() == b"new"
    assert not any(path.endswith(".bin") for path in server.requested)


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_pinned(client, revision):
    pretrained = client("good/model", revision, ["model.safetensors"])
    assert pretrained["commit"] == OLD and pretrained["opened"] == ["config.json"]
    assert (Path(pretrained["directory"]) / "model.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize("revision", [None, "v1", OLD])
def test_what_is_in_the_cache_is_used_offline(server, client, revision):
    online = client("good/model", revision, ["model.safetensors"])
    for environment in (dict(HF_HUB_OFFLINE="1"), dict(HF_ENDPOINT="http://127.0.0.1:9")):
        server.requested.clear()
        assert client("good/model", revision, ["model.safetensors"],
                      **environment)["commit"] == online["commit"]
        assert not server.requested
    server.down = True
    assert client("good/model", revision, ["model.safetensors"])["directory"] == online["directory"]


def test_weights_in_the_cache_need_no_request(server, client):
    client("good/model", None, ["model.safetensors"])
    server.requested.clear()
    client("good/model", None, ["model.safetensors"])
    assert not any("resolve" in path for path in server.requested)


def test_a_model_is_opened_and_loaded(server, client, tmp_path):
    """Through the calls of the trainer, with a tokenizer and weights in several files."""
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{n}": n for n in range(72)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend,
                                         eos_token="w1").save_pretrained(tmp_path / "words")
    server.repositories["good/sharded"]["main"][1].update(
        {file.name: file.read_bytes() for file in (tmp_path / "words").iterdir()} | {
            "chat_template.jinja": b"{{ messages[0].content }}"})
    answer = client.run("""
import json
from effreason.lm.hf.pretrained import load_weights, open_pretrained
pretrained = open_pretrained("good/sharded", dtype="float32", revision="main")
opened = sorted(file.name for file in pretrained.directory.iterdir())
params = load_weights(pretrained)
print(json.dumps([pretrained.name, pretrained.revision, opened, str(pretrained.directory),
                  float(params["head"].sum())]))
""")
    name, revision, opened, directory, total = answer
    assert (name, revision) == ("good/sharded", NEW) and "model.safetensors.index.json" in opened
    assert not [file for file in opened
                if file.endswith(".safetensors")] and "reference.npz" not in opened
    from effreason.lm.hf.config import read_config
    from effreason.lm.hf.weights import read_weights

    expected = read_weights(FIXTURES / "qwen2_untied", read_config(FIXTURES / "qwen2_untied"))
    assert total == pytest.approx(float(expected["head"].sum()), rel=1e-5)


# What is refused, and how fast


def test_repositories_that_cannot_be_read(server, client):
    refused(client("gated/model"), "gated/model: its licence", f"{server.address}/gated/model",
            "`hf auth login`")
    refused(client("missing/model"), "missing/model: neither a directory here nor a model",
            "`hf auth login`")
    refused(client("private/model", HF_TOKEN="hf_secret"), "denies access (403)", "`hf auth login`")
    refused(client("portal/model"), "portal/model: no directory here",
            "`hf download portal/model --local-dir DIR`")
    refused(client("good/model", "v9"), "good/model: has no branch, tag or commit 'v9'",
            "/commits/main")
    refused(client("good/model", "9" * 40), "has no branch, tag or commit '999")


def test_repositories_that_hold_no_model(server, client):
    refused(client("pickled/model"), "only weights pickled by PyTorch", "save_pretrained")
    refused(client("empty/model"), "empty/model: has no config.json")
    refused(client("bare/model"), "bare/model: has no config.json")
    server.repositories["good/model"]["main"][1].pop("model.safetensors")
    refused(client("good/model"), "only weights pickled by PyTorch")
    assert not any("resolve" in path for path in server.requested)


@pytest.mark.parametrize("revision", [None, OLD])
@pytest.mark.parametrize("environment", [
    dict(HF_HUB_OFFLINE="1"), dict(HF_ENDPOINT="http://127.0.0.1:9"),
    dict(HF_ENDPOINT="http://hub.invalid"),
], ids=["offline", "refused", "no name"])
def test_without_a_hub_it_fails_at_once(server, client, environment, revision):
    started = time.monotonic()
    answer = client("good/model", revision, **environment)
    # the library alone would try for 23 s; a busy machine needs some of them to start the process
    assert time.monotonic() - started < 20
    reason = "HF_HUB_OFFLINE is set" if "HF_HUB_OFFLINE" in environment else "[Errno"
    at = f" --revision {OLD}" if revision else ""
    refused(answer, "good/model: no directory here, not in the cache", reason,
            f"`hf download good/model{at} --local-dir DIR`, then pass DIR")


def test_weights_that_are_not_in_the_cache_offline(server, client):
    client("good/model")
    refused(client("good/model", None, ["model.safetensors"], HF_HUB_OFFLINE="1"),
            "HF_HUB_OFFLINE is set", f"`hf download good/model --revision {NEW} --local-dir DIR`")


# Names


@pytest.mark.parametrize("name", ["runs/typo/model", "/no/such", "../runs/model", "model",
                                  "a--b/c", "runs/model/", ""])
def test_names_that_are_mistyped_directories(name):
    expected = "no such directory; a model on the Hugging Face Hub is named"
    with pytest.raises(UserError, match=expected) as caught:
        hub.find(name, None, SMALL)
    assert "\n" not in str(caught.value)


def test_a_directory_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good" / "model").mkdir(parents=True)
    (tmp_path / "good" / "model" / "config.json").touch()
    assert hub.find("good/model", None, SMALL) == (Path("good/model"), None)
    with pytest.raises(UserError,
                       match=r"model\.revision is for .*, good/model is a directory, got v1"):
        hub.find("good/model", "v1", SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        hub.find(str(tmp_path / "file"), None, SMALL)


def test_the_folder_of_a_cache_is_its_snapshot(tmp_path):
    folder = tmp_path / "models--good--model"
    for commit in (OLD, NEW):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").touch()
    with pytest.raises(UserError, match=f"did you mean .*{OLD} or .*{NEW}"):
        hub.find(str(folder), None, SMALL)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(OLD)
    assert hub.find(str(folder), None, SMALL) == (folder / "snapshots" / OLD, None)
    shutil.rmtree(folder / "refs")
    shutil.rmtree(folder / "snapshots" / OLD)
    assert hub.find(str(folder), None, SMALL) == (folder / "snapshots" / NEW, None)
    with pytest.raises(UserError, match=f"holds no config.json; did you mean .*{NEW}"):
        hub.find(str(folder / "snapshots"), None, SMALL)


def test_a_folder_above_the_model_names_it(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="holds no config.json$"):
        hub.find(str(tmp_path), None, SMALL)
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(UserError, match="holds no config.json; did you mean .*/model"):
        hub.find(str(tmp_path), None, SMALL)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_named_as_one(tmp_path, whole):
    table = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(table))
    if whole:
        (tmp_path / "config.json").touch()
    expected = "next to a model" if whole else "holds no config.json, only an adapter"
    with pytest.raises(UserError, match=f"{expected}: adapter_config.json, made for org/base"):
        hub.find(str(tmp_path), None, SMALL)


def test_what_a_killed_export_left_stands_in_for_it(tmp_path):
    def export_left_by(*names):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        for name in names:
            (tmp_path / "runs" / name).mkdir(parents=True)
        export = hub.existing_export(tmp_path / "runs" / "model")
        return export and export.name

    assert export_left_by("model", "model.partial", "model.old") == "model"
    # it was whole: the old one made room for it
    assert export_left_by("model.partial", "model.old") == "model.partial"
    assert export_left_by("model.old") == "model.old"
    # half written
    assert export_left_by("model.partial") is None
    assert export_left_by() is None
