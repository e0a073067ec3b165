"""Every data set in its real layout, made up and tiny; folders of anything; the prepared tensor."""

import gzip
import hashlib
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import DATA, HERE, load, shell, tree
from PIL import Image

dcgan = load(HERE / "dcgan.py")
rng = np.random.default_rng(0)


def picture(w=40, h=30, mode="RGB"):
    """Smooth, so that scaling and JPEG change it little."""
    corners = rng.integers(0, 256, (2, 2, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    small = Image.fromarray(corners if mode != "L" else corners[:, :, 0], mode=None)
    return small.resize((w, h), Image.Resampling.BICUBIC)


def pictures(folder, *names):
    """A picture of its own in every file that is named."""
    for name in names:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)


def prepared(folder, size=16):
    """The folder's Data, by a cache of its own."""
    return dcgan.load_images(str(folder), size, f"{folder}-root")


def refused(capsys, *args, **options):
    """What load_images() says when it refuses: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        dcgan.load_images(*args, **options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    return error


# --- cartoon --------------------------------------------------------------------------------------


def test_the_cartoon_faces_and_their_labels_are_always_the_same(tmp_path):
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
def test_digits_get_a_frame_at_32_pixels_and_keep_their_labels(tmp_path, name, folder):
    digits = rng.integers(0, 256, (12, 28, 28), np.uint8)
    classes = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 7, 8, 0], np.uint8)
    raw = tmp_path / folder / "raw"
    for part, rows in [("train", slice(None)), ("t10k", slice(4))]:
        write_idx(raw / f"{part}-images-idx3-ubyte", digits[rows])
        write_idx(raw / f"{part}-labels-idx1-ubyte", classes[rows])
    at32 = dcgan.load_images(name, 32, tmp_path)
    assert at32.images.shape == (12, 1, 32, 32) and at32.labels.shape == (12, 10)
    order = [next(i for i in range(12) if np.array_equal(image[0, 2:-2, 2:-2], digits[i]))
             for image in at32.images.numpy()]  # a border, not a blur
    assert sorted(order) == list(range(12)) and not at32.images[:, :, :2].any()
    assert at32.labels.argmax(1).tolist() == classes[order].tolist()
    assert (at32.labels.sum(1) == 1).all()
    at28 = dcgan.load_images(name, 28, tmp_path)
    assert np.array_equal(at28.images[:, 0], digits[order])
    assert len(dcgan.load_images(name, 32, tmp_path, split="test").images) == 4


def test_cifar10_keeps_its_labels_and_names(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = rng.integers(0, 256, (12, 3, 32, 32), np.uint8)
    classes = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 3, 1]
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


def test_published_sets_keep_their_copies(tmp_path):
    digits = np.zeros((5, 28, 28), np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", digits)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array([1, 1, 1, 2, 3], np.uint8))
    assert len(dcgan.load_images("mnist", 28, tmp_path).images) == 5


# --- CelebA ---------------------------------------------------------------------------------------

ATTRIBUTES = ["Bald", "Smiling", "Young"]


def make_celeba(root, faces, table=None, size=(178, 218), form="{i:06}.jpg", numbers=range(1, 9)):
    """Faces, green inside the centred 128x128 and red around it, and their attributes: the bits of
    the number that the green stands for.
    """
    (root / faces).mkdir(parents=True)
    values = []
    for k, i in enumerate(numbers, 1):
        face = Image.new("RGB", (178, 218), (255, 0, 0))
        face.paste((0, 20 * k, 0), (25, 45, 153, 173))
        face = face if size == (178, 218) else face.crop((25, 45, 153, 173)).resize(size)
        face.save(root / faces / form.format(i=i), quality=100, subsampling=0)
        values.append([1 if (k >> bit) & 1 else -1 for bit in range(3)])
    if table:
        names = [f"{i:06}.jpg" for i in numbers]
        lines = [str(len(names)), " ".join(ATTRIBUTES) + " "]
        lines += [f"{name} " + "  ".join(map(str, row)) for name, row in zip(names, values)]
        if table.endswith(".csv"):
            lines = ["image_id," + ",".join(ATTRIBUTES)]
            lines += [f"{name}," + ",".join(map(str, row)) for name, row in zip(names, values)]
        (root / table).parent.mkdir(parents=True, exist_ok=True)
        (root / table).write_text("\n".join(lines) + "\n")


def assert_celeba(root, n=8, **options):
    """n faces, cropped to their green, each with its own attributes."""
    data = dcgan.load_images("celeba", 64, root, **options)
    assert data.images.shape == (n, 3, 64, 64) and data.images[:, 0].max() < 30  # no red
    greens = (data.images[:, 1].float().mean((1, 2)) / 20).round().long().tolist()
    assert len(set(greens)) == n
    found = [[(g >> ATTRIBUTES.index(name)) & 1 for name in data.names] for g in greens]
    assert data.labels.tolist() == found
    return data


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
def test_celeba_is_found_in_any_of_its_layouts(tmp_path, faces, table):
    make_celeba(tmp_path, faces, table)
    assert assert_celeba(tmp_path).names == ATTRIBUTES


@pytest.mark.parametrize(
    "change",
    [
        lambda row: ",".join(f'"{cell}"' for cell in row.split(",")),
        lambda row: row.replace(",", ";"),
        lambda row: ("," if row.startswith("image") else "7,") + row,  # pandas' index
        lambda row: row.replace(",", ", ") + "\r",
    ],
    ids=["quotes", "semicolons", "index", "windows"],
)
def test_celeba_with_a_csv_of_another_kind(tmp_path, change):
    make_celeba(tmp_path, "img_align_celeba", table := "list_attr_celeba.csv")
    rows = (tmp_path / table).read_text().splitlines()
    (tmp_path / table).write_text("\n".join(map(change, rows)) + "\n", "utf-8-sig")
    assert assert_celeba(tmp_path).names == ATTRIBUTES


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (90, 90)])
def test_celeba_of_another_size_is_taken_whole(tmp_path, size):
    make_celeba(tmp_path, "img_align_celeba", "list_attr_celeba.txt", size=size)
    assert_celeba(tmp_path)


def test_celeba_as_png_beside_files_that_are_no_table(tmp_path):
    """The table still says .jpg; Windows and Kaggle leave files beside it."""
    make_celeba(tmp_path, "img_align_celeba", "list_attr_celeba.txt", form="{i:06}.png")
    for name in ("list_attr_celeba.csv.zip", "list_attr_celeba.txt:Zone.Identifier",
                 "img_align_celeba/000001.jpg:Zone.Identifier"):
        (tmp_path / name).write_bytes(b"[ZoneTransfer]\nZoneId=3\n")
    assert_celeba(tmp_path)


def test_celebas_test_part_begins_with_image_182638(tmp_path):
    """As numbers: CelebA-HQ's 2.jpg is no test image, although "2" > "182637"."""
    make_celeba(tmp_path, "img_align_celeba", "list_attr_celeba.txt", form="{i}.jpg",
                numbers=[2, 10, 182637, 182638, 202599])
    assert_celeba(tmp_path, n=3)
    assert_celeba(tmp_path, n=2, split="test")


def test_a_part_of_celeba_is_enough_and_is_counted(tmp_path, capsys):
    make_celeba(tmp_path, "img_align_celeba", "list_attr_celeba.txt")
    for i in (1, 5):
        (tmp_path / "img_align_celeba" / f"{i:06}.jpg").unlink()
    assert_celeba(tmp_path, n=6)
    assert "celeba: 6 of the 182,637 images of the train part" in capsys.readouterr().out
    table = tmp_path / "list_attr_celeba.txt"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    assert_celeba(tmp_path, n=5)  # and the eighth has no row


def test_celeba_without_its_table_has_no_labels(tmp_path):
    make_celeba(tmp_path, "img_align_celeba")
    data = dcgan.load_images("celeba", 64, tmp_path)
    assert data.images.shape == (8, 3, 64, 64) and data.labels.shape == (8, 0)
    assert data.names == []


def test_celeba_without_a_test_part_says_so(tmp_path, capsys):
    make_celeba(tmp_path, "img_align_celeba", "list_attr_celeba.txt")
    with pytest.raises(SystemExit):
        dcgan.load_images("celeba", 64, tmp_path, split="test")
    told = capsys.readouterr()
    assert "celeba: 0 of the 19,962 images of the test part" in told.out and told.err


def test_celeba_that_is_missing_says_what_to_get_and_where_to_put_it(tmp_path, capsys):
    error = refused(capsys, "celeba", 64, tmp_path / "nothing")
    for part in ("img_align_celeba", "list_attr_celeba.txt", "https://mmlab", "Kaggle",
                 f"{tmp_path}/nothing"):
        assert part in error


def cells(change):
    """What changes the values of a CSV table, given as its lines."""
    def change_row(line):
        image, *values = line.split(",")
        return ",".join([image, *map(change, values)])
    return lambda lines: [lines[0], *map(change_row, lines[1:])]


def instead(n, line):  # of the n-th line, counted from 1
    return lambda lines: [*lines[: n - 1], line, *lines[n:]]


def order(*columns):
    return lambda lines: [",".join(line.split(",")[k] for k in columns) for line in lines]


def append(name, value):
    return lambda lines: [lines[0] + name, *[line + value for line in lines[1:]]]


RIGHT = {  # changes after which a table means the same as image_id,Bald,Smiling,Young did
    "as it is": lambda lines: lines,
    "0 for no": cells(lambda cell: cell.replace("-1", "0")),
    "fractions": cells(lambda cell: f"{cell}.0"),
    "words": cells(lambda cell: str(cell == "1")),
    "tabs": lambda lines: [line.replace(",", "\t") for line in lines],
    "another order": lambda lines: [lines[0], *lines[:0:-1]],
}
WRONG = {  # changes that leave its meaning in doubt, and what is said then
    "a typographic minus": (cells(lambda cell: cell.replace("-", "\u2212")), "line 2 "),
    "2 and 1 for yes and no": (cells(lambda cell: {"1": "2", "-1": "1"}[cell]), "line 2 "),
    "a blank cell": (instead(5, "000004.jpg,-1,,1"), "line 5 "),
    "another number": (instead(6, "000005.jpg,1,-1,0.5"), "line 6 "),
    "a lost 1": (instead(4, "000003.jpg,1,1,-"), "line 4 "),
    "a row cut in its last value": (instead(9, "000008.jpg,-1,-1,-"), "line 9 "),
    "a row cut before it": (instead(9, "000008.jpg,-1,-1"), "line 9 "),
    "two rows in one line": (instead(3, "000002.jpg,-1,1,-1000003.jpg,1,1,-1"), "line 3 "),
    "a number twice": (instead(4, "000002.jpg,1,1,-1"), "line 4 "),
    "a word beneath": (lambda lines: [*lines, "end"], "line 10 "),
    "image_id last": (order(1, 2, 3, 0), "line 2 "),
    "image_id second": (order(1, 0, 2, 3), "line 2 "),
    "a further column of numbers": (append(",age", ",31"), "line 2 "),
    "a further column without a name": (append("", ",1"), "line 2 "),
    "a column too few": (lambda lines: [lines[0], *order(0, 1, 2)(lines[1:])], "line 2 "),
    "no names": (lambda lines: lines[1:], "line 2 "),
    "bars": (lambda lines: [line.replace(",", "|") for line in lines], "line 3 "),
    "names alone": (lambda lines: lines[:1], "no rows"),
    "nothing": (lambda lines: [], "no rows"),
}


def test_a_table_of_celeba_gives_the_right_labels_or_none_and_a_line_that_says_why(
        tmp_path, capsys):
    make_celeba(tmp_path, "img_align_celeba", "list_attr_celeba.csv")
    table = tmp_path / "list_attr_celeba.csv"
    lines = table.read_text().splitlines()
    for name, change in RIGHT.items():
        table.write_text("\n".join(change(lines)) + "\n")
        assert assert_celeba(tmp_path).names == ATTRIBUTES, name
        assert "not read" not in capsys.readouterr().out, name
    for name, (change, reason) in WRONG.items():
        table.write_text("\n".join(change(lines)))
        assert_no_labels(tmp_path, table, reason, capsys, name)
    for encoding in ("utf-16", "utf-16-le"):
        table.write_text("\n".join(lines), encoding)
        assert_no_labels(tmp_path, table, "", capsys, encoding)


def assert_no_labels(root, table, reason, capsys, name):
    """All eight faces, and one line with the table's name and the reason."""
    capsys.readouterr()
    data = dcgan.load_images("celeba", 64, root)
    assert data.images.shape == (8, 3, 64, 64) and data.labels.shape == (8, 0), name
    told = [line for line in capsys.readouterr().out.splitlines() if str(table) in line]
    assert len(told) == 1 and "is not read" in told[0] and reason in told[0], name


def test_the_authors_table_of_celeba_is_read_as_strictly(tmp_path, capsys):
    make_celeba(tmp_path, "img_align_celeba", "list_attr_celeba.txt")
    table = tmp_path / "list_attr_celeba.txt"
    text = table.read_text()
    for old, new, reason in [("  -1\n", "  -\n", "line 3 "), ("-1", "\u22121", "line 3 "),
                             ("Young", "", "line 3 "), ("000004.jpg -1", "000004.jpg ", "line 6 "),
                             (text[text.index("000"):], "", "no rows"), (text, "8", "no rows")]:
        table.write_text(text.replace(old, new))
        assert_no_labels(tmp_path, table, reason, capsys, (old, new))
    table.write_text(text.split("\n", 1)[1])  # without the count of rows
    assert assert_celeba(tmp_path).names == ATTRIBUTES


def test_celeba_that_grows_is_prepared_again(tmp_path):
    make_celeba(tmp_path, "img_align_celeba", "list_attr_celeba.txt")
    assert_celeba(tmp_path)
    for number in (1, 2, 3):
        (tmp_path / "img_align_celeba" / f"{number:06}.jpg").unlink()
    assert_celeba(tmp_path, n=5)


def test_another_table_of_celeba_is_noticed(tmp_path):
    make_celeba(tmp_path, "img_align_celeba", "list_attr_celeba.txt")
    first, table = assert_celeba(tmp_path), tmp_path / "list_attr_celeba.txt"
    table.write_text(table.read_text().replace("Bald", "Male"))
    assert dcgan.load_images("celeba", 64, tmp_path).names == ["Male", "Smiling", "Young"]
    table.write_text(table.read_text().replace("jpg 1", "jpg -1", 1))
    labels = dcgan.load_images("celeba", 64, tmp_path).labels
    assert labels.sum(0).tolist() == (first.labels.sum(0) - torch.tensor([1, 0, 0])).tolist()


def test_celeba_as_a_linked_folder_is_found(tmp_path):
    make_celeba(tmp_path / "cluster", "img_align_celeba", "list_attr_celeba.txt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "celeba").symlink_to(tmp_path / "cluster")
    assert_celeba(tmp_path / "data")


# --- folders: the files ---------------------------------------------------------------------------


def test_a_folder_may_hold_any_mix_of_types_modes_and_sizes(tmp_path, capsys):
    """Broken files and exact copies are left out and counted, and the first reason is given."""
    folder = tmp_path / "mix"
    folder.mkdir()
    picture().save(folder / "a.JPG")
    picture(mode="L").save(folder / "b.png")
    picture().convert("P").save(folder / "c.gif")
    picture(mode="RGBA").save(folder / "d.webp")
    picture().convert("CMYK").save(folder / "e.jpeg")
    picture(3000, 2000).save(folder / "huge.jpg")
    picture(5, 7).save(folder / "small.bmp")
    picture().save(folder / "no ending", format="PNG")
    (folder / "copy.jpg").write_bytes((folder / "a.JPG").read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG not really")
    whole = (folder / "a.JPG").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert prepared(folder).images.shape == (8, 3, 16, 16)
    text = capsys.readouterr().out
    assert "1 copies, 2 unreadable files: " in text
    assert "broken.png: cannot identify" in text or "cut.jpg: Truncated" in text


@pytest.mark.parametrize("name, content", [
    ("photo.heic", b"\0\0\0\x18ftypheic" + bytes(99)),
    ("notes.txt", b"not an image"),
    ("one.png", b"cut"),
])
def test_a_file_that_no_decoder_knows_is_counted_with_the_reason(tmp_path, capsys, name, content):
    pictures(tmp_path / "own", "1.png", "2.png")
    (tmp_path / "own" / name).write_bytes(content)
    assert len(prepared(tmp_path / "own").images) == 2
    text = capsys.readouterr().out
    assert "1 unreadable files" in text and f"{name}: cannot identify image file" in text


def test_hidden_files_and_dangling_links_are_not_read(tmp_path, capsys):
    pictures(tmp_path / "own", "cat/1.png", "cat/3.png", "cat/.2.png", ".thumbs/1.png")
    (tmp_path / "own" / "cat" / "gone.png").symlink_to("nowhere.png")
    data = prepared(tmp_path / "own")
    assert data.names == ["cat"] and len(data.images) == 2
    assert "left out" not in capsys.readouterr().out


def test_a_grey_folder_has_one_channel(tmp_path):
    (tmp_path / "grey").mkdir()
    for mode in ("L", "LA", "1"):
        picture(mode="L").convert(mode).save(tmp_path / "grey" / f"{mode}.png")
    data = prepared(tmp_path / "grey")
    assert data.images.shape == (3, 1, 16, 16) and data.labels.shape == (3, 0)
    pictures(tmp_path / "grey", "colour.png")
    assert prepared(tmp_path / "grey").images.shape == (4, 3, 16, 16)


def test_the_short_side_is_scaled_and_the_centre_is_cut_out(tmp_path):
    (tmp_path / "wide").mkdir()
    image = Image.new("RGB", (64, 16), (255, 0, 0))
    image.paste((0, 0, 255), (24, 0, 40, 16))
    image.save(tmp_path / "wide" / "1.png")
    image.resize((320, 80), Image.Resampling.NEAREST).transpose(2).save(tmp_path / "wide" / "2.png")
    for image in prepared(tmp_path / "wide").images:
        inside = image[:, 1:-1, 1:-1]  # next to the cut, scaling mixes in a little of the red
        assert torch.equal(inside[2], torch.full_like(inside[2], 255)) and not inside[:2].any()


def test_an_image_is_upright_and_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert dcgan.open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    lying = Image.new("RGB", (8, 4))
    exif = lying.getexif()
    exif[0x0112] = 6  # a camera held upright
    lying.save(tmp_path / "lying.jpg", exif=exif)
    assert dcgan.open_image(tmp_path / "lying.jpg").size == (4, 8)


def test_a_photo_with_fractions_in_its_exif_is_turned_upright(tmp_path):
    """Pillow 11 raised here: the resolution is 0/0."""
    exif = (b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
            + struct.pack("<HHII", 0x11A, 5, 1, 38) + b"\0" * 12)
    Image.linear_gradient("L").save(tmp_path / "rational.jpg", exif=exif)  # black above
    upright = dcgan.open_image(tmp_path / "rational.jpg")
    assert upright.getpixel((0, 128))[0] > 250 and upright.getpixel((255, 128))[0] < 5


def scaled(path, values, **options):
    """The grey values that open_image() reads from a file with these."""
    Image.fromarray(values).save(path, **options)
    image = np.asarray(dcgan.open_image(path))
    assert (image == image[:, :, :1]).all()
    return image[:, :, 0]


def test_values_of_every_kind_of_file_come_to_0_to_255(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, values in {
        "of 0 to 1.tif": np.float32(grey / 255),
        "of 0 to 255.tif": np.float32(grey),
        "16 bits.tif": np.uint16(grey) * 257,
        "16 bits.png": np.uint16(grey) * 257,
    }.items():
        assert np.array_equal(scaled(tmp_path / name, values), grey), name
    assert not scaled(tmp_path / "black.tif", np.zeros((4, 4), np.float32)).any()


def test_16_bits_mean_65535_however_dark_the_image_is_and_a_dark_set_is_told(tmp_path, capsys):
    """A camera's 12 bits stay dark, and an image that stays below 256 is not stretched to white."""
    (tmp_path / "own").mkdir()
    for ending in ("png", "tif"):
        for highest, brightest in [(4095, 16), (255, 1), (65535, 255)]:
            values = np.linspace(0, highest, 256).astype(np.uint16).reshape(16, 16)
            path = tmp_path / "own" / f"{highest}.{ending}"
            assert scaled(path, values).max() == brightest, path
    prepared(tmp_path / "own")
    assert "dark" not in capsys.readouterr().out  # the third is bright
    for ending in ("png", "tif"):
        (tmp_path / "own" / f"65535.{ending}").unlink()
    prepared(tmp_path / "own")
    assert "these images are dark: the brightest value is 16 of 255\n" in capsys.readouterr().out
    Image.new("L", (16, 16), 64).save(tmp_path / "own" / "64.png")
    prepared(tmp_path / "own")
    assert "dark" not in capsys.readouterr().out


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 4000), (0, float("nan"))])
def test_a_file_whose_values_are_in_doubt_is_left_out_with_the_reason(tmp_path, capsys, low, high):
    pictures(tmp_path / "own", "1.png", "2.png")
    values = np.full((4, 4), low, np.float32)
    values[0] = high
    Image.fromarray(values).save(tmp_path / "own" / "doubt.tif")
    assert len(prepared(tmp_path / "own").images) == 2
    text = capsys.readouterr().out
    assert "1 unreadable files" in text and "doubt.tif: its values, " in text


# --- folders: the labels --------------------------------------------------------------------------


def test_sub_folders_are_the_labels_and_are_counted(tmp_path, capsys):
    pictures(tmp_path / "pets", "cat/x/1.png", "cat/2.png", "dog/1.png")
    data = prepared(tmp_path / "pets")
    assert data.names == ["cat", "dog"]
    assert sorted(data.labels.tolist()) == [[0, 1], [1, 0], [1, 0]]
    assert re.search(r"labels:\W+cat\W+2\W+dog\W+1\W", capsys.readouterr().out)
    prepared(tmp_path / "pets")  # also when they come from the cache
    assert re.search(r"labels:\W+cat\W+2\W+dog\W+1\W", capsys.readouterr().out)


def test_a_flat_folder_has_no_labels_and_says_so(tmp_path, capsys):
    pictures(tmp_path / "flat", "1.png", "2.png")
    data = prepared(tmp_path / "flat")
    assert data.names == [] and data.labels.shape == (2, 0)
    assert "labels: none\n" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["test", "Test", "val", "valid", "validation"])
