"""COCO files as programs write them: each field in each odd form is read, or refused in a line."""

import copy
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from datamodules.reading.annotations import Annotations, read
from datamodules.reading.json_values import flag, number, outline, whole

BASE = {
    "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in (1, 2, 3)],
    "annotations": [
        {"id": n, "image_id": n % 3 + 1, "category_id": n % 2 + 1, "bbox": [n, 2, 8, 6], "area": 40.0, "iscrowd": 0}
        for n in range(1, 7)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
FIELDS = {part: sorted(entries[0]) for part, entries in BASE.items()}
PLACES = [(part, key) for part, keys in FIELDS.items() for key in keys]
FORMS = {
    "text": lambda v: str(v),
    "text of a float": lambda v: f"{v}.0" if isinstance(v, int) else str(v),
    "float": lambda v: float(v) if isinstance(v, int) else v,
    "list of one": lambda v: [v],
    "negative": lambda v: -v if isinstance(v, int | float) else v,
    "fraction": lambda v: v + 0.5 if isinstance(v, int | float) else v,
    "null": lambda v: None,
    "absent": lambda v: ...,
    "NaN": lambda v: math.nan,
    "infinite": lambda v: math.inf,
    "minus infinite": lambda v: -math.inf,
    "large": lambda v: 10**30,
    "too large for a float": lambda v: 10**400,
    "huge": lambda v: 1e300,
    "63 bits": lambda v: 2**63 - 1,
    "64 bits": lambda v: 2**63,
    "word": lambda v: "word",
    "empty text": lambda v: "",
    "empty list": lambda v: [],
    "object": lambda v: {"a": 1},
    "true": lambda v: True,
    "2": lambda v: 2,
}
SAME = {"text": ("id", "image_id", "category_id", "width", "height", "area", "iscrowd")}
SAME |= {"text of a float": SAME["text"], "float": SAME["text"], "list of one": ("area", "iscrowd")}
SAME |= {"null": ("iscrowd",), "absent": ("iscrowd",)}
"""Forms in which a field means what it meant."""


def changed(part: str, key: str, form: str, all_entries: bool) -> dict:
    content = copy.deepcopy(BASE)
    for entry in content[part] if all_entries else content[part][1:2]:
        value = FORMS[form](entry[key])
        if value is ...:
            del entry[key]
        else:
            entry[key] = value
    return content


def attempt(tmp_path: Path, content) -> tuple[Annotations | str, list[str]]:
    """What is read, or the one line that refuses it; and what is warned about."""
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found: Annotations | str = read(path)
        except ValueError as error:
            found = str(error)
    assert {warning.category for warning in caught} <= {UserWarning}  # NumPy's would be RuntimeWarning
    if isinstance(found, str):
        assert str(path) in found
        assert "\n" not in found
        assert len(found) < 400 + len(str(path))
    return found, [str(warning.message) for warning in caught]


def assert_equal(found: Annotations | str, expected: Annotations | str) -> None:
    assert isinstance(found, Annotations), found
    assert isinstance(expected, Annotations)
    assert found.category_names == expected.category_names
    for name in ("names", "image_ids", "sizes", "offsets", "boxes", "categories", "iscrowd", "area"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("all_entries", [True, False], ids=["all", "one"])
def test_each_field_in_each_form_is_read_or_refused_in_a_line(tmp_path, form, all_entries):
    plain, said = attempt(tmp_path, BASE)
    assert not said
    for part, key in PLACES:
        found, said = attempt(tmp_path, changed(part, key, form, all_entries))
        if isinstance(found, Annotations):
            assert np.isfinite(found.boxes).all()
            assert np.isfinite(found.area).all()
            assert (found.area >= 0).all()
            assert (found.sizes >= 0).all()
            assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        if key in SAME.get(form, ()):
            assert_equal(found, plain)
            assert not said


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", range(4))
def test_each_coordinate_in_each_form_is_read_or_refused_in_a_line(tmp_path, form, place):
    content = copy.deepcopy(BASE)
    value = FORMS[form](content["annotations"][0]["bbox"][place])
    content["annotations"][0]["bbox"][place] = None if value is ... else value
    found, said = attempt(tmp_path, content)
    if form in ("text", "text of a float", "float", "list of one"):
        assert_equal(found, attempt(tmp_path, BASE)[0])
    elif isinstance(found, Annotations):
        assert np.isfinite(found.boxes).all()
        assert len(found.boxes) == 6 or any("boxes that are left out: 1 " in line for line in said)


@pytest.mark.parametrize("value", ["-12", -12, math.nan, "", "x", [], [1, 2], {}, True, 1e39, 10**400])
def test_an_area_that_is_none_is_the_boxs_and_counted(tmp_path, value):
    content = copy.deepcopy(BASE)
    content["annotations"][2]["area"] = value
    found, (said,) = attempt(tmp_path, content)
    assert found.area.tolist().count(48) == 1
    assert found.area.tolist().count(40) == 5
    assert "1 of 6 times area is no number from 0 on (the box's is taken): 3" in said


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, False), (1, True), ("0", False), ("1", True), ("false", False), ("True", True), (1.0, True), ([1], True)],
)
def test_crowds_are_those_that_say_so(tmp_path, value, expected):
    content = copy.deepcopy(BASE)
    content["annotations"][0]["iscrowd"] = value
    found, said = attempt(tmp_path, content)
    assert found.iscrowd.sum() == expected
    assert not said


