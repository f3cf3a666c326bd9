"""MemLong as a user holds it: ready to read and write, from a checkpoint, an exported folder or any backbone."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from lightning_memlong.backbone import first_token, load_tokenizer
from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import (
    DEFAULT_MEMORY_LAYER,
    MemoryConfig,
    ModelConfig,
    TuningConfig,
    changed,
    memory_settings,
    require,
    require_own_code,
)
from lightning_memlong.errors import UserError
from lightning_memlong.generation import Conversation, LongContext, Prompt, are_several, one_each
from lightning_memlong.model import (
    MemLongModel,
    export,
    exported_memory,
    exported_settings,
    load_weights,
    read_checkpoint,
    run_of,
    stored_settings,
    warn_of_other_memory,
)
from lightning_memlong.retrieval import Retrieval, Retriever
from lightning_memlong.text import Text

log = logging.getLogger(__name__)


class MemLong(MemLongModel):
    """A network with a memory that reads texts of any length, and writes with what it has read.

    Arguments as for :class:`MemLongModel`; :meth:`from_pretrained` makes one that is ready for use.
    """

    _long_context: LongContext | None = None

    def use_memory(
        self,
        config: MemoryConfig,
        tokenizer: Any,
        retriever: Retriever | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Say how texts become tokens and how chunks are retrieved; the encoder is loaded when it is first needed.

        Args:
            config: The memory settings.
            tokenizer: The backbone's.
            retriever: The encoder they name, where it is loaded already.
            autocast: Context in which the model computes, such as a Lightning plugin's.

        Raises:
            UserError: For a query that needs text which is not written yet.
        """
        self._long_context = LongContext(self, config, tokenizer, retriever, autocast)
        warn_of_other_memory(self, config)

    @property
    def long_context(self) -> LongContext:
        """The model with its tokenizer and memory settings.

        Raises:
            UserError: If nobody has said what they are.
        """
        if self._long_context is None:
            raise UserError(
                "memory: this model does not know its tokenizer and memory settings. Allowed: a model made by "
                "MemLong.from_pretrained. Fix: use that, or call model.use_memory(MemoryConfig(), tokenizer)."
            )
        return self._long_context

    @property
    def retrieval(self) -> Retrieval:
        """The memory settings at work; the encoder is loaded at first use.

        Raises:
            UserError: As :attr:`long_context`.
        """
        return self.long_context.retrieval

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """As :meth:`MemLongModel.save_pretrained`, with the tokenizer and the memory settings this model knows."""
        if (known := self._long_context) is None:
            return super().save_pretrained(folder, tokenizer)
        return export(self, folder, tokenizer or known.tokenizer, asdict(known.config))

    # ---- reading ------------------------------------------------------------------------------------------

    def read(
        self,
        text: Text,
        memory: MemoryBank | None = None,
        *,
        window: int | None = None,
        capacity: int | None = None,
        progress: bool = True,
    ) -> MemoryBank:
        """Read texts of any length into a bank, window by window, without gradients.

        Ctrl-C ends it after the window it is in: the bank then holds what has been read, and the same call with
        ``memory=`` that bank goes on from there.

        Args:
            text: A text, or its token ids (list, (T,) tensor or array, or what a tokenizer gives); or several, each
                read into a row of its own, side by side.
            memory: A bank to go on with: if what it holds is the beginning of the text, the rest is read (and its last
                chunk again, if the text goes on in mid-token); else the text is read after what it holds. None: a new
                one.
            window: Tokens read at once [tokens]; None: see :meth:`LongContext.window`.
            capacity: Size of a new bank's row [tokens], which then evicts by ``memory.policy``, and whose windows
                retrieve as in training so that it knows what is used. None: all that is read is kept.
            progress: Show a bar.

        Raises:
            UserError: For an empty text, a bank of another model, retriever, chunk size or number of rows, or one that
                finds no room; the bank is then as it was.
        """
        return self.long_context.read(text, memory, window=window, capacity=capacity, progress=progress)

    def read_tokens(
        self,
        tokens: Sequence[np.ndarray],
        memory: MemoryBank | None = None,
        *,
        window: int | None = None,
        capacity: int | None = None,
        progress: bool = True,
    ) -> MemoryBank:
        """As :meth:`read`, for texts that are tokens (T,) already."""
        return self.long_context.read_tokens(tokens, memory, window=window, capacity=capacity, progress=progress)

    def converse(self, memory: MemoryBank | None = None, *, row: int = 0, window: int | None = None) -> Conversation:
        """A conversation of several turns about what was read, see :class:`Conversation`.

        Args:
            memory: A bank this model has read into; None: an empty one.
            row: Which of its rows.
            window: Tokens of the local context [tokens]; None: see :meth:`LongContext.window`.

        Raises:
            UserError: If the bank was made with something else.
        """
        return Conversation(self.long_context, memory, row, window)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        memory: MemoryBank | None = None,
        *,
        query: str | Sequence[str] | None = None,
        row: int | Sequence[int] = 0,
        window: int | None = None,
        **options: Any,
    ) -> Any:
        """Go on with a prompt, or with each of several, with what was read in memory.

        Text that no longer fits the local context moves into the bank while this lasts; afterwards the bank holds what
        it held before, with counters that have counted. Several prompts are answered one after the other, each by
        itself; all of them are looked at before the first is answered.

        Args:
            prompt: Text to go on with; or messages (``[{"role": "user", "content": "..."}]``) for the backbone's chat
                template; or a list of either.
            memory: A bank this model has read into; None: nothing was read.
            query: Text that retrieves for the prompt; None: the prompt, or its last message. Of several prompts one
                each, or one for all.
            row: Which row of the bank. Of several prompts one each (``range(bank.rows)``), or one for all.
            window: Tokens of the local context [tokens]; None: see :meth:`LongContext.window`.
            **options: Those of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``,
                ``top_p``, ``num_beams``, ``streamer``, ``stop_strings`` and so on.

        Returns:
            The text that was written, without the prompt; a list of them with ``num_return_sequences``; what
            transformers returns with ``return_dict_in_generate``. Of several prompts, a list of these.

        Raises:
            UserError: For an empty prompt, one that does not fit the window, a bank made with something else, or not
                as many rows or queries as prompts.
        """
        several = are_several(prompt)
        prompts: list[Any] = [*prompt] if several else [prompt]
        rows, queries = one_each("row", row, len(prompts)), one_each("query", query, len(prompts))
        for where in {*rows} if several else ():  # one alone is refused where it is said
            with self.converse(memory, row=where, window=window) as conversation:
                for one in (p for p, its in zip(prompts, rows, strict=True) if its == where):
                    conversation.require_prompt(one)
        found = []
        for one, asked, where in zip(prompts, queries, rows, strict=True):
            with self.converse(memory, row=where, window=window) as conversation:
                found.append(conversation.say(one, query=asked, **options))
        return found if several else found[0]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, memory: MemoryConfig | Mapping[str, Any] | None = None, **settings: Any
    ) -> "MemLong":
        """A model ready to read and write, in evaluation mode.

        Args:
            folder: A checkpoint of ``train.py fit`` or its run folder; what ``train.py export`` or
                :meth:`save_pretrained` wrote; or any backbone's name, folder or hub id.
            memory: Memory settings, or those that differ from the ones stored with the weights.
            **settings: Fields of :class:`ModelConfig`, ``tuning`` and ``bos``, that win over the stored ones.

        Raises:
            UserError: If it cannot be loaded, its gates were trained for other layers, or settings cannot be used.
        """
        known = {*ModelConfig.__dataclass_fields__, "tuning", "bos"}
        for name, value in settings.items():
            allowed = "settings of MemLong: " + ", ".join(sorted(known))
            require(name in known, name, value, allowed, "correct the name")
        if isinstance(tuning := settings.get("tuning"), Mapping):
            settings["tuning"] = changed(TuningConfig(), tuning, "tuning")
        if (checkpoint := _checkpoint_of(Path(folder))) is not None:
            model, stored = _from_checkpoint(cls, checkpoint, settings, memory is not None)
        else:
            model, stored = _from_folder(cls, str(folder), settings)
        if not isinstance(memory, MemoryConfig):
            given = memory or {}
            memory = cast(MemoryConfig, changed(memory_settings(stored), given, "memory"))
            require_own_code(memory, given)
        model.use_memory(memory, load_tokenizer(model.name))
        return model.eval()


