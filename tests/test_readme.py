"""The README is run: every block of Python, every command, and the two lines it opens with."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from PIL import Image

import datamodules
import zoo
from zoo.cli import main, recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SETUP = "python3 -m venv .venv && .venv/bin/pip install -q -e "

# Makes a command of the README short: the last word wins. What the command is about stays as it is written.
SHORT = ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
SHORT += ["--trainer.limit_test_batches=1", "--trainer.log_every_n_steps=1", "--trainer.check_val_every_n_epoch=1"]
SHORT += ["--trainer.enable_progress_bar=false", "--data.num_workers=0"]
SHORT += ["--trainer.precision=32-true"]  # a CPU takes half a minute for a convolutional network's step in bf16


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("zoo ")]


def shortened(command: list[str]) -> list[str]:
    if command[0] in ("list", "analyze-vit") or any(word.endswith((".help", "--print_config")) for word in command):
        return command
    if command[0] == "predict" and "-c" not in command:  # by a checkpoint alone
        return command
    if command[0] == "export":
        return [*command, "--no-compile", "--limit", "1"]
    if command[0] == "benchmark":
        return [*command, "--repeats", "1", "--steps", "5", "--seconds", "0"]
    # One more epoch for a run that continues the one before.
    # A question is looked for in scene after scene.
    few = ["--data.train_size=128", "--data.val_size=16", "--data.test_size=16"] if "vlm/shapes" in str(command) else []
    epochs = [f"--trainer.max_epochs={2 if '--ckpt_path' in command else 1}", "--model.warmup_epochs=0"]
    return [*command, *SHORT, *few, *(epochs if command[0] == "fit" else [])]


def run_python(program: str) -> None:
    done = forked.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, f"{program}\n{done.stderr}"


def run_zoo(command: list[str]) -> None:
    if "--strict-imports" in command or command[0] == "export":  # the process would keep to strict imports from then on
        run_python(f"import sys, zoo.cli; sys.exit(zoo.cli.main({shortened(command)!r}))")
        return
    try:
        status = main(shortened(command))
    except SystemExit as end:  # --print_config and help
        status = end.code or 0
    assert status == 0, " ".join(command)


@pytest.fixture
def _my_images() -> None:
    Path("my_images").mkdir()
    Image.new("L", (20, 30)).save("my_images/one.png")


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the test find the packages also where they are not installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.usefixtures("_installed", "_forked_programs", "_my_images")
@pytest.mark.timeout(300)  # a dozen runs
def test_everything_runs_from_top_to_bottom():
    run_zoo(["fit", "-c", "vit/digits"])  # the opening line's own job: version_0
    for language, text in BLOCKS:
        if language == "python":
            run_python(text)
        elif language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", text)
            assert name, f"a block of YAML begins with its file's name:\n{text}"
            Path(name[1]).write_text(text)
        elif language == "bash":
            for command in commands(text):
                run_zoo(command)
        else:
            pytest.fail(f"no test runs blocks of {language}")
    predictions = [file.read_text().splitlines() for file in Path("runs").rglob("predictions.csv")]
    assert [len(lines) for lines in predictions] == [2, 2], "a header and one image"


@pytest.mark.usefixtures("_installed", "_forked_programs", "_my_images")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_pages_commands_run_and_what_they_name_exists(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        run_python(block)
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for command in commands(block):
            # Dozens of runs: test_search.py, test_compare.py, test_benchmark_command.py.
            if not command[0].startswith(("scaling-", "compare-", "benchmark")):
                run_zoo(command)
        for script in re.findall(r"^python (\S+\.py)", block, re.MULTILINE):
            assert (ROOT / script).is_file(), script
    for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / "docs" / name).exists(), name
    for name in re.findall(
        r"`((?:vit|mae|efficientnet|detection|gumbel_vae|gaussian_vae|alignment|packed_vit|vlm)/\w+)`", text
    ):
        assert name in recipes.recipes(), name


def test_it_opens_with_two_lines_that_set_themselves_up():
    (_, first), (_, second) = BLOCKS[:2]
    assert first.strip() == SETUP + ". && .venv/bin/zoo fit -c vit/digits"
    assert second.strip() == SETUP + "'.[test]' && .venv/bin/python -m pytest"
    assert README.index(second) < 1000
    assert README.count("-m pytest") == 1, ".ci/run takes the first"


def test_ci_takes_the_line_from_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    search = re.search(r"line=\$\((.*)\)\n", script)
    found = subprocess.run(["bash", "-c", search[1]], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert found == BLOCKS[1][1]
    assert "pip install" not in script, "the line does all of the set-up"


def test_every_class_has_its_line_in_the_tables():
    named = set(re.findall(r"^\| `(\w+\.\w+)` \|", README, re.MULTILINE))
    promised = {f"{package.__name__}.{name}" for package in (zoo, datamodules) for name in package._EXPORTS}
    assert named == promised


def test_links_and_recipes_exist():
    for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"-c (\w+/\w+)", README):
        assert name in {*recipes.recipes(), *recipes.hardware()}, name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_installed")
def test_the_first_line_ends_as_promised():
    done = subprocess.run([sys.executable, "-m", "zoo", "fit", "-c", "vit/digits"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"^test accuracy (\S+) %$", done.stdout, re.MULTILINE)
    assert float(accuracy[1]) > 98.5
    assert re.search(r"^RBF-kernel SVM on the same split \S+ %$", done.stdout, re.MULTILINE)
    picture = re.search(r"^\w+ (\S+\.png)$", done.stdout, re.MULTILINE)
    assert Image.open(picture[1]).getbbox()
    checkpoint = re.search(r"^checkpoint (\S+\.ckpt)$", done.stdout, re.MULTILINE)
    assert Path(checkpoint[1]).is_file()
    assert "Warning" not in done.stderr, "a default run warns about nothing that is ours to fix"
