"""Every room with every kind of SAE that is only loaded: right, or one line that says what it is and what to do."""

import logging
from dataclasses import replace

import pytest
import torch

from sae import converting, dialling, steer
from sae.autoencoder import SAE, FeatureStats
from sae.errors import UserError
from sae.evaluation.core import evaluate
from sae.features import pool
from sae.features.lens import beginning_tokens, logit_lens, output_scores
from sae.features.pool import reader, text_maxima
from sae.finding import index as index_of
from sae.finding import show
from sae.interventions import feature_part
from sae.recipe import Recipe
from sae.selections import Pursuit
from sae.steering.directions import of_feature
from sae.token_norm import scale
from sae.warm import open_sae
from sae.where import Where
from tests.conftest import make_sae
from tests.evaluation.test_core import draw_documents, pack_rows

READS, WRITES, RESID = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"
TOKENS = torch.arange(100, 124).view(2, 12)
TEXTS = ["The bridge is red and long.", "A cat sat on the mat.", "Seven ships sailed under it."] * 2

TOKEN_NORMS = {
    "layer_norm": {"normalize_activations": "layer_norm"},
    "layer_norm, jumprelu": {"normalize_activations": "layer_norm", "architecture": "jumprelu", "k": None},
    "constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
}
OWN_RULES = {
    "abstopk": {"architecture": "abstopk"},
    "groupmax": {"architecture": "groupmax"},
    "matching_pursuit": {"architecture": "matching_pursuit", "k": None, "pursuit": Pursuit(max_iterations=5)},
}
TRANSCODERS = {"transcoder": {}, "skip transcoder": {}}
ALONE = TOKEN_NORMS | OWN_RULES  # one hook
EVERY = ALONE | TRANSCODERS


def made(kind):
    """A random SAE of a kind for the tiny host, with statistics."""
    plain = make_sae(hook_name=RESID)
    cfg = replace(plain.cfg, **EVERY[kind])
    if kind in TRANSCODERS:
        about = replace(cfg.metadata, hook_name=READS, hook_name_out=WRITES)
        cfg = replace(cfg, d_out=32, apply_b_dec_to_input=False, metadata=about)
    generator = torch.Generator().manual_seed(9)
    tensors = {"W_enc": plain.W_enc, "W_dec": plain.W_dec * 1.5, "b_enc": plain.b_enc, "b_dec": plain.b_dec}
    if kind == "matching_pursuit":
        tensors["W_enc"] = plain.W_dec.T
    if kind == "skip transcoder":
        tensors["W_skip"] = torch.randn(32, 32, generator=generator) / 6
    if cfg.architecture == "jumprelu":
        tensors["threshold"] = torch.rand(96, generator=generator)
    sae = SAE.of(cfg, {name: tensor.detach() for name, tensor in tensors.items()}).requires_grad_(False)
    sae.stats = FeatureStats(plain.stats.max_act, plain.stats.density, plain.stats.p999, plain.stats.n_tokens)
    return sae


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=3e-5 * float(theirs.abs().max()), rtol=0)


def raised(run, *words):
    with pytest.raises(UserError) as error:
        run()
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


# ---- steering


def by_hooks(host, sae, change):
    """Logits where a hook on the activations changes them and the error term stays."""

    def hook(acts, hook):
        acts[:, 1:, 7] = change(acts[:, 1:, 7])

    hooks = [(f"{sae.hook_out}.hook_sae_acts_post", hook)]
    return host.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=hooks, use_error_term=True)


LAWS = {
    "7=3": lambda a: torch.full_like(a, 3.0),
    "7+=3": lambda a: a + 3,
    "7*=3": lambda a: a * 3,
    "7>=0.5": lambda a: a.clamp_min(0.5),
    "7<=-0.5": lambda a: a.clamp_max(-0.5),
    "7=0x": lambda a: a * 0,
}


@pytest.mark.parametrize("dial", LAWS)
@pytest.mark.parametrize("kind", ALONE)
def test_a_dial_does_what_a_hook_on_the_activations_does(tiny_host, kind, dial):
    sae = made(kind)
    sae.b_enc[7] = 1.0  # so that it fires, in matching pursuit by its row
    handle = steer(tiny_host, sae, dial, positions="1:", special=True)
    close(tiny_host.logits(TOKENS, edits=handle.edits), by_hooks(tiny_host, sae, LAWS[dial]))


