"""FID and KID: how far generated images are from real ones.

FID: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium", 2017, arXiv 1706.08500. KID: Binkowski et al., "Demystifying MMD GANs", 2018, arXiv
1801.01401. The quality index: Espis and Potrimba, "Deep Learning Project", Bologna, 2020.

A network trained to name what is in a photograph (Inception) turns every image into 2048 numbers,
its features. FID treats the features of the real images as one Gaussian N(mu1, S1), those of the
fakes as another, and gives their Frechet distance. KID (maximum mean discrepancy) compares the
features pair by pair, without that assumption. 0 is best for both.

    FID = |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))          Eq. 6 of Heusel et al.
    KID = E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)]               x, x' two real images,
          k(x, y) = (x . y / 2048 + 1)^3                         y, y' two fakes

FID is biased: fewer images, larger FID. Compare only scores of equal n. KID is not biased, and may
fall below 0 by chance. Its mean and standard deviation are over 100 random subsets of 1,000.

--quality-index is another idea, and did not work: a network learns to tell real images from the
same images elastically deformed, and its mean output on the fakes (0 like real ones, 1 like
deformed ones) should say how good they are. In the report it did not follow FID over training; a
GAN's mistakes are not elastic deformations. It is here to be seen failing.

Differs from pytorch-fid (same network, weights and resizing, so the numbers agree):
  - no scipy.linalg.sqrtm, which is slow, may turn complex, and lost the option that pytorch-fid
    calls in SciPy 1.18; the trace comes from symmetric matrices (see frechet_distance)
  - images of any mix of sizes, in sub-folders too; transparent ones are put on white, rotated ones
    turned upright, 16-bit ones scaled, as the training scripts do it; unreadable files are counted
Differs from clean-fid's own mode: that one resizes with an antialiased bicubic filter, which gives
other numbers. Differs from torch-fidelity: no TensorFlow-1 resizing, whose pixel grid is shifted.
Differs from the report: its 97 % accuracy of the quality network were on deformed images only,
since the data was split before it was shuffled; here both classes are held out and reported. One
displacement is shared by the three colours, so that no colour fringes give deformed images away.

    python fid.py celeba runs/dcgan-celeba/generated --split test
    python fid.py folder/of/real --save real.npz ; python fid.py real.npz folder/of/fakes
    python fid.py cartoon runs/dcgan-cartoon/generated --quality-index
"""

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import deque, namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from scipy.linalg import lapack
from torch import nn
from torchvision.models import inception

# --- the distances --------------------------------------------------------------------------------

Statistics = namedtuple("Statistics", "n mu sigma features weights")  # None where not known


def statistics(batches, weights=None, keep=False):
    """Batches of features (B, d) -> n, mean (d,) and covariance (d, d) in float64.

    The batches are merged one by one (Chan et al. 1979), about their own means, so that nothing
    large is ever subtracted from something large, and none has to be kept. KID needs them: keep.
    """
    n, mu, squares, kept = 0, 0, 0, []
    for features in batches:
        x = features.double()
        m, mean = len(x), x.mean(0)
        away = mean - mu
        # One more row, for how far the means are apart, and a single product does it all.
        rows = torch.cat([x - mean, away[None] * (n * m / (n + m)) ** 0.5])
        squares = squares.addmm_(rows.T, rows) if n else rows.T @ rows
        mu = mu + away * (m / (n + m))
        n += m
        kept += [features] if keep else []
    if n < 2:
        raise UserError(f"{n} usable images: a covariance needs two at the very least")
    sigma = squares.cpu() / (n - 1)
    return Statistics(n, mu.cpu(), sigma, torch.cat(kept) if keep else None, weights)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Eq. 6, of float64 tensors.

    Write S1 = A A^T and S2 = B B^T. Then S1 S2 has the eigenvalues of C C^T with C = A^T B (besides
    zeros), which is symmetric: they are real, not negative, and quickly found.
    """
    A, B = sorted((square_root(sigma1), square_root(sigma2)), key=lambda root: root.shape[1])
    C = A.T @ B  # (rank of S1, rank of S2), the smaller rank first
    roots = torch.linalg.eigvalsh(C @ C.T).clamp(min=0).sqrt()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum()
    return max(0.0, distance.item())  # rounding can make -1e-13 of 0


def square_root(sigma):
    """A (d, rank) with A A^T = sigma, by Cholesky's method with pivoting.

    It stops at the rank of sigma: n images span n - 1 directions at most, and the roots of the
    rounding errors in all the others would add up.
    """
    upper, order, rank, _ = lapack.dpstrf(sigma.numpy())
    A = np.empty((len(sigma), rank))
    A[order - 1] = np.tril(upper.T[:, :rank])
    return torch.from_numpy(A)


def kid_subsets(n1, n2):
    """How many subsets KID is the mean of, and their size: less than 100 of 1,000 if n is small."""
    size = min(1000, n1, n2)
    return (1 if size == n1 == n2 else 100), size


def kid(x, y):
    """Features (n1, d) and (n2, d) -> mean and standard deviation of MMD^2 over the subsets."""
    subsets, size = kid_subsets(len(x), len(y))
    generator = torch.Generator().manual_seed(0)

    def subset(features):
        chosen = torch.randperm(len(features), generator=generator)[:size]
        return features[chosen.to(features.device)].double()

    values = torch.stack([mmd(subset(x), subset(y)) for _ in range(subsets)])
    return values.mean().item(), values.std(correction=0).item()


def mmd(x, y):
    """The unbiased estimate of MMD^2 from m features of either kind: no x is paired with itself."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    same = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return same / (m * (m - 1)) - 2 * xy.mean()


