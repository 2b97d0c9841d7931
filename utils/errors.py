"""What a user did wrong, told in one line: the file or setting, the value found, what to do."""

import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message is one line that names the file, the value found and what to do."""


def one_line_errors(*extra: type[Exception]) -> Callable:
    """Decorator for a script's ``main``: expected errors end in one line on stderr and exit status 1.

    Args:
        extra: further exception classes that are the user's to mend (``RecordError``, ``ConfigError``).

    ``UserError`` and ``OSError`` are always included. Anything else is our bug and keeps its traceback;
    ``FACE_DEBUG=1`` shows the traceback of the expected ones as well.
    """
    expected = (UserError, OSError, *extra)

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def wrapped(*args, **kwargs):
            try:
                return main(*args, **kwargs)
            except expected as error:
                if os.environ.get("FACE_DEBUG") == "1":
                    raise
                print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
                raise SystemExit(1) from None

        return wrapped

    return decorate
