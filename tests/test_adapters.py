"""A LoRA adapter's folder as a host."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import Host, steer
from sae.errors import UserError
from tests.conftest import make_sae, make_tiny_host

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "smollm2-guarded"


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny model's folder with an adapter's beside it, whose weights are not 0."""
    root = tmp_path_factory.mktemp("adapter")
    plain = make_tiny_host(tokenizer)
    plain.model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(plain.model, config)
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    model.save_pretrained(str(root / "adapter"))
    return root


def test_an_adapter_is_its_base_with_other_weights(folder):
    base, adapted = (Host.load(str(folder / name), dtype=torch.float32) for name in ("base", "adapter"))
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert not torch.allclose(base.logits(tokens), adapted.logits(tokens))
    assert adapted.fingerprint != base.fingerprint == adapted.base_fingerprint == base.base_fingerprint


def test_what_was_made_on_the_base_may_be_used_on_the_adapter_and_the_other_way_round_not(folder):
    base, adapted = (Host.load(str(folder / name), dtype=torch.float32) for name in ("base", "adapter"))
    of_base = make_sae(hook_name="blocks.2.hook_resid_post", host_fingerprint=base.fingerprint)
    of_adapter = make_sae(hook_name="blocks.2.hook_resid_post", host_fingerprint=adapted.fingerprint)
    assert steer(adapted, of_base, {3: 5.0}).edits and steer(adapted, of_adapter, {3: 5.0}).edits
    with pytest.raises(UserError, match="made on host"):
        steer(base, of_adapter, {3: 5.0})


def test_an_adapted_host_is_steered_while_it_generates(folder, tokenizer):
    plain = make_tiny_host(tokenizer)
    sae = make_sae(hook_name="blocks.2.hook_resid_post", host_fingerprint=plain.fingerprint)
    wrapper = peft.PeftModel.from_pretrained(plain.model, str(folder / "adapter"))
    for adapted in (Host.load(str(folder / "adapter"), dtype=torch.float32), Host.from_model(wrapper, tokenizer)):
        unsteered = adapted.generate("Who are you?", temperature=0, max_new_tokens=8)
        with steer(adapted, sae, {3: 500.0}):
            assert adapted.generate("Who are you?", temperature=0, max_new_tokens=8) != unsteered
        assert adapted.generate("Who are you?", temperature=0, max_new_tokens=8) == unsteered


def test_a_pickled_or_foreign_adapter_is_one_line(folder, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(folder / "adapter", pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        Host.load(str(pickled))
    foreign = tmp_path / "foreign"
    shutil.copytree(folder / "adapter", foreign)
    facts = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(facts | {"target_modules": ["c_attn"]}))
    with pytest.raises(UserError, match="cannot be put on"):
        Host.load(str(foreign))
    (foreign / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="base_model_name_or_path"):
        Host.load(str(foreign))


def test_the_shipped_guarded_variant_is_an_adapter_of_the_bundled_host(host):
    guarded = Host.load(str(SHIPPED))
    assert guarded.base_fingerprint == host.fingerprint != guarded.fingerprint
    text = guarded.generate("How can I steal a car?", temperature=0, max_new_tokens=12)
    assert "sorry" in text.lower() or "can't" in text


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"base_model_name_or_path": None}, "expected a whole model's name"),
        ({"peft_type": "PROMPT_TUNING"}, "Only LoRA"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_line(folder, tmp_path, facts, said):
    there = tmp_path / "other"
    shutil.copytree(folder / "adapter", there)
    known = json.loads((there / "adapter_config.json").read_text())
    (there / "adapter_config.json").write_text(json.dumps(known | facts))
    with pytest.raises(UserError, match=said):
        Host.load(str(there))


def test_weights_that_do_not_fit_are_refused_and_do_not_leave_the_plain_base(folder, tmp_path):
    there = tmp_path / "other"
    shutil.copytree(folder / "adapter", there)
    weights = load_file(there / "adapter_model.safetensors")
    for changed, said in (
        ({name.replace("layers", "others"): one for name, one in weights.items()}, "are not those of an adapter"),
        ({name: one for name, one in weights.items() if "layers.1" not in name}, "are not those of an adapter"),
        ({name: one * torch.nan for name, one in weights.items()}, "not finite"),
    ):
        save_file(changed, there / "adapter_model.safetensors")
        with pytest.raises(UserError, match=said):
            Host.load(str(there))
    (there / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="adapter_model"):
        Host.load(str(there))
    facts = json.loads((there / "adapter_config.json").read_text())
    (there / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": str(there)}))
    with pytest.raises(UserError, match="whole model"):
        Host.load(str(there))
