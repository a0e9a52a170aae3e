"""The packages of a wheel, and the C++ kernels; all else is in pyproject.toml."""
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from granvit import native  # noqa: E402


class BuildKernels(build_py):
    """Compiles the C++ kernels too; without a compiler, or if it fails, one line says so and the installation goes on."""

    def run(self):
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        try:
            native.build(folder / "granvit" / "native")
        except native.BuildError as error:
            print(f"granvit: the C++ kernels are not built: {error}. To have them, {native.REMEDY}", file=sys.stderr)


class HoldsALibrary(Distribution):
    """A wheel is for one kind of machine."""

    def has_ext_modules(self):
        return True


setup(
    packages=[*find_packages(include=["granvit*", "ms_granvit*", "pt_granvit*", "parity*"]), "granvit.configs"],
    package_dir={"granvit.configs": "configs"},
    cmdclass={"build_py": BuildKernels},
    distclass=HoldsALibrary,
)
