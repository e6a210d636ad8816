"""``--model.help CLASS`` says of each option what it is, of which type, and its default: every module of the zoo."""

import inspect
import re
import sys
from typing import get_type_hints

import forked
import pytest
from jsonargparse import ArgumentParser

import zoo
from zoo._lightning import LightningModule
from zoo.cli.parser import MOST_NAMED, create

MODULES = sorted(zoo._EXPORTS)


def shown(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The text of each option's help, in one line, by the option's name."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningModule, "model")
    with pytest.raises(SystemExit):
        parser.parse_args(["--model.help", f"zoo.{name}"])
    options = capsys.readouterr().out.split("\n  --model.")[1:]
    blocks = (re.match(r"(\w+)(?: (?!\().*?)?(?:\n|  )\s*(.*)", option, re.DOTALL) for option in options)
    return {block[1]: " ".join(block[2].split()) for block in blocks if block}


@pytest.mark.parametrize("name", MODULES)
def test_each_option_has_a_text_its_type_and_its_default(name, capsys):
    texts, parameters = shown(name, capsys), inspect.signature(getattr(zoo, name)).parameters
    assert list(texts) == list(parameters)
    for option, text in texts.items():
        about, _, kind = text.partition("(type: ")
        assert len(about.split()) > 1, f"{option} has no text of its own: {text}"
        default = parameters[option].default
        assert f"default: {'null' if default is None else default}" in kind, f"{option}: {text}"


@pytest.mark.parametrize("name", MODULES)
def test_of_the_classes_that_fit_a_type_no_more_are_named_than_can_be_read(name, capsys):
    parser = create("fit", data_required=False)
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--model.help", f"zoo.{name}"])
    text = capsys.readouterr().out
    assert text.startswith("usage: zoo ")
    options = text.split("\n  --model.")[1:]
    assert {option.split()[0] for option in options} >= set(inspect.signature(getattr(zoo, name)).parameters)
    assert max(len(option.splitlines()) for option in options) < 20
    modules = re.search(r"Module, default: \w+; or a class by its path, (\d+) are known\)", " ".join(text.split()))
    assert " | Module" not in text or int(modules[1]) > MOST_NAMED


def test_classes_that_are_few_are_named():
    """In a process of its own: callbacks of other tests would count."""
    program = "from zoo.cli.parser import create; create('fit', data_required=False).parse_args(['--help'])"
    done = forked.run([sys.executable, "-c", program], capture_output=True)
    text = " ".join(done.stdout.split())
    for name in ("pytorch.profilers.AdvancedProfiler", "zoo.callbacks.EMA", "pytorch.loggers.CSVLogger"):
        assert re.search(rf"known subclasses: [^()]*{name}", text)


@pytest.mark.parametrize("name", MODULES)
def test_each_option_is_read_as_the_type_that_the_constructor_states(name):
    kind = getattr(zoo, name)
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "model")
    actions = {action.dest.removeprefix("model."): action for action in parser._actions}
    stated = {each: hint for each, hint in get_type_hints(kind.__init__).items() if each != "return"}
    assert {each: getattr(actions[each], "_typehint", actions[each].type) for each in stated} == stated
    found = parser.get_defaults().model
    assert all(found[each] == parameter.default for each, parameter in inspect.signature(kind).parameters.items())
