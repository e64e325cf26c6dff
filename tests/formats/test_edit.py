"""The edit file: there and back bit for bit; what is short, foreign or broken is refused by name."""

import pickle

import pytest
import torch

from sae import files
from sae.errors import UserError
from sae.formats import edit

FACTS = {
    "hook": "blocks.2.hook_resid_post", "reading": "threshold", "features": "7,9,12", "kinds": "clamp,add,floor",
    "dials": "7=5x,9+=2,12>=1", "host": "tiny", "host_fingerprint": "0123", "outlier_norm": "12.5", "lost": "",
}  # fmt: skip


def tensors(n=3, d=24):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, d, generator=generator) for _ in range(2)]
    laws = torch.tensor([[1.0, 2, 3], [-1, 0, -1], [-torch.inf, -torch.inf, 0], [torch.inf] * 3])
    return {"vectors": rows[0], "encoder": rows[1], "bias": torch.randn(n), "floor": torch.rand(n), "laws": laws}


def test_an_edit_comes_back_bit_for_bit(tmp_path):
    edit.write(tmp_path / "a.safetensors", FACTS, given := tensors())
    facts, found = edit.read(tmp_path / "a.safetensors")
    assert {name: facts[name] for name in FACTS} == FACTS
    assert "clip(const_i + slope_i" in facts["rule"]
    for name, value in given.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("vectors", torch.zeros(24), r"vectors are float32 \[24\], expected \[n, d\]"),
        ("vectors", None, "vectors are missing"),
        ("encoder", torch.zeros(3, 23), r"encoder is float32 \[3, 23\], expected float32 \[3, 24\]"),
        ("bias", torch.zeros(3).double(), r"bias is float64 \[3\], expected float32 \[3\]"),
        ("laws", torch.zeros(4, 2), r"laws is float32 \[4, 2\], expected float32 \[4, 3\]"),
        ("laws", torch.full((4, 3), torch.inf), "laws has NaN or infinite values"),
        ("floor", None, "floor is missing"),
        ("floor", torch.full((3,), torch.nan), "floor has NaN"),
    ],
)
def test_a_short_or_broken_file_is_refused_by_name(tmp_path, name, value, said):
    wrong = {**tensors(), name: value}
    edit.write(tmp_path / "a.safetensors", FACTS, {key: value for key, value in wrong.items() if value is not None})
    with pytest.raises(UserError, match=said):
        edit.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", list(FACTS))
def test_a_file_without_a_fact_is_refused(tmp_path, name):
    edit.write(tmp_path / "a", {key: value for key, value in FACTS.items() if key != name}, tensors())
    with pytest.raises(UserError, match=f"its metadata has no {name}"):
        edit.read(tmp_path / "a")


def test_an_unknown_reading_is_refused(tmp_path):
    edit.write(tmp_path / "a", {**FACTS, "reading": "topk"}, tensors())
    with pytest.raises(UserError, match="reading is 'topk', expected threshold or none"):
        edit.read(tmp_path / "a")


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"vectors": [1, 2]}))
    files.write_safetensors(tmp_path / "b", {"vectors": torch.zeros(3, 24)})
    edit.write(tmp_path / "c", FACTS, tensors())
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-9])
    for name, said in [
        ("a.pkl", "is no safetensors file"),
        ("b", "format is None, expected goldengate-edit-1"),
        ("c", "or a damaged one"),
        ("none", "no such file"),
        ("", "is a folder"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            edit.read(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name))
        assert "\n" not in str(error.value)
