"""Run a notebook on this machine: ``demo.py NOTEBOOK FOLDER`` leaves a page and a picture, and tells what came out."""

from __future__ import annotations

import base64
import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter


def main(notebook: Path, folder: Path) -> int:
    """Return the exit status."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Jobs of its own: nothing is taken from earlier runs, and nothing is left in the user's data folder.
    os.environ["JUPYTER_HYBRID_HOME"] = str((folder / "data").absolute())
    os.environ.setdefault("HYBRID_SUPERVISOR_IDLE", "1")
    import jupyter_hybrid as hy
    from jupyter_hybrid.launch import reused_tasks

    pages = nbformat.read(notebook, as_version=4)
    start = time.monotonic()
    print(f"running {notebook} ...", flush=True)
    client = NotebookClient(pages, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}})
    failure = ""
    try:
        client.execute()
    except CellExecutionError as error:
        failure = str(error)
    seconds = time.monotonic() - start

    page = folder / f"{notebook.stem}.html"
    page.write_text(HTMLExporter().from_notebook_node(pages)[0])
    if failure:
        print(f"{failure}\nthe page so far: {page}", file=sys.stderr)
        return 1
    pictures = [
        output.data["image/png"]
        for cell in pages.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    if not pictures:
        print(f"{notebook} shows no picture", file=sys.stderr)
        return 1
    picture = folder / "histogram.png"
    picture.write_bytes(base64.b64decode(pictures[-1]))

    # As any later process would: from the Store and the run folders.
    arrays = [job for row in hy.jobs() if isinstance(job := hy.job(row["id"]), hy.ArrayJob)]
    reused = sum(reused_tasks(array.run) for array in arrays)
    largest = max(arrays, key=len)
    scores = largest.to_dataframe()["score"].compute()
    print(f"{len(arrays)} arrays on pool {largest.pool!r}: {sum(map(len, arrays)) - reused} tasks ran, {reused} reused")
    print(f"mean score of {len(scores)} tasks: {scores.mean():.4f}, standard deviation {scores.std():.4f}")
    print(f"notebook: {seconds:.0f} s")
    print(f"page: {page}\npicture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
