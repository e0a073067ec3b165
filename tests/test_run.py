"""What a run leaves, and that nothing is lost: kill -9, Ctrl-C, a NaN, --resume."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, HERE, call, cartoons, die, forked, load, run_train, tree
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


def assert_same_runs(a, b):
    """Weights, optimisers, rows and settings; and every other file, byte for byte."""
    saved = [torch.load(f"{out}/checkpoint.pt") for out in (a, b)]
    for checkpoint in saved:
        for name in ("out", "resume"):
            del checkpoint["settings"][name]
    assert_same(*saved)
    files = [{Path(path).relative_to(out): content for path, content in tree(out).items()
              if "checkpoint.pt" not in path} for out in (a, b)]
    assert_same(*files, "files")


def test_six_steps_equal_three_kill_9_and_three(module, alone, tiny, monkeypatch):
    assert call(module, "--steps", 6, *tiny, "--out", "whole") == 0
    record = module.record

    def record_or_die(args, data, to_save, rows, step, picture, last):
        (die if step == 4 else record)(args, data, to_save, rows, step, picture, last)

    with monkeypatch.context() as patch:
        patch.setattr(module, "record", record_or_die)
        assert forked(module, "--steps", 6, *tiny, "--out", "cut") == -signal.SIGKILL
    assert torch.load("cut/checkpoint.pt")["step"] == 3
    assert call(module, "--resume", "--out", "cut") == 0
    assert_same_runs("whole", "cut")


def test_pictures_and_rows_leave_no_trace_in_the_weights(module, alone, tiny, monkeypatch):
    """Three steps with a picture each, and three without any: the same, to the bit."""
    assert call(module, "--steps", 3, *tiny, "--out", "run") == 0
    data = module.load_images("cartoon", min(module.SIZES), DATA)

    def seed(run):  # as steps() does
        torch.manual_seed(hash((0, len(run.logs) + 1, 0)))

    run = run_train(module, monkeypatch, tiny, data, n=3, watch=seed)
    bare = {name: part.state_dict() for name, part in run.to_save.items()}
    assert_same(torch.load("run/checkpoint.pt")["state"], bare)


def test_nan_ends_the_run_and_the_last_checkpoint_stays(module, alone, tiny, capsys):
    assert call(module, "--steps", 1, *tiny, "--out", "run") == 0
    before = tree("run")
    capsys.readouterr()
    assert call(module, "--resume", "--steps", 20, "--lr", 1e38, "--out", "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not finite; a smaller --lr may help" in error
    assert tree("run") == before


# What a run's networks and its data are made for.
FIXED = {"--size": None, "--width": 12, "--attribute": "sharpness", "--extractor": "joint",
         "--adversarial": "wgan", "--no-labels": True, "--beta1": 0.9, "--init-std": 0.1}


def test_what_shapes_a_run_is_its_own_and_all_else_may_change(module, alone, tiny, capsys):
    def ask(*flags):
        capsys.readouterr()
        try:
            module.parse_arguments([*map(str, flags), "--out", "run"])
        except SystemExit as end:
            error = capsys.readouterr().err
            assert end.code == 2 and error.count("\n") == 1
            return error
        return ""

    args = module.parse_arguments([*tiny, "--steps", "1", "--out", "run"])
    (alone / "run" / "samples").mkdir(parents=True)
    data, picture = cartoons(module, 64, args.size), torch.zeros(1, 1, 3, 8, 8)
    module.record(args, data, {}, [], 0, picture, last=False)
    draw = ["--colorize", "a.png"] if "colorize" in module.__doc__ else ["--generate", 1]
    for flag, other in FIXED.items():
        name = flag[2:].replace("-", "_")
        if name not in vars(args):
            continue
        now, other = vars(args)[name], other or module.SIZES[1]
        for mode in (["--resume"], draw):
            error = ask(*mode, flag, *[other] * (other is not True))
            assert f"{flag} {other}: this run has {now}" in error, (flag, mode)
            assert not ask(*mode, *[flag, now] * (now is not False)), (flag, mode)
    for mode in (["--resume"], draw):
        changes = ["--steps", 9, "--lr", 1e-5, "--batch", 3, "--seed", 5, "--root", "elsewhere"]
        assert not ask(*mode, *changes), mode


# The rest is the part that all scripts share: dcgan.py stands for all.

dcgan = load(HERE / "dcgan.py")
SMALL = ["--size", 16, "--batch", 4, "--width", 4, "--device", "cpu", "--root", DATA]


def test_a_checkpoint_is_never_half_written(tmp_path, monkeypatch):
    """Killed in the middle of saving, the run goes on from the checkpoint before."""
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 6, *SMALL, "--out", "whole") == 0
    save = torch.save

    def save_half(content, file):
        save(content, file)
        if content["step"] == 3:
            with open(file, "r+b") as half:
                half.truncate(1000)
            die()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        assert forked(dcgan, "--steps", 6, *SMALL, "--out", "cut") == -signal.SIGKILL
    assert torch.load("cut/checkpoint.pt")["step"] == 2
    assert call(dcgan, "--resume", "--out", "cut") == 0
    assert_same_runs("whole", "cut")


def test_a_run_that_is_killed_leaves_no_half_picture(tmp_path, monkeypatch):
    """The GIF at the end of the resumed run opens them all."""
    monkeypatch.chdir(tmp_path)
    save_image, pictures = dcgan.save_image, []

    def save_half(images, file, **options):
        save_image(images, file, **options)
        pictures.append(file)
        if len(pictures) == 5:  # the first are real.png and the untrained G's
            with open(file, "r+b") as half:
                half.truncate(100)
            die()

    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "save_image", save_half)
        assert forked(dcgan, "--steps", 6, *SMALL, "--out", "cut") == -signal.SIGKILL
    samples = sorted((tmp_path / "cut" / "samples").iterdir())
    assert [file.stem for file in samples] == ["000000", "000001", "000002"]
    for file in samples:
        Image.open(file).load()
    assert call(dcgan, "--resume", "--out", "cut") == 0
    assert not (tmp_path / "cut" / "new.png").exists()


def test_two_processes_that_save_at_the_same_time_leave_a_whole_checkpoint(tmp_path, monkeypatch):
    """As after kill -9 of torchrun, whose workers go on, and --resume."""
    file, save = tmp_path / "checkpoint.pt", torch.save

    def save_slowly(content, own):
        save(content, own)
        whole = Path(own).read_bytes()
        Path(own).write_bytes(whole[:500])
        child = os.fork()
        if child == 0:
            try:
                monkeypatch.setattr(torch, "save", save)
                dcgan.save("the other's", file)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert torch.load(file) == "the other's"
        with open(own, "ab") as half:
            half.write(whole[500:])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_slowly)
        dcgan.save("mine", file)
    assert torch.load(file) == "mine" and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_run_that_is_killed_in_its_first_step_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 2, *SMALL, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "sample_batch", die)
        assert forked(dcgan, "--steps", 2, *SMALL, "--out", "cut") == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [
        "checkpoint.pt", "real.png", "samples"]
    assert torch.load("cut/checkpoint.pt")["step"] == 0
    assert call(dcgan, "--resume", "--out", "cut") == 0
    assert_same_runs("whole", "cut")


def test_only_the_checkpoint_must_be_written(tmp_path, monkeypatch, capsys):
    """Excel keeps others from writing a table that it shows; here, a folder has the file's name."""
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    files = ["losses.csv", "curves.png", "training.gif", "samples/000005.png"]
    for step, name in enumerate(files, 2):
        file = tmp_path / "run" / name
        file.unlink(missing_ok=True)
        file.mkdir()
        capsys.readouterr()
        assert call(dcgan, "--resume", "--steps", step, "--out", "run") == 0
        told = capsys.readouterr()
        assert told.out.count("not written: ") == 1 and not told.err
        assert Path(name).name in told.out.split("not written: ")[1], name
        assert torch.load("run/checkpoint.pt")["step"] == step
        file.rmdir()
    assert call(dcgan, "--resume", "--steps", 6, "--out", "run") == 0
    assert len((tmp_path / "run" / "losses.csv").read_text().splitlines()) == 7


