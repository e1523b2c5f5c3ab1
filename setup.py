"""Packaging of arloom. The rooms are listed by name: `tests` and `scripts` are never installed."""

from setuptools import setup

ROOMS = [
    "layers",
    "tokenizers_vis",
    "tokenizers_vis.quantizers",
    "heads",
    "generators",
    "sampling",
    "sampling.speculative",
    "eval",
    "eval.protocols",
    "data",
    "training",
    "configs",
]

setup(
    name="arloom",
    version="0.1.0",
    description="Autoregressive visual generation: tokenizers, generators, heads, samplers and one evaluation harness",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=ROOMS,
    package_data={"configs": ["**/*.yaml"], "data": ["assets/*"], "": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.20",
        "diffusers>=0.36",
        "einops>=0.8",
        "torch-fidelity>=0.4",
        "accelerate>=1.10",
        "av>=14",
        "safetensors>=0.6",
        "huggingface_hub>=0.34",
        "jinja2>=3.1",
        "jsonargparse[signatures]>=4.41",
        "lpips>=0.1.4",
        "matplotlib>=3.9",
        "mlxtend>=0.23",
        "numpy>=2.0",
        "pillow>=11",
        "psutil>=6",
        "pyarrow>=17",
        "pyyaml>=6",
        "scipy>=1.14",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        "webdataset>=0.2.100",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "ruff>=0.12",
            "grimp>=3.9",
            "vector-quantize-pytorch>=1.22",
            "torchmetrics>=1.6",
        ],
        "wandb": ["wandb>=0.19"],
    },
)
