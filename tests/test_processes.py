"""Several processes, as torchrun starts them: two here, on the CPU, talking through gloo."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import DATA, HERE, call, load

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = ["--size", "16", "--batch", "4", "--width", "4", "--device", "cpu", "--root", DATA]

# Every script makes 20 steps in each of two processes; then all weights are compared.
STEPS = """
import copy, os, sys
import torch
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook
sys.path.insert(0, sys.argv[1])
import conftest

class patch:  # in place of pytest's monkeypatch
    setattr = staticmethod(setattr)

rank = int(os.environ["RANK"])
torch.set_num_threads(1)
distributed.init_process_group("gloo")
hook = conftest.load(conftest.HERE / "dcgan.py").average_gradients
register_optimizer_step_pre_hook(hook)

def run(name, steps, *flags):
    module = conftest.load(conftest.HERE / f"{name}.py")
    size = min(module.SIZES)
    flags += ("--width", 8) * ('"--width"' in open(module.__file__).read())
    flags += "--size", size, "--batch", 4, "--device", "cpu"
    data = conftest.cartoons(module, 80, size)
    caught = conftest.step_of(module, patch, flags, data)
    before = copy.deepcopy([caught["parts"][net] for net in "GD"])
    for now in range(1, steps + 1):
        torch.manual_seed(hash((0, now, rank)))
        caught["step"]()
    return module, data, before, caught["parts"]

def same_everywhere(tensors):
    mine = torch.cat([x.detach().flatten().double() for x in tensors])
    theirs = mine.clone()
    distributed.broadcast(theirs, 0)
    return torch.equal(mine, theirs)

for name in conftest.SCRIPTS:
    flags = ["--attribute", "Smiling", "--extractor", "joint"] * (name == "egan")
    parts = run(name, 20, *flags)[-1]
    for net, module in conftest.nets(parts):
        assert same_everywhere(module.parameters()), f"{name}: the weights of {net} differ"
        if net == "F":
            assert same_everywhere(module.buffers()), "F's running averages differ"

# Without BatchNorm, a step of two processes is one process' step on both batches together.
module, data, (G, D), parts = run("gan_mlp", 1)
real, z = [], []
for other in range(2):
    torch.manual_seed(hash((0, 1, other)))
    real.append(module.sample_batch(data, 4, "cpu")[0])
    z.append(2 * torch.rand(4, module.Z) - 1)
assert not torch.equal(*real)
real, z = torch.cat(real), torch.cat(z)
for net, name, loss in [(D, "D", lambda: module.d_loss(D(real), D(G(z)))),
                        (G, "G", lambda: module.g_loss(D(G(z))))]:
    settings = parts[f"opt_{name}"].param_groups[0]
    adam = torch.optim.Adam(net.parameters(), lr=settings["lr"], betas=settings["betas"])
    gradients = torch.autograd.grad(loss(), list(net.parameters()))
    for p, gradient in zip(net.parameters(), gradients):
        p.grad = gradient.clone()  # the hook is called for this Adam too
    adam.step()
    for a, b, gradient in zip(net.parameters(), parts[name].parameters(), gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(gradient, b.grad, rtol=1e-3, atol=1e-6)  # Adam hides a factor
"""

# Runs dcgan.py; in its fifth step, the second process gets the signal that argv[2] names.
SIGNALLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import dcgan

def sample_batch(*args, original=dcgan.sample_batch, calls=[]):
    calls.append(1)
    if len(calls) == 5 and dcgan.RANK == 1:
        os.kill(os.getpid(), int(sys.argv[2]))
    return original(*args)

dcgan.sample_batch = sample_batch
dcgan.main(sys.argv[3:])
"""


def launch(folder, *args, code=None):
    """torchrun with two processes, in a folder -> the finished launcher."""
    if code:
        (folder / "program.py").write_text(code)
    command = [*TORCHRUN, *(["program.py"] if code else []), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)


def test_all_scripts_keep_equal_weights(tmp_path):
    done = launch(tmp_path, HERE / "tests", code=STEPS)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of a run of eight steps that nobody disturbed."""
    home = tmp_path_factory.mktemp("whole")
    done = launch(home, HERE / "dcgan.py", "--steps", 8, *TINY, "--out", "run")
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if not x.startswith("preparing")]
    assert lines[0].startswith("8 steps of 8 from") and len(lines) == 9  # one process speaks
    assert sorted(path.name for path in (home / "run").iterdir()) == [
        "checkpoint.pt", "curves.png", "losses.csv", "real.png", "samples", "training.gif"]
    return torch.load(home / "run" / "checkpoint.pt")


def test_each_process_draws_images_of_its_own(whole, tmp_path):
    """If both made the same step, they would train as one process does."""
    dcgan = load(HERE / "dcgan.py")
    assert call(dcgan, "--steps", 8, *TINY, "--out", tmp_path / "run") == 0
    alone = torch.load(tmp_path / "run" / "checkpoint.pt")["parts"]["G"]["1.weight"]
    assert (alone - whole["parts"]["G"]["1.weight"]).abs().max() > 1e-4


def test_a_signal_to_one_ends_all_after_the_step_and_resume_is_exact(whole, tmp_path, capsys):
    stopped = launch(tmp_path, HERE, int(signal.SIGINT), "--steps", 8, *TINY, "--out", "run",
                     code=SIGNALLED)
    assert stopped.returncode != 0 and "to go on:" in stopped.stdout
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 5
    done = launch(tmp_path, HERE / "dcgan.py", "--resume", "--out", "run")
    assert done.returncode == 0, done.stderr
    parts = torch.load(tmp_path / "run" / "checkpoint.pt")["parts"]
    for name in "GD":
        for key, value in whole["parts"][name].items():
            assert torch.equal(value, parts[name][key]), (name, key)

    dcgan, out = load(HERE / "dcgan.py"), tmp_path / "run"  # and without torchrun
    assert call(dcgan, "--out", out, "--resume", "--steps", 9) == 2
    assert "this run has --processes 2" in capsys.readouterr().err
    assert call(dcgan, "--out", out, "--generate", 3) == 0
    assert len(list((out / "generated").iterdir())) == 3


def test_a_killed_process_ends_the_run_and_the_checkpoint_is_good(tmp_path):
    start = time.monotonic()
    killed = launch(tmp_path, HERE, int(signal.SIGKILL), "--steps", 1000, *TINY, "--out", "run",
                    code=SIGNALLED.replace("len(calls) == 5", "len(calls) == 25"))
    assert killed.returncode != 0 and time.monotonic() - start < 100
    assert "dcgan.py: " in killed.stderr  # the other's one line
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 20
