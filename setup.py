"""Package metadata. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(
    r'__version__ = "([^"]+)"', (HERE / "megatron_rl" / "__init__.py").read_text(encoding="utf-8")
).group(1)

setup(
    name="megatron_rl",
    version=VERSION,
    description="Reinforcement learning of Mixture-of-Experts language models on Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The megatron_rl authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={
        "Method": "https://arxiv.org/abs/2510.23027",
        "Megatron-Core": "https://github.com/NVIDIA/Megatron-LM",
    },
    keywords=[
        *("reinforcement learning", "mixture of experts", "language models", "Megatron-Core"),
        *("RLVR", "GRPO", "RSPO", "router shift", "post-training"),
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_rl", "megatron_rl.*"]),
    package_data={"megatron_rl": ["**/README.md", "py.typed", "report/page_files/*"]},
    install_requires=[
        "torch>=2.9",  # grouped_mm on any device
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "pydantic>=2.8,<3",
        "pyyaml>=6",
        "rich>=13",
        "sentencepiece>=0.2",
        "transformers>=4.55",  # tokenizers only; weights are read from safetensors directly
        "safetensors>=0.4",
        "httpx>=0.27",  # to rollout servers
        "psutil>=5.9",  # Megatron's checkpoints need it and do not declare it
        "tensorboard>=2.14",
        "sympy>=1.12",
    ],
    # Apex, which Megatron-Core can use for fused kernels, is on no package index: build it from its
    # source. Nothing here needs it.
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.4"],  # CUDA only
        "vllm": ["vllm>=0.32"],  # better in an environment of its own: rollout.servers.python
        "wandb": ["wandb>=0.18"],
        "docs": ["pdoc>=15", "linkchecker>=10.5"],
        # Parquet, files packed with Zstandard, Hugging Face datasets
        "data": ["pyarrow>=15", "datasets>=4"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            *("mypy>=2", "types-psutil", "types-PyYAML"),
            "trl>=0.20",
            "pyarrow>=15",
            "datasets>=4",
        ],
    },
    entry_points={"console_scripts": ["megatron-rl = megatron_rl.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
