"""The study-level model against recorded numbers, torch's own encoder, and closed forms."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import by_rule, normal, recorded, relative_error, study
from torch import nn

from echofocus_core.study import attention as packed
from echofocus_core.study import labels as lb
from echofocus_core.study.config import Task
from echofocus_core.study.outputs import Outputs, study_losses
from echofocus_core.study.scaling import scale, unscale

MODELS = {
    "A": dict(n_outputs=22),
    "Amax": dict(n_outputs=22, combine="max"),
    "B": dict(n_outputs=18, depth=5),
    "Q": dict(n_outputs=12, kind="query"),
    "Q0": dict(n_outputs=12, kind="query", depth=0),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_outputs_and_study_embeddings(name):
    """All six studies in one batch give what the published code gave for each alone."""
    numbers, net = recorded("study_parity.npz"), by_rule(**MODELS[name])
    bags = [study(i).flatten(0, 1) for i in range(6)]
    logits, embeddings = net(torch.cat(bags), [len(b) for b in bags])
    for i in range(6):
        assert relative_error(logits[i], numbers[f"{name}/{i}/out"]) < 1e-4
        if f"{name}/{i}/embed" in numbers:
            assert relative_error(embeddings[i], numbers[f"{name}/{i}/embed"]) < 1e-4
    if f"{name}/param_names" in numbers:
        assert list(net.state_dict()) == list(numbers[f"{name}/param_names"])


@pytest.mark.parametrize("kind", ["standard", "query", "multiquery"])
@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_equals_torch_modules(kind, depth):
    """Packed studies and the shortened last layer against torch's modules, a study at a time."""
    net = by_rule(n_outputs=4, kind=kind, depth=depth)
    bags = [torch.from_numpy(normal(n, n, 768)) for n in (3, 17, 5)]
    logits, _ = net(torch.cat(bags), [3, 17, 5])
    for bag, actual in zip(bags, logits, strict=True):
        x = bag if net.queries is None else torch.cat([net.queries, bag])
        x = x[None]
        y = net.encoder(x, x, x)[0] if depth == 0 else net.encoder(x)
        expected = {
            "standard": lambda y: net.ff(y.mean(1))[0],
            "query": lambda y: net.ff(y[:, 0])[0],
            "multiquery": lambda y: net.ff(y[:, :4])[0, :, 0],
        }[kind](y)
        assert relative_error(actual, expected) < 1e-5


def test_training_mode_drops_out():
    net = by_rule(n_outputs=2).train()
    x = torch.from_numpy(normal(0, 6, 768))
    torch.manual_seed(0)
    assert not torch.allclose(net(x, [6])[0], net(x, [6])[0])


def test_study_loss_by_hand():
    """A missing label adds nothing; the sum is divided by the number of all labels."""
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    targets = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    expected = nn.functional.softplus(torch.tensor(-2.0)) / 2  # -log sigmoid(2)
    losses = study_losses(logits, targets, Outputs.of("ab", "binary"))
    assert torch.allclose(losses, torch.stack([expected, torch.tensor(0.0)]))
    squared = study_losses(logits, targets, Outputs.of("ab", "regression"))
    assert torch.allclose(squared, torch.tensor([0.5, 0.0]))


def test_labels_missing_where_another_is_absent_do_not_bias_it():
    """A is known everywhere and present in half, nine labels are known only where A is present:
    the constant probability of A with the least loss is 0.5 (0.09 if divided by known labels)."""
    outputs = Outputs.of("abcdefghij", "binary")
    targets = torch.full((40, 10), torch.nan)
    targets[:20, 0], targets[20:, 0] = 1, 0
    targets[:20, 1:] = (torch.arange(180).reshape(20, 9) % 2).float()
    logits = torch.zeros(10, requires_grad=True)
    study_losses(logits.expand(40, 10), targets, outputs).mean().backward()
    assert abs(logits.grad[0]) < 1e-7


def test_published_scaling_of_labels():
    numbers, published = recorded("measure_parity.npz"), recorded("measure_norm.json")
    labels = [str(name) for name in numbers["measure/labels"]]
    table = pd.DataFrame(numbers["measure/df"], columns=labels)
    actual = lb.scaling_of(table, Task(task_labels=labels, type="regression"))
    for label in labels:
        assert set(actual[label]) == set(published[label])
        for key, value in published[label].items():
            assert actual[label][key] == pytest.approx(value, rel=1e-6)
    scaled = scale(table.to_numpy(), labels, published)
    np.testing.assert_allclose(scaled, numbers["measure/df_normalized_fixed"], atol=1e-9)
    back = unscale(numbers["measure/out_norm"], labels, published)
    assert relative_error(back, numbers["measure/out_unnorm"]) < 1e-4
    np.testing.assert_allclose(unscale(scaled, labels, published), table.to_numpy(), rtol=1e-6)


def test_dropout_on_a_cpu():
    """Mask, scale and gradient as defined; the seed decides; without dropout nothing changes."""
    x, dropout = torch.ones(1000, 768, requires_grad=True), nn.Dropout(0.2)
    y = packed.drop(x, dropout, np.random.default_rng(0))
    kept = y.detach() != 0
    assert kept.float().mean() == pytest.approx(0.8, abs=0.002)
    assert torch.allclose(y[kept], torch.tensor(1.25))
    y.sum().backward()
    assert torch.allclose(x.grad, kept * 1.25)
    assert torch.equal(packed.drop(x, dropout, np.random.default_rng(0)), y)
    assert not torch.equal(packed.drop(x, dropout, np.random.default_rng(1)), y)
    net, bag = by_rule(n_outputs=3, depth=2), torch.from_numpy(normal(5, 30, 768))
    expected = net(bag, [10, 20])[0]
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    assert relative_error(net.train()(bag, [10, 20])[0], expected) < 1e-5
