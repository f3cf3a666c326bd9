"""Checkpoints: what a model must be to take one, and its trained weights out of it. Needs no Lightning."""

import hashlib
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_memlong.errors import UserError
from lightning_memlong.model.export import require_settings_of_a_network
from lightning_memlong.model.memory_weights import recognise_backbone
from lightning_memlong.model.model import MemLongModel

CHECKPOINT_FORMAT = 4


def read_checkpoint(path: Path, given: str) -> dict[str, Any]:
    """A checkpoint of train.py, memory-mapped.

    Args:
        path: The file.
        given: What was typed, for messages.

    Raises:
        UserError: If it is not there, damaged, or not one of ours.
    """
    if not path.is_file():
        raise UserError(
            f"ckpt_path={given!r} is not a file. Allowed: last, or the path of a .ckpt file. Fix: correct it."
        )
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        raise UserError(
            f"ckpt_path={given!r} cannot be read as a checkpoint ({type(error).__name__}). Allowed: a whole "
            ".ckpt file written by fit. Fix: give another, it may have been cut short."
        ) from error
    if "memlong" not in checkpoint:
        raise UserError(
            f"ckpt_path={given!r} is not a MemLong checkpoint. Allowed: one written by train.py fit. Fix: give another."
        )
    if (found := checkpoint["memlong"].get("format", 1)) != CHECKPOINT_FORMAT:
        raise UserError(
            f"ckpt_path={given!r} is of format {found}. Allowed: {CHECKPOINT_FORMAT}. Fix: use the release "
            "that wrote it, or train again."
        )
    return checkpoint


def run_of(path: Path) -> Path | None:
    """The run folder that a checkpoint or anything else lies in, however deep; None: it lies in none."""
    return next((folder for folder in path.absolute().parents if (folder / "config.yaml").is_file()), None)


def stored_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the network is; the recipe (optimiser, schedule) is a run's and is not in there.

    Raises:
        UserError: If there is more than that: what names a class, for one, would have its module imported.
    """
    stored = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
    require_settings_of_a_network(stored, "the checkpoint's")
    return stored


def check_checkpoint(
    model: MemLongModel, checkpoint: dict[str, Any], recognised: dict[str, Any], complete: bool
) -> None:
    """Check that a checkpoint belongs to a model's backbone and settings.

    Args:
        model: The model.
        checkpoint: Its content.
        recognised: What :func:`recognise_backbone` said of the model.
        complete: Whether it must hold all that is trained now.

    Raises:
        UserError: If it was made with another backbone, or does not hold what is trained now.
    """
    saved, here = checkpoint["memlong"]["backbone"], recognised
    differ = [f"{k} is {saved.get(k)!r} there and {here[k]!r} here" for k in here if saved.get(k) != here[k]]
    if differ:
        raise UserError(
            f"ckpt_path: the checkpoint was made from another backbone ({'; '.join(differ)}). Allowed: the "
            "backbone it was trained with. Fix: give that one as --model.backbone."
        )
    if "state_dict" not in checkpoint:
        return  # a sharding strategy has loaded it already
    trained = {f"model.{name}" for name in model.trainable()}
    missing = sorted(trained - checkpoint["state_dict"].keys())
    extra = sorted(checkpoint["state_dict"].keys() - {f"model.{name}" for name in model.state_dict()})
    if extra or (missing and complete):
        names = ", ".join((extra or missing)[:3])
        raise UserError(
            f"ckpt_path: the checkpoint {'holds weights this model lacks' if extra else 'lacks trained weights'} "
            f"({names}, ...). Allowed: the same model.tuning, model.fusion and layers as when it was written. "
            "Fix: leave these options to the checkpoint."
        )


def load_weights(model: MemLongModel, path: str, complete: bool, recognised: dict[str, Any] | None = None) -> None:
    """Give a model the trained weights of a checkpoint.

    Args:
        model: The model.
        path: The file.
        complete: Whether it must hold all that the model trains.
        recognised: What :func:`recognise_backbone` said of the model; None: it is looked at now.

    Raises:
        UserError: If it cannot be read, or belongs to another backbone or other settings.
    """
    checkpoint = read_checkpoint(Path(path), path)
    check_checkpoint(model, checkpoint, recognised or recognise_backbone(model.backbone), complete)
    weights = {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
    model.load_state_dict(weights, strict=False)


def weights_digest(model: MemLongModel) -> str:
    """A digest of the weights that make what a :class:`MemLong` stores: some numbers of each, in layers up to the last.

    Args:
        model: Whose backbone; adapters count as they are.
    """
    decoder = model.backbone.get_decoder()
    parts = [decoder.embed_tokens, *decoder.layers[: model.stored_layers[-1] + 1]]
    named = [pair for part in parts for pair in part.named_parameters()]
    # Where a weight lies, and how often it was written to, is known without asking the device.
    if any(weight.is_inference() for _, weight in named):  # nobody counts there
        return _digest_of(model, named)
    state = (model.bos, *((weight.data_ptr(), weight._version) for _, weight in named))
    known = _DIGESTS.get(model)
    if known is None or known[0] != state:
        known = _DIGESTS[model] = state, _digest_of(model, named)
    return known[1]


_DIGESTS: WeakKeyDictionary[MemLongModel, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def _digest_of(model: MemLongModel, named: list[tuple[str, nn.Parameter]]) -> str:
    flat = [weight.detach().reshape(-1) for _, weight in named]
    some = torch.cat([one[:: max(1, len(one) // 64)].float() for one in flat]).cpu()  # one question to the device
    digest = hashlib.blake2b(f"{model.bos}".encode(), digest_size=8)
    digest.update(repr([(name, tuple(weight.shape)) for name, weight in named]).encode())
    digest.update(some.numpy().tobytes())
    return f"{model.backbone.config.model_type} {digest.hexdigest()}"