def test_a_save_that_is_stopped_leaves_nothing_behind(tmp_path, monkeypatch):
    def save_and_stop(content, file):
        Path(file).write_text("a part")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        dcgan.save({}, tmp_path / "checkpoint.pt")
    assert tree(tmp_path) == {}


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    before, save = (tmp_path / "run" / "checkpoint.pt").read_bytes(), torch.save

    def save_on_a_full_disk(content, file):
        save("a part", file)
        raise RuntimeError("[enforce fail at inline_container.cc:672] .\nunexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", save_on_a_full_disk)
    capsys.readouterr()
    assert call(dcgan, "--resume", "--steps", 2, "--out", "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run/checkpoint.pt cannot be written (is the disk full?): " in error
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))  # nor half a one
    assert call(dcgan, "--steps", 2, *SMALL, "--root", "new", "--out", "other") == 2
    error = capsys.readouterr().err  # of a prepared set
    assert error.count("\n") == 1 and "new/prepared/cartoon-16-train-" in error


def test_ctrl_c_ends_at_once_without_a_traceback_and_resume_goes_on(tmp_path, monkeypatch):
    """In a process of its own, as from a shell."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, HERE / "dcgan.py", "--steps", 4000, *SMALL]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    run = subprocess.Popen(list(map(str, command)), text=True, preexec_fn=heard,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not run.stdout.readline().startswith("step 80/4000"):  # then step 40 is saved
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    text, error = run.communicate(timeout=20)
    assert run.returncode == 128 + signal.SIGINT and error == "" and "4000/4000" not in text
    step = torch.load("runs/dcgan-cartoon/checkpoint.pt")["step"]
    assert call(dcgan, "--resume", "--steps", step + 1) == 0
    assert torch.load("runs/dcgan-cartoon/checkpoint.pt")["step"] == step + 1


def test_resume_takes_another_learning_rate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 1, *SMALL, "--lr", 1e-3, "--out", "run") == 0
    for flags, rate in [([], 1e-3), (["--lr", 1e-4], 1e-4)]:
        step = torch.load("run/checkpoint.pt")["step"] + 1
        assert call(dcgan, "--resume", "--steps", step, *flags, "--out", "run") == 0
        state = torch.load("run/checkpoint.pt")["state"]
        assert [state[opt]["param_groups"][0]["lr"] for opt in ("opt_G", "opt_D")] == [rate, rate]


def test_resume_keeps_what_a_scheduler_made_of_the_learning_rate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    saved = torch.load("run/checkpoint.pt")
    saved["state"]["opt_G"]["param_groups"][0]["lr"] = 1e-6
    torch.save(saved, "run/checkpoint.pt")
    assert call(dcgan, "--resume", "--steps", 2, "--out", "run") == 0
    assert torch.load("run/checkpoint.pt")["state"]["opt_G"]["param_groups"][0]["lr"] == 1e-6


def test_a_column_may_be_a_numpy_number(tmp_path, monkeypatch):
    """A checkpoint with one could not be read again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dcgan, "steps", functools.partial(
        dcgan.steps, measure=lambda: {"norm": np.float64(0.5)}))
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    assert call(dcgan, "--generate", 2, "--out", "run") == 0
    assert torch.load("run/checkpoint.pt", weights_only=True)["rows"][-1]["norm"] == 0.5


