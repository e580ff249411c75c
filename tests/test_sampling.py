import numpy as np
import pytest

from gnnet.sampling import evenly


@pytest.mark.parametrize(("count", "limit"), [(0, 3), (1, 1), (5, 5), (5, 9), (100, 7), (7, 6), (1000, 999)])
def test_rows_are_distinct_in_order_and_as_many_as_asked_for(count, limit):
    rows = evenly(count, limit)
    assert len(rows) == min(count, limit)
    assert (np.diff(rows) > 0).all()
    if len(rows) > 1:
        assert (rows[0], rows[-1]) == (0, count - 1)
        assert np.diff(rows).max() - np.diff(rows).min() <= 1


def test_without_a_limit_all_rows_and_of_no_rows_none():
    assert evenly(4, None).tolist() == [0, 1, 2, 3]
    assert evenly(4, 0).tolist() == []
    assert evenly(4, 1).tolist() == [0]


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="expected 0 or more"):
        evenly(-1, 2)
    with pytest.raises(ValueError, match="expected 0 or more"):
        evenly(1, -2)


def test_one_row_is_drawn_from_each_stretch_of_a_list_that_repeats_itself():
    rows = evenly(300, 100, np.random.default_rng(0))
    assert (rows // 3 == np.arange(100)).all()
    assert set(rows % 3) == {0, 1, 2}  # at equal steps, a list of period 3 would give few of them
    assert evenly(2, 5, np.random.default_rng(0)).tolist() == [0, 1]
    assert evenly(4, 0, np.random.default_rng(0)).tolist() == []
