"""What a user did wrong, told in one line: the file or setting, the value found, what to do.

The standard library alone, so that every room may import this file.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message is one line that names the file, the value found and what to do.

    ``config.ConfigError`` and ``mxnet_reader.RecordError`` derive from it.
    """


class CommandLine(argparse.ArgumentParser):
    """argparse's parser with the description as it is written; a wrong option is a ``UserError`` like any other."""

    def __init__(self, description: str | None = None, **options):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message} (--help lists the options)")


def one_line_errors(main: Callable) -> Callable:
    """Decorator for a script's ``main``: ``UserError`` and ``OSError`` end in one line on stderr and exit status 1.

    Anything else is our bug and keeps its traceback; ``FACE_DEBUG=1`` shows the traceback of the expected ones as well.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (UserError, OSError) as error:
            if os.environ.get("FACE_DEBUG") == "1":
                raise
            print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    return wrapped
