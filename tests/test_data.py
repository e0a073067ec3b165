"""Every data set in its real layout, made up and tiny; folders of anything; the prepared tensor."""

import gzip
import hashlib
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import DATA, HERE, load
from PIL import Image

dcgan = load(HERE / "dcgan.py")
rng = np.random.default_rng(0)


def picture(w=40, h=30, mode="RGB"):
    """Smooth, so that scaling and JPEG change it little."""
    corners = rng.integers(0, 256, (2, 2, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    small = Image.fromarray(corners if mode != "L" else corners[:, :, 0], mode=None)
    return small.resize((w, h), Image.Resampling.BICUBIC)


# --- cartoon --------------------------------------------------------------------------------------


def test_cartoon_is_deterministic_and_fits_its_labels(tmp_path):
    a, b = (dcgan.load_images("cartoon", 16, root) for root in (tmp_path, DATA))
    assert a.images.shape == (2560, 3, 16, 16) and a.images.dtype == torch.uint8
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert len(a.names) == 5 and 0.4 < a.labels.float().mean() < 0.6
    test = dcgan.load_images("cartoon", 16, tmp_path, split="test")
    assert not torch.equal(a.labels, test.labels)
    larger = dcgan.load_images("cartoon", 32, DATA)
    assert torch.equal(a.labels, larger.labels)  # the same faces at another size
    close = torch.nn.functional.avg_pool2d(larger.images.float(), 2) - a.images
    assert close.abs().mean() < 6


def test_every_cartoon_attribute_can_be_seen():
    """A linear reading of the pixels tells each attribute on faces it has not seen."""
    train, test = (dcgan.load_images("cartoon", 32, DATA, split) for split in ("train", "test"))
    x, unseen = (torch.nn.functional.avg_pool2d(data.images / 255 - 0.5, 2).flatten(1)
                 for data in (train, test))
    gram = x.T @ x + 5 * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ (2 * train.labels.float() - 1))
    right = ((unseen @ weights > 0) == test.labels.bool()).float().mean(0)
    assert right.min() > 0.8, dict(zip(test.names, right.tolist(), strict=True))


# --- torchvision's own sets -----------------------------------------------------------------------


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())
    Path(f"{path}.gz").write_bytes(gzip.compress(header + array.tobytes()))


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_idx_files(tmp_path, name, folder):
    digits = rng.integers(0, 256, (6, 28, 28), np.uint8)
    classes = np.array([3, 1, 4, 1, 5, 9], np.uint8)
    raw = tmp_path / folder / "raw"
    for part, rows in [("train", slice(None)), ("t10k", slice(4))]:
        write_idx(raw / f"{part}-images-idx3-ubyte", digits[rows])
        write_idx(raw / f"{part}-labels-idx1-ubyte", classes[rows])
    at32 = dcgan.load_images(name, 32, tmp_path)
    assert at32.images.shape == (6, 1, 32, 32) and at32.labels.shape == (6, 10)
    order = [next(i for i in range(6) if np.array_equal(image[0, 2:-2, 2:-2], digits[i]))
             for image in at32.images.numpy()]  # a border, not a blur
    assert sorted(order) == list(range(6)) and not at32.images[:, :, :2].any()
    assert at32.labels.argmax(1).tolist() == classes[order].tolist()
    assert (at32.labels.sum(1) == 1).all()
    at28 = dcgan.load_images(name, 28, tmp_path)
    assert np.array_equal(at28.images[:, 0], digits[order])
    assert len(dcgan.load_images(name, 32, tmp_path, split="test").images) == 4


def test_damaged_digits_are_told(tmp_path, capsys):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{part}-ubyte").write_bytes(struct.pack(">iiii", 2051, 60_000, 28, 28) + b"cut")
    assert "an undamaged copy" in refused(capsys, "mnist", 28, tmp_path)


