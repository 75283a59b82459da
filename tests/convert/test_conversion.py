"""Hugging Face -> Megatron -> Hugging Face: every number comes back, whatever the layout.

Layer: files in a temporary folder, one process. That Megatron itself loads the result at other
layouts, and that checkpoints of a run convert: tests/model/test_distributed_weights.py. What is
refused: tests/convert/test_refusals.py. The command lines: tests/tools/test_convert.py.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert.layout import hf_shapes
from megatron_sod.convert.megatron_files import MegatronTensors
from megatron_sod.convert.megatron_names import parameters, stored_at, whole_shape
from megatron_sod.convert.to_hf import convert_megatron_to_hf
from megatron_sod.convert.to_megatron import convert_hf_to_megatron
from megatron_sod.model.geometry import load_geometry
from tests.helpers.families import FAMILIES
from tests.helpers.tiny import write_model_with_weights

LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2_pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "tp4": ParallelConfig(tensor_model_parallel_size=4),
    "tp2_ep2": ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2),
}
CASES = [(f, n) for f in FAMILIES for n in LAYOUTS if "ep" not in n or f == "qwen3_moe"]
DTYPES = [torch.float32, torch.bfloat16]


def _tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def _same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for number, (family, config) in enumerate(FAMILIES.items()):
        write_model_with_weights(folder / family, seed=number, vocab_size=389, **config)
    return folder


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_hf_round_trip_is_bit_exact(models, tmp_path, family, layout):
    source = models / family
    report = convert_hf_to_megatron(source, tmp_path / "m", parallel=LAYOUTS[layout])
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "hf")
    _same(_tensors(source), _tensors(tmp_path / "hf"))
    assert report.values["num_identical"] == len(hf_shapes(load_geometry(source)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_survives(tmp_path, dtype):
    """Random bits: NaN with payloads, infinities, -0.0 and subnormals among them."""
    source = write_model_with_weights(tmp_path / "source", seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    random_bits = {
        name: torch.randint(0, 256, (*t.shape, t.element_size()), generator=generator)
        .to(torch.uint8)
        .view(dtype)
        .reshape(t.shape)
        for name, t in _tensors(source).items()
    }
    assert any(bool(t.isnan().any()) for t in random_bits.values())
    save_file(random_bits, source / "model.safetensors", metadata={"format": "pt"})
    convert_hf_to_megatron(source, tmp_path / "m", parallel=LAYOUTS["tp2_pp2"])
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "hf")
    _same(random_bits, _tensors(tmp_path / "hf"))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_every_tensor_once(models, family):
    geometry = load_geometry(models / family)
    names = list(parameters(geometry))
    places = [stored_at(name, geometry) for name in names]
    assert len(set(names)) == len(names) == len({(p.key, p.index) for p in places})
    total = sum(torch.Size(shape).numel() for shape in hf_shapes(geometry).values())
    padding = (-geometry.vocab_size) % 128 * geometry.hidden_size
    num_vocabularies = 1 if geometry.tied_embeddings else 2
    whole = sum(torch.Size(whole_shape(name, geometry)).numel() for name in names)
    assert whole == total + num_vocabularies * padding


def test_layers_and_experts_are_stacked_under_one_name(models):
    geometry = load_geometry(models / "qwen3_moe")
    place = stored_at("decoder.layers.2.mlp.experts.local_experts.5.linear_fc1.weight", geometry)
    assert place.key == "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert (place.index, place.stack) == ((2, 5), (4, 8))
    dense = stored_at("decoder.layers.3.pre_mlp_layernorm.weight", load_geometry(models / "qwen3"))
    assert dense.key == "decoder.layers.mlp.linear_fc1.layer_norm_weight"


def test_a_layouts_ranks_get_files_of_their_own(models, tmp_path):
    layout = LAYOUTS["tp2_ep2"]
    convert_hf_to_megatron(models / "qwen3_moe", tmp_path / "m", parallel=layout)
    metadata = MegatronTensors(tmp_path / "m")._reader.read_metadata()
    held: dict[str, set] = {}
    for index, place in metadata.storage_data.items():
        held.setdefault(place.relative_path, set()).add((index.fqn, tuple(index.offset)))
    assert sorted(held) == [f"__{n}_0.distcp" for n in range(4)]
    # ranks by (expert rank, tensor rank): rank 3 reads experts 4..7, and of 32 rows of gate and of
    # up the second 16
    fc1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    offsets = {offset[1:] for key, offset in held["__3_0.distcp"] if key == fc1}
    assert offsets == {(expert, row, 0) for expert in (4, 5, 6, 7) for row in (16, 48)}


@pytest.mark.parametrize(("tp", "rows"), [(1, 640), (2, 768), (4, 1024)])
def test_padded_vocabulary_rows_are_zero(tmp_path, tp, rows):
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    source = write_model_with_weights(
        tmp_path / "hf", seed=3, vocab_size=601, num_attention_heads=8, num_key_value_heads=4
    )
    convert_hf_to_megatron(source, tmp_path / "m", parallel=parallel)
    stored = MegatronTensors(tmp_path / "m")
    key = "embedding.word_embeddings.weight"
    assert stored._stored[key].size[0] == rows  # 601 rounded up to 128 x TP
    geometry = load_geometry(source)
    wide = type(geometry)(**{**geometry.__dict__, "vocab_size": rows})
    padding = torch.full((rows - geometry.vocab_size, 64), torch.nan)
    stored.fill(padding, key, wide, (geometry.vocab_size, 0))
    assert not padding.any()


@pytest.mark.parametrize("size", [40_000, 200_000])
def test_files_stay_below_the_shard_size_in_both_directions(models, tmp_path, size):
    largest = 389 * 64 * 4  # the embedding; alone when it is larger than a shard
    convert_hf_to_megatron(models / "qwen3", tmp_path / "m", max_shard_bytes=size)
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "hf", max_shard_bytes=size)
    for pattern, folder, overhead in (("*.distcp", "m", 512 * 128), ("*.safetensors", "hf", 8192)):
        files = list((tmp_path / folder).glob(pattern))
        assert len(files) > 3
        assert all(path.stat().st_size <= max(size, largest * 2) + overhead for path in files)
    _same(_tensors(models / "qwen3"), _tensors(tmp_path / "hf"))


def test_a_sharded_source_converts_like_a_single_file(models, tmp_path):
    convert_hf_to_megatron(models / "llama", tmp_path / "one")
    convert_megatron_to_hf(tmp_path / "one", tmp_path / "sharded", max_shard_bytes=50_000)
    assert (tmp_path / "sharded/model.safetensors.index.json").is_file()
    report = convert_hf_to_megatron(tmp_path / "sharded", tmp_path / "again")
    before = json.loads((tmp_path / "one/parity.json").read_text())
    assert report.values["tensors"] == before["tensors"]


def test_a_tied_head_stored_again_is_left_out_and_reported(models, tmp_path):
    """Published Qwen3 files hold lm_head.weight beside the embedding it is tied to."""
    source = write_model_with_weights(tmp_path / "source", seed=3)
    tensors = _tensors(source)
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, source / "model.safetensors")
    report = convert_hf_to_megatron(source, tmp_path / "m")
    assert report.values["left_out"] == ["lm_head.weight"] and "left out" in report.text()
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "hf")
    _same(tensors, _tensors(tmp_path / "hf"))


def test_side_files_travel_both_ways_unchanged(models, tmp_path):
    source = write_model_with_weights(tmp_path / "source", seed=3)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    convert_hf_to_megatron(source, tmp_path / "m")
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "hf")
    names = {p.name for p in source.iterdir() if p.suffix != ".safetensors"}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    for name in names:
        for folder in ("m", "hf"):
            assert (tmp_path / folder / name).read_bytes() == (source / name).read_bytes(), name


def test_a_chosen_dtype_rounds_once_and_is_named_in_the_configuration(models, tmp_path):
    convert_hf_to_megatron(models / "qwen3", tmp_path / "m", dtype=torch.bfloat16)
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "hf")
    _same({k: v.bfloat16() for k, v in _tensors(models / "qwen3").items()},
          _tensors(tmp_path / "hf"))  # fmt: skip
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_transformers_loads_the_result_and_computes_the_same(models, tmp_path):
    from transformers import AutoModelForCausalLM

    convert_hf_to_megatron(models / "qwen3_moe", tmp_path / "m")
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "hf")
    ids = torch.tensor([[5, 17, 300, 380, 9, 0, 44]])
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path)(ids).logits
            for path in (models / "qwen3_moe", tmp_path / "hf")
        )
    assert torch.equal(before, after) and bool(before.std() > 0.01)


def test_the_report_counts_and_checks_every_tensor(models, tmp_path):
    report = convert_hf_to_megatron(models / "qwen2", tmp_path / "m")
    written = json.loads((tmp_path / "m/parity.json").read_text())
    shapes = hf_shapes(load_geometry(models / "qwen2"))
    assert written == report.values and list(written["tensors"]) == list(shapes)
    assert written["num_parameters"] == sum(torch.Size(s).numel() for s in shapes.values())
    assert written["num_identical"] == written["num_tensors"] == len(shapes)
    import hashlib

    for name, tensor in _tensors(models / "qwen2").items():
        expected = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
        assert written["tensors"][name]["checksum"] == expected
    assert f"{len(shapes)} of {len(shapes)} tensors" in (tmp_path / "m/parity.txt").read_text()


def test_progress_reaches_the_end_and_never_goes_back(models, tmp_path):
    for convert, source, out in (
        (convert_hf_to_megatron, models / "qwen3", tmp_path / "m"),
        (convert_megatron_to_hf, tmp_path / "m", tmp_path / "hf"),
    ):
        seen: list[tuple[int, int]] = []
        convert(source, out, on_progress=lambda *values: seen.append(values))  # noqa: B023
        done = [d for d, _ in seen]
        assert len(seen) > 20 and done == sorted(done) and len({total for _, total in seen}) == 1
        assert done[-1] == seen[-1][1] and done[-2] > 0.7 * done[-1]  # the rest is padding