# --- the network ----------------------------------------------------------------------------------
# torchvision's Inception, changed to what the graph inception-2015-12-05 does: averages at the
# border do not count the padding, and the last block takes maxima.

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
PUBLISHED = "6726825d"  # how the SHA-256 of that file begins


class FoldedConv(nn.Conv2d):
    """Convolution, BatchNorm and ReLU. BatchNorm is in the weights: see fold_batchnorm()."""

    def forward(self, x):
        return F.relu(super().forward(x), inplace=True)


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(inception.InceptionA):
    def forward(self, x):
        b = self.branch5x5_2(self.branch5x5_1(x))
        c = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b, c, self.branch_pool(average(x))], 1)


class BlockC(inception.InceptionC):
    def forward(self, x):
        b = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        c = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        c = self.branch7x7dbl_5(self.branch7x7dbl_4(c))
        return torch.cat([self.branch1x1(x), b, c, self.branch_pool(average(x))], 1)


class BlockE(inception.InceptionE):
    def __init__(self, in_channels, conv_block):
        super().__init__(in_channels, conv_block)
        self.pool = maximum if in_channels == 2048 else average  # the last block, or the one before

    def forward(self, x):
        b, c = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        b = [self.branch3x3_2a(b), self.branch3x3_2b(b)]
        c = [self.branch3x3dbl_3a(c), self.branch3x3dbl_3b(c)]
        return torch.cat([self.branch1x1(x), *b, *c, self.branch_pool(self.pool(x))], 1)


