"""The demo on a few studies, and the properties of the phantoms."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from echofocus_core.base.console import UserError
from echofocus_core.report import demo
from echofocus_core.video import phantom


@pytest.mark.slow
def test_demo(tmp_path):
    line = [sys.executable, ROOT / "echofocus.py", "demo", "--studies", "22"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("embed/extract.py videos", "train --task ef", "train --task defect", "evaluate",
                 "predict --task ef --videos real", "embed --task ef", "explain"):  # fmt: skip
        assert step in done.stdout
    assert "RANDOM" in done.stdout and "Septal defect" in done.stdout
    models = tmp_path / "demo" / "trained_models"
    assert list(pd.read_csv(models.parent / "real.csv")["eid"]) == ["sonosite"]
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000


def test_the_demo_does_not_overwrite_other_tables(tmp_path):
    (tmp_path / "labels.csv").write_text("pid,eid,age\n")
    with pytest.raises(UserError, match=r"labels\.csv"):
        demo.make_demo(tmp_path, 1)
    assert (tmp_path / "labels.csv").read_text() == "pid,eid,age\n"


@pytest.mark.parametrize("ef", [25.0, 62.0])
def test_phantom_volumes_have_the_stated_ejection_fraction(ef):
    heart = phantom.draw_heart(ef, np.random.default_rng(0))
    long, short = phantom.cavity_axes(heart, np.linspace(0, 1, 400))
    volumes = np.pi / 6 * long * short**2  # of an ellipsoid
    assert 100 * (1 - volumes.min() / volumes.max()) == pytest.approx(ef, rel=1e-6)


def test_cohort_is_a_function_of_its_seed(tmp_path):
    phantom.make_cohort(tmp_path / "a", studies=2)
    phantom.make_cohort(tmp_path / "b", studies=3)
    a, b = (pd.read_csv(tmp_path / x / "labels.csv") for x in "ab")
    pd.testing.assert_frame_equal(a, b[:2])
    for path in (tmp_path / "a").glob("videos/*/*.avi"):
        twin = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == twin.read_bytes()
    findings = pd.read_csv(tmp_path / "b" / "findings.csv")
    assert set(findings[findings["shows_defect"] == 1]["video"]) <= {
        f"{view}.avi" for view in phantom.DEFECT_VIEWS
    }
