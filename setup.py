"""Packages and the native library of the distribution; everything declarative is in pyproject.toml.

The device code stands in kernels/ at the top of the repository and is installed as relattn.kernels.
"""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

# By its path: while the package is being built, it cannot be imported.
_spec = spec_from_file_location("build_native", Path(__file__).parent / "kernels" / "cpu" / "build.py")
native = module_from_spec(_spec)
_spec.loader.exec_module(native)


class BuildNative(Command):
    """The native CPU library. Without a compiler the package works too, more slowly: that is a warning, not a failed install.

    pip shows the warning with -v only, so the reason is installed as well (build_report.json). pip also keeps the wheel that it built
    from an sdist; once there is a compiler: pip install --force-reinstall --no-deps --no-cache-dir relattn. (In an index no such
    wheel hides a native one: pip takes the platform's wheel before the one for any platform.)
    """

    description = "build the native CPU library"
    user_options = []  # noqa: RUF012 (setuptools wants a list)

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False  # setuptools sets it: the library then belongs beside its sources
        self.built = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        report = native.build(Path("kernels/cpu" if self.editable_mode else f"{self.build_lib}/relattn/kernels/cpu"))
        self.built = report["library"]
        if not self.built:
            message = f"relattn is without its native CPU kernels, and slower: {report['reason']}"
            if os.environ.get("RELATTN_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise CompileError(message)
            self.warn(message)

    def get_output_mapping(self):
        """Of an editable install: where the files would go, and where they are."""
        if not self.editable_mode:
            return {}
        files = [name for name in (native.LIBRARY, native.REPORT) if Path("kernels/cpu", name).exists()]
        return {f"{self.build_lib}/relattn/kernels/cpu/{name}": f"kernels/cpu/{name}" for name in files}

    def get_outputs(self):
        return list(self.get_output_mapping())

    def get_source_files(self):
        return []  # MANIFEST.in names them


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


class Wheel(bdist_wheel):
    """py3-none-PLATFORM with the library, which is loaded with ctypes and so fits every Python; py3-none-any without it."""

    def run(self):
        self.run_command("build_native")  # first: whether there is a library decides where the files go and what the wheel is called
        self.root_is_pure = not self.get_finalized_command("build_native").built
        self.distribution.has_ext_modules = lambda: not self.root_is_pure  # `install` asks this
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["relattn", "relattn.*"]),
        "relattn.kernels",
        *(f"relattn.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"relattn.kernels": "kernels"},
    cmdclass={"bdist_wheel": Wheel, "build": Build, "build_native": BuildNative},
)
