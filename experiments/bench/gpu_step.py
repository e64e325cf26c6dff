"""Training steps on a GPU as gpu.py times them: ours of each architecture, captured or eager, and plain torch's.

Weights begin as random directions; activations are sparse mixtures in which some directions are in most rows, so that
some features are hot.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from sae.kernels import Adam, Rule, TopK, Work, by_feature, decode, encode_select, reconstruct, update_rows
from sae.objectives import Params, objective
from sae.recipe import Recipe, SAERecipe, TrainingRecipe
from sae.training.capture import learner
from sae.training.dead import Dead
from sae.training.optimizer import RowAdam
from tests.gpu.checks import mixture

Shape = tuple[int, int, int, int]
LR = 1e-4
VARIANTS = {
    "topk": {"architecture": "topk"},
    "batchtopk": {"architecture": "batchtopk"},
    "matryoshka": {"architecture": "matryoshka"},
    "jumprelu": {"architecture": "jumprelu", "jumprelu_sparsity_loss_mode": "step"},
}


def times_ms(step: Callable[[], object], *, steps: int, warm_up: int = 3) -> list[float]:
    """Milliseconds of each of `steps` calls, by events on the device."""
    for _ in range(warm_up):
        step()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def median_ms(step: Callable[[], object], *, steps: int) -> float:
    return statistics.median(times_ms(step, steps=steps))


def directions(F: int, d: int, device: str) -> Tensor:
    rows = torch.randn(F, d, generator=torch.Generator(device).manual_seed(1), device=device)
    return rows.div_(rows.norm(dim=1, keepdim=True))


class Inputs:
    """What the kernels of one step read, for timing them one by one."""

    def __init__(self, shape: Shape, device: str):
        self.shape = shape
        B, d, F, k = shape
        self.x = mixture(B, d, device)
        self.W_dec = directions(F, d, device)
        self.encoder, self.low = self.W_dec.clone(), self.W_dec.bfloat16()
        self.b_enc, self.b_dec = torch.zeros(F, device=device), torch.zeros(d, device=device)
        self.codes = encode_select(self.x, self.low, self.b_enc, TopK(k))
        made = reconstruct(self.codes, self.W_dec, self.b_dec, self.x)
        self.work = Work(self.codes, self.x, made.error, made.value_grads, (F,), True)
        self.transposed = by_feature(self.codes)
        self.moments = tuple(Adam(torch.zeros_like(self.W_dec), torch.zeros_like(self.W_dec), 1) for _ in range(2))
        self.rule = Rule(1e-9)

    def calls(self) -> dict[str, Callable[[], object]]:
        """One step's kernels, and decode."""
        return {
            "encode_select": lambda: encode_select(self.x, self.low, self.b_enc, TopK(self.shape[3])),
            "reconstruct": lambda: reconstruct(self.codes, self.W_dec, self.b_dec, self.x),
            "by_feature": lambda: by_feature(self.codes),
            "update_rows": lambda: update_rows(
                self.encoder, self.W_dec, self.low, self.moments, self.work, self.transposed, self.rule
            ),
            "decode": lambda: decode(self.codes, self.W_dec, self.b_dec),
        }


def ours(shape: Shape, device: str, name: str = "topk", betas: tuple[float, float] = (0.9, 0.999)):
    """step(), which trains on batch after batch of eight, and the learner behind it."""
    B, d, F, k = shape
    recipe = Recipe(sae=SAERecipe(d_sae=F, k=k, **VARIANTS[name]), training=TrainingRecipe(batch=B))
    batches = list(mixture(8 * B, d, device).split(B))
    W_dec = directions(F, d, device)
    params = Params(W_dec.clone(), W_dec, torch.zeros(F, device=device), torch.zeros(d, device=device))
    params.encoder_low = params.encoder.bfloat16()
    if name in ("batchtopk", "matryoshka"):
        params.ema_threshold = torch.tensor(-1.0, device=device)
    if name == "jumprelu":  # one threshold for all, above which k a row are
        pre = (batches[0][:256].bfloat16() @ params.encoder_low.T).float()
        params.log_threshold = pre.flatten().topk(len(pre) * k).values[-1].log().expand(F).clone()
    trained = objective(recipe, variance=float(d), low=True)
    optimizer, dead = RowAdam(params, betas=betas), Dead(F, 10**9, device)
    learn = learner(name, params, trained, optimizer, dead)
    turn = iter(range(10**9))

    def step() -> object:
        return learn([batches[next(turn) % len(batches)]], LR, 0.5)

    return step, learn


def dense(shape: Shape, device: str) -> Callable[[], object]:
    """The same step as most people write it: autograd, bfloat16 autocast, fused Adam, unit norm."""
    B, d, F, k = shape
    batches = list(mixture(8 * B, d, device).split(B))
    W_dec = torch.nn.Parameter(directions(F, d, device))
    W_enc = torch.nn.Parameter(W_dec.detach().clone())
    b_enc, b_dec = (torch.nn.Parameter(torch.zeros(n, device=device)) for n in (F, d))
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=LR, fused=True)
    turn = iter(range(10**9))

    def step() -> None:
        x = batches[next(turn) % len(batches)]
        with torch.autocast("cuda", torch.bfloat16):
            pre = torch.nn.functional.linear(x - b_dec, W_enc, b_enc)
            top, at = pre.topk(k, dim=1, sorted=False)
            acts = torch.zeros_like(pre).scatter(1, at, top.relu())
            made = acts @ W_dec
        loss = (made.float() + b_dec - x).square().sum(1).mean() / d
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            grad = W_dec.grad
            assert grad is not None
            grad -= (grad * W_dec).sum(1, keepdim=True) * W_dec
            optimizer.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def sparsify(shape: Shape, device: str) -> Callable[[], object]:
    """eai-sparsify with its Triton decoder, fused Adam and bfloat16 autocast; the steps of peer_step.py."""
    from sparsify import SparseCoder, SparseCoderConfig

    B, d, F, k = shape
    torch.set_float32_matmul_precision("high")
    batches = list(mixture(8 * B, d, device).split(B))
    sae = SparseCoder(d, SparseCoderConfig(num_latents=F, k=k), device=device, dtype=torch.float32)
    sae.encoder.weight.data.copy_(directions(F, d, device))
    sae.W_dec.data.copy_(sae.encoder.weight.data)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    since_fired = torch.zeros(F, dtype=torch.long, device=device)
    turn = iter(range(10**9))

    def step() -> None:
        x = batches[next(turn) % len(batches)]
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(B)
        since_fired[out.latent_indices.flatten()] = 0

    return step


def saelens(shape: Shape, device: str) -> Callable[[], object]:
    """SAELens' own trainer with its autocast; see peer_step.py."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    B, d, F, k = shape
    batches = list(mixture(8 * B, d, device).split(B))
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=F, k=k, device=device))
    sae.W_dec.data.copy_(directions(F, d, device))
    sae.W_enc.data.copy_(sae.W_dec.data.T)
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=B, lr_end=3e-5, autocast=True, device=device
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step() -> None:
        trainer.step(batches[trainer.n_training_steps % len(batches)])
        trainer.n_training_steps += 1

    return step
