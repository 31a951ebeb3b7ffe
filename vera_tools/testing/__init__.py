"""For the tests of others: `assert_reproducible`, and ``pytest --vera``, which makes each adapter a test (`plugin`)."""

from vera_tools.testing.assertions import assert_reproducible

__all__ = ["assert_reproducible"]
