"""The errors a user sees: one line each, naming the key, the value, the rule and the way out.

Everything raised on purpose is an `LsiqError`. The entry point prints its message without a traceback; any other
exception is a defect of the package and keeps its traceback.
"""

from __future__ import annotations


class LsiqError(Exception):
    """Base of every error that is the user's to mend; `str()` of it is one line."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class ConfigError(LsiqError):
    """A setting is unknown, misspelt, of the wrong type or out of range."""


class InputError(LsiqError):
    """A checkpoint, text or record cannot be used: missing, corrupt, too short, unsupported."""


class NumericalError(LsiqError):
    """A computation left the numbers that can be trusted."""


class ResourceError(LsiqError):
    """The machine has not what a computation needs."""


class OutputError(LsiqError):
    """A result cannot be written where the configuration says."""


class EchoError(LsiqError):
    """Another process of the same run failed and says why; this one ends without a word."""
