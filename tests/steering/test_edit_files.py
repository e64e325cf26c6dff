"""Dials as files: what is loaded again steers alike, what a format cannot say is told or refused."""

import pytest
import torch

from sae import SAE, files, steer
from sae.cli import main
from sae.converting import convert
from sae.errors import UserError
from sae.steering import Direction, load_edit
from tests.conftest import make_sae
from tests.steering.conftest import HOOK

DIALS = "7=2x,9+=1.5,11*=3,12>=0.8,13<=0.2,14=0x"
SHIPPED = "checkpoints/smollm2-golden-gate"
BRIDGE = "2202=0.87x"


@pytest.fixture
def tokens(tiny_host):
    return torch.randint(20, 2000, (3, 17), generator=torch.Generator().manual_seed(0))


def gap(host, tokens, one, other):
    """The largest difference of logits, and that of the first to the unsteered ones."""
    first, second = (host.logits(tokens, edits=steering.edits).float() for steering in (one, other))
    return float((first - second).abs().max()), float((first - host.logits(tokens)).abs().max())


def save(tmp_path, host, **options):
    sae = make_sae(**{"hook_name": HOOK, "host_fingerprint": host.fingerprint, **options})
    return sae.save(tmp_path / "sae")


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "relu"])
@pytest.mark.parametrize("options", [{}, {"special": True}, {"positions": "4:"}], ids=str)
def test_a_loaded_edit_steers_as_the_sae_does(tmp_path, tiny_host, tokens, architecture, options):
    folder = save(tmp_path, tiny_host, architecture=architecture, outlier_norm=40.0)
    convert(folder, DIALS, tmp_path / "edit")
    by_file = load_edit(tiny_host, tmp_path / "edit", **options)
    by_sae = steer(tiny_host, folder, DIALS, select="threshold", **options)
    difference, moved = gap(tiny_host, tokens, by_file, by_sae)
    assert difference < 1e-5 < 1e-1 < moved


@pytest.mark.parametrize("plan", ["ramp:4", lambda token: 0.5])
def test_a_loaded_edit_follows_a_plan(tmp_path, tiny_host, tokens, plan):
    folder = save(tmp_path, tiny_host)
    convert(folder, DIALS, tmp_path / "edit")
    answers = [
        tiny_host.generate(tokens[:1], max_new_tokens=6, temperature=0, edits=steering.edits)
        for steering in (
            load_edit(tiny_host, tmp_path / "edit", plan=plan),
            steer(tiny_host, folder, DIALS, select="threshold", plan=plan),
        )
    ]
    assert answers[0] == answers[1]


def test_only_plain_topk_loses_its_rule_and_only_where_a_dial_reads(tmp_path, tiny_host):
    folder = save(tmp_path, tiny_host)
    lost = convert(folder, DIALS, tmp_path / "edit")["lost"]
    assert len(lost) == 1 and "ranks a feature against all others (k=6)" in lost[0]
    assert files.read_safetensors(tmp_path / "edit")[1]["lost"] == lost[0]
    assert convert(folder, "7+=2x,8+=1", tmp_path / "edit")["lost"] == []
    assert files.read_safetensors(tmp_path / "edit")[1]["reading"] == "none"
    jumprelu = save(tmp_path / "jumprelu", tiny_host, architecture="jumprelu")
    assert convert(jumprelu, DIALS, tmp_path / "edit")["lost"] == []


def test_topk_without_a_threshold_can_only_add(tmp_path, tiny_host, tokens):
    sae = make_sae(hook_name=HOOK, host_fingerprint=tiny_host.fingerprint)
    sae.threshold = None
    folder = sae.save(tmp_path / "sae")
    with pytest.raises(UserError, match=r"7=2x: this TopK SAE .*has no calibrated threshold"):
        convert(folder, "7=2x", tmp_path / "edit")
    assert not (tmp_path / "edit").exists()
    convert(folder, "7+=2x,9+=1", tmp_path / "edit")
    loaded = load_edit(tiny_host, tmp_path / "edit")
    difference, moved = gap(tiny_host, tokens, loaded, steer(tiny_host, folder, "7+=2x,9+=1"))
    assert difference < 1e-5 < 1e-1 < moved


def test_the_metadata_of_an_edit_say_what_it_is(tmp_path, tiny_host, folder):
    made = convert(folder, ["the bridge=2x", "77=off", "9+=1.5"], tmp_path / "edit")
    assert made["dials"] == "7=2x,9+=1.5"
    facts = files.read_safetensors(tmp_path / "edit")[1]
    assert facts | {"rule": "", "lost": ""} == {
        "format": "goldengate-edit-1", "rule": "", "hook": HOOK, "reading": "threshold", "features": "7,9",
        "kinds": "clamp,add", "dials": "7=2x,9+=1.5", "host": "", "host_fingerprint": tiny_host.fingerprint,
        "outlier_norm": "None", "lost": "",
    }  # fmt: skip


