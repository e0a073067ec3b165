"""Wrong input of any kind: one line on stderr, exit status 2, nothing changed on the disk."""

import shutil

import pytest
import torch
from conftest import DATA, HERE, call, load, shell, tree
from PIL import Image

dcgan = load(HERE / "dcgan.py")  # this part is the same text in every script
TINY = ["--size", 16, "--batch", 8, "--width", 8, "--device", "cpu", "--root", DATA]


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    """A folder with the things that the table below names, and a finished run in runs/old."""
    monkeypatch.chdir(alone := tmp_path)
    (alone / "empty").mkdir()
    (alone / "words").mkdir()
    (alone / "words" / "a.txt").write_text("no image")
    (alone / "broken").mkdir()
    (alone / "broken" / "a.png").write_bytes(b"no image")
    (alone / "file").write_text("a file")
    (alone / "few").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(alone / "few" / f"{i}.png")
    (alone / "celeba" / "img_align_celeba").mkdir(parents=True)
    Image.new("RGB", (178, 218)).save(alone / "celeba" / "img_align_celeba" / "000001.jpg")
    assert call(dcgan, *TINY, "--steps", 1, "--out", "old") == 0
    whole = (alone / "old" / "checkpoint.pt").read_bytes()
    for name, content in [("cut", whole[: len(whole) // 2]), ("text", b"hello"), ("void", b"")]:
        (alone / name).mkdir()
        (alone / name / "checkpoint.pt").write_bytes(content)
    saved = torch.load(alone / "old" / "checkpoint.pt")
    (alone / "foreign").mkdir()
    torch.save({**saved, "form": "other 2"}, alone / "foreign" / "checkpoint.pt")
    (alone / "misfit").mkdir()
    saved["parts"]["G"] = {"nothing": torch.zeros(1)}
    torch.save(saved, alone / "misfit" / "checkpoint.pt")
    (alone / "strange").mkdir()
    torch.save([1, 2], alone / "strange" / "checkpoint.pt")
    capsys.readouterr()
    return alone


TABLE = [
    ("--data nothing", "or a folder of images, or one of cartoon, mnist"),
    ("--data no/such/folder", "no/such/folder: FileNotFound"),
    ("--data empty", "empty"),
    ("--data words", "words"),
    ("--data broken", "broken"),
    ("--data file", "Not a directory"),
    ("--data celeba --root .", "list_attr_celeba.txt"),
    ("--data lsun_church --root empty", "church_outdoor_train_lmdb"),
    ("--size 33", "--size"),
    ("--size 8", "--size"),
    ("--size -64", "--size"),
    ("--size big", "--size"),
    ("--batch 1", "--batch"),
    ("--batch 0", "--batch"),
    ("--batch -4", "--batch"),
    ("--batch 2.5", "--batch"),
    ("--epochs -1", "--epochs"),
    ("--epochs 0", "--epochs"),
    ("--epochs nan", "--epochs"),
    ("--steps 0", "--steps"),
    ("--steps -3", "--steps"),
    ("--lr -0.1", "--lr"),
    ("--lr 0", "--lr"),
    ("--lr inf", "--lr"),
    ("--lr fast", "--lr"),
    ("--seed -1", "--seed"),
    ("--device tpu", "--device tpu"),
    ("--device cuda:99", "--device cuda:99"),
    ("--colour red", "--colour"),
    ("--batch", "--batch"),
    ("extra", "extra"),
    ("--out file --steps 1", "file"),
    ("--out old", "old holds a run already"),
    ("--resume", "checkpoint.pt cannot be read"),
    ("--generate 4", "checkpoint.pt cannot be read"),
    ("--generate 0 --out old", "--generate"),
    ("--generate -1 --out old", "--generate"),
    ("--resume --out empty", "empty/checkpoint.pt cannot be read"),
    ("--resume --out cut", "cut/checkpoint.pt cannot be read"),
    ("--resume --out text", "text/checkpoint.pt cannot be read"),
    ("--resume --out void", "void/checkpoint.pt cannot be read"),
    ("--resume --out strange", "strange is a run of another script"),
    ("--generate 4 --out cut", "cut/checkpoint.pt cannot be read"),
    ("--resume --out foreign", "foreign is a run of another script"),
    ("--resume --out misfit --steps 2", "does not fit"),
    ("--resume --out old --steps 2 --size 128", "this run has --size"),
    ("--resume --out old --steps 2 --seed 3", "this run has --seed 0"),
    ("--resume --out old --steps 2 --data few", "not the images"),
    ("--resume --out old --steps 1", "--steps"),
]


def test_one_line_status_two_nothing_written(desk, capsys):
    before, wrong = tree(desk), []
    for flags, expected in TABLE:
        shared = [] if "--root" in flags or "old" in flags else ["--root", DATA]
        status = call(dcgan, *flags.split(), *shared)
        error = capsys.readouterr().err
        shown = error.removeprefix("dcgan.py: ")
        if status != 2 or error.count("\n") != 1 or expected not in shown or error == shown:
            wrong.append((flags, status, error))
        if tree(desk) != before:
            wrong.append((flags, "changed", set(tree(desk)) ^ set(before)))
            before = tree(desk)
    assert not wrong


def test_from_the_shell(tmp_path):
    """The same in a process of its own: no traceback, no usage."""
    shutil.copy(HERE / "dcgan.py", tmp_path)
    done = shell("dcgan.py", "--data", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dcgan.py"]
