"""sngan.py: spectral norm on the right axis, the gain, pixel norm, minibatch standard deviation."""

import pytest
import torch
from conftest import HERE, cartoons, load, run_train
from torch import nn

sngan = load(HERE / "sngan.py")


def test_parameter_counts_are_those_of_the_report():
    G, D = sngan.Generator(3, 64, 128), sngan.Discriminator(3, 64, 128)
    assert sum(p.numel() for p in G.parameters()) == 1_319_427
    assert sum(p.numel() for p in D.parameters()) == 1_055_490
    images = G(torch.randn(2, sngan.Z))
    assert images.shape == (2, 3, 64, 64) and images.abs().max() <= 1
    assert D(images).shape == (2,)
    assert sngan.Discriminator(1, 16, 4)(torch.rand(3, 1, 16, 16)).shape == (3,)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 10, 4), nn.ConvTranspose2d(6, 10, 4)])
def test_the_largest_singular_value_becomes_one(layer):
    """Of the matrix (out, in * 4 * 4); in a transposed convolution "out" is the second axis."""
    torch.manual_seed(0)
    layer = sngan.normed(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_(0, 3)
    for _ in range(20):
        layer(torch.randn(1, 6, 8, 8))
    weight = layer.weight.detach()
    out = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    matrix = weight.movedim(out, 0).flatten(1)
    assert 0.95 < torch.linalg.matrix_norm(matrix, 2) < 1.05


def test_the_gradient_has_no_part_along_the_weight():
    """W / sigma(W) stays the same when W grows: the gradient through sigma is at right angles."""
    conv = sngan.normed(nn.Conv2d(4, 4, 4))
    for _ in range(30):
        conv(torch.randn(1, 4, 8, 8))
    conv.eval()
    x = torch.randn(2, 4, 8, 8)
    original = conv.parametrizations.weight.original
    (gradient,) = torch.autograd.grad((conv(x) ** 2).sum(), original)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), original.flatten(), dim=0)
    assert abs(cosine) < 0.01 and gradient.norm() > 1e-3


def test_all_convolutions_start_orthogonal_and_are_normed():
    G, D = sngan.Generator(3, 32, 8), sngan.Discriminator(3, 32, 8)
    for net in (G, D):
        for layer in net:
            is_conv = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
            assert is_conv == hasattr(layer, "parametrizations")
            assert not is_conv or not layer.bias.any()
    matrix = D[2].parametrizations.weight.original.flatten(1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), atol=1e-5, rtol=0)


def test_the_reports_sigma_is_that_of_another_matrix():
    """The docstring's 1.235: Keras' kernel (4, 4, in, out), reshaped without transposing it."""
    torch.manual_seed(0)
    kernel = torch.empty(4 * 4 * 128, 128)
    nn.init.orthogonal_(kernel)
    assert torch.linalg.matrix_norm(kernel, 2) == pytest.approx(1, abs=1e-3)
    assert torch.linalg.matrix_norm(kernel.reshape(128, -1), 2) == pytest.approx(1.235, abs=0.01)


def test_d_alone_has_the_gain_behind_each_leaky_relu():
    x = torch.tensor([1.0, -1.0])
    leaky = sngan.GainedLeakyReLU(0.2, inplace=True)
    torch.testing.assert_close(leaky(x.clone()), sngan.GAIN * torch.tensor([1.0, -0.2]))
    D, G = sngan.Discriminator(3, 32, 8), sngan.Generator(3, 32, 8)
    assert [type(layer) for layer in D][1:8:2] == [sngan.GainedLeakyReLU] * 4
    assert not any(isinstance(layer, sngan.GainedLeakyReLU) for layer in G)


def test_the_slope_of_ds_features_is_bounded():
    """A pixel is in four patches, so a convolution stretches by 2 at most, and the gain by GAIN."""
    torch.manual_seed(0)
    features = nn.Sequential(*list(sngan.Discriminator(3, 16, 8))[:6])
    for layer in features[::2]:
        layer.parametrizations.weight.original.data.normal_(0, 9)
    for _ in range(30):
        features(torch.randn(2, 3, 16, 16))
    features.eval()
    for size in (0.01, 1, 100):
        x = size * torch.randn(1, 3, 16, 16)
        slope = torch.autograd.functional.jacobian(features, x).reshape(32, 768)
        assert 0.1 < torch.linalg.matrix_norm(slope, 2) < (2 * sngan.GAIN) ** 3


