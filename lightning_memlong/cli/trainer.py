"""Lightning's Trainer with our subcommands; each is a method, as ``fit`` and ``test`` are."""

from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.memory_bank import MemoryBankCallback, memory_callback
from lightning_memlong.cli.console import show_layers, write_csv
from lightning_memlong.cli.predict import Answer, Library, answers, documents, ready, show, write
from lightning_memlong.cli.runs import check_writable, note_settings, run_folder
from lightning_memlong.cli.talking import talk
from lightning_memlong.config import SOURCES, LayerIndex, require
from lightning_memlong.distributed import say
from lightning_memlong.evaluation import READERS, LayerChoice, layer_grid, layer_table, sweep_layers
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import export, load_weights
from lightning_memlong.training.loggers import tensorboard_writers
from lightning_memlong.training.module import MemLongModule


class Trainer(L.Trainer):
    """See :class:`lightning.pytorch.Trainer`."""

    def memory_callback(self) -> MemoryBankCallback | None:
        """The memory, unless it is switched off."""
        return memory_callback(self)

    def export(self, model: MemLongModule, output: str, ckpt_path: str | None = None, datamodule: Any = None) -> None:
        """Write a plain Hugging Face folder: adapters merged in, gates and memory settings beside the weights.

        Args:
            model: The model.
            output: Folder to write; must not exist yet.
            ckpt_path: Checkpoint to export: last (the newest of all runs), or a .ckpt file.
            datamodule: Not used.
        """
        if ckpt_path is not None:
            load_weights(model.model, ckpt_path, complete=True)
        callback = self.memory_callback()
        memory = None if callback is None else asdict(callback.config)
        folder = export(model.model, output, model.tokenizer, memory)
        say(f"Exported: {folder}\nLoads with transformers alone, or again with --model.backbone {folder}")

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
        several = documents(datamodule)
        first, second = next(several), next(several, None)
        one = "null for several documents: a file holds the bank of one"
        require(bank is None or second is None, "bank", bank, one, "leave it out, or give --data.path one file")
        reader, folder = ready(self, model, ckpt_path), run_folder(self) or Path("answers")
        note_settings(self, model)
        keep = folder / "bank.safetensors" if second is None else None
        library = Library(reader, bank, capacity, datamodule.window, keep)
        options = {"max_new_tokens": max_new_tokens, **generation}
        given: list[Answer] = []
        say(f"Answers, as they come: {folder / 'answers.md'}, answers.jsonl", flush=True)
        try:
            for name, text in chain([first], [second] if second else [], several):
                memory = library.bank(name, text)
                for answer in answers(reader, name, memory, prompts, chat, datamodule.window, options):
                    show(answer)
                    write(folder, answer)
                    given.append(answer)
        except KeyboardInterrupt:
            say("\nInterrupted. The answers so far are kept.")
            raise SystemExit(130) from None
        if library.problem is not None:
            raise library.problem
        return given

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
        found = documents(datamodule)
        book = next(found)
        require(next(found, None) is None, "data.path", datamodule.path, "one document", "name one file")
        reader, folder = ready(self, model, ckpt_path), run_folder(self) or Path()
        memory = Library(reader, bank, capacity, datamodule.window, folder / "bank.safetensors").bank(*book)
        talk(reader, memory, datamodule.window, {"max_new_tokens": max_new_tokens, **generation})

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
        fusion = model.model.layout.fusion
        require(fusion == "joint", "model.fusion", fusion, "joint: untrained gates are closed", "leave it out")
        require(self.memory_callback() is not None, "memory.enabled", False, "true", "leave it out")
        backbone, bos, position = model.model.unwrap(), model.model.bos, model.model.layout.position
        choices = layer_grid(memory_layers, readers, sources, backbone)
        require(bool(choices), "memory_layers", memory_layers, "at least one with layers that read", "name others")
        windows = self.limit_val_batches  # type: ignore[attr-defined]
        require(windows != 0, "trainer.limit_val_batches", windows, "1 or more windows", "raise it")
        folder = run_folder(self) or Path("layers")
        check_writable(folder)
        total = len({choice.layers for choice in choices})
        say(f"{total} combinations of layers; results as they come: {folder / 'layers.csv'}", flush=True)
        off = 0.0

        def score(wrapped: MemLong) -> float:
            nonlocal off
            # The same whatever the layers, so once is enough.
            model.model, model.compare_memory_off = wrapped, not off
            self.validate(model, datamodule=datamodule, verbose=False)
            off = off or float(self.callback_metrics["val/perplexity_memory_off"])
            return float(self.callback_metrics["val/perplexity"])

        note_settings(self, model)
        loggers, self.loggers = self.loggers, []  # the curves of a run are no place for them
        scores: dict[LayerChoice, float] = {}
        seen: set[object] = set()
        try:
            for choice, value in sweep_layers(backbone, choices, score, position, bos):
                scores[choice] = value
                write_csv(folder / "layers.csv", layer_table(scores, off))
                if choice.layers not in seen:
                    seen.add(choice.layers)
                    where = f"{choice.source}, memory layer {choice.memory_layer}, read in {choice.readers}"
                    what = f"{value:.3f}, memory off {off:.3f}, ratio {value / off:.4f}"
                    say(f"{len(seen)}/{total}  {where}: {what}", flush=True)
        finally:
            self.loggers = loggers
        title = f"{Path(model.backbone_name).name}, {datamodule.text_name}, untrained"
        figure = show_layers(layer_table(scores, off), title, folder)
        if figure is not None:  # drawn by the first process
            for writer in tensorboard_writers(loggers):
                writer.add_figure("layers/ratio", figure)