def test_generate_removes_its_own_images_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    assert call(dcgan, "--generate", 3, "--out", "run") == 0
    best = Path("run/generated/best")
    best.mkdir()
    shutil.copy("run/generated/00001.png", best)
    assert call(dcgan, "--generate", 2, "--out", "run") == 0
    assert sorted(path.name for path in best.parent.iterdir()) == ["00000.png", "00001.png", "best"]
    assert list(best.iterdir()) == [best / "00001.png"]


def test_a_run_is_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    for gone in ("nothing", "samples"):  # a checkpoint without pictures is a run, too
        shutil.rmtree(f"run/{gone}", ignore_errors=True)
        before = tree("run")
        capsys.readouterr()
        assert call(dcgan, "--steps", 2, *SMALL, "--out", "run") == 2
        assert "run holds a run already" in capsys.readouterr().err
        assert call(dcgan, "--resume", "--out", "run") == 2  # it has made its one step
        assert "1 steps" in capsys.readouterr().err
        assert tree("run") == before


def test_two_runs_never_mix(tmp_path, monkeypatch, capsys):
    """Two that found the folder free at the same time: the second to start is refused."""
    monkeypatch.chdir(tmp_path)
    flags, get_data = ["--steps", 1, *SMALL, "--out", "run"], dcgan.get_data

    def meanwhile(args):
        monkeypatch.setattr(dcgan, "get_data", get_data)
        assert call(dcgan, *flags) == 0
        return get_data(args)

    monkeypatch.setattr(dcgan, "get_data", meanwhile)
    assert call(dcgan, *flags, "--seed", 7) == 2
    assert torch.load("run/checkpoint.pt")["settings"]["seed"] == 0
    assert capsys.readouterr().err.count("\n") == 1


