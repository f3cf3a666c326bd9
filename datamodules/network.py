"""Networks fail: reading goes on where it was, a few times and ever more slowly, before it is given up."""

import logging
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import pyarrow as pa

from datamodules.rows import Row
from lightning_memlong.errors import UserError

log = logging.getLogger("lightning_memlong")

UNREADABLE = (OSError, EOFError, ValueError, zlib.error, pa.ArrowException)
FIRST_WAIT_S = 0.5

T = TypeVar("T")


def patiently(read: Callable[[int], Iterator[Row]], start: int, where: str, retries: int) -> Iterator[Row]:
    """Rows of ``read``, going on after network faults, with a bad row where a file ends before its end.

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
                if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
                    raise not_there(where, error) from error
                if not isinstance(error, UNREADABLE):
                    raise
                yield Row(number, problem=f"the rest of the file cannot be read ({error})")
                return
            failures += 1
            _wait(where, error, failures, retries)


def once_more(action: Callable[[], T], where: str, retries: int) -> T:
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
    reason = f"{type(error).__name__}: {error}"
    if failures > retries:
        raise UserError(
            f"{where} could not be read: {reason}; tried {failures} times. Allowed: a server that answers. Fix: try "
            "again later (a run goes on with --ckpt_path last), raise --data.retries, or give a local copy as "
            "--data.path."
        ) from error
    pause = min(60.0, FIRST_WAIT_S * 2 ** (failures - 1))
    log.warning("%s: %s; trying again in %.1f s (%d of %d)", where, reason, pause, failures, retries)
    time.sleep(pause)


def _is_network(error: BaseException) -> bool:
    """Whether trying again may help; libraries wrap what the network said, so causes count too."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any("OfflineModeIsEnabled" in repr(e) for e in chain):
        return False  # the hub's client was told not to try
    for e in chain:
        status = getattr(e, "status", None) or getattr(getattr(e, "response", None), "status_code", None)
        if status is not None:
            return status >= 500 or status in (408, 425, 429)
        # The hub's client changes its network library between versions: errors are known by where they come from.
        home = type(e).__module__.split(".")[0]
        if isinstance(e, ConnectionError | TimeoutError) or home in ("aiohttp", "httpx", "httpx2", "requests"):
            return True
    return False


def not_there(where: str, error: BaseException) -> UserError:
    """The message for a file or address that does not exist."""
    reason = getattr(error, "strerror", None) or ("not found (404)" if "://" in where else str(error))
    return UserError(
        f"data.path: {where} cannot be read: {reason}. Allowed: a readable file, folder, glob or http:// address. "
        "Fix: correct the path."
    )
