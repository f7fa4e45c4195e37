"""How a command ends when something went wrong."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from lavis_lite.common.errors import DISK_ERRORS, LavisLiteError
from lavis_lite.common.logging import say


@contextlib.contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """A user's mistake becomes one line and an exit code (2 for usage, 1 otherwise), Ctrl-C becomes 130.

    So does a disk that is full or may not be written to. A fault of ours keeps its traceback, and with
    `debug` everything does.
    """
    try:
        yield
    except LavisLiteError as error:
        if debug:
            raise
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        if debug or error.errno not in DISK_ERRORS:
            raise
        say(f"error: {error.strerror}: '{error.filename or 'a file of the run'}'")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
