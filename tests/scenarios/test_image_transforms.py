"""From stored pixels to a network's input."""

import pytest
import torch

from cl_platform.scenarios import ScenarioConfig, TransformConfig, Transforms
from cl_platform.scenarios.transforms import crop_matrices

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def _images(count=6, height=32, width=32):
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _transforms(size=32, **keys):
    return Transforms(TransformConfig(**keys), size, MEAN, STD)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_an_image_of_the_right_size_keeps_its_exact_values():
    images = _images()
    wanted = (images.float() / 255.0 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(_transforms().evaluate(images), wanted)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("test_transform", ["resize", "resize_crop"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_does_not_depend_on_batch_mates(size, test_transform, interpolation):
    transforms = _transforms(size, test_transform=test_transform, interpolation=interpolation)
    together = transforms.evaluate(_images())
    assert together.shape == (6, 3, size, size)
    alone = torch.cat([transforms.evaluate(image[None]) for image in _images()])
    assert torch.allclose(together, alone, atol=1e-5)


def test_resize_crop_cuts_the_centre_of_256_to_224():
    transforms = _transforms(224, test_transform="resize_crop")
    images = _images(2, 256, 256)
    inner = images[:, :, 16:240, 16:240]
    assert torch.allclose(transforms.evaluate(images), _transforms(224).evaluate(inner), atol=1e-6)


@pytest.mark.parametrize("augment", ["crop", "crop_flip", "resized_crop"])
@pytest.mark.parametrize("size", [16, 32, 48])
def test_training_draws_from_the_given_generator_alone(augment, size):
    transforms = _transforms(size, augment=augment)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again = (transforms.train(_images(), _generator()) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.shape == (6, 3, size, size)
    assert torch.equal(first, again)
    assert not torch.equal(first, transforms.train(_images(), _generator(1)))


def test_without_augmentation_training_is_evaluation_and_draws_nothing():
    generator = _generator()
    before = generator.get_state()
    transforms = _transforms(16)
    assert transforms.deterministic
    assert torch.equal(transforms.train(_images(), generator), transforms.evaluate(_images()))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_a_crop_is_a_window_of_the_padded_image(augment):
    images = _images(40)
    cut = Transforms(TransformConfig(augment=augment), 32, (0, 0, 0), (1, 1, 1)).train(images, _generator())
    padded = torch.nn.functional.pad(images.float() / 255.0, (4, 4, 4, 4))
    mirrored = 0
    for image, result in zip(padded, cut, strict=True):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)  # (9, 9, 3, 32, 32)
        straight = (windows == result).flatten(2).all(2).any()
        turned = (windows == result.flip(2)).flatten(2).all(2).any()
        assert straight or turned
        mirrored += int(turned)
    assert 0 < mirrored < 40 if augment == "crop_flip" else mirrored == 0


def test_random_crops_stay_within_the_image_and_the_range_of_areas():
    theta = crop_matrices(2000, (0.05, 1.0), _generator())
    width, height = theta[:, 0, 0].abs(), theta[:, 1, 1]
    assert ((theta[:, 0, 2].abs() + width) <= 1.0 + 1e-6).all()
    assert ((theta[:, 1, 2].abs() + height) <= 1.0 + 1e-6).all()
    assert (width * height).min() >= 0.05 - 1e-6
    ratio = width / height
    assert ratio.min() >= 0.75 - 1e-6
    assert ratio.max() <= 4 / 3 + 1e-6
    assert 0.4 < (theta[:, 0, 0] < 0).float().mean() < 0.6


def test_the_whole_image_as_crop_is_the_image_or_its_mirror():
    images = _images()
    transforms = _transforms(augment="resized_crop", augment_scale=(1.0, 1.0), interpolation="bilinear")
    plain = transforms.evaluate(images)
    for result, straight in zip(transforms.train(images, _generator()), plain, strict=True):
        assert torch.allclose(result, straight, atol=1e-4) or torch.allclose(result, straight.flip(2), atol=1e-4)


def test_the_id_names_all_that_changes_an_evaluation():
    ids = {
        _transforms().id,
        _transforms(16).id,
        _transforms(interpolation="bilinear").id,
        _transforms(test_transform="resize_crop").id,
        Transforms(TransformConfig(), 32, STD, MEAN).id,
    }
    assert len(ids) == 5
    assert _transforms(augment="crop").id == _transforms().id


def test_a_scenario_hands_its_keys_over():
    scenario = ScenarioConfig(kind="x", augment="resized_crop", augment_scale=(0.1, 0.9), interpolation="bilinear")
    config = Transforms.from_scenario(scenario, 32, MEAN, STD).config
    assert (config.augment, config.augment_scale, config.interpolation) == ("resized_crop", (0.1, 0.9), "bilinear")
