"""acgan.py: the second head, its two losses, and drawing what was asked for."""

import math

import numpy as np
import pytest
import torch
from conftest import HERE, call, cartoons, load, step_of
from PIL import Image

acgan = load(HERE / "acgan.py")
sngan = load(HERE / "sngan.py")
TINY = ["--size", 16, "--batch", 8, "--width", 8, "--device", "cpu"]


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_and_shapes():
    """40 attributes: both heads read the same 129 features."""
    G, D = acgan.Generator(3, 64, 128, 40), acgan.Discriminator(3, 64, 128, 40)
    assert (count(G), count(D)) == (1_401_347, 798_418)
    assert (D.source.in_features, D.source.out_features) == (129, 1)
    assert (D.labels.in_features, D.labels.out_features) == (129, 40)
    assert D.features[:8](torch.rand(2, 3, 64, 64)).shape == (2, 128, 4, 4)
    logits, labels = D(G(torch.randn(2, acgan.Z), torch.ones(2, 40)))
    assert logits.shape == (2,) and labels.shape == (2, 40)


def test_the_label_changes_the_picture():
    torch.manual_seed(0)
    G = acgan.Generator(3, 16, 8, 3)
    z = torch.randn(1, acgan.Z)
    images = G(z.expand(3, -1), torch.eye(3))
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert (images[:1] - G(-z, torch.eye(3)[:1])).abs().max() > 1e-3


@pytest.mark.parametrize("k", [5, 9, 15])
def test_sigmoids_can_be_right_and_a_softmax_cannot(k):
    """What is wrong with the softmax over 40 attributes that Espis and Potrimba print."""
    labels = torch.zeros(1, 40)
    labels[0, :k] = 1
    sure = 20 * (2 * labels - 1)
    assert acgan.label_loss(sure, labels, one_hot=False) < 0.01
    best = torch.nn.functional.binary_cross_entropy(sure.softmax(1), labels)
    floor = k * math.log(k) / 40
    assert best == pytest.approx(floor, abs=1e-3)
    assert {5: 0.20, 9: 0.49, 15: 1.02}[k] == round(floor, 2)


