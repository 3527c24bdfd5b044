"""Changes of ultrasound images, against their definitions."""

import numpy as np
import pytest

from echofocus_core.base.console import UserError
from echofocus_core.video.perturb import perturb, read_perturbations, sector_coordinates

HEIGHT = 101


@pytest.fixture
def sector():
    """A sector of 51 degrees below the middle of the first row, (101, 101, 1)."""
    y, x = np.mgrid[:HEIGHT, :HEIGHT]
    inside = (abs(x - 50) <= 0.48 * y) & (np.hypot(x - 50, y) <= 100)
    return inside[:, :, None].astype(np.uint8)


def changed(sector, value=120, n=2, **strengths):
    frames = [np.full((HEIGHT, HEIGHT, 3), value, np.uint8)] * n
    return np.stack(perturb(frames, sector, strengths, np.random.default_rng(0))).astype(int)


def test_depth_is_a_ramp_from_the_transducer(sector):
    frames = changed(sector, depth=0.4)
    for y in (0, 25, 50, 100):
        assert frames[0, y, 50, 0] == pytest.approx(120 - 0.4 * 255 * y / 100, abs=0.51)
    assert (frames[:, sector[:, :, 0] == 0] == 120).all()


def test_gain_adds_and_saturates(sector):
    inside = sector[:, :, 0] > 0
    assert (changed(sector, gain=0.2)[:, inside] == 171).all()
    assert (changed(sector, gain=-0.2)[:, inside] == 69).all()
    assert changed(sector, value=250, gain=0.5).max() == 255


def test_a_shadow_covers_its_share_of_the_angle(sector):
    dark = changed(sector, shadow=0.3)[0, :, :, 0] < 60
    distance, angle = sector_coordinates(sector[:, :, 0] > 0)
    deep = (sector[:, :, 0] > 0) & (distance > 0.6)
    assert dark[deep].mean() == pytest.approx(0.3, abs=0.05)
    assert np.ptp(angle[dark]) == pytest.approx(0.3, abs=0.02)
    assert not dark[(distance < 0.1) | (sector[:, :, 0] == 0)].any()


def test_speckle_has_its_standard_deviation_and_the_skew_of_log_rayleigh(sector):
    inside = sector[:, :, 0] > 0
    noise = changed(sector, n=6, speckle=0.1)[:, inside][:, :, 0] - 120
    assert noise.mean() == pytest.approx(0, abs=3)
    assert noise.std() == pytest.approx(25.5, rel=0.12)
    skew = ((noise - noise.mean()) ** 3).mean() / noise.std() ** 3
    assert skew < -0.5  # dark holes: the logarithm of a Rayleigh amplitude has skew -1.14
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.1  # each frame has its own


def test_what_is_typed():
    assert list(read_perturbations(["gain=-0.1", "depth=0.5"])) == ["depth", "gain"]
    for text in ("blur=1", "depth", "depth=x", "shadow=2", "depth=-1"):
        with pytest.raises(UserError, match="--perturb"):
            read_perturbations([text])
