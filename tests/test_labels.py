"""--generate N --labels A,B of cgan.py and acgan.py: what is drawn, and where it is told."""

import pytest
import torch
from conftest import DATA, HERE, call, cartoons, load

TINY = ["--size", 16, "--batch", 8, "--device", "cpu"]
KINDS = ["a/b, c", "dog", "cat"]  # as a class of Fashion-MNIST is called "T-shirt/top"


@pytest.fixture(params=["cgan", "acgan"])
def module(request):
    return load(HERE / f"{request.param}.py")


@pytest.fixture
def given(module, monkeypatch):
    """The labels that G gets, a tensor for each call."""
    seen, forward = [], module.Generator.forward
    monkeypatch.setattr(module.Generator, "forward", lambda self, z, y: (
        seen.append(y), forward(self, z, y))[1])
    return seen


def classes(module, monkeypatch):
    """Data of three classes in place of any other."""
    data = cartoons(module, 70, 16)
    labels = torch.eye(3, dtype=torch.uint8)[torch.arange(70) % 3]
    data = module.Data(data.images, labels, KINDS)
    monkeypatch.setattr(module, "load_images", lambda *args: data)


@pytest.mark.parametrize(("flags", "drawn"), [
    ([], [0, 1, 2]), (["--labels", "cat, dog"], [2, 1]), (["--labels", "a/b, c"], [0])])
def test_each_class_gets_a_folder_with_n_images(
        module, given, tmp_path, monkeypatch, capsys, flags, drawn):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        classes(module, patch)
        assert call(module, *TINY, "--steps", 1, "--out", "run") == 0
        given.clear()
        assert call(module, "--out", "run", "--generate", 66, *flags) == 0
    asked = torch.cat(given)[: 66 * len(drawn)]  # acgan draws labels.png after them
    assert torch.equal(asked, torch.eye(3)[drawn].repeat_interleave(66, 0))
    folders = [KINDS[k].replace("/", "-") for k in drawn]
    found = {str(path.relative_to("run/generated")) for path in
             (tmp_path / "run" / "generated").relative_to(tmp_path).rglob("*.png")}
    assert found == {f"{folder}/{i:05}.png" for folder in folders for i in range(66)}
    again = module.load_images("run/generated", 16, tmp_path / "data")  # it is a labelled set
    assert again.names == sorted(folders) and len(again.images) == len(found)
    with monkeypatch.context() as patch:
        classes(module, patch)
        assert call(module, "--out", "run", "--generate", 1, "--labels=-cat") == 2
    assert "without a minus" in capsys.readouterr().err


def test_named_attributes_are_as_asked_and_the_others_as_in_real_images(
        module, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(module, *TINY, "--root", DATA, "--steps", 1, "--out", "run") == 0
    names = cartoons(module, 2, 16).names
    smiling, blond = names.index("Smiling"), names.index("Blond_Hair")
    for flags, fixed in [(["--labels", "Smiling,-Blond_Hair"], {smiling: 1, blond: 0}), ([], {})]:
        given.clear()
        assert call(module, "--out", "run", "--generate", 70, *flags) == 0
        y = torch.cat(given)[:70]
        for k in range(5):
            assert set(y[:, k].tolist()) == ({fixed[k]} if k in fixed else {0, 1})
        rows, told = module.read_table("run/generated/labels.csv")
        assert told == names and sorted(rows) == list(range(70))
        assert y.int().tolist() == [list(rows[i]) for i in range(70)]
        assert len(list((tmp_path / "run" / "generated").glob("*.png"))) == 70


def test_a_label_that_is_not_there_is_one_line(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(module, *TINY, "--root", DATA, "--steps", 1, "--out", "run") == 0
    capsys.readouterr()
    assert call(module, "--out", "run", "--generate", 2, "--labels", "Smiling,Sad") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "there is no label Sad, but Blond_Hair, Eyeglasses" in error


def test_labels_that_nothing_would_draw_are_refused(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "--root", DATA, "--steps", 1]
    calls = [[*tiny, "--labels", "Smiling"]]  # in training
    if module.__name__ == "cgan":
        assert call(module, *tiny, "--no-labels", "--out", "gan") == 0
        calls.append(["--out", "gan", "--generate", 2, "--labels", "Smiling"])
    for flags in calls:
        capsys.readouterr()
        assert call(module, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--labels is for --generate" in error
    assert not (tmp_path / "runs").exists()


def test_a_picture_of_many_classes_has_sixteen_columns(module):
    labels = torch.eye(40, dtype=torch.uint8)
    data = module.Data(torch.zeros(40, 1, 16, 16).byte(), labels, [str(i) for i in range(40)])
    size = [8] if module.SCRIPT == "acgan" else []
    G = module.Generator(1, 16, *size, 40).eval()
    assert module.label_grid(G, torch.randn(2, module.Z), data).shape[:2] == (2, 16)


@pytest.mark.parametrize("script", ["cgan", "ebgan"])
def test_a_batch_of_one_is_refused_where_images_are_compared(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--batch", 1, "--size", 16, "--root", DATA, "--steps", 1]
    assert call(load(HERE / f"{script}.py"), *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--batch 1: " in error and not (tmp_path / "runs").exists()
