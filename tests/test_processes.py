"""Several processes, as torchrun starts them: two here, on the CPU, talking through gloo."""

import os
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import DATA, HERE, call, load, shell

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = ["--size", "16", "--batch", "4", "--width", "4", "--device", "cpu", "--root", DATA]

# Every script makes six steps in each of two processes; then all weights are compared.
STEPS = """
import copy, os, sys
import torch
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook
sys.path.insert(0, sys.argv[1])
import conftest
import pytest

rank = int(os.environ["RANK"])
torch.set_num_threads(1)
distributed.init_process_group("gloo")
hook = conftest.load(conftest.HERE / "dcgan.py").average_gradients
register_optimizer_step_pre_hook(hook)

def run(name, steps, *flags):
    module = conftest.load(conftest.HERE / f"{name}.py")
    size, first = min(module.SIZES), []
    flags += ("--width", 8) * ('"--width"' in open(module.__file__).read())
    flags += "--size", size, "--batch", 4, "--device", "cpu"

    def watch(run):
        if not first:
            first.extend(copy.deepcopy([run.to_save[net] for net in "GD"]))
        torch.manual_seed(hash((0, len(run.logs) + 1, rank)))

    data = conftest.cartoons(module, 80, size)
    patch = pytest.MonkeyPatch()
    to_save = conftest.run_train(module, patch, flags, data, n=steps, watch=watch).to_save
    return module, data, first, to_save

def same_everywhere(tensors):
    mine = torch.cat([x.detach().flatten().double() for x in tensors])
    theirs = mine.clone()
    distributed.broadcast(theirs, 0)
    return torch.equal(mine, theirs)

for name in conftest.SCRIPTS:
    flags = ["--attribute", "Smiling", "--extractor", "joint"] * (name == "egan")
    for net, module in conftest.nets(run(name, 6, *flags)[-1]):
        assert same_everywhere(module.parameters()), f"{name}: the weights of {net} differ"

# Without BatchNorm, a step of two processes is one process' step on both batches together.
module, data, (G, D), to_save = run("gan_mlp", 1)
real, z = [], []
for other in range(2):
    torch.manual_seed(hash((0, 1, other)))
    real.append(module.sample_batch(data, 4, "cpu")[0])
    z.append(2 * torch.rand(4, module.Z) - 1)
assert not torch.equal(*real)
real, z = torch.cat(real), torch.cat(z)
for net, name, loss in [(D, "D", lambda: module.d_loss(D(real), D(G(z)))),
                        (G, "G", lambda: module.g_loss(D(G(z))))]:
    settings = to_save[f"opt_{name}"].param_groups[0]
    adam = torch.optim.Adam(net.parameters(), lr=settings["lr"], betas=settings["betas"])
    gradients = torch.autograd.grad(loss(), list(net.parameters()))
    for p, gradient in zip(net.parameters(), gradients):
        p.grad = gradient.clone()  # the hook is called for this Adam too
    adam.step()
    for a, b, gradient in zip(net.parameters(), to_save[name].parameters(), gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(gradient, b.grad, rtol=1e-3, atol=1e-6)  # Adam hides a factor
"""

# Runs dcgan.py; in the fifth step, the second process is killed.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import dcgan

def sample_batch(*args, original=dcgan.sample_batch, calls=[]):
    calls.append(1)
    if len(calls) == 5 and dcgan.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

