"""Plain data, which a checkpoint may hold, and objects, which torch does not read without running code."""

import collections
import datetime
import enum
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zoo.checkpoints.plain import objects


class Colour(enum.IntEnum):
    RED = 1


class Mine(dict):
    """A dictionary of somebody's own."""


Point = collections.namedtuple("Point", "x y")
noted = torch.zeros(2)
noted.note = np.float32(1.0)

PLAIN: dict[str, Any] = {
    "numbers": [True, 3, -(10**30), 0.5, float("nan"), 1 + 2j],
    "nothing": None,
    "text": ["a", "ä", b"a", bytearray(b"a")],
    "containers": ([1, (2.0, {"a": [None]})], {1, 2}, collections.OrderedDict(a=1), collections.Counter("aab")),
    "keys": {1: 1, (1, "a"): 2, None: 3},
    "tensors": [torch.zeros(2), nn.Parameter(torch.zeros(2)), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(0)],
    "torch's own": [torch.float32, torch.device("cpu"), torch.Size([1])],
    "a module's state": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(),
    "random state": torch.get_rng_state(),
}
OBJECTS: dict[str, tuple[Any, str]] = {
    "numpy.float64": (np.float64(0.5), "float(...)"),
    "numpy.float32": (np.float32(0.5), "float(...)"),
    "numpy.int64": (np.int64(1), "int(...)"),
    "numpy.bool": (np.bool_(True), ".item()"),
    "numpy.str_": (np.str_("a"), ".item()"),
    "numpy.ndarray": (np.zeros(2), "torch.from_numpy(...)"),
    "datetime.datetime": (datetime.datetime(2024, 1, 1), ".isoformat()"),
    "datetime.date": (datetime.date(2024, 1, 1), ".isoformat()"),
    "datetime.timedelta": (datetime.timedelta(1), ".total_seconds()"),
    "pathlib.PosixPath": (Path("a"), "str(...)"),
    "Colour": (Colour.RED, ".name or .value"),
    "torch.nn.modules.linear.Linear": (nn.Linear(1, 1), "state_dict()"),
    "collections.defaultdict": (collections.defaultdict(int), "dict(...)"),
    "Mine": (Mine(a=1), "dict(...)"),
    "Point": (Point(1, 2), "plain data"),
    "frozenset": (frozenset({1}), "set(...)"),
    "range": (range(3), "plain data"),
    "function": (lambda: None, "plain data"),
    "type": (int, "plain data"),
}


def is_read(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_may_be_kept(name):
    assert is_read(PLAIN[name])
    assert objects({"callbacks": {"Mine": PLAIN[name]}}) is None


@pytest.mark.parametrize("name", OBJECTS)
def test_what_torch_would_not_read_is_named_wherever_it_lies(name):
    value, instead = OBJECTS[name]
    assert not is_read(value)
    places = {
        "callback Mine{'a': 1}: state['best']": {"callbacks": {"Mine{'a': 1}": {"best": value}}},
        "callback Mine: state['past'][1][0]['x']": {"callbacks": {"Mine": {"past": [0, ({"x": value},)]}}},
        "callback Mine: state": {"callbacks": {"Mine": value}},
        "hyper_parameters['size']": {"hyper_parameters": {"lr": 0.1, "size": value, "other": object}},
        "datamodule_hyper_parameters['when']": {"datamodule_hyper_parameters": {"when": value}},
        "lr_schedulers[0]['fn']": {"lr_schedulers": [{"fn": value}]},
        "MyData['position']": {"MyData": {"position": value}},
        "mine": {"mine": value},
    }
    for place, checkpoint in places.items():
        told = objects({"state_dict": {"w": torch.zeros(2)}, "epoch": 3} | checkpoint)
        assert told is not None
        assert told.startswith(f"{place} is a ")
        kind, _, advice = told.removeprefix(f"{place} is a ").partition(
            ", which cannot be read without running code: keep "
        )
        assert kind.split(".")[-1] == name.split(".")[-1]
        assert instead in advice


def test_keys_and_attributes_count_as_well_and_loops_end():
    assert objects({"mine": {np.int64(3): 1}}).startswith("mine[np.int64(3)] is a numpy.int64")
    assert objects({"mine": [noted]}).startswith("mine[0]['note'] is a numpy.float32")
    assert not is_read(noted)
    endless: list[Any] = [1]
    endless.append(endless)
    assert objects({"mine": endless}) is None
    assert objects({"mine": [endless, np.float64(1)]}).startswith("mine[1] is")


def test_what_a_program_has_declared_safe_may_be_kept():
    class_ = Colour
    checkpoint = {"callbacks": {"Mine": {"colour": Colour.RED}}}
    assert objects(checkpoint) is not None
    with torch.serialization.safe_globals([class_]):
        assert objects(checkpoint) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer, schedules: schedules.OneCycleLR(optimizer, 1.0, total_steps=9),
        lambda optimizer, schedules: schedules.CyclicLR(optimizer, 0.1, 1.0),
        lambda optimizer, schedules: schedules.MultiStepLR(optimizer, [1, 2]),
        lambda optimizer, schedules: schedules.LambdaLR(optimizer, lambda step: 1.0),
        lambda optimizer, schedules: schedules.ReduceLROnPlateau(optimizer),
        lambda optimizer, schedules: schedules.SequentialLR(
            optimizer, [schedules.LinearLR(optimizer), schedules.StepLR(optimizer, 1)], [2]
        ),
    ],
)
def test_torchs_own_schedules_and_optimizers_are_plain(make):
    module = nn.Linear(2, 2)
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = kind(module.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        schedule = make(optimizer, torch.optim.lr_scheduler)
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        state = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}
        assert is_read(state)
        assert objects(state) is None