def test_train_and_test_folders_are_no_labels(tmp_path, capsys, other):
    """They are refused, and the message names the folder to give."""
    pets = tmp_path / "pets"
    pictures(pets, *(f"{part}/{pet}/1.png" for part in ("train", other) for pet in ("cat", "dog")))
    error = refused(capsys, str(pets), 16, tmp_path)
    assert f"one folder deeper; give {pets}/train" in error
    assert prepared(pets / "train").names == ["cat", "dog"]
    (pets / "train").rename(pets / "TRAIN")
    assert f"give {pets}/TRAIN" in refused(capsys, str(pets), 16, tmp_path)
    shutil.rmtree(pets / "TRAIN")
    assert f"give {pets}/{other}" in refused(capsys, str(pets), 16, tmp_path)


def test_train_and_test_without_labels_are_not_mixed(tmp_path, capsys):
    pets = tmp_path / "pets"
    pictures(pets, "test/1.png", "train/1.png", "train/2.png")
    assert f"one folder deeper; give {pets}/train" in refused(capsys, str(pets), 16, tmp_path)
    pictures(pets, "car/1.png", "car/2.png")  # among others, train may be a class
    assert prepared(pets).names == ["car", "test", "train"]
    pictures(tmp_path / "mine", "1.png", "2.png", "3.png", "test/1.png")
    assert len(prepared(tmp_path / "mine").images) == 4


