"""The page: a book beside its memory, and questions about it. One object a browser tab."""

import asyncio
from html import escape
from typing import Any

import panel as pn

from callbacks.figures import draw_heads
from lightning_memlong.cli.predict import as_prompt
from lightning_memlong.errors import UserError
from lightning_memlong.look.attended import Attended
from lightning_memlong.look.drawing import coloured_tokens, draw_written, similarity, strip, worth
from lightning_memlong.look.looker import Looker, Sight
from lightning_memlong.look.parts import Chunks, Sentences
from lightning_memlong.look.question import Question, Written

STYLE = """
.strip { width: 100%; height: 34px; background: #f0f2f5; border-radius: 3px; display: block; }
.tokens { font: 17px/1.9 Georgia, "DejaVu Serif", serif; color: #1b1f24; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; }
.token { border-radius: 3px; padding: 2px 0; }
.legend { font: 12px system-ui, sans-serif; color: #49525c; margin: 4px 0 0; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; }
.legend i { vertical-align: -2px; margin-left: 8px; }
.hint { font: 14px system-ui, sans-serif; color: #49525c; }
.answer { font: 17px/1.6 Georgia, "DejaVu Serif", serif; white-space: pre-wrap; overflow-wrap: anywhere; }
"""
HINT = "Click a sentence: what it retrieved, how it was read and which tokens gained is shown here."
EVERY = 1.0
"""Time between two looks at an answer that is being written [s]."""
HALF = {"flex": "1 1 480px", "min-width": "0", "padding": "0 16px"}
"""Two columns side by side where there is room, else one below the other."""
STICKY = "@media (min-width: 1024px) { :host { position: sticky; top: 0; } }"
"""Side by side, the book stays in sight while what belongs to it is scrolled through."""


class Reading:
    """What tokens retrieved: a list of chunks, and a picture of the heads that read them, or one of them."""

    def __init__(self) -> None:
        self.list = Chunks(sizing_mode="stretch_width")
        self.heads = pn.pane.Matplotlib(None, tight=False, format="svg", sizing_mode="stretch_width", height=330)
        self.title = pn.pane.HTML("", sizing_mode="stretch_width", stylesheets=[STYLE])
        self._found: Attended | None = None
        self.list.param.watch(lambda _: self._draw(), "chosen")

    def show(self, found: Attended, place: int | None = None) -> None:
        """Show what was found, most attended first.

        Args:
            found: What it is.
            place: Where it is read, to tell how far away it is [tokens]; None: that is not told.
        """
        self._found = found
        shares = found.share()
        highest = max(float(shares.max()) if len(shares) else 0.0, 1e-9)
        shown = []
        for number in shares.argsort(descending=True).tolist():
            chunk, share = found.chunks[number], float(shares[number])
            far = "" if place is None else f"{place - chunk.start:,} before"
            head = (f"token {chunk.start:,}", far, similarity(chunk), f"{100 * share:.2f} % of attention")
            line, bar = " · ".join(filter(None, head)), 100 * share / highest
            shown.append({"start": chunk.start, "head": line, "share": bar, "text": chunk.text})
        if self.list.chosen not in [chunk.start for chunk in found.chunks]:
            self.list.chosen = -1
        self.list.chunks = shown
        self._draw()

    def parts(self, *between: Any) -> list[Any]:
        """What of it stands below one another; ``between``: more pictures, before the list."""
        return [self.title, self.heads, *between, self.list]

    def _draw(self) -> None:
        found = self._found
        if found is None or not found.chunks:
            self.heads.object, self.title.object = None, ""
            return
        starts = [chunk.start for chunk in found.chunks]
        number = starts.index(self.list.chosen) if self.list.chosen in starts else None
        what = "all that was retrieved" if number is None else f"the chunk at token {starts[number]:,}"
        self.title.object = f'<p class="legend">Attention of each head to {what}. Click a chunk to see its own.</p>'
        self.heads.object = draw_heads({k: 100 * v for k, v in found.by_head(number).items()}, "% of attention")


