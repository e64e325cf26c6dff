"""Features: the index of where each fires, the searches in it, and what each makes the model say.

`build` makes an index in one pass over text, `Index.open` reads it, `find` and its siblings search it, `show` tells all
about one feature. Nothing here imports transformers until a host is given.
"""

from sae.features.index import Index
from sae.features.lens import Lens, OutputScores, logit_lens, output_scores
from sae.features.rows import FeatureList, Found
from sae.features.search import find, toward
from sae.features.showing import Feature, show
from sae.features.ways import by_effect, by_likeness, by_text, by_token, by_words
from sae.features.writing import build

__all__ = [
    "Feature",
    "FeatureList",
    "Found",
    "Index",
    "Lens",
    "OutputScores",
    "build",
    "by_effect",
    "by_likeness",
    "by_text",
    "by_token",
    "by_words",
    "find",
    "logit_lens",
    "output_scores",
    "show",
    "toward",
]
