"""Loading: a Hub that does not answer is one line at once, and no request where there is none to make."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub.constants
import pytest
import torch
from safetensors import SafetensorError

from sae import loading
from sae.errors import UserError
from sae.host import Host


@pytest.fixture
def hub(monkeypatch):
    """A Hub that answers everything with `.status`; the paths asked for are in `.asked`."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.server.asked.append(self.path)
            self.send_response(self.server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    server.asked, server.status = [], 503
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_that_is_down_is_one_line_after_one_request_and_nothing_on_stderr(hub, capfd):
    with pytest.raises(UserError, match="nobody/no-such-model") as error:
        Host.load("nobody/no-such-model", device="cpu")
    assert "\n" not in str(error.value) and "does not answer" in str(error.value)
    assert hub.asked == ["/nobody/no-such-model/resolve/main/config.json"]
    assert capfd.readouterr().err == ""


def test_a_hub_that_nothing_listens_for_is_one_line_too(hub, monkeypatch, capfd):
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    with pytest.raises(UserError, match="does not answer"):
        Host.load("nobody/no-such-model", device="cpu")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("gpt2-small", "gpt2"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gpt2", "gpt2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
    ],
)
def test_short_names_of_transformerlens_are_loaded_by_their_official_id(tiny_host, monkeypatch, name, asked):
    import transformers

    names = []

    def spy(given):
        return classmethod(lambda cls, name, **_: names.append(name) or given)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy(tiny_host.model))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", spy(tiny_host.tokenizer))
    assert Host.load(name, dtype="float32", device="cpu").name == name and names == [asked, asked]


def test_offline_asks_nobody(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="offline"):
        Host.load("nobody/no-such-model", device="cpu")
    assert hub.asked == []


def test_an_id_that_the_hub_does_not_know_is_one_line(hub, capfd):
    hub.status = 404
    with pytest.raises(UserError, match="nobody/no-such-model") as error:
        Host.load("nobody/no-such-model", device="cpu")
    assert "\n" not in str(error.value) and "does not answer" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """Loading of a .gguf file without its content: what is loaded is noted in `.loaded`, saving raises `.fails`."""

    class Fake:
        config = SimpleNamespace()
        loaded: ClassVar[list[str]] = []
        fails: Exception | None = None

        def save_pretrained(self, folder):
            if self.fails:
                raise self.fails
            (folder / "config.json").write_text("{}")

        def to(self, dtype):
            return self

    fake = Fake()

    def load(name, dtype, **options):
        fake.loaded.append(name)
        return fake, fake

    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_load_pretrained", load)
    fake.loaded.clear()
    return fake


def test_a_gguf_is_cached_by_all_of_its_bytes(gguf, tmp_path):
    path = tmp_path / "m.gguf"
    for content in (b"0" * (2 << 20) + b"1", b"0" * (2 << 20) + b"2"):
        path.write_bytes(content)
        loading.load(str(path), torch.float32)
    assert len(list((tmp_path / "cache" / "hosts").iterdir())) == 2
    loading.load(str(path), torch.float32)
    assert gguf.loaded.count(str(tmp_path)) == 2  # the third load reads the cache


@pytest.mark.parametrize("error", [SafetensorError("IoError: No space left on device"), OSError(28, "full")])
def test_a_disk_too_full_for_the_cache_is_a_warning_only(gguf, tmp_path, caplog, error):
    (tmp_path / "m.gguf").write_bytes(b"x")
    gguf.fails = error
    assert loading.load(str(tmp_path / "m.gguf"), torch.float32) == (gguf, gguf)
    assert "were not kept" in caplog.text
    assert list((tmp_path / "cache" / "hosts").iterdir()) == []
