"""Images in folders, one a class, read when they are asked for; ImageNet in that layout."""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.data.entry import DataUnavailable

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
# Mean and deviation of ImageNet's channels, as published networks for it expect them.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SPLITS = {"train": "train", "test": "val"}


class ImageFolder(torch.utils.data.Dataset):
    """Images in one folder a class, read when they are asked for.

    An example is `(image, label)`: float32 `(C, H, W)` in [0, 1] with one channel for a grey image
    and three for any other, and the place of its folder in `classes`. All labels are in `targets`,
    `(N,)`.

    Args:
        folder: With one sub-folder a class; images may lie deeper in it.
        classes: Names of the sub-folders.

    Raises:
        DataUnavailable: If there is no image; on reading one, if it is damaged or Pillow is not
            installed.

    Example:
        >>> import tempfile, pathlib
        >>> from PIL import Image
        >>> from assay.data import ImageFolder
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog"):
        ...     (folder / name).mkdir()
        ...     Image.new("RGB", (5, 4)).save(folder / name / "1.png")
        >>> data = ImageFolder(folder, ["cat", "dog"])
        >>> image, label = data[1]
        >>> len(data), tuple(image.shape), data.classes[label]
        (2, (3, 4, 5), 'dog')
    """

    def __init__(self, folder: str | os.PathLike[str], classes: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.classes = tuple(classes)
        names: list[bytes] = []
        targets: list[int] = []
        for label, name in enumerate(self.classes):
            found = [os.fsencode(file) for file in _images_in(self.folder, name)]
            names += found
            targets += [label] * len(found)
        if not names:
            images = ", ".join(IMAGES)
            raise DataUnavailable(f"data: no images ({images}) in the folders of {self.folder}")
        # Arrays: of a million Python objects every reading process would come to own a copy.
        self._names = np.array(names)
        self.targets = torch.tensor(targets)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return pixels(read_image(self.path(index))), int(self.targets[index])

    def path(self, index: int) -> Path:
        """Return where an image is."""
        return self.folder / os.fsdecode(self._names[index])

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def checksum(self) -> str:
        """SHA-256 of the files' names; not of what is in them, which would be read for hours."""
        return hashlib.sha256(self._names.tobytes()).hexdigest()


class ImageNet(ImageFolder):
    """ImageNet (ILSVRC 2012) as networks take it: 1,281,167 images to train, 50,000 to test.

    The images are looked for in `imagenet/train/<wnid>/*.JPEG` and `imagenet/val/<wnid>/*.JPEG`.
    They are not downloaded: their home asks for a registration. Other images in this layout, with
    any number of classes, do as well.

    An example is `(image, label)`: float32 `(3, size, size)`, each channel standardised. Of a
    training image it is a random part of 8 to 100 % of the area, mirrored half of the time; this
    draws from torch's global generator, which a `DataLoader` seeds in each of its processes. A test
    image is scaled such that its shorter side is 256/224 `size` and cut to its middle.

    Args:
        split: `"train"` or `"test"`, the validation images of 2012.
        root: The folder that holds `imagenet`; default the one that the environment variable
            `ASSAY_DATA` names.
        size: Height and width of the images, in pixels.

    Raises:
        ValueError: If `split` is unknown or `size` is not positive.
        DataUnavailable: If the images are not there, or lie otherwise; one line that says how.

    Example:
        >>> import tempfile, pathlib
        >>> from PIL import Image
        >>> from assay.data import ImageNet
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> (root / "imagenet/val/n01440764").mkdir(parents=True)
        >>> Image.new("RGB", (500, 375)).save(root / "imagenet/val/n01440764/1.JPEG")
        >>> image, label = ImageNet("test", root=root)[0]
        >>> tuple(image.shape), label
        ((3, 224, 224), 0)

    Reference:
        O. Russakovsky et al. ImageNet large scale visual recognition challenge. IJCV 2015.
        https://arxiv.org/abs/1409.0575
    """

    def __init__(
        self,
        split: str = "train",
        *,
        root: str | os.PathLike[str] | None = None,
        size: int = 224,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be {' or '.join(map(repr, SPLITS))}, got {split!r}")
        if size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {size}")
        folder = _imagenet(root)
        classes = {name: _folders_in(folder / part) for name, part in SPLITS.items()}
        mine = folder / SPLITS[split]
        if not classes[split]:
            raise DataUnavailable(_layout(f"{mine} holds no folders of images, one a class"))
        odd = set(classes["train"]) ^ set(classes["test"])
        if all(classes.values()) and odd:
            raise DataUnavailable(
                _layout(f"train and val in {folder} differ in their classes, e.g. {min(odd)}")
            )
        super().__init__(mine, classes[split])
        self.split, self.size = split, size
        self.source = (
            f"images in {'the folder given' if root is not None else 'the folder ASSAY_DATA'}; "
            "the checksum is that of their names"
        )

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 size size"], int]:
        image = read_image(self.path(index)).convert("RGB")
        cut = random_view if self.split == "train" else central_view
        return (pixels(cut(image, self.size)) - MEAN) / STD, int(self.targets[index])


def read_image(source: Any) -> Any:
    """Return a file, named or open, as a Pillow image in grey or in RGB.

    Args:
        source: Path or binary file.

    Raises:
        DataUnavailable: If it is not an image that can be read, or Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataUnavailable("images need Pillow: pip install 'assay[data]'") from None
    try:
        with Image.open(source) as opened:
            return opened.convert("L" if opened.mode in ("L", "1", "I;16") else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        said = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
        raise DataUnavailable(f"data: {source} is not an image: {reason}") from error


def pixels(image: Any) -> Float[Tensor, "c h w"]:
    """Return a Pillow image as a tensor in [0, 1]; a grey image has one channel."""
    array = np.asarray(image, dtype=np.float32) / 255
    if array.ndim == 2:
        return torch.from_numpy(array).unsqueeze(0)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def random_view(image: Any, size: int) -> Any:
    """Return a random part of a Pillow image, scaled to a square, mirrored half of the time.

    It has 8 to 100 % of the area and is 3:4 to 4:3 in shape, as for the Inception networks.

    Args:
        image: Of any shape.
        size: Height and width of what is returned.

    Reference:
        C. Szegedy et al. Going deeper with convolutions. CVPR 2015, section 6.
        https://arxiv.org/abs/1409.4842
    """
    from PIL import Image

    width, height = image.size
    for _ in range(10):
        share, shape = torch.rand(2).tolist()
        area = (0.08 + 0.92 * share) * width * height
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # the image is too oblong: the largest part of such a shape
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    x, y, mirrored = torch.rand(3).tolist()
    left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
    box = (left, top, left + w, top + h)
    view = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored < 0.5 else view


def central_view(image: Any, size: int) -> Any:
    """Return the middle of a Pillow image, 224/256 of its shorter side, scaled to a square.

    Args:
        image: Of any shape.
        size: Height and width of what is returned.
    """
    from PIL import Image

    width, height = image.size
    side = min(width, height) * 224 / 256
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _imagenet(root: str | os.PathLike[str] | None) -> Path:
    base = os.environ.get("ASSAY_DATA") if root is None else root
    if not base:
        raise DataUnavailable(_layout("imagenet is not found: ASSAY_DATA is not set"))
    folder = Path(base).expanduser() / "imagenet"
    if not folder.is_dir():
        raise DataUnavailable(_layout(f"there is no folder {folder}"))
    return folder


def _layout(reason: str) -> str:
    return (
        f"{reason}. ImageNet needs a registration at https://image-net.org and is never "
        "downloaded: put its images into imagenet/train/<wnid>/*.JPEG and "
        "imagenet/val/<wnid>/*.JPEG, and set ASSAY_DATA to the folder that holds imagenet"
    )


def _folders_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _images_in(folder: Path, name: str) -> list[str]:
    """Images below a sub-folder, relative to the folder, in the order of their paths."""
    found = []
    for place, _, files in os.walk(folder / name):  # much faster than pathlib on a million files
        inner = os.path.relpath(place, folder)
        images = (file for file in files if os.path.splitext(file)[1].lower() in IMAGES)
        found += [os.path.join(inner, image) for image in images]
    return sorted(found, key=lambda path: path.split(os.sep))
