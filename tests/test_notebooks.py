"""The notebooks of docs/ run unchanged, in an empty folder."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.name for path in (ROOT / "docs").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_in_an_empty_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    paths = [str(ROOT / "projects" / "SeMask"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # nothing here is large enough to share
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "docs" / name, as_version=4)
    work = tmp_path / "work"
    work.mkdir()
    place = {"metadata": {"path": str(work)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pages = [data["text/html"] for o in outputs if "text/html" in (data := o.get("data", {}))]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pages) == 1
    assert "mIoU" in pages[0]
    assert len(pictures) == 6  # panels, overlay, and the priors of four stages
    (results,) = (work / "output").rglob("sem_seg_evaluation.json")
    # Two of three classes have a colour of their own, so a model that learns is far above 33.
    assert json.loads(results.read_text())["results"]["mIoU"] > 60


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_file_is_small_and_clean(name: str) -> None:
    """No paths of a machine, no stored results."""
    path = ROOT / "docs" / name
    assert path.stat().st_size < 300_000
    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
