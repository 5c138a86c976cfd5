"""Packaging. `kernels/` at the top level is installed as streammerge.kernels, so packages are listed by hand."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "streammerge/__init__.py").read_text())[1]

setup(
    name="streammerge",
    version=VERSION,
    description="Memory-lean streaming merger for large reasoning models (RAIN-Merging in a single sweep)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["streammerge", "streammerge.io", "streammerge.demo", "streammerge.bench", "streammerge.planning",
              "streammerge.release", "streammerge.mergekit", "streammerge.kernels"],
    package_dir={"streammerge": "streammerge", "streammerge.kernels": "kernels"},
    package_data={
        "streammerge": ["families/*.json", "py.typed"],
        "streammerge.demo": ["data/*.*", "data/*/*"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "tokenizers>=0.22",
        "safetensors>=0.8",
        "numpy>=1.26",
        "pyyaml>=6",
        "rich>=13",
    ],
    extras_require={
        "gpu": ["triton>=3.6; platform_system == 'Linux'"],  # torch's CUDA builds bring it
        "quantized": ["bitsandbytes>=0.50"],
        "test": ["pytest>=8", "ruff>=0.14", "gguf>=0.17", "accelerate>=1.10", "setuptools>=77", "hypothesis>=6.100",
                 "bitsandbytes>=0.50", "cyclonedx-python-lib[json-validation]>=11",
                 "triton>=3.6; platform_system == 'Linux'"],
    },
    entry_points={"console_scripts": ["streammerge=streammerge.cli:main"]},
)
