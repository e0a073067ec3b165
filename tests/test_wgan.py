"""wgan.py: signs, clipping after every critic step, no momentum, how often who is trained."""

import pytest
import torch
from conftest import HERE, call, cartoons, load, step_of
from torch import nn

wgan = load(HERE / "wgan.py")
FLAGS = ["--size", 16, "--batch", 4, "--width", 4]


def build(monkeypatch, *flags):
    return step_of(wgan, monkeypatch, [*FLAGS, *flags], cartoons(wgan, 16, 16))


def test_losses_by_hand():
    real, fake = torch.tensor([3.0, 5.0]), torch.tensor([1.0, -2.0])
    assert wgan.d_loss(real, fake) == -0.5 - 4 and wgan.g_loss(fake) == 0.5
    assert wgan.d_loss(real + 7, fake + 7).item() == pytest.approx(-4.5)  # only gaps count


def test_the_estimate_of_a_known_distance():
    """Point masses at 0 (real) and 3 (fake), a linear critic with |w| <= c: W = 3 c."""
    c, critic = 0.01, nn.Linear(1, 1)
    optimiser = torch.optim.RMSprop(critic.parameters(), lr=5e-5)
    for _ in range(1000):
        loss = wgan.d_loss(critic(torch.zeros(4, 1)), critic(torch.full((4, 1), 3.0)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for p in critic.parameters():
                p.clamp_(-c, c)
    assert -loss.item() == pytest.approx(3 * c, rel=1e-3)


def test_every_weight_of_the_critic_is_clipped_when_anybody_uses_it(monkeypatch):
    """At each pass through D but the very first: so the clip comes after the critic's step."""
    run = build(monkeypatch, "--clip", 0.02)
    D, largest = run["parts"]["D"], []
    D.register_forward_pre_hook(
        lambda *_: largest.append(max(p.abs().max().item() for p in D.parameters())))
    run["step"]()
    assert largest[0] > 0.02 and len(largest) == 2 * 5 + 1
    assert max(largest[2:]) <= 0.02 + 1e-9
    assert max(p.abs().max() for p in D.parameters()) <= 0.02 + 1e-9
    assert max(p.abs().max() for p in run["parts"]["G"].parameters()) > 0.02


@pytest.mark.parametrize("critic", [1, 5])
def test_critic_steps_on_new_images_then_one_g_step(monkeypatch, critic):
    run = build(monkeypatch, "--critic", critic)
    calls, batches = [], []
    for name in ("opt_G", "opt_D"):
        optimiser = run["parts"][name]
        monkeypatch.setattr(
            optimiser, "step", lambda f=optimiser.step, name=name: (calls.append(name), f()))
    sample = wgan.sample_batch
    monkeypatch.setattr(
        wgan, "sample_batch", lambda *args: (batches.append(1), sample(*args))[1])
    run["step"]()
    assert calls == ["opt_D"] * critic + ["opt_G"] and len(batches) == critic


def test_rmsprop_without_momentum(monkeypatch):
    run = build(monkeypatch, "--data", "mnist")
    for name in ("opt_G", "opt_D"):
        optimiser = run["parts"][name]
        assert type(optimiser) is torch.optim.RMSprop
        group = optimiser.param_groups[0]
        assert (group["lr"], group["alpha"], group["momentum"]) == (5e-5, 0.99, 0)
    assert run["args"].clip == 0.01 and run["args"].critic == 5


def test_signs_in_the_step(monkeypatch):
    """The critic's step widens the gap real - fake; G's step raises the critic's score of fakes."""
    run = build(monkeypatch, "--lr", 1e-4, "--critic", 1)
    G, D = run["parts"]["G"], run["parts"]["D"]
    data = cartoons(wgan, 16, 16)
    real, z = (data.images / 127.5 - 1), torch.randn(16, wgan.Z)

    def gap():
        with torch.no_grad():
            return (D(real).mean() - D(G(z)).mean()).item()

    with torch.no_grad():
        for p in D.parameters():
            p.clamp_(-0.01, 0.01)
    original, gaps = run["parts"]["opt_D"].step, []
    monkeypatch.setattr(run["parts"]["opt_D"], "step",
                        lambda: (gaps.append(gap()), original(), gaps.append(gap())))
    score = []
    g_step = run["parts"]["opt_G"].step

    def fakes():
        with torch.no_grad():
            return D(G(z)).mean().item()

    monkeypatch.setattr(run["parts"]["opt_G"], "step",
                        lambda: (score.append(fakes()), g_step(), score.append(fakes())))
    log = run["step"]()
    assert gaps[1] > gaps[0] and score[1] > score[0]
    assert log["W"] == -log["loss_D"]


@pytest.mark.parametrize(
    "flags", ["--clip nan", "--clip -1", "--clip x", "--critic 0", "--critic 2.5"])
def test_own_flags_refuse_nonsense(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(wgan, *flags.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not any(tmp_path.iterdir())
