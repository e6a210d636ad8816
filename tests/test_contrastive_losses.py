"""Contrastive losses: the values of their peers, worked answers, several positives, chunks, and what they refuse."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.losses import (
    SigmoidContrastiveLoss,
    SoftmaxContrastiveLoss,
    contrastive_sigmoid_loss,
    contrastive_softmax_loss,
    positive_pairs,
)

B, D = 64, 16
LOSSES = ("softmax", "sigmoid")


def vectors(rows: int = B, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images, texts, scale and bias."""
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(2, rows, D, dtype=torch.float64), dim=-1).to(dtype)
    found = [images, texts, torch.tensor([14.0], dtype=dtype), torch.tensor([-4.0], dtype=dtype)]
    return [each.requires_grad_() for each in found]


def some_keys(rows: int = B) -> list[tuple[Tensor, Tensor]]:
    """Two alternatives, equal captions and entailed ones; some captions say less than others."""
    torch.manual_seed(1)
    captions, facts = torch.randint(rows // 2, (rows, 1)), torch.randint(3, (rows, 2))
    claims = torch.where(torch.rand(rows, 2) < 0.3, -1, facts)
    return [(captions, captions), (facts, claims)]


def loss_of(name: str, given: list[Tensor], keys=(), **options) -> Tensor:
    if name == "softmax":
        return contrastive_softmax_loss(*given[:3], keys, **options)
    return contrastive_sigmoid_loss(*given, keys, **options)


def with_gradients(loss: Tensor, given: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, given, materialize_grads=True)
    return [loss.detach(), *gradients]


def by_hand(name: str, given: list[Tensor], keys) -> Tensor:
    """The definition, pair by pair."""
    images, texts, scale, bias = given
    n = len(images)
    positive = [[i == j for j in range(n)] for i in range(n)]
    for of_images, of_texts in keys:
        for i, known in enumerate(of_images.tolist()):
            for j, said in enumerate(of_texts.tolist()):
                positive[i][j] |= all(b in (-1, a) for a, b in zip(known, said, strict=True))
    positive = torch.tensor(positive)
    if name == "sigmoid":
        p = (scale * images @ texts.T + bias).sigmoid()
        return -torch.where(positive, p, 1 - p).log().sum() / n
    total = 0
    for p, q in (((scale * images @ texts.T).exp(), positive), ((scale * texts @ images.T).exp(), positive.T)):
        logarithms = (p / p.sum(1, keepdim=True)).log()
        total = total - sum(row[chosen].mean() for row, chosen in zip(logarithms, q, strict=True))
    return total / (2 * n)


@pytest.mark.parametrize(("name", "value"), [("softmax", math.log1p(math.exp(-1))), ("sigmoid", 1.0064088)])
def test_two_pairs_at_right_angles(name, value):
    """Rows of logits are (1, 0): log(1 + 1/e) for the own text, and for the sigmoid log 2 for the other."""
    given = [torch.eye(2), torch.eye(2), 1.0, 0.0]
    assert loss_of(name, given).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("name", "value"), [("softmax", math.log1p(math.e) - 0.5), ("sigmoid", 1.0064088)])
def test_two_pairs_whose_texts_are_true_of_both(name, value):
    """The cross-entropy with (1/2, 1/2) is log(1 + e) - 1/2; the sigmoid of 0 is as far from true as from false."""
    same = torch.zeros(2, 1, dtype=torch.long)
    given = [torch.eye(2), torch.eye(2), 1.0, 0.0]
    assert loss_of(name, given, [(same, same)]).item() == pytest.approx(value, abs=1e-6)


