"""How hypothesis runs our state machines: at random from a seed of ours, without a memory of earlier runs."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings


def machine_settings(examples: int, steps: int) -> settings:
    """So many runs, at least one, of so many steps each."""
    return settings(
        max_examples=max(1, examples),
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
