"""Where an SAE belongs, from the name of a module of transformers, in TransformerLens's words.

sparsify and dictionary_learning train on what a module reads and what it returns. `mlp.hook_in` and `attn.hook_in` are
what TransformerLens' bridge calls the inputs of these modules, after their norm. In models with a norm after the
sublayer too (Gemma 2 and 3, OLMo 2, GLM 4) a module's output is not yet what joins the stream: there hook_mlp_out and
hook_attn_out are the nearest names, and the norm lies between.
"""

import re

_LAYER = re.compile(r"(?:.+\.)?(?:layers|h|blocks|block)\.(\d+)(?:\.(.+))?")
_MLP, _ATTENTION = ("mlp.hook_in", "hook_mlp_out"), ("attn.hook_in", "hook_attn_out")
_MODULES = {
    None: ("hook_resid_pre", "hook_resid_post"),
    **dict.fromkeys(("mlp", "feed_forward", "block_sparse_moe"), _MLP),
    **dict.fromkeys(("self_attn", "attn", "attention", "self_attention"), _ATTENTION),
}
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "hook_embed")


def of_module(name: str) -> tuple[str, str]:
    """What a module reads and what it returns: ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out") for "layers.3.mlp".

    The name itself for a module of a layer that TransformerLens has no name for, empty for what names no module.
    """
    if name.rpartition(".")[2] in _EMBEDDINGS:
        return "", "hook_embed"
    found = _LAYER.fullmatch(name)
    if found is None:
        return "", ""
    layer, module = found.groups()
    read, returned = _MODULES.get(module, ("", ""))
    return (f"blocks.{layer}.{read}", f"blocks.{layer}.{returned}") if returned else ("", name)
