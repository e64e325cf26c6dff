"""How good an SAE is. `core`: reconstruction, sparsity, and what the host loses; each with its interval."""
