"""Tests of error messages, written as tables: what is refused, and what is said."""

import functools
import inspect

import pytest


def refuses(*cases):
    """The test raises ValueError for every case (bad, said), by a message that matches ``said``.

    It gets ``bad`` as its first argument; further ones are fixtures or parameters of its own.
    """

    def decorate(test):
        @functools.wraps(test)
        def run(*self, said, **given):
            with pytest.raises(ValueError, match=said):
                test(*self, **given)

        own = inspect.signature(test)
        said = inspect.Parameter("said", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = own.replace(parameters=[*own.parameters.values(), said])
        bad = next(name for name in own.parameters if name != "self")
        return pytest.mark.parametrize((bad, "said"), cases)(run)

    return decorate