def test_label_loss_and_accuracy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)]])  # sigmoids 1/2, 3/4; softmax 1/4, 3/4
    labels = torch.tensor([[0.0, 1.0]])
    by_sigmoids = (math.log(2) - math.log(3 / 4)) / 2
    assert acgan.label_loss(logits, labels, one_hot=False) == pytest.approx(by_sigmoids)
    assert acgan.label_loss(logits, labels, one_hot=True) == pytest.approx(-math.log(3 / 4))
    logits = torch.tensor([[2.0, 1.0], [-1.0, -2.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert acgan.accuracy(logits, labels, one_hot=False) == 0.5
    assert acgan.accuracy(logits, labels, one_hot=True) == 0.5
    assert acgan.accuracy(logits[:1], labels[:1], one_hot=False) == 0.5
    assert acgan.accuracy(logits[:1], labels[:1], one_hot=True) == 1


def test_without_aux_the_losses_are_those_of_sngan():
    real, fake = torch.randn(7), torch.randn(7)
    assert acgan.d_loss(real, fake) == sngan.d_loss(real, fake)
    assert acgan.g_loss(fake) == sngan.g_loss(fake)


def test_aux_weighs_the_labels(monkeypatch):
    """loss_D and loss_G at --aux 0, 1, 3 lie on a line; at 0 nothing reaches the second head."""
    losses = {}
    for aux in (0, 1, 3):
        torch.manual_seed(0)
        data = cartoons(acgan, 16, 16)
        caught = step_of(acgan, monkeypatch, [*TINY, "--aux", aux, "--lr", 1e-12], data)
        head = caught["parts"]["D"].labels
        losses[aux] = {k: v.item() for k, v in caught["step"]().items()}
        assert (head.weight.grad.abs().max() > 0) == (aux > 0)
    for name in ("loss_D", "loss_G"):
        by_one = losses[1][name] - losses[0][name]
        assert by_one > 0.3 * (2 if name == "loss_D" else 1)
        assert losses[3][name] - losses[0][name] == pytest.approx(3 * by_one, rel=1e-3)


def test_each_image_is_judged_by_its_own_label(monkeypatch):
    """The labels compared with D's on fakes are those that G got; on reals, those of the data."""
    data = cartoons(acgan, 16, 16)
    caught = step_of(acgan, monkeypatch, TINY, data)
    given, compared = [], []
    caught["parts"]["G"].register_forward_hook(lambda net, inputs, made: given.append(inputs[1]))
    label_loss = acgan.label_loss
    monkeypatch.setattr(acgan, "label_loss", lambda logits, labels, one_hot: (
        compared.append(labels), label_loss(logits, labels, one_hot))[1])
    caught["step"]()
    (drawn_for,), (real, fake, fake_again) = given, compared
    assert torch.equal(fake, drawn_for) and torch.equal(fake_again, drawn_for)
    assert not torch.equal(real, drawn_for)
    rows = {tuple(row.tolist()) for row in data.labels}
    assert {tuple(row.int().tolist()) for row in drawn_for} <= rows


def test_grid_and_guess(monkeypatch):
    """Attributes: a column without any, then one each. Classes: one each."""
    many = cartoons(acgan, 16, 16)
    one = acgan.Data(many.images, torch.eye(4, dtype=torch.uint8)[[0] * 7 + [1] * 9], list("abcd"))
    seen = []
    for data, columns, guess in ((many, 6, None), (one, 4, 9 / 16)):
        caught = step_of(acgan, monkeypatch, TINY, data)
        caught["parts"]["G"].register_forward_hook(lambda net, given, made: seen.append(given))
        with acgan.preview(caught["args"], caught["parts"]["G"]):
            assert caught["grid"]().shape == (8, columns, 3, 16, 16)
        z, y = (x.unflatten(0, (8, columns)) for x in seen.pop())
        assert torch.equal(z, z[:, :1].expand_as(z)) and not torch.equal(z[0], z[1])
        assert torch.equal(y[0], y[7]) and torch.equal(y[0, -4:], torch.eye(y.shape[2])[-4:])
        assert (y[0, 0].sum() == 0) == (data is many)
        share = data.labels.float().mean(0)
        guess = guess or torch.maximum(share, 1 - share).mean().item()
        assert caught["measure"]() == {"acc(guess)": pytest.approx(guess)}


def test_attributes_choose_what_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(acgan, *TINY, "--steps", 1, "--out", "run") == 0
    seen, forward = [], acgan.Generator.forward
    monkeypatch.setattr(acgan.Generator, "forward", lambda self, z, labels: (
        seen.append(labels), forward(self, z, labels))[1])
    generate = ["--out", "run", "--generate", 5]
    assert call(acgan, *generate, "--attributes", "Smiling,Blond_Hair") == 0
    assert torch.equal(seen.pop(), torch.tensor([[1.0, 0, 0, 1, 0]]).expand(5, 5))
    chosen = np.asarray(Image.open("run/generated/00000.png"))
    assert call(acgan, *generate) == 0
    rows = {tuple(row.tolist()) for row in cartoons(acgan, 2560, 16).labels}
    assert {tuple(row.int().tolist()) for row in seen.pop()} <= rows
    assert not np.array_equal(chosen, np.asarray(Image.open("run/generated/00000.png")))
    capsys.readouterr()


@pytest.mark.parametrize(("flags", "expected"), [
    (["--attributes", "Smiling"], "--attributes goes with --generate"),
    (["--attributes", "Smiling,Sad"], "--attributes Sad: there are Blond_Hair, Eyeglasses"),
    (["--aux", "-1"], "--aux"),
    (["--data", "flat"], "flat has no labels"),
    (["--data", "classes", "--attributes", "a,b"], "an image has one of a, b"),
])
def test_bad_input(tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    for i in range(16):
        for folder in (tmp_path / "flat", tmp_path / "classes" / "ab"[i % 2]):
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (15 * i, 0, 0)).save(folder / f"{i}.png")
    assert call(acgan, *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error and not (tmp_path / "runs").exists()
