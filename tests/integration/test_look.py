"""``memlong look``: what is named, what is opened, what is refused; the page itself, over HTTP and in a browser."""

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest

import lightning_memlong.look.command as command
from lightning_memlong.__main__ import main as memlong
from lightning_memlong.cli.main import main as run
from lightning_memlong.look import Looker
from lightning_memlong.look.address import free_port
from tests.integration.helpers import ROOT, tiny, without_capacity


@pytest.fixture
def book(text_folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    words = " ".join(f.read_text() for f in sorted(text_folder.glob("*.txt"))).split()
    file.write_text(". ".join(" ".join(words[i : i + 9]) for i in range(0, 540, 9)))
    return file


@pytest.fixture
def options(byte_backbone: Path, book: Path, tmp_path: Path) -> list[str]:
    """Without the text, which is named."""
    small = without_capacity(tiny(byte_backbone, book, tmp_path / "runs"))
    at = small.index("--data.path")
    return [*small[:at], *small[at + 2 :], "--context", "192"]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be shown, without panel."""
    found: list[dict[str, Any]] = []

    def serve(looker: Looker, name: str, window: int, options: Any, port: int, open_browser: bool) -> None:
        found.append({"looker": looker, "name": name, "window": window, "options": options, "port": port,
                      "open": open_browser})  # fmt: skip

    monkeypatch.setitem(sys.modules, "lightning_memlong.look.server", SimpleNamespace(serve=serve))
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    return found


def test_a_text_is_read_and_its_bank_shown_alone(
    options: list[str], book: Path, tmp_path: Path, served: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "book.safetensors"
    assert command.main([str(book), *options, "--bank", str(bank), "--port", "0", "--open_browser", "false"]) == 0
    first = served[0]
    assert first["name"] == "book.txt" and first["window"] == 64 and first["port"] > 0 and not first["open"]
    assert first["options"] == {"max_new_tokens": 200}
    text = first["looker"].book.text(0, len(first["looker"].book))
    assert text == book.read_text() and first["looker"].context == 192
    assert command.main([str(bank), *options, "--port", "0", "--max_new_tokens", "7"]) == 0
    again = served[1]["looker"]
    assert served[1]["name"] == "book.safetensors" and served[1]["options"] == {"max_new_tokens": 7}
    assert again.book.text(0, len(again.book)) == text and again.look(600, 640).chunks == (
        first["looker"].look(600, 640).chunks
    )
    capfd.readouterr()
    refused = [str(bank), *options, "--memory.retriever.name", "bm25"]
    assert command.main(refused) == 2
    assert "retriever is 'hashing' there and 'bm25' here" in capfd.readouterr().err


@pytest.mark.long
def test_a_run_is_shown_with_its_own_settings(
    options: list[str], book: Path, text_folder: Path, tmp_path: Path, served: list[dict[str, Any]]
) -> None:
    fit = [*options[:-2], "--data.path", str(text_folder), "--memory.top_k", "2", "--trainer.limit_val_batches", "0"]
    assert run(["fit", *fit, "--validate_first", "false"]) == 0
    folder = next((tmp_path / "runs" / "memlong").iterdir())
    for named in (folder, folder / "checkpoints" / "last.ckpt"):
        assert command.main([str(named), "--text", str(book), "--port", "0", "--context", "192"]) == 0
    looker = served[1]["looker"]
    assert looker.model.long_context.config.top_k == 2 and looker.memory.chunk_size == 16
    assert looker.model.memory_layer == 1 and len(looker.look(600, 640).chunks) == 2


def test_mistakes_are_told_in_a_line(
    options: list[str], book: Path, tmp_path: Path, served: list[dict[str, Any]], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, words in (
            ([str(tmp_path / "nothing.txt")], "nothing.txt' cannot be used. Allowed: a run folder"),
            ([str(run_folder)], "Fix: add --text book.txt"),
            ([str(book), *options, "--text", str(book)], "Allowed: one text"),
            ([str(exported), "--text", str(book)], f"give --model.backbone {exported}"),
            ([str(run_folder), "--text", str(book)], "has a checkpoint"),
            ([str(book), *options, "--port", str(port)], f"port={port} cannot be used"),
            ([str(book), *options, "--port", "70000"], "port=70000 cannot be used"),
            ([*options, "--bank", str(tmp_path / "none.safetensors")], "bank='"),
            (options, "data.path=None"),
        ):
            assert command.main(arguments) == 2, words
            told = capfd.readouterr().err
            assert words in told and "Traceback" not in told
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main([str(book), *options]) == 2
    assert "pip install 'lightning-memlong[look]'" in capfd.readouterr().err
    assert not served


@pytest.mark.long
def test_the_commands_of_the_page_about_it_run(
    options: list[str], book: Path, tmp_path: Path, served: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "tutorials" / "look.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("memlong look ")]
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    for command_line in commands:
        words = shlex.split(command_line.replace("path/to/book.txt", str(book)))
        assert memlong([*words[1:], *options, "--port", "0"]) == 0
    first, second = (shown["looker"].book for shown in served)
    assert first.ids(0, len(first)) == second.ids(0, len(second)) and (tmp_path / "book.safetensors").exists()


# ---- with panel: what a page does, what it loads, and a browser ------------------------------------------------


@pytest.fixture
def address(options: list[str], book: Path) -> Iterator[str]:
    """A page that is served by a process of its own."""
    pytest.importorskip("panel")
    port = free_port(0)
    words = [sys.executable, "-m", "lightning_memlong.look", str(book), *options, "--port", str(port),
             "--open_browser", "false", "--max_new_tokens", "20"]  # fmt: skip
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = process.stdout.readline()
    assert f"http://127.0.0.1:{port}/look" in told, told
    yield f"http://127.0.0.1:{port}/look"
    process.send_signal(2)
    assert process.wait(60) in (0, 130)


@pytest.mark.long
def test_the_page_needs_nothing_from_elsewhere(address: str) -> None:
    page = urlopen(address).read().decode()
    assert "memlong look: book.txt" in page
    assert "https://" not in page and page.count("http://") == page.count("http://127.0.0.1")
    mine = socket.gethostbyname_ex(socket.gethostname())[2]
    for other in [ip for ip in mine if not ip.startswith("127.")]:
        with pytest.raises(OSError):
            socket.create_connection((other, int(address.split(":")[2].split("/")[0])), timeout=2)


@pytest.mark.long
def test_clicks_are_answered(options: list[str], book: Path, served: list[dict[str, Any]]) -> None:
    """The page's own objects, without a browser."""
    pytest.importorskip("panel")
    import asyncio

    from lightning_memlong.look.page import Page

    assert command.main([str(book), *options, "--port", "0", "--max_new_tokens", "20"]) == 0
    shown = served[0]

    async def use() -> Page:
        page = Page(shown["looker"], shown["name"], shown["window"], shown["options"])
        page.view()
        page.number.value = 3
        assert page.sentences.sentences[0][0] == 1024
        start, end, text = page.sentences.sentences[3]
        page.sentences.chosen = start
        while not page.sight.list.chunks:
            await asyncio.sleep(0.05)
        sight = shown["looker"].look(start, end)
        assert "perplexity" in page.tokens.object and page.strip.object.count("<rect") == 2 + len(sight.chunks)
        assert {c["start"] for c in page.sight.list.chunks} == {c.start for c in sight.chunks}
        assert page.sight.list.chunks[0]["share"] == 100 and "before" in page.sight.list.chunks[0]["head"]
        whole = page.sight.heads.object
        page.sight.list.chosen = sight.chunks[1].start
        assert page.sight.heads.object is not whole and f"{sight.chunks[1].start:,}" in page.sight.title.object
        page.sight.list.wanted = sight.chunks[0].start
        assert page.sentences.marked[0] == sight.chunks[0].start == page.sentences.marked[1] - 16
        assert page.number.value == shown["looker"].book.page_of(sight.chunks[0].start) + 1
        page.asked.value_input = "kan lor"
        page.ask.clicks += 1
        while not page.map.object:
            await asyncio.sleep(0.05)
        while page.ask.disabled:
            await asyncio.sleep(0.05)
        assert page.answer.object and page.written.list.chunks and not page.trouble.visible
        page.asked.value_input = "kan lor " * 100
        page.ask.clicks += 1
        while not page.trouble.visible:
            await asyncio.sleep(0.05)
        assert "prompt=" in page.trouble.object
        return page

    asyncio.run(asyncio.wait_for(use(), 120))


@pytest.mark.long
def test_in_a_browser(address: str) -> None:
    browsing = pytest.importorskip("playwright.sync_api")
    with browsing.sync_playwright() as playwright:
        browser = _chromium(playwright)
        page = browser.new_page()
        asked: list[str] = []
        troubles: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(address)
        number = page.locator("input").first
        number.fill("3")
        number.press("Enter")
        page.locator(".sentences span[data-start='1024']").wait_for()
        page.locator(".sentences span").nth(3).click()
        page.locator(".chunks li").first.wait_for(timeout=60_000)
        assert page.locator(".token").count() > 5 and page.locator(".chunks li").count() == 3
        page.locator(".chunks li button").first.click()
        page.locator(".sentences span.marked").first.wait_for()
        page.get_by_text("Ask", exact=True).first.click()
        page.get_by_placeholder("Ask about the book").fill("kan lor")
        page.get_by_role("button", name="Ask").click()
        page.locator(".answer").wait_for(timeout=60_000)
        deadline = time.monotonic() + 60
        while page.locator(".chunks li:visible").count() < 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert page.locator(".chunks li:visible").count() >= 1
        here = (address.removesuffix("look"), "data:", "blob:")
        assert not troubles and not [url for url in asked if not url.startswith(here)]
        browser.close()


def _chromium(playwright: Any) -> Any:
    """Playwright's own Chromium, or the system's."""
    system = next((p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).exists()), None)
    for path in (None, system):
        try:
            return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Exception as error:  # of its own kind, which is not importable before it is installed
            problem = error
    pytest.skip(f"no Chromium: {str(problem).splitlines()[0]}")
