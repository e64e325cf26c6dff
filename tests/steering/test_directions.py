"""Difference of means against a computation by hand, and what it refuses."""

import pytest
import torch

from sae import files
from sae.errors import UserError
from sae.features.lens import logit_lens
from sae.steering import Direction, difference_of_means, directions, steer
from tests.conftest import make_sae

HOOK = "blocks.2.hook_resid_post"
BRIDGE = ["The bridge is red and very long.", "A bridge over the bay, with two towers."]
OTHER = ["Bread needs flour, water and salt.", "He wrote a letter to his sister last week."]


def by_hand(host, texts):
    rows = []
    for text in texts:
        tokens = torch.tensor([host.tokenizer(text).input_ids])
        rows.append(host.activations(tokens, [HOOK])[HOOK][0, 1:].double())
    return torch.cat(rows)


def test_it_is_the_difference_of_the_means_at_unit_length(tiny_host):
    direction = difference_of_means(tiny_host, "model.layers.2", BRIDGE, OTHER)
    with_it, without = by_hand(tiny_host, BRIDGE), by_hand(tiny_host, OTHER)
    difference = with_it.mean(0) - without.mean(0)
    expected = difference / difference.norm()
    assert direction.hook == HOOK
    torch.testing.assert_close(direction.vector.double(), expected, atol=1e-5, rtol=1e-5)
    assert direction.max_act == pytest.approx(float((with_it @ expected).max()), rel=1e-4)
    assert direction.norm == pytest.approx(float(torch.cat([with_it, without]).norm(dim=1).median()), rel=1e-4)
    assert direction.host_fingerprint == tiny_host.fingerprint


def test_texts_that_cannot_make_a_direction_are_refused(tiny_host):
    with pytest.raises(UserError, match="no negative texts"):
        difference_of_means(tiny_host, HOOK, BRIDGE, [])
    with pytest.raises(UserError, match="no ordinary tokens"):
        difference_of_means(tiny_host, HOOK, BRIDGE, [""])
    with pytest.raises(UserError, match="the same mean"):
        difference_of_means(tiny_host, HOOK, BRIDGE, BRIDGE)


def last(host, texts):
    return torch.stack([host.activations(host.tokenizer(t, return_tensors="pt").input_ids, [HOOK])[HOOK][0, -1].double()
                        for t in texts])  # fmt: skip


def test_contrastive_addition_is_the_mean_of_the_pairs_differences_at_the_last_token(tiny_host):
    direction = directions.contrastive_addition(tiny_host, HOOK, BRIDGE, OTHER)
    difference = (last(tiny_host, BRIDGE) - last(tiny_host, OTHER)).mean(0)
    torch.testing.assert_close(direction.vector.double(), difference / difference.norm(), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="2 positive and 1 negative"):
        directions.contrastive_addition(tiny_host, HOOK, BRIDGE, OTHER[:1])


def test_pca_of_pairs_finds_what_the_pairs_share(tiny_host, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    noise = {f"{side}{i}": 0.3 * torch.randn(32, generator=generator) for side in "ab" for i in range(12)}

    def rows(host, hook, text, context):
        return (noise[text] + (3 * planted if text[0] == "a" else 0))[None]

    monkeypatch.setattr(directions, "_rows", rows)
    positive, negative = [f"a{i}" for i in range(12)], [f"b{i}" for i in range(12)]
    found = directions.pca_of_pairs(tiny_host, HOOK, positive, negative)
    assert float(found.vector @ planted) > 0.97
    turned = directions.pca_of_pairs(tiny_host, HOOK, negative, positive)
    assert float(turned.vector @ planted) < -0.97
    with pytest.raises(UserError, match="one pair"):
        directions.pca_of_pairs(tiny_host, HOOK, positive[:1], negative[:1])
    tells = directions.probe(tiny_host, HOOK, positive, negative)
    assert float(tells.vector @ planted) > 0.8


def test_a_token_s_direction_makes_it_likely(tiny_host):
    direction = directions.unembedding(tiny_host, HOOK, " bridge", OTHER)
    token = tiny_host.tokenizer(" bridge").input_ids[0]
    assert int(logit_lens(tiny_host, direction.vector[None]).top[0, 0]) == token
    tokens = torch.tensor([tiny_host.tokenizer(OTHER[1]).input_ids])
    raised = tiny_host.logits(tokens, edits=steer(tiny_host, direction, direction.share(2.0)).edits)[0, -1]
    assert raised.log_softmax(-1)[token] > tiny_host.logits(tokens)[0, -1].log_softmax(-1)[token] + 0.5
    with pytest.raises(UserError, match="tokens of this host"):
        directions.unembedding(tiny_host, HOOK, " bridge over the bay", OTHER)


def test_a_feature_s_row_and_a_saved_file_are_the_same_edit(tiny_host, tmp_path):
    sae = make_sae(hook_name=HOOK)
    direction = directions.of_feature(tiny_host, sae, 7, BRIDGE)
    assert direction.max_act == pytest.approx(float(sae.stats.max_act[7]))
    tokens = torch.tensor([tiny_host.tokenizer(OTHER[1]).input_ids])
    by_feature = tiny_host.logits(tokens, edits=steer(tiny_host, sae, "7+=2x").edits)
    direction.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert again == Direction(**{**vars(direction), "vector": again.vector})
    limitless = Direction(**{**vars(again), "outlier_norm": None})
    torch.testing.assert_close(tiny_host.logits(tokens, edits=steer(tiny_host, limitless, "2x").edits), by_feature)
    with pytest.raises(UserError, match="not a direction"):
        from sae import files

        files.write_safetensors(tmp_path / "other.safetensors", {"vector": direction.vector})
        Direction.load(tmp_path / "other.safetensors")


def test_vectors_that_are_none_are_refused(tiny_host):
    with pytest.raises(UserError, match=r"\[31\].*32 wide"):
        directions.of_vector(tiny_host, HOOK, torch.ones(31), BRIDGE)
    with pytest.raises(UserError, match="NaN"):
        directions.of_vector(tiny_host, HOOK, torch.full((32,), float("nan")), BRIDGE)
    with pytest.raises(UserError, match="zero"):
        directions.of_vector(tiny_host, HOOK, torch.zeros(32), BRIDGE)


@pytest.mark.parametrize(
    ("changed", "facts"),
    [
        (torch.zeros(32), {}), (torch.full((32,), torch.nan), {}), (torch.tensor(1.0), {}), (None, {"max_act": "nan"}),
        (None, {"max_act": "abc"}), (None, {"hook": None}), (None, {"outlier_norm": "inf"}),
    ],
)  # fmt: skip
def test_a_damaged_direction_is_one_line(tmp_path, changed, facts):
    path = tmp_path / "d.safetensors"
    Direction("blocks.2.hook_resid_post", torch.ones(32) / 32**0.5, 2.0, 5.0).save(path)
    assert Direction.load(path).max_act == 2.0
    tensors, known = files.read_safetensors(path)
    kept = {name: value for name, value in {**known, **facts}.items() if value is not None}
    files.write_safetensors(path, tensors if changed is None else {"vector": changed}, kept)
    with pytest.raises(UserError, match="Save the direction again") as caught:
        Direction.load(path)
    assert "\n" not in str(caught.value)
