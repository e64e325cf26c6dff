"""Features: the index of where each fires, the search for one, and what it makes the model say.

`build` makes an index in one pass over text, `Index.open` reads it, `find` searches it, `show` tells all
about one feature. Nothing here imports transformers until a host is given.
"""

from sae.features.index import Index, build
from sae.features.lens import Lens, OutputScores, logit_lens, output_scores
from sae.features.search import Feature, Found, find, show

__all__ = [
    "Feature",
    "Found",
    "Index",
    "Lens",
    "OutputScores",
    "build",
    "find",
    "logit_lens",
    "output_scores",
    "show",
]
