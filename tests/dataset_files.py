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