def build_inception(state):
    """The network with these weights, in eval mode: images (B, 3, 299, 299) -> (B, 2048)."""
    blocks = BlockA, inception.InceptionB, BlockC, inception.InceptionD, BlockE
    blocks = [functools.partial(block, conv_block=FoldedConv) for block in blocks]
    net = inception.inception_v3(weights=None, init_weights=False, aux_logits=False,
                                 inception_blocks=[FoldedConv, *blocks, None])
    net.fc = nn.Identity()
    net.load_state_dict(fold_batchnorm(state, net.state_dict()))
    # Channels last suits convolutions on CPUs and GPUs alike.
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def fold_batchnorm(state, names):
    """BatchNorm in eval mode is a factor and a shift per channel: put them into the convolution."""
    folded = {}
    for name in names:
        layer, kind = name.rsplit(".", 1)
        weight, scale, shift, mean, variance = (
            state[f"{layer}.{part}"].double()
            for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        scale = scale / (variance + 1e-3).sqrt()
        new = weight * scale[:, None, None, None] if kind == "weight" else shift - mean * scale
        folded[name] = new.float()
    return folded


def load_inception(path, device):
    """-> the network, and how the SHA-256 of its weights begins.

    Without a path: the published weights, from torch's hub cache or else from the net.
    """
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name
        if not path.exists():
            try:
                with contextlib.redirect_stderr(sys.stdout):  # its progress
                    torch.hub.load_state_dict_from_url(
                        URL, map_location="cpu", check_hash=True, weights_only=True)
            except (OSError, RuntimeError) as error:
                raise UserError(f"{URL} cannot be downloaded ({error}); get that file and put it "
                                f"into {path.parent}, or name it by --weights") from error
    if not Path(path).is_file():
        raise UserError(f"--weights {path}: there is no such file")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    state = load_file(path)
    try:
        return build_inception(state).to(device), digest
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the weights of this network: {error!r}") from error


# --- from images to features ----------------------------------------------------------------------


def to_input(images, device):
    """uint8 (C, H, W), a list or a tensor of them -> (B, 3, 299, 299) in [-1, 1].

    Bilinear, not antialiased. A list of different sizes is resized one by one.
    """
    if len({image.shape for image in images}) > 1:
        return torch.cat([to_input([image], device) for image in images])
    x = images if torch.is_tensor(images) else torch.stack(images)
    x = x.to(device).expand(-1, 3, -1, -1) / 255
    x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    return (2 * x - 1).contiguous(memory_format=torch.channels_last)


def read_picture(path):
    """An image file at its own size -> uint8 (3, H, W); None if it cannot be read."""
    try:
        pixels = np.array(open_image(path).convert("RGB"))
    except Exception:  # as in decode()
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_ahead(files, batch):
    """Lists of pictures, in order. Threads decode the next batches, two and no more."""
    waiting = deque()
    with ThreadPool() as pool:
        for i in range(0, len(files), batch):
            waiting.append(pool.map_async(read_picture, files[i : i + batch]))
            if len(waiting) > 2:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def features_of(batches, total, name, net, device):
    """Batches of images -> batches of features (B, 2048) float32, with progress."""
    done, start = 0, time.perf_counter()
    home = "cpu" if device.type == "mps" else device  # MPS has no float64 for what comes next
    for images in batches:
        before, done = done, done + len(images)
        images = images if torch.is_tensor(images) else [x for x in images if x is not None]
        if len(images) > 0:
            with torch.no_grad():
                yield net(to_input(images, device)).to(home)
        if sys.stdout.isatty() or 10 * before // total < 10 * done // total:
            rate = done / (time.perf_counter() - start)
            progress(f"{name}: {done:,} of {total:,} images, {rate:.1f}/s", last=done == total)


def measure(source, args, net, weights, keep):
    """One of the three kinds of REAL and FAKE -> its Statistics."""
    if source.kind == "statistics":
        return source.content
    if source.kind == "data set":
        size = args.size or source.content
        images = load_images(source.name, size, args.root, args.split).images
        total, batches = len(images), images.split(args.batch)
        name = f"{source.name} ({args.split}, {size} px)"
        return statistics(features_of(batches, total, name, net, args.device), weights, keep)

    files, unreadable = source.content, []

    def batches():
        for i, pictures in enumerate(read_ahead(files, args.batch)):
            names = files[i * args.batch :]
            unreadable.extend(file for file, x in zip(names, pictures) if x is None)
            yield pictures

    try:
        found = features_of(batches(), len(files), source.name, net, args.device)
        return statistics(found, weights, keep)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error
    finally:
        if unreadable:
            print(f"left out, unreadable: {len(unreadable)}, the first is {unreadable[0]}")


# Statistics in files, with the keys mu and sigma: pytorch-fid reads and writes the same.


def load_statistics(path):
    try:
        with np.load(path) as saved:
            mu, sigma = (torch.from_numpy(np.float64(saved[key])) for key in ("mu", "sigma"))
            n = int(saved["n"]) if "n" in saved else None
            weights = str(saved["weights"]) if "weights" in saved else None
    except Exception as error:  # as in load_file()
        raise UserError(f"{path} is not a .npz file with mu and sigma: {error!r}") from error
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        raise UserError(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} should be "
                        "(2048,) and (2048, 2048)")
    if not (mu.isfinite().all() and sigma.isfinite().all() and torch.allclose(sigma, sigma.T)):
        raise UserError(f"{path}: not finite, or sigma is not symmetric")
    return Statistics(n, mu, sigma, None, weights)


