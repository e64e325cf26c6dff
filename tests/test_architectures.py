"""Every architecture from training to steering: finished, saved, loaded, measured, indexed, found, steered.

On rows of planted features, where no host is needed; one short run of each on the real host is slow.
"""

import copy
from dataclasses import replace

import pytest
import torch

from sae import files
from sae.architectures import ARCHITECTURES
from sae.autoencoder import SAE
from sae.dials import Dial
from sae.evaluation.core import quick
from sae.features import search, showing
from sae.features.writing import build
from sae.host import Pass
from sae.interventions import Edit, feature_part
from sae.recipe import ActivationsRecipe, EvaluationRecipe, HostRecipe, LogRecipe, Recipe, SAERecipe, TrainingRecipe
from sae.run import info, train
from sae.training.checkpoint import all_of
from sae.where import Where
from tests.features.planted import VOCABULARY, PlantedBlock, texts
from tests.training.test_training import planted

HOOK = "blocks.2.hook_resid_post"
TRAINED = 5000
# What makes a run of some seconds sparse: the published coefficients are for billions of tokens.
SETTINGS = {
    "topk": {},
    "batchtopk": {},
    "matryoshka": {"matryoshka_widths": (20, 40, 80)},
    "jumprelu": {"l0_coefficient": 0.3},
    "relu": {"l1_coefficient": 1.0},
}


