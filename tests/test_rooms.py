"""The rooms of the house: who may import whom, and that the `kernels/` folder shadows nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "elpo_fast"
LONGEST = 600  # lines of a file
BASE = {"types", "config", "lock", "faults", "own", "regions"}
ALGO = BASE | {"tree"}
ROLLOUT = ALGO | {"algo", "tools", "tasks"}
ALL = ROLLOUT | {"rollout", "model"}
MAY_IMPORT = {
    "types": set(),
    "config": set(),
    "regions": set(),
    "lock": {"config"},
    "own": {"config"},
    "faults": {"types"},
    "tree": set(),
    "algo": ALGO,
    "tools": BASE,
    "tasks": BASE,
    "cpu": set(),
    "rollout": ROLLOUT | {"cpu"},
    "model": ALGO | {"cpu"},
    "report": ALL | {"train", "eval"},
    "train": ALL | {"eval"},
    "eval": ALL,
    "cli": ALL | {"train", "eval", "report"},
}
# What each wheel holds. `elpo_kernels` finds its own packages, and nothing of its tools or tests.
KERNELS = ["elpo_kernels", "elpo_kernels.adapters", "elpo_kernels.attention"]
KERNELS += ["elpo_kernels.linear", "elpo_kernels.logits"]


def rooms_imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "elpo_fast":
                found.add(parts[1])
    return found


def test_every_room_is_known_and_distributed() -> None:
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert {name for name in entries if not name.startswith("__")} == set(MAY_IMPORT)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert set(listed) == {".".join(path.relative_to(ROOT).parts) for path in folders}


def test_the_kernels_wheel_holds_no_tools() -> None:
    source = ROOT / "kernels" / "src"
    folders = {path.parent for path in source.rglob("*.py")}
    assert sorted(".".join(path.relative_to(source).parts) for path in folders) == KERNELS
    assert all((folder / "__init__.py").exists() for folder in folders)
    assert (source / "elpo_kernels" / "py.typed").exists()
    assert not list(source.rglob("*test*")) and not list(source.rglob("aot*"))


def test_no_file_is_long() -> None:
    folders = (PACKAGE, ROOT / "kernels", ROOT / "bench", ROOT / "tests")
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert [path for path in files if len(path.read_text().splitlines()) > LONGEST] == []


def test_the_ladder_in_contributing_leads_from_the_command_to_the_kernel() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    stations = re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)` \|", text, re.MULTILINE)
    assert stations[0][1] == "_train" and stations[-1][1] == "powers_kernel"
    for (file, name), (_, following) in pairwise([*stations, stations[-1]]):
        source = (ROOT / file).read_text()
        assert f"def {name}(" in source and re.search(rf"\b{following}\b", source), file


def test_what_a_gpu_runs_imports_nothing_of_the_guest_wing() -> None:
    code = (
        "import sys, elpo_kernels, elpo_fast.train.loop, elpo_fast.model.load;"
        "import elpo_fast.rollout.local.engine, elpo_fast.rollout.sglang.engine;"
        "print(*(name for name in sys.modules if name.startswith('elpo_fast.cpu') or"
        " name == 'elpo_kernels.linear.cpu'))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        assert not rooms_imported(path)
        return
    allowed = MAY_IMPORT[room] | {room, "__version__"}
    assert rooms_imported(path) <= allowed


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels" / "src").rglob("*.py")), ids=lambda path: path.name
)
def test_kernels_do_not_know_the_trainer(path: Path) -> None:
    assert not rooms_imported(path)


def test_kernels_folder_shadows_no_package() -> None:
    code = (
        "import importlib.util, sys; spec = importlib.util.find_spec('kernels');"
        "print('none' if spec is None else spec.origin)"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == "none" or "site-packages" in found
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list(ROOT.glob("tests/**/__init__.py"))
    assert not {"", str(ROOT)} & set(sys.path), (
        "the repository root is on sys.path; run `pytest`, not `python -m pytest`"
    )


def test_light_commands_do_not_import_torch() -> None:
    code = (
        "import sys; from elpo_fast.cli import main; main(['config', 'configs/tiny.yaml']);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
