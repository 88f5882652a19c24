"""plan_packs: properties on generated lengths, quality against a brute-force packer, fill on realistic lengths."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dasd_kernels import PackPlan, plan_packs

MODEL_COST = (24.1e9, 885e3)  # a 4B decoder: FLOPs a token, FLOPs a token squared


@st.composite
def problems(draw):
    capacity = draw(st.one_of(st.integers(1, 130), st.sampled_from([4095, 4096, 4097, 65_536, 2**20, 2**27])))
    length = st.one_of(st.integers(1, capacity), st.just(capacity), st.integers(1, min(capacity, 3)))
    return draw(st.lists(length, max_size=200)), capacity


def lognormal_lengths(n, capacity=65_536, seed=0):
    """Documents as long as the released distillation data: sigma 0.95, nothing above the capacity, mean 16.6 K."""
    lengths = np.random.default_rng(seed).lognormal(np.log(13_050), 0.95, size=2 * n).astype(np.int64)
    return lengths[(lengths >= 1) & (lengths <= capacity)][:n]


def check(plan: PackPlan, lengths, capacity):
    lengths = np.asarray(lengths, dtype=np.int64)
    assert sorted(plan.docs.tolist()) == list(range(len(lengths)))  # every document once
    assert plan.pack_offsets[0] == 0 and plan.pack_offsets[-1] == len(lengths)
    assert np.all(np.diff(plan.pack_offsets) > 0)  # no empty pack
    packs = [lengths[plan.documents(p)] for p in range(plan.num_packs)]
    assert all(pack.sum() <= capacity for pack in packs)
    assert plan.tokens.tolist() == [pack.sum() for pack in packs]
    assert plan.step_offsets[0] == 0 and plan.step_offsets[-1] == plan.num_packs
    assert np.all(np.diff(plan.step_offsets) > 0)


@given(
    problems(), st.integers(1, 300), st.one_of(st.none(), st.integers(1, 9)), st.integers(1, 9), st.integers(-5, 2**64)
)
def test_every_document_once_and_no_pack_over_capacity(problem, window, budget, ranks, seed):
    lengths, capacity = problem
    plan = plan_packs(lengths, capacity, window=window, pack_budget=budget, ranks=ranks, seed=seed, cost=(1.0, 0.5))
    check(plan, lengths, capacity)
    sizes = np.diff(plan.step_offsets)
    assert np.all(sizes[:-1] == (budget or plan.num_packs)) and np.all(sizes <= (budget or max(plan.num_packs, 1)))
    assert np.all((plan.rank >= 0) & (plan.rank < ranks))
    for step in range(plan.num_steps):
        shared = [plan.packs_of(step, rank) for rank in range(ranks)]
        expected = range(plan.step_offsets[step], plan.step_offsets[step + 1])
        assert sorted(itertools.chain(*shared)) == list(expected)
    cost_of = [length + 0.5 * length**2 for length in map(float, lengths)]
    costs = [sum(cost_of[d] for d in plan.documents(p)) for p in range(plan.num_packs)]
    np.testing.assert_allclose(plan.cost, costs, rtol=1e-12)


@given(problems(), st.integers(1, 300), st.integers(1, 9), st.integers(2, 9))
def test_packs_and_steps_do_not_depend_on_ranks(problem, window, budget, ranks):
    lengths, capacity = problem
    one = plan_packs(lengths, capacity, window=window, pack_budget=budget, seed=3, epoch=2)
    many = plan_packs(lengths, capacity, window=window, pack_budget=budget, seed=3, epoch=2, ranks=ranks)
    for name in ("docs", "pack_offsets", "step_offsets", "tokens", "cost"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name), err_msg=name)
    assert one.digest == many.digest


@functools.cache
def fewest_packs(lengths: tuple[int, ...], capacity: int) -> int:
    """Brute force: the first document's pack is every subset of the others that fits with it."""
    if not lengths:
        return 0
    first, rest = lengths[0], lengths[1:]
    best = len(lengths)
    for size in range(len(rest) + 1):
        for chosen in itertools.combinations(range(len(rest)), size):
            if first + sum(rest[i] for i in chosen) <= capacity:
                left = tuple(x for i, x in enumerate(rest) if i not in chosen)
                best = min(best, 1 + fewest_packs(left, capacity))
    return best


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 100))
def test_close_to_the_fewest_packs(lengths, seed):
    capacity = 12
    plan = plan_packs(lengths, capacity, seed=seed)
    best = fewest_packs(tuple(sorted(lengths)), capacity)
    assert best <= plan.num_packs <= 11 * best // 9 + 1  # the bound of best-fit decreasing: 11/9 + 6/9 (Dosa 2007)


