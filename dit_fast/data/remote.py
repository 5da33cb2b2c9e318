"""Parts of files of http(s) servers and object stores through fsspec; what breaks on the way is asked for again."""

import asyncio
import functools
import logging
import os
import random
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from dit_fast.data.files import reason, shown
from dit_fast.data.threads import closed, pause
from dit_fast.errors import DataError

logger = logging.getLogger("dit_fast")

NEEDS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}  # scheme -> package that fsspec uses
TIMEOUT_SECONDS = 60  # without a byte
RETRIES = 10  # of one part; with the pauses below an outage of 2.5 minutes is outlasted
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
LONGEST_ASKED = 120.0  # seconds that a server may ask for
_jitter = random.Random()  # of its own: the program's numbers stay as they are


def request(address: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, fewer where it ends before; all of it from a server that does not know ranges.

    Answers 408, 429 and 5xx, broken connections, timeouts and bodies that end early are tried again, `RETRIES` times,
    after pauses that double, up to a quarter longer by chance so that many ranks do not come back at once
    (`Retry-After` is honoured up to `LONGEST_ASKED`). Each is logged. Other answers are final at once, and nothing is
    waited for once the caller's `Threads` are closed. Raises DataError, one line.
    """
    system, failures = _system(address.partition(":")[0]), 0
    while True:
        try:
            return _answer(system, address, start, stop)
        except DataError:
            raise
        except Exception as error:  # each store has its own kinds
            if getattr(error, "status", None) == 416 and not start:
                return b""  # an empty file
            words = _final(error)
            if words is not None:
                raise DataError(f"{address}: {words}") from None
            if failures >= RETRIES:
                raise DataError(
                    f"{address}: cannot be read ({_words(error)}), {RETRIES} retries made; "
                    "start again when the server answers"
                ) from None
            seconds = min(FIRST_PAUSE * 2**failures, LONGEST_PAUSE) * _jitter.uniform(1, 1.25)
            asked = str((getattr(error, "headers", None) or {}).get("Retry-After", ""))
            if asked.isdecimal():
                seconds = max(seconds, min(float(asked), LONGEST_ASKED))
            failures += 1
            text = "%s: %s; trying again from byte %d in %.1f s (retry %d of %d)"
            logger.warning(text, address, _words(error), start, seconds, failures, RETRIES)
        pause(seconds)


def _answer(system: Any, address: str, start: int, stop: int) -> bytes:
    """What fsspec's `cat_file` gives, given up once the caller's `Threads` are closed."""
    pause()
    coming = asyncio.run_coroutine_threadsafe(system._cat_file(address, start=start, end=stop), system.loop)
    wait([coming, closed()], 10 * TIMEOUT_SECONDS, FIRST_COMPLETED)
    if coming.done():
        return coming.result()
    coming.cancel()
    pause()
    raise TimeoutError


@functools.cache
def _system(scheme: str) -> Any:
    """fsspec's file system of a scheme. Raises DataError naming the package that is missing."""
    options: dict[str, Any] = {}
    try:
        import fsspec

        if scheme in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS)
            # addresses go out as they were given (signed ones), answers come as they lie on the disk
            client = {"timeout": limits, "auto_decompress": False, "trust_env": True}
            options = {"client_kwargs": client, "encoded": True, "headers": {"Accept-Encoding": "identity"}}
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        package = NEEDS[scheme]
        more = "" if package == "aiohttp" else f" {package}"
        raise DataError(
            f"{scheme}:// is read through fsspec and {package}, which are not both there; "
            f"run `pip install 'dit_fast[remote]'{more}`"
        ) from None


def _final(error: Exception) -> str | None:
    """What another request would not change, in words; None for what may pass."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "the server answers 404 Not Found; check the address"
    if isinstance(error, PermissionError):
        return f"may not be read ({_words(error)}); check the credentials"
    if isinstance(status, int) and 300 <= status < 500 and status not in (408, 429):
        return f"the server answers {_words(error)}; check the address"
    if type(error).__name__ == "TooManyRedirects":
        return "the server sends from one address to the next without end; check the address"
    if type(error).__name__ in ("ClientConnectorCertificateError", "ClientConnectorDNSError", "NoCredentialsError"):
        return f"cannot be reached ({_words(error)}); check the address"
    if isinstance(error, ValueError):  # aiohttp's InvalidURL and UnicodeError too
        return f"is not an address that can be asked for ({_words(error)})"
    return None


def _words(error: Exception) -> str:
    """An error in a few words of one line."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return shown(f"{status} {getattr(error, 'message', '')}".strip().splitlines()[0])
    if isinstance(error, TimeoutError):
        return f"no answer in {TIMEOUT_SECONDS} s"
    if type(error).__name__ == "ClientPayloadError":
        return "the answer ended early"
    cause = getattr(error, "os_error", None)
    return reason(os.strerror(cause.errno) if cause is not None and cause.errno else error)