def test_a_set_that_is_wrapped_once_is_refused(tmp_path, capsys):
    pictures(tmp_path / "x", "dataset/cat/1.png", "dataset/dog/1.png")
    (tmp_path / "x" / "readme.txt").write_text("cats and dogs")
    error = refused(capsys, str(tmp_path / "x"), 16, tmp_path)
    assert f"one folder deeper; give {tmp_path}/x/dataset" in error
    assert prepared(tmp_path / "x" / "dataset").names == ["cat", "dog"]


def test_a_class_whose_files_are_all_broken_is_no_class(tmp_path, capsys):
    pictures(tmp_path / "own", "good/1.png", "good/2.png")
    (tmp_path / "own" / "bad").mkdir()
    (tmp_path / "own" / "bad" / "1.png").write_bytes(b"x")
    (tmp_path / "own" / "empty").mkdir()
    data = prepared(tmp_path / "own")
    assert data.names == ["good"] and data.labels.tolist() == [[1], [1]]
    assert "1 unreadable files" in capsys.readouterr().out


def test_a_stray_picture_above_the_classes_is_left_out_and_counted(tmp_path, capsys):
    pictures(tmp_path / "own", "stray.png", "cat/1.png", "dog/1.png")
    data = prepared(tmp_path / "own")
    assert data.labels.sum(1).tolist() == [1, 1] and data.names == ["cat", "dog"]
    assert "left out: 1 files that are in no label's folder" in capsys.readouterr().out


