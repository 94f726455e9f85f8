"""Architectures: parameter counts, receptive geometry, and what every model must survive."""

import copy
import io
import pickle
from itertools import pairwise

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from assay import models
from assay.models import (
    MLP,
    AllCNNC,
    CifarResNet,
    LeNet5,
    PreResNet,
    ResNet20,
    ResNet50,
    ThreeConvThreeDense,
    VGGSmall,
    WideResNet,
)
from assay.models.resnet import PaddedShortcut
from assay.optim import fixup_


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


SMALL = {
    "mlp": (lambda: MLP((12, 7, 5, 4), dropout=0.5, batch_norm=True), (3, 2, 2)),
    "lenet5": (lambda: LeNet5(4), (1, 28, 28)),
    "3c3d": (lambda: ThreeConvThreeDense(4), (3, 32, 32)),
    "all-cnn-c": (lambda: AllCNNC(4), (3, 32, 32)),
    "resnet": (lambda: CifarResNet(8, 4, width=4), (3, 32, 32)),
    "resnet50": (lambda: ResNet50(4, width=4), (3, 48, 48)),
    "resnet50-plain": (lambda: ResNet50(4, width=4, norm=False), (3, 48, 48)),
    "preresnet": (lambda: PreResNet(11, 4), (3, 32, 32)),
    "wide-resnet": (lambda: WideResNet(10, 1, 4, dropout=0.3), (3, 32, 32)),
    "vgg": (lambda: VGGSmall(4, width=2), (3, 32, 32)),
}


