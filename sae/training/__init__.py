"""The fused training loop. It knows activations and parameters, nothing of hosts, texts or evaluation."""
