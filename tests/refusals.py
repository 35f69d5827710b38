"""Errors by what a program and a user need of them, whatever their wording."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refuses(
    kind: type[BaseException] | tuple[type[BaseException], ...], *facts: object, **attributes: object
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Require an error of this kind, in one line that holds each fact, with these attributes.

    Facts are what the reader must find in the message: the offending name or value, what was expected, the
    option that mends it.
    """
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message, message
    assert not (missing := [fact for fact in facts if str(fact) not in message]), f"{missing}: {message}"
    found = {name: getattr(caught.value, name, None) for name in attributes}
    assert found == attributes, message
