"""Facts planted early in a document, asked for on the way and at its end.

Legend: C tokens of a chunk, T tokens of a document, E embedding size.
"""

from typing import Any

import numpy as np
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.eviction_replay import Replay, from_everything
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.evaluation.scoring import ScoredSpans, among, score_answer, window_batch
from lightning_memlong.retrieval import Retrieval, embed_texts, retrieve_for
from lightning_memlong.text.planting import Fact


class Questions:
    """Asks for the facts of one document at its end; and before, if wanted, as often as they are to be used.

    A question follows the last chunk that was read, and retrieves by its own text.

    Args:
        subject: Whose model.
        everything: The document with its facts, read without memory into a bank that evicts nothing.
        tokens: (T,) of that document.
        facts: What is planted in it.
        document: Its number.
        every: Tokens between questions on the way.
        answered: Whether the model answers; else it is only looked for what each question finds.
    """

    def __init__(
        self,
        subject: Subject,
        everything: BankView,
        tokens: np.ndarray,
        facts: list[Fact],
        document: int,
        every: int,
        answered: bool = True,
    ) -> None:
        self._subject, self._everything, self._tokens = subject, everything, tokens
        self.facts, self._document, self._every, self._answered = facts, document, every, answered
        self._asking: dict[int, Tensor] = {}

    def replay(self, retrieval: Retrieval) -> Replay:
        """The document with its facts, to be read into a bank with other settings."""
        return Replay(self._subject, retrieval, self._everything, self._tokens, self._document)

    def replayed(self, replay: Replay, on_the_way: bool) -> list[Measurement]:
        """Read the document in a replay; then ask for each fact, and say what became of it.

        Args:
            replay: Of this document.
            on_the_way: Ask for all facts that were read before, too, which counts as use.
        """
        asked = [0] * len(self.facts)
        until = 0
        for batch in replay.batches():
            replay.store(batch, replay.retrieve(batch))
            end = int(replay.bank.ends()[0])
            if on_the_way and end // self._every > until // self._every and end < len(self._tokens):
                for number, fact in enumerate(self.facts):
                    if fact.planted[1] <= end - replay.bank.chunk_size:
                        asked[number] += 1
                        self._ask_on_the_way(replay, number, end)
            until = end
        found = []
        for number, fact in enumerate(self.facts):
            memory = self._retrieved(replay.retrieval, replay.bank, number, len(self._tokens))
            scored, _ = self._scored(number, len(self._tokens), from_everything(self._everything, memory))
            found.append({**scored, **self._hit(number, memory), "asked": asked[number],
                          "kept": int(replay.holds(fact.planted))})  # fmt: skip
        return found

    def against_everything(self, retrieval: Retrieval) -> list[Measurement]:
        """Ask for each fact at the end, with the bank that has everything."""
        found = []
        for number in range(len(self.facts)):
            memory = self._retrieved(retrieval, self._everything, number, len(self._tokens))
            scored, _ = self._scored(number, len(self._tokens), memory)
            found.append({**scored, **self._hit(number, memory), "kept": 1})
        return found

    def without_memory(self) -> list[Measurement]:
        """Ask for each fact at the end, with the last chunk alone."""
        return [self._scored(number, len(self._tokens), None)[0] for number in range(len(self.facts))]

    def _ask_on_the_way(self, replay: Replay, number: int, place: int) -> None:
        memory = self._retrieved(replay.retrieval, replay.bank, number, place, count=True)
        if memory is not None and memory.count_attention:
            record = from_everything(self._everything, memory)
            _, use = self._scored(number, place, record)
            replay.retrieval.count_use(replay.bank, record, use)

    def _retrieved(
        self, retrieval: Retrieval, bank: BankView, number: int, place: int, count: bool = False
    ) -> Retrieved | None:
        if number not in self._asking:  # policies differ, the encoder does not
            text, subject = self.facts[number].question, self._subject
            self._asking[number] = embed_texts(retrieval, [text], subject.device, subject.hidden_states)
        return retrieve_for(retrieval, bank, [self._asking[number]], place - bank.chunk_size, count)

    def _hit(self, number: int, memory: Retrieved | None) -> Measurement:
        hit = memory is not None and among(memory, self.facts[number].planted, self._everything.chunk_size)
        return {"hit": int(hit)}

    def _scored(self, number: int, place: int, memory: Retrieved | None) -> tuple[Measurement, Any]:
        """How well the answer is told when it is asked for at a place, and how much each chunk was used."""
        if not self._answered:
            return {}, None
        fact, chunk = self.facts[number], self._everything.chunk_size
        text = np.concatenate([self._tokens[:place], fact.asking, fact.answer])
        local = len(text) - place + chunk
        spans = ScoredSpans((len(text),), local, len(fact.answer), len(text))
        batch = window_batch(self._subject, [text], spans, [self._document])
        scored, output = score_answer(self._subject, batch, memory, fact.answer)
        return scored, output.chunk_use
