"""The control vector of llama.cpp, read back by the gguf package."""

import errno
import sys

import pytest
import torch

from sae.errors import UserError
from sae.formats import control_vector

gguf = pytest.importorskip("gguf")


def read(path):
    """(keys, tensors) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}, reader


def test_what_is_written_is_what_llama_cpp_loads(tmp_path):
    vector = torch.randn(23)
    control_vector.write(tmp_path / "a.gguf", 3, vector, "llama", {"hook": "blocks.3", "lost": ["ä", "b"]})
    keys, tensors, reader = read(tmp_path / "a.gguf")
    assert keys == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 1,
        "goldengate.hook": "blocks.3",
        "goldengate.lost": ["ä", "b"],
    }
    assert list(tensors) == ["direction.3"]
    assert torch.equal(tensors["direction.3"], vector)
    assert reader.tensors[0].tensor_type == gguf.GGMLQuantizationType.F32


def test_other_dtypes_and_views_are_written_as_float32(tmp_path):
    vector = torch.randn(6, 4).bfloat16().requires_grad_()[:, 1]
    control_vector.write(tmp_path / "a.gguf", 1, vector, "llama", {})
    assert torch.equal(read(tmp_path / "a.gguf")[1]["direction.1"], vector.detach().float())


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def full(self, progress=False):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    (tmp_path / "a.gguf").write_text("before")
    with pytest.raises(UserError, match=r"a\.gguf: no space left to write it"):
        control_vector.write(tmp_path / "a.gguf", 1, torch.zeros(4), "llama", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_text() == "before"


def test_without_the_package_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"the extra \[demo\] has it.*pip install 'gguf"):
        control_vector.write(tmp_path / "a.gguf", 1, torch.zeros(4), "llama", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("theirs", "hint"),
    [("llama", "llama"), ("mistral", "llama"), ("gpt_neox", "gptneox"), ("gemma3_text", "gemma3"),
     ("qwen2_moe", "qwen2moe"), ("gpt2", "gpt2"), ("phi", "phi2"), ("gpt_oss", "gpt-oss")],
)  # fmt: skip
def test_an_architecture_is_called_as_llama_cpp_calls_it(theirs, hint):
    assert control_vector.model_hint(theirs) == hint
    assert hint in gguf.MODEL_ARCH_NAMES.values()