def save_statistics(found, path):
    """Under a temporary name first: at no moment is there half a file."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, mu=found.mu, sigma=found.sigma, n=found.n,
                     weights=found.weights, mode="bilinear 299")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- the quality index ----------------------------------------------------------------------------


class QualityNet(nn.Sequential):
    """Images (B, 3, 64, 64) in [-1, 1] -> logits (B,): above 0 for deformed ones."""

    def __init__(self):
        def conv(channels, stride):
            layer = nn.Conv2d(channels, 128, 4, stride)
            nn.init.normal_(layer.weight, std=0.02)
            return [nn.utils.parametrizations.spectral_norm(layer), nn.LeakyReLU(0.2),
                    nn.Dropout(0.5)]

        border = nn.ZeroPad2d((1, 2, 1, 2))  # the last two see a single pixel
        super().__init__(
            *conv(3, 4), *conv(128, 4), *conv(128, 4),  # (B, 128, 1, 1)
            border, *conv(128, 2), border, *conv(128, 2),  # (B, 128, 1, 1)
            nn.Flatten(), nn.Linear(128, 1), nn.Flatten(0),  # (B,)
        )


def deform(image, rng, alpha=5, sigma=0.9):
    """Elastic deformation (Simard et al. 2003) of one image (C, H, W) uint8.

    Every pixel is fetched from a place nearby: uniform noise, blurred, times alpha, gives the
    distances. Their standard deviation is 0.91 pixels.
    """
    shape = image.shape[1:]
    away = [ndimage.gaussian_filter(rng.uniform(-1, 1, shape), sigma, mode="constant")
            for _ in range(2)]
    places = np.indices(shape) + alpha * np.stack(away)
    fetched = [ndimage.map_coordinates(np.float64(channel), places, order=1, mode="reflect")
               for channel in image]
    return np.rint(fetched).astype(np.uint8)


def quality_parts(real, rng):
    """Shuffled images, three quarters to train on and a quarter held out, each real and deformed.

    Shuffled before they are split; and no image is in one part as it is, deformed in the other.
    """
    real = real[torch.from_numpy(rng.permutation(len(real))[:10_000])].expand(-1, 3, -1, -1)
    deformed = torch.from_numpy(np.stack([deform(image, rng) for image in real.numpy()]))
    cut = len(real) * 3 // 4
    return (real[:cut], deformed[:cut]), (real[cut:], deformed[cut:])


def quality_index(real, fake, epochs, device):
    """uint8 (N, C, 64, 64) -> mean output on the fakes; accuracy on held-out real and deformed."""
    torch.manual_seed(0)
    train, test = quality_parts(real, np.random.default_rng(0))
    images = torch.cat(train)
    labels = torch.arange(len(images)).ge(len(train[0])).float()  # 1 for deformed
    net = QualityNet().to(device)
    opt = torch.optim.Adam(net.parameters(), lr=1e-5)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(images)).split(32):
            logits = net(to_float(images[batch].to(device)))
            loss = F.binary_cross_entropy_with_logits(logits, labels[batch].to(device))
            opt.zero_grad()
            loss.backward()
            opt.step()
        progress(f"quality index: epoch {epoch}/{epochs}  loss {loss.item():.3f}", epoch == epochs)

    net.eval()
    with torch.no_grad():
        on_real, on_deformed, on_fake = (
            torch.cat([net(to_float(x.to(device).expand(-1, 3, -1, -1))) for x in part.split(500)])
            for part in (*test, fake)
        )
    accuracy = [share.float().mean().item() for share in (on_real < 0, on_deformed > 0)]
    return on_fake.sigmoid().mean().item(), *accuracy


def report_quality(args):
    for name in (args.real, args.fake):
        find_source(name, None)  # refuses what is not there, before anything is prepared
    real, fake = (load_images(name, 64, args.root, args.split, at_least=4).images
                  for name in (args.real, args.fake))
    index, accuracy_real, accuracy_deformed = quality_index(real, fake, args.epochs, args.device)
    n = min(len(real), 10_000)
    result = {"quality_index": index, "accuracy_real": accuracy_real,
              "accuracy_deformed": accuracy_deformed, "n_real": n, "n_fake": len(fake)}
    line = (f"quality index {index:.3f}   held out: {accuracy_real:.1%} of real and "
            f"{accuracy_deformed:.1%} of deformed images told right   "
            f"(64 px, {args.epochs} epochs, {n} vs {len(fake)})")
    return result, line


# --- the command line -----------------------------------------------------------------------------

Source = namedtuple("Source", "name kind content")  # what REAL or FAKE turned out to be


def find_source(name, other):
    """Look what a name stands for, without any work on it yet."""
    if name in ("cartoon", *READERS):
        # Fakes have the size that they were trained at, so real images get the same one.
        folder = other and other not in ("cartoon", *READERS) and Path(other).is_dir()
        pictures = (read_picture(file) for file in (list_images(other) if folder else []))
        first = next((x for x in pictures if x is not None), None)
        size = USUAL_SIZE.get(name, 64) if first is None else min(first.shape[1:])
        return Source(name, "data set", size)
    if Path(name).is_file():
        if Path(name).suffix != ".npz":
            raise UserError(f"{name} is a file, but not .npz with mu and sigma; give that, a "
                            f"folder of images, or one of cartoon, {', '.join(READERS)}")
        return Source(name, "statistics", load_statistics(name))
    describe_folder(name)  # refuses what is no folder
    files = list_images(name)
    if len(files) < 2:
        raise UserError(f"{name} has {len(files)} images in it; at least 2 are needed")
    return Source(name, "folder", files)


def score(args):
    """-> everything that is known in the end, and the line that tells it."""
    sources = [find_source(args.real, args.fake)]
    sources += [find_source(args.fake, args.real)] if args.fake else []
    net = weights = None
    if any(source.kind != "statistics" for source in sources):
        net, weights = load_inception(args.weights, args.device)
    marks = {weights, *(s.content.weights for s in sources if s.kind == "statistics")} - {None}
    if len(marks) > 1:
        raise UserError(f"statistics of different weights: {' and '.join(sorted(marks))}")
    keep = args.kid and len(sources) == 2 and all(s.kind != "statistics" for s in sources)
    found = [measure(source, args, net, weights, keep) for source in sources]
    if args.save:
        save_statistics(found[0], args.save)
    if len(found) == 1:
        return {"real": args.real, "n_real": found[0].n}, f"{found[0].n} images -> {args.save}"
    return compare(*found, min(marks, default=PUBLISHED), args)


def compare(real, fake, weights, args):
    if min(s.n or 2048 for s in (real, fake)) < 2048:
        print(f"{SCRIPT}.py: warning: below 2,048 images FID comes out much too large; compare it "
              "only with one of as many images", file=sys.stderr)
    published = weights == PUBLISHED
    network = "inception-2015-12-05" if published else f"weights {weights}"
    fid_name, kid_name = ("FID", "KID") if published else ("FD", "KD")
    distance = frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
    result = {"real": args.real, "fake": args.fake, "n_real": real.n, "n_fake": fake.n,
              "network": network, "resize": "bilinear 299", fid_name: distance}
    line = f"{fid_name}{'' if published else f' ({network})'} {distance:.2f}"
    details = f"{network}, bilinear 299, {real.n or '?'} vs {fake.n or '?'}"
    if real.features is not None:
        subsets, size = kid_subsets(real.n, fake.n)
        mean, std = kid(real.features, fake.features)
        result |= {kid_name: mean, f"{kid_name}_std": std, "subsets": subsets, "subset_size": size}
        line += f"   {kid_name} {mean:.4f} +- {std:.4f}"
        if size < 1000:
            details += f", {kid_name} of {subsets} subset{'s' * (subsets > 1)} of {size}"
    return result, f"{line}   ({details})"


def read_arguments(argv):
    parser = argparse.ArgumentParser(
        f"{SCRIPT}.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    add = parser.add_argument
    sets = f"cartoon, {', '.join(READERS)}"
    add("real", metavar="REAL", help=f"a folder of images, statistics (.npz), or one of {sets}")
    add("fake", metavar="FAKE", nargs="?", help="the same; --save can do without")
    add("--root", default="data", help="where data sets are, or are downloaded to (data)")
    add("--split", choices=["train", "test"], default="train", help="part of a data set (train)")
    add("--size", type=number(int, 1),
        help="pixels that a data set is prepared at (as the images it is compared with)")
    add("--weights", metavar="FILE", help="the network's weights (downloaded if not there)")
    add("--batch", type=number(int, 1), default=32, help="images at a time (32)")
    add("--device", help="cuda, mps or cpu; by default the first of them that is there")
    add("--no-kid", dest="kid", action="store_false",
        help="FID alone: memory then does not grow with the number of images")
    add("--save", metavar="FILE.npz", help="keep the statistics of REAL, also for pytorch-fid")
    add("--json", action="store_true", help="print the result as JSON, all else on stderr")
    add("--quality-index", action="store_true", help="that, instead of FID (see above)")
    add("--epochs", type=number(int, 1), default=100, help="of the quality index's training (100)")
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse what cannot work, before anything is computed."""
    if not args.fake and (args.quality_index or not args.save):
        raise UserError("FAKE is missing: what shall REAL be compared with?")
    if args.quality_index and (args.save or args.weights):
        raise UserError("--quality-index has no use for --save and --weights")
    for name in (args.real, args.fake):
        if args.quality_index and name.endswith(".npz"):
            raise UserError(f"{name}: --quality-index needs images, not statistics")
    if args.save:
        if args.real.endswith(".npz"):
            raise UserError(f"--save: {args.real} is saved statistics already")
        home = Path(args.save).absolute().parent
        if not args.save.endswith(".npz") or Path(args.save).is_dir():
            raise UserError(f"--save {args.save}: the name should end in .npz")
        if not home.is_dir() or not os.access(home, os.W_OK):
            raise UserError(f"--save {args.save}: cannot write to {home}")
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    try:
        args.device = torch.device(args.device or best)
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used: {error}") from error


