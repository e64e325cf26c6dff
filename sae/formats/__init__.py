"""Foreign layouts, one page each: path ↔ (facts, tensors). A page owns its names on disk and never sees the SAE class.

facts: architecture (topk, jumprelu or relu), d_in, d_sae, k (of topk), subtracts_b_dec, metadata (a dict, in SAELens's
words but for training_architecture).
tensors: W_enc [d, F], W_dec [F, d], b_enc [F], b_dec [d], threshold [F] for jumprelu.
edit.py and control_vector.py are of steering edits instead, and say their own.
"""

EDITS = ("safetensors", "vector", "gguf")
"""What dials are written as (sae/converting.py)."""
