"""One contender in one process: builds its trainer, then times rounds of steps as commands come on stdin.

    python peer_step.py NAME --acts FILE --shape B,d,F,k   (step.py does, with the contender's interpreter)
    stdin   "round STEPS SECONDS": time up to STEPS steps (at least 2), stopping once SECONDS have passed
    stdout  one JSON object a line: {"ready": …} after construction, then {"seconds": [a step, …]} per round

Everybody starts from the same weights (unit decoder rows, encoder = decoder, b_dec = the mean) and takes the
same batches in the same order. Peers run what their own trainers run, with their own classes; loading,
logging and the language model are left out, in their favour. Where a step is spelt out here, it cites the
peer's lines.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[Tensor], None]


def shared_weights(acts: Tensor, F: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Decoder rows [F, d] of unit norm (the encoder starts as the same) and b_dec [d], for everybody."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(F, acts.shape[1], generator=generator)
    return rows / rows.norm(dim=1, keepdim=True), acts[:8192].float().mean(0)


def batches(acts: Tensor, B: int) -> Iterator[Tensor]:
    """Endless batches [B, d] float32, the same for everybody."""
    assert acts.shape[0] >= B, f"{acts.shape[0]} activations are fewer than a batch of {B}"
    while True:
        for start in range(0, acts.shape[0] - B + 1, B):
            yield acts[start : start + B].float()


def sparsify(acts: Tensor, shape: tuple[int, int, int, int], optimizer: str) -> Step:
    """eai-sparsify 1.3.3, one step of sparsify/trainer.py `fit` on one hookpoint.

    Taken over: float32 matmul precision "high" (trainer.py:253); unit norm before the forward (:425); total
    variance (:452); did_fire (:463); `float(fvu)` (:467); loss and backward (:480-485); projection
    (:551-553); optimizer, zero_grad and scheduler (:555-560); dead counters (:567-576). "adam" is
    torch.optim.Adam at 2e-4/sqrt(F/2^14) with linear warm-up (:107-145; bitsandbytes' 8-bit Adam is CUDA
    only); "signum", the default, is schedule-free SignSGD at 5e-3/sqrt(F/2^14), momentum 0.95 (:160-173).
    AuxK is off by default (config.py:79).
    """
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    torch.set_float32_matmul_precision("high")
    _, d, F, k = shape
    sae = SparseCoder(d, SparseCoderConfig(num_latents=F, k=k), dtype=torch.float32)
    rows, mean = shared_weights(acts, F)
    sae.encoder.weight.data.copy_(rows)
    sae.W_dec.data.copy_(rows)
    sae.b_dec.data.copy_(mean)
    schedule = None
    if optimizer == "adam":
        opt = torch.optim.Adam(sae.parameters(), lr=2e-4 / (F / 2**14) ** 0.5)
        schedule = get_linear_schedule_with_warmup(opt, 1000, 100_000)
    else:
        opt = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 / (F / 2**14) ** 0.5), momentum=0.95)
        opt.train()
    did_fire = torch.zeros(F, dtype=torch.bool)
    since_fired = torch.zeros(F, dtype=torch.long)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        opt.step()
        opt.zero_grad()
        if schedule is not None:
            schedule.step()
        with torch.no_grad():
            since_fired.add_(x.shape[0])
            since_fired[did_fire] = 0
            did_fire.zero_()

    return step


def saelens(acts: Tensor, shape: tuple[int, int, int, int], autocast: bool) -> Step:
    """SAELens 6.54, `SAETrainer.step` itself (training/sae_trainer.py:291-304, 379-420).

    Defaults of SAETrainerConfig (config.py:723-744): unfused Adam 3e-4 (0.9, 0.999), constant, gradient clip
    1.0, dead window 1,000 steps, autocast off; of TopKTrainingSAEConfig (topk_sae.py:314-354): rescale by
    the decoder's norm, AuxK coefficient 1 (idle until a feature is dead). `autocast` is its documented
    faster setting (bf16).
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    B, d, F, k = shape
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=F, k=k))
    rows, mean = shared_weights(acts, F)
    sae.W_enc.data.copy_(rows.T)
    sae.W_dec.data.copy_(rows)
    sae.b_dec.data.copy_(mean)
    cfg = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=B, lr_end=3e-5, autocast=autocast)
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(acts: Tensor, shape: tuple[int, int, int, int]) -> Step:
    """dictionary_learning 0.1.0, `TopKTrainer.update` (trainers/top_k.py): float32, unfused Adam, clip."""
    import types

    # Its package imports nnsight for a buffer that the trainer never touches: an empty stand-in.
    sys.modules["nnsight"] = types.ModuleType("nnsight")
    sys.modules["nnsight"].LanguageModel = object  # pyright: ignore[reportAttributeAccessIssue]
    from dictionary_learning.trainers.top_k import TopKTrainer

    _, d, F, k = shape
    trainer = TopKTrainer(steps=10**6, activation_dim=d, dict_size=F, k=k, layer=0, lm_name="", device="cpu")
    rows, mean = shared_weights(acts, F)
    trainer.ae.encoder.weight.data.copy_(rows)
    trainer.ae.decoder.weight.data.copy_(rows.T)
    trainer.ae.b_dec.data.copy_(mean)
    steps = iter(range(1, 10**9))  # step 0 would compute a geometric median

    def step(x: Tensor) -> None:
        trainer.update(next(steps), x)

    return step


def build(name: str, acts: Tensor, shape: tuple[int, int, int, int], dtype: str) -> Step:
    """The step of a contender by its name in step.py's table."""
    if name.startswith("sparsify"):
        return sparsify(acts, shape, "adam" if name.endswith("adam") else "signum")
    if name.startswith("SAELens"):
        return saelens(acts, shape, autocast=name.endswith("autocast"))
    if name.startswith("dictionary_learning"):
        return dictionary_learning(acts, shape)
    import step as conductor  # in our own interpreter only

    return conductor.own_contender(name, acts, shape, dtype)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--acts", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a peer prints goes to stderr, so that stdout holds answers only
    from safetensors.torch import load_file

    acts = load_file(options.acts)["train"]
    B, d, F, k = (int(n) for n in options.shape.split(","))
    if options.name.startswith("sparsify"):
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its eager path; Triton needs a GPU
    step = build(options.name, acts, (B, d, F, k), options.dtype)
    source = batches(acts, B)
    print(json.dumps({"ready": options.name, "threads": torch.get_num_threads()}), file=answers, flush=True)
    for line in sys.stdin:
        _, count, limit = line.split()
        seconds: list[float] = []
        while len(seconds) < int(count) and (len(seconds) < 2 or sum(seconds) < float(limit)):
            x = next(source)
            start = time.perf_counter()
            step(x)
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