def test_a_picture_in_two_classes_is_kept_in_both_but_once_in_each(tmp_path, capsys):
    pictures(tmp_path / "own", "A/1.png", "B/1.png", "C/1.png")
    for copy in ("A/2.png", "C/2.png"):
        shutil.copy(tmp_path / "own" / "A" / "1.png", tmp_path / "own" / copy)
    data = prepared(tmp_path / "own")
    assert data.labels.sum(0).tolist() == [1, 1, 2] and data.labels.sum(1).tolist() == [1] * 4
    assert "left out: 1 copies, 0 unreadable" in capsys.readouterr().out  # A/2.png


def test_photos_beside_a_sub_folder_are_no_stray_pictures(tmp_path, capsys):
    """Only if most images lie in sub-folders are these the labels; otherwise all images count."""
    pictures(tmp_path / "own", *(f"{i}.png" for i in range(4)), "small/1.png", "small/2.png")
    data = prepared(tmp_path / "own")
    assert data.names == [] and len(data.images) == 6
    text = capsys.readouterr().out
    assert "no labels: 1 sub-folders have 2 of the 6 files\n" in text and "left out" not in text
    pictures(tmp_path / "own", "small/3.png", "small/4.png", "small/5.png")
    data = prepared(tmp_path / "own")
    assert data.names == ["small"] and len(data.images) == 5
    assert "left out: 4 files that are in no label's folder" in capsys.readouterr().out


