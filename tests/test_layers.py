"""Imports point one way, and heavy packages appear only where they are named.

Layers: `ast` over every module (nothing is imported), then two subprocesses in which the heavy
packages cannot be imported. What each module does is left to its own test.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_sod"
SIDE = 3

# Level of each folder or module; the longest matching name counts. A module may import its own
# level and lower ones. Level 1 is pure: torch, and nothing that needs a process group or a server.
LEVELS = {
    "errors": 0,
    "types": 0,
    "config": 0,
    "algorithm": 1,
    "convert": 1,
    "eval.metrics": 1,
    "reshard.layouts": 1,
    "reshard.plan": 1,
    "ops": 2,
    "parallel": 2,
    "model": 2,
    "model.geometry": 1,  # sizes read out of config.json, plain Python without torch
    "data": SIDE,
    "rollout": SIDE,
    "sandbox": SIDE,
    "scoring": SIDE,
    "train": SIDE,
    "reshard": SIDE,
    "eval": SIDE,
    "observe": SIDE,
    "plan": 4,
    "session": 4,
    "inputs": 4,
    "collapse": 5,
    "held_out": 5,
    "journal": 5,
    "pipeline": 5,
    "command_line": 5,
}
# Deliberate exceptions, (importer, imported):
EXCEPTIONS = {
    # The type of a parameter, under TYPE_CHECKING; nothing is imported when the program runs.
    ("train.update", "session"),
}
# Folders of one level form a chain of their own: each may import those before it.
SIDE_ORDER = ("sandbox", "observe", "data", "train", "scoring", "reshard", "rollout", "eval")

HEAVY = {
    "ray": ("rollout.controller", "rollout.engine_actor", "rollout.fleet", "rollout.ray_instance"),
    "vllm": ("rollout.engine", "reshard.vllm_"),
    "megatron": (
        "parallel.",
        "model.",
        "train.",
        "scoring.",
        "reshard.",
        "session",
        "pipeline",
    ),
    "transformer_engine": ("model.",),
    "apex": (),
}
# Modules of the folders allowed above that must stay importable without Megatron all the same.
LIGHT = (
    "model.geometry",
    "model.parity",
    "reshard.layouts",
    "reshard.plan",
    "scoring.credit",
    "scoring.screen",
)


def _modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = _modules()


@cache
def _imports(name: str) -> frozenset[str]:
    """Absolute dotted names imported anywhere in the module, inside functions too."""
    path = MODULES[name]
    here = ["megatron_sod", *name.split(".")] if name else ["megatron_sod"]
    package = here if path.name == "__init__.py" else here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, node.module] if node.module else up)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _internal(name: str) -> set[str]:
    """Modules of this package that `name` imports, without the package's own prefix."""
    inside = {i.removeprefix("megatron_sod.") for i in _imports(name) if i.startswith("megatron_")}
    return {target for target in inside if target in MODULES and target not in ("", name)}


def _level(name: str) -> int:
    matches = [key for key in LEVELS if name == key or name.startswith(key + ".")]
    assert matches, f"{name}: give the new module a level in {Path(__file__).name}"
    return LEVELS[max(matches, key=len)]


def _folder(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_module_imports_its_own_level_or_lower(name):
    upward = {
        target
        for target in _internal(name)
        if _level(target) > _level(name) and (name, target) not in EXCEPTIONS
    }
    assert not upward, f"{name} (level {_level(name)}) imports upward: {sorted(upward)}"


@pytest.mark.parametrize("name", [n for n in MODULES if n and _level(n) == SIDE])
def test_folders_of_one_level_import_in_one_order(name):
    position = SIDE_ORDER.index(_folder(name))
    for target in _internal(name):
        if _level(target) == SIDE and (name, target) not in EXCEPTIONS:
            assert SIDE_ORDER.index(_folder(target)) <= position, f"{name} imports {target}"


def test_every_exception_is_still_needed():
    for name, target in EXCEPTIONS:
        assert target in _internal(name), f"{name} no longer imports {target}: drop the exception"


def test_no_module_level_cycle_exists():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path, name])}"
        if name not in done:
            for target in _internal(name):
                if (name, target) != ("train.update", "session") and target != _folder(name):
                    visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
    assert done == set(MODULES)


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_only_where_they_are_named(package):
    users = {
        name
        for name in MODULES
        if any(i == package or i.startswith(package + ".") for i in _imports(name))
    }
    allowed = HEAVY[package]
    strangers = {
        name for name in users if name in LIGHT or not any(name.startswith(a) for a in allowed)
    }
    assert not strangers, f"{package} is imported in {sorted(strangers)}"
    assert users or package in ("transformer_engine", "apex"), f"nothing imports {package} any more"


def test_type_checking_imports_are_the_only_use_of_the_session_below_it():
    tree = ast.parse(MODULES["train.update"].read_text())
    guarded = [
        ast.dump(node)
        for branch in tree.body
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in branch.body
    ]
    loose = [ast.dump(node) for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert any("megatron_sod.session" in text for text in guarded)
    assert not any("megatron_sod.session" in text for text in loose)


BLOCKER = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"vllm", "ray", "megatron", "transformer_engine", "apex"}:
            raise ModuleNotFoundError(f"{name} is blocked by this test", name=name)
sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(name)
try:
    import megatron.core
except ModuleNotFoundError:
    print("imported", len(sys.argv) - 1)
"""


def _import_without_heavy_packages(*names: str, blocker: str = BLOCKER) -> str:
    done = subprocess.run(
        [sys.executable, "-c", blocker, *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_and_its_algorithm_import_without_heavy_packages():
    assert _import_without_heavy_packages("megatron_sod", "megatron_sod.algorithm") == "imported 2"


def test_everything_but_the_trainer_imports_without_heavy_packages():
    names = [
        f"megatron_sod.{name}"
        for name in MODULES
        if name
        and not name.startswith(("parallel.", "train.", "reshard."))
        and not name.startswith(("scoring.score", "scoring.teacher", "scoring.logits_parity"))
        and not name.startswith("scoring.certificate")
        and (name in LIGHT or not name.startswith("model."))
        and not name.startswith(HEAVY["ray"])
        and not name.startswith(("session", "collapse", "pipeline"))
        and name not in ("held_out", "journal", "inputs")
        and not name.startswith(("sandbox.guest", "ops.compiled"))
    ]
    assert "megatron_sod.rollout.agent_loop" in names and "megatron_sod.rollout.engine" in names
    assert _import_without_heavy_packages(*names) == f"imported {len(names)}"


def test_a_replay_needs_neither_ray_nor_vllm():
    """The training loop of recorded rollouts: all that a machine without them can run."""
    trainer_allowed = BLOCKER.replace('"megatron", ', "").replace("megatron.core", "vllm")
    done = _import_without_heavy_packages("megatron_sod.pipeline", blocker=trainer_allowed)
    assert done == "imported 1"
