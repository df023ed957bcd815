"""Installs the library and its file readers; all else runs from the checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "sa_plugin" / "__init__.py").read_text())[1]

# Each has the lowest version that its part was run with, and .ci/lowest repeats that, from these
# lines, for the library, the metrics and the adapters; accelerate, diffusers, distributed, furo and
# jax were run with newer ones alone. The newest that all tests were run with: torch 2.14.1,
# torchvision 0.29.1, numpy 2.4.6, scipy 1.17.1.
METRICS = ["scipy>=1.11.2", "pytorch-fid>=0.3.0", "torch-fidelity>=0.4.0", "torchvision>=0.21.0"]
ADAPTERS = [
    *METRICS,
    "absl-py>=2.0.0",
    "filelock>=3.13.0",
    "jinja2>=3.1.3",
    "ml-collections>=1.0.0",
    "matplotlib>=3.8.0",
    "pillow>=10.3.0",  # older ones have known holes in their readers
    "scikit-learn>=1.3.1",
    "tensorboard>=2.15.0",
    "tqdm>=4.66.1",
]
DIFFUSERS = ["diffusers>=0.30", "accelerate>=1.0"]
LUCIDRAINS = ["denoising-diffusion-pytorch>=2.3"]
JAX = ["jax>=0.4.30"]
CLUSTER = ["distributed>=2024.8.0"]
DOCS = [
    *DIFFUSERS,
    *LUCIDRAINS,
    "furo>=2024.8.6",
    "latex2mathml>=3.77",
    "myst-parser>=4",
    "sphinx>=8",
]
TESTS = [
    *ADAPTERS,
    *CLUSTER,
    *DIFFUSERS,
    *LUCIDRAINS,
    *JAX,
    "azula>=0.11.1",  # a recipe is tried with its denoisers
    "hypothesis>=6.100.0",
    "mypy>=1.15",
    "packaging>=23.2",
    "pytest>=8.0.0",
    "pytest-timeout>=2.3.1",
    "pytest-xdist>=3.5.0",
    "ruff>=0.17",
    "setuptools>=70.1",
    "transformers>=5.0",  # diffusers imports the pipelines of Stable Diffusion with it
]

setup(
    name="sa-plugin",
    version=VERSION,
    description="The sequence-aware loss and optimal reverse variances for any diffusion code",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["sa_plugin", "sa_plugin.*", "sa_files"]),
    package_data={"sa_plugin": ["py.typed"], "sa_files": ["py.typed"]},
    install_requires=["torch>=2.6.0", "numpy>=1.26.0"],
    extras_require={
        "metrics": METRICS,
        "adapters": ADAPTERS,
        "cluster": [*ADAPTERS, *CLUSTER],
        "diffusers": DIFFUSERS,
        "denoising-diffusion-pytorch": LUCIDRAINS,
        "jax": JAX,
        "progress": ["tqdm>=4.66.1"],
        "docs": DOCS,
        "tests": TESTS,
    },
)
