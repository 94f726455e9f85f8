"""A compressor for each stretch of a vector, such as the parameters of a model."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from assay.distributed.combinations import ErrorFeedback
from assay.distributed.compressors import Compressor, check_floating
from assay.distributed.payload import Payload

__all__ = ["Blockwise"]

# Position is the code on the wire: append only.
_DTYPES = (
    torch.uint8,
    torch.int32,
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.int16,
)
_NEW_BLOCK = 128  # added to the code of the first part of a block


class Blockwise(ErrorFeedback):
    """Cuts a vector into blocks and compresses each with a compressor of its own.

    Counts as a compressor with memory, since its blocks may be: each worker needs its own copy.

    Args:
        compressors: One a block.
        sizes: Entries of each block.

    Raises:
        ValueError: The two differ in length, a size is negative, or a vector has another number of
            entries than the sizes add up to.
        TypeError: One of `compressors` is not a compressor.

    Example:
        >>> from assay.distributed import Identity, TopK
        >>> blocks = Blockwise([Identity(), TopK(0.25)], [2, 4])
        >>> payload = blocks.compress(torch.tensor([1.0, 2.0, 3.0, -6.0, 5.0, 4.0]))
        >>> blocks.decompress(payload)
        tensor([ 1.,  2.,  0., -6.,  0.,  0.])
    """

    def __init__(self, compressors: Sequence[Compressor], sizes: Sequence[int]) -> None:
        if len(compressors) != len(sizes):
            raise ValueError(
                f"sizes must have one entry for each of {len(compressors)} compressors, "
                f"got {len(sizes)}"
            )
        if any(size < 0 for size in sizes):
            raise ValueError(f"sizes must not be negative, got {list(sizes)}")
        for compressor in compressors:
            if not isinstance(compressor, Compressor):
                raise TypeError(
                    f"compressors must hold compressors, got {type(compressor).__name__}"
                )
        self.compressors: list[Compressor] = list(compressors)
        self.sizes = [int(size) for size in sizes]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.sizes)} blocks, {sum(self.sizes)} entries)"

    @property
    def unbiased(self) -> bool:
        """Whether all blocks are."""
        return all(compressor.unbiased for compressor in self.compressors)

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Compress each block; `ValueError` when `x` has another number of entries."""
        check_floating(x)
        if x.numel() != sum(self.sizes):
            raise ValueError(f"x must have {sum(self.sizes)} entries, got {x.numel()}")
        blocks = x.detach().reshape(-1).split(self.sizes)
        packed = pack(self.compress_blocks(blocks, generator))
        return Payload(packed, tuple(x.shape), x.dtype)

    def compress_blocks(
        self, blocks: Sequence[Tensor], generator: Generator | None = None
    ) -> list[Payload]:
        """Compress vectors, one a block."""
        return [
            compressor.compress(block, generator=generator)
            for compressor, block in zip(self.compressors, blocks, strict=True)
        ]

    def decompress(self, payload: Payload) -> Tensor:
        """Decompress each block."""
        parts = unpack(payload.tensors)
        blocks = [
            compressor.decompress(Payload(tensors, (size,), payload.dtype))
            for compressor, tensors, size in zip(self.compressors, parts, self.sizes, strict=True)
        ]
        return torch.cat(blocks).view(payload.shape)

    def omega(self, d: int) -> float:
        """The largest ω of a block."""
        pairs = zip(self.compressors, self.sizes, strict=True)
        return max((c.omega(size) for c, size in pairs if size), default=0.0)

    def reset(self) -> None:
        """Forget what the blocks remember."""
        for compressor in self.compressors:
            if isinstance(compressor, ErrorFeedback):
                compressor.reset()

    def state_dict(self) -> dict:
        """What the blocks remember, by number."""
        return {
            str(i): compressor.state_dict()
            for i, compressor in enumerate(self.compressors)
            if isinstance(compressor, ErrorFeedback)
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` of the same blocks gave."""
        for i, compressor in enumerate(self.compressors):
            if isinstance(compressor, ErrorFeedback):
                compressor.load_state_dict(state[str(i)])


def pack(payloads: Sequence[Payload]) -> tuple[Tensor, ...]:
    """Gather the tensors of several payloads, those of one dtype in one tensor.

    Returns:
        A code and a length (uint8 and int32, 5 bytes together) for each tensor of the payloads,
        then one tensor for each dtype that occurs.
    """
    parts = [tensor for payload in payloads for tensor in payload.tensors]
    codes = [
        _DTYPES.index(tensor.dtype) | (0 if i else _NEW_BLOCK)
        for payload in payloads
        for i, tensor in enumerate(payload.tensors)
    ]
    device = parts[0].device if parts else torch.device("cpu")
    table = torch.tensor(codes, dtype=torch.uint8, device=device)
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.int32, device=device)
    merged = []
    for dtype in _DTYPES:
        same = [part for part in parts if part.dtype == dtype]
        merged += [torch.cat(same)] if same else []
    return (table, lengths, *merged)


def unpack(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Give back the tensors of each payload that `pack` gathered."""
    table, lengths, *merged = tensors
    dtypes = [_DTYPES[code & ~_NEW_BLOCK] for code in table.tolist()]
    remaining = {}
    for tensor in merged:
        sizes = [
            n for n, dtype in zip(lengths.tolist(), dtypes, strict=True) if dtype == tensor.dtype
        ]
        remaining[tensor.dtype] = iter(tensor.split(sizes))
    blocks: list[list[Tensor]] = []
    for code, dtype in zip(table.tolist(), dtypes, strict=True):
        if code & _NEW_BLOCK:
            blocks.append([])
        blocks[-1].append(next(remaining[dtype]))
    return [tuple(block) for block in blocks]
