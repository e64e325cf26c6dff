"""SAE: the model, complete on one page — parameters, encode, decode, load, save.

x is in raw units of the host. Decoder rows of an SAE trained here have unit norm, so a feature's activation a is the
length of the vector a·W_dec[i] that it adds to the reconstruction; one of another library mostly keeps the norms and
activations that it has there (Metadata.units says which; docs/coming-from.md where not). `encode` and `decode` are
ordinary autograd citizens: what is selected is a constant, the gradient goes through the selected values, and a
threshold gets none (no straight-through estimate). `encode_sparse` is the fast path without gradients. A transcoder is
an SAE whose decoder writes elsewhere: `cfg.d_out`, `metadata.hook_name_out`, and W_skip where it has a skip connection.
On disk: SAELens's two files, goldengate.json beside them, and feature_stats.safetensors where statistics were taken;
other layouts are read (formats/). Training state is elsewhere (training/checkpoint.py).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae import __version__, card, files, hub, kernels, labels, releases, selections, token_norm
from sae.architectures import finished
from sae.codes import Codes, from_dense, joined
from sae.errors import UserError, printable
from sae.feature_stats import FeatureStats
from sae.formats import checks, layouts, saelens
from sae.formats.facts import Facts
from sae.machine import dtype_of
from sae.selections import Pursuit

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger("sae")
FACTS, STATS = "goldengate.json", "feature_stats.safetensors"
FORMAT = 1
UNITS = ("raw", "normalised", "token", "unknown")
_ROWS = 256  # encoded at once by rules that hold all pre-activations


@dataclass(frozen=True)
class Metadata:
    """Where an SAE comes from. Everything here is recorded, and used to refuse what does not belong together."""

    model_name: str = ""
    host_fingerprint: str = ""
    hook_name: str = ""
    context_size: int = 0
    dataset: str = ""
    hook_name_out: str = ""
    """Where a transcoder writes; empty for an SAE."""
    units: str = "raw"
    """Of activations. raw: x's own, as for every SAE trained here. normalised: of x·norm_factor, which training saw.
    token: of its token's own scale (SAEConfig.normalize_activations). unknown: raw or normalised, and no file says"""
    norm_factor: float | None = 1.0
    """Training saw x·norm_factor; None where nobody noted it. The weights here take x as it is."""
    outlier_norm: float | None = None
    """Positions with a larger residual norm were left out of training, and are left alone by steering."""
    recipe: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    git_revision: str = ""
    training_architecture: str = ""
    """How it was trained (a row of architectures.py), where `SAEConfig.architecture` is what it is now."""
    matryoshka_widths: list[int] = field(default_factory=list)
    """The nested prefixes of features that were trained to reconstruct alone; empty for other architectures."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """How a BatchTopK threshold was set, in raw units (finish.py says the fields)."""
    layout: str = ""
    """Whose files it was first loaded from (formats/layouts.py): "training" of a checkpoint of ours; empty of a
    finished SAE of ours."""
    foreign: dict[str, Any] = field(default_factory=dict)
    """What those files say of how activations were taken, in SAELens's words: prepend_bos, neuronpedia_id, …"""


@dataclass(frozen=True)
class SAEConfig:
    architecture: str
    """What it is now, not how it was trained: topk, jumprelu, relu; only loaded: abstopk, groupmax, matching_pursuit"""
    d_in: int
    d_sae: int
    k: int | None = None
    """Features a row, of topk and abstopk; groups, of groupmax."""
    metadata: Metadata = field(default_factory=Metadata)
    apply_b_dec_to_input: bool = True
    """Whether the encoder sees x − b_dec."""
    d_out: int | None = None
    """Width of what a transcoder writes; None for an SAE, which writes what it reads."""
    normalize_activations: str = "none"
    """none, or how each token is normed before the encoder and back after the decoder (token_norm.py)."""
    pursuit: Pursuit | None = None
    """When matching_pursuit ends."""