def test_files_without_an_ending_make_a_class_as_any_do(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1", "dog/2", "dog/3"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / "own" / name, format="PNG")
    data = prepared(tmp_path / "own")
    assert data.names == ["cat", "dog"] and data.labels.sum(0).tolist() == [2, 3]


def test_more_than_1000_sub_folders_are_no_labels(tmp_path, capsys):
    for i in range(1000):
        (tmp_path / "own" / f"{i}").mkdir(parents=True)
        (tmp_path / "own" / f"{i}" / "1.png").write_bytes(b"")
    files, _, labels, names = dcgan.find_folder(f"{tmp_path}/own")
    assert len(files) == len(names) == 1000 and labels.tolist() == np.eye(1000).tolist()
    assert capsys.readouterr().out == ""
    (tmp_path / "own" / "more").mkdir()
    (tmp_path / "own" / "more" / "1.png").write_bytes(b"")
    files, _, labels, names = dcgan.find_folder(f"{tmp_path}/own")
    assert len(files) == 1001 and labels.shape == (1001, 0) and names == []
    assert "no labels: 1001 sub-folders" in capsys.readouterr().out


def test_of_many_labels_only_some_are_printed(tmp_path, capsys):
    pictures(tmp_path / "own", *(f"person {i}/1.png" for i in range(60)))
    assert len(prepared(tmp_path / "own").names) == 60
    told, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("labels")]
    assert "person 0'" in told and told.endswith(" and 20 more") and told.count("person") == 40


