"""The packages of a wheel; all else is in pyproject.toml, which has no words for packages found and one that lies elsewhere."""
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["granvit*", "ms_granvit*", "pt_granvit*", "parity*"]), "granvit.configs"],
    package_dir={"granvit.configs": "configs"},
)