def tokenizer_of(where: str | Path) -> Any:
    """The tokenizer of what :meth:`MemLong.from_pretrained` loads, without its weights.

    Raises:
        UserError: If it cannot be loaded.
    """
    checkpoint = _checkpoint_of(Path(where))
    return load_tokenizer(
        str(where) if checkpoint is None else stored_settings(read_checkpoint(checkpoint, str(checkpoint)))["backbone"]
    )


def _checkpoint_of(path: Path) -> Path | None:
    """The checkpoint a path means: itself, or the newest of a run folder."""
    if path.suffix == ".ckpt":
        return path
    folder = path / "checkpoints"
    newest = max(folder.glob("last*.ckpt"), key=lambda f: f.stat().st_mtime, default=folder / "last.ckpt")
    return newest if folder.is_dir() else None


def _from_checkpoint(
    cls: type[MemLong], file: Path, settings: dict[str, Any], memory: bool
) -> tuple[MemLong, Mapping[str, Any]]:
    stored = stored_settings(read_checkpoint(file, str(file)))
    config = {name: value for name, value in stored.items() if name in ModelConfig.__dataclass_fields__}
    bos = first_token(load_tokenizer(stored["backbone"]), stored.get("prepend_bos"))
    chosen = {"tuning": TuningConfig(**stored.get("tuning", {})), "bos": bos, **config, **settings}
    model = cls(stored["backbone"], **chosen)
    load_weights(model, str(file), complete=True)
    return model, _memory_of_run(file, memory)


def _memory_of_run(file: Path, given: bool) -> Mapping[str, Any]:
    """The memory settings of the run a checkpoint lies in; where it lies in none, those that were given must do.

    Raises:
        UserError: If they are not there, and none were given.
    """
    config = (run_of(file) or file.absolute().parent) / "config.yaml"
    try:
        return dict(yaml.safe_load(config.read_text())["memory"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        if given:
            return {}
        raise UserError(
            f"memory: the settings of the run are not in {config} ({type(error).__name__}). Allowed: a checkpoint in "
            "its run folder, or any with settings of the memory. Fix: give memory={'chunk_size': ...}."
        ) from error


def _from_folder(cls: type[MemLong], where: str, settings: dict[str, Any]) -> tuple[MemLong, Mapping[str, Any]]:
    stored = exported_settings(where)
    chosen = dict(stored or {})
    bos = chosen.pop("prepend_bos", None)
    if "bos" not in settings and bos is not False:  # export writes the token, so that no tokenizer is needed
        chosen["bos"] = bos if isinstance(bos, int) and bos is not True else first_token(load_tokenizer(where), bos)
    if stored is None and "memory_layer" not in settings:
        log.info("%s comes without settings: memory_layer=%s of its depth", where, DEFAULT_MEMORY_LAYER)
    return cls(where, **(chosen | settings)), exported_memory(where)
