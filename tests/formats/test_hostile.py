"""Whatever lies where an SAE is expected: it loads, or one line says why not. Nothing else is raised, nor run."""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAE
from sae.errors import UserError
from sae.run import info, train
from sae.training.checkpoint import all_of
from tests.conftest import make_sae
from tests.peers.agree import FIXTURES
from tests.test_architectures import recipe
from tests.training.test_training import planted

OURS = ["ours", "ours/checkpoints/step-100"]
CASES = [*sorted(path.parent.name for path in FIXTURES.glob("*/expected.safetensors")), *OURS]
EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "25"))
EACH = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
TEXTS = st.text(max_size=8) | st.sampled_from(["x" * 5000, "a\x1b[2J\nb", "\u202e", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
    | st.sampled_from([10**30, -(10**400), 10**4000, 1e300, 2**63, 10**5 * [1]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
    | st.integers(1, 300).flatmap(lambda deep: inner.map(lambda value: nested(value, deep))),
    max_leaves=5,
)  # fmt: skip


def nested(value, deep):
    for _ in range(deep):
        value = [value]
    return value


def loads_or_says_why(folder):
    """One line, or an SAE that works, can be shown and saved."""
    before = sorted(folder.rglob("*"))
    try:
        sae = SAE.load(folder)
        info(folder)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 450 + len(str(folder)), str(error)
    else:
        x = torch.randn(3, sae.cfg.d_in)
        assert sae(x).shape == (3, sae.cfg.d_out or sae.cfg.d_in)
        assert repr(sae).splitlines()[0].isprintable()
        with tempfile.TemporaryDirectory() as into:
            sae.save(Path(into) / "sae")
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A run of ours: an SAE as we save one, with all that may lie beside it, and a training checkpoint."""
    run = tmp_path_factory.mktemp("hostile") / "run"
    short = recipe(run, "topk")
    train(replace(short, training=replace(short.training, tokens=2_000)), planted()[0][:1000], progress=False)
    all_of(run)[-1].rename(run / "checkpoints" / "step-100")
    sae = make_sae(hook_name="blocks.2.hook_resid_post")
    sae.labels = {3: "the bridge"}
    sae.save(run / "sae")
    return run


def copied(case, into, ours):
    """(what is copied, the SAE in it)"""
    if case not in OURS:
        folder = Path(shutil.copytree(FIXTURES / case / "sae", Path(into) / case))
        return folder, folder
    if case == "ours":
        folder = Path(shutil.copytree(ours / "sae", Path(into) / "sae"))
        return folder, folder
    run = Path(into) / "run"
    checkpoint = Path(shutil.copytree(ours / "checkpoints" / "step-100", run / "checkpoints" / "step-100"))
    shutil.copy(ours / "resolved.json", run)
    return run, checkpoint


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


INSTEAD = {"folder": Path.mkdir} | ({"pipe": os.mkfifo} if hasattr(os, "mkfifo") else {})
KINDS = ["flip", "cut", "add", "swap", "empty", "gone", "text", *INSTEAD]


@pytest.mark.parametrize("case", CASES)
@EACH
@given(data=st.data())
def test_bytes_flipped_cut_added_or_moved(ours, case, data):
    with tempfile.TemporaryDirectory() as into:
        folder, sae = copied(case, into, ours)
        path = data.draw(st.sampled_from(files_of(folder)), label="file")
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1), label="at")
        what = data.draw(st.sampled_from(KINDS), label="what")
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
        path.unlink()
        if what in INSTEAD:
            INSTEAD[what](path)
        elif what != "gone":
            path.write_bytes(content)
        loads_or_says_why(sae)


@pytest.mark.parametrize("case", [case for case in CASES if case in OURS or list((FIXTURES / case).rglob("*.json"))])
@EACH
@given(data=st.data())
def test_any_value_of_a_config(ours, case, data):
    with tempfile.TemporaryDirectory() as into:
        folder, sae = copied(case, into, ours)
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
        loads_or_says_why(sae)


SHAPES = st.lists(st.integers(0, 5), max_size=3)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn]  # fmt: skip


READERS = {".safetensors": (load_file, save_file), ".pt": (torch.load, torch.save)}


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case in OURS or any(path.suffix in READERS for path in files_of(FIXTURES / case / "sae"))
    ],
)
@EACH
@given(data=st.data())
def test_any_tensor_in_place_of_one(ours, case, data):
    with tempfile.TemporaryDirectory() as into:
        folder, sae = copied(case, into, ours)
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
        loads_or_says_why(sae)
