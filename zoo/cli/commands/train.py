"""``zoo fit``, ``validate``, ``test`` and ``predict``: what LightningCLI does."""

from functools import partial

from zoo.cli.arguments import RECIPE, STRICT, Arguments, Asked, Command, Line
from zoo.cli.notice import loading

SUMMARIES = {
    "fit": "train, then test",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint on the test data",
    "predict": "predict images by a checkpoint, or write predictions of a recipe's data",
}
OPTIONS = (
    RECIPE,
    ("--model CLASS", "a class of the zoo, or your own by its dotted path; --model.help CLASS lists its options"),
    ("--data CLASS", "the same for data; --data.help CLASS"),
    ("--model.lr 3e-4", "an option of the model; options win over recipes and over checkpoints"),
    ("--data.batch_size 32", "an option of the data; --data.predict_root FOLDER is what predict reads"),
    ("--trainer.max_epochs 9", "an argument of Lightning's Trainer; --trainer.help lists all"),
    (
        "--ckpt_path FILE",
        "the checkpoint to use; with fit, the one to continue from; last: the newest of this model and data",
    ),
    ("--seed_everything N", "0, unless said otherwise"),
    ("--print_config", "show the whole configuration and stop"),
    STRICT,
    ("--guards false", "without exact resume, preemption, whole checkpoints and the other guards"),
)


USAGE = "[RECIPE ...] [--option VALUE ...]"


def _arguments(name: str) -> Arguments:
    return Arguments(name, USAGE, f"{SUMMARIES[name].capitalize()}.")


def _run(line: Line) -> int:
    asked = Asked.by(line, _arguments(line.command), recipe_required=False)
    with loading():
        from zoo.cli import run

    run.run(line.command, asked.files, asked.options, asked.strict)
    return 0


COMMAND_OF = {name: Command(name, line, partial(_arguments, name), _run, OPTIONS) for name, line in SUMMARIES.items()}
