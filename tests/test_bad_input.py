"""A user's mistake: one line on stderr, exit status 2, nothing changed on the disk."""

import shlex
import shutil
import urllib.error

import pytest
import torch
from conftest import DATA, HERE, call, load, shell, tree
from PIL import Image

dcgan = load(HERE / "dcgan.py")  # this part is the same text in every script
TINY = ["--size", 16, "--batch", 8, "--width", 8, "--device", "cpu", "--root", DATA]


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    """A folder with the things that the table below names, and a finished run in old."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "words", "broken", "few", "pets/train/cat",
                   "foreign", "earlier", "list", "hollow", "cut", "noise"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "words" / "a.txt").write_text("no image")
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    (tmp_path / "file").write_text("a file")
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / "few" / f"{i}.png")
    shutil.copy(tmp_path / "few" / "0.png", tmp_path / "pets" / "train" / "cat")
    assert call(dcgan, *TINY, "--steps", 1, "--out", "old") == 0
    saved = torch.load(tmp_path / "old" / "checkpoint.pt")
    torch.save({**saved, "script": "other"}, tmp_path / "foreign" / "checkpoint.pt")
    torch.save({"form": "dcgan 2"}, tmp_path / "earlier" / "checkpoint.pt")
    torch.save([1, 2], tmp_path / "list" / "checkpoint.pt")
    whole = (tmp_path / "old" / "checkpoint.pt").read_bytes()
    for folder, content in [("hollow", b""), ("cut", whole[:-1000]), ("noise", b"noise")]:
        (tmp_path / folder / "checkpoint.pt").write_bytes(content)
    capsys.readouterr()
    return tmp_path


TABLE = [
    ("--data nothing", "'nothing' is neither a folder nor one of cartoon, mnist"),
    ("--data no/such/folder", "'no/such/folder' is neither a folder"),
    ("--data ''", "'' is neither a folder"),  # and not everything below the current folder
    ("--data 'a\rb'", r"'a\rb' is neither a folder"),
    ("--data file", "'file' is neither a folder"),
    ("--data empty", "empty: "),
    ("--data words", "words: "),
    ("--data broken", "broken: "),
    ("--data pets", "the images are one folder deeper; give pets/train"),
    ("--data celeba --root empty", "no img_align_celeba with images below empty"),
    ("--size 33", "argument --size: invalid choice"),
    ("--size 8", "argument --size: invalid choice"),
    ("--size big", "argument --size: invalid int value"),
    ("--batch 2.5", "argument --batch: invalid int value"),
    ("--lr fast", "argument --lr: invalid float value"),
    ("--batch", "argument --batch: expected one argument"),
    ("--colour red", "unrecognized arguments: --colour red"),
    ("--stepss 3", "unrecognized arguments: --stepss 3"),
    ("--step 3", "unrecognized arguments: --step 3"),  # no guesses
    ("extra", "unrecognized arguments: extra"),
    ("--out file --steps 1", "file"),
    ("--out old", "old holds a run already"),
    ("--device gpu", "argument --device: invalid choice: 'gpu' (choose from"),
    ("--resume", "runs/dcgan-cartoon/checkpoint.pt: [Errno 2] No such file or directory"),
    ("--generate 4", "runs/dcgan-cartoon/checkpoint.pt: [Errno 2] No such file or directory"),
    ("--resume --out empty", "empty/checkpoint.pt"),
    ("--resume --out hollow", "hollow/checkpoint.pt: "),
    ("--resume --out cut", "cut/checkpoint.pt: "),
    ("--resume --out noise", "noise/checkpoint.pt: "),
    ("--generate 4 --out list", "list/checkpoint.pt: "),
    ("--resume --out foreign", "foreign is a run of another script, or of an earlier version"),
    ("--generate 4 --out earlier", "earlier is a run of another script, or of an earlier version"),
    ("--resume --out old", "this run has made its 1 steps; for more, give "),
]


def test_a_mistake_is_one_line_status_two_and_changes_nothing(desk, capsys):
    before, wrong = tree(desk), []
    for flags, expected in TABLE:
        shared = [] if "--root" in flags or "old" in flags else ["--root", DATA]
        status = call(dcgan, *shlex.split(flags), *shared)
        error = capsys.readouterr().err
        if (status != 2 or not error.startswith("dcgan.py: ") or error.count("\n") != 1
                or expected not in error):
            wrong.append((flags, status, error))
        if tree(desk) != before:
            wrong.append((flags, "changed", set(tree(desk)) ^ set(before)))
            before = tree(desk)
    assert not wrong


NUMBERS = ("steps", "generate", "epochs", "batch", "lr", "width", "clip", "critic_steps", "g_steps",
           "init_std", "margin")


def test_a_number_that_must_be_above_0_is_and_is_finite(module, alone, capsys):
    """Otherwise: one line that names the flag, and nothing changes on the disk."""
    wrong, before = [], tree(alone)
    settings = vars(module.parse_arguments([]))
    for name in NUMBERS:
        flag = "--" + name.replace("_", "-")
        if name not in settings or (name == "generate" and "colorize" in module.__doc__):
            continue
        for value in ("0", "-1", "nan", "inf"):
            capsys.readouterr()
            status = call(module, flag, value, "--root", DATA)
            error = capsys.readouterr().err
            if status != 2 or error.count("\n") != 1 or flag not in error:
                wrong.append((flag, value, status, error))
    assert not wrong and tree(alone) == before


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "damaged"])
def test_a_set_that_is_not_there_without_a_network_is_one_line(name, tmp_path, capsys, monkeypatch):
    def urlopen(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.chdir(tmp_path)
    if name == "damaged":  # files that were not unpacked to their ends
        name, raw = "mnist", tmp_path / "data" / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            (raw / f"{part}-images-idx3-ubyte").touch()
            (raw / f"{part}-labels-idx1-ubyte").touch()
    assert call(dcgan, "--data", name) == 2
    error = capsys.readouterr().err
    assert f"{name} is missing in data, or damaged (delete it); no download: " in error
    assert error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_message_keeps_what_follows_a_line_break(capsys):
    with pytest.raises(SystemExit) as end:
        dcgan.user_error("one\ntwo\r\n  three\r")
    assert end.value.code == 2 and capsys.readouterr().err == "dcgan.py: one two three\n"


def test_a_mistake_from_the_shell_shows_no_traceback_and_no_usage(tmp_path):
    shutil.copy(HERE / "dcgan.py", tmp_path)
    done = shell("dcgan.py", "--data", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dcgan.py"]
