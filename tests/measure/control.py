"""Does a finished run draw what it is asked for? Asks a classifier that no GAN has seen.

    python tests/measure/control.py runs/cgan-cartoon runs/acgan-cartoon runs/egan-cartoon

The classifier is trained here, on the training images of the run's data set (--root says where it
is), and tested on others. For cgan and acgan it says for each label how many of 2,000 images have
it as asked; for egan what it reads as c rises, on average and for each of 64 z.
"""

import argparse
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def open_run(out):
    """-> the script as module, its args and data, and draw and to_save as steps() gets them."""
    script = torch.load(f"{out}/checkpoint.pt", map_location="cpu")["script"]
    module = importlib.import_module(script)
    args = module.parse_arguments(["--resume", "--out", str(out)])
    run = SimpleNamespace(module=module, args=args, data=module.Data(*args.checkpoint["data"]))

    def no_steps(args, data, draw, to_save, *others):
        run.draw, run.to_save = draw, to_save
        return ()

    original, module.steps = module.steps, no_steps
    module.train(args, run.data)
    module.steps = original
    for name, state in args.checkpoint["state"].items():
        run.to_save[name].load_state_dict(state)
        if isinstance(run.to_save[name], nn.Module):
            run.to_save[name].eval()
    return run


def classifier(data, device, epochs=4, batch=64):
    """A small CNN, trained to read all labels of the data off its images -> logits (B, K)."""
    torch.manual_seed(0)
    images, labels = data.images.to(device), data.labels.to(device).float()
    channels, size = images.shape[1:3]
    layers, n = [], channels
    for width in (32, 64, 128):
        layers += [nn.Conv2d(n, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.MaxPool2d(2)]
        n = width
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(n * (size // 8) ** 2, len(data.names)))
    net.to(device)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(images)).to(device).split(batch):
            logits = net(images[i] / 127.5 - 1)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[i])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.eval()


def right(logits, labels):
    """(K,) the part of images that have label k as they should; one-hot: of those of class k."""
    if (labels.sum(1) == 1).all():
        hits = (logits.argmax(1) == labels.argmax(1)).float()
        return (labels * hits[:, None]).sum(0) / labels.sum(0)
    return ((logits > 0) == (labels > 0)).float().mean(0)


def say(names, values):
    print("  " + "  ".join(f"{name} {value:.3f}" for name, value in zip(names, values)), flush=True)


@torch.no_grad()
def conditional(run, judge):
    labels = run.module.sample_labels(run.data, 2000, run.args.device)
    z = torch.randn(2000, run.module.Z, device=run.args.device)
    G = run.to_save["G"]
    images = torch.cat([G(*some) for some in zip(z.split(100), labels.split(100))])
    found = right(judge(images), labels)
    print(f"  images with the label as asked: {found.mean():.3f} on average")
    say(run.data.names, found.tolist())


def correlation(c, readings):
    """c (n,) and readings (n,) or (B, n) -> their correlation over all readings."""
    return torch.corrcoef(torch.stack([c.expand_as(readings).flatten(), readings.flatten()]))[0, 1]


@torch.no_grad()
def swept(run, judge):
    module, args = run.module, run.args
    values = torch.linspace(0, args.sweep, 9, device=args.device)
    images = module.sweep(run.to_save["G"], 64, values)
    if args.attribute in module.FORMULAS:
        readings = module.FORMULAS[args.attribute](images.flatten(0, 1)).unflatten(0, (64, 9))
    else:
        logits = judge(images.flatten(0, 1))[:, run.data.names.index(args.attribute)]
        readings = logits.sigmoid().unflatten(0, (64, 9))
    print(f"  {args.attribute} of 64 z, by c (mean):")
    say([f"c={c:g}" for c in values.tolist()], readings.mean(0).tolist())
    for most in sorted({1.0, args.sweep}):
        part, c = readings[:, values <= most], values[values <= most]
        rising = (part.diff(dim=1) > 0).all(1).sum()
        one = min(correlation(c, row) for row in part)
        print(f"  up to c = {most:g}: correlation of c and reading {correlation(c, part):.3f} over "
              f"all z, at least {one:.3f} for each; rises at every step for {rising} of 64 z, from "
              f"first to last for {(part[:, -1] > part[:, 0]).sum()}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", default="data")
    asked, judges = parser.parse_args(), {}
    for out in asked.runs:
        run = open_run(out)
        module, args, key = run.module, run.args, (run.args.data, run.args.size)
        if key not in judges:
            real = module.load_images(args.data, args.size, asked.root)
            if args.data in module.SETS:
                test = module.load_images(args.data, args.size, asked.root, split="test")
            else:  # a folder is taken whole: a tenth of it is held out
                n = len(real.images) // 10
                test = module.Data(real.images[:n], real.labels[:n], real.names)
                real = module.Data(real.images[n:], real.labels[n:], real.names)
            judges[key] = classifier(real, args.device)
            with torch.no_grad():
                logits = judges[key](test.images.to(args.device) / 127.5 - 1)
            columns = [real.names.index(name) for name in test.names]  # those that it has
            found = right(logits[:, columns], test.labels.to(args.device).float())
            print(f"the classifier, on {len(test.images):,} test images of {args.data}:")
            say(test.names, found.tolist())
        print(out)
        torch.manual_seed(1)
        (swept if hasattr(module, "sweep") else conditional)(run, judges[key])


if __name__ == "__main__":
    main()