def test_a_class_that_may_not_be_read_is_told(tmp_path, capsys, monkeypatch):
    pictures(tmp_path / "own", "cat/1.png", "cat/2.png", "dog/1.png")
    scandir = os.scandir

    def refuse_dogs(folder):
        if os.path.basename(folder) == "dog":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse_dogs)
    assert prepared(tmp_path / "own").names == ["cat"]
    assert f"Permission denied: '{tmp_path}/own/dog'\n" in capsys.readouterr().out


def test_a_class_that_links_to_another_one_is_told(tmp_path, capsys):
    pictures(tmp_path / "own", "cat/1.png", "dog/1.png")
    (tmp_path / "own" / "puma").symlink_to("cat")
    assert prepared(tmp_path / "own").names == ["cat", "dog"]
    text = capsys.readouterr().out
    assert f"left out: {tmp_path}/own/puma, since it is {tmp_path}/own/cat, which is read" in text


def test_a_built_in_set_is_not_the_folder_of_its_name(tmp_path, monkeypatch, capsys):
    """They have run folders of their own, and which one is taken is told."""
    monkeypatch.chdir(tmp_path)
    outs = [dcgan.parse_arguments(["--data", data]).out
            for data in ("cartoon", "./cartoon", "cartoon/", "elsewhere/mnist", "mnist", "pets")]
    assert outs[0] == "runs/dcgan-cartoon" and outs[5] == "runs/dcgan-pets"
    assert outs[1] == outs[2] and len(set(outs)) == 5
    dcgan.load_images("cartoon", 16, DATA)
    assert "./cartoon" not in capsys.readouterr().out
    pictures("cartoon", "1.png", "2.png")
    assert len(dcgan.load_images("cartoon", 16, DATA).images) == 2560
    assert "for the folder of that name, give ./cartoon\n" in capsys.readouterr().out
    assert len(dcgan.load_images("./cartoon", 16).images) == 2
    assert "built-in" not in capsys.readouterr().out


