"""What fid.py says of itself: the distances, the network, what it reads, prints and refuses."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import DATA, HERE, call, load, shell, tree
from PIL import Image
from torch import nn
from torchvision.models import inception

fid = load(HERE / "fid.py")


def normal(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(n, d, seed=0):
    """Like Inception's: not negative, correlated, not centred."""
    return (normal(n, d, seed) @ normal(d, d, 99) / d**0.5 + 0.3).clamp(min=0)


def frechet(x, y):
    x, y = fid.statistics(x.split(7)), fid.statistics(y.split(11))
    return fid.frechet_distance(x.mu, x.sigma, y.mu, y.sigma)


# --- the distances --------------------------------------------------------------------------------


def test_gaussians_in_closed_form():
    d, eye = 64, torch.eye(64, dtype=torch.float64)
    half, zero = torch.full((d,), 0.5, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    assert fid.frechet_distance(half, 4 * eye, zero, eye) == pytest.approx(80)  # 16 + 64 (2 - 1)^2
    a, b = normal(d, 1, 1)[:, 0].square(), normal(d, 1, 2)[:, 0].square()
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    assert fid.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected)


def test_frechet_is_what_the_matrix_root_gives():
    """Covariances that do not commute, against the root of their product."""
    x, y = features(500, 40), 1.3 * features(400, 40, seed=1)
    root = scipy.linalg.sqrtm(x.T.cov().numpy() @ y.T.cov().numpy()).real
    traces = x.var(0).sum() + y.var(0).sum() - 2 * np.trace(root)
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces
    assert frechet(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_same_symmetric_and_blind_to_rotation():
    x, y = features(300, 50), features(200, 50, seed=1) + 0.1
    assert frechet(x, x) < 1e-10
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-12)
    turn = torch.linalg.qr(normal(50, 50, 3)).Q
    assert frechet(x @ turn, y @ turn) == pytest.approx(frechet(x, y), rel=1e-10)


