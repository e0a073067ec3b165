"""gan_mlp.py: sizes, both losses of G, and that neither network's step moves the other."""

import math

import pytest
import torch
from conftest import HERE, cartoons, load, run_train

gan = load(HERE / "gan_mlp.py")


def test_networks_have_fabbris_sizes_and_images_are_within_one():
    G, D = gan.Generator(1, 28), gan.Discriminator(1, 28)
    assert sum(p.numel() for p in G.parameters()) == 2_503_984
    assert sum(p.numel() for p in D.parameters()) == 1_230_481
    images = G(100 * torch.randn(5, gan.Z))
    assert images.shape == (5, 1, 28, 28) and images.abs().max() <= 1
    assert D(images).shape == (5,)


def test_losses_where_d_says_one_half():
    half = torch.zeros(3)
    assert gan.d_loss(half, half).item() == pytest.approx(2 * math.log(2))
    assert gan.g_loss(half).item() == pytest.approx(math.log(2))
    assert gan.g_loss(half, saturating=True).item() == pytest.approx(-math.log(2))


def test_the_saturating_loss_is_flat_where_d_sees_through_a_fake():
    """The docstring's slopes at logit -8: -D(G(z)) = -0.0003, and D(G(z)) - 1, nearly -1."""
    slopes = []
    for saturating in (True, False):
        logit = torch.tensor([-8.0], requires_grad=True)
        gan.g_loss(logit, saturating).backward()
        slopes.append(logit.grad.item())
    assert slopes == pytest.approx([-0.000335, 0.000335 - 1], abs=1e-6)


@pytest.mark.parametrize("flags", [[], ["--saturating"]])
def test_each_step_moves_its_own_network_only(monkeypatch, flags):
    order = []

    def watch(run):
        if run.logs:
            return
        G, D = run.to_save["G"], run.to_save["D"]
        for name, own, other in [("opt_D", D, G), ("opt_G", G, D)]:
            optimiser = run.to_save[name]

            def step(original=optimiser.step, own=own, other=other, name=name):
                before = [[p.detach().clone() for p in net.parameters()] for net in (own, other)]
                if name == "opt_D":
                    assert all(p.grad is None for p in G.parameters())  # detach() kept it out
                original()
                assert not any(map(torch.equal, before[0], own.parameters()))
                assert all(map(torch.equal, before[1], other.parameters()))
                order.append(name)

            optimiser.step = step

    data = cartoons(gan, 8, 16)
    run_train(gan, monkeypatch, ["--size", 16, "--batch", 4, *flags], data, watch=watch)
    assert order == ["opt_D", "opt_G"]


def test_the_flag_chooses_the_loss_of_g(monkeypatch):
    data, losses = cartoons(gan, 8, 16), []
    for flags in ([], ["--saturating"]):
        run = run_train(gan, monkeypatch, ["--size", 16, "--batch", 4, *flags], data)
        losses.append(run.logs[0]["loss_G"].item())
    assert losses[0] > 0 > losses[1]


def test_z_is_uniform(monkeypatch):
    run = run_train(gan, monkeypatch, ["--size", 16], cartoons(gan, 8, 16), n=0)
    seen = []
    run.to_save["G"].register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    run.draw(1000)
    z = seen[0]
    assert -1 <= z.min() < -0.99 and 0.99 < z.max() <= 1 and abs(z.mean()) < 0.02
    assert z.std() == pytest.approx(1 / math.sqrt(3), abs=0.01)
