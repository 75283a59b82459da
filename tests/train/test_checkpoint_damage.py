"""A damaged, foreign or half-written checkpoint gives one error that names it, and costs nothing.

Layers: files in a temporary folder (pure), then one gloo rank with real checkpoints.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_sod.errors import CheckpointError
from megatron_sod.train import checkpoint_files as files
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folders = [tmp_path / name for name in ("iter_000001", "iter_000002")]
    for folder in folders:
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(bytes(range(256)) * 40)
        (folder / "metadata.json").write_text("{}")
        files.write_json(folder / files.ABOUT, {"format": files.FORMAT, "format_version": 1})
        files.write_checksums(folder, {})
    return folders[1]


def test_an_intact_checkpoint_passes(checkpoint):
    files.verify_files(checkpoint)
    assert files.read_about(checkpoint)["format_version"] == 1


def test_every_file_is_checked_by_exactly_one_of_several_ranks(checkpoint):
    names = sorted(json.loads((checkpoint / files.CHECKSUMS).read_text()))
    assert len(names) == 3
    for part, name in enumerate(names):
        (checkpoint / name).rename(checkpoint / "away")
        for other in range(3):
            if other != part:
                files.verify_files(checkpoint, part=other, num_parts=3)
        with pytest.raises(CheckpointError, match=name):
            files.verify_files(checkpoint, part=part, num_parts=3)
        (checkpoint / "away").rename(checkpoint / name)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, r"__0_0\.distcp: 10239 bytes, 10240 were written"),
        (_flip_a_bit, r"__0_0\.distcp: its content is not what was written"),
        (Path.unlink, r"__0_0\.distcp: missing"),
    ],
)
def test_damage_is_named_with_the_checkpoint_to_use_instead(checkpoint, damage, says):
    damage(checkpoint / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=says) as caught:
        files.verify_files(checkpoint)
    assert f"train.resume={checkpoint.parent / 'iter_000001'}" in str(caught.value)


def test_a_checkpoint_of_another_program_or_a_later_format_is_refused(checkpoint):
    (checkpoint / files.ABOUT).unlink()
    with pytest.raises(CheckpointError, match="written by another program"):
        files.read_about(checkpoint)
    files.write_json(checkpoint / files.ABOUT, {"format": files.FORMAT, "format_version": 99})
    with pytest.raises(CheckpointError, match="use the release that wrote it"):
        files.read_about(checkpoint)
    (checkpoint / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        files.read_about(checkpoint)


def test_a_marker_without_its_folder_lists_what_is_there(checkpoint):
    files.mark(checkpoint.parent, files.LATEST, checkpoint)
    assert files.marked(checkpoint.parent, files.LATEST) == checkpoint
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match=r"complete checkpoints: iter_000001\)"):
        files.marked(checkpoint.parent, files.LATEST)


def test_the_best_and_newer_checkpoints_outlive_the_last_n(tmp_path):
    for iteration in range(1, 7):
        (tmp_path / files.folder_name(iteration)).mkdir()
    files.mark(tmp_path, files.BEST, tmp_path / "iter_000001")
    files.delete_old(tmp_path, tmp_path / "iter_000005", keep_last=2)
    kept = [files.iteration_of(path) for path in files.complete_checkpoints(tmp_path)]
    assert kept == [1, 4, 5, 6]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    model = write_model_with_weights(folder / "model", seed=6)
    other = write_model_with_weights(folder / "other", seed=6, num_hidden_layers=3)
    return run_on_ranks(2, _mishaps, str(model), str(other), str(folder / "checkpoints"))


@pytest.mark.dist
def test_a_write_that_fails_on_one_rank_is_one_error_on_all_and_keeps_the_previous(outcome):
    for rank in outcome:
        assert "iter_000002 could not be written: rank 1:" in rank["write_failed"]
        assert "File too large" in rank["write_failed"]
        assert "iter_000001 is complete" in rank["write_failed"]
        assert rank["after_failure"] == ["iter_000001", "latest"]


@pytest.mark.dist
def test_a_killed_save_leaves_the_previous_valid_and_is_cleared_by_the_next(outcome):
    for rank in outcome:
        assert rank["latest_beside_partial"] == "iter_000001"
        assert rank["after_next"] == ["iter_000001", "iter_000003", "latest"]


@pytest.mark.dist
def test_a_truncated_file_is_refused_on_every_rank_with_the_remedy(outcome):
    for rank in outcome:
        assert "the file was cut short or replaced" in rank["truncated"]
        assert "train.resume=" in rank["truncated"] and "iter_000001" in rank["truncated"]
        assert rank["resumed_from_remedy"] == (1, "iter_000001")


@pytest.mark.dist
def test_a_checkpoint_of_another_model_is_refused_by_what_differs(outcome):
    for rank in outcome:
        assert "num_layers 2 (checkpoint), 3 (student.path)" in rank["other_model"]


def _mishaps(model_dir: str, other_dir: str, folder: str) -> dict:
    import resource

    import torch.distributed as dist

    from megatron_sod.train.checkpoint import Checkpoints, Progress
    from tests.train.test_checkpoint import _trainable

    def names() -> list[str]:
        dist.barrier()
        found = sorted(path.name for path in Path(folder).iterdir())
        dist.barrier()
        return found

    def save(number: int) -> str:
        try:
            checkpoints.save(trainable, Progress(number, 0, 0, 0, ""))
            checkpoints.finish()
        except CheckpointError as error:
            return str(error)
        return ""

    result: dict = {}
    trainable, loss_fn, batches = _trainable(model_dir)
    trainable.step(batches[:1], loss_fn)
    checkpoints = Checkpoints(folder, keep_last=2)
    assert save(1) == ""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a full disk, on one rank
    result["write_failed"] = save(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    result["after_failure"] = names()
    if dist.get_rank() == 0:
        (Path(folder) / "iter_000002.partial").mkdir()
    dist.barrier()
    result["latest_beside_partial"] = checkpoints.latest().name
    assert save(3) == ""
    result["after_next"] = names()
    if dist.get_rank() == 0:
        _cut(Path(folder) / "iter_000003" / "__1_0.distcp")
    dist.barrier()
    result["truncated"] = _refusal(checkpoints, trainable)
    progress = checkpoints.load(trainable, Path(folder) / "iter_000001")
    dist.barrier()
    result["resumed_from_remedy"] = (progress.iteration, checkpoints.latest().name)
    other, _, _ = _trainable(other_dir, initialise=False)
    result["other_model"] = _refusal(checkpoints, other)
    return result


def _refusal(checkpoints, trainable) -> str:
    try:
        checkpoints.load(trainable, checkpoints.latest())
    except CheckpointError as error:
        return str(error)
    return ""
