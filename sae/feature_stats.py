"""FeatureStats: how strongly and how often each feature of an SAE fires, and the file that lies beside the SAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sae import files
from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class FeatureStats:
    """How each feature fires, in the SAE's own units (Metadata.units), over `n_tokens` valid tokens."""

    max_act: Float[Tensor, " F"]
    density: Float[Tensor, " F"]
    """Share of tokens in which it fires."""
    p999: Float[Tensor, " F"]
    """99.9th percentile of its activation over the tokens in which it fires."""
    n_tokens: int

    def save(self, path: Path) -> None:
        tensors = {"max_act": self.max_act, "density": self.density, "p999": self.p999}
        files.write_safetensors(path, tensors, {"n_tokens": str(self.n_tokens)})

    @classmethod
    def load(cls, path: Path) -> FeatureStats:
        """Raises UserError for a damaged file, and for what are no statistics."""
        from safetensors import SafetensorError, safe_open

        files.regular(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("max_act", "density", "p999")}
                n_tokens = int((file.metadata() or {})["n_tokens"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: is damaged ({error}). Copy the folder again.") from error
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.shape != tensors["max_act"].shape or tensor.dim() != 1:
                what = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
                raise UserError(f"{path}: {name} is {what}, expected a number of each feature. Copy the folder again.")
            if not bool(tensor.float().isfinite().all()):
                raise UserError(f"{path}: {name} is not finite everywhere. Copy the folder again.")
        if not 0 <= n_tokens < 1 << 63:
            raise UserError(f"{path}: n_tokens is {n_tokens}, expected a count of tokens. Copy the folder again.")
        return cls(**tensors, n_tokens=n_tokens)
