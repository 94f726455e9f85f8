"""CIFAR-10 and CIFAR-100: 60,000 colour images of 32x32 pixels, binary version or Parquet."""

from functools import partial
from pathlib import Path

from assay.data.entry import Arrays, Description, Entry, Found, Remote
from assay.data.formats import read_cifar_binary, read_tar_members
from assay.data.parquet import find_parquet

FILES = {
    "cifar10": {
        "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test": ("test_batch.bin",),
    },
    "cifar100": {"train": ("train.bin",), "test": ("test.bin",)},
}
ARCHIVE = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}
MD5 = {
    "cifar10": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar100": "03b5dce01913d631647c71ecec9e9cb8",
}
LABELS = {"cifar10": 1, "cifar100": 2}


def _read_files(name: str, files: tuple[Path, ...], progress: bool) -> Arrays:
    return read_cifar_binary([path.read_bytes() for path in files], LABELS[name])


def _read_archive(name: str, split: str, archive: Path, progress: bool) -> Arrays:
    return read_cifar_binary(read_tar_members(archive, FILES[name][split]), LABELS[name])


def _find(name: str, folder: Path, split: str) -> Found | None:
    unpacked = tuple(folder / file for file in FILES[name][split])
    if all(path.is_file() for path in unpacked):
        read = partial(_read_files, name, unpacked)
        return Found.at(unpacked, "binary version", read)
    archive = folder / ARCHIVE[name]
    if archive.is_file():
        read = partial(_read_archive, name, split, archive)
        return Found.at((archive,), "binary version", read)
    return find_parquet(folder, split, channels=3)


def _remotes(name: str) -> dict[str, tuple[Remote, ...]]:
    url = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE[name]}"
    archive = Remote(ARCHIVE[name], MD5[name], (url,))
    return {"train": (archive,), "test": (archive,)}


REFERENCE = (
    "A. Krizhevsky. Learning multiple layers of features from tiny images. "
    "Technical report, University of Toronto, 2009."
)
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""


def _entry(name: str, title: str, classes: str, folders: tuple[str, ...]) -> Entry:
    return Entry(
        Description(
            name=name,
            title=title,
            shape=(3, 32, 32),
            classes=tuple(classes.split()),
            sizes={"train": 50000, "test": 10000},
            home="https://www.cs.toronto.edu/~kriz/cifar.html",
            licence="not stated",
            reference=REFERENCE,
        ),
        folders=folders,
        find=partial(_find, name),
        remotes=_remotes(name),
    )


ENTRIES = (
    _entry("cifar10", "CIFAR-10 tiny photographs", CIFAR10, ("cifar10", "cifar-10-batches-bin")),
    _entry(
        "cifar100",
        "CIFAR-100 tiny photographs, the hundred fine classes",
        CIFAR100,
        ("cifar100", "cifar-100-binary"),
    ),
)
