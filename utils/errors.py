"""What a user did wrong, told in one line: the file or setting, the value found, what to do.

The standard library alone, so that every room may import this file.
"""

import argparse
import functools
import io
import math
import os
import sys
from collections.abc import Callable

COUNT, POSITIVE = (0, math.inf), (1, math.inf)  # ranges of whole numbers (``check_ranges``)

_LONGEST = 2000  # characters of a message


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


def check_ranges(options: argparse.Namespace, **ranges: tuple[float, float]) -> None:
    """Refuse numbers outside ``name=(lowest, highest)``, NaN included; options that the command has not are left alone.

    Raises:
        UserError: names the option, its value and the range.
    """
    for name, (lowest, highest) in ranges.items():
        given = getattr(options, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not lowest <= value <= highest:
                told = f"at least {lowest:g}" if math.isinf(highest) else f"from {lowest:g} to {highest:g}"
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {told}")


def _interrupted_in_one_line(kind: type, error: BaseException, trace: object) -> None:
    if issubclass(kind, KeyboardInterrupt) and os.environ.get("FACE_DEBUG") != "1":
        print("interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


def one_line_errors(main: Callable) -> Callable:
    """Decorator for a script's ``main``: ``UserError`` and ``OSError`` end in one line on stderr and exit status 1.

    So does a lack of memory; Ctrl-C is one line as well. Anything else is our bug and keeps its traceback;
    ``FACE_DEBUG=1`` shows the traceback of the expected ones too.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks are no error
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = _interrupted_in_one_line
        try:
            return main(*args, **kwargs)
        except (UserError, OSError, MemoryError) as error:
            if os.environ.get("FACE_DEBUG") == "1":
                raise
            text = " ".join(str(error).split())
            if isinstance(error, MemoryError):
                text = f"not enough memory: {text or 'fewer images at a time, or fewer threads, need less'}"
            elif isinstance(error, FileExistsError) and error.filename is not None:
                text += "; a file is there where a folder is needed"  # of mkdir: nothing else asks for it
            if len(text) > _LONGEST:  # a file's line is quoted in it, or a path of thousands of characters
                text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
            print(f"error: {text}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    return wrapped