def test_an_edit_belongs_to_its_host(tmp_path, tiny_host, host):
    convert(save(tmp_path, tiny_host), "7=2x", tmp_path / "edit")
    with pytest.raises(UserError, match=r"edit: made for .* of width 32, smollm2 is 576 wide there"):
        load_edit(host, tmp_path / "edit")
    convert(save(tmp_path, tiny_host, host_fingerprint="feed"), "7=2x", tmp_path / "edit")
    with pytest.raises(UserError, match=r"edit: made on host feed .* pass force"):
        load_edit(tiny_host, tmp_path / "edit")
    assert load_edit(tiny_host, tmp_path / "edit", force=True).edits


def test_the_dials_of_a_loaded_edit_are_fixed_but_it_adds_up_with_others(tmp_path, tiny_host, folder, tokens):
    convert(folder, "7=2x", tmp_path / "edit")
    loaded = load_edit(tiny_host, tmp_path / "edit")
    with pytest.raises(UserError, match="its dials are fixed"):
        loaded.set("7=1x")
    both, apart = (steer(tiny_host, folder, dials, select="threshold") for dials in ("7=2x,9=1x", "9=1x"))
    assert gap(tiny_host, tokens, loaded + apart, both)[0] < 1e-5


# ---- vectors ---------------------------------------------------------------------------------------------


def test_a_vector_once_is_what_the_dials_add(tmp_path, tiny_host, folder, tokens):
    assert convert(folder, "7+=2x,9+=-1.5", tmp_path / "a", "vector", host=tiny_host)["lost"] == []
    direction = Direction.load(tmp_path / "a")
    sae = SAE.load(folder)
    assert sae.stats is not None
    total = 2 * sae.stats.max_act[7] * sae.W_dec[7] - 1.5 * sae.W_dec[9]
    torch.testing.assert_close(direction.vector * direction.max_act, total.detach(), atol=1e-6, rtol=1e-6)
    assert direction.hook == HOOK and direction.host_fingerprint == tiny_host.fingerprint and direction.norm > 0
    difference, moved = gap(
        tiny_host, tokens, steer(tiny_host, direction, "1x"), steer(tiny_host, folder, "7+=2x,9+=-1.5")
    )
    assert difference < 1e-4 < 1e-1 < moved


def test_what_a_clamp_loses_is_told_for_each_and_kept_in_the_file(tmp_path, tiny_host, folder):
    lost = convert(folder, "7=2x,8+=1,9=1x", tmp_path / "a", "vector", host=tiny_host)["lost"]
    assert [line.partition(":")[0] for line in lost] == ["7=2x", "9=1x"]
    assert files.read_safetensors(tmp_path / "a")[1]["lost"].splitlines() == lost


@pytest.mark.parametrize("to", ["vector", "gguf"])
@pytest.mark.parametrize(
    ("dials", "said"),
    [
        ("7*=2", r"7\*=2: what it does depends on what the feature has"),
        ("7>=2x", r"7>=2x: .*Take --to safetensors, or add with 7\+=STRENGTH"),
        ("7<=2x", "7<=2x: "),
        ("7=0x", "7=0x: "),
        ("8=1x,7+=0", r"7\+=0: "),
        ("7=off,8=off", "dials: all are off"),
        ("off", "dials: all are off"),
        ("7=1x,96=1x", "feature 96 does not exist: this SAE has 96"),
    ],
)
def test_what_no_vector_can_say_is_refused_before_the_host_is_loaded(tmp_path, folder, dials, said, to):
    with pytest.raises(UserError, match=said):
        convert(folder, dials, tmp_path / "a", to)
    assert not (tmp_path / "a").exists()


def test_dials_that_cancel_out_are_no_vector(tmp_path, tiny_host):
    sae = make_sae(hook_name=HOOK, host_fingerprint=tiny_host.fingerprint)
    sae.W_dec[8] = -sae.W_dec[7]
    with pytest.raises(UserError, match=r"7\+=2,8\+=2: the dials cancel out"):
        convert(sae.save(tmp_path / "sae"), "7+=2,8+=2", tmp_path / "a", "vector", host=tiny_host)


# ---- control vectors -------------------------------------------------------------------------------------


def control_vector_of(path):
    """(layer, vector) of a control vector that has one."""
    (tensor,) = pytest.importorskip("gguf").GGUFReader(path).tensors
    name, _, layer = tensor.name.partition(".")
    assert name == "direction"
    return int(layer), torch.tensor(tensor.data)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.2.hook_resid_post", 2), ("blocks.3.hook_resid_pre", 2), ("model.layers.1", 1), ("blocks.3.hook_out", 3)],
)
def test_direction_l_is_the_stream_after_block_l(tmp_path, tiny_host, hook, layer):
    pytest.importorskip("gguf")
    folder = save(tmp_path, tiny_host, hook_name=hook)
    made = convert(folder, "7+=2", tmp_path / "a.gguf", "gguf", host=tiny_host)
    found, vector = control_vector_of(tmp_path / "a.gguf")
    assert found == layer
    torch.testing.assert_close(vector, 2 * SAE.load(folder).W_dec[7].detach(), atol=0, rtol=0)
    assert len(made["lost"]) == 1 and "at every position" in made["lost"][0]


