"""wgan.py: signs, clipping before the first and after every step of the critic, no momentum."""

import pytest
import torch
from conftest import HERE, call, cartoons, load, run_train
from torch import nn

wgan = load(HERE / "wgan.py")


def run_wgan(monkeypatch, *flags, watch=lambda run: None):
    flags = ["--size", 16, "--batch", 4, "--width", 4, *flags]
    return run_train(wgan, monkeypatch, flags, cartoons(wgan, 16, 16), watch=watch)


def once(prepare):
    """A watch() that acts before the first step alone."""
    return lambda run: None if run.logs else prepare(run)


def largest(net):
    return max(p.abs().max().item() for p in net.parameters())


def test_losses_by_hand():
    real, fake = torch.tensor([3.0, 5.0]), torch.tensor([1.0, -2.0])
    assert wgan.d_loss(real, fake) == -0.5 - 4 and wgan.g_loss(fake) == 0.5
    assert wgan.d_loss(real + 7, fake + 7).item() == pytest.approx(-4.5)  # only gaps count


def test_the_estimate_of_a_known_distance():
    """Point masses at 0 (real) and 3 (fake), a linear critic with |w| <= c: W = 3 c."""
    c, critic = 0.01, nn.Linear(1, 1)
    optimiser = torch.optim.RMSprop(critic.parameters(), lr=5e-5)
    for _ in range(500):
        loss = wgan.d_loss(critic(torch.zeros(4, 1)), critic(torch.full((4, 1), 3.0)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        wgan.clip(critic, c)
    assert -loss.item() == pytest.approx(3 * c, rel=1e-3)


def test_clipping_includes_batchnorm_and_keeps_what_is_small():
    D = wgan.Discriminator(3, 16, 4)
    with torch.no_grad():
        D[0].weight.fill_(0.004)
        D[2].weight.fill_(-0.3)
    wgan.clip(D, 0.01)
    norm = next(layer for layer in D if isinstance(layer, nn.BatchNorm2d))
    assert (D[0].weight == 0.004).all() and (D[2].weight == -0.01).all()
    assert (norm.weight == 0.01).all() and (norm.running_var == 1).all()


def test_the_critic_is_clipped_at_every_pass_from_the_first_one_on(monkeypatch):
    """RMSprop would remember the first gradient of an unclipped critic for a thousand steps."""
    seen = []

    def prepare(run):
        D = run.to_save["D"]
        D.register_forward_pre_hook(lambda *_: seen.append(largest(D)))

    run = run_wgan(monkeypatch, "--clip", 0.02, watch=once(prepare))
    assert len(seen) == 2 * 5 + 1 and max(seen) <= 0.02 + 1e-9
    assert largest(run.to_save["D"]) <= 0.02 + 1e-9 and largest(run.to_save["G"]) > 0.02


def test_the_critics_steps_send_no_gradient_into_g(monkeypatch):
    arrived = []

    def prepare(run):
        next(run.to_save["G"].parameters()).register_hook(lambda grad: arrived.append(1))

    run_wgan(monkeypatch, watch=once(prepare))
    assert len(arrived) == 1  # of G's own step


@pytest.mark.parametrize("steps", [1, 5])
def test_critic_steps_on_new_images_then_one_step_of_g_with_new_z(monkeypatch, steps):
    calls = []

    def prepare(run):
        for name in ("opt_G", "opt_D"):
            optimiser = run.to_save[name]
            optimiser.step = lambda f=optimiser.step, name=name: (calls.append(name), f())
        run.to_save["G"].register_forward_hook(lambda *_: calls.append("z"))

    sample = wgan.sample_batch
    monkeypatch.setattr(wgan, "sample_batch", lambda *args: (calls.append("x"), sample(*args))[1])
    run_wgan(monkeypatch, "--critic-steps", steps, watch=once(prepare))
    assert calls == ["x", "z", "opt_D"] * steps + ["z", "opt_G"]


def test_the_papers_settings_rmsprop_without_momentum(monkeypatch):
    run = run_train(wgan, monkeypatch, ["--data", "mnist", "--size", 16], cartoons(wgan, 8, 16), 0)
    for name in ("opt_G", "opt_D"):
        assert type(run.to_save[name]) is torch.optim.RMSprop
        group = run.to_save[name].param_groups[0]
        assert (group["lr"], group["alpha"], group["momentum"]) == (5e-5, 0.99, 0)
    args = run.args
    assert (args.clip, args.critic_steps, args.batch, args.width) == (0.01, 5, 64, 64)


def test_the_critic_widens_the_gap_and_g_raises_the_scores_of_its_fakes(monkeypatch):
    gaps, scores = [], []

    def prepare(run):
        G, D = run.to_save["G"], run.to_save["D"]
        real, z = cartoons(wgan, 16, 16).images / 127.5 - 1, torch.randn(16, wgan.Z)

        @torch.no_grad()
        def measure(name):
            score = D(G(z)).mean().item()
            gaps.append(D(real).mean().item() - score) if name == "opt_D" else scores.append(score)

        for name in ("opt_G", "opt_D"):
            optimiser = run.to_save[name]
            optimiser.step = lambda f=optimiser.step, name=name: (measure(name), f(), measure(name))

    run = run_wgan(monkeypatch, "--lr", 1e-4, "--critic-steps", 1, watch=once(prepare))
    assert gaps[1] > gaps[0] and scores[1] > scores[0]
    assert run.logs[0]["W"] == -run.logs[0]["loss_D"]


@pytest.mark.parametrize("flags", ["--clip x", "--critic-steps 2.5"])
def test_own_flags_refuse_what_is_no_number(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(wgan, *flags.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not any(tmp_path.iterdir())