class SAE(nn.Module):
    """A sparse autoencoder. Encoder rows are contiguous [F, d]; `W_enc` is their view in the field's orientation.

    threshold   [F], float32 whatever the dtype of the rest. jumprelu: a feature fires above its own. topk: one
                calibrated value, with which steering reads single features; None where there is none. relu: None
    """

    def __init__(self, cfg: SAEConfig):
        super().__init__()
        self.cfg = cfg
        self.architecture = finished(cfg.architecture)
        if cfg.architecture in ("topk", "abstopk", "groupmax") and cfg.k is None:
            raise UserError(
                f"SAE: {cfg.architecture} needs k, the number of features a row. Give SAEConfig(..., k=32)."
            )
        if (cfg.architecture == "matching_pursuit") != (cfg.pursuit is not None):
            raise UserError("SAE: matching_pursuit, and it alone, needs to know when it ends. Give pursuit=Pursuit().")
        d, F, out = cfg.d_in, cfg.d_sae, cfg.d_out or cfg.d_in
        self.encoder = nn.Parameter(torch.zeros(F, d))
        self.W_dec = nn.Parameter(torch.zeros(F, out))
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.b_dec = nn.Parameter(torch.zeros(out))
        self.W_skip: nn.Parameter | None = None
        self.threshold: Tensor | None
        self.register_buffer("threshold", torch.zeros(F) if cfg.architecture == "jumprelu" else None)
        self.stats: FeatureStats | None = None
        self.labels: dict[int, str] = {}
        """The user's own names of features."""

    @property
    def W_enc(self) -> Float[Tensor, "d F"]:
        return self.encoder.T

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.cfg.d_out or self.cfg.d_in

    @property
    def hook_out(self) -> str:
        """Where it writes; a UserError for a transcoder that does not say."""
        about = self.cfg.metadata
        if self.cfg.d_out is not None and not about.hook_name_out:
            raise UserError(
                f"SAE: this transcoder reads {about.hook_name or 'somewhere'} and does not say where it writes. Write "
                "hook_name_out into its metadata."
            )
        return about.hook_name_out or about.hook_name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SAE:
        """As nn.Module moves and casts, but thresholds go to the device only: bfloat16 would move them by 0.4 %."""
        threshold = self.threshold
        super()._apply(fn, recurse)
        if threshold is not None and self.threshold is not None:
            self.threshold = threshold.to(self.threshold.device)
        return self

    def extra_repr(self) -> str:
        cfg = self.cfg
        k = "" if cfg.k is None else f", k={cfg.k}"
        return f"{cfg.architecture}, d_in={cfg.d_in}, d_sae={cfg.d_sae}{k}, hook={printable(cfg.metadata.hook_name)}"

    def centred(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """What the encoder sees of x, in the SAE's dtype: normed by token where the SAE does that, less b_dec."""
        if x.shape[-1] != self.cfg.d_in:
            raise UserError(
                f"encode: x has width {x.shape[-1]:,}, this SAE was trained on width {self.cfg.d_in:,}. "
                "Use activations of its own hook."
            )
        if self.cfg.normalize_activations != "none":
            x = token_norm.normed(self.cfg.normalize_activations, x.float())
        x = x.to(self.dtype)
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def pre_activations(
        self, x: Float[Tensor, "... d"], features: Tensor | slice | None = None
    ) -> Float[Tensor, "... F"] | Float[Tensor, "... n"]:
        """Before selection and relu, in the SAE's units, of all features or of some; float32 where the SAE is bfloat16.

        As the kernels do: the product in the encoder's dtype, the bias added in float32.
        """
        encoder, b_enc = (
            (self.encoder, self.b_enc) if features is None else (self.encoder[features], self.b_enc[features])
        )
        product = self.centred(x) @ encoder.T
        wide = torch.promote_types(product.dtype, torch.float32)
        return product.to(wide) + b_enc.to(wide)

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... F"]:
        """Dense feature activations in the SAE's dtype, differentiable; holds [..., F]."""
        if self.cfg.pursuit is not None:
            return selections.matching_pursuit(self.centred(x), self.W_dec, self.cfg.pursuit)
        return self.select(self.pre_activations(x))

    def select(self, pre: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
        """The activations that pre-activations of all features give; matching pursuit has none."""
        if self.architecture.selection == "threshold":
            acts = torch.where(pre > self._floor(), pre, pre.new_zeros(()))
        elif self.architecture.selection == "dense":
            rule = {"abstopk": selections.absolute_topk, "groupmax": selections.group_max}[self.cfg.architecture]
            acts = rule(pre, self._k())
        else:
            values, indices = pre.topk(self._k(), dim=-1)
            acts = torch.zeros_like(pre).scatter(-1, indices, values.relu())
        return acts.to(self.dtype)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "B d"]) -> Codes:
        """The same activations as Codes, without gradients and without holding [B, F].

        Of equal pre-activations at the k-th place of a topk row, `encode` may keep another than this does.
        """
        if self.architecture.selection == "dense":
            return joined([from_dense(self.encode(rows)) for rows in x.split(_ROWS)])
        above = self.architecture.selection == "threshold"
        select = kernels.Above(self._floor()) if above else kernels.TopK(self._k())
        return kernels.encode_select(self.centred(x), self.encoder, self.b_enc, select)

    def decode(
        self, acts: Float[Tensor, "... F"] | Codes, x: Float[Tensor, "... d"] | None = None
    ) -> Float[Tensor, "... d_out"]:
        """Reconstruction in raw units from dense activations or Codes.

        x   what they are activations of: needed where each token is normed by itself, or W_skip passes the decoder by
        """
        if isinstance(acts, Codes):
            out = kernels.decode(acts, self.W_dec, self.b_dec)
        elif acts.shape[-1] != self.cfg.d_sae:
            raise UserError(
                f"decode: the activations have {acts.shape[-1]:,} features, this SAE {self.cfg.d_sae:,}. "
                "Use the SAE that made them."
            )
        else:
            out = acts.to(self.dtype) @ self.W_dec + self.b_dec
        kind = self.cfg.normalize_activations if self.cfg.d_out is None else "none"
        if kind == "none" and self.W_skip is None:
            return out
        if x is None:
            why = "has a skip connection" if self.W_skip is not None else "norms each token by itself"
            raise UserError(f"decode: this SAE {why} and needs what was encoded. Call decode(acts, x), or sae(x).")
        if self.W_skip is not None:
            out = out + x.to(self.dtype) @ self.W_skip.T
        return out if kind == "none" else token_norm.restored(kind, out, x.float()).to(self.dtype)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d_out"]:
        """The reconstruction of x, or what a transcoder writes for it."""
        return self.decode(self.encode(x), x)

    def feature_acts(
        self, x: Float[Tensor, "... d"], features: Sequence[int], *, select: str | None = None
    ) -> Float[Tensor, "... n"]:
        """Activations of some features only.

        select "topk": exact for topk; a feature fires when fewer than k others exceed it (a full product).
        select "threshold": exact for jumprelu and relu, calibrated for topk; reads only the rows in question, cost
        independent of F. None: the architecture's own rule.
        Raises UserError for a feature out of range, and for a rule that this SAE has not.
        """
        which = torch.as_tensor(self.check_features(features), device=self.device)
        rule = self.check_select(select)
        if rule == "dense":
            return self.encode(x)[..., which]
        if rule == "threshold":
            pre = self.pre_activations(x, which)
            return torch.where(pre > self._floor()[which], pre, pre.new_zeros(())).to(self.dtype)
        pre = self.pre_activations(x)
        kth = pre.topk(self._k(), dim=-1, sorted=False).values.amin(-1, keepdim=True)
        own = pre[..., which]
        return (own.relu() * (own >= kth)).to(self.dtype)

    def check_select(self, select: str | None) -> str:
        """The selection rule asked for, or the architecture's own; one that this SAE has not is a UserError."""
        if select is None:
            return self.architecture.selection
        if select not in ("topk", "threshold"):
            raise UserError(f"select: '{select}' is neither topk nor threshold. Choose one of them.")
        if self.architecture.selection == "dense":
            raise UserError(f"select: a {self.cfg.architecture} SAE has its own rule only. Leave select out.")
        if select == "topk" and self.architecture.selection != "topk":
            raise UserError(f"select: a {self.cfg.architecture} SAE has no k. Use threshold, its own rule.")
        if select == "threshold" and self.cfg.architecture == "topk" and self.threshold is None:
            raise UserError("select: the SAE's folder has no calibrated threshold (`sae train` writes one). Use topk.")
        return select

    def check_features(self, features: Sequence[int]) -> list[int]:
        """The features as a list; one out of range is a UserError."""
        for feature in features:
            if not 0 <= feature < self.cfg.d_sae:
                raise UserError(
                    f"feature {feature:,} does not exist: this SAE has {self.cfg.d_sae:,} "
                    f"(0 to {self.cfg.d_sae - 1:,}). Look one up with `sae find`."
                )
        return list(features)

    def _k(self) -> int:
        assert self.cfg.k is not None, "a TopK SAE has k"
        return self.cfg.k

    def _floor(self) -> Float[Tensor, " F"]:
        """What a pre-activation has to exceed to be one: the threshold, and 0."""
        if self.threshold is None:
            return torch.zeros(self.cfg.d_sae, device=self.device)
        return self.threshold.clamp_min(0)

    def save(self, path: str | Path, *, dtype: str | torch.dtype = torch.float32) -> Path:
        """Write the folder whole or not at all; matrices in `dtype`, everything else in float32.

        An SAE that is there is replaced, with its index, which would not belong to these weights. Raises UserError
        where `path` is a folder of something else.
        """
        path, kind = Path(path), dtype_of(dtype)
        if path.is_dir() and (there := layouts.recognised(path)) not in (None, "saelens"):
            raise UserError(f"{path}: holds an SAE of {there}'s layout. Choose another folder.")
        facts, tensors = self.facts()
        with files.atomic_folder(path, marker=saelens.CONFIG) as folder:
            saelens.write(folder, facts, tensors, kind)
            files.write_json(
                folder / FACTS,
                {
                    "format": FORMAT,
                    "goldengate_version": __version__,
                    "units": self.cfg.metadata.units,
                    "threshold": facts.threshold,
                    "metadata": asdict(self.cfg.metadata),
                },
            )
            if self.stats is not None:
                self.stats.save(folder / STATS)
            if self.labels:
                labels.write(folder, self.labels)
        return path

    save_model = save_inference_model = save_pretrained = save

    def facts(self) -> tuple[Facts, dict[str, Tensor]]:
        """What a page of formats/ writes: (facts, tensors)."""
        cfg = self.cfg
        tensors = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        calibrated = None
        if self.threshold is not None and cfg.architecture == "jumprelu":
            tensors["threshold"] = self.threshold
        elif self.threshold is not None:
            calibrated = float(self.threshold[0])
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip
        shape = {name: getattr(cfg, name) for name in _SHAPE}
        metadata = {**asdict(cfg.metadata), "goldengate_version": __version__}
        facts = Facts(**shape, threshold=calibrated, metadata=metadata)
        return facts, {name: tensor.detach() for name, tensor in tensors.items()}

    @classmethod
    def from_facts(cls, facts: Facts, tensors: dict[str, Tensor], where: str | Path) -> SAE:
        """The SAE of what a page of formats/ read from `where`, in float32; tensors as facts.py says."""
        shape = {name: getattr(facts, name) for name in _SHAPE}
        model = cls.of(SAEConfig(**shape, metadata=_metadata(facts.metadata, where)), tensors)
        if facts.architecture == "topk" and facts.threshold is not None:
            model.threshold = torch.full((facts.d_sae,), facts.threshold)
        return model

    @classmethod
    def of(cls, cfg: SAEConfig, tensors: dict[str, Tensor]) -> SAE:
        """The SAE of these tensors (formats/facts.py), which are taken, not copied, where they lie as is needed here:
        the encoder as rows, as in layouts of torch's Linear, everything else as it is named."""
        with torch.device("meta"):
            model = cls(cfg)
        model.encoder = nn.Parameter(tensors["W_enc"].T.contiguous())
        for name in ("W_dec", "b_enc", "b_dec", "W_skip"):
            if name in tensors:
                setattr(model, name, nn.Parameter(tensors[name].contiguous()))
        model.threshold = tensors.get("threshold")
        return model

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str | torch.dtype = torch.float32,
        trust_pickle: bool = False,
    ) -> SAE:
        """Read a folder of any layout (formats/layouts.py): ours, SAELens's, …; or a checkpoint file in one.

        dtype          torch's, or a text: float32, bfloat16, float16; auto is what this machine is good at
        trust_pickle   read pickles with a torch below 2.10, whose guard against code in them is known to be broken
        Raises UserError for what is missing, damaged or foreign.
        """
        return cls._load(Path(path), "", device, dtype, trust_pickle)

    @classmethod
    def _load(
        cls,
        path: Path,
        where: str,
        device: str,
        dtype: str | torch.dtype,
        trust_pickle: bool,
        overrides: Mapping[str, Any] | None = None,
    ) -> SAE:
        kind = dtype_of(dtype, device)
        if (home := layouts.home(path)) != path:
            path, where = home, where.removesuffix(f"/{path.name}")
        layout, facts, tensors = layouts.read(path, where=where, trust_pickle=trust_pickle, overrides=overrides)
        if (path / FACTS).exists():
            own = files.read_json_object(path / FACTS, ("metadata", "threshold"), newest=FORMAT)
            if not isinstance(own["metadata"], dict):
                raise UserError(f"{path / FACTS}: metadata must be an object. {checks.AGAIN}")
            threshold = None if own["threshold"] is None else checks.number(path / FACTS, own, "threshold")
            facts = replace(facts, metadata=own["metadata"], threshold=threshold)
        else:
            facts = replace(facts, metadata={"norm_factor": None, **facts.metadata, "layout": layout})
        if not facts.metadata.get("model_name"):
            facts = replace(facts, metadata={**facts.metadata, **_host_of_index(path)})
        model = cls.from_facts(facts, tensors, path)
        # a foreign SAE has no statistics of its own; those of its index serve as well
        known = next((file for file in (path / STATS, path / "index" / STATS) if file.exists()), None)
        if known is not None:
            model.stats = FeatureStats.load(known)
            if model.stats.max_act.shape != (facts.d_sae,):
                raise UserError(
                    f"{known}: has {len(model.stats.max_act):,} features, the SAE {facts.d_sae:,}. "
                    "Copy the folder again."
                )
        model.labels = labels.read(path)
        if beyond := [feature for feature in model.labels if feature >= facts.d_sae]:
            raise UserError(
                f"{path / labels.FILE}: names feature {beyond[0]:,}, the SAE has {facts.d_sae:,}. Delete that line."
            )
        if model.stats is None and model.cfg.metadata.layout:
            logger.warning(
                "%s: has no feature statistics, so strengths cannot be multiples of a maximum (5x) yet: "
                "run `sae index` on it first",
                path,
            )
        return model.to(device=device, dtype=kind).requires_grad_(False)

    load_from_disk = load

    @classmethod
    def from_pretrained(
        cls,
        release: str | Path,
        sae_id: str | None = None,
        *,
        device: str = "cpu",
        dtype: str | torch.dtype = torch.float32,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_pickle: bool = False,
    ) -> SAE:
        """Load from a local folder, a repository of the Hub or a release of SAELens's list.

        release  the folder, "user/repo", or the release's name (sae-lens has to be installed)
        sae_id   the SAE's folder in it, or its id in the release; None where the SAE lies at the top
        The others are those of `load`, and as everybody has them: revision (a branch, a tag or a commit), token, …
        Raises UserError for what is not there, not allowed or not readable; with a silent Hub the cached copy is taken.
        """
        if os.path.exists(release):
            return cls._load(Path(release) / sae_id if sae_id else Path(release), "", device, dtype, trust_pickle)
        listed = releases.find(str(release), sae_id)
        repo, folder = (listed.repo, listed.folder) if listed else (str(release), sae_id)
        path, where = hub.fetch(
            repo,
            folder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return cls._load(path, where, device, dtype, trust_pickle, listed.overrides if listed else None)

    def push_to_hub(
        self,
        repo_id: str,
        path_in_repo: str | None = None,
        *,
        dtype: str | torch.dtype = torch.float32,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool = False,
        commit_message: str | None = None,
        readme: str | None = None,
    ) -> str:
        """Save into a repository of the Hub, at its top or in a folder, with a card; returns its address.

        One commit or none, of safetensors, JSON and README.md: `readme`, or a card from the facts (card.py). What an
        earlier SAE left there goes; a README.md that is not ours stays. `dtype` as in `save`. Raises UserError for what
        the Hub refuses, and where it is silent.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save(Path(temporary) / "sae", dtype=dtype)
            told = card.card(self, repo=repo_id, folder=path_in_repo or "") if readme is None else readme
            files.write_text(folder / hub.CARD, told)
            return hub.push(
                folder,
                repo_id,
                path_in_repo,
                replaces=(FACTS, STATS, labels.FILE),
                revision=revision,
                token=token,
                private=private,
                commit_message=commit_message,
            )


_SHAPE = (
    "architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", "d_out", "normalize_activations", "pursuit"
)  # fmt: skip
"""What SAEConfig and Facts have in common."""


def _metadata(given: dict[str, Any], where: str | Path) -> Metadata:
    """Metadata of what is known; a value of another kind than the field's is a UserError that names `where`."""
    known: dict[str, Any] = {}
    for one in fields(Metadata):
        if (value := given.get(one.name)) is None:
            if one.name in given and one.name in _MAY_BE_NONE:
                known[one.name] = None
            continue
        default = getattr(Metadata(), one.name)
        kind = (int, float) if one.name in _MAY_BE_NONE else type(default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{where}: metadata's {one.name} is {value!r}, not of its kind. Copy the folder again.")
        known[one.name] = checks.number(Path(where), given, one.name, positive=True) if kind == (int, float) else value
    if (units := known.get("units", "raw")) not in UNITS:
        raise UserError(f"{where}: metadata's units are {units!r}, expected {', '.join(UNITS)}. Copy the folder again.")
    if not 0 <= known.get("context_size", 0) < 1 << 40:
        raise UserError(f"{where}: metadata's context_size is {known['context_size']}. Copy the folder again.")
    return Metadata(**known)


def _host_of_index(path: Path) -> dict[str, str]:
    """What the index of an SAE that names no model was made with (features/index.py has its facts)."""
    file = path / "index" / "index.json"
    if not file.exists():
        return {}
    facts = files.read_json_object(file)
    text = facts.get("text")
    known = {"model_name": facts.get("host"), "host_fingerprint": text.get("host") if isinstance(text, dict) else ""}
    return {name: value for name, value in known.items() if isinstance(value, str)}


_MAY_BE_NONE = ("norm_factor", "outlier_norm")
