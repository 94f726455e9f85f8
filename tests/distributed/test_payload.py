import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.distributed import Payload
from assay.distributed.payload import _DTYPES, pack_fields, unpack_fields


def test_message_gives_back_every_dtype_and_empty_parts():
    tensors = (*(torch.arange(5).to(dtype) for dtype in _DTYPES), torch.empty(0))
    payload = Payload(tensors, (2, 3), torch.bfloat16)
    message = payload.to_bytes()
    # A header of one word and one a tensor; each part padded to whole words.
    padded = sum(-(-t.numel() * t.element_size() // 8) * 8 for t in tensors)
    assert len(message) == 8 * (1 + len(tensors)) + padded
    read = Payload.from_bytes(message, (2, 3), torch.bfloat16)
    assert read.shape == (2, 3)
    assert read.dtype == torch.bfloat16
    for one, two in zip(read.tensors, tensors, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


def test_short_message_is_refused():
    message = Payload((torch.arange(9),), (9,), torch.float32).to_bytes()
    with pytest.raises(ValueError, match="88 bytes, got 80"):
        Payload.from_bytes(message[:-8], (9,), torch.float32)


@given(st.integers(1, 20), st.lists(st.integers(0, 2**20 - 1), max_size=30))
def test_fields_take_their_width_and_come_back(width, values):
    fields = torch.tensor(values, dtype=torch.int64) & ((1 << width) - 1)
    packed = pack_fields(fields, width)
    assert len(packed) == -(-len(values) * width // 8)
    assert torch.equal(unpack_fields(packed, width, len(values)), fields)
