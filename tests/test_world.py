"""Environment variables of torchrun and SLURM that are not valid give one clear error line."""

import pytest

from echofocus_core.base.console import UserError
from echofocus_core.base.world import from_environment, rank_and_size
from echofocus_core.video.studies import shard_from


@pytest.mark.parametrize("value", ["", "x", "-1", "1.0", "1\x1b[2J"])
def test_values_that_are_not_whole_numbers(value, monkeypatch):
    for read, variables in (
        (lambda: from_environment("LOCAL_RANK", 0), {"LOCAL_RANK": value}),
        (lambda: rank_and_size("RANK", "WORLD_SIZE"), {"RANK": "0", "WORLD_SIZE": value}),
        (lambda: rank_and_size("RANK", "WORLD_SIZE"), {"RANK": value, "WORLD_SIZE": "2"}),
        (lambda: shard_from("auto"), {"SLURM_ARRAY_TASK_ID": value}),
        (lambda: shard_from("auto"), {"SLURM_PROCID": value, "SLURM_NTASKS": "2"}),
    ):
        with monkeypatch.context() as patch:
            for name, text in variables.items():
                patch.setenv(name, text)
            with pytest.raises(UserError, match=r"(RANK|SIZE|ID) is .*whole number") as refusal:
                read()
        assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "2"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "3"},
    ],
)
def test_values_that_contradict_each_other(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"RANK|WORLD_SIZE|SLURM"):
        shard_from("auto")
        rank_and_size("RANK", "WORLD_SIZE")


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29500"}, "WORLD_SIZE"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "abc"}, "MASTER_PORT"),
    ],
)
def test_processes_that_cannot_connect(tmp_path, monkeypatch, cli, variables, name):
    """`train` stops with one line before it reads anything."""
    monkeypatch.chdir(tmp_path)
    for unset in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(unset, raising=False)
    for variable, value in ({"WORLD_SIZE": "2", "RANK": "0"} | variables).items():
        monkeypatch.setenv(variable, value)
    status, _, err = cli("train")
    assert status == 1 and err.count("\n") == 1 and name in err, err
