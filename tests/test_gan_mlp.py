"""gan_mlp.py: sizes, both losses of G, and that neither network's step moves the other."""

import math

import pytest
import torch
from conftest import HERE, cartoons, load, step_of

gan = load(HERE / "gan_mlp.py")


def test_shapes_range_and_parameter_counts():
    G, D = gan.Generator(1, 28), gan.Discriminator(1, 28)
    assert sum(p.numel() for p in G.parameters()) == 2_503_984
    assert sum(p.numel() for p in D.parameters()) == 1_230_481
    images = G(torch.randn(5, gan.Z))
    assert images.shape == (5, 1, 28, 28) and images.abs().max() <= 1
    assert D(images).shape == (5,)


def test_losses_at_one_half():
    half = torch.zeros(3)
    assert gan.d_loss(half, half).item() == pytest.approx(2 * math.log(2))
    assert gan.g_loss(half).item() == pytest.approx(math.log(2))
    assert gan.g_loss(half, saturating=True).item() == pytest.approx(-math.log(2))


def test_the_saturating_loss_saturates():
    """At D(G(z)) = sigmoid(-10) one form's gradient is all but gone, the other's is near -1."""
    gradients = []
    for saturating in (True, False):
        logit = torch.tensor([-10.0], requires_grad=True)
        gan.g_loss(logit, saturating).backward()
        gradients.append(logit.grad.item())
    assert -1e-4 < gradients[0] < 0 and gradients[1] == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("flags", [[], ["--saturating"]])
def test_each_step_moves_its_own_network_only(monkeypatch, flags):
    data = cartoons(gan, 8, 16)
    run = step_of(gan, monkeypatch, ["--size", 16, "--batch", 4, *flags], data)
    G, D = run["parts"]["G"], run["parts"]["D"]
    for name, own, other in [("opt_D", D, G), ("opt_G", G, D)]:
        optimiser = run["parts"][name]

        def step(original=optimiser.step, own=own, other=other, name=name):
            before = [[p.detach().clone() for p in net.parameters()] for net in (own, other)]
            if name == "opt_D":
                assert all(p.grad is None for p in G.parameters())  # detach() kept it out
            original()
            assert not any(map(torch.equal, before[0], own.parameters()))
            assert all(map(torch.equal, before[1], other.parameters()))

        monkeypatch.setattr(optimiser, "step", step)
    run["step"]()


def test_z_is_uniform(monkeypatch):
    seen = []
    run = step_of(gan, monkeypatch, ["--size", 16], cartoons(gan, 8, 16))
    run["parts"]["G"].register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    run["draw"](1000)
    z = seen[0]
    assert -1 <= z.min() < -0.99 and 0.99 < z.max() <= 1 and abs(z.mean()) < 0.02
    assert z.std() == pytest.approx(1 / math.sqrt(3), abs=0.01)
