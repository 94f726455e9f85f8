"""Looking for image data sets in the Parquet layout of the Hugging Face hub."""

from functools import partial
from pathlib import Path

from assay.data.entry import Found
from assay.data.formats import read_image_parquet


def find_parquet(folder: Path, split: str, channels: int) -> Found | None:
    """Look for `{split}.parquet`, or shards `{split}-*.parquet` at any depth beneath `folder`."""
    single = folder / f"{split}.parquet"
    files = (single,) if single.is_file() else tuple(sorted(folder.rglob(f"{split}-*.parquet")))
    if not files:
        return None
    read = partial(read_image_parquet, files, channels)
    return Found.at(files, "Parquet files", read)