@pytest.mark.parametrize("value", [math.nan, -1, 2, "", "no", [], [0, 1], {}, 0.5])
def test_a_crowd_that_is_neither_is_none_and_counted(tmp_path, value):
    content = copy.deepcopy(BASE)
    content["annotations"][4]["iscrowd"] = value
    found, (said,) = attempt(tmp_path, content)
    assert not found.iscrowd.any()
    assert "1 of 6 times iscrowd is neither 0 nor 1 (taken for 0): 5" in said


@pytest.mark.parametrize("key", ["width", "height"])
@pytest.mark.parametrize("value", [math.nan, -64, "", "wide", [], 64.5])
def test_a_size_that_is_none_is_unknown_and_counted(tmp_path, key, value):
    content = copy.deepcopy(BASE)
    content["images"][0][key] = value
    found, (said,) = attempt(tmp_path, content)
    assert (found.sizes[0] == 0).sum() == 1
    assert "1 of 3 times height or width is no number (taken as unknown): 1" in said


POLYGONS = [[[3, 4, 10, 4, 10, 9]], [[3, 4, 6, 5, 5, 9], [8, 6, 10, 6, 9, 7]], [["3", "4", "10", "4", "10", "9"]]]


@pytest.mark.parametrize("segmentation", POLYGONS)
@pytest.mark.parametrize("box", [[], None, ...])
def test_without_a_box_the_polygons_count(tmp_path, segmentation, box):
    content = copy.deepcopy(BASE)
    content["annotations"][0] |= {"segmentation": segmentation, "bbox": box}
    if box is ...:
        del content["annotations"][0]["bbox"]
    found, said = attempt(tmp_path, content)
    assert found.boxes[2].tolist() == [3, 4, 10, 9]  # of the second image, the first of its two
    assert not said


@pytest.mark.parametrize(
    "segmentation", [[], [[]], [[1, 2, 3, 4]], {"counts": "abc", "size": [4, 4]}, "x", [["a"] * 6]]
)
def test_neither_a_box_nor_a_polygon_is_counted(tmp_path, segmentation):
    content = copy.deepcopy(BASE)
    content["annotations"][0] |= {"segmentation": segmentation, "bbox": []}
    found, (said,) = attempt(tmp_path, content)
    assert len(found.boxes) == 5
    assert "left out: 1 without a box or a polygon, in 2.png" in said


UNITS = {
    "shares": (
        lambda x, y, w, h: [x / 64, y / 48, w / 64, h / 48],
        "6 of 6 boxes are smaller than a pixel, as if they",
    ),
    "corners": (lambda x, y, w, h: [x, y, x + w, y + h], "boxes reach out of their image, as if they were two corners"),
    "enlarged": (lambda x, y, w, h: [x * 20, y * 20, w * 20, h * 20], "boxes reach out of their image; a bbox is read"),
    "tiny": (lambda x, y, w, h: [x + 5, y, w / 30, h / 30], "6 of 6 boxes are smaller than a pixel; a bbox is read"),
}


@pytest.mark.parametrize("unit", UNITS)
def test_boxes_in_other_units_are_told(tmp_path, unit):
    content, (convert, message) = copy.deepcopy(BASE), UNITS[unit]
    for place, annotation in enumerate(content["annotations"]):
        annotation["bbox"] = convert(4 + 9 * place, 20, 10 + place % 3, 12)
    assert any(message in line for line in attempt(tmp_path, content)[1])


def test_boxes_in_pixels_are_not_taken_for_others(tmp_path):
    """Boxes of all sizes anywhere in their images, some half a pixel out of them, as rounding leaves them."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        content = copy.deepcopy(BASE)
        for annotation in content["annotations"]:
            low, high = np.sort(generator.uniform(-0.5, [[64.5, 48.5]] * 2, (2, 2)), axis=0)
            annotation["bbox"] = [*low.tolist(), *(high - low + 1).clip(max=[[64, 48]])[0].tolist()]
            annotation["bbox"][0] = min(annotation["bbox"][0], 64.9 - annotation["bbox"][2])
            annotation["bbox"][1] = min(annotation["bbox"][1], 48.9 - annotation["bbox"][3])
        assert not [line for line in attempt(tmp_path, content)[1] if "a bbox is read as" in line]


@pytest.mark.parametrize("digits", ["1" * 5000, "-" + "9" * 5000])
@pytest.mark.parametrize("key", ["image_id", "area", "iscrowd"])
def test_numbers_of_thousands_of_digits_are_refused(tmp_path, digits, key):
    content = copy.deepcopy(BASE)
    content["annotations"][0][key] = "DIGITS"
    found, _ = attempt(tmp_path, json.dumps(content).replace('"DIGITS"', digits))
    assert "no JSON at all" in found


def test_values():
    assert [whole(v) for v in (7, 7.0, "7", " 7 ", "7.0", "-7", 7.5, True, None, "x", [7])] == [
        7, 7, 7, 7, 7, -7, None, None, None, None, None,
    ]  # fmt: skip
    assert whole(2**63 - 1) == whole(str(2**63 - 1)) == 2**63 - 1
    assert whole(2**63) is whole(1e30) is whole(math.inf) is None
    assert [number(v) for v in (1, "1.5", [2], "1e400", -(10**400))] == [1, 1.5, 2, math.inf, -math.inf]
    assert all(math.isnan(number(v)) for v in (None, "x", [], [1, 2], {}, True, [[]]))
    assert [flag(v) for v in (None, 0, 1, "1", "FALSE", True, 2, math.nan, "")] == [
        False, False, True, True, False, True, None, None, None,
    ]  # fmt: skip
    assert outline([[0, 0, 4, 0, 4, 3]]) == [0, 0, 4, 3]
