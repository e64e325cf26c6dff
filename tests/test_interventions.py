"""Edits against hand computation in float64; which positions they touch; dials as people write them."""

from dataclasses import replace

import pytest
import torch

from sae.dials import Condition, Dial, parse_condition, parse_dial, parse_dials
from sae.errors import UserError
from sae.host import Pass
from sae.interventions import Edit, direction_part, feature_part, ranked_acts
from sae.where import Where, schedule
from tests.conftest import make_sae

B, T, D = 2, 7, 32
PLAIN = Where(special=True)


def a_pass(tokens=None, *, past=0, prompt=None, mask=None, rows=B, columns=T):
    tokens = torch.full((rows, columns), 100) if tokens is None else tokens
    return Pass(
        tokens=tokens,
        past=past,
        attention_mask=mask,
        generating=prompt is not None,
        prompt_length=past + tokens.shape[1] if prompt is None else prompt,
    )


def feature_edit(sae, dials, where, *, kind=None, **options):
    dials = dials if kind is None else [replace(dial, kind=kind) for dial in dials]
    part = feature_part(sae, dials, where, **options)
    return None if part is None else Edit((part,))


def direction_edit(vector, amount, where, **options):
    return Edit((direction_part(vector[None], [amount], where, **options),))


@pytest.fixture
def x():
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(3))


def firing(sae, x, least=3):
    """Features that fire in at least so many of the positions, and not in all."""
    counts = (sae.encode(x) > 0).flatten(0, 1).sum(0)
    return [int(i) for i in torch.nonzero((counts >= least) & (counts < B * T)).flatten()]


def by_hand(sae, x, feature):
    """f_i(x) and W_dec[i] in float64: exact TopK."""
    rows = x.double()
    pre = (rows - sae.b_dec.double()) @ sae.encoder.double().T + sae.b_enc.double()
    kth = pre.topk(sae.cfg.k, dim=-1).values[..., -1]
    own = pre[..., feature]
    return own.clamp(min=0) * (own >= kth), sae.W_dec[feature].double()


