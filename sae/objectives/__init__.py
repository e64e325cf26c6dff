"""One page an architecture: (params, batch, …) → work and losses, written by hand on the kernels.

Each has a float64 autograd twin in tests/reference with which its gradients are compared.
"""