def test_resume_takes_data_that_moved_but_not_other_class_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        folder = tmp_path / "mine" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(folder / f"{i}.png")
    assert call(dcgan, "--data", "mine", "--steps", 1, *SMALL, "--out", "run") == 0
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert call(dcgan, "--out", "run", "--resume", "--steps", 2, "--data", "moved") == 0
    (tmp_path / "moved" / "b").rename(tmp_path / "moved" / "c")
    before = tree("run")
    assert call(dcgan, "--out", "run", "--resume", "--steps", 3, "--data", "moved") == 2
    assert "moved has other labels or channels than this run" in capsys.readouterr().err
    assert tree("run") == before


def test_resume_tells_that_the_data_has_changed_but_not_that_it_has_moved(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = "is not the data that this run began with"
    for i in range(6):
        (tmp_path / "mine" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(f"mine/{'ab'[i % 2]}/{i}.png")
    assert call(dcgan, "--data", "mine", "--steps", 1, *SMALL, "--out", "run") == 0

    def resume(data):
        step = torch.load("run/checkpoint.pt")["step"] + 1
        capsys.readouterr()
        assert call(dcgan, "--out", "run", "--resume", "--steps", step, "--data", data) == 0
        return capsys.readouterr().out

    assert told not in resume("mine")
    shutil.copytree("mine", "moved/deep")  # as from a backup, with other times
    for i, file in enumerate(tmp_path.glob("moved/deep/*/*.png")):
        os.utime(file, (i, i))
    assert told not in resume("moved/deep")
    Image.new("RGB", (20, 20), (0, 9, 9)).save("moved/deep/a/more.png")
    assert f"moved/deep {told}" in resume("moved/deep")  # a photo more
    assert told not in resume("moved/deep")  # it is this run's now
    os.rename("moved/deep/a/more.png", "moved/deep/b/0.png")  # the last of a, the first of b
    assert resume("moved/deep").count(told) == 1  # another label, although the order is the same
    Image.new("RGB", (20, 20), (0, 0, 99)).save("moved/deep/b/0.png")
    assert resume("moved/deep").count(told) == 1  # a photo changed


def test_resume_takes_epochs_for_a_run_that_was_made_with_steps_and_steps_for_epochs(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for made, flags, step in [(["--steps", 1], ["--epochs", 3 * 4 / 2560], 3),
                              (["--epochs", 2 * 4 / 2560], ["--steps", 4], 4),
                              (["--epochs", 2 * 4 / 2560], ["--epochs", 5 * 4 / 2560], 5)]:
        out = f"run-{step}"
        assert call(dcgan, *made, *SMALL, "--out", out) == 0
        assert call(dcgan, "--resume", *flags, "--out", out) == 0
        assert torch.load(f"{out}/checkpoint.pt")["step"] == step


def test_a_run_keeps_its_number_of_steps_when_its_batch_or_its_data_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "sample_batch", die)
        assert forked(dcgan, "--epochs", 3 * 4 / 2560, *SMALL, "--out", "cut") == -signal.SIGKILL
    assert call(dcgan, "--resume", "--batch", 8, "--out", "cut") == 0
    assert torch.load("cut/checkpoint.pt")["step"] == 3


def test_what_a_run_leaves(tmp_path, monkeypatch):
    """A row and a picture after every 1 % of the run, and a picture before it; every fourth picture
    is in the animation.
    """
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 105, *SMALL, "--out", "run") == 0
    run = tmp_path / "run"
    rows = [line.split(",") for line in (run / "losses.csv").read_text().splitlines()]
    assert rows[0] == ["step", "loss_D", "loss_G", "D(x)", "D(G(z))", "spread"]
    assert [int(row[0]) for row in rows[1:]] == [*range(2, 105, 2), 105]
    pictures = sorted((run / "samples").iterdir())
    assert [int(path.stem) for path in pictures] == [*range(0, 105, 2), 105]
    for path in [run / "real.png", *pictures]:
        assert Image.open(path).size == (8 * 18 + 2, 8 * 18 + 2)  # two pixels between
    frames = list(ImageSequence.Iterator(Image.open(run / "training.gif")))
    assert len(frames) == len(pictures[:-1:4]) + 1
    panels = len(rows[0]) - 1  # none for the step
    assert Image.open(run / "curves.png").size == (640, 120 * panels + 15)
    losses = np.loadtxt(run / "losses.csv", delimiter=",", skiprows=1)
    saved = torch.load(run / "checkpoint.pt")["rows"]
    assert losses == pytest.approx(np.array([list(row.values()) for row in saved]), rel=1e-6)


def run_by_hand(tmp_path, n, seed=0, spread=0.5, **others):
    """steps() around a network that never changes; each step notes its number and a random one."""
    args = Namespace(out=f"{tmp_path}/run", batch=2, steps=n, device=torch.device("cpu"), seed=seed,
                     checkpoint={}, resume=False, generate=None)
    images = torch.randint(256, (64, 1, 4, 4), dtype=torch.uint8)
    data = dcgan.Data(images, torch.zeros(64, 0, dtype=torch.uint8), [])
    G = torch.nn.BatchNorm1d(2)

    def draw(n):
        assert not G.training and not torch.is_grad_enabled()
        return spread * (2 * torch.rand(n, 1, 4, 4) - 1)  # the images have a spread of 1

    for i, log in enumerate(dcgan.steps(args, data, draw, {"G": G}, **others), 1):
        assert G.training and torch.is_grad_enabled()
        log["number"] = torch.tensor(float(i), requires_grad=True)
        log["random"] = torch.rand(())
    return torch.load(f"{tmp_path}/run/checkpoint.pt")["rows"]


def test_a_row_is_the_mean_of_all_steps_since_the_last(tmp_path):
    rows = run_by_hand(tmp_path, 105, measure=lambda: {"more": 5})
    assert [row["step"] for row in rows] == [*range(2, 105, 2), 105]
    assert [row["number"] for row in rows] == [*np.arange(1.5, 105, 2), 105]
    assert all(list(row) == ["step", "number", "random", "spread", "more"] for row in rows)
    assert all(row["more"] == 5 and 0.4 < row["spread"] < 0.6 for row in rows)


def test_each_step_and_each_seed_has_random_numbers_of_its_own(tmp_path):
    rows = run_by_hand(tmp_path, 5) + run_by_hand(tmp_path / "other", 5, seed=1)
    assert len({row["random"] for row in rows}) == 10


def test_every_picture_shows_the_same_z(tmp_path):
    """draw() gives the same random numbers every time; a script's own grid() is shown instead."""
    run_by_hand(tmp_path, 3)
    pictures = {path.read_bytes() for path in (tmp_path / "run" / "samples").iterdir()}
    assert len(pictures) == 1
    run_by_hand(tmp_path / "other", 1, grid=lambda: torch.zeros(2, 3, 1, 4, 4))
    picture = Image.open(tmp_path / "other" / "run" / "samples" / "000001.png")
    assert picture.size == (3 * 6 + 2, 2 * 6 + 2)


def recorded(tmp_path, row, picture=None, last=False):
    """One call of record(), for a run of nothing with this one row."""
    (tmp_path / "samples").mkdir(exist_ok=True)
    data = dcgan.Data(torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, 0), [])
    picture = torch.zeros(1, 2, 3, 16, 16) if picture is None else picture
    dcgan.record(Namespace(out=str(tmp_path)), data, {}, [row], row["step"], picture, last)