@pytest.fixture(params=SMALL)
def small(request):
    torch.manual_seed(0)
    make, shape = SMALL[request.param]
    return make().double(), torch.randn(3, *shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (LeNet5(), 61_706),
        (LeNet5(in_channels=3, image_size=32), 62_006),
        (ThreeConvThreeDense(), 895_210),
        (AllCNNC(100), 1_387_108),
        # Published as 0.27, 0.46, 0.66, 0.85 and 1.7 million.
        (ResNet20(), 269_722),
        (CifarResNet(32), 464_154),
        (CifarResNet(44), 658_586),
        (CifarResNet(56), 853_018),
        (CifarResNet(110), 1_727_962),
        (PreResNet(164), 1_703_258),
        (VGGSmall(width=64), 14_728_266),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_parameter_counts_are_the_known_ones(model, parameters):
    assert count(model) == parameters


def test_wide_resnet_28_10_has_its_published_size():
    with torch.device("meta"):
        assert count(WideResNet(28, 10)) == 36_479_194


def test_resnet_50_has_its_known_size_and_without_norm_no_bias_but_two():
    with torch.device("meta"):
        with_norm, without = ResNet50(), ResNet50(norm=False)
    assert count(with_norm) == 25_557_032
    norms = sum(count(m) for m in with_norm.modules() if isinstance(m, nn.BatchNorm2d))
    assert count(without) == 25_557_032 - norms + 1
    biases = [name for name, _ in without.named_parameters() if "bias" in name]
    assert biases == ["norm1.bias", "linear.bias"]


def test_resnet_50_halves_the_image_in_the_3x3_convolutions():
    model = ResNet50(width=4)
    strides = {
        name: m.stride[0]
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m.stride[0] > 1
    }
    stages = [f"stage{i}.0.{place}" for i in (2, 3, 4) for place in ("branch.conv2", "shortcut.0")]
    assert strides == dict.fromkeys(["conv1", *stages], 2)
    assert model.eval()[:-3](torch.zeros(1, 3, 224, 224)).shape == (1, 128, 7, 7)


def test_fixup_silences_the_branches_of_resnet_50():
    torch.manual_seed(0)
    model = ResNet50(5, width=4, norm=False).double()
    before = count(model)
    fixup_(model, model.branches, head=model.linear)
    # In each of 16 branches: before 3 convolutions and 2 activations, a multiplier, a last bias.
    assert count(model) == before + 16 * 7
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    block = model.stage2[0]
    maps = model[:5](x)
    assert torch.equal(block(maps), block.shortcut(maps).relu())
    assert not model(x).any()


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("width", [4, 16])
def test_resnet_size_follows_the_closed_form(blocks, width):
    def block(i, o):
        return 9 * i * o + 9 * o * o + 4 * o

    stages = [(width, width), (width, 2 * width), (2 * width, 4 * width)]
    body = sum(block(i, o) + (blocks - 1) * block(o, o) for i, o in stages)
    expected = 27 * width + 2 * width + body + 40 * width + 10
    assert count(CifarResNet(6 * blocks + 2, width=width)) == expected


@pytest.mark.parametrize("batch_norm", [False, True])
def test_mlp_size_follows_the_closed_form(batch_norm):
    sizes = (784, 100, 50, 10)
    weights = sum(a * b + b for a, b in pairwise(sizes))
    assert count(MLP(sizes, batch_norm=batch_norm)) == weights + batch_norm * 2 * (100 + 50)


def test_mlp_computes_the_composition_of_its_layers():
    torch.manual_seed(0)
    model = MLP((6, 5, 4), activation="tanh").double()
    x = torch.randn(7, 1, 2, 3, dtype=torch.float64)
    hidden = torch.tanh(x.flatten(1) @ model.linear1.weight.T + model.linear1.bias)
    expected = hidden @ model.linear2.weight.T + model.linear2.bias
    torch.testing.assert_close(model(x), expected)


def test_mlp_takes_a_factory_as_activation():
    model = MLP((3, 4, 4, 2), activation=lambda: nn.Softplus(beta=3))
    assert [m.beta for m in model.modules() if isinstance(m, nn.Softplus)] == [3, 3]


def test_mlp_without_hidden_layers_is_linear():
    assert [name for name, _ in MLP((4, 2)).named_children()] == ["flatten", "linear1"]


def test_3c3d_pools_with_same_padding():
    """TensorFlow's "same" pads an even map by one pixel of -inf at the right and bottom."""
    model = ThreeConvThreeDense()
    for name, size in (("pool1", 28), ("pool2", 12), ("pool3", 6)):
        x = torch.randn(2, 3, size, size)
        padded = F.pad(x, (0, 1, 0, 1), value=float("-inf"))
        assert torch.equal(model.get_submodule(name)(x), F.max_pool2d(padded, 3, 2))


def test_3c3d_is_initialised_as_in_deepobs():
    torch.manual_seed(0)
    model = ThreeConvThreeDense()
    weight = model.conv2.weight
    fan_in, fan_out = 64 * 9, 96 * 9
    deviation = (2 / (fan_in + fan_out)) ** 0.5
    # The relative error of a deviation from n normal numbers is about 1 / sqrt(2n) = 0.003.
    assert weight.std().item() == pytest.approx(deviation, rel=0.015)
    bound = (6 / (1152 + 512)) ** 0.5
    assert 0.999 * bound < model.linear1.weight.abs().max() <= bound
    assert not any(m.bias.any() for m in model if hasattr(m, "bias"))


def test_all_cnn_c_shapes_and_dropout():
    model = AllCNNC(100)
    dropout = {name: m.p for name, m in model.named_children() if isinstance(m, nn.Dropout)}
    assert dropout == {"dropout1": 0.2, "dropout2": 0.5, "dropout3": 0.5}
    assert not any(isinstance(m, nn.Dropout) for m in AllCNNC(dropout=False))
    x, sizes = torch.zeros(1, 3, 32, 32), []
    for module in model:
        x = module(x)
        if isinstance(module, nn.Conv2d):
            sizes.append(tuple(x.shape[1:]))
    wide = [(96, 32, 32)] * 2 + [(96, 16, 16)] + [(192, 16, 16)] * 2 + [(192, 8, 8)]
    assert sizes == [*wide, (192, 6, 6), (192, 6, 6), (100, 6, 6)]


def test_padded_shortcut_keeps_the_old_maps_in_the_middle():
    x = torch.randn(2, 4, 7, 8)
    out = PaddedShortcut(4, 10, 2)(x)
    assert torch.equal(out[:, 3:7], x[:, :, ::2, ::2])
    assert not out[:, :3].any()
    assert not out[:, 7:].any()


def test_residual_block_with_silent_branch_is_its_shortcut():
    model = CifarResNet(8, width=4).eval()
    block = model.stage2[0]
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), block.shortcut(x))


