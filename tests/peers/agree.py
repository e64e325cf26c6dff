"""How peers' SAEs are compared: a case is a folder that a peer's own package wrote, with what it makes of it.

    CASE/sae/…                    the peer's files, as it writes them
    CASE/expected.safetensors     x [n, d], codes [n, F], recon [n, d_out]; metadata: "by" (package and version, or the
                                  commit of what was transcribed), and "where", the repository and folder that the
                                  case stands for, where names say what an SAE belongs to
    and, where its codes are in other units than ours: `scale` [F] or [], with ours = theirs · scale

Small cases are committed under fixtures/, so that they are compared without the peers; write_PEER.py writes them.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from sae.autoencoder import SAE
from sae.formats import layouts
from sae.formats.facts import Facts

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
BAR = 1e-5


def python(peer: str) -> Path:
    """The interpreter of a peer's environment (experiments/bench/peers.sh builds it)."""
    return ROOT / ".venvs" / peer / "bin" / "python"


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
