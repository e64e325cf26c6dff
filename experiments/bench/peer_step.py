"""One contender in one process: builds its trainer, then times rounds of steps as commands come on stdin.

    python peer_step.py NAME --acts FILE --shape B,d,F,k   (contender.py does, with the contender's interpreter)
    stdin   "round STEPS SECONDS": time up to STEPS steps (at least 2), stopping once SECONDS have passed
            "memory STEPS": the peak of so many steps; "phases STEPS" (ours only): seconds by kernel
    stdout  one JSON object a line: {"ready": …} after construction, then {"seconds": [a step, …]} per round,
            {"peak_bytes": …}, {"phases": …}; each with what is known of the last step (non-zeros, L0, …)

Everybody starts from the same weights (unit decoder rows, encoder = decoder, b_dec = the mean) and takes the
same batches in the same order. Peers run what their own trainers run, with their own classes; loading,
logging and the language model are left out, in their favour. Where a step is spelt out here, it cites the
peer's lines.

Memory: the kernel's high-water mark of the process (VmHWM, reset before the steps through clear_refs), less what
was resident before anything of this size was built, less the bytes of parameters and optimizer state. A tiny
instance of the same trainer has taken steps by then, so that libraries and their pools are counted for nobody.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]
TINY = (64, 512, 8)  # B, F, k of the instance that loads libraries


@dataclass(frozen=True)
class Trainer:
    step: Callable[[Tensor], None]
    """One batch [B, d] float32, normed."""
    held: Callable[[], int]
    """Bytes of parameters and optimizer state, the low-precision copy of the weights among them."""
    facts: Callable[[], dict[str, Any]] = dict
    """What is known of the last step."""


def shared_weights(acts: Tensor, F: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Decoder rows [F, d] of unit norm (the encoder starts as the same) and b_dec [d], for everybody."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(F, acts.shape[1], generator=generator)
    return rows.div_(rows.norm(dim=1, keepdim=True)), acts[:8192].float().mean(0)


def batches(acts: Tensor, B: int) -> Iterator[Tensor]:
    """Endless batches [B, d] float32, the same for everybody."""
    assert acts.shape[0] >= B, f"{acts.shape[0]} activations are fewer than a batch of {B}"
    while True:
        for start in range(0, acts.shape[0] - B + 1, B):
            yield acts[start : start + B].float()


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among them."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def held_by(parameters: Iterable[Tensor], optimizer) -> int:
    """Bytes of parameters and of everything torch's optimizer keeps for them."""
    return size_of(parameters) + sum(size_of(state.values()) for state in optimizer.state.values())


def sparsify(acts: Tensor, shape: Shape, optimizer: str) -> Trainer:
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

    return Trainer(step, lambda: held_by(sae.parameters(), opt))


def saelens(acts: Tensor, shape: Shape, autocast: bool) -> Trainer:
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

    return Trainer(step, lambda: held_by(sae.parameters(), trainer.optimizer))


def dictionary_learning(acts: Tensor, shape: Shape, autocast: bool) -> Trainer:
    """dictionary_learning 0.1.0, `TopKTrainer.update` (trainers/top_k.py): float32, unfused Adam, clip.

    `autocast` runs it under bfloat16 autocast with inputs cast before, as its trainSAE does when asked
    (training.py:137-141, 200, 237); there it is for CUDA only, here it is given on the CPU too.
    """
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
        context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with context:
            trainer.update(next(steps), x.bfloat16() if autocast else x)

    return Trainer(step, lambda: held_by(trainer.ae.parameters(), trainer.optimizer))


def build(name: str, acts: Tensor, shape: Shape, dtype: str) -> Trainer:
    """The trainer of a contender by its name in step.py's table."""
    if name.startswith("sparsify"):
        return sparsify(acts, shape, "adam" if name.endswith("adam") else "signum")
    if name.startswith("SAELens"):
        return saelens(acts, shape, autocast=name.endswith("autocast"))
    if name.startswith("dictionary_learning"):
        return dictionary_learning(acts, shape, autocast=name.endswith("autocast"))
    import own_step  # in our own interpreter only

    return own_step.build(name, acts, shape, dtype)


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status (VmRSS, VmHWM, VmSwap); Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: memory is measured on Linux only.")


def reset_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def load_libraries(name: str, acts: Tensor, dtype: str) -> None:
    """Two steps of a tiny instance, then forget it."""
    B, F, k = TINY
    tiny = build(name, acts, (B, acts.shape[1], F, k), dtype)
    for _ in range(2):
        tiny.step(acts[:B].float())
    del tiny
    gc.collect()


def timed(trainer: Trainer, source: Iterator[Tensor], count: int, limit: float) -> list[float]:
    """Seconds of up to `count` steps (at least 2), stopping once `limit` seconds have passed."""
    seconds: list[float] = []
    while len(seconds) < count and (len(seconds) < 2 or sum(seconds) < limit):
        x = next(source)
        start = time.perf_counter()
        trainer.step(x)
        seconds.append(time.perf_counter() - start)
    return seconds


def peak_above_held(trainer: Trainer, source: Iterator[Tensor], count: int, before: int) -> int:
    """Bytes at the peak of `count` steps, above `before` and what the trainer must hold."""
    gc.collect()
    reset_peak()
    for _ in range(count):
        trainer.step(next(source))
    return resident("VmHWM") - before - trainer.held()


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
    load_libraries(options.name, acts, options.dtype)
    before = resident("VmRSS") if Path("/proc/self/status").exists() else 0
    trainer = build(options.name, acts, (B, d, F, k), options.dtype)
    source = batches(acts, B)
    print(json.dumps({"ready": options.name, "threads": torch.get_num_threads()}), file=answers, flush=True)
    for line in sys.stdin:
        verb, *words = line.split()
        if verb == "round":
            answer: dict[str, Any] = {"seconds": timed(trainer, source, int(words[0]), float(words[1]))}
        elif verb == "memory":
            answer = {"peak_bytes": peak_above_held(trainer, source, int(words[0]), before)}
        else:
            from phases import by_phase  # in our own interpreter only

            answer = {"phases": by_phase(trainer, source, int(words[0]))}
        print(json.dumps(answer | {"facts": trainer.facts()}), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
