"""Every knob on one page: one small frozen dataclass a room, in the order of flow.

Standard library only, so that flags and help need no torch. Each field is read by exactly one room (tested),
and the sentence under a field is its help: unit, where the default comes from, valid range. Counts may be
written as 4M or 20k, times as 60s or 5m. Deriving a value ("auto") is a function in the room that reads it;
a run's folder holds the recipe both as given and as resolved.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HostRecipe:
    name: str = "smollm2"
    """Language model: smollm2 (bundled), a Hugging Face id, a local folder or a GGUF file."""
    hook: str = "blocks.12.hook_resid_post"
    """Where activations are read and edited; names of TransformerLens, of its bridge or of Hugging Face."""
    dtype: str = "auto"
    """float32, bfloat16 or auto: bfloat16 where the processor has bfloat16 instructions."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


@dataclass(frozen=True)
class TextRecipe:
    source: str | dict[str, float] = "bundled"
    """bundled, a datasets name, or files by glob (.txt, .jsonl, .parquet); or a mixture with each one's share of the
    tokens, such as {bundled: 0.7, texts/*.jsonl: 0.3}, which ends with the first source that ends."""
    column: str = "text"
    """The column of a dataset, .jsonl or .parquet that holds text, messages (role, content) or token ids of the host's
    tokenizer; several, such as text,messages, are tried in turn."""
    context: int = 128
    """Tokens in a row."""
    held_out: float = 0.1
    """Share of documents, by hash of their group, that training never sees; 0 to 0.9."""
    isolate_documents: bool = True
    """Attention does not cross from one document in a row to the next."""
    max_tokens: int | None = None
    """Stop reading after so many tokens; none reads all."""
    positions: str | None = None
    """Only activations at these positions of a piece of text count, as a slice such as 4: or 0:64; none is all."""


@dataclass(frozen=True)
class ActivationsRecipe:
    store: str | None = None
    """Folder of the activation store, on disk or as s3://bucket/folder, harvested on first use; none streams from the
    host while training."""
    cached_activations_path: str | None = None
    """Folder of activations that SAELens cached (CacheActivationsRunner), which are read into the store in place of a
    forward of the host; text.context is then that of its rows, and text.source what is held out for evaluation."""
    dtype: str = "bfloat16"
    """Of the store: bfloat16, float32, or int8 with a scale a row (half the disk of bfloat16)."""
    compile: str = "auto"
    """Whether harvest runs the host's layers through torch.compile: on, off or auto (where it was measured to pay: CPUs
    with bfloat16 instructions, from 300k rows on)."""
    shard_rows: int = 65_536
    """Rows in a file of the store: what is lost at most when a harvest is killed."""
    min_sequences: int = 1000
    """Every batch draws on at least so many effective sequences (1/sum of squared shares) where the text has them."""


@dataclass(frozen=True)
class SAERecipe:
    architecture: str = "topk"
    """topk, batchtopk, matryoshka, jumprelu or relu."""
    d_sae: int = 8192
    """Number of features."""
    k: int = 32
    """Active features a token: exactly (topk), or on average (the others)."""
    target_l0: float | None = None
    """Of jumprelu and relu: active features a token that the sparsity loss's weight is moved to; auto is k, or nothing
    where l0_coefficient or l1_coefficient is given."""
    matryoshka_widths: tuple[int, ...] | None = None
    """Of matryoshka: ends of the nested prefixes, such as 128,512,2k, the last one d_sae; auto makes groups of 1/32,
    1/16, 1/8, 1/4 of the features and the rest."""
    jumprelu_sparsity_loss_mode: str = "tanh"
    """Of jumprelu: tanh (Anthropic 2025), step (DeepMind 2024) or quadratic (towards k active features)."""
    jumprelu_bandwidth: float | None = None
    """Of jumprelu: width of the threshold's kernel, in units where activations have mean norm sqrt(d); auto goes by the
    form (objectives/jumprelu.py)."""
    jumprelu_init_threshold: float | None = None
    """Of jumprelu: first threshold, in the same units; auto goes by the form, too."""
    l0_coefficient: float | None = None
    """Of jumprelu: weight of the sparsity loss beside the squared error of activations of mean norm sqrt(d); auto
    is what holds L0, else its first value."""
    l0_warm_up: float | None = None
    """Of jumprelu: share of the run over which l0_coefficient rises from 0; auto is 0.1, or 1 for tanh with a weight
    that nobody moves."""
    l1_coefficient: float | None = None
    """Of relu: weight of the sum of strength times decoder norm, in the same units; auto is what holds L0, else its
    first value."""
    l1_warm_up: float | None = None
    """Of relu: share of the run over which l1_coefficient rises from 0; auto is 0.1, or 0.05 of a given weight."""


