"""Installs the library alone; adapters, third_party and configs run from the checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "sa_plugin" / "__init__.py").read_text())[1]

METRICS = ["scipy", "pytorch-fid>=0.3.0", "torch-fidelity>=0.4.0", "torchvision"]
ADAPTERS = [
    *METRICS,
    "absl-py",
    "filelock",
    "jinja2",
    "ml-collections>=1.0",
    "matplotlib",
    "scikit-learn",
    "tensorboard",
    "tqdm",
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
    install_requires=["torch>=2.4", "numpy>=1.26"],
    extras_require={
        "metrics": METRICS,
        "adapters": ADAPTERS,
        "diffusers": DIFFUSERS,
        "denoising-diffusion-pytorch": LUCIDRAINS,
        "jax": JAX,
        "progress": ["tqdm"],
        "docs": DOCS,
        "tests": TESTS,
    },
)
