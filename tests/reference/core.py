"""Float64 twin of sae/evaluation: every document alone, one forward at a time, sums written out."""

import torch


def reconstruction(x, out, acts, decoder_norms=None):
    """x, out [N, d], acts [N, F], dense; one number a metric."""
    x, out, acts = x.double(), out.double(), acts.double()
    N = len(x)
    mean = sum(x) / N
    error = sum(float(e @ e) for e in x - out)
    variance = sum(float(e @ e) for e in x - mean)
    norms = torch.ones(acts.shape[1], dtype=torch.float64) if decoder_norms is None else decoder_norms.double()
    l0 = torch.tensor([float((a != 0).sum()) for a in acts])
    cx, co = x - mean, out - mean
    return {
        "fvu": error / variance,
        "explained_variance": 1 - error / variance,
        "mse": error / N,
        "cossim": sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, out, strict=True)) / N,
        "cossim_centred": float((cx * co).sum() / (cx.norm() * co.norm())),
        "relative_reconstruction_bias": float((out**2).sum() / (x * out).sum()),
        "l2_ratio": sum(float(b.norm() / a.norm()) for a, b in zip(x, out, strict=True)) / N,
        "l2_norm_in": float(x.norm(dim=1).mean()),
        "l2_norm_out": float(out.norm(dim=1).mean()),
        "l0": float(l0.mean()),
        "l0_median": float(l0.sort().values[(N + 1) // 2 - 1]),
        "l1": float((acts.abs() * norms).sum() / N),
    }


class _Layer:
    """Read, or replace at some positions, the output of one decoder layer of a plain transformers model."""

    def __init__(self, module, replace=None):
        self.replace, self.x = replace, None
        self.handle = module.register_forward_hook(self._hook)

    def _hook(self, module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        self.x = x.detach()
        if self.replace is None:
            return None
        new = self.replace(x)
        return (new, *output[1:]) if isinstance(output, tuple) else new


def _forward(model, module, tokens, replace=None):
    layer = _Layer(module, replace)
    try:
        with torch.no_grad():
            return model(input_ids=tokens[None]).logits[0].double().log_softmax(-1), layer.x[0]
    finally:
        layer.handle.remove()


def losses(model, module, sae, documents, mean, outlier_norm=None):
    """x at the mask, and CE and KL, over documents given as (tokens [n], mask [n]), each run alone."""
    sums = dict.fromkeys(("clean", "sae", "zero", "mean", "kl", "kl_zero", "n", "n_kl"), 0.0)
    xs = []
    for tokens, mask in documents:
        clean, x = _forward(model, module, tokens)
        counted = mask if outlier_norm is None else mask & (x.norm(dim=1) < outlier_norm)
        xs.append(x[counted])

        def at(value, counted=counted, x=x):
            full = x.clone()
            full[counted] = value
            return lambda _: full[None]

        spliced, _ = _forward(model, module, tokens, at(sae.decode(sae.encode_sparse(x[counted]))))
        zero, _ = _forward(model, module, tokens, at(0.0))
        average, _ = _forward(model, module, tokens, at(mean.to(x)))
        for t in range(len(tokens)):
            if not counted[t]:
                continue
            sums["n_kl"] += 1
            sums["kl"] += float((clean[t].exp() * (clean[t] - spliced[t])).sum())
            sums["kl_zero"] += float((clean[t].exp() * (clean[t] - zero[t])).sum())
            if t + 1 < len(tokens) and mask[t + 1]:
                sums["n"] += 1
                for name, logp in (("clean", clean), ("sae", spliced), ("zero", zero), ("mean", average)):
                    sums[name] -= float(logp[t, tokens[t + 1]])
    ce = {name: sums[name] / sums["n"] for name in ("clean", "sae", "zero", "mean")}
    return torch.cat(xs), {
        **{f"ce_{name}": value for name, value in ce.items()},
        "ce_delta": ce["sae"] - ce["clean"],
        "recovered_zero": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "recovered_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "kl": sums["kl"] / sums["n_kl"],
        "kl_zero": sums["kl_zero"] / sums["n_kl"],
        "kl_div_score": 1 - sums["kl"] / sums["kl_zero"],
    }
