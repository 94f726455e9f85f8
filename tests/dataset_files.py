"""Writers of the file formats that data sets come in, for the tests of their readers."""

import io
import struct
import tarfile


def idx_bytes(array):
    """An array of bytes in LeCun's IDX format."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def encode(array, kind):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, images, labels, columns=("image", "label"), kind="PNG"):
    import pyarrow
    from pyarrow import parquet

    cells = [{"bytes": encode(image, kind), "path": None} for image in images]
    table = pyarrow.table({columns[0]: cells, columns[1]: pyarrow.array(labels)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def write_ilsvrc(root, train=4, test=2, size=(20, 16)):
    """Images of two classes, reddish and bluish noise, as ImageNet is laid out."""
    import numpy as np

    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        for channel, wnid in ((0, "n01440764"), (2, "n02102040")):
            folder = root / "imagenet" / part / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., channel] += 127
                (folder / f"ILSVRC2012_{i:08}.JPEG").write_bytes(encode(pixels, "JPEG"))
