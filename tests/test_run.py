"""What a run leaves, and that nothing is lost: kill -9, Ctrl-C, a full disk, a NaN, --resume."""

import functools
import math
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, HERE, call, die, forked, load
from PIL import Image, ImageSequence


def assert_same(a, b, where="checkpoint"):
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}, {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i in range(len(a)):
            assert_same(a[i], b[i], f"{where}, {i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def test_six_steps_equal_three_and_a_kill_and_three(module, alone, tiny, monkeypatch):
    """Weights, optimisers, random numbers and logged losses, bit for bit on the CPU."""
    assert call(module, "--steps", 6, *tiny, "--out", "whole") == 0
    record = module.record
    with monkeypatch.context() as patch:
        patch.setattr(module, "record", lambda args, data, parts, rows, *others: (
            die if rows[-1]["step"] == 4 else record)(args, data, parts, rows, *others))
        assert forked(module, "--steps", 6, *tiny, "--out", "cut") == -signal.SIGKILL
    assert torch.load("cut/checkpoint.pt")["step"] == 3
    assert call(module, "--resume", "--out", "cut") == 0
    assert_equal_runs(alone / "whole", alone / "cut")


def assert_equal_runs(a, b):
    first, second = torch.load(a / "checkpoint.pt"), torch.load(b / "checkpoint.pt")
    for rows in (first["rows"], second["rows"]):
        for row in rows:
            del row["images/s"]
    assert_same(first, second)
    for picture in ("samples/000006.png", "samples/000003.png", "real.png"):
        assert (a / picture).read_bytes() == (b / picture).read_bytes()


def test_nan_ends_the_run_and_spares_the_checkpoint(module, script, alone, tiny, capsys):
    assert call(module, "--steps", 1, *tiny) == 0
    path = alone / "runs" / f"{script}-cartoon" / "checkpoint.pt"
    saved = torch.load(path)
    saved["settings"]["lr"] = float("nan")
    for name, part in saved["parts"].items():
        if name.startswith("opt"):
            part["param_groups"][0]["lr"] = float("nan")
    torch.save(saved, path)
    before = path.read_bytes()
    capsys.readouterr()
    assert call(module, "--resume", "--steps", 20, "--out", path.parent) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_bytes() == before


# The rest is the chassis, the same text in every script: one script stands for all.

dcgan = load(HERE / "dcgan.py")
SMALL = ["--size", 16, "--batch", 4, "--width", 4, "--device", "cpu", "--root", DATA]


def test_log_pictures_and_animation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 230, *SMALL, "--out", "run") == 0
    rows = [line.split(",") for line in (tmp_path / "run/losses.csv").read_text().splitlines()]
    assert rows[0] == ["step", "loss_D", "loss_G", "D(x)", "D(G(z))", "spread", "images/s"]
    assert [int(row[0]) for row in rows[1:]] == [*range(3, 230, 3), 230]
    steps = sorted(int(path.stem) for path in (tmp_path / "run/samples").iterdir())
    assert steps == [*range(3, 230, 3), 230]
    grids = [Image.open(path) for path in sorted((tmp_path / "run/samples").iterdir())]
    assert {grid.size for grid in grids} == {(8 * 18 + 2, 8 * 18 + 2)}  # two pixels between
    animation = Image.open(tmp_path / "run/training.gif")
    assert sum(1 for _ in ImageSequence.Iterator(animation)) == len(steps[::-2])
    assert Image.open(tmp_path / "run/curves.png").size == (640, 120 * len(rows[0]))
    losses = np.loadtxt(tmp_path / "run/losses.csv", delimiter=",", skiprows=1)
    assert losses.shape == (len(steps), 7) and np.isfinite(losses).all()


def test_previews_show_the_same_z_in_eval_mode():
    net = torch.nn.BatchNorm1d(2)
    args, draws = type("Args", (), {"seed": 5}), []
    for _ in range(2):
        with dcgan.preview(args, net):
            draws.append(torch.randn(3))
            assert not net.training and not torch.is_grad_enabled()
            net(torch.randn(4, 2))
    assert torch.equal(*draws) and net.training and net.num_batches_tracked == 0


def test_pictures_leave_no_trace_in_the_weights(tmp_path, monkeypatch):
    """Rows and pictures at every step or just once: the same weights, to the bit."""
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 6, *SMALL, "--out", "often") == 0
    monkeypatch.setattr(dcgan, "math", SimpleNamespace(ceil=lambda x: 100, inf=math.inf))
    assert call(dcgan, "--steps", 6, *SMALL, "--out", "once") == 0
    a, b = (torch.load(f"{out}/checkpoint.pt") for out in ("often", "once"))
    assert (len(a["rows"]), len(b["rows"])) == (6, 1)
    assert_same(a["parts"], b["parts"])
    means = sum(row["loss_G"] for row in a["rows"]) / 6
    assert b["rows"][0]["loss_G"] == pytest.approx(means, rel=1e-5)


def recorded(tmp_path, rows, picture=None):
    """One call of record(), for a run of nothing."""
    (tmp_path / "samples").mkdir(exist_ok=True)
    args = dcgan.argparse.Namespace(out=str(tmp_path), batch=4, saved={})
    data = dcgan.Data(torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, 0), [])
    picture = torch.zeros(1, 2, 3, 16, 16) if picture is None else picture
    dcgan.record(args, data, {}, rows, picture, 900)


def test_pictures_keep_their_brightness(tmp_path):
    """The range is fixed: a dim picture stays dim whatever its neighbours are."""
    row = {"step": 100, "spread": 1.0, "images/s": 100.0}
    recorded(tmp_path, [row], torch.full((1, 2, 3, 16, 16), -0.5))
    picture = Image.open(tmp_path / "samples" / "000100.png")
    assert picture.getpixel((5, 5)) == (64, 64, 64) and picture.size == (38, 20)


