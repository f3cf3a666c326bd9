"""Whether a place in the training data that was saved by one run means the same batches in another."""

from typing import Any

from lightning_memlong.config import require
from lightning_memlong.distributed import rank_and_world
from lightning_memlong.errors import UserError

from .cached import CachedStream
from .open_split import Stream
from .settings import DataSettings

ORDER = ("window", "stride", "batch_size", "seed", "shuffle")
"""Settings that the order of batches depends on."""
LIVE_ORDER = ("shuffle_buffer", "min_document_tokens", "max_document_tokens")
"""Further ones while streaming; from the cache, their effect is in the stream's digest."""


def order_facts(settings: DataSettings, stream: Stream) -> dict[str, Any]:
    """What has to be the same in a run that goes on, by option."""
    cached = isinstance(stream, CachedStream)
    return {"cache": cached} | {key: getattr(settings, key) for key in (*ORDER, *(() if cached else LIVE_ORDER))}


def saved_position(state: dict[str, Any], settings: DataSettings, stream: Stream) -> dict[str, Any]:
    """The position of this process in a saved state.

    Raises:
        UserError: If the order of batches would not be the one of the saved run.
    """
    fix = "go on with that value, or start a new run"
    for key, value in order_facts(settings, stream).items():
        saved = state.get(key, value)
        require(saved == value, f"data.{key}", value, f"{saved}, which the checkpoint was made with", fix)
    if state["text"] != stream.digest():
        raise UserError(
            "data: the training text is not the one of the checkpoint (the files, their sizes and times, data.path, "
            "hub_*, extensions, *_column, run_characters, split, *_split, validation_fraction, control_tokens, "
            "min_document_tokens and max_document_tokens make it). Allowed: the same text. Fix: give these options "
            "as they were, or start a new run without --ckpt_path."
        )
    rank, world = rank_and_world()
    saved = len(state["positions"])
    require(saved == world, "trainer.devices", world, f"{saved}, which the checkpoint was made with", fix)
    return state["positions"][rank]
