"""bench.cluster: the arithmetic of its model, and the command."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from bench.cluster import document_lengths, main, qwen3_4b
from bench.cluster_model import (
    EVERY_MICRO_STEP,
    FREE,
    POLICIES,
    Layout,
    Rates,
    deal,
    loads_of,
    pack_seconds,
    plan_epoch,
    run_epoch,
    shared_cores,
    wire_seconds,
)
from dasd_engine.metrics import flop_coefficients

CONTEXT, PACKS, RANKS = 65_536, 64, 16


@pytest.fixture(scope="module")
def epoch():
    c, a, _ = flop_coefficients(qwen3_4b())
    return plan_epoch(document_lengths(2_000, 17_500, CONTEXT), CONTEXT, PACKS, RANKS, (c, a))


def test_lengths_have_the_published_mean():
    lengths = document_lengths(20_000, 13_800, CONTEXT)
    assert len(lengths) == 20_000 and lengths.mean() == pytest.approx(13_800, rel=1e-3)
    assert lengths.min() >= 1 and lengths.max() <= CONTEXT


@pytest.mark.parametrize("policy", POLICIES)
def test_every_pack_is_computed_once(epoch, policy):
    step, meeting, rank = deal(policy, epoch.plan, epoch.plan.cost)
    sizes = np.diff(epoch.plan.step_offsets)
    assert np.array_equal(np.bincount(step), sizes) and rank.max() < RANKS
    loads = loads_of(policy, epoch.plan, epoch.plan.cost)
    assert loads.sum() == pytest.approx(epoch.plan.cost.sum())
    meetings = PACKS // RANKS if policy in EVERY_MICRO_STEP else 1
    assert loads.shape[1] == meetings == meeting.max() + 1


def test_dealing_by_cost_balances(epoch):
    layout, rates = Layout(RANKS, 1, 1, "full"), Rates()
    balance = {name: run_epoch(name, qwen3_4b(), 4 * 10**9, epoch, layout, rates).balance for name in POLICIES}
    assert balance["ours"] == balance[FREE] > 0.95
    assert balance["ours"] > balance["random, once"] > balance["random"]
    assert balance["ours"] > balance["ours, by layer"] > balance["random"]


def test_one_rank_has_no_bubble(epoch):
    c, a, _ = flop_coefficients(qwen3_4b())
    alone = plan_epoch(document_lengths(200, 17_500, CONTEXT), CONTEXT, PACKS, 1, (c, a))
    done = run_epoch("ours", qwen3_4b(), 4 * 10**9, alone, Layout(1, 1, 1, "none"), Rates())
    assert done.balance == 1.0 and done.bubble == pytest.approx(0.0, abs=1e-12)
    assert done.seconds == pytest.approx(pack_seconds(qwen3_4b(), alone, Layout(1, 1, 1, "none"), Rates()).sum())


def test_sharing_a_pack_divides_its_computation_and_sends_heads(epoch):
    rates = replace(Rates(), micro_step=0.0)
    one = pack_seconds(qwen3_4b(), epoch, Layout(16, 1, 1, "none"), rates)
    two = pack_seconds(qwen3_4b(), epoch, Layout(16, 2, 1, "none"), rates)
    sent = 2 * 36 * 2 * (CONTEXT / 2) * (2 * 32 + 2 * 8) * 128 / 2  # both passes, layers, bf16, tokens, heads, half
    np.testing.assert_allclose(two, one / 2 + sent / rates.inside)


def test_replicas_reduce_shards_only_between_nodes():
    rates = Rates()
    gather, reduce = wire_seconds(10**9, Layout(16, 1, 1, "none"), rates)
    assert gather == 2e9 * 15 / 16 / rates.outside and reduce == 4e9 * 15 / 16 / rates.outside
    gather, reduce = wire_seconds(10**9, Layout(16, 1, 2, "none"), rates)
    assert gather == 2e9 * 7 / 8 / rates.inside
    assert reduce == pytest.approx(4e9 * 7 / 8 / rates.inside + 4e9 / 8 / rates.outside)


def test_ranks_beyond_the_cores_share_them():
    loads = np.array([[2.0, 2.0, 2.0, 2.0], [3.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 0.0], [4.0, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(shared_cores(loads, 2), [4.0, 3.0, 3.0, 5.0])
    np.testing.assert_allclose(shared_cores(loads, 4), [2.0, 3.0, 2.0, 4.0])


def test_the_command_says_that_it_models_and_on_what(monkeypatch, capsys):
    arguments = ["--ranks", "8", "--share", "0.004", "--linear-tflops", "100", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench.cluster", *arguments])
    main()
    report = json.loads(capsys.readouterr().out)
    assert report["modelled"] and [row["policy"] for row in report["rows"]] == list(POLICIES)
    assert any("linear 100" in line and "assumed" in line for line in report["assumptions"])
