"""Pickles of others: nothing in one is run, and whatever it holds instead of tensors is one line."""

import json
import pickle
import resource
import warnings
import zipfile
from collections import Counter

import pytest
import torch

from sae.autoencoder import SAE
from sae.errors import UserError
from tests.peers.agree import FIXTURES

STATE = FIXTURES / "dictionary_learning-AutoEncoder" / "sae" / "ae.pt"


class Bomb:
    """Unpickled by whoever trusts it, this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def at(tmp_path):
    """Where a trainer's weights are expected."""
    trainer = {"dict_class": "AutoEncoder", "activation_dim": 16, "dict_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    return tmp_path / "ae.pt"


def line(path, **options):
    with pytest.raises(UserError) as caught:
        SAE.load(path.parent, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert all(letter.isprintable() for letter in str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare", "beside good tensors"])
@pytest.mark.parametrize("trust", [False, True])
def test_code_in_a_pickle_is_not_run_whoever_trusts_it(tmp_path, how, trust):
    path, made = at(tmp_path), tmp_path / "made"
    if how == "bare":
        path.write_bytes(pickle.dumps(Bomb(made)))
    elif how == "beside good tensors":
        torch.save({**torch.load(STATE), "more": Bomb(made)}, path)
    else:
        torch.save(Bomb(made), path, _use_new_zipfile_serialization=how == "zip")
    assert "was not loaded" in line(path, trust_pickle=trust) or how == "bare"
    assert not made.exists()
    if how == "zip":  # the bomb is one
        torch.load(path, weights_only=False).close()
        assert made.exists()


@pytest.mark.parametrize("version", ["2.9.1", "2.6.0+cu124", "1.13", "unknown"])
def test_below_torch_2_10_a_pickle_is_read_only_on_trust(tmp_path, monkeypatch, version):
    path = at(tmp_path)
    path.write_bytes(STATE.read_bytes())
    monkeypatch.setattr(torch, "__version__", version)
    assert f"torch {version}'s guard" in line(path) and "--trust-pickle" in line(path)
    assert SAE.load(tmp_path, trust_pickle=True).cfg.d_sae == 64


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git1234", "2.10.0rc1"])
def test_from_torch_2_10_a_pickle_is_read(tmp_path, monkeypatch, version):
    at(tmp_path).write_bytes(STATE.read_bytes())
    monkeypatch.setattr(torch, "__version__", version)
    assert SAE.load(tmp_path).cfg.d_sae == 64


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x02", b"some text\n", "half", "nearly all"])
def test_a_damaged_file_is_one_line(tmp_path, content):
    path, whole = at(tmp_path), STATE.read_bytes()
    path.write_bytes({"half": whole[: len(whole) // 2], "nearly all": whole[:-1]}.get(content, content))
    assert "ae.pt: " in line(path)


def test_another_zip_is_one_line(tmp_path):
    path = at(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other", "text")
    assert "is no file of torch.save, or a damaged one" in line(path)


def test_a_compressed_pickle_is_refused_before_it_is_unpacked(tmp_path):
    path, before = at(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w") as file:
            for _ in range(1 << 9):
                file.write(bytes(1 << 20))
        archive.writestr("archive/version", "3")
    assert "its members are compressed" in line(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", [(bytearray, 1 << 28), (set, range(3)), (Counter, "aa")], ids=str)
def test_what_would_be_made_of_a_number_is_not(tmp_path, zipped, what):
    class Much:
        def __reduce__(self):
            return what[0], (what[1],)

    path, before = at(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.save({"bias": Much()}, path, _use_new_zipfile_serialization=zipped)
    assert f"was not loaded (Unsupported: {'collections' if what[0] is Counter else '__builtin__'}." in line(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_program_of_torchscript_is_told_as_one(tmp_path):
    class Adds(torch.nn.Module):
        def forward(self, x):
            return x + 1

    path = at(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit itself
        torch.jit.trace(Adds(), torch.zeros(2)).save(str(path))
    assert "holds more than tensors, and was not loaded (a program of TorchScript)" in line(path)


def test_no_line_says_how_to_run_what_is_in_a_pickle(tmp_path):
    path = at(tmp_path)
    torch.save(torch.nn.ReLU(), path)
    assert "PyTorch 2.6" not in line(path) and "add_safe_globals" not in line(path)


def test_a_missing_file_is_one_line(tmp_path):
    at(tmp_path)
    with pytest.raises(UserError, match="not an SAE folder"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(3),
        [torch.zeros(3)],
        {"bias": 3},
        {"bias": torch.zeros(1).expand(10**7, 10**7)},
        {"bias": torch.zeros(16).to_sparse()},
        {"bias": torch.zeros(16, device="meta")},
        {"encoder.weight": {"nested": torch.zeros(16)}},
    ],
    ids=["tensor", "list", "number", "huge view", "sparse", "meta", "nested"],
)
def test_anything_but_plain_tensors_by_name_is_one_line(tmp_path, given):
    path = at(tmp_path)
    torch.save(given, path)
    said = ("expected tensors by name", "no plain tensor of what the file holds", "was not loaded (Unsupported")
    assert any(one in line(path) for one in said)


def test_what_a_file_says_cannot_steer_a_terminal(tmp_path):
    path = at(tmp_path)
    path.write_bytes(b"\x80\x02cos\x1b[2J\nsystem\x1b[31m\n.")
    line(path)
