"""Packaging. `kernels/` stands at the top level for readers and is imported as `minitorch.kernels`."""

from setuptools import setup

setup(
    name="minitorch",
    version="0.4.0",
    packages=["minitorch", "minitorch.kernels", "minitorch.kernels.flash_attention"],
    package_dir={"minitorch.kernels": "kernels"},
    package_data={"minitorch": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["numpy>=2.0", "numba>=0.68"],
)
