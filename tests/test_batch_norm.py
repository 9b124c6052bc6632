"""Batch norms in two processes over gloo, each with half of every batch, match those of one with whole batches."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from building import TINY_CNN
from real_command import FORKS
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from modeling_deit_ti.batch_norm import synchronise_batch_norms


def cnn_of_timm() -> nn.Module:
    return timm.create_model(TINY_CNN, num_classes=10)  # its batch norms include activations


def cnn_of_torch() -> nn.Module:
    """With every kind of torch batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, 6, kernel_size=3, stride=4),
        nn.BatchNorm2d(6, affine=False),
        nn.Conv2d(6, 4, kernel_size=3),
        nn.BatchNorm2d(4, momentum=None),
        nn.Unflatten(1, (4, 1)),
        nn.BatchNorm3d(4),
        nn.Flatten(),
        nn.BatchNorm1d(4 * 6 * 6, track_running_stats=False),
        nn.Linear(4 * 6 * 6, 10),
    )


def losses_and_state(build, rank: int = 0, processes: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    network = build().double()  # so that rounding errors, which ReLUs amplify, do not show
    batches = [(torch.randn(16, 3, 32, 32).double() * 3 + 2, torch.randint(10, (16,))) for _ in range(5)]
    model = network
    if processes > 1:
        synchronise_batch_norms(network, torch.device("cpu"))
        model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images.chunk(processes)[rank]), labels.chunk(processes)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network.state_dict()


def train_in_one_of_two(build, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(losses_and_state(build, rank, processes=2), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("build", [cnn_of_timm, cnn_of_torch])
def test_losses_weights_and_statistics_match_one_process(build, tmp_path):
    processes = [FORKS.Process(target=train_in_one_of_two, args=(build, rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    (first, state), (second, other_state) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    losses, expected = losses_and_state(build)
    assert [sum(pair) / 2 for pair in zip(first, second, strict=True)] == pytest.approx(losses, rel=1e-12)
    assert state.keys() == other_state.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-9, atol=1e-9, msg=name)
        assert torch.equal(state[name], other_state[name]), name


def test_synchronising_does_not_change_evaluation():
    torch.manual_seed(0)
    network, images = cnn_of_timm(), torch.randn(4, 3, 32, 32)
    network(images)  # moves the statistics from their initial values
    synchronised = copy.deepcopy(network)
    synchronise_batch_norms(synchronised, torch.device("cpu"))
    torch.testing.assert_close(synchronised.eval()(images), network.eval()(images), rtol=0, atol=0)
