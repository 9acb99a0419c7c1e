"""An index that products come to, change in and leave.

For as long as is asked, killed at random operations.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from small import FULL

from tests.support.living import LivingFlatIndex, LivingIndex, LivingSpilledIndex

MACHINES = (LivingIndex, LivingSpilledIndex, LivingFlatIndex)
STEPS = 20
"""Changes to one index."""

SEEDS = 20 if FULL else 1
CHANGES = int(os.environ.get("TRITOWER_CHANGES", 9600 if FULL else 300))
"""Of all types of index, with all seeds."""


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
@pytest.mark.parametrize("number", range(SEEDS))
def test_a_living_index_is_what_a_dict_says(machine, number, figures):
    before, differs = machine.done.copy(), True
    try:
        run_state_machine_as_test(
            seed(number)(type(machine.__name__, (machine,), {})),
            settings=settings(
                max_examples=max(1, CHANGES // (len(MACHINES) * SEEDS * STEPS)),
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
        differs = False
    finally:  # what was done and how it ended, also where an assertion ends the test
        done = machine.done - before
        figures["T7 changes to living indexes"] += done["changes"]
        figures["T7 of which killed and done again"] += done["kills"]
        figures["T7 indexes that differ from a dict"] += differs
    assert done["changes"] > STEPS / 2
