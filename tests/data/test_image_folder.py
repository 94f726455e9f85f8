"""Images in folders are read one by one, and ImageNet's come as networks take them."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from assay.data import DataUnavailable, ImageFolder, ImageNet, image_folder
from assay.data.image_folder import MEAN, STD, central_view, random_view
from dataset_files import encode, write_ilsvrc

NOISE = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)


def write(path, pixels, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels, kind))


def test_examples_are_in_the_order_of_classes_and_paths(tmp_path):
    for name in ("cat/2.png", "cat/deep/1.PNG", "cat/deep-er/3.png", "dog/0.png", "rat/4.png"):
        write(tmp_path / name, NOISE)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = ImageFolder(tmp_path, ["dog", "cat"])
    paths = [data.path(i).relative_to(tmp_path).as_posix() for i in range(len(data))]
    assert paths == ["dog/0.png", "cat/2.png", "cat/deep/1.PNG", "cat/deep-er/3.png"]
    assert data.targets.tolist() == [0, 1, 1, 1]
    assert [label for _, label in data] == [0, 1, 1, 1]


def test_an_image_is_its_pixels_over_255_with_grey_in_one_channel(tmp_path):
    write(tmp_path / "a" / "colour.png", NOISE)
    write(tmp_path / "a" / "grey.png", NOISE[..., 0])
    (colour, _), (grey, _) = ImageFolder(tmp_path, ["a"])
    assert torch.equal(colour, torch.from_numpy(NOISE).permute(2, 0, 1) / 255)
    assert torch.equal(grey, colour[:1])


def test_names_of_any_script_and_length_are_kept(tmp_path):
    names = ["ä", "x" * 200, "像", "1"]
    for name in names:
        write(tmp_path / "a" / f"{name}.png", NOISE)
    data = ImageFolder(tmp_path, ["a"])
    assert {data.path(i).stem for i in range(4)} == set(names)
    assert all(data.path(i).is_file() for i in range(4))


def test_images_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    read, original = [], image_folder.read_image
    monkeypatch.setattr(image_folder, "read_image", lambda f: read.append(f.name) or original(f))
    for name in "123":
        write(tmp_path / "a" / f"{name}.png", NOISE)
    (tmp_path / "a" / "2.png").write_bytes(b"nothing")
    data = ImageFolder(tmp_path, ["a"])
    assert (len(data), read) == (3, [])
    assert data[2][0].shape == (3, 5, 4)
    assert read == ["3.png"]
    with pytest.raises(DataUnavailable, match=r"2\.png is not an image: UnidentifiedImageError"):
        data[1]


def test_folders_without_an_image_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataUnavailable, match=r"no images \(\.png, .*\) in the folders of"):
        ImageFolder(tmp_path, ["a", "absent"])


def test_imagenet_is_found_below_assay_data(tmp_path, monkeypatch):
    write_ilsvrc(tmp_path, train=3, test=2, size=(50, 40))
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path))
    train, test = ImageNet("train"), ImageNet("test", size=96)
    assert train.classes == test.classes == ("n01440764", "n02102040")
    assert (train.targets.tolist(), test.targets.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    assert train[0][0].shape == (3, 224, 224)
    assert test[3][0].shape == (3, 96, 96)
    assert str(tmp_path) not in train.source
    assert train.checksum == ImageNet(root=tmp_path).checksum != test.checksum


def test_training_images_are_random_and_test_images_are_not(tmp_path):
    write_ilsvrc(tmp_path)
    train, test = (ImageNet(split, root=tmp_path, size=16) for split in ("train", "test"))

    def epoch(data, seed):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator)
        [(x, y)] = loader
        return x, y

    first, again, other = epoch(train, 1), epoch(train, 1), epoch(train, 2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], other[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(epoch(test, 1)[0], epoch(test, 2)[0])
    assert torch.equal(pickle.loads(pickle.dumps(test))[1][0], test[1][0])


@pytest.mark.parametrize("split", ["train", "test"])
def test_channels_are_standardised_and_grey_has_three(tmp_path, split):
    colour = np.array([30, 60, 200], dtype=np.uint8)
    for part in ("train", "val"):
        write(tmp_path / "imagenet" / part / "a" / "1.png", np.tile(colour, (9, 7, 1)))
        write(tmp_path / "imagenet" / part / "a" / "2.png", np.full((7, 9), 80, dtype=np.uint8))
    (image, _), (grey, _) = ImageNet(split, root=tmp_path, size=5)
    expected = (torch.from_numpy(colour).view(3, 1, 1) / 255 - MEAN) / STD
    torch.testing.assert_close(image, expected.expand(3, 5, 5))
    torch.testing.assert_close(grey * STD + MEAN, torch.full((3, 5, 5), 80 / 255))


def test_central_view_is_resizing_to_256_and_cropping_224():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 640, 3), np.uint8))
    resized = image.resize((320, 256), Image.Resampling.BILINEAR)
    cropped = resized.crop((48, 16, 272, 240))
    assert np.array_equal(np.asarray(central_view(image, 224)), np.asarray(cropped))


def ramp(width, height, axis):
    """An image whose pixels say where they are along an axis."""
    place = np.arange(width, dtype=np.float32) if axis else np.arange(height, dtype=np.float32)
    row = place if axis else place[:, None]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(row, (height, width))))


def test_random_views_are_of_the_sizes_and_shapes_that_they_should_be():
    """A linear ramp stays linear, so its slope in a view tells how much of the image is in it."""
    width, height, mirrored, shares = 800, 600, 0, []
    for seed in range(300):
        found = []
        for axis in (0, 1):
            torch.manual_seed(seed)
            view = np.asarray(random_view(ramp(width, height, axis), 8))
            line = view.mean(1 - axis) if axis == 0 else view.mean(0)
            found.append((line[5] - line[2]) / 3 * 8)
        h, w = found
        mirrored += w < 0
        shares.append(abs(w) * h / (width * height))
        # Sides are rounded to whole pixels, and the smallest is 160 px long.
        assert 3 / 4 * 0.99 < abs(w) / h < 4 / 3 * 1.01
    assert 0.08 * 0.99 < min(shares) < 0.12
    assert 0.9 < max(shares) < 1.0001
    assert abs(mirrored - 150) < 5 * 75**0.5  # five standard deviations


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (300, 20), (3, 2)])
@pytest.mark.parametrize("view", [random_view, central_view])
def test_views_of_odd_images_have_the_size_asked_for(shape, view):
    torch.manual_seed(0)
    for _ in range(20):
        assert view(Image.new("RGB", shape), 7).size == (7, 7)


def one_line(caught, *parts):
    said = str(caught.value)
    assert "\n" not in said
    for part in (*parts, "imagenet/val/<wnid>/*.JPEG", "registration", "ASSAY_DATA"):
        assert part in said


def test_missing_images_are_one_line_that_says_where_they_belong(tmp_path, monkeypatch):
    with pytest.raises(DataUnavailable) as caught:
        ImageNet()
    one_line(caught, "ASSAY_DATA is not set")
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path))
    with pytest.raises(DataUnavailable) as caught:
        ImageNet()
    one_line(caught, f"there is no folder {tmp_path / 'imagenet'}")
    write(tmp_path / "imagenet" / "train" / "n01440764" / "1.JPEG", NOISE, "JPEG")
    write(tmp_path / "imagenet" / "val" / "1.JPEG", NOISE, "JPEG")
    with pytest.raises(DataUnavailable) as caught:
        ImageNet("test")
    one_line(caught, "val holds no folders of images, one a class")
    write(tmp_path / "imagenet" / "val" / "n02102040" / "1.JPEG", NOISE, "JPEG")
    with pytest.raises(DataUnavailable) as caught:
        ImageNet("train")
    one_line(caught, "differ in their classes, e.g. n01440764")


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        ImageNet("val", root=tmp_path)
    with pytest.raises(ValueError, match="size must be a positive number of pixels, got 0"):
        ImageNet(root=tmp_path, size=0)
