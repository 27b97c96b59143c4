"""Packaging of cure-plugin; auto_LiRPA is installed beside it, since no release resolves on modern stacks."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cure-plugin",
    version="0.1.0",
    description="Multi-norm perturbation sets, CURE certified training, certification and export for auto_LiRPA",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=find_packages(include=["cure_plugin", "cure_plugin.*"]),
    package_data={
        "cure_plugin": ["recipes/*.yaml", "py.typed"],
        "cure_plugin.datasets": ["mnist_slice/*"],
    },
    install_requires=[
        "torch>=2.0",
        "numpy>=1.24",
        "onnx>=1.14",
        "onnxruntime>=1.15",
        "pyyaml>=6.0",
        "cattrs>=23.2",
        "tqdm>=4.64",
        "appdirs>=1.4",  # auto_LiRPA's own, since it is installed with --no-deps
        "packaging>=20.0",  # likewise
    ],
    extras_require={
        "plot": ["matplotlib>=3.7"],
        "verify": ["maraboupy>=2.0; python_version < '3.12'", "vnnlib>=1.0"],
        "dev": [
            "filelock>=3",
            "pytest>=7",
            "pytest-timeout>=2",
            "pytest-xdist>=3",
            "ruff",
            "mypy",
            "scipy>=1.10",
            "pillow",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["cure = cure_plugin.cli:main"]},
)
