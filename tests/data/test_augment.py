"""Random crops and flips against a loop over images."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from assay.data import Batches, random_crop_flip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def candidates(image, padding):
    """All images that a shift by up to `padding` and a flip can make."""
    _, height, width = image.shape
    out = set()
    for source in (image, image.flip(-1)):
        padded = F.pad(source, (padding,) * 4)
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                crop = padded[:, top : top + height, left : left + width]
                out.add(tuple(crop.flatten().tolist()))
    return out


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_every_result_is_a_shifted_and_perhaps_mirrored_image(padding):
    x = torch.rand(40, 2, 5, 4, generator=seeded())
    out = random_crop_flip(padding)(x, seeded(1))
    assert out.shape == x.shape
    for image, changed in zip(x, out, strict=True):
        assert tuple(changed.flatten().tolist()) in candidates(image, padding)


def test_every_shift_and_flip_occurs_equally_often():
    image = torch.rand(1, 3, 3, generator=seeded())
    n, outcomes = 18_000, 18
    out = random_crop_flip(1)(image.expand(n, 1, 3, 3), seeded(2)).flatten(1)
    _, counts = out.unique(dim=0, return_counts=True)
    assert len(counts) == outcomes
    chi_squared = ((counts - n / outcomes) ** 2 / (n / outcomes)).sum().item()
    # Mean 17, deviation sqrt(34); beyond 50 has probability below 1e-4.
    assert chi_squared < 50


def test_without_flip_and_padding_it_is_the_identity():
    x = torch.rand(6, 3, 8, 8)
    assert torch.equal(random_crop_flip(0, flip=False)(x, seeded()), x)


def test_the_generator_alone_decides_and_the_input_is_kept():
    x = torch.rand(16, 3, 8, 8)
    before = x.clone()
    transform = random_crop_flip()
    first = transform(x, seeded(7))
    torch.manual_seed(123)
    assert torch.equal(transform(x, seeded(7)), first)
    assert not torch.equal(transform(x, seeded(8)), first)
    assert torch.equal(x, before)


def test_other_dtypes_empty_batches_and_non_contiguous_images():
    transform = random_crop_flip(2)
    x = (torch.rand(5, 3, 8, 6) * 255).to(torch.uint8)
    assert transform(x, seeded()).dtype == torch.uint8
    assert transform(x[:0], seeded()).shape == (0, 3, 8, 6)
    channels_last = x.to(memory_format=torch.channels_last)
    assert torch.equal(transform(channels_last, seeded()), transform(x, seeded()))


def test_it_pickles_and_works_inside_batches():
    transform = pickle.loads(pickle.dumps(random_crop_flip(1)))
    x = torch.rand(6, 1, 4, 4)
    batches = Batches(x, torch.arange(6), 4, generator=seeded(), transform=transform)
    for images, targets in batches:
        for image, target in zip(images, targets, strict=True):
            assert tuple(image.flatten().tolist()) in candidates(x[target], 1)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"padding .* -1"):
        random_crop_flip(-1)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(3, 8, 8\)"):
        random_crop_flip()(torch.zeros(3, 8, 8), seeded())