@pytest.mark.parametrize("kind", ALONE)
def test_a_condition_reads_the_activation_that_the_sae_has(tiny_host, kind):
    sae, rows = made(kind), torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) * 2
    acts = sae.encode(rows)
    feature = int((acts > 0).sum(0).argmax())
    middle = float(acts[:, feature][acts[:, feature] > 0].median())
    gate = steer(tiny_host, sae, f"{feature}+=1", when=f"{feature}>{middle}").edits[0][1].parts[0].gate
    assert gate is not None and torch.equal(gate(rows), acts[:, feature] > middle) and bool(gate(rows).any())


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_a_transcoder_is_no_edit_of_one_hook(tiny_host, kind, tmp_path):
    sae = made(kind)
    words = ("transcoder", READS, WRITES, "run_with_hooks_with_saes")
    for dials in ("7=3", "7+=3", "7=off"):
        raised(lambda dials=dials: steer(tiny_host, sae, dials), *words)
    raised(lambda: feature_part(sae, [], Where()), *words)
    folder = sae.save(tmp_path / "sae")
    for to in ("safetensors", "vector", "gguf"):
        raised(lambda to=to: converting.convert(folder, "7+=3", tmp_path / "out", to, host=tiny_host), *words)
    raised(lambda: dialling.calibrate(folder, 7, ["bridge"], host=tiny_host), *words)
    raised(lambda: dialling.effects(folder, "7=3", ["bridge"], host=tiny_host), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", TOKEN_NORMS)
def test_where_each_token_has_its_own_unit_no_file_and_no_share_of_a_norm_can_say_a_strength(tiny_host, kind, tmp_path):
    folder, words = made(kind).save(tmp_path / "sae"), ("norms each token", TOKEN_NORMS[kind]["normalize_activations"])
    for to in ("safetensors", "vector", "gguf"):
        raised(lambda to=to: converting.convert(folder, "7+=3", tmp_path / "out", to, host=tiny_host), *words)
    raised(lambda: dialling.calibrate(folder, 7, ["bridge"], host=tiny_host), *words)


@pytest.mark.parametrize("kind", OWN_RULES)
def test_a_file_says_what_a_rule_of_its_own_adds_and_not_what_it_reads(tiny_host, kind, tmp_path):
    folder = made(kind).save(tmp_path / "sae")
    raised(lambda: converting.convert(folder, "7=3", tmp_path / "out"), kind, "7+=")
    converting.convert(folder, "7+=3", tmp_path / "out")
    converting.convert(folder, "7=3", tmp_path / "out", "vector", host=tiny_host)


def test_a_direction_of_a_feature_lies_where_it_is_written_and_has_a_scale_of_x(tiny_host):
    there = of_feature(tiny_host, made("transcoder"), 7, TEXTS)
    assert there.hook == WRITES and there.max_act == float(made("transcoder").stats.max_act[7])
    normed, plain = of_feature(tiny_host, made("layer_norm"), 7, TEXTS), made("layer_norm")
    assert normed.hook == RESID and normed.max_act != float(plain.stats.max_act[7])


# ---- evaluation


@pytest.mark.parametrize("kind", EVERY)
def test_an_evaluation_is_of_what_the_sae_itself_makes_where_it_writes(tiny_host, kind):
    sae, rows = made(kind), pack_rows(draw_documents(), "left")
    reads, writes = sae.cfg.metadata.hook_name, sae.hook_out
    report = evaluate(sae, tiny_host, [rows], tokens=10**6, ce_tokens=10**6)
    ours = report["eval_result_unstructured"]["goldengate"]
    acts = tiny_host.activations(rows.tokens, [reads, writes], pos=rows.pos, doc=rows.doc)
    x, stood = acts[reads], acts[writes]
    rebuilt, valid = sae(x), stood[rows.mask].double()
    fvu = (valid - rebuilt[rows.mask].double()).square().sum() / (valid - valid.mean(0)).square().sum()
    assert ours["fvu"]["value"] == pytest.approx(float(fvu), rel=1e-4)

    def put(new, at):
        return torch.where(rows.mask[..., None], rebuilt, new)

    logits = tiny_host.logits(rows.tokens, pos=rows.pos, doc=rows.doc, edits=[(writes, put)])
    predicts = rows.mask & (rows.doc.roll(-1, 1) == rows.doc)
    predicts[:, -1] = False
    target = rows.tokens.roll(-1, 1).long()[predicts]
    loss = torch.nn.functional.cross_entropy(logits[predicts].float(), target)
    assert ours["ce_sae"]["value"] == pytest.approx(float(loss), rel=1e-4)
    config = report["eval_config"]
    assert config["hook_name"] == reads and config.get("hook_name_out", reads) == writes
    assert (ours["weights"]["average_encoder_decoder_cosine_sim"] is None) == (kind in TRANSCODERS)


def test_a_transcoder_of_another_width_or_without_a_place_to_write_is_one_line(tiny_host):
    rows, sae = pack_rows(draw_documents(), "left"), made("transcoder")
    sae.cfg = replace(sae.cfg, metadata=replace(sae.cfg.metadata, hook_name_out=""))
    raised(lambda: evaluate(sae, tiny_host, [rows]), "does not say where it writes")
    raised(lambda: tiny_host.run_with_saes(TOKENS, saes=sae), "does not say where it writes")
    wide = SAE(replace(made("transcoder").cfg, d_out=48))
    raised(lambda: evaluate(wide, tiny_host, [rows]), "width 48", WRITES)


# ---- finding


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_what_finding_reads_is_what_the_sae_has_above_zero(kind, half, monkeypatch):
    monkeypatch.setattr(pool, "machine_dtype", lambda device: torch.bfloat16 if half else torch.float32)
    sae, x = made(kind), torch.randn(80, 32, generator=torch.Generator().manual_seed(0)) * 3
    close(reader(sae)(x).dense(), sae.encode(x))


@pytest.mark.parametrize("kind", EVERY)
def test_the_maxima_of_texts_are_those_of_the_dense_activations(tiny_host, kind):
    sae = made(kind)
    maxima, reads = text_maxima(TEXTS[:3], sae, tiny_host), sae.cfg.metadata.hook_name
    rows, features, values = maxima.select(torch.arange(3))
    found = torch.zeros(3, 96)
    found[rows, features] = values
    for i, text in enumerate(TEXTS[:3]):
        tokens = tiny_host.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        acts = sae.encode(tiny_host.activations(tokens, [reads])[reads])[0, 1:]
        close(found[i], acts.amax(0).relu())


@pytest.mark.parametrize("kind", [*TOKEN_NORMS, *TRANSCODERS])
def test_an_output_score_is_of_what_the_feature_writes_where_it_writes(tiny_host, kind):
    sae, features = made(kind), [0, 3, 50]
    reads, writes = sae.cfg.metadata.hook_name, sae.hook_out
    found = output_scores(tiny_host, sae, features, reads, beginnings=("Today",), says=3)
    tokens = beginning_tokens(tiny_host, "Today")
    x = tiny_host.activations(tokens, [reads])[reads][0, -1]
    norm = sae.cfg.normalize_activations
    unit = 1.0 if norm == "none" else float(scale(norm, x))
    top = logit_lens(tiny_host, sae.W_dec[features]).top.long()
    for i, feature in enumerate(features):
        added = 5 * float(sae.stats.max_act[feature]) * unit * sae.W_dec[feature]

        def edit(x, at, added=added):
            return torch.cat([x[:, :-1], x[:, -1:] + added], 1)

        logits = tiny_host.logits(tokens, edits=[(writes, edit)])[0, -1]
        rank = min(int((logits > logits[v]).sum()) for v in top[i])
        best = float(logits.softmax(-1)[top[i]].max())
        assert float(found.score[i]) == pytest.approx((1 - rank / len(logits)) * best, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("kind", EVERY)
def test_an_index_is_made_of_every_kind_and_one_feature_is_shown(tiny_host, kind, tmp_path, caplog):
    folder = made(kind).save(tmp_path / "sae")
    with caplog.at_level(logging.WARNING, logger="sae"):
        index = index_of(folder, host=tiny_host, text="bundled", tokens=400, scores=False, progress=False)
    assert ("below 0" in caplog.text) == (kind == "abstopk")
    feature = int(index.stats["max_act"].argmax())
    one = show(folder, feature, host=tiny_host, ask=True)
    assert one.top_tokens and bool(one.answers) == (kind not in TRANSCODERS)


# ---- training


@pytest.mark.parametrize("kind", EVERY)
def test_no_training_begins_from_what_is_only_loaded(tmp_path, kind):
    folder = made(kind).save(tmp_path / "sae")
    recipe = replace(Recipe(), sae=replace(Recipe().sae, d_sae=96, architecture="topk"))
    recipe = replace(recipe, training=replace(recipe.training, init_from=str(folder)))
    hook = made(kind).cfg.metadata.hook_name
    raised(lambda: open_sae(recipe, hook, None, 32), str(folder), "Choose another SAE")
