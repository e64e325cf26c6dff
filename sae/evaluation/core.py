"""SAEBench's core evaluation on held-out text, with our definitions (methods.md §0-1) and an interval on
every figure.

Raw activations at the SAE's hook; positions count that the text's mask keeps and whose norm is below the
SAE's outlier limit. Every other position keeps x in all spliced forwards, and zero and mean ablation act on
the same positions as the SAE. Host in its own dtype, SAE in float32, sums in float64, log-softmax in float32.
Cost: a forward up to the hook for most rows, a whole one and three from the hook on for the share of rows,
spread evenly over the text, on which cross-entropy and KL are taken. Memory: the token rows, some 2^26 logits
at a time twice, two [clusters, d] sums. What is held out is the caller's decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.errors import UserError
from sae.evaluation.forwards import Forwards
from sae.evaluation.reconstruction import quick
from sae.evaluation.report import headline, make_report
from sae.host import Host
from sae.text import Rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["evaluate", "headline", "quick"]

LOGITS = 2**26  # logits in one forward: 256 MB in float32
READ = 4096  # positions in a forward that stops at the hook
MAX_CLUSTERS = 2_000  # more are pooled, so that the [clusters, d] sums stay small


@torch.no_grad()
def evaluate(
    sae: Any,
    host: Host,
    rows: Iterable[Rows],
    *,
    tokens: int = 20_000,
    ce_tokens: int = 5_000,
    groups: Sequence[str] | None = None,
    mean: Float[Tensor, " d"] | None = None,
    noise_draws: int = 0,
    details: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Evaluate an SAE on text: a report in the shape of SAEBench's core file, ready for JSON.

    rows         held-out token rows of one width; read until they hold `tokens` valid positions
    ce_tokens    valid positions for cross-entropy and KL; 0 leaves these out (None in the report)
    groups       group of each document number, the cluster of the intervals; None: each document is its own
    mean         for mean ablation, raw units; None: the mean of the evaluated positions (noted in the report)
    noise_draws  > 0 adds KL against random errors of equal norm, isotropic and as activations vary (§1.13):
                 two more forwards from the hook on a draw
    progress     called with (positions run through the host, all that will be)
    returns      `eval_result_metrics` holds SAEBench's names; `eval_result_unstructured["goldengate"]` every
                 figure as {value, low, high, tokens, documents, clusters}, masked shares, density histogram
                 and notes
    raises       UserError for text without valid positions, or an SAE of another width than the hook
    """
    hook, written = _hooks(sae, host)
    text = _take(rows, tokens)
    clusters, n_clusters = _clusters(text.doc, groups)
    run = Forwards(sae, host, hook, written, text, clusters, n_clusters, noise_draws, seed)
    T = text.tokens.shape[1]
    for_ce = _spread(text.mask.sum(1), ce_tokens)
    spliced = _batches(for_ce, LOGITS // (T * len(host.tokenizer)))
    read = _batches(~for_ce, READ // T)
    forwards = 3 + 2 * noise_draws
    ce_positions, read_positions = int(for_ce.sum()) * T, int((~for_ce).sum()) * T
    tell = _progress(progress, ce_positions * (forwards + 1) + read_positions)
    for at in spliced:
        run.spliced(at)
        tell(len(at) * T * forwards)
    for at in read:
        run.read(at)
        tell(len(at) * T)
    if run.reconstruction.n_tokens == 0:
        raise UserError(
            "evaluate: every position is above the SAE's outlier limit (0 left). "
            "Check that the SAE was trained on this host."
        )
    for at in spliced:  # only now is the mean of the whole set known
        run.mean_ablated(at, run.reconstruction.mean if mean is None else mean)
        tell(len(at) * T)
    return make_report(run, details=details, mean_given=mean is not None, asked=(tokens, ce_tokens))


def _hooks(sae: Any, host: Host) -> tuple[str, str]:
    """Where the SAE reads and where it writes."""
    name = sae.cfg.metadata.hook_name
    found = host.hook(name), host.hook(getattr(sae, "hook_out", name))
    for hook, own in zip(found, (sae.cfg.d_in, getattr(sae, "d_out", sae.cfg.d_in)), strict=True):
        width = host.width(hook)
        if width != own:
            raise UserError(
                f"evaluate: the SAE has width {own:,}, {hook} of {host.name} has {width:,}. "
                "Use the host it was trained on."
            )
    return found


def _take(rows: Iterable[Rows], tokens: int) -> Rows:
    """The first rows that hold `tokens` valid positions, as one."""
    taken: list[Rows] = []
    missing = tokens
    for batch in rows:
        reached = batch.mask.sum(1).cumsum(0)
        n = min(int((reached < missing).sum()) + 1, len(reached))
        taken.append(Rows(batch.tokens[:n], batch.doc[:n], batch.pos[:n], batch.mask[:n]))
        missing -= int(batch.mask[:n].sum())
        if missing <= 0:
            break
    if missing == tokens:
        raise UserError("evaluate: the text has no valid token (0). Give more text, or hold out a larger share.")
    parts = [[getattr(batch, name) for batch in taken] for name in ("tokens", "doc", "pos", "mask")]
    return Rows(*(torch.cat(part).cpu() for part in parts))


def _spread(valid: Int[Tensor, " R"], tokens: int) -> Bool[Tensor, " R"]:
    """Rows that together hold about `tokens` of the valid positions, spread evenly over the text."""
    total = int(valid.sum())
    if tokens >= total:
        return valid > 0
    # A row is taken whenever the running share of positions passes the next whole number of average rows.
    average = total / len(valid)
    reached = torch.ceil(valid.cumsum(0).to(torch.float64) * (tokens / total / average) - 1e-9)
    return reached > torch.cat([reached.new_zeros(1), reached[:-1]])


def _clusters(doc: Int[Tensor, "R T"], groups: Sequence[str] | None) -> tuple[Int[Tensor, "R T"], int]:
    """The cluster of each position (0 at padding, which never counts), and how many there are."""
    highest = int(doc.max())
    if groups is not None and highest >= len(groups):
        raise UserError(f"evaluate: document {highest:,} has no group ({len(groups):,} given). Give one a document.")
    number: dict[Any, int] = {}
    of_doc = torch.zeros(highest + 1, dtype=torch.int64)
    for one in torch.unique(doc[doc >= 0]).tolist():
        of_doc[one] = number.setdefault(one if groups is None else groups[one], len(number)) % MAX_CLUSTERS
    return of_doc[doc.long().clamp_min(0)], min(len(number), MAX_CLUSTERS)


def _batches(wanted: Bool[Tensor, " R"], rows: int) -> list[Int[Tensor, " n"]]:
    """The wanted row numbers, at most `rows` at a time; an empty list where none is wanted."""
    return [at for at in wanted.nonzero().flatten().split(max(1, rows)) if len(at)]


def _progress(tell: Callable[[int, int], object] | None, total: int) -> Callable[[int], None]:
    done = 0

    def more(positions: int) -> None:
        nonlocal done
        done += positions
        if tell is not None:
            tell(done, total)

    return more