def test_mostly_the_fewest_packs():
    rng = np.random.default_rng(0)
    problems = [tuple(sorted(rng.integers(1, 13, size=8).tolist())) for _ in range(100)]
    best = [fewest_packs(lengths, 12) for lengths in problems]
    ours = [plan_packs(lengths, 12).num_packs for lengths in problems]
    assert sum(a == b for a, b in zip(ours, best, strict=True)) >= 95


@given(problems(), st.integers(0, 50))
def test_best_fit_decreasing_in_one_window_has_the_packs_of_the_textbook_algorithm(problem, seed):
    lengths, capacity = problem
    rooms: list[int] = []  # the multiset of rooms is the same however ties are broken
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    plan = plan_packs(lengths, capacity, seed=seed, window=max(len(lengths), 1))
    assert sorted(capacity - plan.tokens) == sorted(rooms)


def test_bins_stay_open_over_windows():
    lengths = [6, 4] * 64
    assert plan_packs(lengths, 10, window=1).num_packs <= 70  # first come, first served would need up to 128
    lengths = lognormal_lengths(8_200)
    one_window, short_last = plan_packs(lengths, 65_536, window=8_200), plan_packs(lengths, 65_536, window=8_192)
    assert short_last.num_packs <= one_window.num_packs + 1


def test_fill_on_the_lengths_of_the_released_data():
    lengths = lognormal_lengths(435_000)
    assert 16_400 < lengths.mean() < 16_800
    plan = plan_packs(lengths, 65_536, pack_budget=64, ranks=8, cost=MODEL_COST)
    assert len(lengths) == 435_000 and plan.fill >= 0.999
    assert np.mean([plan.balance(step) for step in range(plan.num_steps - 1)]) >= 0.99


@given(st.lists(st.integers(1, 100), min_size=1, max_size=24), st.integers(1, 6))
def test_ranks_are_loaded_longest_pack_first(lengths, ranks):
    plan = plan_packs(lengths, 100, ranks=ranks, cost=(1.0, 0.25))
    loads = [sum(plan.cost[p] for p in plan.packs_of(0, rank)) for rank in range(ranks)]
    expected = [0.0] * ranks
    for cost in sorted(plan.cost.tolist(), reverse=True):
        expected[expected.index(min(expected))] += cost
    assert max(loads) == pytest.approx(max(expected), rel=1e-12)
    assert plan.balance(0) == pytest.approx(sum(expected) / ranks / max(expected), rel=1e-12)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(2, 3))
def test_balance_within_the_bound_of_lpt(lengths, ranks):
    plan = plan_packs(lengths, 9, ranks=ranks, cost=(1.0, 0.25))
    cost = plan.cost.tolist()
    best = min(
        max(sum(c for c, r in zip(cost, choice, strict=True) if r == rank) for rank in range(ranks))
        for choice in itertools.product(range(ranks), repeat=len(cost))
    )
    worst = max(sum(cost[p] for p in plan.packs_of(0, rank)) for rank in range(ranks))
    assert worst <= (4 / 3 - 1 / (3 * ranks)) * best * (1 + 1e-12)  # Graham 1969


def test_free_packs_are_shared_too():
    plan = plan_packs([5] * 8, 5, ranks=4, cost=(0.0, 0.0))
    assert np.bincount(plan.rank).tolist() == [2, 2, 2, 2] and plan.balance(0) == 1.0