def test_pictures_keep_their_brightness(tmp_path):
    """The range is fixed: a dim picture stays dim whatever its neighbours are."""
    recorded(tmp_path, {"step": 100, "spread": 1.0}, torch.full((1, 2, 3, 16, 16), -0.5))
    picture = Image.open(tmp_path / "samples" / "000100.png")
    assert picture.getpixel((5, 5)) == (64, 64, 64) and picture.size == (38, 20)


def test_a_smaller_learning_rate_is_advised_only_after_finite_rows(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    data = dcgan.Data(torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, 0), [])
    good, bad = {"step": 1, "loss_D": 1.0}, {"step": 2, "loss_D": float("nan")}
    for rows, advised in [([bad], 0), ([good, bad], 1)]:
        with pytest.raises(SystemExit):
            dcgan.record(Namespace(out=str(tmp_path)), data, {}, rows, 2, None, last=False)
        error = capsys.readouterr().err
        assert "not finite" in error and error.count("a smaller --lr may help") == advised


def test_the_curves_have_a_panel_for_each_column_but_the_step():
    panels = np.asarray(dcgan.draw_curves(["step", "a", "b"], np.array([[2, 4], [0, 1], [1, 0]])))
    assert panels.shape == (255, 640, 3)  # two panels of 120, and a line for the steps
    ink = (panels == (0, 0, 128)).all(2)  # navy: a rises, b falls
    assert ink[100:116, :20].any() and ink[24:40, -20:].any()
    assert ink[144:160, :20].any() and ink[220:236, -20:].any()


