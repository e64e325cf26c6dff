"""Every shape of the learning rate: its first value, its peak, its last value."""

import pytest

from sae.training.schedule import decay_steps, lr_at, peak_lr, steps_of, warm_up_steps


def rates(**schedule):
    return [lr_at(step, 1000, 2.0, **schedule) for step in range(1000)]


def test_constant_warms_up_stays_and_decays_over_the_last_fifth():
    found = rates()
    assert found[0] == pytest.approx(2 / 50) and found[48] < 2.0
    assert found[49:801] == [2.0] * 752
    assert found[900] == pytest.approx(1.0) and found[-1] == pytest.approx(2 / 200)


def test_linear_falls_from_the_warm_up_to_the_end():
    found = rates(name="linear")
    assert found[0] == pytest.approx(0.04) and max(found) == found[49] == found[50] == 2.0
    assert found[525] == pytest.approx(1.0) and found[-1] == pytest.approx(2 / 950)
    assert all(later < sooner for sooner, later in zip(found[50:], found[51:], strict=False))


def test_cosine_falls_slowly_at_first_and_at_last():
    found = rates(name="cosine")
    assert max(found) == found[50] == 2.0 and found[525] == pytest.approx(1.0)
    assert found[288] == pytest.approx(2 * (1 + 2**-0.5) / 2, rel=5e-3)
    assert 0 < found[-1] < 1e-5


def test_given_steps_win():
    assert rates(warm_up=10)[9] == 2.0 and rates(warm_up=10)[0] == pytest.approx(0.2)
    assert rates(warm_up=0)[0] == 2.0
    assert rates(decay=0)[-1] == 2.0
    assert rates(decay=500)[750] == pytest.approx(1.0) and rates(decay=500)[500] == 2.0
    assert rates(name="cosine", decay=100)[899] == 2.0 and rates(name="cosine", decay=100)[950] == pytest.approx(1.0)


def test_a_short_run_has_a_warm_up_and_a_decay_of_one_step_at_least():
    assert [lr_at(step, 1, 2.0) for step in range(1)] == [2.0]
    assert [lr_at(step, 3, 2.0) for step in range(3)] == [2.0] * 3
    assert warm_up_steps(10**9) == 1000 and decay_steps(100) == 20 and decay_steps(100, "cosine") == 95


def test_steps_and_the_default_rate():
    assert steps_of(10, 4096) == 1 and steps_of(10_000, 4096) == 2
    assert peak_lr(1e-4, 8192, 10) == 1e-4
    assert peak_lr(None, 2**14, 40_000) == pytest.approx(2e-4)
    assert peak_lr(None, 2**14, 10_000) == pytest.approx(4e-4)
    assert peak_lr(None, 2**16, 40_000) == pytest.approx(1e-4)
