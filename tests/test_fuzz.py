"""A few of the damaged inputs of `tests.fuzz`."""

from __future__ import annotations

import logging

from tests.fuzz import run


def test_damaged_text_and_image_headers_end_in_a_value_or_an_error_that_names_the_file(caplog):
    caplog.set_level(logging.CRITICAL)
    outcome = run(600, seed=1)
    assert not outcome.faults and sum(outcome.counts.values()) == 600
