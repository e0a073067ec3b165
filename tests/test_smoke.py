"""Each script, alone in an empty folder: one step, one more with --resume, a few images."""

import sys

import pytest
from conftest import HERE, call, load, shell, tree
from PIL import Image


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_one_step_then_one_more_with_resume_then_three_images(module, script, alone, tiny, device):
    run = alone / "runs" / f"{script}-cartoon"
    name, gpu = alone / f"{script}.py", device == "cuda"

    def again(*args):
        args = [*args, "--device", device]
        return shell(name, *args, gpu=True).returncode if gpu else call(module, *args)

    seed = "--seed", 10**30  # as long as anyone likes
    first = shell(name, "--steps", 1, *tiny, *seed, "--device", device, gpu=gpu)
    assert first.returncode == 0, first.stderr
    expected = {"real.png", "training.gif", "losses.csv", "curves.png", "checkpoint.pt"}
    expected |= {"samples/000000.png", "samples/000001.png"}  # the first is of the untrained G
    assert files(run) == expected
    assert {path.name for path in alone.iterdir()} == {f"{script}.py", "runs"}

    assert again("--resume", "--steps", 2) == 0
    assert files(run) == expected | {"samples/000002.png"}
    lines = (run / "losses.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2"]

    assert again("--generate", 3) == 0
    images = sorted((run / "generated").glob("*.png"))  # some write labels.csv beside them
    assert [image.name for image in images] == ["00000.png", "00001.png", "00002.png"]
    assert Image.open(images[0]).size == (int(tiny[1]),) * 2


def test_generate_needs_no_data_and_removes_the_images_of_an_earlier_call(
        script, alone, module, tiny):
    out = alone / "runs" / f"{script}-mine"
    for i in range(80):
        folder = alone / "mine" / "ab"[i % 2]  # two classes: some scripts need labels
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (3 * i, 255 - 3 * i, 100)).save(folder / f"{i}.png")
    assert call(module, "--data", "mine", "--steps", 1, *tiny) == 0
    (alone / "mine").rename(alone / "gone")
    for n in (5, 2):
        assert call(module, "--out", out, "--generate", n) == 0
        images = list((out / "generated").rglob("*.png"))
        folders = {image.parent for image in images}  # some scripts have one for each class
        assert len(images) == n * len(folders) and len(folders) in (1, 2)


def test_importing_a_script_does_nothing(script, alone, capfd):
    before = tree(alone)
    sys.dont_write_bytecode = True
    module = load(HERE / f"{script}.py")
    assert module.main and tree(alone) == before
    assert capfd.readouterr() == ("", "")


def test_help_names_every_flag(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and module.__doc__.splitlines()[0] in text
    for flag in "data root size epochs steps batch lr seed device out resume generate".split():
        assert f"--{flag}" in text