def test_a_linked_class_has_the_links_own_name(tmp_path):
    pictures(tmp_path, "real/felis_catus/1.png", "own/dog/1.png")
    (tmp_path / "own" / "cat").symlink_to(tmp_path / "real" / "felis_catus")
    data = prepared(tmp_path / "own")
    assert data.names == ["cat", "dog"] and data.labels.sum(0).tolist() == [1, 1]
    (tmp_path / "link").symlink_to(tmp_path / "own")
    assert prepared(tmp_path / "link").names == ["cat", "dog"]


LINKS = [("all", "."), ("cat/up", ".."), ("dog/self", "."), ("x", "x"), ("long", 300 * "x")]


@pytest.mark.parametrize(("link", "target"), LINKS)
def test_links_that_run_in_a_circle_are_survived(tmp_path, capsys, link, target):
    pictures(tmp_path / "own", "cat/1.png", "dog/1.png", "dog/2.png")
    (tmp_path / "own" / link).symlink_to(target)
    data = prepared(tmp_path / "own")
    assert data.names == ["cat", "dog"] and data.labels.sum(0).tolist() == [1, 2]
    assert "copies" not in capsys.readouterr().out


def test_a_run_inside_the_folder_is_not_read_but_a_class_with_a_checkpoint_is(tmp_path):
    pictures(tmp_path / "own", "cat/1.png", "dog/1.png", "runs/mine/samples/1.png",
             "runs/mine/generated/1.png", "runs/mine/real.png")
    for folder in ("runs/mine", "cat"):
        (tmp_path / "own" / folder / "checkpoint.pt").write_bytes(b"")
    data = prepared(tmp_path / "own")
    assert data.names == ["cat", "dog"] and len(data.images) == 2


