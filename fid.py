# SPDX-License-Identifier: MIT
"""FID and KID: how far generated images are from real ones.

FID: Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter, "GANs Trained by a Two Time-Scale Update
Rule Converge to a Local Nash Equilibrium", 2017, arXiv 1706.08500.
KID: Binkowski, Sutherland, Arbel and Gretton, "Demystifying MMD GANs", 2018, arXiv 1801.01401.

A network trained to name what is in a photograph (Inception) turns every image into 2048 numbers,
its features. FID (Frechet Inception distance) takes the features of the real images to be normally
distributed with mean mu1 and covariance S1, those of the fakes with mu2 and S2, and measures how
far the two distributions are apart. KID (kernel Inception distance) compares the features pair by
pair and assumes no distribution. For both 0 is best.

    FID = |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))          Eq. 6 of Heusel et al.
    KID = E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)]               x, x' two real images,
          k(x, y) = (x . y / 2048 + 1)^3                         y, y' two fakes

FID is biased: fewer images give a larger FID. Compare only scores of equally many images. KID is
not biased, and may fall below 0 by chance. If a set is compared with itself or with copies of its
images, KID is below 0 systematically, since pairs of equal images count in the last term alone. It
is given as mean +- standard deviation over 100 random subsets of 1,000 images, or of as many as the
smaller set has. Two equally large sets of at most 1,000 images are compared once, as a whole.

--quality-index is an idea of Espis and Potrimba ("Deep Learning Project", University of Bologna,
2020) that did not work. A network learns to tell real images from the same images elastically
deformed. Its mean output on the fakes (0: like real ones, 1: like deformed ones) should say how
good they are. In the report it did not follow FID over training: a GAN makes other mistakes than
elastic deformations. It is here to be seen failing.

Differs from pytorch-fid (same network, weights and resizing, so the numbers agree):
  - the trace comes from symmetric matrices (see frechet_distance), not from scipy.linalg.sqrtm,
    which is slow and may return complex numbers
  - images of any size, in sub-folders too, are read as for training: upright, on white where they
    are transparent, 16 bits scaled to 8; unreadable files are left out and counted
Differs from clean-fid's own mode: that one resizes with an antialiased bicubic filter.
Differs from Espis and Potrimba:
  - their accuracy of 97 % is that on deformed images alone, because they split the data in its
    unshuffled order; here both kinds are held out, and both accuracies are given
  - the colours of an image are deformed alike, so that no colour fringes give it away
  - on 6,000 faces of CelebA the network had learned next to nothing after 12 of its 100 epochs; at
    ten times its rate it learned from the fourth epoch on

    python fid.py celeba runs/dcgan-celeba --split test     # a run's images, after --generate 10000
    python fid.py folder/of/real --save real.npz ; python fid.py real.npz folder/of/fakes
    python fid.py cartoon runs/dcgan-cartoon --quality-index
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import sys
import tempfile
from collections import namedtuple
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
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models import inception

# --- the distances --------------------------------------------------------------------------------

Statistics = namedtuple("Statistics", "n mu sigma features weights")  # None where not known


def statistics(batches, weights=None, keep=False):
    """Batches of features (B, d) -> n, their mean (d,) and covariance (d, d) in float64.

    Each batch is merged into the sums of those before (Chan, Golub and LeVeque, "Updating Formulae
    and a Pairwise Algorithm for Computing Sample Variances", 1979). They are sums about the mean,
    so no large numbers cancel, and the features need not be kept. KID needs them: keep=True.
    """
    n, mu, squares, kept = 0, 0, 0, []
    for features in batches:
        x = features.double()
        m, mean = len(x), x.mean(0)
        away = mean - mu
        # One row more, for the distance of the two means, and a single product does it all.
        rows = torch.cat([x - mean, away[None] * (n * m / (n + m)) ** 0.5])
        squares = squares.addmm_(rows.T, rows) if n else rows.T @ rows
        mu = mu + away * (m / (n + m))
        n += m
        kept += [features] if keep else []
    if n < 2:
        user_error(f"{n} usable images: a covariance needs at least two")
    sigma = squares.cpu() / (n - 1)
    return Statistics(n, mu.cpu(), sigma, torch.cat(kept) if keep else None, weights)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Eq. 6, of float64 tensors.

    Write S1 = A A^T and S2 = B B^T. Then S1 S2 has the same eigenvalues as C C^T with C = A^T B,
    apart from zeros. C C^T is symmetric: they are real, not negative, and quickly found.
    """
    A, B = square_root(sigma1), square_root(sigma2)
    C = A.T @ B if A.shape[1] <= B.shape[1] else B.T @ A  # the smaller rank first
    roots = torch.linalg.eigvalsh(C @ C.T).clamp(min=0).sqrt()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum()
    if not distance.isfinite():
        user_error(f"the distance is {distance}: the statistics or the weights must be wrong")
    return max(0.0, distance.item())  # rounding can turn 0 into -1e-13


def square_root(sigma):
    """A (d, rank) with A A^T = sigma, by Cholesky's method with pivoting.

    It stops at the rank of sigma. The features of n images have a rank of n - 1 at most; beyond it
    there are only rounding errors, and their roots would add up.
    """
    upper, order, rank, _ = lapack.dpstrf(sigma.numpy())
    A = np.empty((len(sigma), rank))
    A[order - 1] = np.tril(upper.T[:, :rank])
    return torch.from_numpy(A)


def kid(x, y):
    """Features (n1, d), (n2, d) -> mean and standard deviation; number and size of the subsets."""
    size = min(1000, len(x), len(y))
    subsets = 1 if len(x) == len(y) == size else 100
    generator = torch.Generator().manual_seed(0)

    def subset(features):
        chosen = torch.randperm(len(features), generator=generator)[:size]
        return features[chosen.to(features.device)].double()

    values = torch.stack([mmd(subset(x), subset(y)) for _ in range(subsets)])
    return values.mean().item(), values.std(correction=0).item(), subsets, size


def mmd(x, y):
    """The formula of KID for m features of each kind (the square of a maximum mean discrepancy).

    It is unbiased, since no image is paired with itself: the traces are subtracted.
    """
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    same = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return same / (m * (m - 1)) - 2 * xy.mean()


# --- the network ----------------------------------------------------------------------------------
# torchvision's Inception, changed to what the published network does: averages at the border do
# not count the padding, and the last block takes maxima in place of averages.

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
PUBLISHED = "6726825d"  # how the SHA-256 of that file begins


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
    conv = inception.BasicConv2d
    blocks = [conv, *(functools.partial(block, conv_block=conv) for block in blocks), None]
    net = inception.inception_v3(weights=None, init_weights=False, aux_logits=False,
                                 inception_blocks=blocks)
    net.fc = nn.Identity()
    wanted = [name for name in net.state_dict() if "num_batches" not in name]
    net.load_state_dict({name: state[name] for name in wanted}, strict=False)
    # Channels last suits convolutions on CPUs and GPUs alike.
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_inception(path, device):
    """-> the network, and how the SHA-256 of its weights begins.

    Without a path: the published weights, from torch's hub cache, or downloaded into it.
    """
    file = Path(path or f"{torch.hub.get_dir()}/checkpoints/{Path(URL).name}")
    try:
        if not path and not file.exists():
            torch.hub.load_state_dict_from_url(URL, check_hash=True, weights_only=True)
        net = build_inception(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # another file can make torch.load raise anything
        user_error(f"no weights of this network in {file}: {error!r:.120}. "
                   f"They are at {URL}; put them there, or name their file by --weights")
    return net.to(device), hashlib.sha256(file.read_bytes()).hexdigest()[:8]


# --- from images to features ----------------------------------------------------------------------


def to_input(images, device):
    """uint8 images (C, H, W), a list or a tensor of them -> (B, 3, 299, 299) in [-1, 1].

    Bilinear, not antialiased. Images of different sizes are resized one by one, and so are large
    photographs, because a batch of them as floats fills gigabytes.
    """
    if len(images) > 1 and (len({x.shape for x in images}) > 1 or images[0].numel() > 1_000_000):
        return torch.cat([to_input([image], device) for image in images])
    x = images if torch.is_tensor(images) else torch.stack(images)
    x = x.to(device).expand(-1, 3, -1, -1) / 255
    x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    return (2 * x - 1).contiguous(memory_format=torch.channels_last)


def read_picture(path, size=None):
    """An image file -> uint8 (3, H, W); or, if it cannot be read, a text that says why.

    At its own size, or scaled and cropped to size x size as for training.
    """
    try:
        image = open_image(path)
        if size:
            image = ImageOps.fit(image, (size, size), Image.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:  # a broken file can make Pillow raise anything
        return f"{path}: {error}"


def read_batches(files, size, batch):
    """Yields lists of the pictures in these files, in order. Several threads decode them."""
    broken = []
    with ThreadPool() as pool:
        for i in range(0, len(files), batch):
            found = pool.map(functools.partial(read_picture, size=size), files[i : i + batch])
            broken += [reason for reason in found if isinstance(reason, str)]
            pictures = [picture for picture in found if torch.is_tensor(picture)]
            if pictures:
                yield pictures
    if broken:
        print(f"left out: {len(broken)} unreadable files", broken[0])


# What a REAL or a FAKE stands for: images in batches, or the statistics that were saved of them.
Source = namedtuple("Source", "name total size batches known", defaults=[None] * 4)


def open_source(name, args, n=None, usual_size=None):
    """A data set's name, a folder or a file of statistics -> a Source. n: take n random images.

    A data set's images have args.size, or else usual_size, or else that of SETS. A folder's have
    args.size, or else their own; the size of the Source is then the first image's.
    """
    if name.endswith(".npz"):
        return Source(name, known=load_statistics(name))
    if name in SETS:
        size = args.size or usual_size or SETS[name]
        images = load_images(name, size, args.root, args.split).images[:n]
        return Source(f"{name} ({args.split})", len(images), (size, size), images.split(args.batch))
    if os.path.exists(f"{name}/checkpoint.pt"):  # the folder of a run
        name = f"{name}/generated"
        if not os.path.exists(name):
            user_error(f"there is no {name}; run the training script with --generate N first")
    files = list_files(name) if os.path.isdir(name) else []
    files = random.Random(0).sample(files, min(n, len(files))) if n else files
    pictures = (read_picture(file, args.size) for file in files)
    first = next((picture for picture in pictures if torch.is_tensor(picture)), None)
    if first is None:
        reason = read_picture(files[0]) if files else f"It is none of {', '.join(SETS)} either"
        user_error(f"{name}: no image that can be read. {reason}")
    size = first.shape[2], first.shape[1]
    return Source(name, len(files), size, read_batches(files, args.size, args.batch))


def feature_batches(source, net, device):
    """Yields the features of a source's images, (B, 2048) at a time, and tells how far it is."""
    home = "cpu" if device.type == "mps" else device  # statistics() needs float64; MPS has none
    done = 0
    for images in source.batches:
        yield net(to_input(images, device)).to(home)
        before, done = done, done + len(images)
        if 10 * before // source.total < 10 * done // source.total:  # one tenth more
            print(f"{source.name}: {done:,} of {source.total:,} images")


def load_statistics(path):
    """A .npz file with mu and sigma, as pytorch-fid writes it; our own also have n and weights."""
    try:
        with np.load(path) as saved:
            mu, sigma = (torch.from_numpy(np.float64(saved[key])) for key in ("mu", "sigma"))
            n = int(saved["n"]) if "n" in saved else None
            weights = str(saved["weights"]) if "weights" in saved else None
    except Exception as error:  # another file can make numpy raise anything
        user_error(f"{path} is not a .npz file with mu and sigma: {error!r:.200}")
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        user_error(f"{path}: mu and sigma are not those of 2048 features")
    return Statistics(n, mu, sigma, None, weights)


# --- the quality index ----------------------------------------------------------------------------


class QualityNet(nn.Module):
    """uint8 images (B, 3, 64, 64) -> logits (B,), above 0 for deformed ones."""

    def __init__(self):
        super().__init__()
        shapes = [(3, 4, 0), (128, 4, 0), (128, 4, 0), (128, 2, 2), (128, 2, 2)]
        convs = [nn.Conv2d(n, 128, 4, stride, padding) for n, stride, padding in shapes]
        for conv in convs:
            nn.init.normal_(conv.weight, std=0.02)
        self.convs = nn.ModuleList(spectral_norm(conv) for conv in convs)
        self.last = nn.Linear(128, 1)

    def forward(self, images):
        x = images / 127.5 - 1
        for conv in self.convs:  # (B, 128, 16, 16), then 4 x 4, and three times a single pixel
            x = F.dropout(F.leaky_relu(conv(x), 0.2), 0.5, self.training)
        return self.last(x.flatten(1)).flatten()


def deform(image, rng, alpha=5, sigma=0.9):
    """Elastic deformation of one image (C, H, W) uint8, by Simard, Steinkraus and Platt, "Best
    Practices for Convolutional Neural Networks Applied to Visual Document Analysis", 2003.

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

    They are shuffled before they are split, and an image and its deformed copy are in one part.
    """
    real = real[torch.from_numpy(rng.permutation(len(real))[:10_000])]
    deformed = torch.from_numpy(np.stack([deform(image, rng) for image in real.numpy()]))
    cut = len(real) * 3 // 4
    return (real[:cut], deformed[:cut]), (real[cut:], deformed[cut:])


def train_quality(real, epochs, device):
    """uint8 images (N, 3, 64, 64) -> a network in eval mode, and how often it is right on held-out
    images, real and deformed.
    """
    torch.manual_seed(0)
    train, test = quality_parts(real, np.random.default_rng(0))
    images = torch.cat(train)
    labels = torch.arange(len(images)).ge(len(train[0])).float()  # 1 for deformed
    net = QualityNet().to(device)
    opt = torch.optim.Adam(net.parameters(), lr=1e-5)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(images)).split(32):
            logits = net(images[batch].to(device))
            loss = F.binary_cross_entropy_with_logits(logits, labels[batch].to(device))
            opt.zero_grad()
            loss.backward()
            opt.step()
        print(f"quality index: epoch {epoch}/{epochs}  loss {loss.item():.3f}", flush=True)
    net.eval()
    on_real, on_deformed = (quality_logits(net, part, device) for part in test)
    return net, (on_real < 0).float().mean().item(), (on_deformed > 0).float().mean().item()


@torch.no_grad()
def quality_logits(net, images, device):
    return torch.cat([net(batch.to(device)) for batch in images.split(500)])


def report_quality(args):
    """Yields for every FAKE its quality index, and the line that tells it."""
    def pictures(source):
        if source.known:
            user_error(f"{source.name}: the quality index needs images, not their statistics")
        images = [image for batch in source.batches for image in batch]
        return torch.stack(images).expand(-1, 3, -1, -1)  # grey ones, too, get three channels

    real, *fakes = [open_source(name, args, args.n) for name in (args.real, *args.fake)]
    real_images = pictures(real)
    net, accuracy_real, accuracy_deformed = train_quality(real_images, args.epochs, args.device)
    for fake in fakes:
        images, n = pictures(fake), min(len(real_images), 10_000)
        index = quality_logits(net, images, args.device).sigmoid().mean().item()
        result = {"fake": fake.name, "quality_index": index, "accuracy_real": accuracy_real,
                  "accuracy_deformed": accuracy_deformed, "n_real": n, "n_fake": len(images)}
        yield result, (
            f"quality index {index:.3f}   right on held-out images: {accuracy_real:.1%} of real, "
            f"{accuracy_deformed:.1%} of deformed ones   (64 px, {args.epochs} epochs, "
            f"{n} of {real.name} vs {len(images)} of {fake.name})")


# --- the command line -----------------------------------------------------------------------------


def report_scores(args):
    """Yields for every FAKE its scores, and the line that tells them. REAL is measured once."""
    fakes = [open_source(name, args) for name in args.fake]
    usual_size = min(fakes[0].size) if fakes and fakes[0].size else None
    real = open_source(args.real, args, args.n, usual_size)
    known = [source.known for source in (real, *fakes) if source.known]
    net = weights = None
    if len(known) < 1 + len(fakes):
        net, weights = load_inception(args.weights, args.device)
    all_weights = {weights, *(s.weights for s in known)} - {None}
    if len(all_weights) > 1:
        user_error(f"statistics of different weights: {' and '.join(sorted(all_weights))}")

    def measure(source, keep):
        return source.known or statistics(feature_batches(source, net, args.device), weights, keep)

    of_real = measure(real, keep=bool(args.kid and fakes))
    if args.save:
        np.savez(args.save, mu=of_real.mu, sigma=of_real.sigma, n=of_real.n, weights=weights)
        print(f"{of_real.n} images -> {args.save}")
    for fake in fakes:
        of_fake = measure(fake, keep=of_real.features is not None)
        yield compare(real, of_real, fake, of_fake, min(all_weights, default=PUBLISHED))


def compare(real, of_real, fake, of_fake, weights):
    """Two Sources and their Statistics -> the scores, and the line that tells them."""
    if min(of_real.n or 2048, of_fake.n or 2048) < 2048:
        print(f"{SCRIPT}.py: warning: below 2,048 images FID comes out much too large; compare it "
              "only with one of as many images", file=sys.stderr)
    if real.size and fake.size and real.size != fake.size:
        print(f"{SCRIPT}.py: warning: the images of {real.name} are of {real.size} pixels, those "
              f"of {fake.name} of {fake.size}; --size makes them equal", file=sys.stderr)
    published = weights == PUBLISHED
    network = "inception-2015-12-05" if published else f"weights {weights}"
    fid_name, kid_name = ("FID", "KID") if published else ("FD", "KD")
    width, height = fake.size or real.size or ("?", "?")
    distance = frechet_distance(of_real.mu, of_real.sigma, of_fake.mu, of_fake.sigma)
    result = {"real": real.name, "fake": fake.name, "n_real": of_real.n, "n_fake": of_fake.n,
              "size": f"{width}x{height}", "network": network, "resize": "bilinear 299",
              fid_name: distance}
    line = f"{fid_name} {distance:.2f}"
    if of_real.features is not None and of_fake.features is not None:
        mean, std, subsets, n = kid(of_real.features, of_fake.features)
        result |= {kid_name: mean, f"{kid_name}_std": std, "subsets": subsets, "subset_size": n}
        line += f"   {kid_name} {mean:.4f} +- {std:.4f} (subsets: {subsets} of {n})"
    return result, (f"{line}   ({network}, bilinear 299, {result['size']} px, "
                    f"{of_real.n or '?'} of {real.name} vs {of_fake.n or '?'} of {fake.name})")


def read_arguments(argv):
    """-> the settings."""
    parser = argparse.ArgumentParser(  # without a usage text, so that an error is one line
        prog=f"{SCRIPT}.py", usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add, sets = parser.add_argument, ", ".join(SETS)
    add("real", metavar="REAL", help=f"a folder of images, statistics (.npz), or one of {sets}")
    add("fake", metavar="FAKE", nargs="*", help="the same, or the folder of a run; one or more")
    add("--root", default="data", help="where the data sets are, or are downloaded to (data)")
    add("--split", choices=["train", "test"], default="train", help="part of a data set (train)")
    add("--size", type=int, help="scale and crop all images to this, as for training")
    add("--n", type=int, help="take only N images of REAL, at random")
    add("--weights", metavar="FILE", help="the network's weights, instead of the published ones")
    add("--batch", type=int, default=32, help="images at a time (32)")
    add("--device", help="cuda, mps or cpu; by default the first of them that is there")
    add("--no-kid", dest="kid", action="store_false",
        help="FID alone; the memory needed then does not grow with the number of images")
    add("--save", metavar="FILE.npz", help="keep the statistics of REAL; pytorch-fid reads them")
    add("--json", action="store_true", help="print the result as JSON, all else on stderr")
    add("--quality-index", action="store_true", help="give that instead of FID (see above)")
    add("--epochs", type=int, default=100, help="of the quality index's training (100)")
    args = parser.parse_args(argv)
    if not args.fake and (args.quality_index or not args.save):
        user_error("FAKE is missing: what is REAL to be compared with?")
    if args.save and (args.real.endswith(".npz") or not Path(args.save).absolute().parent.is_dir()):
        user_error(f"--save {args.save}: REAL must be images, and the folder to save in must exist")
    if args.quality_index:
        args.size = 64  # its network is built for no other
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    args.device = torch.device(args.device or best)
    return args


def main(argv=None):
    """Run with these arguments; by default, with those of the command line."""
    try:
        args = read_arguments(argv)
        torch.backends.cudnn.allow_tf32 = False  # float32, not TF32, on a GPU too
        torch.backends.cudnn.benchmark = True
        stdout, report = sys.stdout, report_quality if args.quality_index else report_scores
        with contextlib.redirect_stdout(sys.stderr if args.json else stdout):
            for result, line in report(args):
                print(json.dumps(result) if args.json else line, file=stdout, flush=True)
    except OSError as error:
        user_error(error)
    except KeyboardInterrupt:
        sys.exit(130)


# --- data: the same text as in every training script ----------------------------------------------

SCRIPT = Path(__file__).stem


def user_error(message):
    """For mistakes that the user can fix: one line on stderr, exit status 2."""
    print(f"{SCRIPT}.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


# Data: every set becomes one uint8 tensor.

Data = namedtuple("Data", "images labels names")  # (N, C, size, size) uint8; (N, K) 0 or 1; K names
SETS = {"cartoon": 32, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "celeba": 64}  # their sizes
FACE = ["Blond_Hair", "Eyeglasses", "Mouth_Slightly_Open", "Smiling", "Wearing_Lipstick"]


def load_images(name, size, root="data", split="train"):
    """A set by name (split "train" or "test"), or a folder -> Data. Kept in root/prepared."""
    items, open_item, labels, names = find_images(name, size, Path(root), split)
    facts = [(os.path.getsize(x), os.path.getmtime(x)) for x in items if isinstance(x, Path)]
    key = hashlib.sha1(repr((items, facts, names, labels.tobytes())).encode()).hexdigest()[:16]
    file = Path(root) / "prepared" / f"{Path(name).name[:40]}-{size}-{split}-{key}.pt"
    if not file.exists():  # the key is another one if any image or label has changed
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent) as pixels:
            data = prepare_images(name, size, items, open_item, labels, names, pixels)
            torch.save(tuple(data), f"{file}.{os.getpid()}")
        os.replace(f"{file}.{os.getpid()}", file)
    data = Data(*torch.load(file, mmap=True, weights_only=True))
    print("labels:", dict(zip(data.names, data.labels.sum(0).tolist())) or "none")
    return data


def prepare_images(name, size, items, open_item, labels, names, file):
    """-> Data, its pixels in a file, not in memory. Copies and unreadable files are left out."""
    order = random.Random(0).sample(range(len(items)), len(items))  # random, always the same
    kept, contents, broken = [], set(), []

    def decode(i):
        try:
            image = ImageOps.fit(open_item(items[i]), (size, size), Image.BILINEAR)
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()  # (3, size, size)
        except Exception as error:  # a broken file can make Pillow raise anything
            broken.append(f"{items[i]}: {error}")

    with ThreadPool() as pool:
        for i, pixels in zip(order, pool.imap(decode, order, chunksize=16)):
            content = hash(pixels), labels[i].tobytes()  # copies have the same one
            if pixels and (content not in contents or name in SETS):  # published sets keep copies
                contents.add(content)
                kept.append(i)
                file.write(pixels)
                if len(kept) % 10_000 == 0:
                    print(f"preparing {name}: {len(kept):,} of {len(items):,} images", flush=True)
    copies = len(items) - len(kept) - len(broken)
    several = len(contents) - len({pixels for pixels, _ in contents})
    if copies or broken:
        print(f"left out: {copies} copies, {len(broken)} unreadable files", *broken[:1], sep=": ")
    if several and name not in SETS:
        print(f"{several} images are in more than one sub-folder")
    if len(kept) < 2:
        user_error(f"--data {name}: no image that can be read, or only one")
    images = np.memmap(file, np.uint8, "r+", shape=(len(kept), 3, size, size))
    grey = all((image == image[0]).all() for image in images)
    images = np.ascontiguousarray(images[:, :1] if grey else images)
    used = np.flatnonzero(labels[kept].any(0))  # without labels that no image has
    labels = torch.from_numpy(labels[kept][:, used])
    return Data(torch.from_numpy(images), labels, [names[k] for k in used])


def find_images(name, size, root, split):
    """-> items, a function that opens one of them, their labels (N, K) of 0 and 1, K names."""
    if name == "cartoon":
        labels = np.random.RandomState(int(split == "test")).randint(0, 2, (2560, 5), np.uint8)
        return range(2560), lambda i: draw_face(f"{split} {i}", 4 * size, labels[i]), labels, FACE
    if name == "celeba":
        return find_celeba(root, split)
    if name not in SETS:
        return find_folder(name)
    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[name]
    try:
        found = getattr(torchvision.datasets, kind)(root, train=split == "train", download=True)
    except (RuntimeError, OSError) as error:
        user_error(f"{name} is not in {root}, and could not be downloaded: {error}")
    pixels, labels = np.asarray(found.data), np.eye(10, dtype=np.uint8)[list(found.targets)]
    if name != "cifar10" and size != 28:  # a frame around 28 px: sharper than scaling
        pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    return range(len(pixels)), lambda i: Image.fromarray(pixels[i]), labels, found.classes


def find_celeba(root, split):
    """CelebA or a part of it, anywhere below root. "train" is the published parts train and val."""
    paths = list_files(root)
    images = {int(path.stem): path for path in paths
              if "img_align_celeba" in path.parts and path.stem.isdecimal()}
    if not images:
        user_error(f"no img_align_celeba with images below {root}. It and list_attr_celeba.txt are "
                   "at https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and on Kaggle")
    tables = [p for p in paths if p.name in ("list_attr_celeba.txt", "list_attr_celeba.csv")]
    text = tables[-1].read_text("utf-8-sig") if tables else ""  # then there are no labels
    # A row is "000001.jpg -1 1 ...", or that with commas. The longest line above has the names.
    rows = {int(n): re.findall(r"-?\d", row) for n, row in re.findall(r"(\d+)\.\w+(.*)", text)}
    header = max(re.split(r"\d+\.", text)[0].splitlines(), key=len, default="")
    names = re.findall(r'[^\s,;"]+', header.split("image_id")[-1])
    published = range(1, 182638) if split == "train" else range(182638, 202600)
    part = [n for n in published if n in images and (n in rows or not rows)]
    print(f"celeba: {len(part):,} of the {len(published):,} images of the {split} part")
    labels = np.array([rows.get(n, []) for n in part]).reshape(len(part), len(names)) == "1"

    def open_face(file):  # the centre, 128 x 128 pixels, of a published image
        image = open_image(file)
        return image.crop((25, 45, 153, 173)) if image.size == (178, 218) else image
    return [images[n] for n in part], open_face, labels.astype(np.uint8), names


def find_folder(name):
    """All images below a folder, at any depth. Its sub-folders, if there are any, are labels."""
    if not os.path.isdir(name):
        user_error(f"--data {name!r} is neither a folder nor one of {', '.join(SETS)}")
    folder, known = os.path.abspath(name), Image.registered_extensions()
    parts = {file: file.relative_to(folder).parts for file in list_files(folder)}
    names = sorted({p[0] for p in parts.values() if p[1:] and Path(p[-1]).suffix.lower() in known})
    for top, *rest in sorted(parts.values(), key=lambda p: p[0].lower() != "train"):  # train first
        of_a_set = top.lower() in ("train", "test", "val", "valid", "validation")
        if len(rest) > 1 and (of_a_set or names == [top]):
            user_error(f"--data {name}: the labels are one folder deeper; give {name}/{top}")
    files = [file for file in parts if parts[file][0] in names or not names]
    if len(files) < len(parts):
        print(f"left out: {len(parts) - len(files)} files that are in no label's folder")
    labels = np.array([[parts[file][0] == label for label in names] for file in files], np.uint8)
    return files, open_image, labels.reshape(len(files), len(names)), names


def list_files(folder):
    """All files below a folder but hidden ones, prepared sets, and runs. Links are followed."""
    found, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited or ("samples" in folders and "real.png" in files):  # a circle; a run
            folders[:], files = [], []  # os.walk() goes on with what is left in folders
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(parent, name) for name in files if name[0] != "." and name[-3:] != ".pt"]
    return sorted(filter(os.path.isfile, found), key=str)


def open_image(path):
    """An image file as RGB: upright, 8 bits, on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # more than 8 bits, or fractions: convert() would clip them
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        white = 1 if high <= 1 else 255 if high <= 255 or image.mode == "F" else 65535
        if not 0 <= low <= high <= white or 1 < high < 2:
            raise ValueError(f"its values, {low:g} to {high:g}, may mean anything")
        image = Image.fromarray((255 / white * values).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def draw_face(seed, side, labels):
    """A cartoon face with the labels of FACE (five of 0 and 1); all the rest is random."""
    blond, glasses, open_mouth, smile, lipstick = labels
    rng = random.Random(seed)
    vary, tan = rng.uniform, rng.random()
    image = Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in "RGB"))
    pen = ImageDraw.Draw(image)
    x, y, w, h = vary(0.46, 0.54), vary(0.5, 0.56), vary(0.27, 0.32), vary(0.34, 0.39)

    def oval(u, v, ru, rv, fill, start=0, end=360, outline=None):  # in units of the face's radii
        box = x + w * (u - ru), y + h * (v - rv), x + w * (u + ru), y + h * (v + rv)
        pen.chord([side * edge for edge in box], start, end, fill, outline, side // 50)

    skin = (int(248 - 110 * tan), int(212 - 120 * tan), int(180 - 125 * tan))
    hair = (rng.randint(190, 250), 180, 75) if blond else (rng.randint(40, 70), 42, 32)
    shadow = tuple(int(0.7 * c) for c in skin)
    oval(0, -0.15, 1.22, vary(1.08, 1.2), hair)
    oval(0, 0.45, 1.22, vary(0.5, 0.9), hair)
    oval(0, 0, 1, 1, skin)
    oval(0, 0, 1, 1, hair, 210, 330)  # a fringe
    oval(0, 0.18, 0.08, 0.1, shadow)  # a nose
    for u in (-0.42, 0.42):
        oval(u, -0.12, 0.2, 0.13, "white")
        oval(u, -0.12, 0.1, 0.11, "black")
        if glasses:
            oval(u, -0.12, 0.34, 0.27, None, outline="black")
    v, ru, rv, end = (0.42, 0.42, 0.3, 180) if smile else (0.56, 0.3, 0.2, 360)
    lips, lip = ((200, 20, 50), 0.1) if lipstick else (shadow, 0.05)
    oval(0, v, ru + lip * open_mouth, lip + (rv if open_mouth else 0.1 * smile), lips, 0, end)
    if open_mouth:
        oval(0, v, ru, rv, (60, 10, 20), 0, end)
    return image


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    main()