def test_pixel_norm_makes_the_mean_square_one():
    norm, x = sngan.PixelNorm(), torch.randn(2, 7, 3, 3) + 2
    y = norm(x)
    torch.testing.assert_close(y.square().mean(1), torch.ones(2, 3, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm(3 * x), y, atol=1e-4, rtol=0)
    by_hand = x[1, :, 2, 0] / (x[1, :, 2, 0].square().sum() / 7).sqrt()
    torch.testing.assert_close(y[1, :, 2, 0], by_hand, atol=1e-5, rtol=0)


def test_minibatch_stddev_by_hand():
    layer = sngan.MinibatchStddev()
    same = layer(torch.rand(1, 3, 2, 2).repeat(4, 1, 1, 1))
    assert same.shape == (4, 4, 2, 2) and same[:, 3].max() < 2e-4
    a = 0.7
    pair = torch.stack([torch.full((3, 2, 2), a), torch.full((3, 2, 2), -a)])
    y = layer(pair)
    assert torch.equal(y[:, :3], pair)
    torch.testing.assert_close(y[:, 3], torch.full((2, 2, 2), a), atol=1e-5, rtol=0)
    uneven = torch.zeros(2, 2, 1, 1)
    uneven[0, 0] = 4  # deviations 2 and 0: their mean is 1 in both images
    torch.testing.assert_close(layer(uneven)[:, 2], torch.ones(2, 1, 1), atol=1e-3, rtol=0)


def test_the_head_sees_one_feature_more_and_drops_some():
    D = sngan.Discriminator(3, 64, 128)
    linear, dropout = D[-2], D[-3]
    assert linear.in_features == 129 and dropout.p == 0.4
    assert not hasattr(linear, "parametrizations")


def test_d_sees_that_a_batch_has_collapsed():
    torch.manual_seed(0)
    D = sngan.Discriminator(3, 16, 8).eval()
    one = torch.randn(1, 3, 16, 16)
    others = torch.cat([one, torch.randn(3, 3, 16, 16)])
    alone = torch.cat([one, one, one, one])
    assert abs(D(others)[0] - D(alone)[0]) > 1e-4


def test_real_and_fake_images_are_judged_apart(monkeypatch):
    """Three passes through D in a step, each of one kind: real, fake, and fake again for G."""
    data, seen = cartoons(sngan, 16, 16), []

    def watch(run):
        if not run.logs:
            run.to_save["G"].register_forward_hook(lambda net, z, made: seen.append(made.detach()))
            run.to_save["D"].register_forward_hook(lambda net, x, out: seen.append(x[0].detach()))

    run_train(sngan, monkeypatch, ["--size", 16, "--batch", 8, "--width", 8], data, watch=watch)
    fake, first, second, third = seen
    assert torch.equal(second, fake) and torch.equal(third, fake)
    pixels = {tuple(x.flatten().tolist()) for x in data.images / 127.5 - 1}
    assert {tuple(x.flatten().tolist()) for x in first} <= pixels


@pytest.mark.parametrize("name", ["sngan", "acgan"])
def test_the_gain_keeps_the_features_of_d_alive(name):
    """Spectral norm and LeakyReLU alone leave a sixth of them after five layers, and D dies."""
    module = load(HERE / f"{name}.py")
    torch.manual_seed(0)
    layers = (module.Discriminator(3, 64, 32) if name == "sngan"
              else module.Discriminator(3, 64, 32, 5).features)
    x, sizes = torch.rand(8, 3, 64, 64) * 2 - 1, []
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU):
            sizes.append(x.square().mean().sqrt().item())
    assert len(sizes) == 5 and sizes[-1] > sizes[0] / 2
