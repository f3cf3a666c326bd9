"""The page's server: on this machine alone, without anything from the network."""

from typing import Any

import panel as pn

from lightning_memlong.distributed import say
from lightning_memlong.look.address import HOST
from lightning_memlong.look.looker import Looker
from lightning_memlong.look.page import Page


def serve(
    looker: Looker, name: str, window: int | None, options: dict[str, Any], port: int, open_browser: bool
) -> None:
    """Show the page until Ctrl-C.

    Args:
        looker: Who has read the book.
        name: Of the book.
        window: Tokens of the local context of an answer [tokens].
        options: Of transformers' ``generate``.
        port: Port of this machine.
        open_browser: Open the page in the browser of this machine.
    """
    pn.extension()
    server = pn.serve(
        {"look": lambda: Page(looker, name, window, options).view()}, title=f"memlong look: {name}", address=HOST,
        port=port, websocket_origin=[f"{HOST}:{port}", f"localhost:{port}"], show=False, start=False, verbose=False,
    )  # fmt: skip
    address = f"http://{HOST}:{port}/look"
    say(f"Look at it: {address}   (Ctrl-C ends it)", flush=True)
    if open_browser:
        server.show("/look")
    server.run_until_shutdown()
