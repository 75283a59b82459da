"""The documentation tells the truth: commands parse and run, links lead somewhere, keys exist.

Layers: text -> argument parsers and the schema -> every command in a fresh clone (slow).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sod.config.load import load_config, load_sft_config
from megatron_sod.config.reference import keys
from megatron_sod.config.schema import SftConfig, SodConfig
from tests.docs.pages import ROOT, Block, anchors, blocks, is_known, links, pages

BLOCKS = blocks()
KEYS = {key.path for schema in (SodConfig, SftConfig) for key in keys(schema)}
SECTIONS = {path.split(".")[0] for path in KEYS if "." in path}


def _name(block: Block) -> str:
    return f"{block.page}:{block.commands[0][:40] if block.commands else ''}"


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_is_dead(page):
    dead = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_names_a_key_the_schema_lacks(page):
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[=:][^`]*)?`", page.read_text())
    meant = {name for name in named if name.split(".")[0] in SECTIONS}
    files = {name for name in meant if (ROOT / name).exists() or name.endswith((".py", ".md"))}
    groups = {path.rsplit(".", depth)[0] for path in KEYS for depth in (1, 2)}
    assert meant - files - KEYS - groups == set()


@pytest.mark.parametrize("block", BLOCKS, ids=_name)
def test_commands_parse(block):
    assert is_known(block.mark), f"unknown mark {block.mark!r}"
    subprocess.run(["bash", "-n"], input=block.body, text=True, check=True, timeout=10)


@pytest.mark.parametrize("block", BLOCKS, ids=_name)
def test_commands_name_tools_targets_configs_and_keys_that_exist(block):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in block.commands:
        words = [word for word in shlex.split(command) if "=" not in word or "." in word]
        if words and words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, command
        for word in words:
            if word.startswith(("tools/", "docker/", "configs/", "tests/")) and "FILE" not in word:
                assert (ROOT / word.split("::")[0]).exists(), f"{word} in: {command}"
        if block.mark != "example" and "tools/train_" in command and "--config" in words:
            _check_overrides(words)


def _check_overrides(words: list[str]) -> None:
    config = words[words.index("--config") + 1]
    if "FILE" in config:
        return
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    load = load_sft_config if any("train_sft" in word for word in words) else load_config
    load(str(ROOT / config), overrides)


def test_pages_that_teach_have_commands():
    assert any(block.page == "README.md" and not block.mark for block in BLOCKS)


@pytest.fixture
def installed_from_here():
    """Targets that depend on `setup` install the clone; this puts the environment back."""
    yield
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--editable", ROOT], check=True, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_runs_in_a_fresh_clone(tmp_path, installed_from_here):
    """In page order, README first; one clone, as a reader would have."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True, timeout=120)
    (clone / ".venv").symlink_to(Path(sys.prefix))
    for library in (ROOT / "megatron_sod" / "ops").glob("_sod_*.so"):
        (clone / "megatron_sod" / "ops" / library.name).write_bytes(library.read_bytes())
    environment = {
        **os.environ,
        "PYTHONPATH": str(clone),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    failed = []
    for block in BLOCKS:
        if block.mark:
            continue
        for command in block.commands:
            if command.startswith(("make setup", "make test", "git clone", "cd ")):
                continue  # what runs this test; the others would run it again
            run = subprocess.run(
                command,
                shell=True,
                cwd=clone,
                env=environment,
                capture_output=True,
                text=True,
                timeout=1500,
            )
            if run.returncode:
                failed.append(f"{block.page}: {command}\n{run.stdout[-800:]}{run.stderr[-800:]}")
    assert not failed, "\n\n".join(failed)