@pytest.mark.parametrize(
    ("kind", "coefficient"),
    [
        ("clamp", lambda f: 4.0 - f),
        ("add", lambda f: torch.full_like(f, 4.0)),
        ("scale", lambda f: 3.0 * f),
        ("ablate", lambda f: -f),
        ("floor", lambda f: (4.0 - f).clamp_min(0)),
        ("ceil", lambda f: (4.0 - f).clamp_max(0)),
    ],
)
def test_each_kind_is_its_formula(tiny_sae, x, kind, coefficient):
    feature = firing(tiny_sae, x)[0]
    f, w = by_hand(tiny_sae, x, feature)
    expected = x.double() + coefficient(f)[..., None] * w
    edited = feature_edit(tiny_sae, [Dial(feature, 4.0)], PLAIN, kind=kind)(x, a_pass())
    torch.testing.assert_close(edited.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_error_term_is_kept(tiny_sae, x):
    feature = firing(tiny_sae, x)[0]
    edited = feature_edit(tiny_sae, [Dial(feature, 4.0)], PLAIN)(x, a_pass())
    codes = tiny_sae.encode(x)
    error = x - tiny_sae.decode(codes)
    codes[..., feature] = 4.0
    torch.testing.assert_close(edited, tiny_sae.decode(codes) + error, atol=1e-5, rtol=1e-5)


def test_clamping_a_feature_to_its_own_value_changes_nothing(tiny_sae, x):
    feature = firing(tiny_sae, x)[0]
    row = x[:1, :1]
    own = float(tiny_sae.encode(row)[0, 0, feature])
    edited = feature_edit(tiny_sae, [Dial(feature, own)], PLAIN)(row, a_pass(rows=1, columns=1))
    torch.testing.assert_close(edited, row, atol=1e-6, rtol=0)


def test_several_features_are_read_from_the_unsteered_x(tiny_sae, x):
    i, j = firing(tiny_sae, x)[:2]
    both = feature_edit(tiny_sae, [Dial(i, 9.0), Dial(j, -2.0)], PLAIN)(x, a_pass())
    one = feature_edit(tiny_sae, [Dial(i, 9.0)], PLAIN)(x, a_pass())
    other = feature_edit(tiny_sae, [Dial(j, -2.0)], PLAIN)(x, a_pass())
    torch.testing.assert_close(both, one + other - x, atol=1e-5, rtol=1e-5)


def test_zero_x_takes_the_feature_out(tiny_sae, x):
    feature = firing(tiny_sae, x)[0]
    f, w = by_hand(tiny_sae, x, feature)
    edited = feature_edit(tiny_sae, parse_dials({feature: "0x"}), PLAIN)(x, a_pass())
    torch.testing.assert_close((edited - x).double(), -f[..., None] * w, atol=1e-5, rtol=1e-5)
    same = feature_edit(tiny_sae, [Dial(feature, 1.0)], PLAIN, kind="ablate")(x, a_pass())
    torch.testing.assert_close(edited, same)


def test_multiples_are_of_the_recorded_maximum(tiny_sae, x):
    feature = firing(tiny_sae, x)[0]
    maximum = float(tiny_sae.stats.max_act[feature])
    times = feature_edit(tiny_sae, parse_dials(f"{feature}=2.5x"), PLAIN)(x, a_pass())
    raw = feature_edit(tiny_sae, parse_dials({feature: 2.5 * maximum}), PLAIN)(x, a_pass())
    torch.testing.assert_close(times, raw)


def test_threshold_reads_by_the_calibrated_threshold(tiny_sae, x):
    feature = firing(tiny_sae, x)[0]
    f = tiny_sae.feature_acts(x, [feature], select="threshold")
    edited = feature_edit(tiny_sae, [Dial(feature, 3.0)], PLAIN, select="threshold")(x, a_pass())
    torch.testing.assert_close(edited, x + (3.0 - f) * tiny_sae.W_dec[feature], atol=1e-5, rtol=1e-5)
    exact = feature_edit(tiny_sae, [Dial(feature, 3.0)], PLAIN)(x, a_pass())
    assert not torch.equal(edited, exact), "the case must tell the two rules apart"


@pytest.mark.parametrize("name", ["jumprelu", "relu"])
def test_a_threshold_sae_is_steered_by_its_own_rule_from_its_own_rows(x, name):
    sae = make_sae(architecture=name, apply_b_dec_to_input=False)
    feature = firing(sae, x)[0]
    f = sae.encode(x)[..., [feature]]
    assert (f > 0).any() and (f == 0).any()
    for select in (None, "threshold"):
        edited = feature_edit(sae, [Dial(feature, 3.0)], PLAIN, select=select)(x, a_pass())
        torch.testing.assert_close(edited, x + (3.0 - f) * sae.W_dec[feature], atol=1e-5, rtol=1e-5)
        read = feature_part(sae, [Dial(feature, 3.0)], PLAIN, select=select).reading
        assert read.encoder.shape == (1, D) and read.by_sae is None
    with pytest.raises(UserError, match=f"a {name} SAE has no k. Use threshold"):
        feature_edit(sae, [Dial(feature, 3.0)], PLAIN, select="topk")


def test_bfloat16_comes_back_as_bfloat16_rounded_once(tiny_sae, x):
    feature = firing(tiny_sae, x)[0]
    half = x.bfloat16()
    edited = feature_edit(tiny_sae, [Dial(feature, 3.0)], PLAIN)(half, a_pass())
    full = feature_edit(tiny_sae, [Dial(feature, 3.0)], PLAIN)(half.float(), a_pass())
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited, full.bfloat16())


