"""Questions about rendered scenes, with the answers that are true of them, by kind; and arithmetic in words.

A scene is a list of objects (shape, colour, size, place), by number in the tables of
:mod:`datamodules.reading.colored_scenes`; its objects lie in different places. Rows and columns are those of the
places: a relation is asked of two that lie in different ones only, so that it is never close.

A question stands for a cell of its kind: what is to come equally often, its answer above all, so that little can be
known without the image. Pairs of shape and colour that are held out of training are not asked about in the scenes that
have none; where a scene has one, all questions are about it, where their kind lets them.
"""

import random
from collections.abc import Callable, Collection, Sequence
from itertools import permutations, product
from typing import NamedTuple

from datamodules.reading.colored_scenes import COLORS, PLACES, SHAPES, SIZES

Scene = Sequence[Sequence[int]]
Pairs = Collection[tuple[int, int]]

NAMES, TINTS, MEASURES, CORNERS = tuple(SHAPES), tuple(COLORS), tuple(SIZES), tuple(PLACES)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
PLURALS = tuple("crosses" if name == "cross" else f"{name}s" for name in NAMES)
DESCRIBE = "describe the image."
MORE = "which image has more objects, the first or the second?"
SIDES = ("left of", "right of", "above", "below")


class Question(NamedTuple):
    """A question that a scene answers.

    Attributes:
        cell: What of its kind it is one of.
        prompt: Without the place of the image.
        answer: The true one.
    """

    cell: str
    prompt: str
    answer: str


def color(scene: Scene, unseen: Pairs) -> list[Question]:
    """Colours of objects, told by their places, and by their shapes where these occur once."""
    found = []
    for k in _of_interest(scene, unseen):
        named, tint = scene[k][0], TINTS[scene[k][1]]
        ways = [_at(scene[k]), *[NAMES[named]] * (_count(scene, 0, named) == 1)]
        found += [Question(tint, f"what color is the {way}?", tint) for way in ways]
    return found


def shape(scene: Scene, unseen: Pairs) -> list[Question]:
    """Shapes of objects, told by their places, and by their colours where these occur once."""
    found = []
    for k in _of_interest(scene, unseen):
        name, tinted = NAMES[scene[k][0]], scene[k][1]
        ways = [_at(scene[k]), *[f"{TINTS[tinted]} object"] * (_count(scene, 1, tinted) == 1)]
        found += [Question(name, f"what shape is the {way}?", name) for way in ways]
    return found


def count(scene: Scene, unseen: Pairs) -> list[Question]:
    """Numbers of all objects, of those of a shape and of those of a colour, also of shapes and colours without one."""
    found = [("objects", "objects", len(scene))]
    of_interest = [scene[k] for k in _of_interest(scene, unseen)]
    for part, plurals in enumerate((PLURALS, [f"{tint} objects" for tint in TINTS])):
        for value, words in enumerate(plurals):
            number = _count(scene, part, value)
            if not number or any(each[part] == value for each in of_interest):
                found.append((("shapes", "colors")[part], words, number))
    return [
        Question(f"{NUMBERS[number]} {what}", f"how many {words} are there?", NUMBERS[number])
        for what, words, number in found
    ]


def relation(scene: Scene, unseen: Pairs) -> list[Question]:
    """Places of two shapes that occur once, one beside the other."""
    found = []
    for a, b in _both_once(scene, unseen):
        (row, column), (other_row, other_column) = (divmod(each[3], 2) for each in (a, b))
        truths = []
        if column != other_column:
            truths += [("left of", column < other_column), ("right of", column > other_column)]
        if row != other_row:
            truths += [("above", row < other_row), ("below", row > other_row)]
        found += [_yes_or_no("", f"is the {NAMES[a[0]]} {side} the {NAMES[b[0]]}?", true) for side, true in truths]
    return found


