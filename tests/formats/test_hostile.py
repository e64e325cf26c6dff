"""Whatever lies where an SAE is expected: it loads, or one line says why not. Nothing else is raised, nor run."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAE
from sae.errors import UserError
from tests.peers.agree import FIXTURES

CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.safetensors"))
EACH = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def loads_or_says_why(folder):
    """One line, or an SAE that works."""
    before = sorted(folder.rglob("*"))
    try:
        sae = SAE.load(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        x = torch.randn(3, sae.cfg.d_in)
        assert sae(x).shape == (3, sae.cfg.d_out or sae.cfg.d_in)
    assert sorted(folder.rglob("*")) == before


def copied(case, into):
    return Path(shutil.copytree(case / "sae", Path(into) / case.name))


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@EACH
@given(data=st.data())
def test_bytes_flipped_cut_added_or_moved(case, data):
    with tempfile.TemporaryDirectory() as into:
        folder = copied(case, into)
        path = data.draw(st.sampled_from(files_of(folder)), label="file")
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1), label="at")
        what = data.draw(st.sampled_from(["flip", "cut", "add", "swap", "empty", "gone", "text"]), label="what")
        if what == "flip":
            content[at] ^= data.draw(st.integers(1, 255))
        elif what == "cut":
            del content[at:]
        elif what == "add":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        elif what == "swap":
            content = content[at:] + content[:at]
        elif what == "empty":
            content.clear()
        elif what == "text":
            content[:] = data.draw(st.text()).encode()
        path.unlink() if what == "gone" else path.write_bytes(content)
        loads_or_says_why(folder)


@pytest.mark.parametrize("case", [case for case in CASES if list(case.rglob("*.json"))], ids=lambda case: case.name)
@EACH
@given(data=st.data())
def test_any_value_of_a_config(case, data):
    with tempfile.TemporaryDirectory() as into:
        folder = copied(case, into)
        path = data.draw(st.sampled_from([path for path in files_of(folder) if path.suffix == ".json"]))
        config = json.loads(path.read_text())
        inner = [config, *(value for value in config.values() if isinstance(value, dict))]
        where = data.draw(st.sampled_from([one for one in inner if one]))
        key = data.draw(st.sampled_from(sorted(where)), label="key")
        if data.draw(st.booleans(), label="missing"):
            del where[key]
        else:
            where[key] = data.draw(JSON, label="value")
        path.write_text(json.dumps(config))
        loads_or_says_why(folder)


SHAPES = st.lists(st.integers(0, 5), max_size=3)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn]  # fmt: skip


READERS = {".safetensors": (load_file, save_file), ".pt": (torch.load, torch.save)}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if any(path.suffix in READERS for path in files_of(case / "sae"))],
    ids=lambda case: case.name,
)
@EACH
@given(data=st.data())
def test_any_tensor_in_place_of_one(case, data):
    with tempfile.TemporaryDirectory() as into:
        folder = copied(case, into)
        path = data.draw(st.sampled_from([path for path in files_of(folder) if path.suffix in READERS]))
        load, save = READERS[path.suffix]
        held = load(path)
        tensors = held.get("sae", held)  # OpenMOSS's pickle has a version beside
        name = data.draw(st.sampled_from(sorted(tensors)), label="tensor")
        shape = data.draw(st.one_of(SHAPES, st.just(list(tensors[name].shape))), label="shape")
        fill = data.draw(st.sampled_from([0.0, 1.0, -3.0, 1e30, float("nan"), float("inf")]), label="fill")
        dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
        whole = not (dtype.is_floating_point or dtype.is_complex)
        tensors[name] = torch.full(shape, 1.0 if whole and fill != 0 else fill).to(dtype)
        path.unlink()
        save(held, path)
        loads_or_says_why(folder)
