"""Packages of the distribution; everything declarative is in pyproject.toml.

The device code stands in kernels/ at the top of the repository and is installed as relattn.kernels.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["relattn", "relattn.*"]),
        "relattn.kernels",
        *(f"relattn.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"relattn.kernels": "kernels"},
)
