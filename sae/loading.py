"""Model and tokenizer from a name: the bundled GGUF, any GGUF file, a local folder, an adapter's, a Hugging Face id or
TransformerLens's short name of one.

Promise: `load` gives both in the dtype asked for, on the CPU, without transformers' progress bars and advice;
whatever cannot be loaded is one line. Cost: the first load of a GGUF de-quantises (10-20 s for the bundled
one) and leaves float32 safetensors (540 MB) in the user's cache folder; later loads take about 2 s.
`fingerprint` tells weights apart once they are loaded.
"""

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sae import bundled, files, hub
from sae.errors import UserError, first_line

logger = logging.getLogger("sae")
_ADAPTER = "adapter_config.json"


def load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) of `smollm2` (bundled), a .gguf file, a folder (of an adapter too), a Hugging Face id, or
    TransformerLens's short name of one."""
    with quiet_transformers():
        if (Path(name) / _ADAPTER).is_file():
            return _load_adapter(Path(name), dtype)
        if name == "smollm2":
            return _load_gguf(bundled.weights_path(), dtype)
        if name.endswith(".gguf"):
            if not Path(name).is_file():
                raise UserError(f"{name}: no such file. Check the path.")
            return _load_gguf(Path(name), dtype)
        return _load_pretrained(name, dtype)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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

    known, name = name, _official(name)
    silent = ""
    try:
        if not Path(name).exists() and (silent := _silent_hub(name)):
            options["local_files_only"] = True  # a copy in the cache, or an error at once
            options["adapter_kwargs"] = {"local_files_only": True}  # where peft is installed it looks for one first
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        options.pop("adapter_kwargs", None)
        options.pop("quantization_config", None)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = first_line(error)
        if silent:
            reason = f"{silent}, and no whole copy is in its cache"
        raise UserError(
            f"host: {known}{f' ({name})' if name != known else ''} cannot be loaded ({reason}). "
            "Give smollm2, a folder or .gguf file that exists, or a Hugging Face id that can be reached."
        ) from error
    return model, tokenizer


def _official(name: str) -> str:
    """The Hugging Face id that TransformerLens's short name (gpt2-small, gemma-2-2b, …) stands for: SAEs of SAELens and
    Gemma Scope carry those. Any other name as it is. A second for the import, which the bridge needs anyway."""
    if "/" in name or Path(name).exists():
        return name
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((official for official, aliases in MODEL_ALIASES.items() if name in aliases), name)


def _load_adapter(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model that a peft adapter was trained on with the adapter merged into its weights, in float32 before it is
    cast: some three times as fast as with the adapter beside them. `adapted_from` is the base's fingerprint."""
    facts = files.read_json_object(folder / _ADAPTER, ("base_model_name_or_path", "peft_type"))
    name = facts["base_model_name_or_path"]
    if not isinstance(name, str) or not name or (Path(name) / _ADAPTER).is_file():
        raise UserError(f"{folder / _ADAPTER}: base_model_name_or_path is {name}, expected a whole model's name.")
    if facts["peft_type"] != "LORA":
        raise UserError(f"{folder}: is an adapter of type {facts['peft_type']}. Only LoRA can be merged into a host.")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder}: has no adapter_model.safetensors. Save the adapter with safetensors.")
    given, _ = files.read_safetensors(weights)
    if not all(bool(one.isfinite().all()) for one in given.values()):
        raise UserError(f"{weights}: has weights that are not finite. Train the adapter again.")
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise UserError(f"{folder}: is an adapter. Run: pip install 'goldengate-sae[adapters]'") from error
    base, tokenizer = load(name, torch.float32)
    before = fingerprint(base, base.config.get_text_config())
    try:
        adapted: Any = PeftModel.from_pretrained(base, str(folder))
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder}: cannot be put on {name} ({error}).") from error
    if set(get_peft_model_state_dict(adapted)) != set(given):
        raise UserError(
            f"{weights}: its weights are not those of an adapter on {name}. Give the model it was trained on."
        )
    model = adapted.merge_and_unload().to(dtype)
    model.adapted_from = before
    return model, tokenizer


def _silent_hub(name: str) -> str:
    """Why the Hugging Face Hub is not asked for this id, empty when it answers: one request of some seconds.

    Transformers' own download would try a Hub that is down six times, for half a minute, with a warning each.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    with contextlib.suppress(HfHubHTTPError):  # what it is (missing, private, gated) the download will say
        return hub.ask(lambda: get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=hub.PATIENCE))[1]
    return ""


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """De-quantise once to float32 safetensors in the cache folder; load from there afterwards."""
    from safetensors import SafetensorError

    try:
        print_of = files.checksum(path)[:12]  # of all of it: fine-tunes of one model differ in the weights only
    except OSError as error:
        raise UserError(f"host: {path} cannot be read ({error.strerror}). Check the file.") from error
    cached = files.cache_dir() / "hosts" / f"{path.stem}-{print_of}"
    if (cached / "config.json").exists():
        try:
            return _load_pretrained(str(cached), dtype)
        except UserError as error:
            if "allocate memory" in str(error):  # which is no damage
                raise
            logger.warning("%s is damaged and is made again (%s)", cached, error)
    from transformers import GgufConfig

    logger.warning("%s: de-quantising for the first time (10-20 s), kept in %s", path.name, cached)
    model, tokenizer = _load_pretrained(
        str(path.parent), torch.float32, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        with files.atomic_folder(cached, marker="config.json") as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (UserError, OSError, SafetensorError) as error:  # a full disk is a SafetensorError from its writer
        logger.warning("the de-quantised weights were not kept in %s (%s)", cached, error)
    else:
        return _load_pretrained(str(cached), dtype)
    return model.to(dtype), tokenizer


def fingerprint(model: nn.Module, config: Any, base: bool = False) -> str:
    """16 hex digits that name these weights, the same for float32 and bfloat16 loads and under a bridge.

    base    without the low-rank adapters (peft's LoRA) that the model carries: the name of what they were put on

    From the sizes in the config and 64 strided samples of each tensor, as bfloat16: weights that differ
    between the samples only are not told apart. Quantised weights have a fingerprint of their own.
    """
    keys = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    digests = set()
    named = {name: one for name, one in model.named_parameters() if not (base and ".lora_" in name)}
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
    facts = json.dumps([[key, getattr(config, key, None)] for key in keys] + sorted(digests))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits that name how a tokenizer reads text: its vocabulary, merges, normalisation and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        # How a call pads or cuts is no part of it, and is left in the object by the last call.
        facts = {key: value for key, value in facts.items() if key not in ("truncation", "padding")}
    else:
        facts = {"vocabulary": sorted(tokenizer.get_vocab().items()), "special": sorted(tokenizer.all_special_ids)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
