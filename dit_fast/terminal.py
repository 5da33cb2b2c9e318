"""The doors of the command lines: arguments in, one line of error out, an exit status (`errors.Status`) in any case."""

import argparse
import contextlib
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from dit_fast.errors import Status, UserError

_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07?)")  # colours and titles
ADVICE = "unexpected; --traceback shows where"
WITH_TRAIN = ("PIL", "matplotlib", "tensorboard", "tqdm")  # packages of the extra, absent in a base install


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line as all others are, with status 2.

    fill: adds options whose declaration takes long to import, once this command is the one that is parsed.
    """

    fill: Callable[["Parser"], None] | None = None

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register("action", "parsers", _Commands)

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(*arguments, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(Status.USER, f"dit-fast: error: {one_line(message)}; see `{self.prog} --help`\n")


class _Commands(argparse._SubParsersAction):
    """Lets a command itself refuse what it does not know; argparse leaves that to the parser above it, and its help."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        super().__call__(parser, namespace, values, option_string)
        if unknown := getattr(namespace, "_unrecognized_args", None):
            self.choices[values[0]].error(f"unrecognized arguments: {' '.join(unknown)}")


def run(
    work: Callable[[list[str]], int | None],
    arguments: Sequence[str] | None,
    rank: int = 0,
    interrupted: str = "interrupted",
) -> int:
    """Runs `work` with the arguments (None: the process's); returns the exit status. `--traceback` may stand anywhere.

    rank: of this process among those of one job. Errors of the user, which all ranks meet alike, are printed by rank 0
    only, unless the error says that a rank met it alone (`UserError.alone`).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in given
    with _streams():
        try:
            status = work([argument for argument in given if argument != "--traceback"]) or 0
            sys.stdout.flush()
            return status
        except UserError as error:
            if rank == 0 or error.alone:
                _report(one_line(error), show_traceback)
            return error.status
        except KeyboardInterrupt:
            if rank == 0:
                print(f"dit-fast: {interrupted}", file=sys.stderr)
            return Status.INTERRUPTED
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in WITH_TRAIN:
                _report(f"{one_line(error)}; run `pip install 'dit_fast[train]'`", show_traceback)
                return Status.USER
            left = isinstance(error, BrokenPipeError) and not _has_reader(sys.stdout)  # as in `dit-fast info | head`
            if not left:
                place = f"rank {rank}: " if rank else ""
                _report(f"{place}{type(error).__name__}: {one_line(error)} ({ADVICE})", show_traceback)
            return Status.UNEXPECTED
        finally:
            for stream in (sys.stdout, sys.stderr):
                _settle(stream)


def one_line(error: object) -> str:
    """A message as one printable line: of several lines the first (of an error in a worker of torch, the last too)."""
    lines = [line.strip() for line in _ESCAPES.sub("", str(error)).splitlines() if line.strip()]
    if isinstance(error, UserError):
        text = " ".join(lines)
    else:
        text = " ... ".join(lines[:1] + (lines[-1:] if "Original Traceback" in str(error) else []))
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text) or "(no message)"


def _report(line: str, show_traceback: bool) -> None:
    if show_traceback:
        traceback.print_exc()
    print(f"dit-fast: error: {line}", file=sys.stderr, flush=True)


class _Lossy:
    """A text stream for messages: what cannot be written is lost, and the work goes on."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Usable streams, whatever the caller closed; a file opened later must not get the number of one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    before = sys.stdout, sys.stderr
    sys.stdout = before[0] or _to_null()
    errors = before[1] or _to_null()
    sys.stderr = _Lossy(errors)
    for stream in (sys.stdout, errors):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before[0] or sys.stdout, errors


def _to_null() -> TextIO:
    return open(os.devnull, "w")


def _has_reader(stream: TextIO) -> bool:
    try:
        poller = select.poll()
        poller.register(stream.fileno(), select.POLLOUT)
        return not any(events & select.POLLERR for _, events in poller.poll(0))
    except (OSError, ValueError):  # no file at all
        return True


def _settle(stream: Any) -> None:
    """What cannot be written now cannot be at exit either, where Python would turn it into status 120."""
    stream = getattr(stream, "_stream", stream)
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
