"""The language model that is read and steered.

Promise: one object for any decoder that transformers runs (Hugging Face id, local folder, GGUF file, model
object, PEFT or quantised wrapper, TransformerLens bridge) with the hook names of TransformerLens. Activations
are in the host's own units and dtype, [B, T, width]; a forward that only reads ends at the last site.
Hot paths (`activations`, `logits`, `generate`) run the plain transformers model with hooks on the modules
concerned; `bridge` and `run_with_cache` give TransformerLens' own hooks on a second module tree that shares
the weights. Cost: the first load of the bundled GGUF de-quantises for 10-20 s and leaves about 540 MB in the
user's cache folder, later loads take about 2 s. Limits: decoders only; no gradients through the forwards.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae import loading, prompts, splicing
from sae.errors import UserError
from sae.loading import quiet_transformers
from sae.machine import device_of, dtype_of
from sae.masks import positions_and_mask
from sae.sampling import Nucleus
from sae.sites import Sites, order, parse

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae.autoencoder import SAE


@dataclass(frozen=True)
class Pass:
    """What a hook function may know about the forward it is called in.

    tokens           [B, T], the input ids of this forward (one new token a row while generating with a cache)
    past             tokens already in the KV cache; position t of this forward is token past + t of the row
    attention_mask   [B, past + T], 0 at padding, or None when there is no padding
    generating       inside `generate` (or any forward that continues a cache)
    prompt_length    tokens of the prompt, padding included; tokens at prompt_length and later were generated
    doc              [B, T], as the forward got it: equal ids attend to each other, -1 is padding; None: one text a row
    """

    tokens: Int[Tensor, "B T"]
    past: int
    attention_mask: Tensor | None
    generating: bool
    prompt_length: int
    doc: Int[Tensor, "B T"] | None = None


_TRIED = 32  # tokens on which `logits_from` finds out whether it can leave layers out

HookFn = Callable[[Tensor, Pass], Tensor | None]


class _Stop(Exception):
    """Raised by the last reading hook to end a forward early."""


class Host:
    """A language model with named sites to read and edit, made by `Host.load` or `Host.from_model`."""

    def __init__(self, model: Any, tokenizer: Any, name: str, bridge: Any = None):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self._bridge = bridge
        config = model.config.get_text_config()
        self._config = config
        self._sites = Sites(model, config, name)
        self.n_layers = len(self._sites.layers)
        self.d_model: int = config.hidden_size
        self.held: list[Any] = []  # open blocks whose handle nobody else may keep
        self._edits: list[tuple[str, HookFn]] = []
        self._handles: list[Any] = []
        self._pass: Pass | None = None
        self._doc: Tensor | None = None  # of the forward under way
        self._generating = False
        self.is_compiled = False
        self._skips: dict[str, bool] = {}  # site -> whether the layers below it can be left out
        model.eval()

    # ---- making one --------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, name: str = "smollm2", dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
    ) -> Host:
        """Load `smollm2` (bundled), a Hugging Face id, a local folder (of a LoRA adapter too) or a .gguf file.

        dtype auto is bfloat16 where the device has instructions for it, else float32 (sae/machine.py).
        """
        at = device_of(device)
        kind = dtype_of(dtype, at)
        model, tokenizer = loading.load(str(name), kind)
        return cls(model.to(at), tokenizer, str(name))

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, name: str | None = None) -> Host:
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
        # LoRA lies in the layers themselves: its wrapper calls the model by two ways, one of which passes hooks by.
        prompts_only = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        if hasattr(model, "get_base_model") and not prompts_only:
            model = model.get_base_model()
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
        return next((p.device for p in self.model.parameters() if p.device.type != "meta"), torch.device("cpu"))

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
        """16 hex digits that name these weights, whatever their dtype and wrapper (`loading.fingerprint`)."""
        return loading.fingerprint(self.model, self._config)

    @functools.cached_property
    def base_fingerprint(self) -> str:
        """The fingerprint without LoRA adapters: what was made on the base model may be used with an adapter too."""
        merged = getattr(self.model, "adapted_from", "")
        return merged or loading.fingerprint(self.model, self._config, base=True)

    def is_own(self, fingerprint: str | None) -> bool:
        """Whether what was made on the host of this fingerprint (none: nobody noted it) may be used on this one."""
        return not fingerprint or fingerprint == self.fingerprint or fingerprint == self.base_fingerprint

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        """16 hex digits that name the tokenizer, whatever model it came with."""
        return loading.tokenizer_fingerprint(self.tokenizer)

    # ---- hook names --------------------------------------------------------------------------------------

    def hook_names(self) -> list[str]:
        """Every site, in the order in which a forward reaches them."""
        return self._sites.names()

    def hook(self, name: str) -> str:
        """TransformerLens' name of a site given in its convention, the bridge's or Hugging Face's."""
        return self._sites.canonical(str(name))

    def layer(self, hook: str) -> int:
        """The layer of a site."""
        return parse(self.hook(hook))[0]

    def width(self, hook: str) -> int:
        """Components of a vector at a site: d_model, or heads times head size at hook_z."""
        return self._sites.width(self.hook(hook))

    # ---- hooks -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hooks(self, hooks: Iterable[tuple[str, HookFn]]) -> Iterator[None]:
        """While open, every forward calls fn(x [B, T, width], at: Pass) at its site; its answer replaces x.

        None leaves x as it is. Several functions at one site run in the order given, those of an inner `with`
        after those of an outer. Whatever raises, the hooks are gone afterwards. Editing resid_mid edits what
        attention adds. torch.compile does not look into a function: what it does may change without a new
        compilation. In `generate` a function with an attribute `fired` (bool [B]) ends the rows where it is true.
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

    @property
    def is_edited(self) -> bool:
        """Whether a block of `hooks` is open."""
        return bool(self._edits)

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
        for name, fn in sorted(self._edits, key=lambda edit: order(edit[0])):
            called: Any = torch.compiler.disable(functools.partial(self._call, fn))
            self._handles.extend(self._sites.attach(name, called))

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
        mask = kwargs.get("attention_mask")
        if self._doc is not None:
            mask = self._doc >= 0
            mask = None if bool(mask.all()) else mask
        elif not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = None
        self._pass = Pass(tokens, past, mask, self._generating or past > 0, length, self._doc)

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
            for name in sorted(wanted, key=order):
                handles.extend(self._sites.attach(name, reader(name)))
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

    @torch.no_grad()
    def logits_from(
        self,
        hook: str,
        x: Float[Tensor, "B T width"],
        tokens: Int[Tensor, "B T"],
        *,
        pos: Int[Tensor, "B T"] | None = None,
        doc: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """`logits` of the forward in which x stands at the site, whatever the layers below would give.

        cost    at resid_pre and resid_post the layers below are not run, unless `hooks` is open or the model is
                found (by a first short forward both ways) to need more of them than x; else a whole forward
        """
        name = self.hook(hook)
        expected = (*tokens.shape, self.width(name))
        if x.shape != expected:
            raise UserError(f"logits_from: x is {tuple(x.shape)}, {name} has {expected} here. Give that shape.")
        if self._can_skip(name, x, tokens, pos, doc):
            with self._sites.held(name, x.to(self.device, self.dtype)):
                return self._forward(tokens, pos, doc).logits
        return self.logits(tokens, pos=pos, doc=doc, edits=[(name, lambda old, _at: x.to(old))])

    def _can_skip(self, name: str, x: Tensor, tokens: Tensor, pos: Tensor | None, doc: Tensor | None) -> bool:
        """Whether a forward from this site on gives what a whole one does; tried once a site, on few tokens."""
        if self._edits or parse(name)[1] not in ("hook_resid_pre", "hook_resid_post"):
            return False
        if name not in self._skips:
            x, tokens = x[:1, :_TRIED].to(self.device, self.dtype), tokens[:1, :_TRIED]
            pos, doc = (None if t is None else t[:1, :_TRIED] for t in (pos, doc))
            whole = self.logits(tokens, pos=pos, doc=doc, edits=[(name, lambda old, _at: x.to(old))])
            try:
                with self._sites.held(name, x):
                    skipped = self._forward(tokens, pos, doc).logits
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                skipped = torch.full_like(whole, torch.nan)  # its layers return more than the stream
            difference = (whole.float() - skipped.float()).abs().max()
            self._skips[name] = bool(difference <= 1e-3 * whole.float().abs().max())
        return self._skips[name]

    def _forward(self, tokens: Tensor, pos: Tensor | None, doc: Tensor | None, **options: Any) -> Any:
        if tokens.ndim != 2:
            raise UserError(f"tokens: shape {tuple(tokens.shape)}, expected [B, T]. Add the missing axis.")
        tokens = tokens.to(self.device, torch.int64)
        doc = None if doc is None else doc.to(self.device)
        pos = None if pos is None else pos.to(self.device, torch.int64)
        B, T = tokens.shape
        pos, mask = positions_and_mask(self._config, self.dtype, (B, T), pos, doc, uniform=self.is_compiled)
        self._doc = doc
        try:
            return self.model(input_ids=tokens, attention_mask=mask, position_ids=pos, use_cache=False, **options)
        finally:
            self._doc = None

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """While open, decoder layers run through torch.compile, for many forwards of one shape [B, T].

        Only their inside is compiled: hooks at resid_pre and resid_post stay as they are, those inside a layer would be
        traced and must not be open. Cost: some ten seconds at the first forward of a shape, once for all layers.
        Results differ from plain layers by rounding (1% in bfloat16, 3e-7 in float32).
        """
        layers = [at.block for at in self._sites.layers]
        before = [layer.__dict__.get("forward") for layer in layers]  # accelerate puts one there
        try:
            for layer in layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
            self.is_compiled = True
            yield
        finally:
            self.is_compiled = False
            for layer, forward in zip(layers, before, strict=True):
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.forward = forward

    # ---- text --------------------------------------------------------------------------------------------

    def chat_tokens(self, prompt: str | list[dict[str, str]], system: str | None = None) -> Int[Tensor, "1 T"]:
        """Token ids of a prompt (or of messages) in the chat template, up to where the answer begins."""
        return self.tokenizer(
            prompts.chat_text(self.tokenizer, prompt, system, self.name), add_special_tokens=False, return_tensors="pt"
        ).input_ids

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
            raise UserError("generate: stream takes one prompt, not a batch. Give one prompt or leave stream out.")
        if max_new_tokens < 1:
            raise UserError(f"generate: max_new_tokens is {max_new_tokens}. Give 1 or more.")
        if not temperature >= 0 or not 0 < top_p <= 1 or top_k < 0:
            raise UserError(
                f"generate: temperature {temperature}, top_p {top_p}, top_k {top_k}; "
                "temperature is at least 0, top_p in (0, 1], top_k at least 0. Change these."
            )
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0 and top_p < 1:
            sampling["logits_processor"] = [Nucleus(float(temperature), float(top_p), int(top_k))]
        elif temperature > 0:
            sampling |= {"do_sample": True, "temperature": float(temperature), "top_k": int(top_k)}
        streamer = None if stream is None else prompts.Streamer(self.tokenizer, stream)
        devices = [self.device] if self.device.type == "cuda" else []
        self._generating = True
        try:
            with (
                self.hooks(edits),
                torch.random.fork_rng(devices=devices, enabled=seed is not None),
                quiet_transformers(),
            ):
                if seed is not None:
                    torch.manual_seed(seed)
                out = self.model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=prompts.pad_id(self.tokenizer),
                    streamer=streamer,
                    stopping_criteria=[self._fired] if any(hasattr(fn, "fired") for _, fn in self._edits) else None,
                    **sampling,
                )
        finally:
            self._generating = False
        answers = self.tokenizer.batch_decode(
            out[:, tokens.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return answers[0] if single else answers

    def _fired(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        """Rows that a hook function ends, as transformers asks for them."""
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _hook, fn in self._edits:
            fired = getattr(fn, "fired", None)
            if fired is not None:
                done |= fired.to(done.device)
        return done

    def _prompt_tokens(self, prompt: Any, chat: bool, system: str | None) -> tuple[Tensor, Tensor, bool]:
        tokens, mask, single = prompts.token_rows(self.tokenizer, prompt, chat, system, self.name)
        return tokens.to(self.device), mask.to(self.device), single

    def in_float32(self) -> Host:
        """This host, or where it is in another format a second one of its weights in float32 (twice their memory and
        more while both are there). Weights that are quantised stay as they are."""
        if self.dtype == torch.float32 or not all(one.is_floating_point() for one in self.model.parameters()):
            return self
        wide = {id(one): nn.Parameter(one.detach().float(), requires_grad=False) for one in self.model.parameters()}
        return Host(self._twin(wide), self.tokenizer, self.name)

    def _twin(self, tensors: dict[int, Any]) -> Any:
        """A second module tree with these in place of its tensors, by their ids, and without our hooks."""
        self._unbind()
        try:
            return copy.deepcopy(self.model, tensors)
        finally:
            self._bind()

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

    def _given(self, tokens: Any) -> Any:
        """What a forward of the bridge is given: texts, which it tokenises and masks itself, or ids."""
        if isinstance(tokens, Tensor):
            return tokens.to(self.device)
        texts = [tokens] if isinstance(tokens, str) else tokens
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
            raise UserError(f"tokens: {tokens!r} is neither token ids [B, T] nor text. Give a tensor, a str or a list.")
        return tokens

    @torch.no_grad()
    def run_with_cache(
        self, tokens: str | list[str] | Int[Tensor, "B T"], names_filter: Any = None
    ) -> tuple[Tensor, Any]:
        """Logits and ActivationCache from the bridge; names as TransformerLens has them. Here and below a text, or a
        list of them, is tokenised as the bridge does it (bridge.to_tokens), without chat template."""
        return self.bridge.run_with_cache(self._given(tokens), names_filter=names_filter)

    def saes(self, saes: SAE | Sequence[SAE], *, use_error_term: bool = False) -> AbstractContextManager[Any]:
        """`with host.saes([sae]) as bridge:` the bridge whose forwards have the SAEs in place of what they read, with
        gradients (splicing.py says the hooks' names). The host's own forwards stay as they are."""
        return splicing.spliced(self, saes, use_error_term)

    @torch.no_grad()
    def run_with_saes(
        self, tokens: str | list[str] | Int[Tensor, "B T"], *, saes: SAE | Sequence[SAE], use_error_term: bool = False
    ) -> Float[Tensor, "B T V"]:
        """The bridge's logits with SAEs in place of what they read; with the error term those without SAEs."""
        with self.saes(saes, use_error_term=use_error_term) as bridge:
            return bridge(self._given(tokens))

    @torch.no_grad()
    def run_with_cache_with_saes(
        self,
        tokens: str | list[str] | Int[Tensor, "B T"],
        *,
        saes: SAE | Sequence[SAE],
        use_error_term: bool = False,
        names_filter: Any = None,
    ) -> tuple[Float[Tensor, "B T V"], Any]:
        """`run_with_saes` and the ActivationCache: `cache["blocks.8.hook_resid_pre.hook_sae_acts_post"]`."""
        with self.saes(saes, use_error_term=use_error_term) as bridge:
            if isinstance(names_filter, str | list):
                splicing.check_names(bridge, [names_filter] if isinstance(names_filter, str) else names_filter)
            return bridge.run_with_cache(self._given(tokens), names_filter=names_filter)

    @torch.no_grad()
    def run_with_hooks_with_saes(
        self,
        tokens: str | list[str] | Int[Tensor, "B T"],
        *,
        saes: SAE | Sequence[SAE],
        fwd_hooks: Sequence[tuple[Any, Callable[..., Any]]],
        use_error_term: bool = False,
    ) -> Float[Tensor, "B T V"]:
        """`run_with_saes` with TransformerLens's hook functions, fn(tensor, hook=…), at any of the bridge's hooks and
        of the SAEs' own."""
        with self.saes(saes, use_error_term=use_error_term) as bridge:
            splicing.check_names(bridge, (name for name, _ in fwd_hooks))
            return bridge.run_with_hooks(self._given(tokens), fwd_hooks=list(fwd_hooks))


def _make_bridge(host: Host) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    twin = host._twin({id(tensor): tensor for tensor in (*host.model.parameters(), *host.model.buffers())})
    with quiet_transformers():
        try:
            return TransformerBridge.boot_transformers(
                host.name, hf_model=twin, tokenizer=host.tokenizer, device=host.device, dtype=host.dtype
            )
        except (ValueError, AttributeError, KeyError) as error:
            raise UserError(
                f"{host.name}: TransformerLens has no bridge for {type(host.model).__name__} ({error}). "
                "Read sites with host.activations instead."
            ) from error