def test_the_plan_is_the_same_on_every_platform():
    plan = plan_packs(np.arange(1, 2001) % 997 + 1, 4096, pack_budget=8, ranks=3, seed=7, epoch=1, window=256)
    assert plan.digest == "eeb7106396d304160d6fb93883973acc91458e8fc745d59693a3a27e6bd76af1"
    assert plan.rank[:16].tolist() == [2, 2, 1, 0, 2, 0, 1, 0, 2, 1, 0, 1, 1, 2, 2, 0]
    assert plan.documents(0).tolist() == [742, 732, 1726, 724, 721, 433]


def test_seed_and_epoch_change_the_order():
    lengths = lognormal_lengths(2_000)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    plans = [plan_packs(lengths, 65_536, seed=seed, epoch=epoch, window=250) for seed, epoch in keys]
    assert len({plan.digest for plan in plans}) == len(plans)
    again = plan_packs(lengths, 65_536, seed=0, epoch=1, window=250)
    assert again.digest == plans[1].digest
    together = [{frozenset(plan.documents(p).tolist()) for p in range(plan.num_packs)} for plan in plans]
    assert len(together[0] & together[1]) < len(together[0]) / 2  # other company, not only another order
    means = [lengths[plan.docs[:1000]].mean() for plan in plans]
    assert np.ptp(means) < 2_000  # long documents come neither first nor last


@pytest.mark.parametrize(
    ("lengths", "capacity", "packs"),
    [
        ([], 10, 0),
        ([1], 1, 1),
        ([1] * 7, 1, 7),
        ([10] * 5, 10, 5),
        ([1] * 1000, 10, 100),
        ([3] * 10, 10, 4),
        ([2**20] * 3 + [1] * 4, 2**20, 4),
        ([2**27, 1], 2**27, 2),
    ],
)
@pytest.mark.parametrize("window", [1, 8192])
def test_extremes(lengths, capacity, packs, window):
    plan = plan_packs(lengths, capacity, ranks=3, pack_budget=2, window=window)
    check(plan, lengths, capacity)
    assert plan.num_packs == packs and plan.num_steps == -(-packs // 2)
    assert 0 < plan.fill <= 1


def test_lengths_of_any_integer_type():
    lengths = [5, 3, 8, 1]
    digest = plan_packs(lengths, 9).digest
    for dtype in (np.int32, np.uint16, np.int64, np.uint64):
        assert plan_packs(np.array(lengths, dtype=dtype), 9).digest == digest
    assert plan_packs(torch.tensor(lengths), 9).digest == digest
    assert plan_packs(np.array([5, 0, 3, 0, 8, 0, 1, 0])[::2], 9).digest == digest


def test_arrays_are_read_only():
    plan = plan_packs([5, 3], 9)
    with pytest.raises(ValueError, match="read-only"):
        plan.docs[0] = 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": [5, 11, 12]}, ValueError, "document 1 has 11 tokens; a pack takes documents of 1 to 10 tokens"),
        ({"lengths": [5, 5, 0]}, ValueError, "document 2 has 0 tokens"),
        ({"lengths": [-1]}, ValueError, "document 0 has -1 tokens"),
        ({"lengths": [[1, 2]]}, ValueError, "lengths must have one dimension"),
        ({"lengths": [1.5]}, TypeError, "lengths must be integers, not float64"),
        ({"capacity": 0}, ValueError, "capacity must be 1 to"),
        ({"capacity": 2**31}, ValueError, "capacity must be 1 to"),
        ({"pack_budget": 0}, ValueError, "pack_budget must be 1 to"),
        ({"ranks": 0}, ValueError, "ranks must be 1 to"),
        ({"window": 0}, ValueError, "window must be 1 to"),
        ({"cost": (-1.0, 0.0)}, ValueError, "cost must be two finite numbers"),
        ({"cost": (1.0, float("nan"))}, ValueError, "cost must be two finite numbers"),
    ],
)
def test_errors_name_the_document_or_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        plan_packs(**{"lengths": [5, 5], "capacity": 10, **change})


def test_a_pack_step_or_rank_that_does_not_exist():
    plan = plan_packs([5, 5, 5], 10, ranks=2)
    for name, arguments in (("documents", (2,)), ("packs_of", (1, 0)), ("packs_of", (0, 2)), ("balance", (-1,))):
        with pytest.raises(IndexError, match="does not exist"):
            getattr(plan, name)(*arguments)
