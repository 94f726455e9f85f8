"""The part of the optimisation review that needs ImageNet runs on a few small images."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from assay.data import DataUnavailable
from assay.experiments import optimization_review as review
from assay.functional import evaluate_classifier
from assay.lab import Lab
from dataset_files import write_ilsvrc

TINY = replace(
    review.PRESETS["paper"], imagenet_epochs=3, imagenet_batch=4, imagenet_lr=0.02,
    imagenet_size=40, imagenet_width=4, imagenet_workers=0,
)  # fmt: skip


@pytest.fixture
def images(tmp_path, monkeypatch):
    write_ilsvrc(tmp_path, train=8, test=3)
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path))


def new_lab(directory):
    return Lab(review.PAPER.slug, review.CLAIMS, preset="paper", seeds=(0, 1), directory=directory)


def measured(lab):
    return [(m.seed, m.value) for m in lab.measurements["imagenet-fixup"]]


@pytest.mark.usefixtures("images")
def test_one_difference_a_seed_is_measured_and_a_killed_run_gives_the_same(tmp_path, monkeypatch):
    lab = new_lab(tmp_path / "whole")
    review.measure_fixup(lab, TINY, *review.load_imagenet(lab, TINY))
    [table] = lab.tables
    differences = [(row["seed"], row["Fixup"] - row["BatchNorm"]) for row in table.rows]
    assert measured(lab) == differences
    assert [(d.split, d.samples) for d in lab.datasets] == [("train", 16), ("test", 6)]

    killed, epochs = new_lab(tmp_path / "killed"), []
    evaluate = review.streamed_accuracy

    def die(net, batches):
        epochs.append(1)
        if len(epochs) == 5:  # in the second epoch of the second network
            raise KeyboardInterrupt
        return evaluate(net, batches)

    monkeypatch.setattr(review, "streamed_accuracy", die)
    with pytest.raises(KeyboardInterrupt):
        review.measure_fixup(killed, TINY, *review.load_imagenet(killed, TINY))
    resumed = new_lab(tmp_path / "killed")
    review.measure_fixup(resumed, TINY, *review.load_imagenet(resumed, TINY))
    assert len(epochs) == 5 + 12 - 4
    assert measured(resumed) == measured(lab)
    for name in lab.curves:
        curve = f"curves/{name}.csv"
        whole, again = (tmp_path / run / curve for run in ("whole", "killed"))
        assert whole.read_text() == again.read_text()


@pytest.mark.usefixtures("images")
def test_both_networks_learn_to_tell_red_from_blue(tmp_path):
    lab = new_lab(tmp_path / "run")
    config = replace(TINY, imagenet_epochs=12, imagenet_width=8)
    train, test = review.load_imagenet(lab, config)
    for fixup in (True, False):
        assert review.train_resnet(lab, config, train, test, fixup, 0) == 1.0


def test_imagenet_is_left_out_below_the_papers_scale_and_missed_at_once_there(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path))
    lab = new_lab(tmp_path)
    for preset in ("smoke", "small"):
        assert review.load_imagenet(lab, review.PRESETS[preset]) is None
    with pytest.raises(DataUnavailable, match="imagenet/train"):
        review.run(lab, review.PRESETS["paper"])
    assert not any(lab.measurements.values())


def test_only_the_scalars_of_fixup_have_a_tenth_of_the_learning_rate(tmp_path):
    lab = new_lab(tmp_path)
    for fixup, scalars in ((True, 1 + 16 * 7), (False, 0)):
        net = review.make_resnet(lab, TINY, 2, fixup, 0)
        weights, small = review.resnet_optimizer(net, 0.1).param_groups
        assert (weights["lr"], small["lr"]) == (0.1, 0.01)
        assert sum(p.numel() for p in small["params"]) == scalars
        assert len(weights["params"]) + scalars == len(list(net.parameters()))


def test_mixup_mixes_images_and_labels_by_the_same_share():
    torch.manual_seed(0)
    examples = [(F.one_hot(torch.tensor(i), 6).float().view(6, 1, 1), i) for i in range(6)]
    x, y = review.Mixup(0.7, 6)(examples)
    assert torch.equal(x.flatten(1), y)
    torch.testing.assert_close(y.sum(1), torch.ones(6))
    share, mixed = y.diagonal(), (y > 0).sum(1) == 2
    assert mixed.any()
    assert torch.equal(share[mixed], share[mixed][0].expand(int(mixed.sum())))
    assert torch.equal(share[~mixed], torch.ones(6 - int(mixed.sum())))


def test_streamed_accuracy_is_that_of_all_images_at_once():
    torch.manual_seed(0)
    x, y = torch.randn(23, 4), torch.randint(3, (23,))
    net = torch.nn.Linear(4, 3)
    loader = DataLoader(list(zip(x, y, strict=True)), batch_size=5)
    assert review.streamed_accuracy(net, loader) == evaluate_classifier(net, x, y)["accuracy"]