def test_weighted_layers_equal_the_depth():
    """The depth counts convolutions on the main path and linear layers."""

    def depth(model):
        main = [
            m
            for name, m in model.named_modules()
            if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name
        ]
        return len(main)

    assert depth(CifarResNet(44)) == 44
    assert depth(PreResNet(29)) == 29
    assert depth(ResNet50(width=1)) == 50
    # Zagoruyko and Komodakis count the three projections and the linear layer is left out.
    assert depth(WideResNet(16, 1)) + 3 - 1 == 16
    assert depth(VGGSmall(width=1)) == 14


def test_output_shape_and_gradients(small):
    model, x = small
    out = model(x)
    assert out.shape == (3, 4)
    assert out.dtype == torch.float64
    F.cross_entropy(out, torch.tensor([0, 1, 2])).backward()
    # All-CNN-C ends in a ReLU and dropout may silence a path, so zeros are possible, None is not.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_empty_batch(small):
    model, x = small
    assert model.eval()(x[:0]).shape == (0, 4)


def test_non_contiguous_input(small):
    model, x = small
    model.eval()
    twisted = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not twisted.is_contiguous()
    torch.testing.assert_close(model(twisted), model(x))


def test_copies_and_state_dict_give_the_same_function(small):
    model, x = small
    model(x)  # moves the running statistics of batch normalisation
    model.eval()
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    blank = copy.deepcopy(model)
    for tensor in blank.state_dict().values():
        tensor.zero_()
    blank.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(model), blank):
        assert torch.equal(twin(x), expected)


def test_pickle_keeps_the_function():
    model = MLP((4, 3, 2), activation="gelu", batch_norm=True).eval()
    x = torch.randn(5, 4)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_torch_compile_agrees(name, monkeypatch):
    torch.manual_seed(0)
    # The run-time shape checks of the tests cannot be traced.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    make, shape = SMALL[name]
    model = make().double().eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_slice_of_a_chain_is_a_plain_sequential_with_the_same_layers():
    model = MLP((6, 5, 4, 3))
    features = model[:-1]
    assert type(features) is nn.Sequential
    assert [name for name, _ in features.named_children()][-1] == "activation2"
    x = torch.randn(2, 6)
    assert torch.equal(model[-1](features(x)), model(x))
    assert type(ResNet20()[:4]) is nn.Sequential


def test_registry_builds_every_name():
    with torch.device("meta"):
        for name in models.names():
            channels = 1 if name == "lenet5" else 3
            model = models.build(name, num_classes=7, in_channels=channels)
            size = 28 if name == "lenet5" else 32
            assert model.eval()(torch.zeros(1, channels, size, size)).shape == (1, 7)


def test_registry_passes_options_and_suggests_names():
    assert count(models.build("vgg-small", width=4)) == count(VGGSmall(width=4))
    with pytest.raises(ValueError, match="'resnet20'"):
        models.build("ResNet-20")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP((4,)), r"sizes .*\(4,\)"),
        (lambda: MLP((4, 0, 2)), "sizes"),
        (lambda: MLP((4, 3, 2), dropout=1.0), "dropout .* 1.0"),
        (lambda: MLP((4, 3, 2), activation="rellu"), "activation .*'rellu'"),
        (lambda: LeNet5(image_size=30), "image_size .* 30"),
        (lambda: CifarResNet(21), "depth .* 21"),
        (lambda: PreResNet(21), "depth .* 21"),
        (lambda: WideResNet(28 + 1), "depth .* 29"),
        (lambda: VGGSmall(width=0), "width .* 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