def test_the_animation_is_small(tmp_path):
    recorded(tmp_path, {"step": 9, "spread": 1.0}, torch.zeros(8, 8, 3, 128, 128), last=True)
    assert Image.open(tmp_path / "training.gif").size == (261, 261)  # a quarter of 1042


def test_collapse_is_told(capsys, tmp_path):
    for n, spread, told in [(499, 0.05, 0), (500, 0.5, 0), (504, 0.05, 1)]:
        run_by_hand(tmp_path / f"{n}", n, spread=spread)
        assert capsys.readouterr().out.count("MODE COLLAPSE") == told


def test_batches_are_uniform_with_replacement_and_labels_go_with_their_images():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    data = dcgan.Data(images, images.view(10, 1) % 2, ["odd"])
    torch.manual_seed(0)
    x, y = dcgan.sample_batch(data, 20_000, torch.device("cpu"))
    assert x.dtype == y.dtype == torch.float32 and x.min() == -1
    index = ((x + 1) * 127.5).round().long().flatten()
    assert torch.equal(index % 2, y.long().flatten())
    counts = index.bincount(minlength=10)
    assert counts.min() > 1800 and counts.max() < 2200


def test_one_seed_repeats_a_run_and_another_gives_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert call(dcgan, "--steps", 2, *SMALL, "--seed", seed, "--out", out) == 0
    a, b, c = (torch.load(f"{out}/checkpoint.pt")["state"] for out in "abc")
    assert_same(a, b)
    assert not torch.equal(a["G"]["1.weight"], c["G"]["1.weight"])


def test_epochs_mean_epochs_times_images_by_batch_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--epochs", 0.01, *SMALL, "--out", "run") == 0
    assert torch.load("run/checkpoint.pt")["step"] == round(0.01 * 2560 / 4)


def test_generate_draws_as_many_as_it_is_told_and_no_image_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    assert call(dcgan, "--generate", 130, "--out", "run") == 0
    images = sorted((tmp_path / "run" / "generated").iterdir())
    assert [image.stem for image in images] == [f"{i:05}" for i in range(130)]
    assert len({image.read_bytes() for image in images}) == 130


def test_a_checkpoint_holds_a_sample_of_the_data_not_all_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(dcgan, "--steps", 1, *SMALL, "--out", "run") == 0
    images, labels, names, digest = torch.load("run/checkpoint.pt")["data"]
    assert images.shape == (64, 3, 16, 16) and labels.shape == (2560, 5) and len(names) == 5
    assert digest == dcgan.load_images("cartoon", 16, DATA).digest
    assert images.untyped_storage().nbytes() == images.nbytes
