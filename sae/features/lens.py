"""What a feature makes the model say: the logit lens of its decoder row, and its output score.

`logit_lens` reads a direction through the final norm's linear part and the unembedding: no forward, one [n,
d]·[d, V] product. `output_scores` adds the direction at the last position of a few neutral beginnings and
looks at the next token (Arad, Mueller, Belinkov 2025): one token a feature and beginning, batched over
features, the beginnings' KV cache computed once and only the layers from the hook's on. Activations and
amplitudes are in raw units. Cost of a score: one token through the layers from the hook's on and the
unembedding (SmolLM2 at layer 15, bfloat16: some 2 ms of one core). Not known here: what happens after the
first token, and whether a feature detects what it says (search.py).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae import token_norm
from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae.autoencoder import SAE
    from sae.host import Host

QUESTION = "What do you think?"
"""The user's turn before a beginning, for hosts with a chat template."""
BEGINNINGS = (
    "From my experience,",
    "I would say that",
    "The main thing is",
    "Let me tell you about",
    "Today I saw",
)
"""Neutral beginnings of the answer; the first is the paper's own."""
AMPLITUDE = {"own": 5.0, "strongest": 10.0}
"""Multiples: of the feature's own maximum (ours), or of the strongest activation at that position (the
paper's)."""


@dataclass(frozen=True)
class Lens:
    """Per direction the most promoted and most suppressed tokens; values are logits less their mean over
    V."""

    top: Int[Tensor, "n m"]
    top_values: Float[Tensor, "n m"]
    bottom: Int[Tensor, "n m"]
    bottom_values: Float[Tensor, "n m"]


@dataclass(frozen=True)
class OutputScores:
    """score [n] in 0..1; `says` the tokens that gain most under the feature, `says_p` their mean probability
    then."""

    score: Float[Tensor, " n"]
    says: Int[Tensor, "n m"]
    says_p: Float[Tensor, "n m"]


def logit_lens(host: Host, rows: Float[Tensor, "n d"], top: int = 20, *, batch: int = 256) -> Lens:
    """The logit lens of directions: W_U·N(w) less its mean over the vocabulary, N the final norm's linear
    part.

    N centres (LayerNorm only) and multiplies by the gain; it does not divide by the norm of w, for a
    direction has no scale. Memory: `batch` rows of [V] in float32. Ties between tokens go either way.
    """
    model: Any = host.model
    head = model.get_output_embeddings()
    if rows.shape[-1] != head.weight.shape[1]:
        raise UserError(
            f"logit lens: the directions have width {rows.shape[-1]:,}, the host's output "
            f"{head.weight.shape[1]:,}. Use a hook of the residual stream's width."
        )
    gain, centres = _final_norm(host)
    W_U = head.weight.detach().float()
    mean = W_U.mean(0)
    parts = []
    for w in rows.detach().to(W_U.device, torch.float32).split(batch):
        if centres:
            w = w - w.mean(-1, keepdim=True)
        w = w * gain
        logits = w @ W_U.T - (w @ mean)[:, None]
        up, down = logits.topk(top), logits.topk(top, largest=False)
        parts.append((up.indices, up.values, down.indices, down.values))
    columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    return Lens(columns[0].int(), columns[1], columns[2].int(), columns[3])


def unembedding_rows(host: Host, ids: Sequence[int]) -> Float[Tensor, "n d"]:
    """The directions of the residual stream that make tokens likelier than the vocabulary's mean: what `logit_lens`
    reads, as vectors."""
    model: Any = host.model
    W_U = model.get_output_embeddings().weight.detach().float()
    gain, centres = _final_norm(host)
    rows = (W_U[list(ids)] - W_U.mean(0)) * gain
    return rows - rows.mean(-1, keepdim=True) if centres else rows