def test_vectors_that_are_all_the_same_have_the_logarithm_of_their_number():
    same = F.normalize(torch.ones(37, D), dim=1)
    assert contrastive_softmax_loss(same, same, 100.0).item() == pytest.approx(math.log(37), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_open_clips_losses(name):
    peer = pytest.importorskip("open_clip.loss")
    given = vectors()
    theirs = peer.ClipLoss()(*given[:3]) if name == "softmax" else peer.SigLipLoss()(*given)
    for ours, other in zip(with_gradients(loss_of(name, given), given), with_gradients(theirs, given), strict=True):
        assert (ours - other).abs().max() <= 1e-14


@pytest.mark.parametrize("name", LOSSES)
def test_hugging_faces_losses(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = small | {"vocab_size": 9, "max_position_embeddings": 4, "projection_size": 8, "eos_token_id": 2}
    vision = small | {"image_size": 4, "patch_size": 2}
    kind = "CLIP" if name == "softmax" else "Siglip"
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, projection_dim=8)
    model = getattr(transformers, f"{kind}Model")(config).double()
    tokens, images = torch.randint(9, (8, 4)), torch.randn(8, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=images, return_loss=True)
        given = [found.image_embeds, found.text_embeds, model.logit_scale.exp()]
        given += [] if name == "softmax" else [model.logit_bias]
        assert (loss_of(name, given) - found.loss).abs() <= 1e-14


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("keys", [(), some_keys()[:1], some_keys()[1:], some_keys()])
def test_the_definition_pair_by_pair(name, keys):
    given = vectors()
    expected = with_gradients(by_hand(name, given, keys), given)
    for ours, other in zip(with_gradients(loss_of(name, given, keys), given), expected, strict=True):
        assert torch.allclose(ours, other, rtol=1e-10, atol=1e-12)


def test_a_text_is_positive_where_the_image_has_all_that_it_says():
    images = torch.tensor([[1, 2], [1, 3], [-1, 2]])
    texts = torch.tensor([[1, 2], [1, -1], [-1, 2], [-1, -1], [3, 2]])
    expected = [[1, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 0]]
    assert positive_pairs(images, texts).long().tolist() == expected
    for others in (texts[:, :1], texts[:, 0], texts[:, None]):
        with pytest.raises(ValueError, match=r"image_keys are \(3, 2\) and text_keys \(5.*\): expected \(I, K\)"):
            positive_pairs(images, others)
    with pytest.raises(ValueError, match=r"text_keys \(5, 0\)"):
        positive_pairs(images[:, :0], texts[:, :0])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("keys", [(), some_keys()])
@pytest.mark.parametrize("chunk", [1, 7, B, 10 * B])
def test_chunks_change_nothing(name, keys, chunk):
    given = vectors()
    expected = with_gradients(loss_of(name, given, keys), given)
    for ours, whole in zip(with_gradients(loss_of(name, given, keys, chunk=chunk), given), expected, strict=True):
        assert torch.allclose(ours, whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("keys", [(), some_keys()])
def test_chunks_keep_vectors_and_keys_alone(name, keys):
    def kept(**options) -> int:
        """Bytes of what the loss keeps for the backward pass, beside what it was given."""
        given, storages = vectors(), {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(name, given, keys, **options)
        for each in given:
            storages.pop(each.untyped_storage().data_ptr(), None)
        loss.backward()
        return sum(storages.values())

    assert kept() >= 8 * B * B
    assert kept(chunk=4) <= kept() / 10


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [None, 16])
def test_logits_are_float32_under_autocast(name, chunk):
    given = vectors(dtype=torch.float32)
    expected = with_gradients(loss_of(name, given, chunk=chunk), given)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(name, given, chunk=chunk)
    for ours, other in zip(with_gradients(loss, given), expected, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_read_as_float32(name):
    given = vectors(dtype=torch.bfloat16)
    loss = loss_of(name, given, some_keys(), chunk=16)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(name, [each.float() for each in given], some_keys(), chunk=16))
    assert {each.dtype for each in torch.autograd.grad(loss, given[:3])} == {torch.bfloat16}


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_and_tensors_of_one_entry_scale_alike(name):
    images, texts = vectors()[:2]
    kinds = [(14.0, -4.0), (torch.tensor(14.0), torch.tensor(-4.0)), (torch.tensor([14.0]), torch.tensor([-4.0]))]
    found = [loss_of(name, [images, texts, *numbers]) for numbers in kinds]
    assert all(loss.shape == () and torch.equal(loss, found[0]) for loss in found)


@pytest.mark.parametrize("name", LOSSES)
def test_the_module_is_the_function(name):
    given = vectors()
    module = SoftmaxContrastiveLoss(chunk=5) if name == "softmax" else SigmoidContrastiveLoss(chunk=5)
    found = module(*given[: 3 if name == "softmax" else 4], some_keys())
    assert torch.equal(found, loss_of(name, given, some_keys(), chunk=5))
    assert repr(module).endswith("(chunk=5, sync_dist=True)")
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_has_the_loss_and_its_gradients(name):
    given = vectors()
    for options in ({}, {"keys": some_keys(), "chunk": B // 2}):
        expected = with_gradients(loss_of(name, given, **options), given)
        program = torch.compile(partial(loss_of, name, given, **options), fullgraph=True, backend="aot_eager")
        for ours, eager in zip(with_gradients(program(), given), expected, strict=True):
            assert torch.allclose(ours, eager, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_single_pair_has_nothing_to_learn_from(name):
    given = vectors(1)
    with pytest.raises(ValueError, match="have 1 pairs: a contrastive loss needs 2 or more"):
        loss_of(name, given)
    with torch.no_grad():  # the last batch of an evaluation
        assert loss_of(name, given).isfinite()
        with pytest.raises(ValueError, match="have 0 pairs"):
            loss_of(name, vectors(0))


ONE = torch.zeros(3, 1, dtype=torch.long)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"texts": torch.rand(4, D)}, ValueError, r"images are \(3, 16\) and texts \(4, 16\): expected both"),
        ({"texts": torch.rand(3, 5)}, ValueError, r"texts \(3, 5\): expected both to be \(B, D\)"),
        ({"images": torch.rand(3, D, 1), "texts": torch.rand(3, D, 1)}, ValueError, r"images are \(3, 16, 1\)"),
        ({"images": torch.ones(3, D, dtype=torch.long)}, TypeError, "images is torch.int64"),
        ({"texts": torch.ones(3, D, dtype=torch.long)}, TypeError, "texts is torch.int64"),
        ({"scale": torch.ones(3)}, ValueError, r"scale is \(3,\): expected a number, or a tensor of one entry"),
        ({"keys": [(ONE, ONE), (ONE, ONE[:2])]}, ValueError, r"keys\[1\] are \(3, 1\) for the images and \(2, 1\) for"),
        ({"keys": [(ONE[:2], ONE[:2])]}, ValueError, r"expected both to be \(3, K\)"),
        ({"keys": [(ONE[:, :0], ONE[:, :0])]}, ValueError, r"keys\[0\] are \(3, 0\)"),
        ({"keys": [(ONE[:, 0], ONE[:, 0])]}, ValueError, r"keys\[0\] are \(3,\)"),
        ({"keys": [(ONE, ONE.float())]}, TypeError, r"keys\[0\] of the texts are torch.float32: expected whole"),
        ({"chunk": 0}, ValueError, "chunk is 0: expected 1 row or more"),
    ],
)
def test_what_is_refused(name, change, error, told):
    given = {"images": torch.rand(3, D), "texts": torch.rand(3, D), "scale": 1.0, "bias": 0.0, "keys": ()} | change
    if name == "softmax":
        given.pop("bias")
    with pytest.raises(error, match=told):
        {"softmax": contrastive_softmax_loss, "sigmoid": contrastive_sigmoid_loss}[name](**given)


def test_what_modules_and_biases_refuse():
    with pytest.raises(ValueError, match="chunk is -1"):
        SoftmaxContrastiveLoss(chunk=-1)
    with pytest.raises(ValueError, match=r"bias is \(2,\): expected a number"):
        contrastive_sigmoid_loss(torch.rand(2, D), torch.rand(2, D), 1.0, torch.zeros(2))
