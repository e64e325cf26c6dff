"""The CPU kernels in C: small files beside this page, compiled on the user's machine at first use (build.py)."""

from sae.kernels.native.build import call, native

__all__ = ["call", "native"]
