"""What a compressor sends: a few tensors of real bytes, and fields packed below a byte."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

__all__ = ["Payload", "pack_fields", "unpack_fields"]

# Position is the code on the wire: append only.
_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
_ALIGNMENT = 8  # bytes, so that every part can be viewed as its dtype in place


@dataclass(frozen=True)
class Payload:
    """A compressed tensor: everything the receiver needs besides the compressor itself.

    Args:
        tensors: What is sent, in an order that the compressor knows.
        shape: Shape of the tensor that was compressed.
        dtype: Its dtype.

    Example:
        >>> payload = Payload((torch.arange(3, dtype=torch.uint8),), (3,), torch.float32)
        >>> payload.nbytes
        3
        >>> message = payload.to_bytes()
        >>> Payload.from_bytes(message, (3,), torch.float32).tensors[0]
        tensor([0, 1, 2], dtype=torch.uint8)
    """

    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are sent."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_bytes(self) -> UInt8[Tensor, " bytes"]:
        """One message for the wire.

        Returns:
            The tensors one after the other (each padded to 8 bytes) behind a header of 8 bytes and
            8 bytes a tensor that holds their dtypes and sizes.
        """
        sizes = [_padded(tensor.nbytes) for tensor in self.tensors]
        header = [len(self.tensors)]
        header += [(t.numel() << 8) | _DTYPES.index(t.dtype) for t in self.tensors]
        message = self.tensors[0].new_zeros(8 * len(header) + sum(sizes), dtype=torch.uint8)
        message[: 8 * len(header)].view(torch.int64).copy_(torch.tensor(header))
        end = 8 * len(header)
        for tensor, size in zip(self.tensors, sizes, strict=True):
            message[end : end + tensor.nbytes].view(tensor.dtype).copy_(tensor.view(-1))
            end += size
        return message

    @staticmethod
    def from_bytes(
        message: UInt8[Tensor, " bytes"], shape: Sequence[int], dtype: torch.dtype
    ) -> "Payload":
        """Read a message of `to_bytes` back; its tensors are views of the message.

        Args:
            message: The bytes, at an address divisible by 8.
            shape: Shape of the tensor that was compressed.
            dtype: Its dtype.

        Raises:
            ValueError: The message is cut short.
        """
        count = int(message[:8].view(torch.int64))
        sizes = message[8 : 8 * (1 + count)].view(torch.int64).tolist()
        position, tensors = 8 * (1 + count), []
        for size in sizes:
            kind = _DTYPES[size & 255]
            end = position + (size >> 8) * kind.itemsize
            if end > len(message):
                raise ValueError(f"message must hold {end} bytes, got {len(message)}")
            tensors.append(message[position:end].view(kind))
            position = _padded(end)
        return Payload(tuple(tensors), tuple(shape), dtype)


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT


def pack_fields(fields: Int[Tensor, " n"], width: int) -> UInt8[Tensor, " bytes"]:
    """Pack integers of `width` bits tightly into bytes, lowest bit first.

    Args:
        fields: Integers in [0, 2^width).
        width: Bits of each, 1 … 62.

    Returns:
        ceil(n · width / 8) bytes.

    Example:
        >>> pack_fields(torch.tensor([1, 2, 3]), 2)
        tensor([57], dtype=torch.uint8)
    """
    shifts = torch.arange(width, device=fields.device)
    bits = ((fields.long()[:, None] >> shifts) & 1).view(-1)
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=fields.device)).sum(1).to(torch.uint8)


def unpack_fields(packed: UInt8[Tensor, " bytes"], width: int, n: int) -> Int[Tensor, " n"]:
    """Read `n` integers packed by `pack_fields`.

    Args:
        packed: The bytes.
        width: Bits of each integer.
        n: How many integers.

    Returns:
        int64 tensor.

    Example:
        >>> unpack_fields(torch.tensor([57], dtype=torch.uint8), 2, 3)
        tensor([1, 2, 3])
    """
    shifts = torch.arange(8, device=packed.device)
    bits = ((packed.long()[:, None] >> shifts) & 1).view(-1)[: n * width].view(n, width)
    return (bits << torch.arange(width, device=packed.device)).sum(1)
