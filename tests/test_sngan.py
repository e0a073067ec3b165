"""sngan.py: spectral norm on the right axis, pixel norm, minibatch standard deviation."""

import pytest
import torch
from conftest import HERE, load
from torch import nn

sngan = load(HERE / "sngan.py")


def test_parameter_counts_and_shapes():
    G, D = sngan.Generator(3, 64, 128), sngan.Discriminator(3, 64, 128)
    assert sum(p.numel() for p in G.parameters()) == 1_319_427
    assert sum(p.numel() for p in D.parameters()) == 1_055_490
    images = G(torch.randn(2, sngan.Z))
    assert images.shape == (2, 3, 64, 64) and images.abs().max() <= 1
    assert D(images).shape == (2,)
    assert sngan.Discriminator(1, 16, 4)(torch.rand(3, 1, 16, 16)).shape == (3,)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 10, 4), nn.ConvTranspose2d(6, 10, 4)])
def test_the_largest_singular_value_is_one(layer):
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


def test_no_gradient_along_the_weight_itself():
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


def test_orthogonal_start_and_which_layers_are_normed():
    G, D = sngan.Generator(3, 32, 8), sngan.Discriminator(3, 32, 8)
    for net in (G, D):
        for layer in net:
            is_conv = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
            assert is_conv == hasattr(layer, "parametrizations")
            assert not is_conv or not layer.bias.any()
    matrix = D[2].parametrizations.weight.original.flatten(1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), atol=1e-5, rtol=0)


def test_pixel_norm():
    norm, x = sngan.PixelNorm(), torch.randn(2, 7, 3, 3) + 2
    y = norm(x)
    torch.testing.assert_close(y.square().mean(1), torch.ones(2, 3, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm(3 * x), y, atol=1e-4, rtol=0)
    by_hand = x[1, :, 2, 0] / (x[1, :, 2, 0].square().sum() / 7).sqrt()
    torch.testing.assert_close(y[1, :, 2, 0], by_hand, atol=1e-5, rtol=0)


def test_minibatch_stddev():
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


def test_a_collapsed_batch_is_seen_by_d():
    torch.manual_seed(0)
    D = sngan.Discriminator(3, 16, 8).eval()
    one = torch.randn(1, 3, 16, 16)
    others = torch.cat([one, torch.randn(3, 3, 16, 16)])
    alone = torch.cat([one, one, one, one])
    assert abs(D(others)[0] - D(alone)[0]) > 1e-4
