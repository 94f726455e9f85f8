import platform

import numpy as np
import pytest
import torch
from numba import njit
from torch._subclasses.fake_tensor import FakeTensorMode

from assay.curvature import compute
from assay.kernels import outer_products as module
from assay.kernels.outer_products import outer_products, outer_products_reference


@pytest.fixture
def kernel_for_all(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def factors(samples, rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows)
    left = torch.randn(samples, rows, generator=generator, dtype=dtype)
    return left, torch.randn(samples, columns, generator=generator, dtype=dtype)


# Rows that fill whole lines of the cache, rows that end in the midst of one, rows shorter than one.
@pytest.mark.parametrize("shape", [(5, 7, 48), (5, 300, 125), (3, 4, 7), (2, 1, 65), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("begin", [0, 1, 3])
@pytest.mark.usefixtures("kernel_for_all")
def test_the_kernel_writes_each_product_and_nothing_else(shape, dtype, begin, threads):
    left, right = factors(*shape, dtype)
    size = left.numel() * right.shape[1]
    memory = torch.full((size + begin + 3,), 7.0, dtype=dtype)
    out = memory[begin : begin + size].view(*shape)
    assert outer_products(left, right, out) is out
    assert torch.equal(out, left[:, :, None] * right[:, None, :])
    assert (memory[:begin] == 7).all()
    assert (memory[begin + size :] == 7).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
@pytest.mark.usefixtures("kernel_for_all")
def test_nothing_to_write(shape):
    left, right = factors(*shape, torch.float32)
    assert outer_products(left, right, torch.empty(shape)).shape == shape


@pytest.mark.usefixtures("kernel_for_all")
def test_what_the_kernel_does_not_know_is_left_to_torch():
    left, right = factors(3, 4, 32, torch.float32)
    wanted = left[:, :, None] * right[:, None, :]
    strided = torch.empty(3, 32, 4).mT
    assert torch.equal(outer_products(left, right, strided), wanted)
    across = outer_products(left.T.contiguous().T, right, torch.empty(3, 4, 32))
    assert torch.equal(across, wanted)
    halves = outer_products(left.bfloat16(), right.bfloat16(), wanted.bfloat16().zero_())
    torch.testing.assert_close(halves.float(), wanted, rtol=2e-2, atol=0)


@pytest.mark.usefixtures("kernel_for_all")
def test_special_numbers():
    left = torch.tensor([[0.0, torch.inf, torch.nan, -1e30]])
    right = torch.tensor([[1.0, torch.inf, -0.0, 1e30] * 8])
    ours = outer_products(left, right, torch.empty(1, 4, 32))
    reference = outer_products_reference(left, right, torch.empty(1, 4, 32))
    torch.testing.assert_close(ours, reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("kernel_for_all")
def test_a_graph_that_saved_the_result_notices():
    left, right = factors(2, 3, 16, torch.float32)
    x = torch.ones(2, 3, 16, requires_grad=True)
    out = torch.empty(2, 3, 16)
    loss = (x * out).sum()
    outer_products(left, right, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 assembly")
@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_the_kernel_passes_the_cache_by(number):
    rows = njit(error_model="numpy")(module._rows.py_func)
    rows(0, 0, 0, 0, 0, 1, 1, np.dtype(number).itemsize, number(0))
    (assembly,) = rows.inspect_asm().values()
    assert "movntp" in assembly


def test_large_individual_gradients_are_those_of_the_formula(threads):
    """Large enough for the kernel without being told, in new memory and in that of a result."""
    torch.manual_seed(0)
    net, x, y = torch.nn.Linear(517, 263), torch.randn(70, 517), torch.randint(263, (70,))
    assert module.LARGE < 70 * 517 * 263 * 4
    loss_fn = torch.nn.CrossEntropyLoss()
    residual = net(x).softmax(1) - torch.nn.functional.one_hot(y, 263)
    wanted = residual.detach()[:, :, None] * x[:, None, :]
    new = compute(net, loss_fn, x, y, ["grad_batch"])
    torch.testing.assert_close(new["grad_batch"]["weight"], wanted, rtol=1e-4, atol=1e-6)
    earlier = new["grad_batch"]["weight"]
    earlier.zero_()
    again = compute(net, loss_fn, x, y, ["grad_batch"], out=new)["grad_batch"]["weight"]
    assert again.data_ptr() == earlier.data_ptr()
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("kernel_for_all")
def test_tensors_without_memory_or_between_numbers_are_left_to_torch():
    left, right = factors(3, 4, 32, torch.float32)
    wanted = left[:, :, None] * right[:, None, :]
    between = torch.frombuffer(bytearray(4 * wanted.numel() + 2), dtype=torch.float32, offset=2)
    assert torch.equal(outer_products(left, right, between.view(wanted.shape)), wanted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert outer_products(left, right, torch.empty(3, 4, 32)).shape == (3, 4, 32)
