"""What is built and installed: files, metadata, what an import costs, the console script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("dask", "distributed", "pandas", "numpy", "pyarrow", "jupyter_server", "IPython", "ipywidgets", "yaml")


def run(*argv: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE"))}
    done = subprocess.run([*map(str, argv)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist; the wheel is built from the sdist, which so proves complete."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder, cwd=ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(path for path in folder.iterdir() if path.is_dir())
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=source)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python),
        *("install", "--quiet", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    # Its own site-packages come first; the editable install's finder is not followed from a plain path.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "jupyter_hybrid").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "labextension" not in path.parts
    }
    tracked = set(run("git", "ls-files", "jupyter_hybrid", cwd=ROOT).split()) if (ROOT / ".git").exists() else sources
    packed = {name for name in names if not name.split("/")[0].endswith((".dist-info", ".data"))}
    assert "jupyter_hybrid/py.typed" in packed
    assert tracked & sources <= packed <= sources
    assert not [name for name in names if "__pycache__" in name]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_no_path_of_the_build_machine(wheel: Path, dist: Path) -> None:
    paths = [str(place).encode() for place in (ROOT, dist, Path.home()) if len(place.parts) > 2]
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            found = [path for path in paths if path in archive.read(name)]
            assert not found, f"{name} names {found}"


def test_the_sdist_has_tests_and_documents(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml", "tests/conftest.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "demo/", "dist/"))]


def test_the_installed_package_is_the_wheel(installed: Path) -> None:
    code = "import jupyter_hybrid as hy; print(hy.__file__); print(hy.__version__)"
    file, version = run(installed / "bin/python", "-c", code, cwd=installed).split()
    assert Path(file).is_relative_to(installed)
    code = "from importlib.metadata import metadata; print(metadata('jupyter_hybrid')['Version'])"
    assert run(installed / "bin/python", "-c", code, cwd=installed).strip() == version


def test_an_import_loads_nothing_heavy(installed: Path) -> None:
    code = f"import sys, json, jupyter_hybrid; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert json.loads(run(installed / "bin/python", "-c", code, cwd=installed)) == []


def test_every_public_name_is_there(installed: Path) -> None:
    code = "import jupyter_hybrid as hy; print(*(name for name in hy.__all__ if getattr(hy, name) is None))"
    assert run(installed / "bin/python", "-c", code, cwd=installed).split() == []


def test_the_console_script_runs(installed: Path) -> None:
    script = installed / "bin" / "jupyter-hybrid"
    assert "doctor" in run(script, "--help", cwd=installed)
    rows = json.loads(run(script, "pools", "--json", cwd=installed))
    assert "local" in {row["name"] for row in rows}


def test_functions_run_from_the_installed_package(installed: Path) -> None:
    code = "import jupyter_hybrid as hy; print(hy.Executor('local').submit(pow, 2, 10).result(120))"
    assert run(installed / "bin/python", "-c", code, cwd=installed).strip() == "1024"
