"""The machines of a job, and the two models: where they lie and how they are split."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sod.config.sections.section import Section

DType = Literal["float32", "bfloat16", "float64"]
GpuName = Literal["a100-80gb", "h100-80gb", "h200-141gb", "h20-96gb", "b200-180gb", "cpu"]


class ClusterConfig(Section):
    num_nodes: int = Field(1, gt=0, description="machines in the job")
    gpus_per_node: int = Field(1, gt=0, description="trainer ranks per machine")
    gpu: GpuName = Field("h100-80gb", description="what --dry-run plans memory and times for")

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


class ParallelConfig(Section):
    tensor_model_parallel_size: int = Field(1, gt=0, description="ranks each layer is split over")
    pipeline_model_parallel_size: int = Field(
        1, gt=0, description="stages the layers are split into"
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, gt=1, description="model chunks per pipeline rank (interleaved schedule)"
    )
    context_parallel_size: int = Field(1, gt=0, description="ranks each sequence is split over")
    expert_model_parallel_size: int = Field(
        1, gt=0, description="ranks the experts are split over (MoE)"
    )
    expert_tensor_parallel_size: int | None = Field(
        None, gt=0, description="split of each expert; null: as tensor_model_parallel_size"
    )
    sequence_parallel: bool = Field(
        False, description="split activations between layers over the tensor-parallel ranks"
    )

    @property
    def expert_tp_size(self) -> int:
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )


class ModelConfig(Section):
    path: str = Field(description="directory in Hugging Face format")
    geometry: str | None = Field(
        None,
        description="for --dry-run where `path` does not exist yet: a name in configs/models, or "
        "another directory; null: the last component of `path`, lower case",
    )
    dtype: DType = Field(
        "float32",
        description="parameters and computation; on GPUs bfloat16, which alone gets "
        "Transformer-Engine's layers; float64 on CPU only",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations made again in the backward pass: of attention, or of whole layers",
    )
    parallel: ParallelConfig = ParallelConfig()


class TeacherConfig(ModelConfig):
    source: Literal["model", "self"] = Field(
        "model",
        description="self: a frozen copy of the student's initial weights; every other key of this "
        "section then defaults to the student's",
    )
    privileged: Literal["none", "answer", "hint"] = Field(
        "none", description="what the teacher reads beside the task; its rows stay the student's"
    )
    max_privileged_length: int = Field(
        512, gt=0, description="tokens the privileged prompt may be longer; the text is cut to fit"
    )
    param_offload: bool = Field(
        False, description="waits in host memory while it does not score; its output head stays"
    )
    allow_template_mismatch: bool = Field(
        False, description="accept a teacher whose chat template or thinking mode differs"
    )
