"""Which of many problems is named."""

from __future__ import annotations

import pytest

from gnnet.scenes.problems import BadInput, describe_problems, kinds_of_problems


@pytest.mark.cases
def test_the_most_frequent_kind_is_named_and_what_came_first():
    poses = [f"/d/poses.txt line {n} holds {v}, which is not finite" for n, v in ((6, "-inf"), (7, "nan"))]
    sizes = [f"depth map /d/{i:05d}.png is 270×180 pixels, its camera says 546×364" for i in range(10)]
    assert describe_problems([*poses, *sizes]) == (
        f"12 problems, 10 of them alike: {sizes[0]}; the first: {poses[0]}"
    )
    assert describe_problems([*sizes, *poses]) == f"12 problems, the first: {sizes[0]}"
    assert [len(kind) for kind in kinds_of_problems([*poses, *sizes])] == [10, 2]
    bad = BadInput("skip")
    assert bad.first == ""
    for problem in (*poses, *sizes):
        bad.report(ValueError(problem))
    assert bad.first == f"; 10 problems alike: {sizes[0]}; the first problem: {poses[0]}"