@pytest.mark.parametrize(
    "hook",
    ["blocks.0.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out",
     "blocks.2.hook_attn_out", "blocks.2.hook_resid_mid", "blocks.2.attn.hook_z"],
)  # fmt: skip
def test_other_hooks_are_no_control_vector(tmp_path, tiny_host, hook):
    with pytest.raises(UserError, match=f"{hook}: no control vector can say this.*Take --to safetensors"):
        convert(save(tmp_path, tiny_host, hook_name=hook), "7+=2", tmp_path / "a", "gguf", host=tiny_host)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("to", ["vector", "gguf"])
def test_a_vector_of_another_host_is_refused(tmp_path, tiny_host, to):
    with pytest.raises(UserError, match="SAE: made on host feed"):
        convert(save(tmp_path, tiny_host, host_fingerprint="feed"), "7+=2", tmp_path / "a", to, host=tiny_host)


# ---- the real host ---------------------------------------------------------------------------------------


def test_the_bridge_from_a_file_steers_the_real_host_alike(tmp_path, host):
    convert(SHIPPED, BRIDGE, tmp_path / "edit")
    tokens = host.chat_tokens("What is your physical form?")
    by_file, by_sae = load_edit(host, tmp_path / "edit"), steer(host, SHIPPED, BRIDGE, select="threshold")
    difference, moved = gap(host, tokens, by_file, by_sae)
    assert difference < 1e-5 < 1 < moved
    answers = [
        host.generate(tokens, max_new_tokens=12, temperature=0, edits=steering.edits) for steering in (by_file, by_sae)
    ]
    assert answers[0] == answers[1]


def test_llama_cpps_addition_by_hand_is_what_the_dial_does_at_every_position(tmp_path, host):
    """A plain PyTorch hook on the block, which knows nothing of our steering, adds direction.12 everywhere."""
    pytest.importorskip("gguf")
    convert(SHIPPED, "2202+=0.87x", tmp_path / "bridge.gguf", "gguf", host=host)
    layer, vector = control_vector_of(tmp_path / "bridge.gguf")
    assert layer == 12
    tokens = host.chat_tokens("What is your physical form?")

    def add(module, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handle = host.model.model.layers[layer].register_forward_hook(add)
    try:
        with torch.no_grad():
            by_hand = host.model(tokens).logits
    finally:
        handle.remove()
    steered = host.logits(tokens, edits=steer(host, SHIPPED, "2202+=0.87x", special=True).edits)
    torch.testing.assert_close(by_hand, steered, atol=1e-4, rtol=0)
    assert not torch.allclose(steered, host.logits(tokens), atol=1)


# ---- the verb --------------------------------------------------------------------------------------------


def run(capsys, *words):
    code = main(["convert", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_verb_writes_the_file_and_tells_what_is_lost(tmp_path, folder, capsys, tiny_host):
    out = tmp_path / "new" / "edit.safetensors"
    for _ in range(2):  # a file that is there is replaced
        code, said, err = run(capsys, folder, "--feature", "the bridge=2x", "--feature", "9+=1", out)
        assert (code, err) == (0, "")
    assert "7=2x,9+=1" in said and f'load_edit(host, "{out}")' in said
    assert [line for line in said.splitlines() if line.startswith("lost: ")] == [
        "lost: the SAE's own rule ranks a feature against all others (k=6) and needs the whole SAE: the file reads "
        "features by their calibrated threshold (steer's select='threshold')"
    ]
    assert [path.name for path in out.parent.iterdir()] == ["edit.safetensors"]
    assert load_edit(tiny_host, out).edits


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--feature", "7=2x", "--to", "gufg", "OUT"], "sae convert: --to is 'gufg', expected one of saelens"),
        (["--feature", "96=2x", "OUT"], "sae convert: feature 96 does not exist"),
        (["--feature", "7", "OUT"], "sae convert: dial: '7' has no '='"),
        (["--feature", "7=2x", "--feature", "7=1x", "OUT"], "sae convert: dials: feature 7 is set twice"),
        (["--to", "gguf", "OUT"], "sae convert: --to gguf: is for dials, and no --feature is given."),
        (["--feature", "7=2x", "--to", "sparsify", "OUT"], "sae convert: --to sparsify: is for a whole SAE."),
        (["--feature", "7=2x"], "sae convert: OUT is missing."),
        (["--feature", "7=2x", "FOLDER"], "is no regular file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, folder, capsys, words, said):
    named = {"OUT": str(tmp_path / "edit"), "FOLDER": str(tmp_path)}
    code, out, err = run(capsys, folder, *(named.get(word, word) for word in words))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not (tmp_path / "edit").exists()


def test_python_is_told_the_formats_too(tmp_path, folder):
    with pytest.raises(UserError, match="'gufg' is not a format; there are safetensors, vector, gguf"):
        convert(folder, "7=2x", tmp_path / "edit", "gufg")
