"""Foreign layouts, one page each: path ↔ (facts, tensors). A page owns its names on disk and never sees the SAE class.

A checkpoint's page has `recognises(folder)`, `read(folder, *, where, trust_pickle)` and, where we write it, `write`;
facts.py says what they give and take, checks.py how files of others are read, folds.py how the same SAE is said
otherwise, hooks.py where one belongs. edit.py and control_vector.py are of steering edits instead, and say their own.
"""

EDITS = ("safetensors", "vector", "gguf")
"""What dials are written as (sae/converting.py)."""
CHECKPOINTS = ("saelens", "sparsify", "dictionary_learning")
"""What a whole SAE is written as; more are read (layouts.py)."""
