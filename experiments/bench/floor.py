"""What a training step must cost at least, from rates measured in the same run (two matrix products, one copy).

floor = 2BdF / gemm                  the encoder's product
      + 3·s·nnz·d / copy             gathers of rows: decode and value gradients share one, each weight gradient has one
      + (24 or 26)·2dF / copy        Adam: weight, m and v in float32, each read and written; 2 more for the bf16 copy
      + s·BF / copy                  one write of the pre-activations

s is the size of an element in the product's format (2 in bfloat16, 4 in float32), nnz the entries of the codes that
carry a value or a gradient, and copy counts a copied byte twice (read and written), as the terms above do. Where the
codes are not sparse, four more products cost less than the gathers; then those count. The floor is the lower of the
formats measured. (For TopK in bfloat16: 2BdF/gemm + (6Bkd + 52dF + 2BF)/copy.)
"""

from dataclasses import dataclass

Shape = tuple[int, int, int, int]
SIZES = {"bfloat16": 2, "float32": 4}
COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Rates:
    gemm: dict[str, float]
    """FLOP/s of the encoder's product, by format."""
    copy: float
    """Bytes/s, read and written both counted."""


def rates(medians: dict[str, float], shape: Shape) -> Rates | None:
    """From median seconds of the contenders "product FORMAT" and "copy"; None without either."""
    B, d, F, _ = shape
    gemm = {
        name.removeprefix("product "): 2 * B * d * F / seconds
        for name, seconds in medians.items()
        if name.startswith("product ")
    }
    if not gemm or "copy" not in medians:
        return None
    return Rates(gemm, 2 * COPY_BYTES / medians["copy"])


def update_bytes(shape: Shape, dtype: str) -> int:
    """Traffic of Adam over both matrices."""
    _, d, F, _ = shape
    return (26 if dtype == "bfloat16" else 24) * 2 * d * F


def floor_in(dtype: str, shape: Shape, nnz: float, rates: Rates) -> float:
    """Seconds of a step in one format."""
    B, d, F, _ = shape
    size = SIZES[dtype]
    product = 2 * B * d * F / rates.gemm[dtype]
    gathers = 3 * size * nnz * d / rates.copy
    return product + min(gathers, 4 * product) + (update_bytes(shape, dtype) + size * B * F) / rates.copy


def floor(shape: Shape, nnz: float, rates: Rates) -> float:
    """Seconds of a step in the format that is fastest here."""
    return min(floor_in(dtype, shape, nnz, rates) for dtype in rates.gemm)


def best_dtype(shape: Shape, rates: Rates) -> str:
    """The format of TopK's floor."""
    B, _, _, k = shape
    return min(rates.gemm, key=lambda dtype: floor_in(dtype, shape, B * k, rates))