def _final_norm(host: Host) -> tuple[Tensor, bool]:
    """The gain [d] of the norm before the unembedding, and whether it centres."""
    inside = {id(module) for layer in _layers(host) for module in layer.modules()}
    norm: Any = None
    for module in host.model.modules():
        weight = getattr(module, "weight", None)
        if id(module) not in inside and isinstance(weight, Tensor) and weight.shape == (host.d_model,):
            norm = module  # the last one outside the layers: an embedding's norm comes before it
    if norm is None:
        return torch.ones(host.d_model, device=host.device), False
    weight = norm.weight.detach()
    with torch.no_grad():
        answer = norm(torch.ones(1, 1, host.d_model, dtype=weight.dtype, device=weight.device)).flatten().float()
        if getattr(norm, "bias", None) is not None:
            answer = answer - norm.bias.float()
    # The vector of ones has root mean square 1 and does not deviate from its mean: an RMS norm answers with
    # its gain (Gemma's 1+γ needs no case of its own), a centring norm with zeros.
    if isinstance(norm, nn.LayerNorm) or answer.abs().max() < 1e-6 * weight.float().abs().max():
        return weight.float(), True
    return answer, False


def _layers(host: Host) -> list[nn.Module]:
    for module in host.model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == host.n_layers:
            return list(module)
    return []


@dataclass
class _Beginning:
    """One neutral beginning: the cache up to its last token, and what the unsteered model does with that
    token."""

    tokens: Tensor  # [1, T]
    cache: Any  # of tokens[:, :-1]; None where the host keeps none
    below: Tensor | None  # [1, 1, d] what the layer under the hook's answers for the last token
    strongest: float  # the strongest feature activation at the last token
    logp: Tensor  # [V] of the unsteered next token
    unit: Tensor  # [1, 1] how long an activation of 1 is there: 1 but for an SAE that norms each token


def output_scores(
    host: Host,
    sae: SAE,
    features: Sequence[int] | Tensor,
    hook: str,
    *,
    top_tokens: Int[Tensor, "n m"] | None = None,
    max_act: Float[Tensor, " F"] | None = None,
    amplitude: str = "own",
    times: float | None = None,
    beginnings: Sequence[str] = BEGINNINGS,
    says: int = 10,
    batch: int = 128,
    progress: Callable[[int], object] | None = None,
) -> OutputScores:
    """S_out = (1 − min rank/V)·max p over the feature's top lens tokens, averaged over the beginnings.

    amplitude  "own": times (5) × the feature's own maximum; "strongest": times (10) × the strongest
               activation there
    hook       where the SAE reads
    max_act    recorded maxima [F]; by default those the SAE carries
    says       tokens ordered by their mean share p·(log p − log p₀) of the steered KL
    progress   called with the number of features done
    The vector is added at the last position only, where the SAE writes, and the error term stays:
    x + amplitude·W_dec[i].
    """
    if amplitude not in AMPLITUDE:
        raise UserError(f"output score: amplitude {amplitude!r} is not one of {', '.join(AMPLITUDE)}. Use one of them.")
    which = torch.as_tensor(features, dtype=torch.int64).cpu()
    hook = host.hook(hook)
    if not len(which):
        return OutputScores(torch.zeros(0), torch.zeros(0, says, dtype=torch.int32), torch.zeros(0, says))
    sae.check_features([int(which.min()), int(which.max())])
    if max_act is None:
        if sae.stats is None:
            raise UserError(
                "output score: this SAE has no recorded maxima. Give it an index, or take statistics first."
            )
        max_act = sae.stats.max_act
    own = max_act.cpu().float()[which]
    W_dec = sae.W_dec.detach()[which.to(sae.W_dec.device)].float()
    if top_tokens is None:
        top_tokens = logit_lens(host, W_dec).top
    times = AMPLITUDE[amplitude] if times is None else times
    written = hook if sae.cfg.d_out is None else host.hook(sae.hook_out)
    layers = _layers(host)[: host.layer(written)]
    starts = [_begin(host, sae, hook, layers, text) for text in beginnings]
    score, tokens, chances = [], [], []
    for at in torch.arange(len(which)).split(batch):
        gained = probability = total = 0
        for start in starts:
            size = own[at] if amplitude == "own" else torch.full((len(at),), start.strongest)
            added = W_dec[at.to(W_dec.device)].to(host.device) * (times * size).to(host.device)[:, None]
            logits = _last_logits(host, written, layers, start, added * start.unit)
            wanted = top_tokens[at].to(logits.device).long()
            best = logits.gather(1, wanted).amax(1)
            logits_sum = logits.logsumexp(1)
            rank = (logits > best[:, None]).count_nonzero(1)
            total = total + (1 - rank / logits.shape[1]) * (best - logits_sum).exp()
            logp = logits - logits_sum[:, None]
            p = logp.exp()
            gained = gained + p * (logp - start.logp)
            probability = probability + p
        assert isinstance(total, Tensor) and isinstance(gained, Tensor) and isinstance(probability, Tensor)
        score.append((total / len(starts)).cpu())
        best_tokens = gained.topk(says).indices
        tokens.append(best_tokens.int().cpu())
        chances.append((probability.gather(1, best_tokens) / len(starts)).cpu())
        if progress is not None:
            progress(len(at))
    return OutputScores(torch.cat(score), torch.cat(tokens), torch.cat(chances))