def comparison(scene: Scene, unseen: Pairs) -> list[Question]:
    """Comparisons of the sizes of two shapes that occur once, and of the numbers of two shapes, if they differ."""
    found = [
        _yes_or_no("size ", f"is the {NAMES[a[0]]} larger than the {NAMES[b[0]]}?", a[2] > b[2])
        for a, b in _both_once(scene, unseen)
        if a[2] != b[2]
    ]
    of_interest = {scene[k][0] for k in _of_interest(scene, unseen)}
    counts = [_count(scene, 0, value) for value in range(len(NAMES))]
    for a, b in permutations(range(len(NAMES)), 2):
        if counts[a] != counts[b] and of_interest & {a, b}:
            prompt = f"are there more {PLURALS[a]} than {PLURALS[b]}?"
            found.append(_yes_or_no("number ", prompt, counts[a] > counts[b]))
    return found


def existence(scene: Scene, unseen: Pairs) -> list[Question]:
    """Objects of a shape and a colour. A "hard" no: both occur, but not together.

    Pairs that are held out are asked about where the scene has one, and not otherwise: else a model would learn that
    there are none, or be asked of a scene that has one by pairs that it does not have alone.
    """
    there = {(each[0], each[1]) for each in scene}
    names, tints = {s for s, _ in there}, {c for _, c in there}
    strange = any(pair in unseen for pair in there)
    found = []
    for pair in product(range(len(NAMES)), range(len(TINTS))):
        if (pair in unseen) == strange:
            hard = "hard " if pair[0] in names and pair[1] in tints else "easy "
            prompt = f"is there a {TINTS[pair[1]]} {NAMES[pair[0]]}?"
            found.append(_yes_or_no("" if pair in there else hard, prompt, pair in there))
    return found


def caption(scene: Scene, unseen: Pairs) -> list[Question]:
    """The description of all objects, row by row from the left."""
    return [Question("", DESCRIBE, " and ".join(map(phrase, sorted(scene, key=lambda each: each[3]))))]


def phrase(told: Sequence[int]) -> str:
    """Words for all of an object: "a small red circle at the top left"."""
    return f"a {MEASURES[told[2]]} {TINTS[told[1]]} {NAMES[told[0]]} at the {CORNERS[told[3]]}"


KINDS: dict[str, Callable[[Scene, Pairs], list[Question]]] = {
    "color": color,
    "shape": shape,
    "count": count,
    "relation": relation,
    "comparison": comparison,
    "existence": existence,
    "caption": caption,
}
"""By kind, all questions that can be asked of a scene, where some pairs of shape and colour are held out."""


def cells(kind: str, most: int) -> dict[str, float]:
    """Cells of a kind, and the shares in which they are to come, together 1.

    Args:
        kind: One of :data:`KINDS`.
        most: Objects of a scene, at most.
    """
    if kind in ("color", "shape"):
        return _equal(TINTS if kind == "color" else NAMES)
    if kind == "count":
        counted = {f"{number} objects": 1 / 3 / most for number in NUMBERS[1 : most + 1]}
        numbers = NUMBERS[: most + 1]
        return counted | {f"{n} {of}": 1 / 3 / len(numbers) for of in ("shapes", "colors") for n in numbers}
    if kind == "existence":
        return {"yes": 1 / 2, "hard no": 1 / 4, "easy no": 1 / 4}
    if kind == "caption":
        return {"": 1.0}
    return _equal([f"{of}{said}" for of in (("",) if kind == "relation" else ("size ", "number ")) for said in YES_NO])


YES_NO = ("yes", "no")


def choices(kind: str, most: int) -> list[str] | None:
    """Possible answers of a kind, also of "images" and "text"; None where they are too many."""
    numbers = list(NUMBERS[: most + 1])
    found = {"color": list(TINTS), "shape": list(NAMES), "count": numbers, "images": ["first", "second"]}
    found |= {"text": list(NUMBERS)} | {kind: list(YES_NO) for kind in ("relation", "comparison", "existence")}
    return found.get(kind)


def sums() -> list[tuple[str, str]]:
    """Arithmetic in words, with answers from zero to eight: (question, answer) of all that is asked without images."""
    pairs = list(product(range(5), repeat=2))
    return [(f"what is {NUMBERS[a]} plus {NUMBERS[b]}?", NUMBERS[a + b]) for a, b in pairs] + [
        (f"what is {NUMBERS[a]} minus {NUMBERS[b]}?", NUMBERS[a - b]) for a, b in pairs if a >= b
    ]


