"""What fid.py says of itself: the distances, the network, what it reads, prints and refuses."""

import hashlib
import json
import os
import re
import shlex
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
CPU = torch.device("cpu")


def normal(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(n, d, seed=0):
    """Like Inception's: not negative, correlated, not centred."""
    return (normal(n, d, seed) @ normal(d, d, 99) / d**0.5 + 0.3).clamp(min=0)


def frechet(x, y):
    x, y = fid.statistics(x.split(7)), fid.statistics(y.split(11))
    return fid.frechet_distance(x.mu, x.sigma, y.mu, y.sigma)


# --- the distances --------------------------------------------------------------------------------


def test_gaussians_have_the_distance_of_the_closed_form():
    d, eye = 64, torch.eye(64, dtype=torch.float64)
    half, zero = torch.full((d,), 0.5, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    assert fid.frechet_distance(half, 4 * eye, zero, eye) == pytest.approx(80)  # 16 + 64 (2 - 1)^2
    a, b = normal(d, 1, 1)[:, 0].square(), normal(d, 1, 2)[:, 0].square()
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    assert fid.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected)


def test_the_distance_is_that_of_the_matrix_root():
    """Covariances that do not commute, against the root of their product."""
    x, y = features(500, 40), 1.3 * features(400, 40, seed=1)
    root = scipy.linalg.sqrtm(x.T.cov().numpy() @ y.T.cov().numpy()).real
    traces = x.var(0).sum() + y.var(0).sum() - 2 * np.trace(root)
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces
    assert frechet(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_the_distance_is_0_to_itself_symmetric_and_blind_to_rotation():
    x, y = features(300, 50), features(200, 50, seed=1) + 0.1
    assert frechet(x, x) < 1e-10
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-12)
    turn = torch.linalg.qr(normal(50, 50, 3)).Q
    assert frechet(x @ turn, y @ turn) == pytest.approx(frechet(x, y), rel=1e-10)


@pytest.mark.parametrize("n, m", [(100, 100), (100, 30), (30, 700), (2, 2), (2, 900)])
def test_the_distance_is_exact_with_fewer_images_than_dimensions(n, m):
    """Against singular values of the features themselves, with no covariance in between."""
    x, y = features(n, 256), 1.1 * features(m, 256, seed=1)
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    nuclear = torch.linalg.svdvals(a @ b.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    assert frechet(x, y) == pytest.approx((expected - 2 * nuclear).item(), rel=1e-9)
    assert frechet(x, x) < 1e-9


def test_all_images_may_be_the_same():
    x, y = torch.ones(5, 20, dtype=torch.float64), features(50, 20)
    assert frechet(x, x) == 0
    assert frechet(x, y) == pytest.approx((y.var(0).sum() + (y.mean(0) - 1).square().sum()).item())


@pytest.mark.parametrize("spoilt", ["mu", "sigma"])
def test_nan_is_no_perfect_score(spoilt, capsys):
    x, y = (fid.statistics([features(9, 4, seed)])._asdict() for seed in (0, 1))
    x[spoilt] = x[spoilt] * float("nan")
    with pytest.raises(SystemExit):
        fid.frechet_distance(x["mu"], x["sigma"], y["mu"], y["sigma"])
    assert "nan" in capsys.readouterr().err


def test_statistics_do_not_depend_on_the_batches():
    x = (features(101, 12) + 1e5).float()  # far from 0: where sums of squares lose their digits
    exact = x.double()
    for batch in (1, 7, 101):
        found = fid.statistics(iter(x.split(batch)))
        assert found.n == 101 and found.mu.dtype == found.sigma.dtype == torch.float64
        assert torch.allclose(found.mu, exact.mean(0), rtol=1e-14)
        assert torch.allclose(found.sigma, exact.T.cov(), rtol=1e-9, atol=1e-9)
        assert torch.equal(found.features, x)
    assert fid.statistics([x], "w").weights == "w"


def test_a_covariance_is_summed_over_parts_of_many_images():
    x = features(20_500, 3)
    found = fid.statistics(x.split(5000))
    assert torch.allclose(found.mu, x.mean(0)) and torch.allclose(found.sigma, x.T.cov())


def test_kid_is_what_a_double_loop_gives():
    x, y = features(8, 5), features(8, 5, seed=1) + 0.2

    def mean(a, b, skip):
        pairs = [(i, j) for i in range(8) for j in range(8) if not (skip and i == j)]
        return sum((float(a[i] @ b[j]) / 5 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert fid.mmd(x, y).item() == pytest.approx(expected, rel=1e-12)
    assert fid.kid(x, y) == (pytest.approx(expected, rel=1e-12), 0, 1, 8)  # one subset: everything


def test_kid_is_unbiased_for_independent_sets():
    values = [fid.mmd(features(40, 16, s), features(40, 16, s + 500)).item() for s in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5 and min(values) < 0


@pytest.mark.parametrize("n, m, subsets, size", [
    (1300, 1100, 100, 1000), (1000, 1300, 100, 1000), (1000, 1000, 1, 1000), (300, 300, 1, 300),
    (1300, 300, 100, 300)])
def test_kid_has_100_subsets_unless_the_sets_are_small_and_equal(
        n, m, subsets, size, monkeypatch):
    taken = []
    monkeypatch.setattr(fid, "mmd", lambda x, y: (taken.append((x, y)), x.mean() - y.mean())[1])
    mean, std, *found = fid.kid(features(n, 4), features(m, 4, seed=1))
    assert found == [subsets, size] == [len(taken), len(taken[0][0])] and len(taken[0][1]) == size
    assert len(taken[0][0].unique(dim=0)) == size  # without replacement
    assert (std > 0) == (subsets > 1)


def test_kid_of_a_set_and_itself_is_below_0():
    """As the docstring says: pairs of equal images count in the last term alone."""
    x = features(100, 16)
    kernel = (x @ x.T / 16 + 1) ** 3
    same, other = kernel.diag().mean(), (kernel.sum() - kernel.trace()) / (100 * 99)
    assert other < same and fid.kid(x, x)[0] == pytest.approx(2 / 100 * (other - same).item())


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


def test_averages_do_not_count_the_padding_and_the_last_block_takes_maxima(original):
    net = fid.build_inception(original.state_dict())
    maps = {"Mixed_5b": 192, "Mixed_5c": 256, "Mixed_5d": 288, "Mixed_6b": 768, "Mixed_6c": 768,
            "Mixed_6d": 768, "Mixed_6e": 768, "Mixed_7b": 1280, "Mixed_7c": 2048}
    for name, n in maps.items():
        block, x = getattr(net, name), torch.zeros(1, n, 5, 5)
        x[:, :, 0, 0] = 9  # a corner: the average is 9 of 4 pixels, torchvision's would be of 9
        pooled, corner = torch.zeros(1, n, 5, 5), torch.tensor([[9 / 4, 9 / 6], [9 / 6, 1]])
        pooled[:, :, :2, :2] = 9 if name == "Mixed_7c" else corner
        expected = block.branch_pool(pooled)
        assert torch.allclose(block(x)[:, -expected.shape[1]:], expected, atol=1e-5), name


def test_features_are_those_of_the_original(original, weights, monkeypatch):
    """torchvision's network, BatchNorm and all, with nothing but its pooling replaced."""
    net, digest = fid.load_inception(weights, CPU)
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
        found = net(fid.to_input(images, CPU))
        monkeypatch.setattr(F, "avg_pool2d", patched)
        for image, ours in zip(images, found, strict=True):
            x = F.interpolate(image[None] / 255, size=(299, 299), mode="bilinear")
            expected = original(2 * x - 1)[0]
            assert ours.shape == (2048,) and ours.dtype == torch.float32
            assert (ours - expected).norm() < 1e-5 * expected.norm()
            assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_weights_in_the_old_format_of_torch_are_read(original, weights, tmp_path, monkeypatch):
    """The published file is of 2019, before torch.save wrote zips: same weights, same features."""
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    old = hub / fid.URL.split("/")[-1]
    torch.save(torch.load(weights), old, _use_new_zipfile_serialization=False)
    x = fid.to_input(torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8), CPU)
    expected = fid.build_inception(original.state_dict())(x)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for path in (old, None):  # by --weights, and from the cache
        net, _ = fid.load_inception(path, CPU)
        assert torch.equal(net(x), expected)


def test_input_is_resized_one_by_one_and_not_antialiased():
    small, large = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1, 598, 598).byte()
    large[:, ::4] = 255  # every fourth row: antialiasing would make grey of it
    mixed = fid.to_input([small, large, small], CPU)
    assert mixed.shape == (3, 3, 299, 299) and (mixed[0] == -1).all()
    assert torch.equal(mixed[1:2], fid.to_input([large], CPU))
    half = mixed[1, 0, :, 0].unique()  # two rows make one: black, or half and half
    assert torch.allclose(half, torch.tensor([-1.0, 0.0]), atol=1e-6)
    white = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.allclose(fid.to_input(white, CPU), torch.ones(1))


def test_weights_are_downloaded_once_and_their_hash_is_checked(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    asked = []

    def download(url, **options):
        asked.append((url, options["check_hash"], options["weights_only"]))
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        shutil.copy(weights, tmp_path / "hub" / "checkpoints" / url.split("/")[-1])

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    for _ in range(2):
        _, digest = fid.load_inception(None, CPU)
    assert asked == [(fid.URL, True, True)]
    assert digest != fid.PUBLISHED  # what lies there by that name is not believed


def test_without_the_net_one_line_says_where_to_put_the_weights(tmp_path, monkeypatch, capsys):
    def offline(url, **options):
        raise URLError("no net")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    assert call(fid, "cartoon", "cartoon", "--device", "cpu", "--root", DATA) == 2
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


def run_json(capsys, *args):
    """-> the results of run(), one for every FAKE."""
    return [json.loads(line) for line in run(capsys, *args, "--json").out.splitlines()]


def test_other_weights_give_an_fd_and_no_fid(weights, tmp_path, capsys):
    """Two folders through the network itself, with weights that are not the published ones."""
    real, fake = fill(tmp_path / "real", 2), fill(tmp_path / "fake", 2, size=(33, 33), seed=1)
    Image.new("L", (50, 30), 100).save(fake / "deep.JPG", format="JPEG")
    out = run(capsys, real, fake, "--weights", weights, "--batch", 2).out.splitlines()[-1]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    pattern = (r"FD \d+\.\d\d   KD -?\d\.\d{4} \+- \d\.\d{4} \(subsets: 100 of 2\)   "
               rf"\(weights {digest}, bilinear 299, 33x33 px, 2 of {real} vs 3 of {fake}\)")
    assert re.fullmatch(pattern, out)


def test_the_line_and_the_json_tell_the_same(quick, tmp_path, capsys):
    real, fake = fill(tmp_path / "real", 40), fill(tmp_path / "fake", 30, seed=1)
    shown = run(capsys, real, fake)
    pattern = (r"FID (\d+\.\d\d)   KID (-?\d\.\d{4}) \+- (\d\.\d{4}) \(subsets: 100 of 30\)   "
               rf"\(inception-2015-12-05, bilinear 299, 20x16 px, 40 of {real} vs 30 of {fake}\)")
    numbers = re.fullmatch(pattern, shown.out.splitlines()[-1])
    assert numbers and "warning: below 2,048 images" in shown.err
    silent = run(capsys, real, fake, "--json")
    result = json.loads(silent.out)
    assert [f"{result['FID']:.2f}", f"{result['KID']:.4f}", f"{result['KID_std']:.4f}"] == list(
        numbers.groups())
    assert result["n_real"] == 40 and result["n_fake"] == 30 and result["subset_size"] == 30
    assert "30 of 30 images" in silent.err  # progress
    alone, = run_json(capsys, real, fake, "--no-kid", "--batch", 7)
    assert "KID" not in alone and alone["FID"] == pytest.approx(result["FID"])
    pixels = [torch.stack([fid.read_picture(file) for file in fid.list_files(folder)])
              for folder in (real, fake)]
    x, y = (Quick()(fid.to_input(p, CPU)).double() for p in pixels)
    assert result["FID"] == pytest.approx(frechet(x, y), rel=1e-9)
    assert result["KID"] == pytest.approx(fid.kid(x, y)[0], rel=1e-6)
    assert run_json(capsys, real, real)[0]["FID"] < 1e-6


@pytest.mark.parametrize("n, warns", [(2047, True), (2048, False), (None, False)])
def test_a_warning_appears_below_2048_images(n, warns, capsys):
    known = fid.statistics([features(9, 4)], fid.PUBLISHED)._replace(features=None)
    a, b = (fid.Source(name, size=(8, 8)) for name in "ab")
    real, fake = known._replace(n=n), known._replace(n=9000)
    result, line = fid.compare(a, real, b, fake, fid.PUBLISHED)
    assert ("warning" in capsys.readouterr().err) == warns
    assert line == ("FID 0.00   (inception-2015-12-05, bilinear 299, 8x8 px, "
                    f"{n or '?'} of a vs 9000 of b)")
    assert result["n_real"] == n


def test_several_fakes_have_a_line_each_and_real_is_read_once(quick, tmp_path, capsys, monkeypatch):
    real = fill(tmp_path / "real", 9)
    fakes = [fill(tmp_path / f"fake{i}", 5 + i, seed=i + 1) for i in range(3)]
    alone = [run_json(capsys, real, fake)[0] for fake in fakes]
    read, read_picture = [], fid.read_picture
    monkeypatch.setattr(fid, "read_picture", lambda path, size=None: (
        read.append(str(path)), read_picture(path, size))[1])
    assert run_json(capsys, real, *fakes) == alone
    assert read.count(f"{real}/003.png") == 1


def test_size_makes_both_sides_alike(quick, tmp_path, capsys):
    """Originals of any size and shape against what was made of them for training: no distance."""
    real, prepared = fill(tmp_path / "real", 12, size=(90, 50)), tmp_path / "prepared"
    prepared.mkdir()
    for i, image in enumerate(fid.load_images(str(real), 16, tmp_path / "data").images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(prepared / f"{i}.png")
    plain = run(capsys, real, prepared, "--json")
    assert "of (90, 50) pixels" in plain.err and "of (16, 16); --size" in plain.err
    alike = run(capsys, real, prepared, "--json", "--size", 16)
    assert "--size makes" not in alike.err and json.loads(alike.out)["size"] == "16x16"
    assert json.loads(alike.out)["FID"] < 1e-6 < 1 < json.loads(plain.out)["FID"]


def test_n_takes_that_many_random_images(quick, tmp_path, capsys):
    real, fake = fill(tmp_path / "real", 30), fill(tmp_path / "fake", 9, seed=1)
    some = [run_json(capsys, real, fake, "--n", 8)[0] for _ in range(2)]
    assert some[0] == some[1] and (some[0]["n_real"], some[0]["n_fake"]) == (8, 9)
    other, = run_json(capsys, fill(tmp_path / "first", 8), fake)
    assert other["FID"] != pytest.approx(some[0]["FID"], rel=1e-6)
    named, = run_json(capsys, "cartoon", fake, "--n", 50, "--root", DATA, "--no-kid")
    assert named["n_real"] == 50 and named["real"] == "cartoon (train)"


def test_a_folder_may_hold_everything_and_a_broken_file_is_told_with_its_reason(
        quick, tmp_path, capsys):
    """Any type, mode, size and depth; what cannot be read is left out and counted."""
    plain, odd = fill(tmp_path / "plain", 4, seed=2), tmp_path / "odd"
    modes = {"1": "png", "L": "JPG", "LA": "png", "P": "gif", "RGBA": "webp", "CMYK": "jpeg",
             "I;16": "tiff", "RGB": "bmp", "F": "tif"}
    for i, (mode, end) in enumerate(modes.items()):
        folder = odd / f"level{i % 3}" / "below"
        folder.mkdir(parents=True, exist_ok=True)
        if mode == "I;16":
            image = Image.fromarray(np.full((9, 9), 40000, np.uint16))
        elif mode == "F":
            image = Image.fromarray(np.full((9, 9), 0.6, np.float32))
        else:
            image = Image.new("RGB", (10 + i, 30), (250, 10 * i, 0)).convert(mode)
        image.save(folder / f"{i}.{end}")
    whole = (plain / "000.png").read_bytes()
    (odd / "broken.png").write_bytes(whole[: len(whole) // 2])
    (odd / "photo.heic").write_bytes(b"no decoder for it")
    shown = run(capsys, plain, odd, "--batch", 2)
    assert f"4 of {plain} vs 9 of {odd}" in shown.out
    assert f"left out: 2 unreadable files {odd}/broken.png: image file is truncated" in shown.out
    for file, grey in ((odd / "level0/below/6.tiff", 156), (odd / "level2/below/8.tif", 153)):
        picture = fid.read_picture(file)  # 16 bits and fractions scaled, grey replicated
        assert picture.shape == (3, 9, 9) and (picture == grey).all()


def test_pictures_come_in_order_and_a_batch_at_a_time(monkeypatch):
    read = []
    monkeypatch.setattr(fid, "read_picture", lambda path, size: (
        read.append(path), torch.tensor(path) if path != 7 else "7: broken")[1])
    batches = fid.read_batches(list(range(50)), None, 5)
    assert next(batches) == [0, 1, 2, 3, 4]
    assert len(read) == 5  # not all fifty: memory does not grow
    assert [x for batch in batches for x in batch] == [5, 6, *range(8, 50)]


def test_the_folder_of_a_run_means_its_generated_images(quick, tmp_path, capsys):
    """Not its real.png and its grids. And without generated images that is told."""
    real, out = fill(tmp_path / "real", 5), tmp_path / "run"
    fill(out / "samples", 3, size=(90, 90))
    shutil.copy(out / "samples" / "000.png", out / "real.png")
    (out / "checkpoint.pt").write_bytes(b"")
    assert call(fid, real, out, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert f"there is no {out}/generated" in error and "--generate N" in error
    fill(out / "generated", 4, seed=1)
    for flags in ((real, out), (out, real)):
        result, = run_json(capsys, *flags)
        assert {result["n_real"], result["n_fake"]} == {5, 4}
        assert {result["real"], result["fake"]} == {str(real), f"{out}/generated"}
    assert run_json(capsys, real, out / "generated", "--no-kid")[0]["n_fake"] == 4


def test_a_run_with_classes_is_scored_as_a_whole_or_class_by_class(quick, tmp_path, capsys):
    """As cgan and acgan draw them. Their table of labels is no unreadable image."""
    real, out = fill(tmp_path / "real", 9), tmp_path / "run"
    (out / "generated").mkdir(parents=True)
    (out / "checkpoint.pt").write_bytes(b"")
    (out / "generated" / "labels.csv").write_text("image_id,Smiling\n00000.png,1\n")
    for k, (label, n) in enumerate({"cat": 4, "zebra crossing": 3}.items()):
        fill(out / "generated" / label, n, seed=k + 1)
    for flags, n in ([real, out], 7), ([real, out / "generated" / "zebra crossing"], 3):
        shown = run(capsys, *flags, "--no-kid", "--json")
        assert json.loads(shown.out)["n_fake"] == n and "left out" not in shown.err
    for n in (1, 7):  # the table takes no image's place in a random choice
        flags = out, real, "--n", n, "--quality-index", "--epochs", 1
        assert run_json(capsys, *flags)[0]["n_real"] == n


def test_images_that_are_older_than_the_checkpoint_are_told(quick, tmp_path, capsys):
    """--generate, --resume, and then fid.py: the images are those of the earlier G."""
    real, out = fill(tmp_path / "real", 5), tmp_path / "run"
    fill(out / "generated" / "cat", 4, seed=1)
    (out / "checkpoint.pt").write_bytes(b"")
    (tmp_path / "checkpoint.pt").write_bytes(b"")  # of no concern to real
    images = [*out.rglob("0*.png"), *real.iterdir()]
    old = "the checkpoint is newer than these images: --generate draws new ones"
    for drawn, trained in ((2000, 1000), (1000, 2000)):
        for file in images:
            os.utime(file, (drawn, drawn))
        for checkpoint in (out / "checkpoint.pt", tmp_path / "checkpoint.pt"):
            os.utime(checkpoint, (trained, trained))
        for fake in (out, out / "generated", out / "generated" / "cat"):
            lines = run(capsys, real, fake, "--no-kid").err.splitlines()
            assert [line for line in lines if "checkpoint" in line] == [
                f"fid.py: warning: {out / 'generated' if fake == out else fake}: {old}"
            ] * (trained > drawn)


def test_data_sets_are_prepared_as_for_training(quick, tmp_path, capsys):
    """By name and as files of the same pixels, and the size is that of the fakes."""
    fakes = fill(tmp_path / "fakes", 5, size=(24, 24))
    images = fid.load_images("cartoon", 24, DATA, split="test").images[:50]
    (tmp_path / "files").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "files" / f"{i:04}.png")
    common = fakes, "--no-kid", "--root", DATA, "--n", 50
    named, = run_json(capsys, "cartoon", *common, "--split", "test")
    assert named["real"] == "cartoon (test)" and named["size"] == "24x24"
    expected, = run_json(capsys, tmp_path / "files", *common)
    assert named["FID"] == pytest.approx(expected["FID"], rel=1e-9)
    smaller, = run_json(capsys, "cartoon", *common, "--split", "test", "--size", 8)
    assert smaller["FID"] != pytest.approx(expected["FID"], rel=1e-3)
    train, = run_json(capsys, "cartoon", *common)
    assert train["FID"] != pytest.approx(expected["FID"], rel=1e-6)


def test_statistics_are_saved_and_read_as_pytorch_fid_does(quick, tmp_path, capsys):
    real, fake = fill(tmp_path / "real", 30), fill(tmp_path / "fake", 20, seed=1)
    direct, = run_json(capsys, real, fake)
    saved = tmp_path / "real.npz"
    assert "30 images -> " in run(capsys, real, "--save", saved).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake", "real", "real.npz"]
    with np.load(saved) as f:
        mu, sigma = f["mu"][:], f["sigma"][:]
    assert mu.shape == (2048,) and sigma.shape == (2048, 2048) and sigma.dtype == np.float64
    shown = run(capsys, saved, fake)
    assert shown.out.endswith(f"bilinear 299, 20x16 px, 30 of {saved} vs 20 of {fake})\n")
    assert "KID" not in shown.out
    again, = run_json(capsys, saved, fake)
    assert again["FID"] == pytest.approx(direct["FID"], rel=1e-9) and again["n_real"] == 30

    theirs = tmp_path / "theirs.npz"
    np.savez_compressed(theirs, mu=mu, sigma=sigma)
    shown = run(capsys, theirs, saved)
    assert shown.out == (
        "FID 0.00   (inception-2015-12-05, bilinear 299, 20x16 px, "
        f"? of {theirs} vs 30 of {saved})\n")
    assert "?x? px" in run(capsys, theirs, theirs).out


def test_saved_statistics_know_the_size_of_their_images(quick, tmp_path, capsys):
    real, fake = fill(tmp_path / "real", 30), fill(tmp_path / "fake", 20, size=(24, 24))
    saved = tmp_path / "real.npz"
    run(capsys, real, "--save", saved)
    for sets in ((real, fake), (saved, fake), (fake, saved)):
        assert "--size makes them equal" in run(capsys, *sets).err
    assert "makes them equal" not in run(capsys, saved, real).err


def test_statistics_are_saved_under_the_very_name_that_is_given(quick, tmp_path, capsys):
    """savez() alone would write st.npz, and then `fid.py st` would not find it."""
    real, saved = fill(tmp_path / "real", 30), tmp_path / "st"
    assert f"30 images -> {saved}\n" in run(capsys, real, "--save", saved).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "st"]
    result, = run_json(capsys, saved, real)
    assert result["FID"] < 1e-6 and result["n_real"] == 30


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_covariance_of_few_images_is_one_for_all_its_rounding(kind, tmp_path):
    """Most eigenvalues are 0, so rounding makes about half of these negative."""
    x = features(30, 2048)
    np.savez(tmp_path / "few.npz", mu=x.mean(0), sigma=x.T.cov().numpy().astype(kind))
    sigma = fid.load_statistics(tmp_path / "few.npz")[0].sigma
    assert torch.linalg.eigvalsh(sigma).min() < 0 and sigma.dtype == torch.float64


# --- the quality index ----------------------------------------------------------------------------


def test_a_deformation_bends_all_colours_alike_and_keeps_what_is_constant():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 64, 64), np.uint8)
    assert np.array_equal(fid.deform(image, rng, alpha=0), image)
    constant = np.full((3, 64, 64), 77, np.uint8)
    assert np.array_equal(fid.deform(constant, rng), constant)
    grey = np.repeat(image[:1], 3, axis=0)
    bent = fid.deform(grey, rng)
    assert np.array_equal(bent[0], bent[1]) and np.array_equal(bent[0], bent[2])  # no fringes
    assert bent.dtype == np.uint8 and not np.array_equal(bent, grey)


def test_a_deformation_moves_pixels_by_0_91():
    """On a ramp, a pixel's new value tells how far it was fetched from."""
    ramp = np.tile(np.arange(128, dtype=np.uint8), (1, 128, 1))
    moved = np.float64(fid.deform(ramp, np.random.default_rng(1)) - np.float64(ramp))
    assert moved[:, 10:-10, 10:-10].std() == pytest.approx(0.91, abs=0.06)


def test_the_quality_network_has_the_parameters_of_the_report():
    net = fid.QualityNet()
    assert sum(p.numel() for p in net.parameters()) == 1_055_489
    assert net(torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)).shape == (5,)


def test_both_classes_are_in_both_parts_and_no_image_is_in_two():
    real = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 64, 64)
    train, test = fid.quality_parts(real, np.random.default_rng(0))
    ids = [part[0][:, 0, 0, 0].tolist() for part in (train, test)]
    assert [len(x) for x in (*train, *test)] == [30, 30, 10, 10]
    assert sorted(ids[0] + ids[1]) == list(range(40)) and ids[0] != sorted(ids[0])
    assert train[1][:, 0, 5, 5].tolist() == ids[0]  # constant images stay what they are


def test_the_quality_network_learns_to_tell_deformed_images(monkeypatch):
    """Stripes, which no deformation leaves straight. (A larger step, to need fewer of them.)"""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr: adam(parameters, lr=100 * lr))
    torch.manual_seed(0)
    phase, width = torch.rand(2, 160, 1, 1, 1)
    stripes = (torch.arange(64.0) / (1 + width) + 9 * phase).sin().gt(0) * 255
    real = stripes.expand(160, 3, 64, 64).byte()
    bent = torch.stack([torch.from_numpy(fid.deform(image, np.random.default_rng(i)))
                        for i, image in enumerate(real[:40].numpy())])
    net, on_real, on_deformed = fid.train_quality(real, 10, CPU)
    assert on_real > 0.8 and on_deformed > 0.8
    assert fid.quality_logits(net, bent, CPU).sigmoid().mean() > 0.6
    assert fid.quality_logits(net, real, CPU).sigmoid().mean() < 0.4


def test_the_quality_index_is_told_for_every_fake(tmp_path, capsys):
    real, fake = fill(tmp_path / "real", 12), fill(tmp_path / "fake", 5, mode="L")
    flags = real, fake, "--quality-index", "--epochs", 1
    line = run(capsys, *flags).out.splitlines()[-1]
    assert re.match(r"quality index 0\.\d{3}   right on held-out images: \d+\.\d% of real", line)
    assert line.endswith(f"(64 px, 1 epochs, 12 of {real} vs 5 of {fake})")
    for i in range(4):  # a collapsed G: copies count
        shutil.copy(fake / "000.png", fake / f"copy{i}.png")
    shown = run_json(capsys, real, fake, real, *flags[2:])
    assert [result["n_fake"] for result in shown] == [9, 12]


# --- the terminal ---------------------------------------------------------------------------------


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


def test_a_name_that_the_terminal_cannot_show_does_not_lose_the_result(tmp_path):
    """As on Windows. The result used to be lost after everything had been measured."""
    sigma = np.diag(np.float64(np.arange(2048) == 7))
    np.savez_compressed(tmp_path / "写真.npz", mu=np.zeros(2048), sigma=sigma)
    done = shell(HERE / "fid.py", "写真.npz", "写真.npz", cwd=tmp_path,
                 env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and done.stdout.startswith("FID 0.00") and not done.stderr
    assert r"\u5199\u771f.npz" in done.stdout


# --- wrong input ----------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, monkeypatch, original):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "good", 4)
    fill(tmp_path / "single", 1)
    for folder, file in [("words", "a.txt"), ("broken", "a.png"), ("broken", "b.jpg"),
                         ("run", "checkpoint.pt")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    mu, sigma = np.zeros(2048), np.diag(np.float64(np.arange(2048) == 7))
    np.save("array.npy", mu)
    shutil.copy("array.npy", "renamed.npz")
    np.savez("other.npz", mu=mu)
    np.savez("width.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez("words.npz", mu="mu", sigma="sigma")
    np.savez_compressed("nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez_compressed("complex.npz", mu=mu, sigma=sigma * 1j)
    np.savez_compressed("void.npz", mu=mu, sigma=sigma * np.nan)
    np.savez_compressed("infinite.npz", mu=mu, sigma=np.where(sigma > 0, np.inf, 0))
    np.savez_compressed("lopsided.npz", mu=mu, sigma=np.eye(2048) + np.eye(2048, k=1) / 9)
    np.savez_compressed("negative.npz", mu=mu, sigma=np.eye(2048) - 1.01 * sigma)
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
    ("good nothing", "nothing: no image that can be read. It is none of cartoon"),
    ("good ''", ": no image that can be read"),  # and not everything below the current folder
    ("good empty", "empty: no image"),
    ("empty good", "empty: no image"),
    ("good words", "words: no image that can be read. words/a.txt: cannot identify"),
    ("good broken", "broken: no image that can be read. broken/a.png: cannot identify"),
    ("good single", "1 usable images"),
    ("good file", "file is not a .npz file with mu and sigma"),
    ("good array.npy", "array.npy is not a .npz file with mu and sigma"),
    ("good run", "there is no run/generated; run the training script with --generate N first"),
    ("good renamed.npz", "renamed.npz is not a .npz file with mu and sigma"),
    ("good missing.npz", "missing.npz"),
    ("good other.npz", "other.npz is not"),
    ("good words.npz", "words.npz is not"),
    ("good pickle.npz", "pickle.npz is not"),
    ("good cut.npz", "cut.npz is not"),
    ("good width.npz", "width.npz: mu and sigma are not those of 2048 features"),
    ("right.npz complex.npz", "complex.npz is not a .npz file with mu and sigma"),
    ("right.npz nan.npz", "nan.npz: mu and sigma are not a mean and a covariance"),
    ("right.npz void.npz", "void.npz: mu and sigma are not a mean and a covariance"),
    ("right.npz infinite.npz", "infinite.npz: mu and sigma are not a mean and a covariance"),
    ("right.npz lopsided.npz", "lopsided.npz: mu and sigma are not a mean and a covariance"),
    ("right.npz negative.npz", "negative.npz: mu and sigma are not a mean and a covariance"),
    ("foreign.npz stranger.npz", "abcd1234 and dcba4321"),
    ("good good --weights cut.pth", "no weights of this network in cut.pth"),
    ("good good --weights void.pth", "in void.pth:"),
    ("good good --weights file", "in file:"),
    ("good good --weights else.pth", "in else.pth:"),
    ("good good --weights list.pth", "in list.pth:"),
    ("good good --weights misfit.pth", "in misfit.pth:"),
    ("good good --weights none.pth", "FileNotFoundError"),
    ("good good --weights empty", "in empty:"),
    ("good --save no/such/out.npz", "--save no/such/out.npz"),
    ("good --save file/out.npz", "--save file/out.npz: "),
    ("right.npz good --save out.npz", "--save out.npz: for FID, with images as REAL"),
    ("good good --quality-index --save out.npz", "--save out.npz: for FID"),
    ("good good --split middle", "--split"),
    ("good good --size big", "--size"),
    *((f"good good --{flag} {number}", f"--{flag} {number}: it must be above 0")
      for flag in ("n", "size", "batch", "epochs") for number in (0, -1)),
    ("good good --device gpu", "--device: invalid choice: 'gpu'"),
    ("good good --device cuda", "--device: invalid choice: 'cuda'"),
    ("good good --colour", "--colour"),
    ("good right.npz --quality-index", "right.npz: the quality index needs images"),
    ("good --quality-index", "FAKE is missing"),
    ("good empty --quality-index", "empty: no image"),
    ("celeba good --root empty", "no img_align_celeba with images below empty"),
]


def test_a_mistake_is_one_line_with_status_2_and_nothing_is_written(desk, capsys, monkeypatch):
    load_inception, wrong, before = fid.load_inception, [], tree(desk)

    def quick_or_real(path, device):
        return load_inception(path, device) if path else (Quick(), fid.PUBLISHED)

    monkeypatch.setattr(fid, "load_inception", quick_or_real)
    for flags, expected in TABLE:
        status = call(fid, *shlex.split(flags))
        errors = capsys.readouterr().err.splitlines()
        errors = [line for line in errors if "warning: " not in line]
        if status != 2 or len(errors) != 1 or len(errors[0]) > 400 or expected not in errors[0]:
            wrong.append((flags, status, errors))
        if tree(desk) != before:
            wrong.append((flags, "changed", set(tree(desk)) ^ set(before)))
            before = tree(desk)
    assert not wrong


@pytest.mark.parametrize("cuda, mps, chosen", [
    (True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_device_is_the_first_of_cuda_mps_and_cpu(cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert fid.read_arguments(["a", "b"]).device == torch.device(chosen)
    assert fid.read_arguments(["a", "b", "--device", "cpu"]).device == CPU


def test_a_folder_without_a_readable_image_is_noticed_before_real_is_read(quick, desk, capsys):
    assert call(fid, "good", "broken", "--device", "cpu") == 2
    assert capsys.readouterr().out == ""


def test_statistics_of_other_weights_are_never_called_fid(desk, capsys):
    shown = run(capsys, "foreign.npz", "right.npz")
    assert shown.out.startswith("FD 0.00   (weights abcd1234, bilinear 299")
    assert "FID" not in run_json(capsys, "foreign.npz", "right.npz")[0]


def test_a_notebooks_own_arguments_are_not_read(monkeypatch, capsys):
    def told():
        with pytest.raises(SystemExit) as end:
            fid.main()
        return end.value.code, capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "kernel.json", "--help"])
    status, error = told()
    assert status == 2 and error.startswith("fid.py: error: the following arguments are required")
    monkeypatch.setattr(sys, "argv", ["/x/fid.py", "nothing", "--n", "0"])
    assert told() == (2, "fid.py: --n 0: it must be above 0\n")


def test_the_commands_of_the_docstring_are_understood():
    found = re.findall(r"python fid\.py ([^;#\n]*)", fid.__doc__)
    assert len(found) == 5
    for flags in found:
        fid.read_arguments(shlex.split(flags))


def test_importing_does_nothing_and_help_is_there(tmp_path, capsys):
    shutil.copy(HERE / "fid.py", tmp_path)
    quiet = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = shell(code="import fid\nfid.main(['nothing', 'nowhere'])", cwd=tmp_path, env=quiet)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        fid.main(["--help"])
    assert end.value.code == 0 and "--quality-index" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["fid.py"]
