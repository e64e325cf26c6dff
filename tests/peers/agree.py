"""How peers' SAEs are compared: a case is a folder that a peer's own package wrote, with what it makes of it.

    CASE/sae/…                    the peer's files, as it writes them
    CASE/expected.safetensors     x [n, d], codes [n, F], recon [n, d_out]; metadata: "by" (package and version, or the
                                  commit of what was transcribed), and "where", the repository and folder that the
                                  case stands for, where names say what an SAE belongs to
    and, where its codes are in other units than ours: `scale` [F] or [], with ours = theirs · scale

Small cases are committed under fixtures/, so that they are compared without the peers; write_PEER.py writes them.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAE
from sae.formats import layouts
from sae.formats.facts import Facts

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
BAR = 1e-5


def python(peer: str) -> Path:
    """The interpreter of a peer's environment (experiments/bench/peers.sh builds it)."""
    return ROOT / ".venvs" / peer / "bin" / "python"


def in_peer(script: str, *words: object) -> None:
    """Run write_PEER.py or read_PEER.py in that peer's environment. Its import takes most of the time, so one call does
    all cases; a test is skipped where the environment is not built."""
    peer = _ENVIRONMENTS[script.removesuffix(".py").partition("_")[2]]
    if not python(peer).exists():
        pytest.skip(f"{peer}'s environment is not built: experiments/bench/peers.sh {peer}")
    command = [python(peer), Path(__file__).with_name(script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


_ENVIRONMENTS = {
    "saelens": "saelens", "sparsify": "sparsify", "dictionary_learning": "dictionary", "openmoss": "openmoss",
    "published": "saelens",
}  # fmt: skip


Given = dict[str, tuple[SAE, torch.Tensor]]
Made = dict[str, tuple[SAE, torch.Tensor, dict[str, torch.Tensor]]]


def made_of(peer: str, folder: Path, saes: Given) -> Made:
    """What a peer's own package makes of the SAEs that were written for it in FOLDER/NAME, of activations x.

    saes   {name: (SAE, x)}; a dict of codes and recon is added to each
    """
    for name, (_, x) in saes.items():
        save_file({"x": x}, folder / name / "x.safetensors")
    in_peer(f"read_{peer}.py", folder)
    return {name: (sae, x, load_file(folder / name / "out.safetensors")) for name, (sae, x) in saes.items()}


def expected(case: Path) -> tuple[dict[str, torch.Tensor], str]:
    with safe_open(case / "expected.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, said(case)["by"]  # noqa: SIM118


def said(case: Path) -> dict[str, str]:
    with safe_open(case / "expected.safetensors", framework="pt") as file:
        return file.metadata()


def read(case: Path) -> tuple[Facts, dict[str, torch.Tensor]]:
    return layouts.read(case / "sae", where=said(case).get("where", ""))[1:]


def load(case: Path) -> SAE:
    return SAE.from_facts(*read(case), case).requires_grad_(False)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value: relative, in float32."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours - theirs).detach().abs().max() / theirs.abs().max())


def differences(case: Path, sae: SAE | None = None) -> dict[str, float]:
    """How far our codes (dense and sparse) and reconstruction of a case are from the peer's."""
    theirs, _ = expected(case)
    sae = load(case) if sae is None else sae
    x, codes = theirs["x"], theirs["codes"] * theirs.get("scale", torch.ones(()))
    assert (codes != 0).any(), "nothing fires"
    return {
        "codes": difference(sae.encode(x), codes),
        "sparse": difference(sae.encode_sparse(x).dense(), codes),
        "recon": difference(sae(x), theirs["recon"]),
    }
