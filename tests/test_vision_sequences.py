"""Token sequences of conversations: worked by hand, and the same however they are laid out."""

import pytest
import torch

from zoo.common.tokenizers import ByteTokenizer, WordTokenizer
from zoo.vision_language.sequences import (
    PLACE,
    Format,
    Tokens,
    check_format,
    cut,
    first_fit,
    inner_ids,
    lay_out,
    sequence,
    with_images,
)

WORDS = ["what", "color", "is", "it", "?", "red", "and", "this", "blue", "circle", ":", "<i>", "q"]
TOKENIZER = WordTokenizer(32, WORDS)
START, END = TOKENIZER.start_id, TOKENIZER.end_id


def ids(text: str) -> list[int]:
    return inner_ids(TOKENIZER, text)


def test_a_conversation_of_two_turns_by_hand():
    turns = [("<image> what color is it?", "red circle"), ("and this <image>?", "blue")]
    made = sequence(TOKENIZER, turns, [3, 2], Format())
    asked, said = [PLACE] * 3 + ids("what color is it ?"), [*ids("red circle"), END]
    more, end = ids("and this") + [PLACE] * 2 + ids("?"), [*ids("blue"), END]
    assert made.ids == [START, *asked, *said, *more, *end]
    expected = [False] * (1 + len(asked)) + [True] * 3 + [False] * len(more) + [True] * 2
    assert made.learned == expected
    asked_alone = sequence(TOKENIZER, turns, [3, 2], Format(), asked=True)
    assert asked_alone.ids == made.ids[: -len(end)]


def test_targets_stand_one_place_before_their_tokens():
    made = sequence(TOKENIZER, [("what ?", "red blue")], [], Format())
    rows = lay_out([made], pad_id=0)
    assert rows.tokens[0, : len(made.ids)].tolist() == [START, *ids("what ? red blue"), END]
    assert rows.read.tolist() == [2, 3, 4]  # "?" predicts red, red predicts blue, blue predicts the end
    assert rows.targets.tolist() == [*ids("red blue"), END]
    assert rows.tokens.flatten()[rows.read + 1].tolist() == rows.targets.tolist()


def test_prompts_images_and_padding_are_not_learned():
    made = [
        sequence(TOKENIZER, [("<image> what ?", "red")], [4], Format()),
        sequence(TOKENIZER, [("what color is it ?", "blue circle")], [], Format()),
    ]
    rows = lay_out(made, pad_id=0)
    assert rows.targets.tolist() == [*ids("red"), END, *ids("blue circle"), END]
    assert rows.owners.tolist() == [0, 0, 1, 1, 1]
    assert rows.samples == 2
    assert rows.tokens.shape[1] % 8 == 0
    assert rows.positions is None
    assert rows.segments is None


def test_text_around_turns_and_images():
    layout = Format(turn="q {} :", system="and ", before_image="<i>", behind_image="circle")
    tokenizer = WordTokenizer(32, [*WORDS[:11], "<", "i", ">", "q"])
    with pytest.raises(ValueError, match=r"before_image is '<i>', 3 tokens of WordTokenizer"):
        check_format(layout, tokenizer)
    layout = layout._replace(before_image="this")
    check_format(layout, TOKENIZER)
    made = sequence(TOKENIZER, [("<image> what ?", "red"), ("what", "it")], [2], layout)
    first = [*ids("and q this"), PLACE, PLACE, *ids("circle what ? : red"), END]
    assert made.ids == [START, *first, *ids("q what : it"), END]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Format(turn="USER: "), "turn is 'USER: ': expected one place {} for the prompt"),
        (Format(turn="{} {}"), "expected one place"),
        (Format(system="<image>"), "stands in turn or system"),
        (Format(before_image="zebra"), "before_image is 'zebra', a token that WordTokenizer does not have"),
        (Format(behind_image="what color"), "behind_image is 'what color', 2 tokens"),
    ],
)
def test_formats_that_no_tokeniser_could_read_are_refused(layout, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        check_format(layout, TOKENIZER)


def test_bytes_have_a_token_for_any_one_character_around_an_image():
    check_format(Format(before_image="[", behind_image="]"), ByteTokenizer())
    with pytest.raises(ValueError, match="7 tokens of ByteTokenizer"):
        check_format(Format(before_image="<start>"), ByteTokenizer())


def random_tokens(count: int, seed: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(2, 14, (), generator=generator))
        answer = int(torch.randint(1, length, (), generator=generator))
        numbers = torch.randint(5, 18, (length,), generator=generator).tolist()
        numbers[0] = PLACE if length > 3 else numbers[0]
        made.append(Tokens(numbers, [False] * (length - answer) + [True] * answer))
    return made


@pytest.mark.parametrize("seed", range(4))
def test_packed_rows_hold_the_same_tokens_at_the_same_positions(seed):
    made = random_tokens(9, seed)
    alone, packed = lay_out(made, pad_id=0), lay_out(made, pad_id=0, row_length=20)
    assert len(packed.tokens) < len(alone.tokens)
    assert packed.tokens.shape[1] <= 20
    assert packed.targets.tolist() == alone.targets.tolist()
    assert packed.owners.tolist() == alone.owners.tolist()
    assert len(packed.places) == len(alone.places) == sum(i == PLACE for ids, _ in made for i in ids)
    positions, segments = packed.positions.flatten(), packed.segments.flatten()
    assert positions[packed.read].tolist() == (alone.read % alone.tokens.shape[1]).tolist()
    assert (segments[packed.read] == segments[packed.read + 1]).all()  # what is predicted is of the same sample
    for row, numbers in zip(packed.segments.tolist(), packed.positions.tolist(), strict=True):
        inside = [(segment, place) for segment, place in zip(row, numbers, strict=True) if segment]
        assert inside == sorted(inside)
        assert len(set(inside)) == len(inside)


def test_first_fit_by_hand():
    made = [Tokens([5] * length, [True] * length) for length in (6, 5, 4, 3, 7)]
    assert first_fit(made, 10) == [[0, 2], [1, 3], [4]]


def test_a_cut_sequence_keeps_its_first_tokens():
    made = sequence(TOKENIZER, [("<image> what ?", "red")], [4], Format())
    assert cut(made, 6).ids == [START, PLACE, PLACE, PLACE, PLACE, *ids("what")]
    rows = lay_out([cut(made, 6)], pad_id=0)
    assert len(rows.targets) == 0


def test_image_tokens_go_to_their_places_and_nowhere_else():
    made = [
        sequence(TOKENIZER, [("<image> what <image>", "red")], [2, 1], Format()),
        sequence(TOKENIZER, [("is it", "blue")], [], Format()),
        sequence(TOKENIZER, [("what <image>", "red")], [3], Format()),
    ]
    features = torch.arange(1.0, 7.0)[:, None].expand(6, 3)
    for row_length in (None, 12, 40):
        rows = lay_out(made, pad_id=0, row_length=row_length)
        mixed = with_images(torch.zeros(*rows.tokens.shape, 3), rows.places, features)
        flat = mixed.flatten(0, 1)[:, 0]
        assert flat[flat > 0].sort().values.tolist() == [1, 2, 3, 4, 5, 6]
        assert flat[rows.places].tolist() == [1, 2, 3, 4, 5, 6]  # in the order of the batch's images
