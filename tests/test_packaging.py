"""The package as a user gets it: sdist, wheel and editable install, used from another folder beside torch alone."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from relattn.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("relattn", "kernels", "benchmarks", "examples", "tests")
DERIVED = re.compile(r"__pycache__|\.(py[cod]|so|dylib|dll|o)$|build_report\.json$|\.DS_Store")  # files that no archive should hold

pytestmark = pytest.mark.xdist_group("packaging")  # one process builds for all of them

# Against the definition, written out once more: a wheel whose relative term is lost or flipped fails here.
USE = """
import torch, relattn
torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 2, 6, 8).unbind()
rel_k = torch.randn(5, 8, requires_grad=True)
position = torch.arange(6)
rows = (position - position[:, None]).clamp(-2, 2) + 2
scores = (query @ key.mT + torch.einsum("bhid,ijd->bhij", query, rel_k[rows])) * 8**-0.5
expected = scores.softmax(-1) @ value
out = relattn.relative_attention(query, key, value, rel_k=rel_k)
torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
ours, theirs = (torch.autograd.grad(o.square().sum(), rel_k)[0] for o in (out, expected))
torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
import relattn.kernels
"""


def run(python: Path | str, *arguments: str, cwd: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python` without what the test process's environment would add to its path.

    What it builds, it builds with the objects of this clone's own build: compiling the kernels anew takes a minute.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"  # ninja
    environ.setdefault("RELATTN_BUILD_DIR", str(ROOT / "build" / "cpu"))
    environ |= variables
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=1200)
    if check and done.returncode:
        pytest.fail(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done


def closure(*names: str) -> set[str]:
    """These installed distributions and all that they require here."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            needed = [Requirement(line) for line in distribution(name).requires or []]
            waiting += [
                canonicalize_name(one.name) for one in needed if not one.marker or one.marker.evaluate({"extra": ""})
            ]
    return found


def empty_environment(path: Path, *names: str) -> Path:
    """A new environment that sees these installed distributions with their requirements, by links, and nothing else."""
    venv.create(path, symlinks=True)
    (site,) = path.glob("lib/python*/site-packages")
    for name in closure(*names):
        files = distribution(name)
        for top in {file.parts[0] for file in files.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(files.locate_file(top))
    return path / "bin" / "python"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree: builds leave files behind, and other tests run from the tree meanwhile."""
    clone = tmp_path_factory.mktemp("tree") / "clone"
    for folder in (".ci", *FOLDERS):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build_report.json"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, clone)
    return clone


@pytest.fixture(scope="module")
def built(source: Path) -> Path:
    """The folder that holds the sdist and the wheel built *from the sdist*: the tool's default."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=source, RELATTN_REQUIRE_NATIVE="1")
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("relattn-*.whl")
    return path


def install(wheel: Path, path: Path) -> Path:
    """A new environment of torch and the wheel."""
    python = empty_environment(path, "torch")
    arguments = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    run(sys.executable, "-m", "pip", "--python", str(python), *arguments, cwd=wheel.parent)
    return python


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("wheel") / "env")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_sdist_is_the_whole_project(built: Path) -> None:
    (path,) = built.glob("relattn-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"LICENSE", "README.md", "Makefile", "pyproject.toml", "setup.py", "requirements-dev.txt"}
    expected |= {"constraints.txt", ".ci/run"}
    for folder in FOLDERS:
        inside = {file.relative_to(ROOT) for file in (ROOT / folder).rglob("*.*") if file.is_file()}
        inside = {file.as_posix() for file in inside if not DERIVED.search(str(file))}
        assert inside, folder
        expected |= inside
    assert expected <= names, sorted(expected - names)
    assert not [name for name in names if DERIVED.search(name)]


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, source: Path) -> None:
    names = names_in(wheel)
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "relattn").rglob("*.py")}
    modules |= {f"relattn/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    rooms = ("", "backends/", "huggingface/", "huggingface/families/", "distributed/", "kernels/", "kernels/gpu/", "kernels/cpu/")
    assert {f"relattn/{room}__init__.py" for room in rooms} <= names
    others = {name for name in names if not name.endswith(".py") and ".dist-info/" not in name}
    assert others == {"relattn/py.typed", *(f"relattn/kernels/cpu/{name}" for name in (build.LIBRARY, build.REPORT))}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"relattn"}
    assert any(name.endswith("licenses/LICENSE") for name in names)

    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "direct", ".", cwd=source)
    (direct,) = (source / "direct").glob("*.whl")
    assert names_in(direct) == names  # the sdist lost nothing
    assert direct.name == wheel.name


