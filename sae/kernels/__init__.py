"""Five operations on sparse codes, each page with its contract, the plain float32 truth and the fast version.

encode_select · decode · reconstruct · by_feature · update_rows. The implementation follows the tensor's device (on CPU
the C files of native/ where the machine has a compiler); `implementation="plain"` asks for the truth, for tests and
doubts.
"""

from sae.kernels.by_feature import ByFeature, by_feature
from sae.kernels.decode import decode
from sae.kernels.encode_select import Above, BatchTopK, Select, TopK, encode_select
from sae.kernels.reconstruct import Reconstruction, reconstruct
from sae.kernels.update_rows import Adam, Rule, update_rows
from sae.kernels.work import EveryRow, RowGradients, Work

__all__ = [
    "Above",
    "Adam",
    "BatchTopK",
    "ByFeature",
    "EveryRow",
    "Reconstruction",
    "RowGradients",
    "Rule",
    "Select",
    "TopK",
    "Work",
    "by_feature",
    "decode",
    "encode_select",
    "reconstruct",
    "update_rows",
]
