"""How fast a script is: its bare steps, a whole run, and the same steps fed and read the usual way.

    python tests/benchmark.py dcgan
    python tests/benchmark.py dcgan --size 64 --batch 64
    python tests/benchmark.py wgan --processes 2

Not collected by pytest. Further flags go to the script. Three things make the same training steps,
in one process, in turn, so that what else the machine does hits them alike:

    step     step() alone
    run      fit(): steps with a row, a picture, the curves and a checkpoint at every 1 % of them
    loader   step(), but images come from PNG files by a DataLoader with two workers, and every step
             prints its losses, as in pytorch/examples' dcgan. (pix2pix_color has none.)

A run here is 100 steps, so that every step of it is also recorded: the table says what that costs,
and what part of a default run it is. --processes N trains by torchrun with 1 and with N processes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from conftest import HERE, load
from PIL import Image


class Files(torch.utils.data.Dataset):
    """PNG files, decoded one by one, as a DataLoader wants them."""

    def __init__(self, data, folder):
        self.labels, self.files = data.labels.cpu(), []
        for i, image in enumerate(data.images[:2000]):
            self.files.append(folder / f"{i}.png")
            pixels = image.permute(1, 2, 0).squeeze(2).cpu().numpy()
            Image.fromarray(pixels).save(self.files[-1])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        pixels = torchvision.transforms.functional.to_tensor(Image.open(self.files[i]))
        return 2 * pixels - 1, self.labels[i].float()


def forever(loader):
    while True:
        yield from loader


def build(module, flags, folder):
    """-> args, data, what train() hands to fit()."""
    caught, fit = {}, module.fit

    def catch(args, data, step, draw, parts, grid=None, measure=dict):
        caught.update(step=step, draw=draw, parts=parts, grid=grid, measure=measure)

    args = module.command_line([*flags, "--out", str(folder / "run"), "--steps", "100"])
    data = module.get_data(args)
    module.fit = catch
    torch.manual_seed(args.seed)
    module.train(args, data)
    module.fit = fit
    return args, data, caught


def compare(name, flags, rounds, folder):
    module = load(HERE / f"{name}.py")
    args, data, caught = build(module, flags, folder)
    sample = module.sample_batch
    loader = torch.utils.data.DataLoader(
        Files(data, folder), args.batch, shuffle=True, num_workers=2, drop_last=True,
        persistent_workers=True)
    batches, quiet = forever(loader), open(os.devnull, "w")
    synchronize = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None

    def timed(steps, function):
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            function()
        synchronize()
        return steps * args.batch / (time.perf_counter() - start)

    def usual():
        values = caught["step"]()
        print(*(value.item() for value in values.values()), file=quiet, flush=True)

    def run():
        args.out, args.steps, stdout = str(folder / f"run{time.time()}"), 100, sys.stdout
        sys.stdout = quiet
        module.fit(args, data, **caught)
        sys.stdout = stdout

    speeds = {"step": [], "run": [], "loader": []}
    timed(10, caught["step"])  # to warm up
    for _ in range(rounds):
        speeds["step"].append(timed(100, caught["step"]))
        speeds["run"].append(timed(1, run) * 100)
        if name != "pix2pix_color":
            module.sample_batch = lambda *_: [x.to(args.device) for x in next(batches)]
            next(batches)  # workers are there
            speeds["loader"].append(timed(100, usual))
            module.sample_batch = sample
    print(f"{name}.py {' '.join(flags)}: {args.size} px, batches of {args.batch}, {args.device}, "
          f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {rounds} rounds\n")
    print("| | images/s: median (quartiles) | of step's, paired |\n|---|---|---|")
    for kind, found in speeds.items():
        if found:
            low, middle, high = statistics.quantiles(found, n=4)
            ratio = statistics.median(a / b for a, b in zip(found, speeds["step"]))
            print(f"| {kind} | {middle:.0f} ({low:.0f} to {high:.0f}) | {ratio:.2f} |")
    record = statistics.median(args.batch / b - args.batch / a
                               for a, b in zip(speeds["step"], speeds["run"]))
    defaults = module.command_line([*flags, "--out", str(folder / "default")])
    steps = defaults.steps or defaults.epochs * len(data.images) / args.batch
    whole = steps * args.batch / statistics.median(speeds["step"])
    print(f"\none record: {1000 * record:.0f} ms; 100 of them are {100 * record / whole:.1%} of "
          f"the {whole / 60:.1f} minutes that the steps of this run take without --steps")


def scale(name, flags, processes, folder):
    print(f"{name}.py {' '.join(flags)}, 100 steps, one thread a process\n")
    print("| processes | images/s | of one's |\n|---|---|---|")
    speeds = {}
    for n in (1, processes):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", str(n), HERE / f"{name}.py", *flags,
                   "--steps", "100", "--out", folder / f"run{n}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        last = (folder / f"run{n}" / "losses.csv").read_text().split()[-1]
        speeds[n] = float(last.split(",")[-1])
        print(f"| {n} | {speeds[n]:.0f} | {speeds[n] / speeds[1]:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.processes:
            scale(args.script, flags, args.processes, Path(folder))
        else:
            compare(args.script, flags, args.rounds, Path(folder))


if __name__ == "__main__":
    main()
