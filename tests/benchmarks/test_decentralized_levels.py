import math

import pytest

from benchmarks.decentralized.levels import (
    GRADIENT,
    GRADIENTS,
    LOSS,
    LOSSES,
    Choice,
    Level,
    Try,
    best,
    choose,
    find,
    spent_until,
    steady,
    wanted,
)


def curve(losses, costs=None):
    costs = [*range(len(losses))] if costs is None else [*costs]
    spent = dict.fromkeys(("outer_step", "derivatives", "megabytes", "rounds"), costs)
    return {LOSS: [*losses], GRADIENT: [*losses], **spent}


def attempt(losses, x=1.0, y=1.0, **settings):
    return Try({"x": x, "y": y, "v": y}, settings, curve(losses))


@pytest.mark.parametrize(
    ("losses", "target", "spent"),
    [
        ((1.0, 0.5, 0.25), 0.5**1.5, (1.5, True, 1.5)),
        ((1.0, 0.5, 0.25), 0.5, (1.0, True, 1.0)),
        ((1.0, 0.5, -0.5), 0.0, (1.5, True, 1.5)),
        ((1.0, 0.5, 0.25), 2.0, (0.0, True, 0.0)),
        ((1.0, 0.2, 0.8, 0.2), 0.4, (2.5, True, 2.5)),  # the first crossing does not last
        ((1.0, 0.2, 0.8), 0.4, (2.0, False, math.inf)),
        ((1.0, 0.2, None, 0.2), 0.4, (3.0, True, 3.0)),
        ((1.0, 0.2, None), 0.4, (math.inf, False, math.inf)),
        ((None, 0.2), 0.4, (1.0, True, 1.0)),
        ((1.0, 0.9, 0.8, 0.7, 0.6), 0.3, (4.0, False, 7.0)),  # the last quarter brings 0.1
        ((1.0, 0.5, 0.5, 0.5, 0.5), 0.4, (4.0, False, math.inf)),
        ((1.0, 0.2, 0.2, 0.2, 0.2, 0.8), 0.2, (1.0, True, 1.0)),  # it stays until four times the cost
        ((1.0, 0.2, 0.2, 0.2, 0.8, 0.8), 0.2, (5.0, False, math.inf)),
        ((1.0, 0.2, 0.2, 0.2, 0.2, None), 0.2, (1.0, True, 1.0)),
        ((1.0,), 0.4, (0.0, False, math.inf)),
        ((), 0.4, (0.0, False, math.inf)),
    ],
)
def test_what_a_target_cost(losses, target, spent):
    found = spent_until(curve(losses), "megabytes", LOSS, target)
    assert found[:3] == pytest.approx(spent)
    assert found.most == (found.amount if found.reached else math.inf)
    assert found.short == (not found.reached and found.least < math.inf)


def test_what_was_reached_before_the_first_checkpoint_may_have_cost_one_iteration_or_all_of_them():
    early = curve((1.0, 0.25, 0.1), (0, 10, 20)) | {"megabytes": [0.0, 30.0, 60.0]}
    assert spent_until(early, "megabytes", LOSS, 0.5) == pytest.approx((15.0, True, 3.0, 30.0))
    assert spent_until(early, "megabytes", LOSS, 0.1) == pytest.approx((60.0, True, 60.0, 60.0))


def test_targets_are_shares_of_the_decrease_of_f_and_of_the_first_gradient():
    assert [level.target(curve((1.0, 2.0, 0.0))) for level in LOSSES] == pytest.approx([0.5, 0.1, 0.01])
    assert [level.target(curve((2.0, 0.0))) for level in GRADIENTS] == pytest.approx([0.6, 0.2, 0.06, 0.02])
    for losses in ((), (1.0, 1.0), (1.0, 2.0), (1.0, None), (None, 1.0)):
        assert math.isnan(Level(LOSS, 0.9).target(curve(losses)))
    assert math.isnan(Level(GRADIENT, 0.1).target(curve((None, 1.0))))


def test_the_try_of_a_target_has_the_least_cost_on_its_worst_seed():
    slow, fast = attempt((1.0, 0.8, 0.1)), attempt((1.0, 0.1, 0.1))
    swings, lost = attempt((1.0, 0.1, 0.1, 0.1, 0.1, 0.5)), attempt((1.0, None, None))
    first, second = [slow, fast, swings, lost], [slow, attempt((1.0, 0.9, 0.15)), fast, fast]
    assert choose([first], LOSS, "rounds", [0.2]) == Choice(1, 1)
    assert choose([first, second], LOSS, "rounds", [0.2, 0.2]) == Choice(0, 2)
    # no try reaches the target on both seeds: the one that does on most, and is nearest to it
    assert choose([first[1:], second[1:]], LOSS, "rounds", [0.05, 0.2]) == Choice(0, 1)
    assert choose([first[2:], second[2:]], LOSS, "rounds", [0.2, 0.2]) == Choice(0, 1)
    assert choose([[lost, swings]], LOSS, "rounds", [0.2]) == Choice(1, 0)
    assert choose([[lost, lost]], LOSS, "rounds", [0.2]) == Choice(0, 0)


@pytest.mark.parametrize(("tries", "targets"), [([], []), ([[]], [0.1]), ([[attempt((1.0, 0.5))]], [math.nan])])
def test_nothing_is_chosen_without_a_target(tries, targets):
    with pytest.raises(ValueError, match="targets must be one number for each of the seeds"):
        choose(tries, LOSS, "rounds", targets)


def test_the_best_end_is_no_lucky_swing():
    steady, lucky, lost = attempt((1.0, 0.3, 0.3)), attempt((1.0, 0.9, 0.1)), attempt((1.0, 0.1, None))
    assert best([[lost, lucky, steady]]) == 2
    assert best([[lucky, steady], [lucky, attempt((1.0, 0.3, 0.95))]]) == 0
    assert best([[steady, attempt((1.0, None, 0.2))]]) == 1


def test_steps_have_a_margin_to_those_that_diverge():
    lost, fast, slow = (1.0, None), (1.0, 0.1), (1.0, 0.2)
    grid = [attempt(slow), attempt(fast, y=2.0), attempt(fast, y=4.0), attempt(slow, 3.0), attempt(lost, 3.0, 2.0)]
    assert steady([grid]) == [0, 1]
    other_seed = [*grid[:2], attempt(lost, y=4.0), *grid[3:]]
    assert steady([grid, other_seed]) == [0]
    assert best([grid, other_seed]) == 0
    assert choose([grid], LOSS, "rounds", [0.5]).place == 1
    assert steady([[attempt(slow, y=2.0, momentum=0.1), attempt(slow, momentum=0.3)]]) == [0, 1]  # none has one


def test_tries_of_all_levels_run_on_judged_seeds():
    quick = attempt((1.0, 0.4, 0.4), 1.0)
    deep = attempt((1.0, 0.6, 0.0), 2.0, momentum=0.1)
    assert wanted([[quick, deep]], [deep.curve], LOSSES) == [0, 1]
    assert wanted([[quick, deep]], [deep.curve], LOSSES[1:]) == [1]
    assert wanted([[quick, deep]], [curve((1.0, 2.0))], LOSSES) == []
    assert find([quick, deep], attempt((), 2.0, momentum=0.1)) is deep
    assert find([quick, deep], attempt((), 2.0)) is None
