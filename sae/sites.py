"""The named places of a decoder at which its residual stream can be read or written.

Promise: `Sites` finds the layers of any decoder of transformers, under any wrapper, and names each place as
TransformerLens does (`blocks.<layer>.<kind>`, kinds below), accepting the bridge's and Hugging Face's names
too. `attach` puts a function there that sees [B, T, width] and may answer with a replacement: what joins the
stream (after a post-norm and a residual multiplier), not what a module happens to return. `held` puts a tensor
at a site without running the layers below. Cost: nothing until something is attached. Limits: decoders only;
no resid_mid in parallel blocks.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sae.errors import UserError, nearest

# The sites of a layer in the order in which a forward reaches them.
KINDS = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_in",
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
# Hooks inside a layer that SAEs of other libraries name and only the bridge has; with what switches one on.
_ONLY_THE_BRIDGE = {
    "ln1.hook_normalized": "",
    "ln2.hook_normalized": "",
    "attn.hook_in": "",
    "hook_mlp_in": " after host.bridge.set_use_hook_mlp_in(True)",
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
_HINT = (
    "A site is blocks.<layer>. and hook_resid_pre, hook_resid_mid, hook_resid_post, hook_attn_out, "
    "mlp.hook_in, hook_mlp_out or attn.hook_z."
)

SiteFn = Callable[[Tensor], Tensor | None]


@dataclass
class _Layer:
    """Where a decoder layer can be hooked: modules whose output joins the stream, or whose input is read."""

    block: nn.Module
    attn_out: nn.Module | None
    mlp: nn.Module | None
    mlp_out: nn.Module | None
    projection: nn.Module | None
    names: dict[str, str] = field(default_factory=dict)  # module path inside the layer -> kind


class Sites:
    """The sites of one model; `model_name` is what errors call it."""

    def __init__(self, model: nn.Module, config: Any, model_name: str):
        self.model_name = model_name
        self.config = config
        self.path, blocks = _find_layers(model, config, model_name)
        self.layers = [_find_modules(block) for block in blocks]
        self.parallel = _is_parallel(config)
        self.scale = float(getattr(config, "residual_multiplier", None) or 1.0)  # Granite scales what it adds

    def names(self) -> list[str]:
        """Every site, in the order in which a forward reaches them."""
        return [f"blocks.{i}.{kind}" for i in range(len(self.layers)) for kind in KINDS if self._has(i, kind)]

    def _has(self, layer: int, kind: str) -> bool:
        at = self.layers[layer]
        if kind == "attn.hook_z":
            return at.projection is not None
        if kind == "hook_attn_out":
            return at.attn_out is not None
        if kind == "hook_resid_mid":
            return at.attn_out is not None and not self.parallel
        if kind in ("mlp.hook_in", "hook_mlp_out"):
            return at.mlp is not None
        return True

    def canonical(self, name: str) -> str:
        """TransformerLens' name of a site given in its convention, the bridge's or Hugging Face's."""
        layer, rest = _split_layer(name, self.path)
        if layer is None:
            raise self._unknown(name)
        if layer >= len(self.layers):
            raise UserError(
                f"hook: {name!r} is in layer {layer}, {self.model_name} has layers 0 to "
                f"{len(self.layers) - 1}. Give another layer, such as "
                f"blocks.{len(self.layers) // 2}.hook_resid_post."
            )
        renamed = _BRIDGE_KINDS if name.startswith("blocks.") else self.layers[layer].names
        kind = renamed.get(rest, rest)
        if kind == "hook_resid_mid" and self.parallel:
            raise UserError(
                f"hook: {name!r}: attention and MLP run in parallel in {self.model_name}, so it has no "
                f"resid_mid. Take blocks.{layer}.hook_resid_pre or blocks.{layer}.hook_attn_out."
            )
        if kind in _ONLY_THE_BRIDGE:
            raise UserError(
                f"hook: {name!r} is read by TransformerLens's bridge alone. Use run_with_saes{_ONLY_THE_BRIDGE[kind]}; "
                f"everything else reads the sites of {self.model_name} only. {_HINT}"
            )
        if kind not in KINDS or not self._has(layer, kind):
            raise self._unknown(name)
        return f"blocks.{layer}.{kind}"

    def _unknown(self, name: str) -> UserError:
        near = nearest(name, self.names()) or "."
        return UserError(f"hook: {name!r} names no site of {self.model_name}{near} {_HINT}")

    def width(self, hook: str) -> int:
        """Components of a vector at a canonical site: d_model, or heads times head size at hook_z."""
        layer, kind = parse(hook)
        if kind != "attn.hook_z":
            return self.config.hidden_size
        return _in_features(self.layers[layer].projection, self.config)

    def attach(self, hook: str, fn: SiteFn) -> list[Any]:
        """Register fn at a canonical site of the plain model; the handles that remove it again.

        fn sees [B, T, width] and may return a replacement. Editing resid_mid edits what attention adds.
        """
        layer, kind = parse(hook)
        at = self.layers[layer]
        if kind == "hook_resid_pre":
            return [at.block.register_forward_pre_hook(_on_input(fn), with_kwargs=True)]
        if kind == "hook_resid_post":
            return [at.block.register_forward_hook(_on_output(fn))]
        if kind == "attn.hook_z":
            assert at.projection is not None, hook
            return [at.projection.register_forward_pre_hook(_on_input(fn), with_kwargs=True)]
        if kind == "mlp.hook_in":
            assert at.mlp is not None, hook
            return [at.mlp.register_forward_pre_hook(_on_input(fn), with_kwargs=True)]
        if kind == "hook_mlp_out":
            assert at.mlp_out is not None, hook
            return [at.mlp_out.register_forward_hook(_on_output(fn, self.scale))]
        assert at.attn_out is not None, hook
        if kind == "hook_attn_out":
            return [at.attn_out.register_forward_hook(_on_output(fn, self.scale))]
        assert kind == "hook_resid_mid", hook
        before: list[Tensor] = []

        def keep(x: Tensor) -> None:
            before[:] = [x]

        def at_mid(added: Tensor) -> Tensor | None:
            pre = before.pop()
            new = fn(pre + added)
            return None if new is None else new - pre

        return [
            at.block.register_forward_pre_hook(_on_input(keep), with_kwargs=True),
            at.attn_out.register_forward_hook(_on_output(at_mid, self.scale)),
        ]

    @contextlib.contextmanager
    def held(self, hook: str, x: Tensor) -> Iterator[None]:
        """While open, a forward has x [B, T, d] at a resid_pre or resid_post site and runs no layer below it.

        The layers stay where they are (a model may ask for their kind or number) and answer with x; the
        embedding is looked up and not used. Only for layers whose output is the stream alone, no tuple.
        """
        layer, kind = parse(hook)
        assert kind in ("hook_resid_pre", "hook_resid_post"), hook
        below = [at.block for at in self.layers[: layer + (kind == "hook_resid_post")]]
        before = [block.__dict__.get("forward") for block in below]  # accelerate puts one there
        try:
            for block in below:
                block.forward = lambda *_args, **_options: x
            yield
        finally:
            for block, forward in zip(below, before, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward


def parse(hook: str) -> tuple[int, str]:
    """Layer and kind of a canonical name."""
    _, layer, kind = hook.split(".", 2)
    return int(layer), kind


def order(hook: str) -> tuple[int, int]:
    """A key that sorts canonical names as a forward reaches them."""
    layer, kind = parse(hook)
    return layer, KINDS.index(kind)


# ---- finding the parts of a decoder ---------------------------------------------------------------------


def _find_layers(model: nn.Module, config: Any, name: str) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its path, under any wrapper."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != config.num_hidden_layers:
            continue
        if path.split(".")[-1] in _LAYER_LISTS and not any(w in path for w in ("vision", "visual", "audio", "encoder")):
            return path, module
    raise UserError(f"{name}: found no list of decoder layers in {type(model).__name__}. Give a decoder-only model.")


def _find_modules(block: nn.Module) -> _Layer:
    attention_name, attention = _child(block, _ATTENTION)
    mlp_name, mlp = _child(block, _MLP)
    mlp_out = mlp
    projection = None
    if attention is not None:
        projection = next((m for path, m in attention.named_modules() if path.split(".")[-1] in _OUT_PROJECTION), None)
    for after_attention, after_mlp in _POST_NORMS:
        if getattr(block, after_mlp, None) is not None and getattr(block, after_attention, None) is not None:
            attention_name, attention = after_attention, getattr(block, after_attention)
            mlp_name, mlp_out = after_mlp, getattr(block, after_mlp)
    names = {"": "hook_resid_post"}
    if attention_name:
        names[attention_name] = "hook_attn_out"
    if mlp_name:
        names[mlp_name] = "hook_mlp_out"
    return _Layer(block, attention, mlp, mlp_out, projection, names)


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
    return config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)


def _split_layer(name: str, layers_path: str) -> tuple[int | None, str]:
    """'blocks.3.x' or '<path of the layers>.3.x' as (3, 'x'); (None, '') where it is neither."""
    for prefix in ("blocks", layers_path, "model.layers", "transformer.h", "gpt_neox.layers"):
        if name.startswith(prefix + "."):
            number, _, rest = name[len(prefix) + 1 :].partition(".")
            if number.isdigit():
                return int(number), rest
    return None, ""


# ---- torch hooks ----------------------------------------------------------------------------------------


def _on_input(fn: SiteFn) -> Callable:
    """A torch forward pre-hook that shows fn the first input of a module and puts its answer in the place."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x = args[0] if args else kwargs["hidden_states"]
        new = fn(x)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(fn: SiteFn, scale: float = 1.0) -> Callable:
    """A torch forward hook that shows fn a module's (first) output, times scale, and puts in its answer."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        new = fn(x if scale == 1.0 else x * scale)
        if new is None:
            return None
        new = new if scale == 1.0 else new / scale
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook
