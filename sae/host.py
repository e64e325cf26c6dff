"""The language model that is read and steered.

Promise: one object for any decoder that transformers runs (Hugging Face id, local folder, GGUF file, model
object, PEFT or quantised wrapper, TransformerLens bridge) with the hook names of TransformerLens. Activations
are in the host's own units and dtype, [B, T, width]; a forward that only reads ends at the last site.
Hot paths (`activations`, `logits`, `generate`) run the plain transformers model with hooks on the modules
concerned; `bridge` and `run_with_cache` give TransformerLens' own hooks on a second module tree that shares
the weights. Cost: the first load of the bundled GGUF de-quantises for 10-20 s and leaves about 540 MB in the
user's cache folder, later loads take about 2 s. Limits: decoders only; no gradients through the forwards.
"""

import contextlib
import copy
import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae import bundled, files
from sae.errors import UserError, nearest
from sae.machine import device_of, dtype_of

logger = logging.getLogger("sae")

# The sites of a layer in the order in which a forward reaches them.
KINDS = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
)
# What TransformerLens' bridge calls them.
_BRIDGE_KINDS = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln2.hook_in": "hook_resid_mid",
    "attn.hook_out": "hook_attn_out",
    "attn.o.hook_in": "attn.hook_z",
    "hook_z": "attn.hook_z",
    "mlp.hook_out": "hook_mlp_out",
}
_LAYER_LISTS = ("layers", "h", "blocks", "block")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_OUT_PROJECTION = ("o_proj", "c_proj", "out_proj", "dense", "wo", "o")
# Norms that stand between a sublayer and the residual stream: with them, what is added is the norm's output.
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
_PARALLEL = {"gptj", "phi", "cohere", "cohere2", "codegen"}


@dataclass(frozen=True)
class Pass:
    """What a hook function may know about the forward it is called in.

    tokens           [B, T], the input ids of this forward (one new token a row while generating with a cache)
    past             tokens already in the KV cache; position t of this forward is token past + t of the row
    attention_mask   [B, past + T], 0 at padding, or None when there is no padding
    generating       inside `generate` (or any forward that continues a cache)
    prompt_length    tokens of the prompt, padding included; tokens at prompt_length and later were generated
    """

    tokens: Int[Tensor, "B T"]
    past: int
    attention_mask: Tensor | None
    generating: bool
    prompt_length: int


HookFn = Callable[[Float[Tensor, "B T width"], Pass], Tensor | None]


class _Stop(Exception):
    """Raised by the last reading hook to end a forward early."""


@dataclass
class _Layer:
    """Where a decoder layer can be hooked: modules whose output joins the stream, or whose input is read."""

    block: nn.Module
    attn_out: nn.Module | None
    mlp_out: nn.Module | None
    projection: nn.Module | None
    names: dict[str, str] = field(default_factory=dict)  # module path inside the layer -> kind


