"""What torchrun and SLURM say in the environment: used where it is sound, else one clear line."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common.console import UserError
from common.world import from_environment, place
from embed.studies import shard_from

ODD = ["", "x", "-1", "1.0", "1e3", " 1", "\u0663", "9" * 40, "1\x1b[2J"]


@pytest.mark.parametrize("value", ODD)
def test_odd_values_are_named(value):
    for read in (
        lambda: from_environment("LOCAL_RANK", 0, environment={"LOCAL_RANK": value}),
        lambda: place("RANK", "WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": value}),
        lambda: place("RANK", "WORLD_SIZE", {"RANK": value, "WORLD_SIZE": "2"}),
        lambda: shard_from("auto", {"SLURM_ARRAY_TASK_ID": value}),
        lambda: shard_from("auto", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": value}),
        lambda: shard_from("auto", {"SLURM_PROCID": value, "SLURM_NTASKS": "2"}),
    ):
        with pytest.raises(UserError, match=r"(RANK|SIZE|ID|MIN) in the environment is") as refusal:
            read()
        assert str(refusal.value).isprintable() and "unset" in str(refusal.value)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "2"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "3"},
    ],
)
def test_what_contradicts_itself(environment):
    with pytest.raises(UserError, match=r"RANK|WORLD_SIZE|SLURM"):
        shard_from("auto", environment)
        place("RANK", "WORLD_SIZE", environment)


def test_by_the_command_line(tmp_path):
    """`train` and the rest end in one line before anything is read."""
    for command, name in (("train", "WORLD_SIZE"), ("embed", "WORLD_SIZE"), ("train", "RANK")):
        environment = os.environ | {"WORLD_SIZE": "1", "RANK": "0", name: "many"}
        line = [sys.executable, ROOT / "echofocus.py", command]
        done = subprocess.run(
            line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert f"{name} in the environment is 'many'" in done.stderr