def main(argv=None):
    """Run with these arguments; None means those of the shell."""
    try:
        args = read_arguments(argv)
        check_arguments(args)
        torch.backends.cudnn.allow_tf32 = False  # float32, not TF32, on a GPU too
        torch.backends.cudnn.benchmark = True
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            result, line = report_quality(args) if args.quality_index else score(args)
        print(json.dumps(result) if args.json else line)
    except (UserError, OSError) as error:
        print(f"{SCRIPT}.py: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"{SCRIPT}.py: interrupted")


# --- data: the same text as in every training script from here on ---------------------------------

SCRIPT = Path(__file__).stem


class UserError(Exception):
    """Something the user can mend: main() prints its first line and exits with status 2."""


def progress(line, last=False):
    """On a terminal, a line that takes the place of the one before; elsewhere a line of its own."""
    if sys.stdout.isatty():
        line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
    print(line, end="\n" if last or not sys.stdout.isatty() else "", flush=True)


def save_file(content, path):
    """torch.save to a temporary name, then rename: at no moment is there half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        raise UserError(f"cannot write {path} (disk full?): {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path, mmap=False):
    """torch.load to the CPU; raises UserError if the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # there is nothing that a damaged file cannot raise
        raise UserError(f"{path} is damaged: {error!r}") from error


Data = namedtuple("Data", "images labels names")  # (N, C, size, size) uint8; (N, K) 0 or 1; K names
CARTOON = ["Blond_Hair", "Eyeglasses", "Mouth_Slightly_Open", "Smiling", "Wearing_Lipstick"]


def to_float(pixels):
    """[0, 255] -> [-1, 1]."""
    return pixels / 127.5 - 1


def load_images(name, size, root="data", split="train", at_least=1):
    """A data set by name, or a folder of images -> Data: size x size pixels, 1 or 3 channels.

    split is "train" or "test"; a folder is always taken whole. Raises UserError if the data is not
    found, cannot be used, or has fewer than at_least images.
    """
    cache = stamp = None
    if name == "cartoon":
        data = draw_cartoons(2560, size, seed=split)
    else:
        key, stamp = (name, "") if name in READERS else describe_folder(name)
        cache = Path(root) / "prepared" / f"{key}-{size}-{split}.pt"
        saved = load_file(cache, mmap=True) if cache.exists() else {"stamp": None}
        if saved["stamp"] == stamp:
            data, cache = Data(*saved["data"]), None
        else:
            reader = READERS.get(name, read_folder)
            data = prepare(name, size, *reader(name, size, Path(root), split))
    if len(data.images) < at_least:
        raise UserError(f"{name} has {len(data.images)} usable images; {at_least} are needed")
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"stamp": stamp, "data": tuple(data)}, cache)
    return data