dcgan.sample_batch = sample_batch
dcgan.main(sys.argv[2:])
"""


def launch(folder, *args, code=None):
    """torchrun with two processes, in a folder -> the finished launcher."""
    if code:
        (folder / "program.py").write_text(code)
    command = [*TORCHRUN, *(["program.py"] if code else []), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)


def test_every_script_averages_its_gradients_and_keeps_equal_weights(tmp_path):
    done = launch(tmp_path, HERE / "tests", code=STEPS)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of a run of eight steps that nobody disturbed."""
    home = tmp_path_factory.mktemp("whole")
    done = launch(home, HERE / "dcgan.py", "--steps", 8, *TINY, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "8 steps of 8 from 2,560 images" in done.stdout and done.stdout.count("step 3/8") == 1
    assert sorted(path.name for path in (home / "run").iterdir()) == [
        "checkpoint.pt", "curves.png", "losses.csv", "real.png", "samples", "training.gif"]
    return torch.load(home / "run" / "checkpoint.pt")


def test_each_process_draws_random_numbers_of_its_own(whole, tmp_path):
    """If both made the same step, they would train as one process does."""
    dcgan = load(HERE / "dcgan.py")
    assert call(dcgan, "--steps", 8, *TINY, "--out", tmp_path / "run") == 0
    alone = torch.load(tmp_path / "run" / "checkpoint.pt")["state"]["G"]["1.weight"]
    assert (alone - whole["state"]["G"]["1.weight"]).abs().max() > 1e-4


def test_a_killed_process_ends_the_run_and_resume_is_exact(whole, tmp_path):
    killed = launch(tmp_path, HERE, "--steps", 8, *TINY, "--out", "run", code=KILLED)
    assert killed.returncode != 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    assert torch.load(checkpoint)["step"] in (3, 4)
    done = launch(tmp_path, HERE / "dcgan.py", "--resume", "--out", "run")
    assert done.returncode == 0, done.stderr
    state = torch.load(checkpoint)["state"]
    for name in "GD":
        for key, value in whole["state"][name].items():
            assert torch.equal(value, state[name][key]), (name, key)
    dcgan = load(HERE / "dcgan.py")
    assert call(dcgan, "--out", tmp_path / "run", "--generate", 3) == 0  # without torchrun
    assert len(list((tmp_path / "run" / "generated").iterdir())) == 3


def test_a_mistake_is_told_once_not_by_every_process(tmp_path):
    done = launch(tmp_path, HERE / "dcgan.py", "--data", "nowhere", *TINY)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    assert done.stderr.count("'nowhere' is neither a folder nor") == 1


def one_of_two(dcgan, rank, monkeypatch):
    """Make this process one of two that never talk -> a list, to which waiting is noted."""
    done = []
    monkeypatch.setattr(dcgan, "RANK", rank)
    monkeypatch.setattr(dcgan, "RANKS", 2)
    monkeypatch.setattr(dcgan.distributed, "init_process_group", lambda kind: done.append("wait"))
    monkeypatch.setattr(dcgan.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dcgan, "register_optimizer_step_pre_hook", lambda hook: None)
    return done


def test_only_the_first_process_generates(tmp_path, monkeypatch):
    dcgan = load(HERE / "dcgan.py")
    assert call(dcgan, "--steps", 1, *TINY, "--out", tmp_path / "run") == 0
    for rank, n in [(1, 0), (0, 3)]:
        one_of_two(dcgan, rank, monkeypatch)
        assert call(dcgan, "--generate", 3, "--out", tmp_path / "run") == 0
        assert len(list((tmp_path / "run").glob("generated/*"))) == n


@pytest.mark.parametrize(("rank", "expected"), [(0, ["data", "wait"]), (1, ["wait", "data"])])
def test_the_first_process_prepares_the_data_while_the_others_wait(rank, expected, monkeypatch):
    dcgan = load(HERE / "dcgan.py")
    done = one_of_two(dcgan, rank, monkeypatch)
    monkeypatch.setattr(dcgan, "get_data", lambda args: done.append("data") or "some")
    monkeypatch.setattr(dcgan, "train", lambda args, data: None)
    assert call(dcgan, *TINY, "--out", "no-such-run") == 0 and done == expected


def test_a_slow_process_does_not_take_the_runs_folder_for_another_runs(tmp_path, monkeypatch):
    """The first process may have made it before the others look."""
    dcgan = load(HERE / "dcgan.py")
    (tmp_path / "run" / "samples").mkdir(parents=True)
    monkeypatch.setattr(dcgan, "RANK", 1)
    assert dcgan.parse_arguments(["--out", f"{tmp_path}/run"]).checkpoint == {}


@pytest.mark.parametrize("left_over", [
    {"RANK": "3"}, {"RANK": ""}, {"WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_what_a_scheduler_leaves_in_the_environment_is_not_torchrun(left_over, monkeypatch):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    script = runpy.run_path(str(HERE / "dcgan.py"))
    assert (script["RANK"], script["RANKS"]) == (0, 1)


def test_with_rank_alone_in_the_environment_a_run_trains_as_usual(tmp_path):
    env = {**os.environ, "RANK": "3", "LOCAL_RANK": "3"}
    done = shell(HERE / "dcgan.py", "--steps", 1, *TINY, "--out", "run", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 1
