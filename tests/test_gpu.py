"""A CUDA device gives the numbers of the CPU, for the study model and for the encoder."""

import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import copy_example

from echofocus_core.video import extract

pytestmark = pytest.mark.gpu
DEVICES = ("cpu", "cuda")


def close(a, b, tolerance):
    scale = max(np.abs(a).max(), 1e-6)
    assert np.abs(a - b).max() < tolerance * scale


@pytest.mark.parametrize("kind", ["standard", "query", "multiquery"])
def test_a_model_trained_on_a_gpu_gives_equal_predictions_on_both(cohort, cli, kind):
    line = ("train", "--task", "defect", "--epoch_lim", "2", "--transformer_type", kind)
    status, _, err = cli(*line, "--device", "cuda")
    assert status == 0, err
    predictions = []
    for device in DEVICES:
        assert cli("predict", "--device", device, "--out", f"{device}.csv")[0] == 0
        assert cli("explain", "--device", device)[0] == 0
        table = pd.read_csv(f"{device}.csv")
        predictions.append(table["finding"].to_numpy())
    close(*predictions, 1e-4)


def test_losses_of_training_on_a_gpu_and_a_cpu(cohort, cli):
    """Losses are close; random numbers differ by device."""
    losses = {}
    for device in DEVICES:
        line = ("train", "--task", "sizes", "--epoch_lim", "2", "--clip_dropout", "0")
        assert cli(*line, "--device", device, "--run_id", device)[0] == 0
        table = pd.read_csv(f"trained_models/sizes_{device}/train_losses.csv")
        losses[device] = table[["train_loss", "val_loss"]].to_numpy()
    assert np.isfinite(losses["cuda"]).all()
    close(losses["cpu"], losses["cuda"], 0.2)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 3e-2)])
def test_extraction_on_a_gpu(tmp_path, cli, precision, tolerance):
    (tmp_path / "videos" / "s").mkdir(parents=True)
    copy_example(tmp_path / "videos" / "s" / "a.dcm")
    results = []
    for device in DEVICES:
        line = (tmp_path / "videos", "--out", tmp_path / device, "--weights", "random")
        options = ("--device", device, "--precision", precision if device == "cuda" else "fp32")
        status, out, err = cli(*line, *options, "--n_clips", "2", main=extract.main)
        assert status == 0, out + err
        (path,) = (tmp_path / device).glob("*.hdf5")
        with h5py.File(path) as f:
            results.append(f["embeddings"][:])
    close(*results, tolerance)