def test_collapse_is_told_once(capsys, tmp_path):
    rows = []
    for step, spread in [(400, 0.05), (600, 0.5), (700, 0.05), (800, 0.04)]:
        rows.append({"step": step, "loss_D": 1.0, "spread": spread, "images/s": 100.0})
        recorded(tmp_path, rows)
    text = capsys.readouterr().out
    assert text.count("COLLAPSE") == 1 and text.index("700/900") < text.index("COLLAPSE")
    assert text.index("COLLAPSE") < text.index("800/900") and "0:00:08 left" in text


def test_sample_batch_is_uniform_and_with_replacement():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    data = dcgan.Data(images, images.view(10, 1) % 2, ["odd"])
    torch.manual_seed(0)
    x, y = dcgan.sample_batch(data, 20_000, torch.device("cpu"))
    index = ((x + 1) * 127.5).round().long().flatten()
    assert torch.equal(index % 2, y.long().flatten())  # the label goes with its image
    counts = index.bincount(minlength=10)
    assert counts.min() > 1800 and counts.max() < 2200


def test_two_seeds_differ_and_one_seed_repeats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert call(dcgan, "--steps", 2, *SMALL, "--seed", seed, "--out", out) == 0
    a, b, c = (torch.load(f"{out}/checkpoint.pt")["parts"] for out in "abc")
    assert_same(a, b)
    with pytest.raises(AssertionError):
        assert_same(a["G"], c["G"])


def test_epochs_count_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--epochs", 0.01, *SMALL, "--out", "run") == 0
    assert torch.load("run/checkpoint.pt")["step"] == round(0.01 * 2560 / 4)


def test_handlers_are_put_back(tmp_path, monkeypatch):
    """A notebook's Ctrl-C must work after a run."""
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_folder_is_one_runs_alone(tmp_path, monkeypatch, capsys):
    """Two runs that both found it free: the second to start is refused, before it writes."""
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", 1, *SMALL, "--out", "run"]
    load_images = dcgan.load_images

    def meanwhile(*args):
        monkeypatch.setattr(dcgan, "load_images", load_images)
        assert call(dcgan, *flags) == 0
        return load_images(*args)

    monkeypatch.setattr(dcgan, "load_images", meanwhile)
    assert call(dcgan, *flags, "--seed", 7) == 2
    assert torch.load("run/checkpoint.pt")["settings"]["seed"] == 0
    assert capsys.readouterr().err.count("\n") == 1


def test_resume_with_data_that_moved_but_not_with_other_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        folder = tmp_path / "mine" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(folder / f"{i}.png")
    assert call(dcgan, "--data", "mine", "--steps", 1, *SMALL, "--out", "run") == 0
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert call(dcgan, "--out", "run", "--resume", "--steps", 2, "--data", "moved") == 0
    (tmp_path / "moved" / "b").rename(tmp_path / "moved" / "c")
    assert call(dcgan, "--out", "run", "--resume", "--steps", 3, "--data", "moved") == 2
    assert "not the labels" in capsys.readouterr().err


def test_killed_while_saving(tmp_path, monkeypatch):
    """The checkpoint before stays, whole; going on from it gives the same run."""
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", 6, *SMALL]
    assert call(dcgan, *flags, "--out", "whole") == 0
    saves = iter([dcgan.os.replace, die])  # the second never happens
    with monkeypatch.context() as patch:
        patch.setattr(dcgan.os, "replace", lambda *paths: next(saves)(*paths))
        assert forked(dcgan, *flags, "--out", "cut") == -signal.SIGKILL
    assert torch.load("cut/checkpoint.pt")["step"] == 1
    assert call(dcgan, "--resume", "--out", "cut") == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    """In a process of its own, as from a shell."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, HERE / "dcgan.py", "--steps", "100000", *map(str, SMALL)]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # not so under nohup
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           preexec_fn=heard)
    while "images on cpu ->" not in run.stdout.readline():
        assert run.poll() is None
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    text, error = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT and error == ""
    saved = torch.load("runs/dcgan-cartoon/checkpoint.pt")
    advice = text.splitlines()[-1]
    assert f"step {saved['step']}/100000" in text and "to go on:" in advice
    more = shlex.split(advice.split("python dcgan.py ")[1])
    assert call(dcgan, *more, "--steps", saved["step"] + 1) == 0
    assert torch.load("runs/dcgan-cartoon/checkpoint.pt")["step"] == saved["step"] + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_save_too(tmp_path, monkeypatch, number):
    """From within, in the fifth step; the whole step is made and saved."""
    monkeypatch.chdir(tmp_path)
    sample_batch, calls = dcgan.sample_batch, []

    def fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(number)
        return sample_batch(*args)

    monkeypatch.setattr(dcgan, "sample_batch", fifth)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    try:
        assert forked(dcgan, "--steps", 1000, *SMALL, "--out", "run") == 128 + number
    finally:
        signal.signal(number, before)
    assert torch.load("run/checkpoint.pt")["step"] == 5


def test_no_room_for_the_checkpoint(tmp_path, monkeypatch, capfd):
    """A full disk (here: a limit on file sizes): one line, status 2, the old file stays."""
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    save_file = dcgan.save_file

    def into_a_full_disk(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 9000,) * 2)
        save_file(*args)

    monkeypatch.setattr(dcgan, "save_file", into_a_full_disk)
    assert forked(dcgan, "--resume", "--steps", 2, "--out", "run") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "checkpoint.pt" in error
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))
