"""Parts of the page that are clicked: sentences, and chunks that were retrieved.

Texts reach the page as text nodes, never as HTML: a book may say anything.
"""

import param
from panel.custom import JSComponent

SENTENCES = """
export function render({ model, el }) {
  const box = document.createElement("div")
  box.className = "sentences"
  const pick = (event) => {
    const at = event.target.closest("[data-start]")
    if (at && (event.type === "click" || event.key === "Enter")) model.chosen = Number(at.dataset.start)
  }
  box.addEventListener("click", pick)
  box.addEventListener("keydown", pick)
  const mark = () => {
    for (const span of box.children) {
      const [start, end] = [Number(span.dataset.start), Number(span.dataset.end)]
      span.classList.toggle("chosen", start === model.chosen)
      span.classList.toggle("marked", start < model.marked[1] && end > model.marked[0])
    }
  }
  const fill = () => {
    box.replaceChildren(...model.sentences.map(([start, end, text]) => {
      const span = document.createElement("span")
      span.dataset.start = start
      span.dataset.end = end
      span.tabIndex = 0
      span.setAttribute("role", "button")
      span.textContent = text
      return span
    }))
    mark()
  }
  model.on("sentences", fill)
  model.on("chosen", mark)
  model.on("marked", () => {
    mark()
    box.querySelector(".marked")?.scrollIntoView({ block: "nearest" })
  })
  fill()
  el.append(box)
}
"""

SENTENCES_STYLE = """
.sentences { font: 16px/1.6 Georgia, "DejaVu Serif", serif; color: #1b1f24; }
.sentences { white-space: pre-wrap; overflow-wrap: anywhere; }
.sentences span { cursor: pointer; border-radius: 3px; }
.sentences span:hover { background: #e8eef6; }
.sentences span:focus-visible { outline: 2px solid #1f77b4; }
.sentences span.marked { background: #fdf0c4; }
.sentences span.chosen { background: #cfe2f3; box-shadow: 0 0 0 2px #cfe2f3; }
"""


class Sentences(JSComponent):
    """Text of which each sentence can be clicked."""

    sentences = param.List(doc="Of each: first token, the place after its last one, text.")
    chosen = param.Integer(-1, doc="First token of the one that was clicked; -1: none.")
    marked = param.List([-1, -1], doc="From and to [tokens]: sentences with tokens between are marked.")

    _esm = SENTENCES
    _stylesheets = [SENTENCES_STYLE]


CHUNKS = """
export function render({ model, el }) {
  const list = document.createElement("ol")
  list.className = "chunks"
  list.addEventListener("click", (event) => {
    const at = event.target.closest("[data-start]")
    if (!at) return
    if (event.target.tagName === "BUTTON") model.wanted = Number(at.dataset.start)
    else model.chosen = Number(at.dataset.start) === model.chosen ? -1 : Number(at.dataset.start)
  })
  const mark = () => {
    for (const item of list.children) item.classList.toggle("chosen", Number(item.dataset.start) === model.chosen)
  }
  const fill = () => {
    list.replaceChildren(...model.chunks.map(({ start, head, share, text }) => {
      const item = document.createElement("li")
      item.dataset.start = start
      const top = document.createElement("div")
      top.className = "head"
      top.textContent = head
      const show = document.createElement("button")
      show.textContent = "show in the book"
      top.append(show)
      const bar = document.createElement("div")
      bar.className = "bar"
      bar.style.width = `${share}%`
      const words = document.createElement("div")
      words.className = "text"
      words.textContent = text
      item.append(top, bar, words)
      return item
    }))
    mark()
  }
  model.on("chunks", fill)
  model.on("chosen", mark)
  fill()
  el.append(list)
}
"""

CHUNKS_STYLE = """
.chunks { list-style: none; margin: 0; padding: 0; font: 13px/1.45 system-ui, sans-serif; color: #1b1f24; }
.chunks li { padding: 6px 8px; border-bottom: 1px solid #e3e7ec; cursor: pointer; }
.chunks li:hover { background: #f4f7fa; }
.chunks li.chosen { background: #e8eef6; }
.chunks .head { color: #49525c; display: flex; gap: 8px; }
.chunks .head button { margin-left: auto; border: 0; padding: 0; background: none; }
.chunks .head button { color: #1f5f9e; cursor: pointer; font: inherit; }
.chunks .bar { height: 5px; background: #1f77b4; margin: 3px 0; min-width: 1px; border-radius: 2px; }
.chunks .text { max-height: 4.4em; overflow: hidden; overflow-wrap: anywhere; }
.chunks li.chosen .text { max-height: none; white-space: pre-wrap; }
"""


class Chunks(JSComponent):
    """Chunks that were retrieved: one that is clicked is chosen, clicked again it is not."""

    chunks = param.List(doc="Of each: start [tokens], head (a line), share (of the greatest, %), text.")
    chosen = param.Integer(-1, doc="First token of the one that was clicked; -1: none.")
    wanted = param.Integer(-1, doc="First token of the one that is to be shown in the book; -1: none.")

    _esm = CHUNKS
    _stylesheets = [CHUNKS_STYLE]
