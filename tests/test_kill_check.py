"""What `make kill-check` does by hand, a few times."""

from __future__ import annotations

import pytest

from tools.kill_check import JOBS, check


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_ends_as_one_that_was_left_alone(name, tmp_path):
    moments = check(3, [name], seed=len(name), place=tmp_path)
    rivals = moments.pop("two at once", 0)
    assert moments.total() - moments["too late"] == 3
    assert (rivals > 0) == ("run" in name)