def vocabulary(kinds: Collection[str], most: int, unseen: Pairs) -> list[str]:
    """All prompts and answers of some kinds; of captions each object's, and one of two, as longer ones are joined."""
    of_two = list(permutations(NAMES, 2))
    pairs = [pair for pair in product(range(len(NAMES)), range(len(TINTS))) if pair not in unseen]
    each = [phrase([*pair, *rest]) for pair, rest in product(pairs, product(range(len(MEASURES)), range(len(CORNERS))))]
    there = [f"object at the {corner}" for corner in CORNERS]
    by_kind = {
        "color": [f"what color is the {each}?" for each in (*NAMES, *there)],
        "shape": [f"what shape is the {each}?" for each in (*(f"{tint} object" for tint in TINTS), *there)],
        "count": [f"how many {of} are there?" for of in ("objects", *PLURALS, *(f"{tint} objects" for tint in TINTS))],
        "relation": [f"is the {a} {side} the {b}?" for (a, b), side in product(of_two, SIDES)],
        "comparison": [
            *(f"is the {a} larger than the {b}?" for a, b in of_two),
            *(f"are there more {a} than {b}?" for a, b in permutations(PLURALS, 2)),
        ],
        "existence": [f"is there a {TINTS[c]} {NAMES[s]}?" for s, c in pairs],
        "caption": [DESCRIBE, *each, " and ".join(each[:2])],
        "images": [MORE],
        "text": [prompt for prompt, _ in sums()],
    }
    return list(dict.fromkeys(text for kind in kinds for text in [*by_kind[kind], *(choices(kind, most) or [])]))


def draw_scene(
    rng: random.Random, objects: tuple[int, int], seen: Sequence[tuple[int, int]], unseen: Sequence[tuple[int, int]]
) -> list[list[int]]:
    """A scene of chance: so many objects, one to all of them alike in shape or in colour, so that there is to count.

    Args:
        rng: Where all chance comes from.
        objects: Fewest and most.
        seen: Pairs (shape, colour) that there may be.
        unseen: Where it is not empty, one object is of these pairs, and the others are of these or of ``seen``.
    """
    number, part, value = rng.randint(*objects), rng.randrange(2), rng.randrange(len(NAMES))
    alike_count = rng.randint(1, number)
    pool = [*seen, *unseen]
    alike = [pair for pair in pool if pair[part] == value]
    others = [pair for pair in pool if pair[part] != value]
    chosen = [rng.choice(alike if k < alike_count else others) for k in range(number)]
    if unseen:
        chosen[0] = rng.choice([pair for pair in alike if pair in unseen])
    rng.shuffle(chosen)
    places = rng.sample(range(len(CORNERS)), number)
    return [[*pair, rng.randrange(len(MEASURES)), place] for pair, place in zip(chosen, places, strict=True)]


def _of_interest(scene: Scene, unseen: Pairs) -> list[int]:
    """Objects of pairs that are held out; all, if there are none."""
    every = range(len(scene))
    return [k for k in every if (scene[k][0], scene[k][1]) in unseen] or list(every)


def _at(told: Sequence[int]) -> str:
    return f"object at the {CORNERS[told[3]]}"


def _count(scene: Scene, part: int, value: int) -> int:
    return sum(each[part] == value for each in scene)


def _both_once(scene: Scene, unseen: Pairs) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Two objects in either order, of shapes that occur once, one of them of interest."""
    once = [k for k in range(len(scene)) if _count(scene, 0, scene[k][0]) == 1]
    of_interest = {*_of_interest(scene, unseen)}
    return [(scene[a], scene[b]) for a, b in permutations(once, 2) if of_interest & {a, b}]


def _yes_or_no(cell: str, prompt: str, true: bool) -> Question:
    answer = YES_NO[not true]
    return Question(cell + answer, prompt, answer)


def _equal(names: Sequence[str]) -> dict[str, float]:
    return dict.fromkeys(names, 1 / len(names))
