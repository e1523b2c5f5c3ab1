"""The import arrows of docs/architecture.md, and the packaging that keeps the rooms importable from anywhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from tests.goldens import ROOT

MAY_IMPORT = {
    "layers": set(),
    "tokenizers_vis": {"layers"},
    "heads": {"layers"},
    "generators": {"layers", "heads"},
    "sampling": {"layers", "heads", "generators"},
    "eval": set(),
    "data": set(),
    "training": {"layers", "tokenizers_vis", "heads", "generators", "sampling", "data"},
    "configs": set(),
}


def test_no_import_goes_against_an_arrow() -> None:
    graph = grimp.build_graph(*MAY_IMPORT, cache_dir=None)
    against = [
        f"{importer} imports {imported}"
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if (room := importer.split(".")[0]) != (other := imported.split(".")[0]) and other not in MAY_IMPORT[room]
    ]
    assert not against, "\n".join(sorted(against))


def test_the_check_sees_imports_that_are_there() -> None:
    graph = grimp.build_graph(*MAY_IMPORT, cache_dir=None)
    assert "layers.noise" in graph.find_modules_directly_imported_by("sampling.sampler")


def test_no_script_bears_the_name_of_a_package_in_use() -> None:
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    taken = set(MAY_IMPORT) | set(sys.stdlib_module_names)
    assert not scripts & taken
    for name in scripts:  # scripts/ comes first on the path of `python scripts/x.py`
        found = subprocess.run(
            [sys.executable, "-c", f"import importlib.util as u; print(u.find_spec({name!r}) is None)"],
            cwd=ROOT / "docs",
            capture_output=True,
            text=True,
        )
        assert found.stdout.strip() == "True", f"scripts/{name}.py hides an installed module of that name"


def test_no_room_is_called_utils() -> None:
    found = [path for room in MAY_IMPORT for path in (ROOT / room).rglob("util*")]
    assert not found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A non-editable install of a copy of the sources, in a folder of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for room in MAY_IMPORT:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", target, source], check=True)
    return target


def test_an_install_holds_every_room_under_the_distribution_alone(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, importlib.metadata as m, json, sys; owners = m.packages_distributions(); "
        "print(json.dumps({r: [importlib.import_module(r).__file__, owners.get(r)] for r in sys.argv[1:]}))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, *MAY_IMPORT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    for room, (file, owners) in json.loads(answer.stdout).items():
        assert Path(file).is_relative_to(installed), f"{room} is imported from {file}"
        assert set(owners) == {"arloom"}, f"{room} belongs to {owners}"
    assert list((installed / "configs").rglob("*.yaml")), "the configurations are not installed"
    assert not (installed / "tests").exists()


def test_every_config_of_the_repository_is_installed(installed: Path) -> None:
    ours = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert ours == {path.relative_to(installed) for path in (installed / "configs").rglob("*.yaml")}