@pytest.mark.parametrize("n, m", [(100, 100), (100, 30), (30, 700), (2, 2), (2, 900)])
def test_fewer_images_than_dimensions(n, m):
    """The exact value: singular values of the features themselves, no covariance in between."""
    x, y = features(n, 256), 1.1 * features(m, 256, seed=1)
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    nuclear = torch.linalg.svdvals(a @ b.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    assert frechet(x, y) == pytest.approx((expected - 2 * nuclear).item(), rel=1e-9)
    assert frechet(x, x) < 1e-9


def test_all_images_the_same():
    x, y = torch.ones(5, 20, dtype=torch.float64), features(50, 20)
    assert frechet(x, x) == 0
    assert frechet(x, y) == pytest.approx((y.var(0).sum() + (y.mean(0) - 1).square().sum()).item())


def test_statistics_do_not_depend_on_the_batches():
    x = (features(101, 12) + 1e5).float()  # far from 0: where sums of squares lose their digits
    exact = x.double()
    for batch in (1, 7, 101):
        found = fid.statistics(iter(x.split(batch)))
        assert found.n == 101 and found.mu.dtype == found.sigma.dtype == torch.float64
        assert torch.allclose(found.mu, exact.mean(0), rtol=1e-14)
        assert torch.allclose(found.sigma, exact.T.cov(), rtol=1e-9, atol=1e-9)
        assert found.features is None
    kept = fid.statistics(x.split(7), "w", keep=True)
    assert torch.equal(kept.features, x) and kept.weights == "w"


def test_kid_by_a_double_loop():
    x, y = features(8, 5), features(8, 5, seed=1) + 0.2

    def mean(a, b, skip):
        pairs = [(i, j) for i in range(8) for j in range(8) if not (skip and i == j)]
        return sum((float(a[i] @ b[j]) / 5 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert fid.mmd(x, y).item() == pytest.approx(expected, rel=1e-12)
    assert fid.kid(x, y) == (pytest.approx(expected, rel=1e-12), 0)  # one subset: all there are


def test_kid_is_unbiased_and_seen_over_subsets():
    values = [fid.mmd(features(40, 16, s), features(40, 16, s + 500)).item() for s in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5 and min(values) < 0
    mean, std = fid.kid(features(3000, 16), features(2500, 16, seed=1))
    assert abs(mean) < 3 * std and std > 0
    assert fid.kid_subsets(5000, 3000) == (100, 1000)
    assert fid.kid_subsets(5000, 300) == (100, 300)
    assert fid.kid_subsets(300, 300) == (1, 300)


# --- the network ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original():
    """torchvision's network with random weights that keep activations in bounds."""
    torch.manual_seed(0)
    net = inception.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.7, 1.3)
            nn.init.uniform_(layer.running_var, 0.7, 1.3)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
    net.fc = nn.Identity()
    return net.eval()


@pytest.fixture(scope="module")
def weights(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    extra = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save({**original.state_dict(), **extra}, path)
    return path


def test_pooling_at_the_border(original):
    ones = torch.ones(1, 1, 5, 5)
    assert torch.equal(fid.average(ones), ones)  # torchvision's would give 4/9 at the corners
    assert torch.equal(fid.maximum(-ones), -ones)
    net = fid.build_inception(original.state_dict())
    assert net.Mixed_7b.pool is fid.average and net.Mixed_7c.pool is fid.maximum


def test_features_are_those_of_the_original(original, weights, monkeypatch):
    """torchvision's network, BatchNorm and all, with nothing but its pooling replaced."""
    net, digest = fid.load_inception(weights, torch.device("cpu"))
    assert digest == hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    torch.manual_seed(1)
    sizes = [(32, 32), (64, 40), (299, 299)]
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    pool = F.avg_pool2d

    def patched(x, kernel_size, stride, padding):
        if x.shape[1] == 2048:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return pool(x, kernel_size, stride, padding, count_include_pad=False)

    with torch.no_grad():
        found = net(fid.to_input(images, torch.device("cpu")))
        monkeypatch.setattr(F, "avg_pool2d", patched)
        for image, ours in zip(images, found, strict=True):
            x = F.interpolate(image[None] / 255, size=(299, 299), mode="bilinear")
            expected = original(2 * x - 1)[0]
            assert ours.shape == (2048,) and ours.dtype == torch.float32
            assert (ours - expected).norm() < 1e-5 * expected.norm()
            assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_weights_in_the_old_format_of_torch(original, weights, tmp_path, monkeypatch):
    """The published file is of 2019, before torch.save wrote zips: same weights, same features."""
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    old = hub / fid.URL.split("/")[-1]
    torch.save(torch.load(weights), old, _use_new_zipfile_serialization=False)
    x = fid.to_input(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.device("cpu"))
    expected = fid.build_inception(original.state_dict())(x)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for path in (old, None):  # by --weights, and from the cache
        net, _ = fid.load_inception(path, torch.device("cpu"))
        assert torch.equal(net(x), expected)


def test_input_is_resized_one_by_one_and_not_antialiased():
    cpu = torch.device("cpu")
    small, large = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1, 598, 598).byte()
    large[:, ::4] = 255  # every fourth row: antialiasing would make grey of it
    mixed = fid.to_input([small, large, small], cpu)
    assert mixed.shape == (3, 3, 299, 299) and (mixed[0] == -1).all()
    assert torch.equal(mixed[1:2], fid.to_input([large], cpu))
    half = mixed[1, 0, :, 0].unique()  # two rows make one: black, or half and half
    assert torch.allclose(half, torch.tensor([-1.0, 0.0]), atol=1e-6)
    white = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.allclose(fid.to_input(white, cpu), torch.ones(1))


def test_weights_come_once_with_their_hash_checked(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    asked = []

    def download(url, **options):
        asked.append((url, options["check_hash"]))
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        shutil.copy(weights, tmp_path / "hub" / "checkpoints" / url.split("/")[-1])

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    for _ in range(2):
        _, digest = fid.load_inception(None, torch.device("cpu"))
    assert asked == [(fid.URL, True)]
    assert digest != fid.PUBLISHED  # what lies there by that name is not believed


def test_offline_and_without_weights(tmp_path, monkeypatch, capsys):
    def offline(url, **options):
        print("Downloading", file=sys.stderr)  # as torch.hub does
        raise URLError("no net")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    assert call(fid, "cartoon", "cartoon", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pt_inception-2015-12-05-6726825d.pth" in error
    assert str(tmp_path / "checkpoints") in error and "--weights" in error


# --- the command ----------------------------------------------------------------------------------


class Quick(nn.Module):
    """In place of Inception: 2048 pixels of the image made small."""

    def forward(self, x):
        return F.interpolate(x, size=(27, 27), mode="area").flatten(1)[:, :2048].contiguous()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(fid, "load_inception", lambda path, device: (Quick(), fid.PUBLISHED))


def fill(folder, n, size=(20, 16), seed=0, mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03}.png")
    return folder


def run(capsys, *args):
    capsys.readouterr()
    assert call(fid, *args, "--device", "cpu") == 0
    return capsys.readouterr()


def test_from_end_to_end(weights, tmp_path, capsys):
    """Two folders through the network itself, with weights that are not the published ones."""
    real, fake = fill(tmp_path / "real", 3), fill(tmp_path / "fake", 3, size=(33, 33), seed=1)
    Image.new("L", (50, 30), 100).save(fake / "deep.JPG", format="JPEG")
    out = run(capsys, real, fake, "--weights", weights, "--batch", 2).out.splitlines()[-1]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    pattern = (rf"FD \(weights {digest}\) \d+\.\d\d   KD -?\d\.\d{{4}} \+- \d\.\d{{4}}   "
               rf"\(weights {digest}, bilinear 299, 33x33 px, 3 of {real} vs 4 of {fake}, KD of "
               r"100 subsets of 3\)")
    assert re.fullmatch(pattern, out) and "FID" not in out


def test_line_and_json(quick, tmp_path, capsys):
    real, fake = fill(tmp_path / "real", 40), fill(tmp_path / "fake", 30, seed=1)
    shown = run(capsys, real, fake)
    pattern = (r"FID (\d+\.\d\d)   KID (-?\d\.\d{4}) \+- (\d\.\d{4})   \(inception-2015-12-05, "
               rf"bilinear 299, 20x16 px, 40 of {real} vs 30 of {fake}, KID of 100 subsets of 30\)")
    numbers = re.fullmatch(pattern, shown.out.splitlines()[-1])
    assert numbers and "warning: below 2,048 images" in shown.err
    silent = run(capsys, real, fake, "--json")
    result = json.loads(silent.out)
    assert [f"{result['FID']:.2f}", f"{result['KID']:.4f}", f"{result['KID_std']:.4f}"] == list(
        numbers.groups())
    assert result["n_real"] == 40 and result["n_fake"] == 30 and result["subset_size"] == 30
    assert "30 of 30 images" in silent.err  # progress
    alone = json.loads(run(capsys, real, fake, "--json", "--no-kid", "--batch", 7).out)
    assert "KID" not in alone and alone["FID"] == pytest.approx(result["FID"])
    pixels = [torch.stack([fid.read_picture(file) for file in fid.list_images(folder)])
              for folder in (real, fake)]
    x, y = (Quick()(fid.to_input(p, torch.device("cpu"))).double() for p in pixels)
    assert result["FID"] == pytest.approx(frechet(x, y), rel=1e-9)
    assert result["KID"] == pytest.approx(fid.kid(x, y)[0], rel=1e-6)
    same = json.loads(run(capsys, real, real, "--json").out)
    assert same["FID"] < 1e-6


@pytest.mark.parametrize("n, warns", [(2047, True), (2048, False), (None, False)])
def test_warning_below_2048(n, warns, capsys):
    known = fid.statistics([features(9, 4)], fid.PUBLISHED)
    a, b = (fid.Source(name, None, None, (8, 8)) for name in "ab")
    real, fake = known._replace(n=n), known._replace(n=9000)
    result, line = fid.compare(a, real, b, fake, fid.PUBLISHED)
    assert ("warning" in capsys.readouterr().err) == warns
    assert line == ("FID 0.00   (inception-2015-12-05, bilinear 299, 8x8 px, "
                    f"{n or '?'} of a vs 9000 of b)")
    assert result["n_real"] == n


@pytest.mark.parametrize("spoilt", ["mu", "sigma"])
def test_nan_is_no_perfect_score(spoilt, capsys):
    """max(0.0, nan) is 0.0: the best score there is."""
    x, y = (fid.statistics([features(9, 4, seed)])._asdict() for seed in (0, 1))
    x[spoilt] = x[spoilt] * float("nan")
    with pytest.raises(SystemExit):
        fid.frechet_distance(x["mu"], x["sigma"], y["mu"], y["sigma"])
    assert "nan" in capsys.readouterr().err


def test_several_fakes_and_one_real(quick, tmp_path, capsys, monkeypatch):
    """A line each, as if each were compared alone; the real side is read once."""
    real = fill(tmp_path / "real", 9)
    fakes = [fill(tmp_path / f"fake{i}", 5 + i, seed=i + 1) for i in range(3)]
    alone = [json.loads(run(capsys, real, fake, "--json").out) for fake in fakes]
    read, read_picture = [], fid.read_picture
    monkeypatch.setattr(fid, "read_picture", lambda path, size=None: (
        read.append(str(path)), read_picture(path, size))[1])
    together = run(capsys, real, *fakes, "--json").out.splitlines()
    assert [json.loads(line) for line in together] == alone
    assert read.count(f"{real}/003.png") == 1


def test_size_makes_both_sides_alike(quick, tmp_path, capsys):
    """Originals of any size and shape against what was made of them for training: no distance."""
    real, prepared = fill(tmp_path / "real", 12, size=(90, 50)), tmp_path / "prepared"
    prepared.mkdir()
    for i, image in enumerate(fid.load_images(str(real), 16, tmp_path).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(prepared / f"{i}.png")
    plain = run(capsys, real, prepared, "--json")
    assert "is of 90 x 50 pixels" in plain.err and "of 16 x 16; --size" in plain.err
    alike = run(capsys, real, prepared, "--json", "--size", 16)
    assert "--size makes" not in alike.err and json.loads(alike.out)["size"] == "16x16"
    assert json.loads(alike.out)["FID"] < 1e-6 < 1 < json.loads(plain.out)["FID"]


def test_n_takes_that_many_random_images(quick, tmp_path, capsys):
    real, fake = fill(tmp_path / "real", 30), fill(tmp_path / "fake", 9, seed=1)
    some = [json.loads(run(capsys, real, fake, "--json", "--n", 8).out) for _ in range(2)]
    assert some[0] == some[1] and (some[0]["n_real"], some[0]["n_fake"]) == (8, 9)
    first = fill(tmp_path / "first", 8)
    other = json.loads(run(capsys, first, fake, "--json").out)
    assert other["FID"] != pytest.approx(some[0]["FID"], rel=1e-6)
    named = run(capsys, "cartoon", fake, "--json", "--n", 50, "--root", DATA, "--no-kid")
    assert json.loads(named.out)["n_real"] == 50
    assert json.loads(named.out)["real"] == "cartoon (train)"


def test_a_folder_of_everything(quick, tmp_path, capsys):
    """Any type, mode, size and depth; what cannot be read is named, left out, and counted."""
    plain, odd = fill(tmp_path / "plain", 4, seed=2), tmp_path / "odd"
    modes = {"1": "png", "L": "JPG", "LA": "png", "P": "gif", "RGBA": "webp", "CMYK": "jpeg",
             "I;16": "tiff", "RGB": "bmp"}
    for i, (mode, end) in enumerate(modes.items()):
        folder = odd / f"level{i % 3}" / "below"
        folder.mkdir(parents=True, exist_ok=True)
        if mode == "I;16":
            image = Image.fromarray(np.full((9, 9), 40000, np.uint16))
        else:
            image = Image.new("RGB", (10 + i, 30), (250, 10 * i, 0)).convert(mode)
        image.save(folder / f"{i}.{end}")
    whole = (plain / "000.png").read_bytes()
    (odd / "broken.png").write_bytes(whole[: len(whole) // 2])
    (odd / "words.txt").write_text("no image, no matter")
    shown = run(capsys, plain, odd, "--batch", 2)
    assert f"4 of {plain} vs 8 of {odd}" in shown.out
    assert f"1 unreadable ['{odd}/broken.png']" in shown.out
    grey = fid.read_picture(odd / "level0" / "below" / "6.tiff")
    assert grey.shape == (3, 9, 9) and (grey == 155).all()  # 16 bits scaled, grey replicated
    assert fid.read_picture(odd / "broken.png") == odd / "broken.png"


def test_reading_ahead_keeps_the_order_and_stays_near(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(fid, "read_picture", lambda path, size: read.append(path) or path)
    batches = fid.read_ahead(list(range(50)), None, 5)
    assert next(batches) == [0, 1, 2, 3, 4]
    assert len(read) <= 15  # not all fifty: memory does not grow
    assert [x for batch in batches for x in batch] == list(range(5, 50))


def test_data_sets_are_prepared_as_for_training(quick, tmp_path, capsys, monkeypatch):
    """By name and as files of the same pixels, and the size is that of the fakes."""
    fakes = fill(tmp_path / "fakes", 5, size=(24, 24))
    images = fid.load_images("cartoon", 24, tmp_path / "data", split="test").images[:50]
    (tmp_path / "files").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "files" / f"{i:04}.png")
    common = fakes, "--json", "--no-kid", "--root", tmp_path / "data", "--n", 50
    named = run(capsys, "cartoon", *common, "--split", "test")
    assert json.loads(named.out)["real"] == "cartoon (test)"
    assert json.loads(named.out)["size"] == "24x24"
    expected = json.loads(run(capsys, tmp_path / "files", *common).out)
    assert json.loads(named.out)["FID"] == pytest.approx(expected["FID"], rel=1e-9)
    smaller = run(capsys, "cartoon", *common, "--split", "test", "--size", 8)
    assert json.loads(smaller.out)["FID"] != pytest.approx(expected["FID"], rel=1e-3)
    train = run(capsys, "cartoon", *common)
    assert json.loads(train.out)["FID"] != pytest.approx(expected["FID"], rel=1e-6)


def test_statistics_in_and_out(quick, tmp_path, capsys):
    real, fake = fill(tmp_path / "real", 30), fill(tmp_path / "fake", 20, seed=1)
    direct = json.loads(run(capsys, real, fake, "--json").out)
    saved = tmp_path / "real.npz"
    assert "30 images -> " in run(capsys, real, "--save", saved).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake", "real", "real.npz"]
    with np.load(saved) as f:  # as pytorch-fid reads it
        mu, sigma = f["mu"][:], f["sigma"][:]
    assert mu.shape == (2048,) and sigma.shape == (2048, 2048) and sigma.dtype == np.float64
    shown = run(capsys, saved, fake)
    assert shown.out.endswith(f"bilinear 299, 20x16 px, 30 of {saved} vs 20 of {fake})\n")
    assert "KID" not in shown.out
    again = json.loads(run(capsys, saved, fake, "--json").out)
    assert again["FID"] == pytest.approx(direct["FID"], rel=1e-9) and again["n_real"] == 30

    theirs = tmp_path / "theirs.npz"
    np.savez_compressed(theirs, mu=mu, sigma=sigma)  # as pytorch-fid writes it
    shown = run(capsys, theirs, saved)
    assert shown.out == (
        "FID 0.00   (inception-2015-12-05, bilinear 299, ? px, "
        f"? of {theirs} vs 30 of {saved})\n")


# --- the quality index ----------------------------------------------------------------------------


def test_deformation():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 64, 64), np.uint8)
    assert np.array_equal(fid.deform(image, rng, alpha=0), image)
    constant = np.full((3, 64, 64), 77, np.uint8)
    assert np.array_equal(fid.deform(constant, rng), constant)
    grey = np.repeat(image[:1], 3, axis=0)
    bent = fid.deform(grey, rng)
    assert np.array_equal(bent[0], bent[1]) and np.array_equal(bent[0], bent[2])  # no fringes
    assert bent.dtype == np.uint8 and not np.array_equal(bent, grey)


def test_deformation_moves_pixels_by_that_much():
    """On a ramp, a pixel's new value tells how far it was fetched from."""
    ramp = np.tile(np.arange(128, dtype=np.uint8), (1, 128, 1))
    moved = np.float64(fid.deform(ramp, np.random.default_rng(1)) - np.float64(ramp))
    assert moved[:, 10:-10, 10:-10].std() == pytest.approx(0.91, abs=0.06)


def test_quality_network():
    net = fid.QualityNet()
    assert sum(p.numel() for p in net.parameters()) == 1_055_489
    assert net(torch.randn(5, 3, 64, 64)).shape == (5,)


def test_both_classes_in_both_parts_and_no_image_in_two():
    real = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 64, 64)
    train, test = fid.quality_parts(real, np.random.default_rng(0))
    ids = [part[0][:, 0, 0, 0].tolist() for part in (train, test)]
    assert [len(x) for x in (*train, *test)] == [30, 30, 10, 10]
    assert sorted(ids[0] + ids[1]) == list(range(40)) and ids[0] != sorted(ids[0])
    assert train[1][:, 2, 5, 5].tolist() == ids[0]  # constant images stay what they are


def test_quality_index_tells_deformed_images(monkeypatch):
    """Stripes, which no deformation leaves straight. (A larger step, to need fewer of them.)"""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr: adam(parameters, lr=100 * lr))
    torch.manual_seed(0)
    phase, width = torch.rand(2, 160, 1, 1, 1)
    stripes = (torch.arange(64.0) / (1 + width) + 9 * phase).sin().gt(0) * 255
    real = stripes.expand(160, 1, 64, 64).byte()
    bent = torch.stack([torch.from_numpy(fid.deform(image, np.random.default_rng(i)))
                        for i, image in enumerate(real.numpy())])
    logits, on_real, on_deformed = fid.train_quality(real, 12, torch.device("cpu"))
    assert on_real > 0.8 and on_deformed > 0.8 and logits(bent).sigmoid().mean() > 0.6


def test_quality_index_by_command(tmp_path, capsys):
    real, fake = fill(tmp_path / "real", 12), fill(tmp_path / "fake", 5, mode="L")
    flags = real, fake, "--quality-index", "--epochs", 1, "--root", tmp_path / "data"
    line = run(capsys, *flags).out.splitlines()[-1]
    assert re.match(r"quality index 0\.\d{3}   held out: \d+\.\d% of real and \d+\.\d% of", line)
    assert line.endswith(f"(64 px, 1 epochs, 12 of {real} vs 5 of {fake})")
    for i in range(4):  # a collapsed G: copies count
        shutil.copy(fake / "000.png", fake / f"copy{i}.png")
    shown = run(capsys, real, fake, real, *flags[2:], "--json").out.splitlines()
    assert [json.loads(line)["n_fake"] for line in shown] == [9, 12]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_json_is_alone_on_stdout_with_stderr_on_a_terminal(tmp_path):
    controller, terminal = os.openpty()
    fill(tmp_path / "few", 4)
    flags = ["few", "few", "--quality-index", "--epochs", "1", "--json", "--device", "cpu"]
    done = subprocess.run([sys.executable, HERE / "fid.py", *flags], stdout=subprocess.PIPE,
                          stderr=terminal, cwd=tmp_path, text=True, timeout=300)
    shown = os.read(controller, 10_000).decode()
    os.close(terminal)
    os.close(controller)
    assert done.returncode == 0 and json.loads(done.stdout)["n_fake"] == 4
    assert "epoch 1/1" in shown


# --- wrong input ----------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, monkeypatch, original):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "good", 4)
    fill(tmp_path / "single", 1)
    (tmp_path / "empty").mkdir()
    for folder, file in [("words", "a.txt"), ("broken", "a.png"), ("broken", "b.jpg")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_bytes(b"no image")
    (tmp_path / "file").write_text("a file")
    mu, sigma = np.zeros(2048), np.diag(np.float64(np.arange(2048) == 7))
    np.save("array.npy", mu)
    shutil.copy("array.npy", "renamed.npz")
    np.savez("other.npz", mu=mu)
    np.savez("width.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez_compressed("nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez("words.npz", mu="mu", sigma="sigma")
    np.savez_compressed("pickle.npz", mu=np.array([{}]), sigma=sigma)
    np.savez_compressed("right.npz", mu=mu, sigma=sigma)
    np.savez_compressed("foreign.npz", mu=mu, sigma=sigma, n=9, weights="abcd1234")
    np.savez_compressed("stranger.npz", mu=mu, sigma=sigma, n=9, weights="dcba4321")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "right.npz").read_bytes()[:500])
    torch.save({"weight": torch.zeros(3)}, "else.pth")
    torch.save([1, 2], "list.pth")
    torch.save({name: torch.zeros(1, 1, 1, 1) for name in original.state_dict()}, "misfit.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "misfit.pth").read_bytes()[:20_000])
    (tmp_path / "void.pth").write_bytes(b"")
    return tmp_path


TABLE = [
    ("", "REAL"),
    ("good", "FAKE is missing"),
    ("good nothing", "nothing is not there, and none of cartoon"),
    ("good empty", "empty is no data set, and has not two images"),
    ("empty good", "empty is no data set"),
    ("good words", "words is no data set"),
    ("good single", "single is no data set"),
    ("good file", "file is a file"),
    ("good array.npy", "array.npy is a file"),
    ("good renamed.npz", "renamed.npz is not a .npz file with mu and sigma"),
    ("good missing.npz", "missing.npz"),
    ("good other.npz", "other.npz is not"),
    ("good words.npz", "words.npz is not"),
    ("good pickle.npz", "pickle.npz is not"),
    ("good cut.npz", "cut.npz is not"),
    ("good width.npz", "width.npz: mu (64,)"),
    ("right.npz width.npz", "width.npz: mu (64,)"),
    ("good nan.npz", "nan.npz: not finite"),
    ("foreign.npz stranger.npz", "abcd1234 and dcba4321"),
    ("good good --weights cut.pth", "cut.pth cannot be read"),
    ("good good --weights void.pth", "void.pth cannot be read"),
    ("good good --weights file", "file cannot be read"),
    ("good good --weights else.pth", "else.pth does not hold"),
    ("good good --weights list.pth", "list.pth does not hold"),
    ("good good --weights misfit.pth", "misfit.pth does not hold"),
    ("good good --weights none.pth", "none.pth: there is no such file"),
    ("good good --weights empty", "empty: there is no such file"),
    ("good --save out.npy", "--save out.npy"),
    ("good --save no/such/out.npz", "--save no/such/out.npz"),
    ("right.npz good --save out.npz", "--save out.npz: images become"),
    ("good good --size 0", "--size"),
    ("good good --batch 0", "--batch"),
    ("good good --split middle", "--split"),
    ("good good --device tpu", "--device tpu"),
    ("good good --colour", "--colour"),
    ("good right.npz --quality-index", "give a folder of images"),
    ("good --quality-index", "FAKE is missing"),
    ("good empty --quality-index", "empty"),
    ("good good --quality-index --epochs 0", "--epochs"),
    ("good good --quality-index --save out.npz", "--save"),
    ("good good --n 0", "--n"),
    ("celeba good --root empty", "celeba"),
]


def test_one_line_status_two_nothing_written(desk, capsys, monkeypatch):
    def no_download(*args, **options):
        raise RuntimeError("no net")

    monkeypatch.setattr(fid.torchvision.datasets, "CelebA", no_download)
    load_inception, wrong, before = fid.load_inception, [], tree(desk)
    for flags, expected in TABLE:
        given = "--weights" in flags
        quick = (lambda path, device: (Quick(), fid.PUBLISHED)) if not given else load_inception
        monkeypatch.setattr(fid, "load_inception", quick)
        status = call(fid, *flags.split())
        error = capsys.readouterr().err
        if status != 2 or error.count("\n") != 1 or expected not in error[len("fid.py: "):]:
            wrong.append((flags, status, error))
        if tree(desk) != before:
            wrong.append((flags, "changed", set(tree(desk)) ^ set(before)))
            before = tree(desk)
    assert not wrong


def test_a_folder_without_one_readable_image(quick, desk, capsys):
    """Noticed before all of REAL is read."""
    assert call(fid, "good", "broken", "--device", "cpu") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("fid.py: broken is no data set") and shown.err.count("\n") == 1
    assert shown.out == ""


def test_other_weights_are_never_called_fid(desk, capsys):
    shown = run(capsys, "foreign.npz", "right.npz")
    assert shown.out.startswith("FD (weights abcd1234) 0.00   (weights abcd1234, bilinear 299")
    assert "FD" in json.loads(run(capsys, "foreign.npz", "right.npz", "--json").out)


def test_alone_in_a_folder(tmp_path, capsys):
    """Importing does nothing; help is there; errors are one line, without a traceback."""
    shutil.copy(HERE / "fid.py", tmp_path)
    quiet = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = shell(code="import fid\nfid.main(['nothing', 'nowhere'])", cwd=tmp_path, env=quiet)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        fid.main(["--help"])
    assert end.value.code == 0 and "--quality-index" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["fid.py"]


def test_documented():
    doc = fid.__doc__
    assert all(word in doc for word in ("1706.08500", "1801.01401", "Differs from", "fid.py"))
