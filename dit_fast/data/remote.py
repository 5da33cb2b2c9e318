"""Files over http(s): read once from start to end; what breaks on the way is asked for again from where it broke."""

import http.client
import logging
import socket
import ssl
import time
import urllib.error
import urllib.request

from dit_fast.data.files import reason, shown
from dit_fast.errors import DataError

logger = logging.getLogger("dit_fast")

TIMEOUT_SECONDS = 60
RETRIES = 10  # of one file; with the pauses below an outage of 2.5 minutes is outlasted
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
LONGEST_ASKED = 120.0  # seconds that a server may ask for
CHUNK_BYTES = 1 << 20


class HttpStream:
    """Bytes of an http(s) address. size: how many there must be, where that is known.

    Answers 408, 429 and 5xx, broken connections, timeouts and bodies that end early are tried again: `RETRIES` times a
    file, after pauses that double (`Retry-After` is honoured up to `LONGEST_ASKED`), each logged. Other answers are
    final at once. Raises DataError, one line.
    """

    def __init__(self, address: str, size: int | None = None):
        self.address, self._size, self._at = address, size, 0
        self._retries = self._failures = 0  # of this file; since bytes last came
        self._response: http.client.HTTPResponse | None = None
        self._connect()

    def __enter__(self) -> "HttpStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end of the file only."""
        parts, wanted = [], count
        while wanted:
            data = self._some(min(wanted, CHUNK_BYTES))
            if not data:
                break
            parts.append(data)
            wanted -= len(data)
        return b"".join(parts)

    def _some(self, count: int) -> bytes:
        while True:
            try:
                if self._response is None:
                    self._connect()
                assert self._response is not None
                data = self._response.read(count)
                if not data and self._size is not None and self._at < self._size:
                    raise http.client.IncompleteRead(b"")
            except (OSError, http.client.HTTPException) as error:
                self._wait(error)
                continue
            self._at += len(data)
            self._failures = 0 if data else self._failures
            return data

    def _connect(self) -> None:
        """Opens the connection at the first byte that has not been read; returns when it is open."""
        while True:
            try:
                self._response = self._request()
                return
            except (OSError, http.client.HTTPException) as error:
                self._wait(error)

    def _final(self, words: str) -> DataError:
        """What another request would not change."""
        return DataError(f"{self.address}: {words}")

    def _request(self) -> http.client.HTTPResponse:
        try:
            headers = {"Range": f"bytes={self._at}-"} if self._at else {}
            request = urllib.request.Request(self.address, headers=headers)
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (408, 429) or error.code >= 500:
                raise
            raise self._final(f"the server answers {_words(error)}; check the address") from None
        except urllib.error.URLError as error:
            cause = error.reason
            unknown = isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN
            if unknown or isinstance(cause, ssl.SSLCertVerificationError):
                raise self._final(f"cannot be reached ({reason(cause)}); check the address") from None
            raise
        except (ValueError, http.client.InvalidURL) as error:  # UnicodeError too
            raise self._final(f"is not an address that can be asked for ({_words(error)})") from None
        try:
            self._begin(response)
        except BaseException:
            response.close()
            raise
        return response

    def _begin(self, response: http.client.HTTPResponse) -> None:
        """Compares the length with what is known and goes to the byte that is to be read next."""
        start, packed = 0, response.headers.get("Content-Encoding", "identity")
        if packed != "identity":
            raise self._final(f"the server sends it packed ({shown(packed)}); have it send the file as it is")
        if response.status == 206:
            span = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
            first = span[0].partition("-")[0]
            if not first.isdecimal() or int(first) != self._at:
                raise self._final(f"the server sends another part ({span[0]!r}) than the one from byte {self._at}")
            start = self._at
        length = response.headers.get("Content-Length")
        if length is not None and length.isdecimal():
            total = start + int(length)
            if self._size is not None and total != self._size:
                raise self._final(f"has {total} bytes where {self._size} are expected; restore or rebuild it")
            self._size = total
        while start < self._at:  # a server that does not know ranges begins again
            data = response.read(min(self._at - start, CHUNK_BYTES))
            if not data:
                raise http.client.IncompleteRead(b"")
            start += len(data)

    def _wait(self, error: Exception) -> None:
        """Sleeps before the next try, or gives up."""
        self._close()
        if self._retries >= RETRIES:
            raise DataError(
                f"{self.address}: cannot be read ({_words(error)}), {RETRIES} retries made; "
                "start again when the server answers"
            ) from None
        pause = min(FIRST_PAUSE * 2**self._failures, LONGEST_PAUSE)
        asked = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
        if asked.isdecimal():
            pause = max(pause, min(float(asked), LONGEST_ASKED))
        self._retries, self._failures = self._retries + 1, self._failures + 1
        logger.warning(
            "%s: %s; trying again in %.1f s (retry %d of %d)",
            self.address,
            _words(error),
            pause,
            self._retries,
            RETRIES,
        )
        time.sleep(pause)

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _words(error: BaseException | str) -> str:
    """An error in a few words of one line."""
    if isinstance(error, urllib.error.HTTPError):
        return shown(f"{error.code} {error.reason}".splitlines()[0])
    if isinstance(error, urllib.error.URLError):
        error = error.reason
    if isinstance(error, http.client.IncompleteRead):
        return "the answer ended early"
    return reason(error)
