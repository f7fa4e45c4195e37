"""Errors a user can cause, each with a message that says what was wrong, where, and what to do.

The command line prints the message alone and exits with the class's `exit_code`; a traceback
means a fault of ours (or `--debug`).
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import ClassVar

# Of an OSError: a disk that is full or may not be written to.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class LavisLiteError(Exception):
    """Base of all errors that are the input's or the environment's fault, not the program's."""

    exit_code: ClassVar[int] = 1
    # Whether a new start may get over it: a network that is down for a while.
    passing: bool = False

    def __str__(self) -> str:
        # LookupError's own __str__ would quote the message like a dictionary key.
        return str(self.args[0]) if self.args else type(self).__name__


class ConfigError(LavisLiteError, ValueError):
    """A wrong key, value or file in a configuration: a usage error."""

    exit_code: ClassVar[int] = 2


class UnknownNameError(ConfigError, LookupError):
    """A name that is not in the registry."""


class InputError(LavisLiteError, ValueError):
    """An argument of a call that can't be used, such as prompts that don't fit the images."""

    exit_code: ClassVar[int] = 2


class DataError(LavisLiteError, RuntimeError):
    """A data set that is missing, unreadable or not in the declared form."""


class CheckpointError(LavisLiteError, RuntimeError):
    """Weights that are missing, unreadable, or do not fit the model."""


class TrainingError(LavisLiteError, RuntimeError):
    """A run that can't go on, for example after too many non-finite steps."""


class MissingDependencyError(LavisLiteError, ImportError):
    """An optional package that a feature needs is not installed."""


def closest(name: str, names: Iterable[str]) -> str:
    """A phrase naming the nearest of `names`, such as ``"did you mean 'lr'?"``; empty when none is near."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    if not matches:
        return ""
    return "did you mean " + " or ".join(f"'{match}'" for match in matches) + "?"
