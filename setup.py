"""Installs the library alone; adapters, third_party and configs run from the checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "sa_plugin" / "__init__.py").read_text())[1]

METRICS = ["scipy>=1.11.2", "pytorch-fid>=0.3.0", "torch-fidelity>=0.4.0", "torchvision>=0.21.0"]
ADAPTERS = [
    *METRICS,
    "absl-py>=2.0.0",
    "filelock>=3.13.0",
    "jinja2>=3.1.3",
    "ml-collections>=1.0.0",
    "matplotlib>=3.8.0",
    "scikit-learn>=1.3.1",
    "tensorboard>=2.15.0",
    "tqdm>=4.66.1",
]
DIFFUSERS = ["diffusers>=0.30", "accelerate"]
LUCIDRAINS = ["denoising-diffusion-pytorch>=2.3"]
JAX = ["jax"]
DOCS = [*DIFFUSERS, *LUCIDRAINS, "furo", "myst-parser>=4", "sphinx>=8"]
TESTS = [
    *ADAPTERS,
    *DIFFUSERS,
    *LUCIDRAINS,
    *JAX,
    "hypothesis",
    "mypy>=1.15",
    "packaging",
    "pytest>=8",
    "ruff",
    "setuptools>=70.1",
]

setup(
    name="sa-plugin",
    version=VERSION,
    description="The sequence-aware loss and optimal reverse variances for any diffusion code",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["sa_plugin", "sa_plugin.*"]),
    package_data={"sa_plugin": ["py.typed"]},
    install_requires=["torch>=2.6.0", "numpy>=1.26.0"],
    extras_require={
        "metrics": METRICS,
        "adapters": ADAPTERS,
        "diffusers": DIFFUSERS,
        "denoising-diffusion-pytorch": LUCIDRAINS,
        "jax": JAX,
        "progress": ["tqdm>=4.66.1"],
        "docs": DOCS,
        "tests": TESTS,
    },
)
