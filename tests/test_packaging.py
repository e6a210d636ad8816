"""What is installed: built for real, installed without its dependencies, and asked for its recipes."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(TEXT)["project"]
EXTRAS = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "data", "lightning_logs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves its traces where it builds."""
    source, target = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(target), "."]
    done = subprocess.run(pip, capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_packages_and_recipes_once_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = [file for package in ("zoo", "datamodules") for file in (ROOT / package).rglob("*.py")]
    expected += [ROOT / package / "py.typed" for package in ("zoo", "datamodules")]
    expected = [file.relative_to(ROOT).as_posix() for file in expected]
    expected += ["zoo/" + file.relative_to(ROOT).as_posix() for file in (ROOT / "configs").rglob("*.yaml")]
    assert "zoo/configs/vit/digits.yaml" in expected
    assert sorted(names) == sorted(expected)


def test_its_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert f"\nVersion: {zoo.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert archive.read(f"{folder}/entry_points.txt").decode() == "[console_scripts]\nzoo = zoo.cli:main\n"


def test_an_installed_zoo_finds_its_recipes_and_needs_no_torch_for_it(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = "import sys, zoo.cli; zoo.cli.main(['list']); print(zoo.__file__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "  vit/digits " in done.stdout
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'zoo' / '__init__.py'} False"


@pytest.mark.parametrize("requirement", PROJECT["dependencies"] + EXTRAS)
def test_every_requirement_has_its_reason(requirement):
    """Beside it, or in the lines above it."""
    before, line = re.search(rf'^(.*)\n *"{re.escape(requirement)}",([^\n]*)$', TEXT, re.MULTILINE | re.DOTALL).groups()
    assert line.strip().startswith("# ") or before.splitlines()[-1].strip().startswith("# ")


def test_every_package_that_is_imported_is_named():
    """Nothing may work only because another requirement happens to bring it along."""
    modules = {"faster-coco-eval": "faster_coco_eval", "pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
    extras = PROJECT["optional-dependencies"]
    requirements = PROJECT["dependencies"] + [each for name in extras if name != "test" for each in extras[name]]
    required = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
    named = {modules.get(name, name) for name in required} | {"pytorch_lightning"}  # which lightning requires
    own = {"zoo", "datamodules"}
    imported = set()
    for package in own:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                imported |= {name.split(".")[0] for name in names}
    assert imported - own - named - set(sys.stdlib_module_names) == set()


def test_floors_that_keep_known_attacks_out():
    assert {"torch>=2.10", "lightning>=2.6.6,<2.8"} <= set(PROJECT["dependencies"])
    for name in ("torch", "lightning"):
        (reason,) = re.findall(rf'((?:^ *#[^\n]*\n)*)^ *"{name}>=[^"]*",([^\n]*)$', TEXT, re.MULTILINE)
        assert "security floor" in "".join(reason).lower()
        assert "CVE-" in "".join(reason)


def test_the_readme_names_the_python_that_is_asked_for():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert re.findall(r"Python (\d\.\d+)", (ROOT / "README.md").read_text()) == [oldest]
    assert f'target-version = "py{oldest.replace(".", "")}"' in TEXT
    assert f'python_version = "{oldest}"' in TEXT
    assert f'"{oldest}"' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_nobody_is_given_a_torch_that_is_not_theirs():
    """Which torch is right depends on the machine: no index, no build of one kind."""
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", ".ci/run"):
        assert not re.search(r"index-url|find-links|\+cpu|whl/cpu", (ROOT / name).read_text()), name


def test_the_oldest_versions_are_the_lower_bounds():
    """CONTRIBUTING.md says how to run the tests with them, which is what makes the bounds true."""
    bounds = dict(re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", line).groups() for line in PROJECT["dependencies"])
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pins = dict(line.removesuffix(".*").split("==") for line in lines if not line.startswith("#"))
    assert pins == bounds


def test_extras_that_are_said_to_be_installed_are_this_projects():
    """Of what stands behind "pip install" with brackets: this distribution's name, and extras that it has."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    files += [file for name in ("zoo", "datamodules", "benchmarks") for file in (ROOT / name).rglob("*.py")]
    said = [
        (name, extra.strip(), file.relative_to(ROOT).as_posix())
        for file in files
        for name, extras in re.findall(r"pip install (?:-\S+ )*'?([\w.-]+)\[([\w, -]+)\]", file.read_text("utf-8"))
        for extra in extras.split(",")
    ]
    assert len(said) > 10
    extras = PROJECT["optional-dependencies"]
    assert [each for each in said if each[0] not in (PROJECT["name"], ".") or each[1] not in extras] == []