def test_ranking_in_chunks_gives_the_exact_topk_activations(tiny_sae, x):
    rows, features = x.flatten(0, 1), list(range(96))
    acts = ranked_acts(tiny_sae, rows, features, chunk=7)
    torch.testing.assert_close(acts, tiny_sae.encode(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(acts, tiny_sae.feature_acts(rows, features), atol=1e-5, rtol=1e-5)
    assert torch.equal(acts > 0, tiny_sae.encode(rows) > 0)


def test_a_strength_without_end_is_refused():
    for strength in ("3722=1e39", "3722=1e7x", "3722=-2000000"):
        with pytest.raises(UserError, match="too large. Give at most 1,000,000"):
            parse_dial(strength)
    for text in ("3722=" + "9" * 5000, "9" * 5000 + "=5x"):
        with pytest.raises(UserError) as told:
            parse_dial(text)
        assert len(str(told.value)) < 200


def test_off_is_no_edit_at_all(tiny_sae):
    assert feature_edit(tiny_sae, parse_dials("off"), PLAIN) is None
    assert feature_edit(tiny_sae, parse_dials(["off"]), PLAIN) is None
    assert feature_edit(tiny_sae, parse_dials({3: "off", 4: "off"}), PLAIN) is None


def test_a_direction_is_added_at_unit_length(x):
    vector = torch.arange(1.0, D + 1)
    edited = direction_edit(vector, 2.0, PLAIN)(x, a_pass())
    torch.testing.assert_close(edited, x + 2.0 * vector / vector.norm())


def test_activations_by_head_are_edited_as_one_vector(tiny_sae, x):
    feature = firing(tiny_sae, x)[0]
    edit = feature_edit(tiny_sae, [Dial(feature, 3.0)], Where())
    heads = edit(x.view(B, T, 4, D // 4), a_pass())
    assert heads.shape == (B, T, 4, D // 4)
    assert torch.equal(heads.flatten(2), edit(x, a_pass()))


def touched(where, x, at):
    edit = direction_edit(torch.ones(D), 5.0, where)
    edited = edit(x, at)
    return torch.zeros(x.shape[:2], dtype=torch.bool) if edited is None else (edited != x).any(-1)


def test_first_position_special_tokens_and_outliers_are_left_alone_bit_for_bit(x):
    tokens = torch.full((B, T), 100)
    tokens[0, 3] = 2
    x[1, 5] *= 1000
    where = Where(special_ids=frozenset({0, 2}), outlier_norm=100.0)
    expected = torch.ones(B, T, dtype=torch.bool)
    expected[:, 0] = expected[0, 3] = expected[1, 5] = False
    assert torch.equal(touched(where, x, a_pass(tokens)), expected)
    everything = Where(special=True, special_ids=frozenset({0, 2}), outlier_norm=100.0)
    assert touched(everything, x, a_pass(tokens)).all()


def test_with_left_padding_the_first_real_position_is_the_sink(x):
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :3] = 0
    expected = torch.ones(B, T, dtype=torch.bool)
    expected[0, :4] = expected[1, 0] = False
    assert torch.equal(touched(Where(), x, a_pass(mask=mask)), expected)


def test_in_a_packed_row_the_first_position_of_each_document_is_left_alone(x):
    doc = torch.tensor([[4, 4, 4, 9, 9, 9, -1], [-1, 3, 3, 5, 6, 6, 6]])
    expected = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1, 1]], dtype=torch.bool)
    at = replace(a_pass(mask=doc >= 0), doc=doc)
    assert torch.equal(touched(Where(), x, at), expected)
    assert touched(Where(special=True), x, at).all()


def test_a_document_in_a_packed_row_is_steered_like_the_document_alone(tiny_host):
    one, other = torch.arange(100, 107)[None], torch.arange(300, 305)[None]
    rows, doc = torch.cat([one, other], 1), torch.tensor([[0] * 7 + [1] * 5])
    edits = [("blocks.1.hook_resid_post", direction_edit(torch.arange(1.0, D + 1), 20.0, Where()))]
    packed = tiny_host.logits(rows, doc=doc, edits=edits)
    for alone, part in ((one, packed[:, :7]), (other, packed[:, 7:])):
        torch.testing.assert_close(part, tiny_host.logits(alone, edits=edits), atol=1e-4, rtol=1e-4)
        assert torch.equal(part.argmax(-1)[:, :1], tiny_host.logits(alone).argmax(-1)[:, :1])


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("all", range(7)), ("prompt", range(4)), ("generated", range(4, 7)), ("last", [3])],
)
def test_positions_are_the_same_in_one_forward_and_token_by_token(x, positions, expected):
    where, prompt = Where(positions, special=True), 4
    want = torch.tensor([t in expected for t in range(T)])
    whole = touched(where, x, a_pass(prompt=prompt))
    parts = [touched(where, x[:, :prompt], a_pass(columns=prompt, prompt=prompt))]
    for t in range(prompt, T):
        parts.append(touched(where, x[:, t : t + 1], a_pass(columns=1, past=t, prompt=prompt)))
    assert torch.equal(whole[0], want)
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_positions_may_be_a_function_of_the_pass(x):
    odd = Where(lambda at: (torch.arange(at.tokens.shape[1]) % 2 == 1).expand(at.tokens.shape))
    assert torch.equal(touched(odd, x, a_pass())[0], torch.arange(T) % 2 == 1)