@dataclass(frozen=True)
class TrainingRecipe:
    init_from: str | None = None
    """Folder of an SAE (ours or SAELens's) of the same shape, hook and host, from whose weights the run begins; none
    begins anew."""
    finetune: str = "all"
    """What is trained: all, threshold (jumprelu's thresholds alone) or decoder (W_dec and b_dec; encoder, b_enc and
    thresholds keep their bits). Without an encoder to train, aux_coefficient counts as 0."""
    tokens: int = 4_000_000
    """Training tokens; the text is repeated when it is shorter."""
    batch: int = 4096
    """Tokens in a batch."""
    grad_acc_steps: int = 1
    """Batches whose work goes into one update."""
    lr: float | None = None
    """Adam's learning rate; auto scales with 1/sqrt(d_sae) and the length of the run (training/schedule.py)."""
    lr_scheduler_name: str = "constant"
    """After the warm-up: constant (linear decay over the last fifth), cosine or linear (over all the rest)."""
    lr_warm_up_steps: int | None = None
    """Updates over which the rate rises; auto is min(1000, 5% of the run)."""
    lr_decay_steps: int | None = None
    """Updates over which the rate falls at the end, 0 for none; auto goes by lr_scheduler_name."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment; 0 keeps none, and features that are idle cost nothing."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment."""
    clip: float = 0.0
    """Largest norm of the gradient over all weights, by the norm of the update before; 0 is no limit."""
    ema: float = 0.0
    """Decay of a running mean of the weights, such as 0.999, that is evaluated and shipped instead; 0 keeps none."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead features (Gao et al. 2024); 0 switches it off."""
    dead_after: int | None = None
    """A feature is dead after so many tokens without firing; auto is min(10M, 5% of the run)."""
    resample_every: int | None = None
    """Tokens between resamplings, which begin dead features anew at badly reconstructed inputs; none never does."""
    dtype: str = "auto"
    """Of the encoder's product: float32, bfloat16 or auto (bfloat16 where the processor has it)."""
    device: str = "auto"
    """Where weights and batches are while training: cpu, cuda, mps or auto (cuda where there is one, else cpu)."""
    seed: int = 0
    """One seed gives one result on one kind of machine with one thread count."""
    save_every: float = 60.0
    """Seconds between checkpoints."""


@dataclass(frozen=True)
class EvaluationRecipe:
    tokens: int = 20_000
    """Held-out tokens for reconstruction and sparsity."""
    ce_tokens: int = 5_000
    """Held-out tokens for cross-entropy and KL (four forwards each)."""
    every: float = 0.1
    """Share of the run between evaluations of FVU on held-out text while training; 0 evaluates only at the end."""


@dataclass(frozen=True)
class LogRecipe:
    wandb: str = "off"
    """off, offline or online; metrics.jsonl is written always."""
    every: int = 10
    """Steps between log lines."""


@dataclass(frozen=True)
class Recipe:
    host: HostRecipe = field(default_factory=HostRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)
    activations: ActivationsRecipe = field(default_factory=ActivationsRecipe)
    sae: SAERecipe = field(default_factory=SAERecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    out: str = "runs/sae"
    """Folder of the run: recipe, metrics.jsonl, checkpoints, and the finished SAE in `sae/`."""
