"""Where the page is: on this machine alone."""

import socket

from lightning_memlong.config import require
from lightning_memlong.errors import UserError

HOST = "127.0.0.1"
"""Nobody else can reach it."""
PORT = 8060


def free_port(port: int) -> int:
    """A port at which nobody listens: the one that is wanted, or any for 0.

    Raises:
        UserError: If somebody does, or it is none.
    """
    allowed = "a port from 0 (any that is free) to 65535"
    require(0 <= port <= 65535, "port", port, allowed, f"leave it out for {PORT}")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(
            f"port={port} cannot be used ({error.strerror}). Allowed: one at which nothing listens. Fix: give another "
            "--port; 0 takes any that is free."
        ) from error