class Host:
    """A language model with named sites to read and edit, made by `Host.load` or `Host.from_model`."""

    def __init__(self, model: Any, tokenizer: Any, name: str, bridge: Any = None):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self._bridge = bridge
        config = model.config.get_text_config()
        self._config = config
        path, blocks = _find_layers(model, config, name)
        self._layers_path = path
        self._layers = [_find_sites(block) for block in blocks]
        self.n_layers = len(self._layers)
        self.d_model: int = config.hidden_size
        self._parallel = _is_parallel(config)
        self._scale = float(
            getattr(config, "residual_multiplier", None) or 1.0
        )  # Granite scales what it adds
        self._edits: list[tuple[str, HookFn]] = []
        self._handles: list[Any] = []
        self._pass: Pass | None = None
        self._padding: Tensor | None = None
        self._generating = False
        model.eval()

    # ---- making one --------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, name: str = "smollm2", dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
    ) -> "Host":
        """Load `smollm2` (bundled), a Hugging Face id, a local folder or a .gguf file.

        dtype auto is bfloat16 where the device has instructions for it, else float32 (sae/machine.py).
        """
        at = device_of(device)
        kind = dtype_of(dtype, at)
        with _quiet_transformers():
            if name == "smollm2":
                model, tokenizer = _load_gguf(bundled.weights_path(), kind)
            elif str(name).endswith(".gguf"):
                if not Path(name).is_file():
                    raise UserError(f"{name}: no such file. Check the path.")
                model, tokenizer = _load_gguf(Path(name), kind)
            else:
                model, tokenizer = _load_pretrained(str(name), kind)
        return cls(model.to(at), tokenizer, str(name))

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, name: str | None = None) -> "Host":
        """Use a model object as it is: plain, quantised, PEFT, with a device_map, or a bridge.

        Nothing is copied, cast or moved; weights stay shared with the caller's object.
        """
        bridge = None
        if hasattr(model, "original_model"):  # TransformerBridge
            bridge, model = model, model.original_model
        if not hasattr(model, "config"):
            raise UserError(
                f"Host.from_model: a {type(model).__name__} has no transformers config. "
                "Give a model of transformers, a wrapper of one, or a TransformerBridge."
            )
        known = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        return cls(model, tokenizer, known, bridge)

    # ---- facts -------------------------------------------------------------------------------------------

    @property
    def _embedding(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's device, or that of the first weight which is not offloaded."""
        if self._embedding.device.type != "meta":
            return self._embedding.device
        return next(
            (p.device for p in self.model.parameters() if p.device.type != "meta"), torch.device("cpu")
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are not text: beginning, end, padding, roles."""
        added = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(added | set(self.tokenizer.all_special_ids))

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name these weights, the same for float32 and bfloat16 loads and under a bridge.

        From the sizes in the config and 64 strided samples of each tensor, as bfloat16: weights that differ
        between the samples only are not told apart. Quantised weights have a fingerprint of their own.
        """
        keys = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        digests = set()
        named = dict(self.model.named_parameters())
        # A bridge keeps a fused attention matrix and shows its thirds beside it: no weights of their own.
        fused = {name.split(".qkv.")[0] for name in named if ".qkv." in name}
        thirds = tuple(f"{path}.{part}." for path in fused for part in "qkv")
        for name, tensor in named.items():
            if tensor.device.type == "meta" or tensor.numel() == 0 or name.startswith(thirds):
                continue
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).view(torch.int16).cpu()
            content = f"{tuple(tensor.shape)}".encode() + sample.numpy().tobytes()
            digests.add(hashlib.sha256(content).hexdigest())
        facts = json.dumps([[key, getattr(self._config, key, None)] for key in keys] + sorted(digests))
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    # ---- hook names --------------------------------------------------------------------------------------

    def hook_names(self) -> list[str]:
        """Every site, in the order in which a forward reaches them."""
        return [f"blocks.{i}.{kind}" for i in range(self.n_layers) for kind in KINDS if self._has(i, kind)]

    def _has(self, layer: int, kind: str) -> bool:
        at = self._layers[layer]
        if kind == "attn.hook_z":
            return at.projection is not None
        if kind == "hook_attn_out":
            return at.attn_out is not None
        if kind == "hook_resid_mid":
            return at.attn_out is not None and not self._parallel
        if kind == "hook_mlp_out":
            return at.mlp_out is not None
        return True

    def hook(self, name: str) -> str:
        """TransformerLens' name of a site given in its convention, the bridge's or Hugging Face's."""
        layer, rest = _split_layer(str(name), self._layers_path)
        if layer is None:
            raise UserError(
                f"hook: {name!r} names no site of {self.name}{nearest(name, self.hook_names())}. {_HOOK_HINT}"
            )
        if layer >= self.n_layers:
            raise UserError(
                f"hook: {name!r} is in layer {layer}, {self.name} has layers 0 to {self.n_layers - 1}. "
                f"Give another layer, such as blocks.{self.n_layers // 2}.hook_resid_post."
            )
        kind = (
            _BRIDGE_KINDS.get(rest, rest)
            if name.startswith("blocks.")
            else self._layers[layer].names.get(rest, rest)
        )
        if kind == "hook_resid_mid" and self._parallel:
            raise UserError(
                f"hook: {name!r}: attention and MLP run in parallel in {self.name}, so it has no resid_mid. "
                f"Take blocks.{layer}.hook_resid_pre or blocks.{layer}.hook_attn_out."
            )
        if kind not in KINDS or not self._has(layer, kind):
            raise UserError(
                f"hook: {name!r} names no site of {self.name}{nearest(name, self.hook_names())}. {_HOOK_HINT}"
            )
        return f"blocks.{layer}.{kind}"

    def layer(self, hook: str) -> int:
        """The layer of a site."""
        return int(self.hook(hook).split(".")[1])

    def width(self, hook: str) -> int:
        """Components of a vector at a site: d_model, or heads times head size at hook_z."""
        layer, kind = _parse(self.hook(hook))
        if kind != "attn.hook_z":
            return self.d_model
        return _in_features(self._layers[layer].projection, self._config)

    # ---- hooks -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hooks(self, hooks: Iterable[tuple[str, HookFn]]) -> Iterator[None]:
        """While open, every forward calls fn(x [B, T, width], at: Pass) at its site; its answer replaces x.

        None leaves x as it is. Several functions at one site run in the order given, those of an inner `with`
        after those of an outer. Whatever raises, the hooks are gone afterwards. Editing resid_mid edits what
        attention adds.
        """
        added = [(self.hook(name), fn) for name, fn in hooks]
        if not added:
            yield
            return
        self._edits.extend(added)
        try:
            self._bind()
            yield
        finally:
            for edit in added:
                self._remove(edit)
            self._bind()

    def _remove(self, edit: tuple[str, HookFn]) -> None:
        for i in reversed(range(len(self._edits))):  # by identity of the pair: equal pairs may be open twice
            if self._edits[i] is edit:
                del self._edits[i]
                return

    def _unbind(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _bind(self) -> None:
        """Register all open edits afresh, sorted by site: what comes first in a forward is hooked first."""
        self._unbind()
        if not self._edits:
            self._pass = None
            return
        self._handles.append(self.model.register_forward_pre_hook(self._note_pass, with_kwargs=True))
        for name, fn in sorted(self._edits, key=lambda edit: _order(edit[0])):
            self._attach(name, functools.partial(self._call, fn), self._handles)

    def _call(self, fn: HookFn, x: Tensor) -> Tensor | None:
        assert self._pass is not None, "a hooked layer ran outside a forward of the model"
        new = fn(x, self._pass)
        if new is None:
            return None
        if new.shape != x.shape:
            raise UserError(
                f"hook function returned {tuple(new.shape)}, the site has {tuple(x.shape)}. Keep the shape."
            )
        return new.to(x.dtype)

    def _note_pass(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = args[0] if args else None
        if tokens is None:
            raise UserError("hooks: this forward was given no input_ids. Pass token ids.")
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        before = self._pass
        length = tokens.shape[1] if past == 0 or before is None else before.prompt_length
        mask = self._padding if self._padding is not None else kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            mask = None
        self._pass = Pass(tokens, past, mask, self._generating or past > 0, length)

    def _attach(self, hook: str, fn: Callable[[Tensor], Tensor | None], handles: list) -> None:
        """Register fn at a site of the plain model; fn sees [B, T, width] and may return a replacement."""
        layer, kind = _parse(hook)
        at = self._layers[layer]
        if kind == "hook_resid_pre":
            handles.append(at.block.register_forward_pre_hook(_on_input(fn), with_kwargs=True))
        elif kind == "attn.hook_z":
            assert at.projection is not None, hook
            handles.append(at.projection.register_forward_pre_hook(_on_input(fn), with_kwargs=True))
        elif kind == "hook_resid_post":
            handles.append(at.block.register_forward_hook(_on_output(fn)))
        elif kind == "hook_mlp_out":
            assert at.mlp_out is not None, hook
            handles.append(at.mlp_out.register_forward_hook(_on_output(fn, self._scale)))
        elif kind == "hook_attn_out":
            assert at.attn_out is not None, hook
            handles.append(at.attn_out.register_forward_hook(_on_output(fn, self._scale)))
        else:
            assert at.attn_out is not None and kind == "hook_resid_mid", hook
            before: list[Tensor] = []

            def keep(x: Tensor) -> None:
                before[:] = [x]

            def at_mid(added: Tensor) -> Tensor | None:
                pre = before.pop()
                new = fn(pre + added)
                return None if new is None else new - pre

            handles.append(at.block.register_forward_pre_hook(_on_input(keep), with_kwargs=True))
            handles.append(at.attn_out.register_forward_hook(_on_output(at_mid, self._scale)))

    # ---- forwards ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def activations(
        self,
        tokens: Int[Tensor, "B T"],
        hooks: Sequence[str],
        *,
        pos: Int[Tensor, "B T"] | None = None,
        doc: Int[Tensor, "B T"] | None = None,
    ) -> dict[str, Float[Tensor, "B T width"]]:
        """Activations at the sites, by TransformerLens name, in the host's dtype; hook_z is flattened.

        pos      position ids; None counts from 0 in each row, or in each document where doc is given
        doc      document of each position, -1 at padding: attention stays inside equal ids; None is causal
        cost     one forward that ends at the last of the sites; edits open in `hooks` apply and are seen
        """
        names = [self.hook(name) for name in hooks]
        found: dict[str, Tensor] = {}
        wanted = set(names)
        handles: list[Any] = []

        def reader(name: str) -> Callable[[Tensor], None]:
            def read(x: Tensor) -> None:
                found[name] = x.detach()
                if len(found) == len(wanted):
                    raise _Stop

            return read

        try:
            for name in sorted(wanted, key=_order):
                self._attach(name, reader(name), handles)
            with contextlib.suppress(_Stop):
                self._forward(tokens, pos, doc)
        finally:
            for handle in handles:
                handle.remove()
        return {name: found[name] for name in names}

    @torch.no_grad()
    def logits(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        pos: Int[Tensor, "B T"] | None = None,
        doc: Int[Tensor, "B T"] | None = None,
        edits: Iterable[tuple[str, HookFn]] = (),
        last: int = 0,
    ) -> Float[Tensor, "B T V"]:
        """Next-token logits in the host's dtype; `last` > 0 computes them for the last positions only."""
        with self.hooks(edits):
            return self._forward(tokens, pos, doc, **({"logits_to_keep": last} if last else {})).logits

    def _forward(self, tokens: Tensor, pos: Tensor | None, doc: Tensor | None, **options: Any) -> Any:
        if tokens.ndim != 2:
            raise UserError(f"tokens: shape {tuple(tokens.shape)}, expected [B, T]. Add the missing axis.")
        tokens = tokens.to(self.device, torch.int64)
        if doc is not None:
            doc = doc.to(self.device)
            pos = _positions(doc) if pos is None else pos
        if pos is not None:
            pos = pos.to(self.device, torch.int64)
            if _counts_from_zero(pos, doc):
                pos = None
        mask = self._mask(tokens, pos, doc)
        self._padding = None if doc is None or bool((doc >= 0).all()) else doc >= 0
        try:
            return self.model(
                input_ids=tokens, attention_mask=mask, position_ids=pos, use_cache=False, **options
            )
        finally:
            self._padding = None

    def _mask(self, tokens: Tensor, pos: Tensor | None, doc: Tensor | None) -> Any:
        """None where plain causal attention does, else a 4-D mask in the form the attention code takes."""
        B, T = tokens.shape
        plain = doc is None or _one_document_a_row(doc)
        if plain and pos is None:  # position ids that restart would make transformers isolate by itself
            return None
        steps = torch.arange(T, device=self.device)
        allowed = (steps[:, None] >= steps[None, :])[None]
        if not plain:
            assert doc is not None
            allowed = allowed & (doc[:, :, None] == doc[:, None, :])
        allowed = allowed.expand(B, T, T)[:, None]
        window = getattr(self._config, "sliding_window", None)
        kinds = set(getattr(self._config, "layer_types", None) or ())
        if window is not None and window < T:
            near = allowed & (steps[:, None] - steps[None, :] < window)
            if kinds > {"sliding_attention"}:
                return {
                    "full_attention": self._mask_form(allowed),
                    "sliding_attention": self._mask_form(near),
                }
            if kinds != {"full_attention"}:
                allowed = near
        return self._mask_form(allowed)

    def _mask_form(self, allowed: Bool[Tensor, "B 1 T T"]) -> Tensor:
        if self._config._attn_implementation == "sdpa":
            return allowed
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(allowed, zero, torch.finfo(self.dtype).min)

    # ---- text --------------------------------------------------------------------------------------------

    def chat_tokens(
        self, prompt: str | list[dict[str, str]], system: str | None = None
    ) -> Int[Tensor, "1 T"]:
        """Token ids of a prompt (or of messages) in the chat template, up to where the answer begins."""
        return self.tokenizer(
            self._chat_text(prompt, system), add_special_tokens=False, return_tensors="pt"
        ).input_ids

    def _chat_text(self, prompt: str | list[dict[str, str]], system: str | None) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(f"{self.name}: its tokenizer has no chat template. Generate with chat=False.")
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def text_of(self, tokens: Tensor | Sequence[int]) -> list[str]:
        """One display string for each token, special tokens by their names."""
        ids = tokens.reshape(-1).tolist() if isinstance(tokens, Tensor) else list(tokens)
        return self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def generate(
        self,
        prompt: str | list[str] | Tensor,
        *,
        max_new_tokens: int = 80,
        temperature: float = 0.7,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = 0,
        chat: bool = True,
        system: str | None = None,
        stream: Callable[[str], None] | None = None,
        edits: Iterable[tuple[str, HookFn]] = (),
    ) -> Any:
        """The model's answer without the prompt: a str for one prompt, a list for a list or a [B, T] tensor.

        temperature   0 is greedy; otherwise sampling with top_p (1 off) and top_k (0 off)
        seed          one seed gives one answer and leaves torch's generators as they were; None uses them
        chat          put text in the chat template, where the tokenizer has one; tensors go in as they are
        stream        called with each piece of text as it comes (one prompt only); they add up to the result
        edits         (hook, fn) pairs open during the call, as in `hooks`
        """
        tokens, mask, single = self._prompt_tokens(prompt, chat, system)
        if stream is not None and not single:
            raise UserError(
                "generate: stream takes one prompt, not a batch. Give one prompt or leave stream out."
            )
        if max_new_tokens < 1:
            raise UserError(f"generate: max_new_tokens is {max_new_tokens}. Give 1 or more.")
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
            raise UserError(
                f"generate: temperature {temperature}, top_p {top_p}, top_k {top_k}; "
                "temperature is at least 0, top_p in (0, 1], top_k at least 0. Change these."
            )
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": float(temperature),
                "top_p": float(top_p),
                "top_k": int(top_k),
            }
        streamer = None if stream is None else _Streamer(self.tokenizer, stream)
        devices = [self.device] if self.device.type == "cuda" else []
        self._generating = True
        try:
            with (
                self.hooks(edits),
                torch.random.fork_rng(devices=devices, enabled=seed is not None),
                _quiet_transformers(),
            ):
                if seed is not None:
                    torch.manual_seed(seed)
                out = self.model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self._pad_id,
                    streamer=streamer,
                    **sampling,
                )
        finally:
            self._generating = False
        answers = self.tokenizer.batch_decode(
            out[:, tokens.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return answers[0] if single else answers

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)

    def _prompt_tokens(self, prompt: Any, chat: bool, system: str | None) -> tuple[Tensor, Tensor, bool]:
        """Left-padded ids, their mask, and whether one answer (not a list) is wanted."""
        if isinstance(prompt, Tensor):
            tokens = (prompt[None] if prompt.ndim == 1 else prompt).to(self.device, torch.int64)
            if tokens.numel() == 0:
                raise UserError("generate: the prompt has no tokens. Give some text.")
            return tokens, torch.ones_like(tokens), tokens.shape[0] == 1
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict))
        prompts = [prompt] if single else list(prompt)
        templated = chat and bool(getattr(self.tokenizer, "chat_template", None))
        texts = [self._chat_text(p, system) for p in prompts] if templated else prompts
        rows = [self.tokenizer(text, add_special_tokens=not templated).input_ids for text in texts]
        if not rows or min(len(row) for row in rows) == 0:
            raise UserError("generate: a prompt is empty. Give some text.")
        longest = max(len(row) for row in rows)
        tokens = torch.full((len(rows), longest), self._pad_id, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        return tokens.to(self.device), mask.to(self.device), single

    # ---- TransformerLens ---------------------------------------------------------------------------------

    @property
    def bridge(self) -> Any:
        """TransformerLens' TransformerBridge over the same weights, made on first use.

        Booting a bridge wraps modules in place, so it is given a second module tree whose parameters and
        buffers are the host's own tensors. What rewrites its weights (compatibility mode) may rewrite ours.
        """
        if self._bridge is None:
            self._bridge = _make_bridge(self)
        return self._bridge

    @torch.no_grad()
    def run_with_cache(self, tokens: Int[Tensor, "B T"], names_filter: Any = None) -> tuple[Tensor, Any]:
        """Logits and ActivationCache from the bridge; names as TransformerLens has them."""
        return self.bridge.run_with_cache(tokens.to(self.device), names_filter=names_filter)


_HOOK_HINT = (
    "A site is blocks.<layer>. and hook_resid_pre, hook_resid_mid, hook_resid_post, hook_attn_out, "
    "hook_mlp_out or attn.hook_z."
)


# ---- loading --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Transformers' progress bars and advice off; they are on again afterwards as they were."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()


def _load_pretrained(name: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(
            name, **{k: v for k, v in options.items() if k == "gguf_file"}
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"host: {name} cannot be loaded ({reason[:200]}). "
            "Give smollm2, a folder or .gguf file that exists, or a Hugging Face id that can be reached."
        ) from error
    return model, tokenizer


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """De-quantise once to float32 safetensors in the cache folder; load from there afterwards."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    print_of = hashlib.sha256(f"{path.stat().st_size}".encode() + head).hexdigest()[:12]
    cached = files.cache_dir() / "hosts" / f"{path.stem}-{print_of}"
    if (cached / "config.json").exists():
        try:
            return _load_pretrained(str(cached), dtype)
        except UserError as error:
            logger.warning("%s is damaged and is made again (%s)", cached, error)
    from transformers import GgufConfig

    logger.warning("%s: de-quantising for the first time (10-20 s), kept in %s", path.name, cached)
    model, tokenizer = _load_pretrained(
        str(path.parent), torch.float32, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        with files.atomic_folder(cached) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except UserError as error:
        logger.warning("the de-quantised weights were not kept: %s", error)
    else:
        return _load_pretrained(str(cached), dtype)
    return model.to(dtype), tokenizer


def _make_bridge(host: Host) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    tensors = [*host.model.parameters(), *host.model.buffers()]
    host._unbind()  # our hooks must not be copied into the second tree
    try:
        twin = copy.deepcopy(host.model, {id(tensor): tensor for tensor in tensors})
    finally:
        host._bind()
    with _quiet_transformers():
        try:
            return TransformerBridge.boot_transformers(
                host.name, hf_model=twin, tokenizer=host.tokenizer, device=host.device, dtype=host.dtype
            )
        except (ValueError, AttributeError, KeyError) as error:
            raise UserError(
                f"{host.name}: TransformerLens has no bridge for {type(host.model).__name__} ({error}). "
                "Read sites with host.activations instead."
            ) from error


# ---- finding the parts of a decoder ---------------------------------------------------------------------


def _find_layers(model: nn.Module, config: Any, name: str) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its path, under any wrapper."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != config.num_hidden_layers:
            continue
        if path.split(".")[-1] in _LAYER_LISTS and not any(
            w in path for w in ("vision", "visual", "audio", "encoder")
        ):
            return path, module
    raise UserError(
        f"{name}: found no list of decoder layers in {type(model).__name__}. Give a decoder-only model."
    )


def _find_sites(block: nn.Module) -> _Layer:
    attention_name, attention = _child(block, _ATTENTION)
    mlp_name, mlp = _child(block, _MLP)
    projection = None
    if attention is not None:
        projection = next(
            (m for path, m in attention.named_modules() if path.split(".")[-1] in _OUT_PROJECTION), None
        )
    for after_attention, after_mlp in _POST_NORMS:
        if getattr(block, after_mlp, None) is not None and getattr(block, after_attention, None) is not None:
            attention_name, attention = after_attention, getattr(block, after_attention)
            mlp_name, mlp = after_mlp, getattr(block, after_mlp)
    names = {"": "hook_resid_post"}
    if attention_name:
        names[attention_name] = "hook_attn_out"
    if mlp_name:
        names[mlp_name] = "hook_mlp_out"
    return _Layer(block, attention, mlp, projection, names)


def _child(block: nn.Module, names: Iterable[str]) -> tuple[str, nn.Module | None]:
    for name in names:
        if isinstance(child := getattr(block, name, None), nn.Module):
            return name, child
    return "", None


def _is_parallel(config: Any) -> bool:
    """Whether attention and MLP both read the layer's input, so that nothing stands between them."""
    if config.model_type == "falcon":
        return bool(config.parallel_attn or config.new_decoder_architecture)
    return bool(getattr(config, "use_parallel_residual", False)) or config.model_type in _PARALLEL


def _in_features(projection: nn.Module | None, config: Any) -> int:
    module: Any = projection
    for inner in ("base_layer", "original_component"):  # PEFT, bridge
        module = getattr(module, inner, module)
    if isinstance(size := getattr(module, "in_features", None), int):
        return size
    if isinstance(size := getattr(module, "nx", None), int):  # Conv1D
        return size
    return config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )


def _split_layer(name: str, layers_path: str) -> tuple[int | None, str]:
    """'blocks.3.x' or '<path of the layers>.3.x' as (3, 'x'); (None, '') where it is neither."""
    for prefix in ("blocks", layers_path, "model.layers", "transformer.h", "gpt_neox.layers"):
        if name.startswith(prefix + "."):
            number, _, rest = name[len(prefix) + 1 :].partition(".")
            if number.isdigit():
                return int(number), rest
    return None, ""


def _parse(hook: str) -> tuple[int, str]:
    _, layer, kind = hook.split(".", 2)
    return int(layer), kind


def _order(hook: str) -> tuple[int, int]:
    layer, kind = _parse(hook)
    return layer, KINDS.index(kind)


# ---- small pieces of a forward --------------------------------------------------------------------------


def _on_input(fn: Callable[[Tensor], Tensor | None]) -> Callable:
    """A torch forward pre-hook that shows fn the first input of a module and puts its answer in the place."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x = args[0] if args else kwargs["hidden_states"]
        new = fn(x)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(fn: Callable[[Tensor], Tensor | None], scale: float = 1.0) -> Callable:
    """A torch forward hook that shows fn a module's (first) output, times scale, and puts in its answer."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        new = fn(x if scale == 1.0 else x * scale)
        if new is None:
            return None
        new = new if scale == 1.0 else new / scale
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _one_document_a_row(doc: Int[Tensor, "B T"]) -> bool:
    """Whether causal attention alone isolates documents: one a row, from position 0, padding behind it."""
    same = (doc == doc[:, :1]) & (doc[:, :1] >= 0)
    return bool(((doc < 0) | same).all() and (same[:, 1:] <= same[:, :-1]).all() and (doc[:, 0] >= 0).all())


def _counts_from_zero(pos: Int[Tensor, "B T"], doc: Tensor | None) -> bool:
    """Whether the position ids are those that a model counts by itself, padding aside."""
    same = pos == torch.arange(pos.shape[1], device=pos.device)
    return bool((same if doc is None else same | (doc < 0)).all())


def _positions(doc: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Positions that restart at 0 where the document changes."""
    steps = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
    new = torch.ones_like(doc, dtype=torch.bool)
    new[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return steps - torch.where(new, steps, 0).cummax(dim=1).values


class _Streamer:
    """Hands out text as tokens come: what transformers' `generate` calls a streamer, for one row."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.told = 0
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if self.prompt:  # the first call brings the prompt
            self.prompt = False
            return
        self.ids.extend(value.reshape(-1).tolist())
        text = self._text()
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            self._tell(text)

    def end(self) -> None:
        self._tell(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _tell(self, text: str) -> None:
        if len(text) > self.told:
            self.write(text[self.told :])
            self.told = len(text)
