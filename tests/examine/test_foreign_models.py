"""Networks of other people go through every panel, and come out as they were, bit for bit."""

import copy

import pytest
import torch

from assay.examine import all_panels, examine
from examine.foreign import FOREIGN, make

# What cannot make sense: everything else has to be done.
NOT_APPLICABLE = {
    "regression": {"boundary", "dynamics"},
    "tagger": {"boundary", "dynamics"},
    "token-transformer": {"boundary", "dynamics"},
    "vision-transformer": {"dynamics"},  # parameters of its own that nobody can reinitialise
}


def state(model):
    """Everything that an examination might change."""
    tensors = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    flags = {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    }
    grads = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return tensors, flags, grads


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_network_goes_through_every_panel(name, tmp_path):
    model, data, call = make(name)
    model.train()  # a user may hand it over so
    before = state(copy.deepcopy(model))
    random = torch.get_rng_state()
    report = examine(model, data, call=call, budget=20, samples=96, output=tmp_path)
    tensors, flags, grads = state(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[key], before[0][key]) for key in tensors)
    assert (flags, grads) == before[1:]
    assert torch.equal(torch.get_rng_state(), random)
    statuses = {panel.name: panel.status for panel in report.panels}
    reasons = {panel.name: panel.reason for panel in report.panels}
    left_out = {panel for panel, status in statuses.items() if status == "not applicable"}
    assert left_out <= NOT_APPLICABLE.get(name, set()), reasons
    assert all(status == "done" for panel, status in statuses.items() if panel not in left_out), (
        reasons
    )
    assert len(statuses) == len(all_panels())
    for panel in report.panels:
        assert not any("changed" in note for note in panel.notes), (panel.name, panel.notes)
        for metric in panel.metrics:
            assert metric.method, metric.name
            assert metric.reading, metric.name
        if panel.status == "done":
            assert panel.metrics, panel.name
            assert panel.reading, panel.name
            assert panel.method, panel.name
