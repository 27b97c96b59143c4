"""Flips and crops: against brute force, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from cure_plugin.datasets import ImageData
from cure_plugin.errors import SpecError
from cure_plugin.training import augmented


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_every_result_is_a_window_of_the_padded_image_or_its_mirror() -> None:
    x = torch.rand(64, 2, 6, 7, generator=generator())
    results = augmented(x, flip=True, crop=5, pad=1, generator=generator())
    assert results.shape == (64, 2, 5, 5)
    mirrored = places = 0
    seen = set()
    for image, result in zip(x, results, strict=True):
        hits = []
        for flip in (False, True):
            source = image.flip(2) if flip else image
            padded = torch.nn.functional.pad(source[None], (1, 1, 1, 1), mode="replicate")[0]
            hits += [
                (flip, top, left)
                for top in range(4)
                for left in range(5)
                if torch.equal(padded[:, top : top + 5, left : left + 5], result)
            ]
        assert hits
        mirrored += hits[0][0]
        seen.add(hits[0][1:])
        places += 1
    assert 16 < mirrored < 48 and len(seen) > 12 and places == 64


def test_the_same_seed_gives_the_same_batch() -> None:
    x = torch.rand(8, 1, 6, 6, generator=generator())
    first, second = (augmented(x, True, 4, 2, generator()) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(augmented(x), x)


def test_crops_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match="crop 9 is larger than the padded images, 8 x 8"):
        augmented(torch.rand(1, 1, 6, 6), crop=9, pad=1)


def test_centre_crop() -> None:
    data = ImageData(torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6), torch.zeros(1, dtype=torch.long), 10)
    assert data.centre_crop(2, 4).images[0, 0].tolist() == [[13, 14, 15, 16], [19, 20, 21, 22]]
    assert torch.equal(data.centre_crop(6, 6).images, data.images)
    with pytest.raises(SpecError, match="cannot cut 7 x 6"):
        data.centre_crop(7, 6)