def prepare(name, size, items, open_item, labels, names):
    """Open, crop and scale all items on all cores, into one tensor -> Data. Tells what it skips."""
    images = torch.empty(len(items), 3, size, size, dtype=torch.uint8)
    kept, seen, unreadable, colour = [], set(), [], False
    quiet = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    with multiprocessing.Pool(initializer=signal.signal, initargs=quiet) as pool:
        decoded = pool.imap(functools.partial(decode, open_item, size), items, chunksize=32)
        for i, pixels in enumerate(decoded):
            if (i + 1) % (1000 if sys.stdout.isatty() else 50_000) == 0 or i + 1 == len(items):
                progress(f"preparing {name}: {i + 1:,} of {len(items):,}", i + 1 == len(items))
            if pixels is None:
                unreadable.append(items[i])
                continue
            digest = i if name in READERS else hashlib.sha1(pixels).digest()  # published: keep all
            if digest not in seen:
                images.numpy()[len(kept)] = np.atleast_3d(pixels).transpose(2, 0, 1)
                colour = colour or pixels.ndim == 3
                kept.append(i)
                seen.add(digest)
    if unreadable:
        print(f"left out, unreadable: {len(unreadable)}, the first is {unreadable[0]}")
    if len(kept) + len(unreadable) < len(items):
        print(f"left out, there already: {len(items) - len(kept) - len(unreadable)}")
    images = images[: len(kept)] if colour else images[: len(kept), :1].clone()
    return Data(images, torch.from_numpy(labels[kept]), names)


def decode(open_item, size, item):
    """One item as (size, size) or (size, size, 3) uint8; None if it cannot be read."""
    try:
        return np.array(ImageOps.fit(open_item(item), (size, size), Image.Resampling.BILINEAR))
    except Exception:  # Pillow raises almost anything at a broken file; prepare() counts them
        return None


def open_image(path):
    """An image file as 8-bit grey ("L") or "RGB": upright, on white where it is transparent."""
    with Image.open(path) as image:
        grey = image.mode in ("1", "L", "LA") or image.mode[0] == "I"
        image = ImageOps.exif_transpose(image)
        if image.mode[0] == "I":  # 16 bits, which convert() would clip
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("L" if grey else "RGB")


