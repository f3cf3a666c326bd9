"""Lightning's Trainer with our subcommands; each is a method, as ``fit`` and ``test`` are."""

from dataclasses import asdict
from typing import Any

import lightning as L

from callbacks.memory_bank import MemoryBankCallback, memory_callback
from lightning_memlong.cli.answers import Answer
from lightning_memlong.cli.layers import score_layers
from lightning_memlong.cli.predict import predict, read_one
from lightning_memlong.cli.push import push
from lightning_memlong.cli.training_facts import training_facts
from lightning_memlong.config import SOURCES, LayerIndex, require
from lightning_memlong.distributed import say
from lightning_memlong.evaluation import READERS
from lightning_memlong.model import export, load_weights
from lightning_memlong.training import MemLongModule


class Trainer(L.Trainer):
    """See :class:`lightning.pytorch.Trainer`."""

    def memory_callback(self) -> MemoryBankCallback | None:
        """The memory, unless it is switched off."""
        return memory_callback(self)

    def export(
        self,
        model: MemLongModule,
        output: str,
        ckpt_path: str | None = None,
        datamodule: Any = None,
        push_to_hub: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Write a plain Hugging Face folder: adapters merged in, gates, memory settings and a card beside the weights.

        Args:
            model: The model.
            output: Folder to write; must not exist yet.
            ckpt_path: Checkpoint to export: last (the newest of all runs), or a .ckpt file.
            datamodule: Not used.
            push_to_hub: Repository of the Hugging Face hub the folder is uploaded to, as owner/name; null: none.
            private: Whether a repository that is made for it is private; null: as the account has it.
        """
        if ckpt_path is not None:
            load_weights(model.model, ckpt_path, complete=True)
        callback = self.memory_callback()
        memory = None if callback is None else asdict(callback.config)
        run = None if ckpt_path is None else training_facts(ckpt_path)
        folder = export(model.model, output, model.tokenizer, memory, run, push_to_hub)
        say(f"Exported: {folder}\nLoads with transformers alone, or again with --model.backbone {folder}")
        if push_to_hub is not None:
            say(f"Pushed: {push(folder, push_to_hub, private)}")

    # Another signature than Lightning's: LightningCLI takes the options of a subcommand from the Trainer's method of
    # that name, and offers no way to name another method.
    def predict(  # type: ignore[override]
        self,
        model: MemLongModule,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        prompt: str | list[str] = "",
        bank: str | None = None,
        capacity: int | None = None,
        max_new_tokens: int = 100,
        generation: dict[str, Any] = {},  # noqa: B006  (shown as the default by --help)
        chat: bool | None = None,
    ) -> list[Answer]:
        """Read each document of --data.path into memory, whole, and answer prompts about it.

        Windows and the local context are data.window tokens long; data.stride, data.min_document_tokens and
        data.max_document_tokens have no say: documents are read whole, in windows that overlap by a chunk.

        Args:
            model: Reads and writes.
            datamodule: Whose documents.
            ckpt_path: Checkpoint to use: last (the newest of all runs), or a .ckpt file.
            prompt: What is asked; or a list, each asked by itself.
            bank: File of the document's bank: opened if it is there, else written once the document has been read.
            capacity: Size of the bank [tokens], which then evicts as in training; null: all that is read is kept.
            max_new_tokens: Longest answer [tokens].
            generation: Further options of transformers' generate, such as {do_sample: true, temperature: 0.7}.
            chat: Prompts are messages in the backbone's chat template; null: if it has one.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        ok = bool(prompts) and all(p.strip() for p in prompts)
        require(ok, "prompt", prompt, "a text, or a list of texts", 'give --prompt "..."')
        options = {"max_new_tokens": max_new_tokens, **generation}
        return predict(self, model, datamodule, ckpt_path, prompts, bank, capacity, chat, options)

    def chat(
        self,
        model: MemLongModule,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        bank: str | None = None,
        capacity: int | None = None,
        max_new_tokens: int = 200,
        generation: dict[str, Any] = {},  # noqa: B006  (shown as the default by --help)
    ) -> None:
        """Read a document into memory and talk about it; tokens are shown as they come.

        Args:
            model: Reads and writes.
            datamodule: Its document.
            ckpt_path: Checkpoint to use: last (the newest of all runs), or a .ckpt file.
            bank: File of the document's bank: opened if it is there, else written once the document has been read.
            capacity: Size of the bank [tokens], which then evicts as in training; null: all that is read is kept.
            max_new_tokens: Longest answer [tokens].
            generation: Further options of transformers' generate, such as {do_sample: true, temperature: 0.7}.
        """
        # Not above: `python -m lightning_memlong.cli.chat` would find its file loaded before it is run.
        from lightning_memlong.cli.chat import talk

        options = {"max_new_tokens": max_new_tokens, **generation}
        _, reader, memory = read_one(self, model, datamodule, ckpt_path, bank, capacity, options)
        talk(reader, memory, datamodule.window, options)

    def layers(
        self,
        model: MemLongModule,
        datamodule: Any = None,
        memory_layers: list[LayerIndex] = [0.1, 0.3, 0.5, 0.7, 0.9],  # noqa: B006  (shown as the default by --help)
        readers: list[str] = list(READERS),  # noqa: B006
        sources: list[str] = list(SOURCES),  # noqa: B006
    ) -> None:
        """Score the backbone, untrained, with memory in other layers: which should store it, and which read it?

        Perplexity of the validation text (trainer.limit_val_batches windows), as a table, a file and a picture.

        Args:
            model: Its backbone is scored; its fusion must be joint, since untrained gates are closed.
            datamodule: Whose validation text.
            memory_layers: Layers that store [indices from 0, or fractions of the depth].
            readers: Layers that read. above: the memory layer and all above it that see the whole context; every: those
                with a sliding window too; spread: four from the memory layer to the top (the paper); own: itself.
            sources: per_layer and single.
        """
        score_layers(self, model, datamodule, memory_layers, readers, sources)
