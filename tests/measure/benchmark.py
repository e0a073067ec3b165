"""How fast a script is: its bare steps, a whole run, and the same steps fed and read the usual way.

    python tests/measure/benchmark.py dcgan
    python tests/measure/benchmark.py dcgan --size 64 --batch 64
    python tests/measure/benchmark.py wgan --processes 2

Not collected by pytest. Further flags go to the script. Three things make the same training steps,
in one process, in turn, so that what else the machine does hits them alike:

    step     the steps alone
    run      with a row, a picture, the curves and a checkpoint after every 1 % of them
    loader   the steps alone, but images come from PNG files by a DataLoader with two workers, and
             every step prints its losses, as in pytorch/examples' dcgan. (pix2pix_color has none.)

A run here is 100 steps, so that every step of it is also recorded: the table says what that costs,
and what part of a default run it is. --processes N trains by torchrun with 1 and with N processes.
"""

import argparse
import importlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))


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


def compare(name, flags, rounds, folder):
    module = importlib.import_module(name)
    args = module.parse_arguments([*flags, "--out", str(folder / "run"), "--steps", "100"])
    data, speeds = module.get_data(args), {"step": [], "run": [], "loader": []}
    steps, sample_batch, screen = module.steps, module.sample_batch, sys.stdout
    loader = torch.utils.data.DataLoader(
        Files(data, folder), args.batch, shuffle=True, num_workers=2, drop_last=True,
        persistent_workers=True)
    batches, quiet = forever(loader), open(os.devnull, "w")

    def now():
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def bare():
        for _ in range(100):
            yield {}

    def usual():
        for _ in range(100):
            log = {}
            yield log
            print(*(value.item() for value in log.values()), file=quiet, flush=True)

    def timed(kind, turns):
        start = now()
        yield from turns
        speeds[kind].append(100 * args.batch / (now() - start))

    def in_turn(args, *others):
        """In place of steps(): the loop of train() makes all steps of all three kinds."""
        yield from bare()  # to warm up
        for number in range(rounds):
            yield from timed("step", bare())
            args.out, sys.stdout = str(folder / f"run{number}"), quiet
            yield from timed("run", steps(args, *others))
            sys.stdout = screen
            if name != "pix2pix_color":
                module.sample_batch = lambda *_: [x.to(args.device) for x in next(batches)]
                next(batches)  # workers are there
                yield from timed("loader", usual())
                module.sample_batch = sample_batch

    module.steps = in_turn
    torch.manual_seed(args.seed)
    module.train(args, data)
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
    defaults = module.parse_arguments([*flags, "--out", str(folder / "default")])
    count = defaults.steps or defaults.epochs * len(data.images) / args.batch
    whole = count * args.batch / statistics.median(speeds["step"])
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
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        speeds[n] = float(re.findall(r"(\d+) images/s", done.stdout)[-1])
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