@pytest.mark.parametrize(
    ("text", "dial"),
    [
        ("1286=5x", Dial(1286, 5.0, True)),
        ("7=-2.5x", Dial(7, -2.5, True)),
        ("7=0x", Dial(7, 0.0, True)),
        ("7=12.5", Dial(7, 12.5)),
        ("7=1e2", Dial(7, 100.0)),
        ("7=off", Dial(7, None)),
        ("7+=5x", Dial(7, 5.0, True, "add")),
        ("7 *= 2", Dial(7, 2.0, False, "scale")),
        ("7>=5", Dial(7, 5.0, False, "floor")),
        ("7<=-1x", Dial(7, -1.0, True, "ceil")),
        (" 7 = 5× ", Dial(7, 5.0, True)),
    ],
)
def test_dials_as_people_write_them(text, dial):
    assert parse_dial(text) == dial
    assert parse_dials(text) == [dial]


def test_a_string_a_list_and_a_mapping_mean_the_same():
    expected = [Dial(3, 5.0, True), Dial(4, 0.5)]
    assert parse_dials("3=5x, 4=0.5") == parse_dials("3=5x 4=.5") == expected
    assert parse_dials(["3=5x", "4=0.5"]) == parse_dials({3: "5x", 4: 0.5}) == expected
    mixed = [Dial(3, 5.0, True, "floor"), Dial(4, 0.5, kind="add")]
    assert parse_dials("3>=5x, 4=0.5", kind="add") == parse_dials({3: ">=5x", 4: 0.5}, kind="add") == mixed
    assert parse_dials(",".join(map(str, mixed))) == mixed


@pytest.mark.parametrize(
    ("dials", "says"),
    [
        ("3=5y", "'5y'"),
        ("3=", "''"),
        ("3=nan", "'nan'"),
        ("3=1e999", "'1e999'"),
        ("3", "no '='"),
        ("bridge=5x", "'bridge'"),
        ("3.5=5x", "'3.5'"),
        ("", "none given"),
        ({}, "none given"),
        ("3=5x,3=2x", "set twice"),
        ("96=5x", "96"),
        ({-1: "5x"}, "-1"),
        ("1000=off", "1,000"),
    ],
)
def test_a_bad_dial_is_one_line_that_names_it(tiny_sae, dials, says):
    with pytest.raises(UserError, match=".") as caught:
        feature_edit(tiny_sae, parse_dials(dials), PLAIN)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_multiples_without_statistics_or_of_a_dead_feature_are_refused():
    bare = make_sae()
    bare.stats = None
    with pytest.raises(UserError, match="no feature statistics"):
        feature_edit(bare, parse_dials("3=5x"), PLAIN)
    assert feature_edit(bare, parse_dials("3=0x"), PLAIN) is not None, "zero times anything is known"
    dead = make_sae()
    dead.stats.max_act[3] = 0
    with pytest.raises(UserError, match="never fired in 1000 tokens"):
        feature_edit(dead, parse_dials("3=5x"), PLAIN)


def test_unknown_kinds_positions_and_rules_are_refused(tiny_sae):
    with pytest.raises(UserError, match="did you mean clamp"):
        parse_dials("3=1", kind="clam")
    with pytest.raises(UserError, match="did you mean prompt"):
        Where("prompts")
    with pytest.raises(UserError, match="neither topk nor threshold"):
        feature_edit(tiny_sae, [Dial(3, 1.0)], PLAIN, select="jump")
    tiny_sae.threshold = None
    with pytest.raises(UserError, match="no calibrated threshold"):
        feature_edit(tiny_sae, [Dial(3, 1.0)], PLAIN, select="threshold")


