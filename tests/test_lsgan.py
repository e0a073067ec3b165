"""lsgan.py: least squares by hand, dcgan's networks to the byte, three targets."""

import ast

import pytest
import torch
from conftest import HERE, call, cartoons, load, run_train

lsgan = load(HERE / "lsgan.py")


def network_code(name):
    """The networks of a script without their docstrings."""
    tree = ast.parse((HERE / f"{name}.py").read_text())
    nodes = [node for node in tree.body if getattr(node, "name", "") in
             ("Generator", "Discriminator", "init_weights")]
    for node in nodes:
        node.body = node.body[1:]
    return [ast.dump(node) for node in nodes]


@pytest.mark.parametrize("name", ["lsgan", "wgan"])
def test_networks_are_those_of_dcgan(name):
    assert network_code(name) == network_code("dcgan") and len(network_code(name)) == 3


def test_losses_by_hand():
    ones, zeros, half = torch.ones(3), torch.zeros(3), torch.full((3,), 0.5)
    assert lsgan.d_loss(ones, zeros, 0, 1) == 0
    assert lsgan.d_loss(half, half, 0, 1) == 0.25 and lsgan.g_loss(half, 1) == 0.125
    assert lsgan.d_loss(half, half, -1, 1) == pytest.approx((0.25 + 2.25) / 2)
    assert lsgan.g_loss(half, 0) == 0.125


def test_it_is_the_mean_of_squares_and_not_the_square_of_a_mean():
    apart = torch.tensor([0.0, 2.0])  # their mean is right on the target
    assert lsgan.g_loss(apart, 1) == 0.5
    assert lsgan.d_loss(apart, torch.zeros(2), 0, 1) == 0.5


@pytest.mark.parametrize("score", [-5.0, 7.0])
def test_a_score_that_is_off_its_target_keeps_its_gradient(score):
    score = torch.tensor([score], requires_grad=True)
    lsgan.g_loss(score, 1).backward()
    assert score.grad == score - 1  # the logistic loss is flat at 7, and has -1 at -5


def test_scores_are_not_squashed():
    D = lsgan.Discriminator(3, 16, 8)
    with torch.no_grad():
        D[-2].weight.mul_(100)
    scores = D(torch.randn(32, 3, 16, 16))
    assert scores.min() < -1 and scores.max() > 2


def test_scores_begin_near_0(monkeypatch):
    """With dcgan's first weights, ten times larger, lsgan failed at 64 px."""
    flags = ["--size", 16, "--batch", 4, "--width", 16, "--lr", 1e-12]
    D = run_train(lsgan, monkeypatch, flags, cartoons(lsgan, 8, 16)).to_save["D"]
    assert D[-2].weight.std().item() == pytest.approx(0.002, rel=0.2)
    assert D[0].weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_labels_reach_the_losses(monkeypatch):
    seen = []
    monkeypatch.setattr(lsgan, "d_loss", lambda real, fake, *ab: (seen.append(ab), real.sum())[1])
    monkeypatch.setattr(lsgan, "g_loss", lambda fake, c: (seen.append(c), fake.sum())[1])
    flags = ["--size", 16, "--batch", 4, "--width", 4, "--labels", -1, 1, 0]
    run_train(lsgan, monkeypatch, flags, cartoons(lsgan, 8, 16))
    assert seen == [(-1, 1), 0]


def test_the_step_is_least_squares_on_real_and_fake_scores(monkeypatch):
    """The log of one step, from D's outputs by hand: real, fake, and the fakes after D's step."""
    scores = []

    def watch(run):
        run.to_save["D"].register_forward_hook(lambda net, _, out: scores.append(out.detach()))

    flags = ["--size", 16, "--batch", 4, "--width", 4]
    log = run_train(lsgan, monkeypatch, flags, cartoons(lsgan, 8, 16), watch=watch).logs[0]
    real, fake, improved = scores
    assert log["loss_D"].item() == pytest.approx(
        ((real - 1).square().mean() + fake.square().mean()).item() / 2)
    assert log["loss_G"].item() == pytest.approx((improved - 1).square().mean().item() / 2)
    assert (log["D(x)"], log["D(G(z))"]) == (real.mean(), fake.mean())


@pytest.mark.parametrize("labels", ["0", "0 1", "0 1 1 1", "a b c"])
def test_labels_are_three_numbers(labels, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(lsgan, "--labels", *labels.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not any(tmp_path.iterdir())