def test_wheel_with_the_native_library_fits_every_python_of_the_platform(wheel: Path, installed: Path, tmp_path: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"relattn-{distribution('relattn').version}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(name).decode()
    folder = Path(run(installed, "-c", "import relattn.kernels as k; print(k.__path__[0])", cwd=tmp_path).stdout.strip()) / "cpu"
    report = json.loads((folder / build.REPORT).read_text())
    assert report["library"] is True
    assert report["variants"][0] == "portable"
    ctypes.CDLL(str(folder / build.LIBRARY))


def test_without_a_compiler_the_package_is_pure_and_works(source: Path, wheel: Path, tmp_path: Path) -> None:
    """A library left from an earlier build, in the tree or in setuptools' build folder, does not get in."""
    for folder in ("kernels/cpu", "build/lib/relattn/kernels/cpu"):
        (source / folder).mkdir(parents=True, exist_ok=True)
        (source / folder / build.LIBRARY).write_bytes(b"of an earlier build")
    command = ["-m", "build", "--no-isolation", "--wheel", "--outdir", "pure", "."]
    run(sys.executable, *command, cwd=source, CXX="/bin/false", RELATTN_REQUIRE_NATIVE="0")
    (pure,) = (source / "pure").glob("*.whl")
    assert pure.name.endswith("-py3-none-any.whl")
    assert names_in(wheel) - names_in(pure) == {f"relattn/kernels/cpu/{build.LIBRARY}"}
    with zipfile.ZipFile(pure) as archive:
        report = json.loads(archive.read(f"relattn/kernels/cpu/{build.REPORT}"))
    assert report["library"] is False
    assert "/bin/false" in report["reason"]
    run(install(pure, tmp_path / "env"), "-c", USE, cwd=tmp_path)

    done = run(sys.executable, *command, cwd=source, check=False, CXX="/bin/false", RELATTN_REQUIRE_NATIVE="1")
    assert done.returncode
    assert "/bin/false" in done.stdout + done.stderr


def test_torch_is_the_only_requirement(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert [one.name for one in required if not one.marker] == ["torch"]
    assert set(metadata.get_all("Provides-Extra", [])) == {"chorales", "music", "huggingface", "bench", "test", "docs", "dev"}
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Version"] == distribution("relattn").version


def test_wheel_works_beside_torch_alone(installed: Path, tmp_path: Path) -> None:
    assert run(installed, "-c", "import numpy", cwd=tmp_path, check=False).returncode  # torch does not require it
    run(installed, "-c", USE, cwd=tmp_path)
    facts = json.loads(run(installed, "-m", "relattn", "--json", cwd=tmp_path).stdout)
    assert facts["versions"]["transformers"] is None
    assert facts["backends"]["blocked"]["usable"]
    where = run(installed, "-c", "import relattn; print(relattn.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    assert Path(where.strip()).with_name("py.typed").exists()


def test_editable_install_works(source: Path, wheel: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "env", "torch", "setuptools")
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    install += ["--editable", str(source)]
    objects = Path(os.environ.get("RELATTN_BUILD_DIR", ROOT / "build" / "cpu"))
    times = {file: file.stat().st_mtime_ns for file in objects.rglob("*.o")}
    assert times
    run(sys.executable, *install, cwd=tmp_path)
    assert times == {file: file.stat().st_mtime_ns for file in objects.rglob("*.o")}  # all compiled for the wheel already
    report, library = (source / "kernels" / "cpu" / name for name in (build.REPORT, build.LIBRARY))
    assert json.loads(report.read_text())["library"] is True
    ctypes.CDLL(str(library))
    # Elsewhere the install's finder answers for all; in the clone the folder relattn/ does, and the finder for kernels.
    for folder in (tmp_path, source):
        run(python, "-c", USE, cwd=folder)
    kernels = run(python, "-c", "import relattn.kernels as k; print(k.__file__)", cwd=tmp_path).stdout
    assert Path(kernels.strip()).samefile(source / "kernels" / "__init__.py")
    # Once more without a compiler: the library is gone, since nothing says that it is what the sources say.
    run(sys.executable, *install, cwd=tmp_path, CXX="/bin/false", RELATTN_REQUIRE_NATIVE="0")
    assert not library.exists()
    assert "/bin/false" in json.loads(report.read_text())["reason"]
    run(python, "-c", USE, cwd=tmp_path)


def test_plain_install_run_from_the_clone_is_refused(installed: Path, source: Path) -> None:
    """The clone's relattn/ hides the installed one and has no kernels: never a silent fall to a slow backend."""
    done = run(installed, "-c", "import relattn", cwd=source, check=False)
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert "ImportError" in last
    assert "pip install -e ." in last


# To be run before relattn is imported: the optional packages raise `error` at import, installed or not.
BLOCK = """
import sys, torch
class Broken:
    def find_spec(self, name, path=None, target=None):
        optional = {"accelerate", "matplotlib", "music21", "psutil", "tqdm", "transformers", "triton"}
        if name.partition(".")[0] in optional:
            raise %s(name + " is blocked by the test")
sys.meta_path.insert(0, Broken())
"""


def test_import_needs_torch_and_its_requirements_only(tmp_path: Path) -> None:
    """No optional package is even tried: `except ImportError` would not catch this error.

    Seen: torch.utils.flop_counter imports triton, so registering formulas at import made triton a part of it.
    """
    script = """
before = set(sys.modules)
import relattn
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
    loaded = set(run(sys.executable, "-c", BLOCK % "RuntimeError" + script, cwd=tmp_path).stdout.split())
    assert "relattn" in loaded
    allowed = {"relattn"}
    for name in closure("torch"):
        allowed |= {file.parts[0].removesuffix(".py") for file in distribution(name).files or []}
    assert not loaded - allowed


@pytest.mark.parametrize(
    "use",
    [USE, 'import runpy; sys.argv = ["relattn"]; runpy.run_module("relattn", run_name="__main__")'],
    ids=["function", "command"],
)
def test_works_where_every_optional_package_is_broken(tmp_path: Path, use: str) -> None:
    """A package that is installed but raises at import is as common as one that is absent."""
    run(sys.executable, "-c", BLOCK % "ImportError" + use, cwd=tmp_path)
