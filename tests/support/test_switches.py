"""Settings of the process come back when several threads change them and overlap."""

import warnings

from clusterguard._support import no_warnings


def test_warnings_come_back_after_blocks_that_overlap():
    first, second = no_warnings.on(), no_warnings.on()
    with warnings.catch_warnings(record=True, action="always") as given:
        before = [*warnings.filters]
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        warnings.warn("nobody hears this", stacklevel=1)
        second.__exit__(None, None, None)
        assert warnings.filters == before
        warnings.warn("this is heard", stacklevel=1)
    assert [str(warning.message) for warning in given] == ["this is heard"]