def test_a_run_and_its_prepared_data_inside_the_folder_are_no_data(tmp_path, monkeypatch, capsys):
    """As for "cd pictures; python dcgan.py --data .", also if the run was stopped early."""
    pictures(tmp_path, "1.png", "2.png", "3.png")
    monkeypatch.chdir(tmp_path)
    first = dcgan.load_images(".", 16)
    pictures(tmp_path, "runs/mine/real.png")
    (tmp_path / "runs/mine/samples").mkdir()
    again = dcgan.load_images(".", 16)
    assert torch.equal(first.images, again.images) and again.names == []
    assert len(list((tmp_path / "data/prepared").iterdir())) == 1
    assert "left out" not in capsys.readouterr().out


# --- the prepared tensor --------------------------------------------------------------------------


def test_the_cache_is_read_and_notices_added_and_removed_files(tmp_path, monkeypatch):
    own = tmp_path / "own"
    pictures(own, "1.png", "2.png", "3.png")
    first = prepared(own)
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "prepare_images", None)
        again = prepared(own)
    assert torch.equal(first.images, again.images) and again.names == first.names
    pictures(own, "4.png")
    assert len(prepared(own).images) == 4
    (own / "1.png").unlink()
    assert len(prepared(own).images) == 3
    assert not list(Path(f"{own}-root").rglob("*.pt.*"))  # nothing half-written is left


def test_a_prepared_set_that_is_damaged_is_made_anew(tmp_path):
    pictures(tmp_path / "own", "1.png", "2.png", "3.png")
    first = prepared(tmp_path / "own")
    file, = Path(f"{tmp_path}/own-root/prepared").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", b"noise", whole[:9], whole[: len(whole) // 2], whole[:-9]):
        file.unlink()  # first.images are still read from it
        file.write_bytes(damaged)
        assert torch.equal(prepared(tmp_path / "own").images, first.images)
        assert file.stat().st_size == len(whole)


def test_where_root_cannot_be_written_prepared_sets_go_to_the_current_folder(tmp_path, monkeypatch):
    """As for --root /kaggle/input. os.access() is patched, since root may write anywhere."""
    make_celeba(tmp_path / "input", "img_align_celeba", "list_attr_celeba.txt")
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    access = os.access

    def read_only(path, mode, **options):
        inside = Path(path).resolve().is_relative_to(tmp_path / "input")
        return not (inside and mode & os.W_OK) and access(path, mode, **options)

    monkeypatch.setattr(os, "access", read_only)
    before = tree(tmp_path / "input")
    first = assert_celeba(tmp_path / "input")
    assert tree(tmp_path / "input") == before
    assert len(list((tmp_path / "desk" / "data" / "prepared").iterdir())) == 1
    monkeypatch.setattr(dcgan, "prepare_images", None)  # it is found there again
    assert torch.equal(assert_celeba(tmp_path / "input").images, first.images)


@pytest.mark.parametrize("ending, seconds", [("png", 0), ("bmp", 9)])
def test_other_pixels_under_the_same_names_are_noticed(tmp_path, ending, seconds):
    """By the sizes of the files (archives have fixed dates, as cp -p has), or by their times."""
    (tmp_path / "own").mkdir()
    for low, time in ((0, 315532800), (200, 315532800 + seconds)):
        for i in range(4):
            path = tmp_path / "own" / f"{i}.{ending}"
            Image.fromarray(rng.integers(low, 255, (30, 40, 3), np.uint8)).save(path)
            os.utime(path, (time, time))
        assert (prepared(tmp_path / "own").images.float().mean() > 200) == (low == 200)


def test_a_renamed_class_is_noticed(tmp_path):
    pictures(tmp_path / "own", "cat/1.png", "dog/1.png")
    assert prepared(tmp_path / "own").names == ["cat", "dog"]
    (tmp_path / "own" / "dog").rename(tmp_path / "own" / "cow")
    assert prepared(tmp_path / "own").names == ["cat", "cow"]


def test_two_folders_of_one_name_do_not_mix(tmp_path):
    pictures(tmp_path, "a/train/1.png", "a/train/2.png", "b/train/1.png", "b/train/2.png",
             "b/train/3.png")
    for parent, n in [("a", 2), ("b", 3), ("a", 2)]:
        folder = f"{tmp_path}/{parent}/train/"
        assert len(dcgan.load_images(folder, 16, tmp_path / "root").images) == n


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


def test_names_that_the_terminal_cannot_show_do_no_harm(tmp_path):
    pictures(tmp_path / "写真", "猫/1.png", "犬/1.png")
    for path in (tmp_path / "写真").rglob("*.png"):
        shutil.copy(path, path.with_name("copy.png"))
    flags = ["--steps", 1, "--size", 16, "--width", 4, "--batch", 4, "--device", "cpu"]
    done = shell(HERE / "dcgan.py", "--data", "写真", *flags, cwd=tmp_path,
                 env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and "2 copies" in done.stdout, done.stderr