def beginning_tokens(host: Host, text: str) -> Int[Tensor, "1 T"]:
    """`text` as the start of the assistant's turn, or as plain text for a host without a chat template."""
    plain = host.tokenizer(text, add_special_tokens=not host.tokenizer.chat_template)["input_ids"]
    tokens = torch.tensor([plain], dtype=torch.int64, device=host.device)
    if host.tokenizer.chat_template:
        tokens = torch.cat([host.chat_tokens(QUESTION).to(tokens.device), tokens], 1)
    return tokens


@torch.inference_mode()
def _begin(host: Host, sae: SAE, hook: str, layers: list[nn.Module], text: str) -> _Beginning:
    tokens = beginning_tokens(host, text)
    x = host.activations(tokens, [hook])[hook][0, -1:]
    strongest = float(sae.encode_sparse(x.to(sae.W_dec.device)).values.max())
    kind = sae.cfg.normalize_activations if sae.cfg.d_out is None else "none"  # a transcoder writes in the host's units
    unit = torch.ones(1, 1, device=x.device) if kind == "none" else token_norm.scale(kind, x.float())
    cache = host.model(tokens[:, :-1], use_cache=True).past_key_values if tokens.shape[1] > 1 else None
    answers: list[Any] = []
    handle = layers[-1].register_forward_hook(lambda *call: answers.append(call[2])) if layers else None
    try:
        start = _Beginning(tokens, cache, None, strongest, torch.zeros(()), unit)
        start.logp = _last_logits(host, hook, [], start, None)[0].log_softmax(-1)
    finally:
        if handle is not None:
            handle.remove()
    # A layer that answers with more than its hidden state is run again each time: slower, never wrong.
    if cache is not None and answers and isinstance(answers[0], Tensor):
        start.below = answers[0]
    return start


@torch.inference_mode()
def _last_logits(
    host: Host, hook: str, layers: list[nn.Module], start: _Beginning, added: Float[Tensor, "B d"] | None
) -> Float[Tensor, "B V"]:
    """Next-token logits (float32) with each row of `added` added at the last position at the hook."""
    B = 1 if added is None else len(added)
    tokens = start.tokens if start.cache is None else start.tokens[:, -1:]

    def edit(x: Tensor, at: object) -> Tensor:
        assert added is not None
        edited = x.clone()
        edited[:, -1] = (x[:, -1].float() + added).to(x.dtype)
        return edited

    edits = [] if added is None else [(hook, edit)]
    kept = {} if start.cache is None else {"past_key_values": _copies(start.cache, B), "use_cache": True}
    below = None if start.below is None else start.below.expand(B, -1, -1)
    with _answering(layers, below), host.hooks(edits):
        return host.model(tokens.expand(B, -1), **kept).logits[:, -1].float()


def _copies(cache: Any, B: int) -> Any:
    """The cache for B rows, as views: its update concatenates, so nothing is written through them."""
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None or type(layer).__name__ != "DynamicLayer":
            cache.batch_repeat_interleave(B)
            return cache
    for layer in cache.layers:
        layer.keys = layer.keys.expand(B, *layer.keys.shape[1:])
        layer.values = layer.values.expand(B, *layer.values.shape[1:])
    return cache


@contextlib.contextmanager
def _answering(layers: list[nn.Module], answer: Tensor | None) -> Iterator[None]:
    """While inside, the layers under the hook's answer with what is known already instead of computing it."""
    if answer is None or any("forward" in vars(layer) for layer in layers):  # someone else's wrapper: leave it
        yield
        return
    try:
        for layer in layers:
            layer.forward = lambda *args, **kwargs: answer
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