class Page:
    """What one browser tab shows.

    Args:
        looker: Who has read the book.
        name: Of the book.
        window: Tokens of the local context of an answer [tokens].
        options: Of transformers' ``generate``.
    """

    def __init__(self, looker: Looker, name: str, window: int | None, options: dict[str, Any]) -> None:
        self._looker, self._name, self._window, self._options = looker, name, window, options
        self._shown: Attended | None = None
        self._question: Question | None = None
        self.sentences = Sentences(sizing_mode="stretch_width")
        self.number = pn.widgets.IntInput(label="page", value=1, start=1, end=looker.book.pages, width=90)
        self.strip = pn.pane.HTML("", sizing_mode="stretch_width", stylesheets=[STYLE])
        self.tokens = pn.pane.HTML(f'<p class="hint">{HINT}</p>', sizing_mode="stretch_width", stylesheets=[STYLE])
        self.sight = Reading()
        self.asked = pn.widgets.TextInput(placeholder="Ask about the book", sizing_mode="stretch_width")
        self.ask, self.stop = pn.widgets.Button(label="Ask"), pn.widgets.Button(label="Stop", disabled=True)
        self.answer = pn.pane.HTML("", sizing_mode="stretch_width", stylesheets=[STYLE])
        self.map = pn.pane.Matplotlib(None, tight=False, format="svg", sizing_mode="stretch_width")
        self.written = Reading()
        self.trouble = pn.pane.Alert("", alert_type="danger", visible=False, sizing_mode="stretch_width")
        self._one_at_a_time = asyncio.Lock()
        self._connect()
        self._turn()

    def _connect(self) -> None:
        self.number.param.watch(lambda _: self._turn(), "value")
        self.sentences.param.watch(self._look, "chosen")
        for reading in (self.sight, self.written):
            reading.list.param.watch(self._show_in_book, "wanted")
        self.ask.on_click(self._answer)
        self.asked.param.watch(self._answer, "enter_pressed")
        self.stop.on_click(self._end)

    def _end(self, event: Any) -> None:
        if self._question is not None:
            self._question.stop()

    # ---- the book -----------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Show another page."""
        page = self._looker.book.page((self.number.value or 1) - 1)
        self.sentences.sentences = [[s.start, s.end, s.text] for s in page]
        self._mark()

    def _mark(self) -> None:
        """Draw where in the book all of it is."""
        page = self.sentences.sentences
        place = self._shown.start if isinstance(self._shown, Sight) else None
        self.strip.object = strip(len(self._looker.book), (page[0][0], page[-1][1]), self._shown, place)

    def _show_in_book(self, event: Any) -> None:
        """Turn to a chunk, and mark it."""
        start = event.new
        if not 0 <= start < len(self._looker.book):
            return  # of this conversation
        event.obj.wanted = -1
        self.sentences.marked = [start, start + self._looker.memory.chunk_size]
        self.number.value = self._looker.book.page_of(start) + 1

    async def _look(self, event: Any) -> None:
        """Read the sentence that was clicked, unless another one has been meanwhile."""
        chosen = next((s for s in self.sentences.sentences if s[0] == event.new), None)
        if chosen is None:
            return
        self.tokens.loading = True
        async with self._one_at_a_time:
            if self.sentences.chosen != chosen[0]:
                return
            try:
                self._shown = sight = await asyncio.to_thread(self._looker.look, chosen[0], chosen[1])
                self.tokens.object = f'{coloured_tokens(sight)}<p class="legend">{worth(sight)}</p>'
                self.sight.show(sight, sight.start)
                self._mark()
                self._tell("")
            except UserError as error:
                self._tell(str(error))
            finally:
                self.tokens.loading = False

    # ---- questions ----------------------------------------------------------------------------------------

    async def _answer(self, event: Any) -> None:
        """Write an answer, and show what there is of it as it is written."""
        text = (self.asked.value_input or "").strip()
        if not text or self._question is not None:
            return
        self._question = question = Question(
            self._looker, as_prompt(self._looker.model, text, None), self._window, self._options
        )
        self.ask.disabled, self.stop.disabled = True, False
        self._show_answer("…")
        self._tell("")
        try:
            writing = asyncio.create_task(asyncio.to_thread(question.answer))
            while not (await asyncio.wait({writing}, timeout=EVERY))[0]:
                self._show_written(question.so_far())
            self._show_written(await writing)
        except UserError as error:
            self._tell(str(error))
            self._show_answer("")
        finally:
            self._question, self.ask.disabled, self.stop.disabled = None, False, True

    def _show_answer(self, text: str) -> None:
        self.answer.object = f'<div class="answer">{escape(text)}</div>' if text else ""

    def _show_written(self, written: Written) -> None:
        if not written.pieces:
            return
        self._show_answer(written.text)
        self.written.show(written)
        self._shown = written
        self._mark()
        self.map.object = draw_written(written, written.pieces) if written.chunks else None

    # ---- how it looks -------------------------------------------------------------------------------------

    def _tell(self, text: str) -> None:
        """Show what cannot be done; nothing: hide what was shown."""
        self.trouble.object, self.trouble.visible = escape(text), bool(text)

    def view(self) -> pn.viewable.Viewable:
        """All of it."""
        last = pn.widgets.Button(label="◀", width=40, align="end")
        following = pn.widgets.Button(label="▶", width=40, align="end")
        last.on_click(lambda _: self._go(-1))
        following.on_click(lambda _: self._go(1))
        whole = len(self._looker.book)
        title = f"<b>{escape(self._name)}</b>, {whole:,} tokens, {self._looker.book.pages:,} pages"
        named = pn.pane.HTML(title, stylesheets=[STYLE])
        top = pn.FlexBox(last, self.number, following, named, align_items="flex-end", gap="8px")
        book = (top, self.strip, self.sentences)
        ask = pn.Row(self.asked, self.ask, self.stop, sizing_mode="stretch_width")
        looking = pn.Column(self.tokens, *self.sight.parts(), sizing_mode="stretch_width")
        asking = pn.Column(ask, self.answer, *self.written.parts(self.map), sizing_mode="stretch_width")
        tabs = pn.Tabs(("This sentence", looking), ("Ask", asking), sizing_mode="stretch_width")
        both = pn.FlexBox(
            pn.Column(*book, styles=HALF, stylesheets=[STICKY]), pn.Column(self.trouble, tabs, styles=HALF),
            sizing_mode="stretch_width", align_items="flex-start",
        )  # fmt: skip
        return pn.Column(both, sizing_mode="stretch_width", styles={"background": "white"})

    def _go(self, pages: int) -> None:
        self.number.value = min(max(1, (self.number.value or 1) + pages), self._looker.book.pages)
