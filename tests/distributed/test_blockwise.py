import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.distributed import (
    Blockwise,
    Compose,
    ErrorFeedback,
    Identity,
    NaturalCompressor,
    Payload,
    RandomK,
    TopK,
)

KINDS = {
    "identity": Identity(),
    "top-k": TopK(0.5),
    "natural": NaturalCompressor(),
    "both": Compose(NaturalCompressor(), TopK(0.5)),
}


@given(st.lists(st.tuples(st.sampled_from(list(KINDS)), st.integers(1, 20)), max_size=6))
def test_blocks_come_back_from_the_wire_as_each_alone(plan):
    x = torch.randn(sum(size for _, size in plan), generator=torch.Generator().manual_seed(0))
    blocks = Blockwise([KINDS[kind] for kind, _ in plan], [size for _, size in plan])
    payload = blocks.compress(x, generator=torch.Generator().manual_seed(1))
    message = Payload.from_bytes(payload.to_bytes(), payload.shape, payload.dtype)
    g = torch.Generator().manual_seed(1)
    parts = x.split([size for _, size in plan])
    alone = [
        KINDS[kind].decompress(KINDS[kind].compress(part, generator=g))
        for (kind, _), part in zip(plan, parts, strict=True)
    ]
    expected = torch.cat(alone) if alone else x
    if plan:
        assert torch.equal(blocks.decompress(message), expected)


def test_table_costs_five_bytes_a_tensor():
    blocks = Blockwise([TopK(0.1), Identity()], [100, 10])
    assert blocks.compress(torch.randn(110)).nbytes == 10 * 8 + 10 * 4 + 3 * 5


def test_memory_of_blocks_is_kept_and_restored():
    def make():
        return Blockwise([ErrorFeedback(TopK(0.25)), Identity()], [4, 2])

    one, two = make(), make()
    g = torch.Generator().manual_seed(0)
    one.compress(torch.randn(6, generator=g))
    two.load_state_dict(one.state_dict())
    x = torch.randn(6, generator=g)
    assert torch.equal(one.decompress(one.compress(x)), two.decompress(two.compress(x)))
    one.reset()
    assert one.state_dict() == {"0": {}}


def test_variance_is_that_of_the_worst_block():
    blocks = Blockwise([NaturalCompressor(), RandomK(0.5)], [10, 10])
    assert blocks.omega(20) == 1.0
    assert blocks.unbiased
    assert not Blockwise([TopK(0.5)], [3]).unbiased


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="one entry for each of 1 compressors, got 2"):
        Blockwise([Identity()], [1, 2])
    with pytest.raises(ValueError, match="must not be negative"):
        Blockwise([Identity()], [-1])
    with pytest.raises(ValueError, match="x must have 3 entries, got 4"):
        Blockwise([Identity()], [3]).compress(torch.ones(4))
