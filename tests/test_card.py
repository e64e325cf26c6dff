"""The model card: every line is a fact of the SAE, and nothing that somebody wrote becomes Markdown, HTML or YAML."""

import re
from dataclasses import replace

import pytest
import torch
import yaml

from sae import SAE, card, hub
from tests.conftest import make_sae
from tests.peers.agree import FIXTURES, load

FIGURE = {"value": 0.1613, "low": 0.155, "high": 0.168, "n": 20_000}
HOSTILE = [
    "a\n---\nlicense: evil\n---\n# Title", "<script>alert(1)</script>", "<!-- ", "| a | b |", "```\n# out\n```",
    "[x](javascript:alert(1))", "![x](https://a.example/p.png)", "`", "``a` b```", "\x1b[31mred", "\u202egnp.exe",
    "a\r\nb", "\ud800", "{{ x }}", "---", "- [ ] item", "https://a.example www.b.example", "x" * 5000, "  ",
    "*b* _i_ ~s~ $m$ @someone #12", "'; DROP TABLE", "\u2028# next",
]  # fmt: skip


def header_of(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def without_code(text):
    """The card as a Markdown reader sees it: code blocks and code spans taken out."""
    blocks = re.compile(r"^(`{3,})\w*\n.*?^\1$\n?", re.DOTALL | re.MULTILINE)
    spans = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
    return spans.sub("CODE", blocks.sub("BLOCK\n", text))


def filled(word, sae):
    """The SAE with the word wherever somebody's text can stand."""
    recipe = {"training": {"tokens": word, "lr": word, "batch": 3}, "sae": {"k": word}, "text": word, word: word}
    sae.cfg = replace(
        sae.cfg,
        metadata=replace(
            sae.cfg.metadata, model_name=word, host_fingerprint=word, hook_name=word, dataset=word, recipe=recipe,
            git_revision=word, training_architecture=word,
            evaluation={"fvu": word, "l0": {"value": word}, "kl": FIGURE},
        ),
    )  # fmt: skip
    sae.labels = {3: word, 4: f"{word} again"}
    return sae


def test_it_states_what_the_sae_knows_and_how_to_load_it():
    evaluation = {"fvu": FIGURE, "l0": {**FIGURE, "value": 6.0}, "recovered_mean": FIGURE}
    recipe = {"training": {"tokens": 4_000_000, "batch": 4096, "seed": 7, "lr": None}, "sae": {"k": 6}}
    sae = make_sae(
        model_name="tiny-llama", hook_name="blocks.2.hook_resid_post", host_fingerprint="0123456789abcdef",
        dataset="bundled", context_size=128, norm_factor=0.5, outlier_norm=1372.6, evaluation=evaluation, recipe=recipe,
        training_architecture="batchtopk",
    )  # fmt: skip
    sae.labels = {3: "the Golden Gate Bridge"}
    sae.stats = replace(sae.stats, density=torch.where(torch.arange(96) < 3, 0.0, 0.01))
    text = card.card(sae, repo="user/saes", folder="a/b", license="mit")
    assert header_of(text) == {
        "library_name": "saelens", "license": "mit", "tags": ["sparse-autoencoder", "saelens", "goldengate-sae"],
    }  # fmt: skip
    for said in (
        hub.MARK, "96 features on activations of width 32", "fingerprint `0123456789abcdef`", "`bundled`, context 128",
        "as `batchtopk`", "tokens `4,000,000`, batch `4,096`, k `6`, seed `7`", "training saw it times 0.5",
        "decoder rows have length 1", "norm above 1373", "k = 6; the calibrated threshold 0.500",
        "never fire in 1,000 tokens: 3 (3.12%)", "0.161 [0.155, 0.168]", "the Golden Gate Bridge",
        "SAE.from_pretrained('user/saes', 'a/b')", "from sae_lens import SAE", "## Use and limits",
    ):  # fmt: skip
        assert said in text, said
    assert "license" not in header_of(card.card(sae))
    assert "SAE.load(folder)" in card.card(sae)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "relu"])
def test_an_sae_without_a_past_has_a_card_too(architecture):
    sae = make_sae(architecture=architecture)
    sae.stats = None
    text = card.card(sae)
    assert "**Host**: not noted" in text and "None was made of it here" in text and "Named features" not in text
    assert f"**Inference**: `{architecture}`" in text


@pytest.mark.parametrize(
    ("units", "factor", "said"),
    [
        ("normalised", 0.25, "of x times 0.25"),
        ("normalised", None, "of x times a factor that nobody noted"),
        ("token", 1.0, "of each token's own scale"),
        ("raw", 1.0, "raw activations of the host; decoder rows have lengths from"),
    ],
)
def test_units_are_those_of_the_metadata(units, factor, said):
    sae = make_sae(units=units, norm_factor=factor)
    sae.W_dec *= 1 + torch.rand(96, 1)
    assert said in card.card(sae)


@pytest.mark.parametrize("word", HOSTILE, ids=lambda word: repr(word)[:20])
def test_what_somebody_wrote_is_inert(word):
    plain = card.card(filled("plain", make_sae()), repo="user/saes", folder="plain", license="plain")
    text = card.card(filled(word, make_sae()), repo="user/saes", folder="plain", license=word)
    assert header_of(text) == {**header_of(plain), "license": word}
    body, shown = (without_code(one).split("---\n", 2)[2] for one in (plain, text))
    assert shown.replace("not noted", "CODE") == body, word
    assert "\x1b" not in text and "\u202e" not in text
    text.encode("utf-8")


def test_the_test_above_would_notice():
    text = card.card(filled("plain", make_sae()))
    assert without_code(text.replace("- **Host**: ", "- **Host**: <b>")) != without_code(text)
    assert "x" in without_code("`` a` `` x ```\n") and "out" in without_code("```\na\n```\nout\n")


def test_a_span_shows_the_text_whatever_its_backticks():
    assert card.span("a`b") == "``a`b``"
    assert card.span("``") == "``` `` ```"
    assert card.span("") == card.span(" ") == "not noted"
    assert card.block("```\nx").splitlines()[0] == "````"


def test_the_shipped_sae_s_card_has_its_figures_and_names():
    sae = SAE.load("checkpoints/smollm2-golden-gate")
    text = card.card(sae)
    assert "2,202  the Golden Gate Bridge" in text and "0.150 [0.146, 0.156]" in text
    assert f"{len(sae.labels) - 20} more have names" in text


@pytest.mark.parametrize("case", ["sparsify-groupmax", "sparsify-topk-transcode-skip"])
def test_a_card_promises_saelens_only_where_saelens_loads_it(case):
    text = card.card(load(FIXTURES / case), repo="u/r")
    assert "saelens" not in text.lower() and "library_name: goldengate-sae" in text
    assert ("run_with_saes" in text and "calibrate" not in text) == case.endswith("skip")
    assert "**Converted** from `sparsify`" not in text  # read by its page alone, nothing was loaded from a folder