def read_torchvision(name, size, root, split):
    """MNIST, Fashion-MNIST or CIFAR-10; torchvision downloads what is missing."""
    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[name]
    try:
        found = getattr(torchvision.datasets, kind)(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} is not in {root} and cannot be downloaded: {error}") from error
    pixels = np.asarray(found.data)
    if name != "cifar10" and size != 28:  # 28 px in a frame of 32: sharper than scaled
        pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    labels = np.eye(10, dtype=np.uint8)[np.asarray(found.targets)]
    return pixels, Image.fromarray, labels, found.classes


def find_celeba(root):
    """-> (folder of faces, attribute table), in any of the layouts that CelebA comes in."""
    places = [root, root / "celeba", root / "CelebA"]
    nests = ["img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba"]
    files = ["list_attr_celeba.txt", "list_attr_celeba.csv", "Anno/list_attr_celeba.txt"]
    problem = ""
    for attempt in ("what is here", "what was downloaded"):
        faces = [place / nest for place in places for nest in nests if (place / nest).is_dir()]
        table = [place / file for place in places for file in files if (place / file).is_file()]
        if faces and table:
            return faces[0], table[0]
        if not faces and not table and attempt == "what is here":
            try:
                torchvision.datasets.CelebA(root, split="all", download=True)
            except Exception as error:  # gdown, urllib and zipfile fail in ways of their own
                problem = f"; downloading it failed: {str(error).splitlines()[0]}"
    raise UserError(
        f"CelebA needs a folder img_align_celeba ({faces[0] if faces else 'not found'}) and "
        f"list_attr_celeba.txt or .csv ({table[0] if table else 'not found'}) in {places[0]} or "
        f"{places[1]}{problem}. Both are at https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    )


def read_celeba(name, size, root, split):
    """The centred 128x128 of the 178x218 faces (rows 45-173, columns 25-153), and 40 attributes.

    Reads CelebA's .txt (a count, the names, then rows of -1 and 1) and Kaggle's .csv. "test" is
    the official test part: the images from number 182,638 on.
    """
    faces, table = find_celeba(root)
    with open(table, errors="replace") as file:
        lines = filter(None, (line.replace(",", " ").split() for line in file))
        names, rows = next(lines, [""]), {}
        if len(names) == 1:
            names = next(lines, [""])
        names = names[1:] if names[0] == "image_id" else names
        for image, *values in lines:
            if len(values) != len(names) or not {"-1", "0", "1"}.issuperset(values):
                raise UserError(f"{table}: the row of {image} is not {len(names)} times -1 or 1")
            rows[image] = [value == "1" for value in values]
    files = sorted(file for file in os.listdir(faces) if file.endswith((".jpg", ".png")))
    if files != sorted(rows):
        odd = min(set(files) ^ set(rows))
        raise UserError(f"{len(files)} images in {faces}, {len(rows)} rows in {table}: see {odd}")
    files = files[:182_637] if split == "train" else files[182_637:]
    labels = np.array([rows[file] for file in files], dtype=np.uint8).reshape(-1, len(names))
    return [faces / file for file in files], open_celeba, labels, names


def open_celeba(path):
    return open_image(path).crop((25, 45, 153, 173))


def read_lsun(name, size, root, split):
    """LSUN's church_outdoor: a folder of exported images, or the database (through lmdb)."""
    name = "church_outdoor_" + ("train" if split == "train" else "val")
    if (root / name).is_dir():
        items, open_item = list_images(root / name), open_image
    elif (root / f"{name}_lmdb").is_dir():
        items, open_item = range(len(lsun(root, name))), functools.partial(open_lsun, root, name)
        lsun.cache_clear()  # every process has to open the database by itself
    else:
        raise UserError(f"LSUN is not in {root}: unzip {name}_lmdb.zip (http://dl.yf.io/lsun) "
                        f"there, or make a folder {name} of its images")
    return items, open_item, np.zeros((len(items), 0), np.uint8), []


@functools.cache
def lsun(root, name):
    try:
        return torchvision.datasets.LSUN(str(root), classes=[name])
    except ImportError as error:
        raise UserError(f"{root}/{name}_lmdb can be read after: pip install lmdb") from error


def open_lsun(root, name, i):
    return lsun(root, name)[i][0]


def describe_folder(name):
    """-> what the prepared file is called, and a stamp that changes when any file does."""
    folder = Path(name).resolve()
    if not folder.is_dir():
        what = "is a file; give a folder" if folder.exists() else "is no folder and no data set"
        raise UserError(f"{name} {what}. Data sets: cartoon, {', '.join(READERS)}")
    facts = [(file, os.stat(file).st_size, os.stat(file).st_mtime) for file in list_images(name)]
    path, stamp = (hashlib.sha1(repr(x).encode()).hexdigest() for x in (folder, facts))
    return f"{folder.name}-{path[:8]}", stamp


def list_images(folder):
    """All files below the folder with an ending that Pillow can open, sorted."""
    ours = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = (os.path.join(top, file) for top, _, files in os.walk(folder) for file in files)
    return sorted(file for file in found if os.path.splitext(file)[1].lower() in ours)


def read_folder(name, size, root, split):
    """A folder's images; the sub-folders right below it, if there are any, are the classes."""
    files = list_images(name)
    tops = [Path(file).relative_to(name).parts[:-1][:1] for file in files]  # ("cat",) or ()
    names = sorted({top[0] for top in tops if top})
    labels = np.array([[top == (label,) for label in names] for top in tops], dtype=np.uint8)
    return files, open_image, labels.reshape(len(files), len(names)), names


def draw_cartoons(n, size, seed):
    """n cartoon faces -> Data. One seed draws the same faces at any size."""
    rng = random.Random(seed)
    faces, labels = zip(*(draw_face(rng, size) for _ in range(n)))
    images = torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).contiguous()
    return Data(images, torch.tensor(labels, dtype=torch.uint8), CARTOON)