def recipe(out, name, **changes):
    return replace(
        Recipe(
            host=HostRecipe(hook=HOOK),
            sae=SAERecipe(architecture=name, d_sae=80, k=4, **SETTINGS[name]),
            training=TrainingRecipe(tokens=300_000, batch=256, dtype="float32", lr=3e-3),
            log=LogRecipe(every=200),
            out=str(out),
        ),
        **changes,
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def finished(request, tmp_path_factory):
    """(name, the SAE as train gave it, the run's folder)."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, train(recipe(folder, request.param), planted()[0][:TRAINED], progress=False), folder


@pytest.fixture(scope="module")
def x():
    return planted()[0]


def test_it_learns_and_says_what_it_is(finished, x):
    name, sae, folder = finished
    row = ARCHITECTURES[name]
    assert sae.cfg.architecture == row.inference and sae.cfg.metadata.training_architecture == name
    found = quick(sae, x[TRAINED:])
    assert found["fvu"] < 0.25 and 2 < found["l0"] < 14, found
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(80))
    told = info(folder / "sae")
    assert told["architecture"] == row.inference and told["trained as"] == name
    assert ("k" in told) == (name == "topk")


def test_the_folder_gives_back_the_same_sae(finished, x):
    _, sae, folder = finished
    loaded = SAE.load(folder / "sae")
    assert loaded.cfg == sae.cfg
    assert torch.equal(loaded.encode(x[:50]), sae.encode(x[:50]))
    torch.testing.assert_close(loaded.encode_sparse(x[:50]).dense(), sae.encode(x[:50]), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_training_is_an_sae_too(finished, x):
    """Its last one is the finished SAE, but for a BatchTopK's threshold, which the end of a run sets anew."""
    name, sae, folder = finished
    checkpoint = SAE.load(all_of(folder)[-1])
    assert checkpoint.architecture == sae.architecture and checkpoint.cfg.k == sae.cfg.k
    assert checkpoint.cfg.metadata.norm_factor == sae.cfg.metadata.norm_factor
    for weight in ("encoder", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(checkpoint, weight), getattr(sae, weight)), weight
    if noted := sae.cfg.metadata.calibration:
        sae = copy.deepcopy(sae)
        sae.threshold = torch.full((80,), noted["ema_threshold"])
    torch.testing.assert_close(checkpoint.encode(x[:50]), sae.encode(x[:50]))


def test_batchtopk_s_threshold_is_calibrated_to_k_and_says_so(finished, x):
    name, sae, _ = finished
    noted = sae.cfg.metadata.calibration
    if name not in ("batchtopk", "matryoshka"):
        assert not noted
        return
    assert noted["l0"] == pytest.approx(4, abs=0.01) and noted["rows"] == "training rows"
    assert quick(sae, x[TRAINED:])["l0"] == pytest.approx(4, rel=0.1)
    assert noted["ema_threshold"] == pytest.approx(noted["threshold"], rel=0.1)  # in raw units, it too
    assert noted["ema_l0"] == pytest.approx(4, rel=0.1)
    assert sae.cfg.metadata.matryoshka_widths == ([20, 40, 80] if name == "matryoshka" else [])


def test_statistics_are_of_its_own_codes(finished, x):
    _, sae, _ = finished
    acts = sae.encode(x[:TRAINED])
    assert sae.stats is not None and sae.stats.n_tokens == TRAINED
    torch.testing.assert_close(sae.stats.max_act, acts.amax(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.stats.density, (acts > 0).float().mean(0), rtol=0, atol=2e-3)


def test_a_planted_concept_is_found_and_steered(finished, x, tmp_path):
    """40 documents of 12 rows; a feature fires in one row of each of the first 20, which share a topic."""
    _, sae, _ = finished
    acts = sae.encode(x[TRAINED:])
    concept = int((acts > 0).sum(0).argmax())
    off = (acts[:, concept] == 0).nonzero().flatten()[:480]
    off[torch.arange(20) * 12 + 5] = acts[:, concept].topk(20).indices
    rows = x[TRAINED:][off]
    numbers = torch.arange(480, dtype=torch.int32)
    block = PlantedBlock({HOOK: rows}, numbers % 50, numbers // 12, numbers % 12, torch.ones(480, dtype=torch.bool))
    documents = [*texts(20, topic="bridges"), *texts(20, topic="kitchens")]
    index = build(sae, [block], documents, VOCABULARY, tmp_path / "index", hook=HOOK)
    index.check(sae)
    assert concept in [one.feature for one in search.find(index, "bridges", n=3)]
    assert showing.show(index, concept, sae).max_act == pytest.approx(float(acts[:, concept].max()), rel=1e-4)

    part = feature_part(sae, [Dial(concept, 2.0, per_max=True)], Where(special=True))
    assert part is not None
    edit = Edit((part,))
    at = Pass(torch.full((1, 480), 100), past=0, attention_mask=None, generating=False, prompt_length=480)
    by_hand = rows + (2 * sae.stats.max_act[concept] - sae.encode(rows)[:, [concept]]) * sae.W_dec[concept]
    torch.testing.assert_close(edit(rows[None], at)[0], by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_on_the_real_host(tmp_path_factory, host, name):
    folder = tmp_path_factory.getbasetemp() / "real"
    made = recipe(
        folder / name,
        name,
        host=HostRecipe(hook="blocks.15.hook_resid_post"),
        activations=ActivationsRecipe(store=str(folder / "acts"), min_sequences=40),
        sae=SAERecipe(architecture=name, d_sae=512, k=32),
        training=TrainingRecipe(tokens=60_000, batch=512),
        evaluation=EvaluationRecipe(tokens=2_000, ce_tokens=300, every=0),
    )
    made = replace(made, text=replace(made.text, max_tokens=8_000))
    sae = train(made, host=host, progress=False)
    report = files.read_json(folder / name / "sae" / "evaluation.json")["eval_result_unstructured"]["goldengate"]
    assert report["fvu"]["value"] < 0.9 and report["l0"]["value"] > 1
    if name in ("batchtopk", "matryoshka"):
        assert report["calibration"]["rows"] == "held-out rows"
        assert report["l0"]["value"] == pytest.approx(32, rel=0.15)
    widths = [int(width) for width in report.get("fvu_by_width", {})]
    assert widths == sae.cfg.metadata.matryoshka_widths
    if widths:
        values = [report["fvu_by_width"][str(width)]["value"] for width in widths]
        assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(report["fvu"]["value"])
