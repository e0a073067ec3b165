"""What dcgan.py says of itself: sizes, initial weights, losses, one training step."""

import math

import pytest
import torch
from conftest import HERE, call, cartoons, load, run_train
from torch import nn

dcgan = load(HERE / "dcgan.py")


FLAGS = ["--size", 16, "--batch", 4, "--width", 8]


def faces():
    return cartoons(dcgan, 16, 16)


@pytest.mark.parametrize(
    "channels, size, width, g, d",
    [
        (3, 64, 64, 3_576_704, 2_765_568),  # pytorch/examples, Benedetti's listing
        (3, 32, 64, 1_068_928, 663_296),
        (1, 32, 64, 1_066_880, 661_248),
        (3, 128, 64, 12_786_560, 11_164_416),
        (3, 64, 128, 12_658_432, 11_036_160),  # the paper's width
    ],
)
def test_the_networks_have_the_published_sizes(channels, size, width, g, d):
    G, D = dcgan.Generator(channels, size, width), dcgan.Discriminator(channels, size, width)
    assert sum(p.numel() for p in G.parameters()) == g
    assert sum(p.numel() for p in D.parameters()) == d


@pytest.mark.parametrize("size", [16, 32, 128])
def test_images_and_logits_have_their_shapes_and_range(size):
    G, D = dcgan.Generator(1, size, 4), dcgan.Discriminator(1, size, 4)
    images = G(100 * torch.randn(5, dcgan.Z))
    assert images.shape == (5, 1, size, size) and images.abs().max() <= 1
    assert D(images).shape == (5,)


def test_no_biases_and_no_batchnorm_at_the_image():
    G, D = dcgan.Generator(3, 32, 8), dcgan.Discriminator(3, 32, 8)
    assert all(layer.bias is None for net in (G, D) for layer in net if hasattr(layer, "stride"))
    assert isinstance(G[-1], nn.Tanh) and not isinstance(G[-2], nn.BatchNorm2d)
    assert not isinstance(D[1], nn.BatchNorm2d) and not isinstance(D[-1], nn.Sigmoid)
    norms = [layer for net in (G, D) for layer in net if isinstance(layer, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.1, 1e-5)}  # eps is not momentum


def test_initial_weights_are_those_of_section_4():
    for net in (dcgan.Generator(3, 32, 32), dcgan.Discriminator(3, 32, 32)):
        net.apply(dcgan.init_weights)
        for layer in net:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                assert 0.018 < layer.weight.std() < 0.022 and abs(layer.weight.mean()) < 0.002
            if isinstance(layer, nn.BatchNorm2d):
                assert abs(layer.weight.mean() - 1) < 0.02 and not layer.bias.any()
                assert 0.01 < layer.weight.std() < 0.03


def test_losses_by_hand():
    half = torch.zeros(4)  # D = 1/2
    assert dcgan.d_loss(half, half).item() == pytest.approx(2 * math.log(2))
    assert dcgan.g_loss(half).item() == pytest.approx(math.log(2))
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    log = [math.log(p) for p in torch.cat([real.sigmoid(), 1 - fake.sigmoid()]).tolist()]
    assert dcgan.d_loss(real, fake).item() == pytest.approx(-sum(log[:2]) / 2 - sum(log[2:]) / 2)
    expected = -sum(math.log(p) for p in fake.sigmoid().tolist()) / 2
    assert dcgan.g_loss(fake).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["gan_mlp", "sngan", "cgan", "acgan", "egan"])
def test_every_script_with_logits_has_these_losses(name):
    other, (real, fake) = load(HERE / f"{name}.py"), torch.randn(2, 16)
    assert other.d_loss(real, fake).item() == pytest.approx(dcgan.d_loss(real, fake).item())
    if name != "egan":  # its G has another loss too
        assert other.g_loss(fake).item() == pytest.approx(dcgan.g_loss(fake).item())


def test_losses_stay_finite_and_steep_where_the_sigmoid_is_flat():
    sure = torch.tensor([-1e4], requires_grad=True)  # a fake that D is certain of
    loss = dcgan.g_loss(sure)
    loss.backward()
    assert loss.item() == 1e4 and sure.grad.item() == pytest.approx(-1)
    assert dcgan.d_loss(torch.tensor([1e4]), torch.tensor([-1e4])).item() == 0


def test_an_image_does_not_depend_on_its_neighbours_in_eval_mode():
    G = dcgan.Generator(3, 16, 8).eval()
    z = torch.randn(4, dcgan.Z)
    other = z.clone()
    other[0] += 1
    changed = (G(z) - G(other)).abs().flatten(1).amax(1)
    assert changed[0] > 1e-3 and changed[1:].max() < 1e-6


def test_each_optimiser_moves_its_own_network_only(monkeypatch):
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

    run_train(dcgan, monkeypatch, [*FLAGS, "--g-steps", 3], faces(), watch=watch)
    assert order == ["opt_D", "opt_G", "opt_G", "opt_G"]


def test_one_step_is_that_of_the_formulas(monkeypatch):
    """The same step by hand, with autograd.grad and plain Adam, lands on the same weights."""
    by_hand = {}

    def watch(run):
        if run.logs:
            return
        state = torch.get_rng_state()
        G, D = dcgan.Generator(3, 16, 8), dcgan.Discriminator(3, 16, 8)
        G.load_state_dict(run.to_save["G"].state_dict())
        D.load_state_dict(run.to_save["D"].state_dict())
        adam = {net: torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999))
                for net in (G, D)}

        def descend(net, loss):
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            for p, gradient in zip(net.parameters(), gradients, strict=True):
                p.grad = gradient
            adam[net].step()
            return loss.item()

        torch.set_rng_state(state)
        real, _ = dcgan.sample_batch(faces(), 4, torch.device("cpu"))
        fake = G(torch.randn(4, dcgan.Z))
        p_real, p_fake = D(real).sigmoid(), D(fake.detach()).sigmoid()
        loss_D = descend(D, -(p_real.log().mean() + (1 - p_fake).log().mean()))
        descend(G, -D(fake).sigmoid().log().mean())
        loss_G = descend(G, -D(G(torch.randn(4, dcgan.Z))).sigmoid().log().mean())
        by_hand.update({"G": G, "D": D, "log": {"loss_D": loss_D, "loss_G": loss_G,
                        "D(x)": p_real.mean().item(), "D(G(z))": p_fake.mean().item()}})
        torch.set_rng_state(state)

    flags = [*FLAGS, "--g-steps", 2, "--seed", 3, "--lr", 2e-4]
    run = run_train(dcgan, monkeypatch, flags, faces(), watch=watch)
    log = {name: value.item() for name, value in run.logs[0].items()}
    assert log == pytest.approx(by_hand["log"], rel=1e-4)
    for name in ("G", "D"):
        for a, b in zip(by_hand[name].parameters(), run.to_save[name].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_settings_are_the_docstrings(monkeypatch):
    run = run_train(dcgan, monkeypatch, ["--data", "mnist", "--size", 16], faces(), n=0)
    for name in ("opt_G", "opt_D"):
        group = run.to_save[name].param_groups[0]
        assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.5, 0.999), 1e-8)
    assert run.args.batch == 64 and run.args.width == 64 and run.args.g_steps == 1


@pytest.mark.parametrize("flag", ["--width", "--g-steps"])
@pytest.mark.parametrize("value", ["1.5", "x"])
def test_own_flags_refuse_what_is_no_whole_number(flag, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, flag, value) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not any(tmp_path.iterdir())