def draw_face(rng, size):
    """One face (size, size, 3) uint8, drawn at four times the size, and its CARTOON attributes."""
    blond, glasses, open_mouth, smiling, lipstick = has = [rng.random() < 0.5 for _ in CARTOON]
    image = Image.new("RGB", (4 * size, 4 * size), tuple(rng.randrange(256) for _ in "RGB"))
    pen, vary = ImageDraw.Draw(image), rng.uniform
    x, y, w, h = vary(0.46, 0.54), vary(0.5, 0.56), vary(0.27, 0.32), vary(0.34, 0.39)

    def oval(u, v, ru, rv, fill, shape=pen.ellipse, **how):  # in units of the face
        box = x + w * (u - ru), y + h * (v - rv), x + w * (u + ru), y + h * (v + rv)
        shape([4 * size * side for side in box], fill=fill, **how)

    def shade(colour, factor):
        return tuple(int(c * factor) for c in colour)

    tan, line = rng.random(), 4 * size // 50
    skin = (int(248 - 110 * tan), int(212 - 120 * tan), int(180 - 125 * tan))
    hair = shade((225, 180, 75) if blond else (60, 42, 32), vary(0.8, 1.1))
    lips, lip = ((200, 20, 50), 0.1) if lipstick else (shade(skin, 0.65), 0.05)
    oval(0, -0.15, 1.22, vary(1.08, 1.2), hair)
    oval(0, 0.45, 1.22, vary(0.5, 0.9), hair)
    oval(0, 0, 1, 1, skin)
    oval(0, 0, 1, 1, hair, pen.chord, start=210, end=330)  # a fringe
    for side in (-0.42, 0.42):
        oval(side, -0.12, 0.2, 0.13, "white")
        oval(side, -0.12, 0.1, 0.11, "black")
        if glasses:
            oval(side, -0.12, 0.34, 0.27, None, outline="black", width=line)
    oval(0, 0.18, 0.08, 0.1, shade(skin, 0.8))
    if open_mouth:
        half = {"shape": pen.chord, "start": 0, "end": 180} if smiling else {}
        v, ru, rv = (0.42, 0.42, 0.3) if smiling else (0.56, 0.3, 0.2)
        oval(0, v, ru + lip, rv + lip, lips, **half)
        oval(0, v, ru, rv, (60, 10, 20), **half)
    elif smiling:
        oval(0, 0.3, 0.48, 0.34, lips, pen.arc, start=20, end=160, width=line * (1 + lipstick))
    else:
        oval(0, 0.57, 0.34, lip, lips)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)), has


READERS = {"mnist": read_torchvision, "fashion_mnist": read_torchvision,
           "cifar10": read_torchvision, "celeba": read_celeba, "lsun_church": read_lsun}
USUAL_SIZE = {"cartoon": 32, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "lsun_church": 128}


def number(kind, low, high=10**9):
    """An argparse type: an int or float from low to high."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low} to {high}")

    return parse


def refuse(message):
    """In place of argparse's own way out, which prints the usage too."""
    raise UserError(message)


if __name__ == "__main__":
    main()
