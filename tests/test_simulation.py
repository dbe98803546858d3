"""Clusters in simulated time: every block is committed soon, at a flat number of requests."""

from __future__ import annotations

import pytest
from cluster.simulation import Outcome, Scenario, Simulation


def requests_of_a_block(scenario: Scenario, outcome: Outcome) -> float:
    return sum(outcome.requests.values()) / scenario.n_blocks


def check(scenario: Scenario, outcome: Outcome) -> None:
    """Make sure that nothing waited long, and that workers were in work."""
    assert outcome.n_deaths > 0
    # Unless both die that should have noticed.
    waits = sorted(outcome.failover)
    assert waits[len(waits) * 99 // 100] < scenario.lease_seconds
    assert waits[-1] < 2 * scenario.lease_seconds
    assert outcome.oldest < 10 * (scenario.block_seconds + scenario.lease_seconds)
    assert outcome.seconds < 1.3 * outcome.ideal_seconds + 100


def test_workers_die_and_join_and_every_block_is_committed() -> None:
    scenario = Scenario(
        25, 800, block_seconds=5, life_seconds=100, pause_seconds=20, step_seconds=0.5
    )

    outcome = Simulation(scenario).run()

    check(scenario, outcome)
    assert requests_of_a_block(scenario, outcome) < 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_requests_of_a_block_stay_flat_as_the_cluster_grows() -> None:
    small, large = (Scenario(n, 100 * n, block_seconds=10, step_seconds=1) for n in (30, 1000))

    outcomes = [Simulation(scenario).run() for scenario in (small, large)]

    check(large, outcomes[1])
    costs = [
        requests_of_a_block(scenario, outcome)
        for scenario, outcome in zip((small, large), outcomes, strict=True)
    ]
    assert costs[1] < 1.3 * costs[0]
