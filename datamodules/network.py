"""Networks fail: reading goes on where it was, a few times and ever more slowly, before it is given up.

Not by ``tenacity``: it calls a function anew, and what is tried again here is an iterator that has given rows already.
It has to go on at the next row, and every row it gives makes it patient again. What would be left to the library is the
waiting (:func:`_wait`, 8 lines); which faults are worth another try, and what a user is told, stays ours with it.
"""

import asyncio
import csv
import logging
import lzma
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import aiohttp
import fsspec
import pyarrow as pa
from fsspec.implementations.http import HTTPFileSystem

from lightning_memlong.errors import UserError

from .formats import NotTextError
from .records import Record

log = logging.getLogger("lightning_memlong")

UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, csv.Error, pa.ArrowException)
FIRST_WAIT_S = 0.5

T = TypeVar("T")


class ListingError(Exception):
    """The network failed while a folder was listed."""


class _Http(HTTPFileSystem):
    """Web servers whose folders are listed, or not: fsspec takes one that cannot be listed for an empty one."""

    async def _ls(self, url: str, detail: bool = True, **kwargs: Any) -> Any:
        try:
            return await super()._ls(url, detail, **kwargs)
        except FileNotFoundError:
            raise  # a link to nothing
        except OSError as error:  # a time limit among them; walking through folders passes over these
            raise ListingError(url) from error


def file_system(url: str, timeout_s: float) -> tuple[Any, str]:
    """The file system behind an address, whose answers may take so long [s], and the path in it."""
    if not url.startswith("http"):
        try:
            return fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:  # a package that is missing; a protocol that nobody knows
            raise UserError(
                f"data.path: {url} cannot be opened ({error}). Allowed: http://, https://, hf://, and what fsspec "
                "knows once its package is installed (gs:// gcsfs, s3:// s3fs). Fix: pip install that package, or give "
                "a local copy."
            ) from error
    # A body is read as fast as training needs it: what must not take long is each answer, not the whole.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    return _Http(client_kwargs={"timeout": timeout}), url


def read_with_retries(
    read: Callable[[int], Iterator[Record]], start: int, where: str, retries: int
) -> Iterator[Record]:
    """Records of ``read``, going on after network faults, with a bad row where a file ends before its end.

    Raises:
        UserError: If something is not there, or the network fails ``retries`` times without a row in between.
    """
    number, failures = start, 0
    while True:
        try:
            for row in read(number):
                yield row
                number, failures = row.number + 1, 0
            return
        except UserError:
            raise
        except Exception as error:
            if not _is_network(error):
                missing = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
                if missing or _status(error) is not None:
                    raise not_there(where, error) from error
                if not isinstance(error, UNREADABLE):
                    raise
                what = (
                    f"it is {error}"
                    if isinstance(error, NotTextError)
                    else f"the rest of the file cannot be read ({error})"
                )
                yield Record(number, problem=what)
                return
            failures += 1
            _wait(where, error, failures, retries)


def retry(action: Callable[[], T], where: str, retries: int) -> T:
    """What ``action`` returns, tried again after network faults.

    Raises:
        UserError: If the network fails ``retries`` times.
    """
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:
            if not _is_network(error):
                raise
            failures += 1
            _wait(where, error, failures, retries)


def _wait(where: str, error: BaseException, failures: int, retries: int) -> None:
    """Sleep before another try, twice as long each time; raise after the last."""
    cause = _chain(error)[-1]  # file systems say that a file is not there where a server was not
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    if failures > retries:
        raise UserError(
            f"{where} could not be read: {reason}; tried {failures} times. Allowed: a server that answers. Fix: try "
            "again later (a run goes on with --ckpt_path last), raise --data.retries or --data.timeout_s, or give a "
            "local copy as --data.path."
        ) from error
    pause = min(60.0, FIRST_WAIT_S * 2 ** (failures - 1))
    log.warning("%s: %s; trying again in %.1f s (%d of %d)", where, reason, pause, failures, retries)
    time.sleep(pause)


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what caused it; libraries wrap what the network said."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def _status(error: BaseException) -> int | None:
    """The status a server answered with, if this is about one."""
    return next((status for e in _chain(error) if (status := _answer(e)) is not None), None)


def _answer(error: BaseException) -> int | None:
    if isinstance(error, aiohttp.TooManyRedirects):
        return error.history[0].status
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_network(error: BaseException) -> bool:
    """Whether trying again may help."""
    chain = _chain(error)
    if any("OfflineModeIsEnabled" in repr(e) for e in chain):
        return False  # the hub's client was told not to try
    for e in chain:
        if (status := _answer(e)) is not None:
            return status >= 500 or status in (408, 425, 429)
        # The hub's client changes its network library between versions: errors are known by where they come from.
        home = type(e).__module__.split(".")[0]
        known = isinstance(e, ConnectionError | TimeoutError | asyncio.TimeoutError)  # two of them on Python 3.10
        if known or home in ("aiohttp", "httpx", "httpx2", "requests"):
            return True
    return False


def not_there(where: str, error: BaseException) -> UserError:
    """The message for a file or address that cannot be had, now or later."""
    status = _status(error)
    reason = getattr(error, "strerror", None) or str(error)
    if "://" in where:
        reason = "not found (404)" if status in (None, 404) else f"the server answers {status}"
        reason += " (sends on) again and again" if status in (301, 302, 303, 307, 308) else ""
    return UserError(
        f"data.path: {where} cannot be read: {reason}. Allowed: a readable file, folder, glob or http:// address. "
        "Fix: correct the path."
    )