def test_cifar10_pickles(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = rng.integers(0, 256, (12, 3, 32, 32), np.uint8)
    classes = [int(c) for c in rng.integers(0, 10, 12)]
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        rows = slice(2 * i, 2 * i + 2)
        content = {"data": pixels[rows].reshape(2, -1), "labels": classes[rows]}
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": list("abcdefghij")}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    kind = torchvision.datasets.CIFAR10
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(kind, "test_list", [[names[5], sums[names[5]]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    data = dcgan.load_images("cifar10", 32, tmp_path)
    order = [next(i for i in range(10) if np.array_equal(image, pixels[i]))
             for image in data.images]
    assert sorted(order) == list(range(10)) and data.names == meta["label_names"]
    assert data.labels.argmax(1).tolist() == [classes[i] for i in order]
    assert dcgan.load_images("cifar10", 64, tmp_path).images.shape == (10, 3, 64, 64)
    test = dcgan.load_images("cifar10", 32, tmp_path, split="test").images
    assert {image.numpy().tobytes() for image in test} == {image.tobytes() for image in pixels[10:]}


# --- CelebA ---------------------------------------------------------------------------------------

ATTRIBUTES = ["Bald", "Smiling", "Young"]


def make_celeba(root, faces, table, n=8, rows=None):
    """n faces, green inside the centred 128x128 and red around it; n rows of attributes."""
    (root / faces).mkdir(parents=True)
    for i in range(1, n + 1):
        face = Image.new("RGB", (178, 218), (255, 0, 0))
        face.paste((0, 20 * i, 0), (25, 45, 153, 173))
        face.save(root / faces / f"{i:06}.jpg", quality=100, subsampling=0)
    values = [[1 if (i >> bit) & 1 else -1 for bit in range(3)] for i in range(1, n + 1)]
    if table.endswith(".csv"):
        lines = ["image_id," + ",".join(ATTRIBUTES)]
        lines += [f"{i:06}.jpg," + ",".join(map(str, row)) for i, row in enumerate(values, 1)]
    else:
        lines = [str(n), " ".join(ATTRIBUTES) + " "]
        lines += [f"{i:06}.jpg " + "  ".join(map(str, row)) for i, row in enumerate(values, 1)]
    (root / table).parent.mkdir(parents=True, exist_ok=True)
    (root / table).write_text("\n".join(lines if rows is None else lines[:rows]) + "\n")


@pytest.mark.parametrize(
    "faces, table",
    [
        ("celeba/img_align_celeba", "celeba/list_attr_celeba.txt"),  # torchvision's
        ("img_align_celeba/img_align_celeba", "list_attr_celeba.csv"),  # Kaggle's, nested
        ("celeba/img_align_celeba/img_align_celeba", "celeba/list_attr_celeba.csv"),
        ("img_align_celeba", "list_attr_celeba.txt"),  # --root is the folder itself
        ("CelebA/Img/img_align_celeba", "CelebA/Anno/list_attr_celeba.txt"),  # the authors'
    ],
)
def test_celeba_layouts(tmp_path, faces, table):
    make_celeba(tmp_path, faces, table)
    data = dcgan.load_images("celeba", 64, tmp_path)
    assert data.images.shape == (8, 3, 64, 64) and data.names == ATTRIBUTES
    assert data.images[:, 0].max() < 30  # no red: the crop is exactly the centred 128x128
    greens = (data.images[:, 1].float().mean((1, 2)) / 20).round().long()
    assert sorted(greens.tolist()) == list(range(1, 9))
    assert data.labels.tolist() == [[i & 1, i >> 1 & 1, i >> 2 & 1] for i in greens.tolist()]


def refused(capsys, *args, **options):
    """What load_images() says when it refuses: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        dcgan.load_images(*args, **options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    return error


def test_celeba_that_is_not_complete(tmp_path, capsys):
    error = refused(capsys, "celeba", 64, tmp_path / "nothing")
    assert all(x in error for x in ("img_align_celeba.zip", "list_attr_celeba.txt", "mmlab"))
    make_celeba(tmp_path / "a", "img_align_celeba", "elsewhere.txt")
    assert "list_attr_celeba.txt" in refused(capsys, "celeba", 64, tmp_path / "a")
    make_celeba(tmp_path / "b", "img_align_celeba", "list_attr_celeba.csv", rows=7)
    assert "8 images in img_align_celeba, but 6 rows" in refused(
        capsys, "celeba", 64, tmp_path / "b")
    make_celeba(tmp_path / "c", "img_align_celeba", "list_attr_celeba.txt")
    table = tmp_path / "c" / "list_attr_celeba.txt"
    table.write_text(table.read_text().replace("000004.jpg -1", "000004.jpg"))
    assert "celeba" in refused(capsys, "celeba", 64, tmp_path / "c")
    table.write_text("")
    refused(capsys, "celeba", 64, tmp_path / "c")
    assert not list(tmp_path.rglob("prepared"))


def test_celeba_that_grows_is_prepared_again(tmp_path):
    for n in (4, 8):
        make_celeba(tmp_path / "celeba", f"{n}/img_align_celeba", f"{n}/list_attr_celeba.txt", n)
        assert len(dcgan.load_images("celeba", 64, tmp_path / "celeba").images) == n
        shutil.rmtree(tmp_path / "celeba" / str(n))


def test_celeba_test_part_is_the_official_one(tmp_path, monkeypatch):
    names = [f"{i:06}.jpg" for i in range(1, 202_600)]
    (tmp_path / "list_attr_celeba.csv").write_text(
        "image_id,Young\n" + "".join(f"{name},1\n" for name in names))
    monkeypatch.setattr(dcgan, "list_images", lambda folder: [
        f"{tmp_path}/img_align_celeba/{name}" for name in names])
    sizes = [len(dcgan.find_images("celeba", 64, tmp_path, part)[0]) for part in ("train", "test")]
    assert sizes == [182_637, 19_962]


# --- LSUN -----------------------------------------------------------------------------------------


def test_lsun_exported_folder(tmp_path, capsys):
    folder = tmp_path / "church_outdoor_train" / "a" / "b"
    folder.mkdir(parents=True)
    for i in range(3):
        picture().save(folder / f"{i}.webp")
    data = dcgan.load_images("lsun_church", 16, tmp_path)
    assert data.images.shape == (3, 3, 16, 16) and data.labels.shape == (3, 0)
    assert "church_outdoor_train_lmdb" in refused(
        capsys, "lsun_church", 16, tmp_path, split="test")


def test_lsun_database(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.chdir(tmp_path)  # torchvision leaves a list of keys in the current folder
    images = [picture() for _ in range(3)]
    base = lmdb.open(str(tmp_path / "church_outdoor_train_lmdb"))
    with base, base.begin(write=True) as tx:
        for i, image in enumerate(images):
            image.save(tmp_path / "one.png")
            tx.put(f"{i}".encode(), (tmp_path / "one.png").read_bytes())
    data = dcgan.load_images("lsun_church", 16, tmp_path)
    assert data.images.shape == (3, 3, 16, 16)


def test_lsun_database_without_lmdb_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "church_outdoor_train_lmdb").mkdir()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "lmdb" in refused(capsys, "lsun_church", 16, tmp_path)


# --- folders --------------------------------------------------------------------------------------


def test_folder_of_anything(tmp_path, capsys):
    """Types, modes and sizes in any mix, upper-case endings, sub-folders; the rest is left out."""
    folder = tmp_path / "mix"
    (folder / "deep" / "er").mkdir(parents=True)
    picture().save(folder / "a.JPG")
    picture(mode="L").save(folder / "b.png")
    picture().convert("P").save(folder / "c.gif")
    picture(mode="RGBA").save(folder / "d.webp")
    picture().convert("CMYK").save(folder / "deep" / "e.jpeg")
    picture(3000, 2000).save(folder / "deep" / "er" / "huge.jpg")
    picture(5, 7).save(folder / "deep" / "er" / "small.bmp")
    deep = rng.integers(0, 65536, (20, 20)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "sixteen.png")
    (folder / "copy.jpg").write_bytes((folder / "a.JPG").read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG not really")
    whole = (folder / "a.JPG").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not an image")
    data = dcgan.load_images(str(folder), 16, tmp_path / "data")
    text = capsys.readouterr().out
    assert data.images.shape == (8, 3, 16, 16)
    assert "1 copies, 2 unreadable" in text and "broken.png" in text or "truncated" in text
    assert data.names == ["deep"] and data.labels.sum() == 3


def test_sub_folders_are_the_classes(tmp_path):
    for i, name in enumerate(["cat", "cat", "dog"]):
        (tmp_path / "pets" / name / "x").mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / "pets" / name / "x" / f"{i}.png")
    data = dcgan.load_images(f"{tmp_path}/pets/", 16, tmp_path)
    assert data.names == ["cat", "dog"]
    assert sorted(data.labels.tolist()) == [[0, 1], [1, 0], [1, 0]]


def test_grey_folder_has_one_channel(tmp_path):
    (tmp_path / "grey").mkdir()
    for i, mode in enumerate(["L", "LA", "1"]):
        image = picture(mode="L").convert(mode)
        image.save(tmp_path / "grey" / f"{i}.png")
    data = dcgan.load_images(str(tmp_path / "grey"), 16, tmp_path)
    assert data.images.shape == (3, 1, 16, 16) and data.labels.shape == (3, 0)


def test_short_side_to_size_then_centre(tmp_path):
    (tmp_path / "wide").mkdir()
    image = Image.new("RGB", (64, 16), (255, 0, 0))
    image.paste((0, 0, 255), (24, 0, 40, 16))
    image.save(tmp_path / "wide" / "a.png")
    image.resize((32, 16)).save(tmp_path / "wide" / "b.png")
    data = dcgan.load_images(str(tmp_path / "wide"), 16, tmp_path)
    blue = (data.images == torch.tensor([0, 0, 255]).view(3, 1, 1)).all(1).float().mean((1, 2))
    assert blue.max() == 1 and blue.min() < 1


def test_open_image_is_upright_opaque_and_eight_bit(tmp_path):
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert dcgan.open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    deep = dcgan.open_image(tmp_path / "deep.png")
    assert deep.getpixel((0, 0)) == (127, 127, 127)
    lying = Image.new("RGB", (8, 4))
    exif = lying.getexif()
    exif[0x0112] = 6  # a camera held upright
    lying.save(tmp_path / "lying.jpg", exif=exif)
    assert dcgan.open_image(tmp_path / "lying.jpg").size == (4, 8)


# --- the prepared tensor --------------------------------------------------------------------------


def test_cache_is_read_and_notices_changes(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    folder.mkdir()
    for i in range(3):
        picture().save(folder / f"{i}.png")
    first = dcgan.load_images(str(folder), 16, tmp_path)
    prepared = sorted((tmp_path / "prepared").iterdir())
    assert len(prepared) == 1

    def fail(*args):
        raise AssertionError("prepared twice")

    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "open_image", fail)
        patch.setattr(dcgan, "save_file", fail)
        again = dcgan.load_images(str(folder), 16, tmp_path)
    assert torch.equal(first.images, again.images) and again.names == first.names
    picture().save(folder / "3.png")
    assert len(dcgan.load_images(str(folder), 16, tmp_path).images) == 4
    (folder / "0.png").unlink()
    assert len(dcgan.load_images(str(folder), 16, tmp_path).images) == 3
    assert sorted((tmp_path / "prepared").iterdir()) == prepared  # in place of the old one


def test_two_folders_of_one_name_do_not_mix(tmp_path):
    for parent, n in [("a", 2), ("b", 3)]:
        (tmp_path / parent / "train").mkdir(parents=True)
        for i in range(n):
            picture().save(tmp_path / parent / "train" / f"{i}.png")
    for parent, n in [("a", 2), ("b", 3), ("a", 2)]:
        assert len(dcgan.load_images(f"{tmp_path}/{parent}/train", 16, tmp_path).images) == n


def test_a_damaged_cache_is_told(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    for i in range(2):
        picture().save(tmp_path / "own" / f"{i}.png")
    dcgan.load_images(str(tmp_path / "own"), 16, tmp_path)
    cache = next((tmp_path / "prepared").iterdir())
    cache.write_bytes(cache.read_bytes()[:100])
    assert "cannot be read" in refused(capsys, str(tmp_path / "own"), 16, tmp_path)


def test_one_image_is_too_few(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    picture().save(tmp_path / "own" / "0.png")
    assert "1 images that can be used" in refused(capsys, str(tmp_path / "own"), 16, tmp_path)
    assert not list((tmp_path / "prepared").iterdir())


def test_the_order_is_random_and_always_the_same(tmp_path):
    """So the first 64 are a fair sample; and each image keeps its label."""
    for i in range(60):
        folder = tmp_path / "own" / "ab"[i // 30]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (4 * i, 255 * (i < 30), 0)).save(folder / f"{i:02}.png")
    data = dcgan.load_images(str(tmp_path / "own"), 16, tmp_path / "x")
    again = dcgan.load_images(str(tmp_path / "own"), 16, tmp_path / "y")
    assert torch.equal(data.images, again.images)
    numbers = data.images[:, 0, 0, 0] // 4
    assert numbers.tolist() != sorted(numbers.tolist()) and len(numbers.unique()) == 60
    assert torch.equal(data.labels[:, 0] == 1, numbers < 30)
    assert torch.equal(data.images[:, 1, 0, 0] == 255, numbers < 30)


def test_hidden_folders_runs_and_dangling_links_are_left_out(tmp_path, capsys):
    for place in (".thumbs", "__MACOSX", "cats", "runs/mine"):
        (tmp_path / "own" / place).mkdir(parents=True)
        for i in range(2):
            picture().save(tmp_path / "own" / place / f"{i}.png")
    (tmp_path / "own" / "runs" / "mine" / "checkpoint.pt").write_bytes(b"")
    (tmp_path / "own" / "gone.png").symlink_to("nowhere.png")
    picture().save(tmp_path / "own" / "stray.png")
    data = dcgan.load_images(str(tmp_path / "own"), 16, tmp_path)
    assert data.names == ["cats"] and len(data.images) == 3
    assert "labels: 1 sub-folders; 1 images are in none" in capsys.readouterr().out


def test_batches_of_data_without_labels():
    data = dcgan.Data(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, 0), [])
    x, y = dcgan.sample_batch(data, 3, torch.device("cpu"))
    assert x.shape == (3, 1, 2, 2) and y.shape == (3, 0) and x.dtype == y.dtype == torch.float32
    assert (x == -1).all()
