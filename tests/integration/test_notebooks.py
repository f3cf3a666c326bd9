"""The notebooks run, from beginning to end, and hold their outputs."""

from pathlib import Path

import pytest

from tests.integration.helpers import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_two() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["memory_in_ten_cells", "where_does_it_look"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_are_kept_and_small(file: Path) -> None:
    import json

    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10 or file.stem != "memory_in_ten_cells"
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell["outputs"] for cell in cells) and file.stat().st_size < 400_000
    told = "".join(str(output) for cell in cells for output in cell["outputs"])
    assert "image/png" in told and "stderr" not in told and "/work" not in told and "/home" not in told


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.delenv("MEMLONG_CACHE")  # the backbone is converted once
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
    texts = [o["text"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "text" in o]
    assert any("nats" in text for text in texts)
