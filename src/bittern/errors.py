"""The two kinds of error bittern raises on purpose.

A message is one line that names the value, what was expected and the mend, so that the command line can print
it as it is and a library user can act on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BitternError(Exception):
    """Base of every error bittern raises on purpose."""


class UserError(BitternError, ValueError):
    """A mistake in what the user gave: the command line prints it as one line and exits with code 2."""


class UnusableModel(UserError):
    """A model that has to change before anything can be made of it: what was made of it so far is worth nothing."""


def memory_size(count: float) -> str:
    """Bytes as messages about memory give them: 12.50 GiB, 3.25 MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """The tail of an error message for an unknown name: the nearest choice, or all of them.

    >>> did_you_mean("svdqant-fast", ["int4", "svdquant-fast"])
    "did you mean 'svdquant-fast'? (known: int4, svdquant-fast)"
    """
    known = sorted(choices)
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    listing = ", ".join(known)
    return f"did you mean '{near[0]}'? (known: {listing})" if near else f"expected one of: {listing}"
