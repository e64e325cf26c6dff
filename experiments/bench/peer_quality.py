"""Train one peer's TopK SAE on the shared activations, with its own trainer and defaults (run by quality.py).

    python peer_quality.py NAME --input FILE --out FILE --shape B,d,F,k --seed N

FILE in: `train` [N, d] raw activations, `order` [tokens] row numbers, `held_out` [M, d].
FILE out: encoder [F, d], b_enc [F], W_dec [F, d], b_dec [d], raw units, such that the SAE is
relu(topk((x − b_dec)·encoderᵀ + b_enc))·W_dec + b_dec; and `fvu`, what the peer's own classes give on
`held_out`, so that a wrong conversion cannot pass.
"""

import argparse
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn


def pooled_fvu(x: Tensor, reconstruct) -> float:
    """Squared error over squared distance from the mean of the whole set."""
    error = torch.zeros((), dtype=torch.float64)
    for chunk in x.split(2048):
        error += (chunk.float() - reconstruct(chunk.float())).double().square().sum()
    x64 = x.double()
    return (error / (x64 - x64.mean(0)).square().sum()).item()


def saelens(data: dict[str, Tensor], shape: tuple[int, int, int, int], seed: int, normalize: bool) -> dict[str, Tensor]:
    """SAELens 6.54: `SAETrainer.fit` itself (training/sae_trainer.py:159-229) on TopKTrainingSAE.

    Its defaults (config.py:723-744, those of LanguageModelSAERunnerConfig :257-275 agree): batch 4096, Adam
    (0.9, 0.999), lr 3e-4 constant, no warm-up, no decay, clip 1.0 (sae_trainer.py:412), dead after 1,000
    steps. TopK (topk_sae.py:351-354, saes/sae.py:157-165, 901): AuxK coefficient 1, decoder norm 0.1 and
    rescaling by it, b_dec 0 and subtracted from the input, no normalisation of activations. `normalize` is
    its expected_average_only_in, which is not the default; the norm is estimated on 20 batches instead of
    1,000 (config.py:744).
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    B, d, F, k = shape
    kind = "expected_average_only_in" if normalize else "none"
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=F, k=k, normalize_activations=kind))
    cfg = SAETrainerConfig(
        total_training_samples=data["order"].shape[0],
        train_batch_size_samples=B,
        lr_end=3e-5,  # its runner sets lr / 10; only cosine schedules read it
        n_batches_for_norm_estimate=20,
    )
    sae = SAETrainer(cfg, sae, data_provider=_batches(data, B)).fit()
    with torch.no_grad():
        fvu = pooled_fvu(data["held_out"], sae)
        norm = sae.W_dec.norm(dim=1)
        return {
            "encoder": sae.W_enc.T * norm[:, None],
            "b_enc": sae.b_enc * norm,
            "W_dec": sae.W_dec / norm[:, None],
            "b_dec": sae.b_dec.detach(),
            "fvu": torch.tensor(fvu),
        }


def _batches(data: dict[str, Tensor], B: int) -> Iterator[Tensor]:
    while True:
        for rows in data["order"].split(B):
            yield data["train"][rows].float()


class _Rows(nn.Module):
    """Row numbers → activations: what sparsify's trainer hooks in place of a model's layer."""

    def __init__(self, acts: Tensor):
        super().__init__()
        self.acts = acts

    def forward(self, ids: Tensor) -> Tensor:
        return self.acts[ids].float()


class _Model(nn.Module):
    """The least that sparsify's trainer asks of a language model."""

    config = SimpleNamespace(num_hidden_layers=1)
    device = torch.device("cpu")
    dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    def __init__(self, acts: Tensor):
        super().__init__()
        self.site = _Rows(acts)

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(input_ids)


def sparsify(data: dict[str, Tensor], shape: tuple[int, int, int, int], seed: int, optimizer: str) -> dict[str, Tensor]:
    """eai-sparsify 1.3.3: `Trainer.fit` itself (sparsify/trainer.py:241-634), hooked on rows instead of a
    layer.

    Its defaults (config.py:46-113): signum = schedule-free SignSGD, momentum 0.95, lr 5e-3/sqrt(F/2^14)
    (trainer.py:160-173), AuxK and Multi-TopK off, b_dec = mean of the first batch (:421), decoder of unit
    norm with projected gradients, loss = the batch's FVU. One batch is 32 sequences (config.py:50); of 128
    tokens here, so 4,096 tokens, as for everybody. `adam` is its other choice: 2e-4/sqrt(F/2^14), 1,000
    steps of warm-up (:107-145).
    """
    import os

    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from datasets import Dataset
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

    B, _, F, k = shape
    context = 128 if B % 128 == 0 else 1
    rows = data["order"].view(-1, context)
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            SparseCoderConfig(num_latents=F, k=k),
            batch_size=B // context,
            optimizer=optimizer,
            hookpoints=["site"],
            init_seeds=[seed],
            save_every=10**9,
            save_dir=folder,
            run_name="run",
            log_to_wandb=False,
        )
        dataset = Dataset.from_dict({"input_ids": rows.numpy()}).with_format("torch")
        Trainer(cfg, dataset, _Model(data["train"])).fit()  # pyright: ignore[reportArgumentType]
        sae = SparseCoder.load_from_disk(f"{folder}/run/site")
    with torch.no_grad():
        fvu = pooled_fvu(data["held_out"], lambda x: sae(x).sae_out)
    assert sae.W_dec is not None
    return {
        "encoder": sae.encoder.weight.detach(),
        "b_enc": sae.encoder.bias.detach(),
        "W_dec": sae.W_dec.detach(),
        "b_dec": sae.b_dec.detach(),
        "fvu": torch.tensor(fvu),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--input", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from safetensors.torch import load_file, save_file

    data = load_file(options.input)
    B, d, F, k = (int(n) for n in options.shape.split(","))
    if options.name.startswith("SAELens"):
        found = saelens(data, (B, d, F, k), options.seed, normalize=options.name.endswith("normed"))
    else:
        found = sparsify(data, (B, d, F, k), options.seed, "adam" if options.name.endswith("adam") else "signum")
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, options.out)


if __name__ == "__main__":
    main()
