"""Activations: harvested from a host, kept in a store, shuffled into batches."""