def test_kinds_mix_in_one_edit(tiny_sae, x):
    i, j, k = firing(tiny_sae, x)[:3]
    mixed = feature_edit(tiny_sae, parse_dials(f"{i}=9, {j}*=3, {k}<=0.5"), PLAIN)(x, a_pass())
    alone = [feature_edit(tiny_sae, [dial], PLAIN)(x, a_pass()) - x for dial in parse_dials(f"{i}=9, {j}*=3, {k}<=0.5")]
    torch.testing.assert_close(mixed, x + sum(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "projection"),
    [
        ("ablate", lambda p: torch.zeros_like(p)),
        ("add", lambda p: p + 4.0),
        ("floor", lambda p: p.clamp_min(4.0)),
        ("ceil", lambda p: p.clamp_max(4.0)),
        ("scale", lambda p: 4.0 * p),
    ],
)
def test_a_direction_s_projection_after_each_kind(x, kind, projection):
    vector = torch.arange(1.0, D + 1)
    unit = vector / vector.norm()
    edited = direction_edit(vector, 4.0, PLAIN, kind=kind)(10 * x, a_pass())
    torch.testing.assert_close(edited @ unit, projection(10 * x @ unit), atol=1e-4, rtol=1e-4)
    rest = torch.eye(D) - torch.outer(unit, unit)
    torch.testing.assert_close(edited @ rest, 10 * x @ rest, atol=1e-4, rtol=1e-4)


def test_a_gate_opens_where_the_unsteered_feature_is_above(tiny_sae, x):
    i, j = firing(tiny_sae, x)[:2]
    acts = tiny_sae.encode(x)[..., j]
    limit = float(acts[acts > 0].median())
    for text, fires in ((f"{j}>{limit}", acts > limit), (f"{j}<{limit}", acts < limit)):
        edited = feature_edit(tiny_sae, [Dial(i, 9.0), Dial(j, 0.0)], PLAIN, when=[parse_condition(text)])(x, a_pass())
        assert torch.equal((edited != x).any(-1), fires) and 0 < fires.sum() < B * T
    both = [parse_condition(f"{i}>0"), parse_condition(f"{j}>0")]
    edited = feature_edit(tiny_sae, [Dial(i, 9.0)], PLAIN, when=both)(x, a_pass())
    codes = tiny_sae.encode(x)
    assert torch.equal((edited != x).any(-1), (codes[..., i] > 0) & (codes[..., j] > 0))


@pytest.mark.parametrize(
    ("plan", "at_prompt", "generated"),
    [("ramp:2", 0.0, [0.0, 0.5, 1.0]), ("fade:2", 1.0, [1.0, 0.5, 0.0]), ("first:2", 1.0, [1.0, 1.0, 0.0])],
)
def test_a_plan_weighs_the_edit_of_each_generated_token(x, plan, at_prompt, generated):
    edit = direction_edit(torch.ones(D), 6.0, PLAIN, plan=schedule(plan))
    at = a_pass(prompt=4)  # columns 4, 5, 6 are generated tokens 0, 1, 2
    added = (edit(x, at) - x) @ (torch.ones(D) / D**0.5)
    torch.testing.assert_close(added, 6.0 * torch.tensor([at_prompt] * 4 + generated).expand(B, -1), atol=1e-4, rtol=0)
    one = edit(x[:, 5:6], a_pass(columns=1, past=5, prompt=4))
    torch.testing.assert_close(one, edit(x, at)[:, 5:6])


def test_from_a_token_on_counts_in_each_text(x):
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :3] = 0
    expected = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(touched(Where("2:"), x, a_pass(mask=mask)), expected)
    doc = torch.tensor([[4, 4, 4, 9, 9, 9, -1], [-1, 3, 3, 5, 6, 6, 6]])
    at = replace(a_pass(mask=doc >= 0), doc=doc)
    expected = torch.tensor([[0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(touched(Where("2:"), x, at), expected)
    assert touched(Where("2:"), x[:, :1], a_pass(columns=1, past=9, prompt=5)).all()


@pytest.mark.parametrize("text", ["ramp", "ramp:0", "ramp:-2", "up:3", ""])
def test_a_schedule_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match="ramp:20, fade:20 or first:20"):
        schedule(text)


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("77>0.5x", Condition(77, 0.5, True)),
        ("77 < 2", Condition(77, 2.0, above=False)),
        ("golden>1", Condition(5, 1.0)),
    ],
)
def test_conditions_as_people_write_them(text, condition):
    assert parse_condition(text, {5: "golden retrievers"}) == condition
    assert parse_condition(str(condition)) == condition


@pytest.mark.parametrize("text", ["77", "77=5x", "77>", "77>off", ">3", "77>=3", "a>b>3"])
def test_a_bad_condition_is_one_line(text):
    with pytest.raises(UserError) as caught:
        parse_condition(text)
    assert "\n" not in str(caught.value) and "Write" in str(caught.value)
