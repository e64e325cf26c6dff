"""Float64 twins: the truth that a finger can check against the paper. Benchmarks import them; nothing in sae/ does."""
