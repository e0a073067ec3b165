"""fid.py against the released pytorch-fid 0.3.0: agreement, and paired ratios of time.

Not collected by pytest. In an environment with requirements.txt, and a SciPy below 1.18, because
pytorch-fid does not run with a newer one:

    pip install --no-deps pytorch-fid==0.3.0 && python tests/measure/compare_fid.py

Both get the same random weights, so nothing is downloaded: agreement does not depend on the values.
The two sides of every ratio are timed in turn, so that what else the machine does hits them alike.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytorch_fid.fid_score as theirs
import pytorch_fid.inception
import torch
from PIL import Image
from pytorch_fid.inception import InceptionV3
from torch import nn
from torchvision.models import inception_v3

HERE = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("fid", HERE / "fid.py")
fid = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fid)
cpu = torch.device("cpu")


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def random_weights(path):
    """In the format of the published ones; activations neither vanish nor explode."""
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.7, 1.3)
            nn.init.uniform_(layer.running_var, 0.7, 1.3)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
    torch.save(net.state_dict(), path)
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: net.state_dict()


def draw(folder, n, sizes, end, seed=0):
    """Smooth random pictures with some noise, of these sizes in turn."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        size = sizes[i % len(sizes)]
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, 3)
        noisy = np.asarray(coarse) + rng.normal(0, 12, (*size[::-1], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05}.{end}")
    return folder


def features_of(folder, net, batch=32):
    with torch.no_grad():
        batches = fid.read_batches(fid.list_files(folder), None, batch)
        return torch.cat([net(fid.to_input(images, cpu)) for images in batches])


def their_features(folder, model, batch=50, workers=2):
    files = sorted(Path(folder).rglob("*.*"))
    return theirs.get_activations(files, model, batch, 2048, "cpu", workers)


def paired(ours, other, rounds):
    """Median and quartiles of other's time by ours, and both median times."""
    times = []
    for _ in range(rounds):
        pair = []
        for function in (other, ours):
            start = time.perf_counter()
            function()
            pair.append(time.perf_counter() - start)
        times.append(pair)
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    theirs_s, ours_s = (statistics.median(column) for column in zip(*times, strict=True))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{theirs_s:.2f}", f"{ours_s:.2f}"


def compare_features(desk, net, model):
    row("features of", "largest difference / largest feature", "norm of difference / norm")
    row("---", "---", "---")
    kinds = {"32 px": [(32, 32)], "64 px": [(64, 64)], "299 px": [(299, 299)],
             "mixed sizes": [(32, 32), (64, 48), (299, 299), (31, 400), (500, 333)]}
    for name, sizes in kinds.items():
        for end in ("png", "jpg"):
            folder = draw(desk / f"{name} {end}", 10, sizes, end)
            ours = features_of(folder, net, batch=4).double().numpy()
            other = their_features(folder, model, batch=5 if len(sizes) == 1 else 1)
            away = np.abs(ours - other).max() / np.abs(other).max()
            norm = (np.linalg.norm(ours - other, axis=1) / np.linalg.norm(other, axis=1)).max()
            row(f"{name}, {end}", f"{away:.1e}", f"{norm:.1e}")


def synthetic(n, seed):
    """Features like Inception's: not negative, correlated, on scales from 1 to 1/100."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(9)) / 2048**0.5
    x = torch.randn(n, 2048, generator=random) * torch.logspace(0, -2, 2048)
    return (2 * x @ mix + 0.2 + seed / 50).clamp(min=0)


def exact(x, y):
    """From the singular values of the features, without any root of a rounding error."""
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    squares = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    return squares - 2 * torch.linalg.svdvals(a @ b.T).sum()


def compare_distances(rounds):
    row("images", "FID, pytorch-fid", "FID, fid.py", "exact", "times faster", "s", "s, fid.py")
    row(*7 * ["---"])
    for n, m in [(10_000, 10_000), (1000, 1000), (100, 100), (100, 10_000)]:
        x, y = synthetic(n, 1), synthetic(m, 2)
        mine = [(s.mu, s.sigma) for s in map(fid.statistics, (x.split(500), y.split(500)))]
        other = [(v.mean(0), np.cov(v, rowvar=False)) for v in (x.double().numpy(),
                                                               y.double().numpy())]
        found = {}

        def ours():
            found["ours"] = fid.frechet_distance(*mine[0], *mine[1])

        def other_way():
            found["theirs"] = theirs.calculate_frechet_distance(*other[0], *other[1])

        speed = paired(ours, other_way, rounds)
        best = f"{exact(x.double(), y.double()):.7f}" if n <= 1000 else "-"
        row(f"{n} vs {m}", f"{found['theirs']:.7f}", f"{found['ours']:.7f}", best, *speed)


def compare_speed(folder, net, model, rounds):
    row("features, end to end", "times faster", "s", "s, fid.py")
    row(*4 * ["---"])
    n = len(fid.list_files(folder))
    speed = paired(lambda: features_of(folder, net), lambda: their_features(folder, model), rounds)
    row(f"{n} images of 32 px, {torch.get_num_threads()} threads", *speed)


def compare_files(desk, weights):
    """Statistics written by either, read by the other; and both commands from end to end."""
    a = draw(desk / "a", 12, [(32, 32)], "png", seed=1)
    b = draw(desk / "b", 10, [(32, 32)], "png", seed=2)
    theirs.save_fid_stats([str(a), str(desk / "theirs.npz")], 6, cpu, 2048, 0)
    common = ["--weights", str(weights), "--device", "cpu"]
    fid.main([str(a), "--save", str(desk / "ours.npz"), *common])

    def ours(first):
        return next(fid.report_scores(fid.read_arguments([str(first), str(b), *common])))[0]

    found = {"pytorch-fid, folders": theirs.calculate_fid_given_paths([str(a), str(b)], 5, cpu,
                                                                      2048, 0)}
    found["pytorch-fid, .npz of fid.py"] = theirs.calculate_fid_given_paths(
        [str(desk / "ours.npz"), str(b)], 5, cpu, 2048, 0)
    results = [ours(first) for first in (a, desk / "theirs.npz", desk / "ours.npz")]
    for name, result in zip(("folders", ".npz of pytorch-fid", "own .npz"), results, strict=True):
        found[f"fid.py, {name}"] = result["FD"]
    row("both commands on the same two folders", "distance")
    row("---", "---")
    for name, value in found.items():
        row(name, f"{value:.7f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of timings (3)")
    parser.add_argument("--images", type=int, default=100, help="images to time (100)")
    args = parser.parse_args()
    torch.manual_seed(0)
    theirs.tqdm = lambda batches: batches
    print(json.dumps({"torch": torch.__version__, "numpy": np.__version__,
                      "threads": torch.get_num_threads(), "rounds": args.rounds}), "\n")
    with tempfile.TemporaryDirectory() as name:
        desk = Path(name)
        random_weights(desk / "weights.pth")
        net, _ = fid.load_inception(desk / "weights.pth", cpu)
        model = InceptionV3([3])
        compare_features(desk, net, model)
        print()
        compare_files(desk, desk / "weights.pth")
        print()
        folder = draw(desk / "timed", args.images, [(32, 32)], "jpg")
        compare_speed(folder, net, model, args.rounds)
    print()
    compare_distances(args.rounds)


if __name__ == "__main__":
    sys.exit(main())
