"""What `make kill-check` does by hand, a few times."""

from __future__ import annotations

import pytest

from tools.kill_check import check


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_ends_as_one_that_was_left_alone(processes, tmp_path):
    moments = check(3, [processes], seed=processes, place=tmp_path)
    assert moments.total() - moments["too late"] == 3
