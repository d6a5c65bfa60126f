"""Training by several processes: what one computes, and the same on each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mars_runtime.errors import OptionError  # noqa: E402
from tvm_mars.qat import PruningPlan, Quantization, Trainer, prepare  # noqa: E402
from tvm_mars.qat.data import Augmentation, Images  # noqa: E402
from tvm_mars.qat.models import plain  # noqa: E402
from tvm_mars.qat.ranks import AllRanksNorm, RankError, Ranks  # noqa: E402
from tvm_mars.qat.recipe import Distillation, Recipe, Training  # noqa: E402

RANKS = 2
SHORT = Training(epochs=2, batch=8, learning_rate=0.02, warmup=0.5)
DENSE = Recipe("dense", f"{__name__}:small", training=SHORT)
ALL = attrs.evolve(
    DENSE,
    name="all",
    init="dense",
    training=attrs.evolve(SHORT, ema=0.9, gradient_clip=1.0, freeze_statistics=0.7),
    augmentation=Augmentation(shift=1, cutout=2),
    quantization=Quantization(weight_bits=8),
    pruning=PruningPlan(0.5, kernels=4, channels=4, updates=5),
    distillation=Distillation("dense"),
)
WHOLE = attrs.evolve(ALL, name="whole")
STOP = 5


def small(classes):
    return plain(classes, width=4)


def data():
    """Four classes, told apart by where an image is bright."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 48)
    pixels = rng.integers(0, 60, (48, 3, 8, 8))
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
    images = Images(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels))
    return images, images.first(16)


def train(recipe, runs, stop=None):
    """Train; gives everything that a checkpoint holds, and the losses."""
    losses = []
    trainer = Trainer(recipe, *data(), runs, progress=lambda _s, _n, loss, _t: losses.append(loss))
    trainer.run(stop_after=stop)
    return {**trainer.state(), "all losses": losses}


def train_everything(runs):
    """Train densely, then with everything: in parts, and as a whole."""
    torch.set_num_threads(1)
    states = {"dense": train(DENSE, runs), "stopped": train(ALL, runs, STOP)}
    return {**states, "all": train(ALL, runs), "whole": train(WHOLE, runs)}


def on_each_rank(function, folder, *, timeout=300):
    """Run a function of this module, given the rank and a folder, in processes that train together.

    DistributedDataParallel itself takes a SyncBatchNorm on accelerators alone.
    """
    script = (
        "import sys, torch.distributed as dist, python_tests.test_qat_ranks as module\n"
        f"dist.init_process_group('gloo', init_method='file://{folder}/meet',\n"
        f"                        rank=int(sys.argv[1]), world_size={RANKS})\n"
        f"module.{function.__name__}(int(sys.argv[1]), sys.argv[2])\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-c", script]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment())
        for rank in range(RANKS)
    ]
    assert [process.wait(timeout) for process in processes] == [0] * RANKS


def environment():
    root = Path(__file__).parents[1]
    path = f"{root}{os.pathsep}{root / 'runtime'}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def save_states(rank, folder):
    torch.save(train_everything(Path(folder) / "runs"), f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """States of each rank, and of one process that does the same."""
    folder = tmp_path_factory.mktemp("ranks")
    on_each_rank(save_states, folder)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    threads = torch.get_num_threads()
    alone = train_everything(folder / "alone")
    torch.set_num_threads(threads)
    return folder, ranks, alone


def same(one, other):
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        elif isinstance(value, dict):
            same(value, other[key])


def test_each_rank_has_the_same_weights_and_masks(states):
    _, (first, second), _ = states
    for name, state in first.items():
        same(state["model"], second[name]["model"])
        same(state["average"], second[name]["average"])
        same(state["optimizer"], second[name]["optimizer"])
    masks = {key: m for key, m in first["all"]["model"].items() if key.endswith("mask")}
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    share = first["all"]["history"][-1]["zero group-sets"]
    assert pruned and share == pytest.approx(0.5, abs=0.51 * share / pruned)


def test_ranks_resume_bit_by_bit(states):
    _, (first, _), _ = states
    assert first["stopped"]["step"] == STOP and first["all"]["step"] == first["whole"]["step"]
    for key in ("model", "average", "optimizer"):
        same(first["all"][key], first["whole"][key])
    assert first["all"]["history"] == first["whole"]["history"]


@pytest.mark.parametrize(("name", "tolerance"), [("dense", 1e-4), ("whole", 2e-2)])
def test_the_number_of_ranks_is_rounding(states, name, tolerance):
    """Codes at ties make a quantized network stray sooner."""
    _, (first, second), alone = states
    assert first[name]["all losses"] == second[name]["all losses"]
    expected = alone[name]["all losses"]
    np.testing.assert_allclose(first[name]["all losses"], expected, rtol=tolerance)
    for key, value in alone[name]["model"].items():
        if key.endswith(("running_mean", "running_var")):
            limits = {"rtol": 100 * tolerance, "atol": tolerance}
            torch.testing.assert_close(first[name]["model"][key], value, **limits)


def test_the_first_rank_writes_one_history(states):
    folder, (first, _), alone = states
    written = json.loads((folder / "runs" / "whole" / "history.json").read_text())["epochs"]
    assert written == first["whole"]["history"] and len(written) == SHORT.epochs
    assert "test accuracy" in written[-1]
    assert (folder / "runs" / "whole" / "net.onnx").exists()
    # One process continues what two began.
    state = torch.load(folder / "runs" / "whole" / "last.pt", weights_only=True)
    assert state["model"].keys() == alone["whole"]["model"].keys()


# -- parts -----------------------------------------------------------------------------------------


def differ(rank, folder):
    ranks = Ranks.current()
    assert ranks == Ranks(rank, RANKS) and ranks.first == (rank == 0)
    assert ranks.part(torch.arange(6)).tolist() == [rank, rank + 2, rank + 4]
    assert ranks.any(rank == 1) and not ranks.any(False)
    assert ranks.mean(torch.tensor(float(rank))) == 0.5
    ranks.check_same([("a", torch.ones(3)), ("b", torch.tensor([True]))])
    with pytest.raises(RankError, match="b is not the same on all 2 ranks"):
        ranks.check_same([("a", torch.ones(3)), ("b", torch.tensor([float(rank)]))])
    recipe = attrs.evolve(DENSE, training=attrs.evolve(SHORT, batch=7))
    with pytest.raises(OptionError, match="batch of 7 is not shared evenly by 2 processes"):
        Trainer(recipe, *data(), folder)
    ours, theirs = AllRanksNorm(5), nn.BatchNorm2d(5)
    x = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    part, whole = x[rank::2].clone().requires_grad_(), x.clone().requires_grad_()
    ours(part).square().sum().backward()
    theirs(whole).square().sum().backward()
    torch.testing.assert_close(part.grad, whole.grad[rank::2], rtol=1e-4, atol=1e-5)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_what_ranks_agree_on(tmp_path):
    on_each_rank(differ, tmp_path)


def two_steps(rank, folder, world=RANKS):
    """Train on every ``world``-th image by hand, as a loop of one's own may."""
    torch.manual_seed(0)
    norm = nn.SyncBatchNorm if world > 1 else nn.BatchNorm2d
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), norm(16), nn.ReLU(),
                          nn.Conv2d(16, 16, 3, bias=False), norm(16), nn.ReLU())  # fmt: skip
    network = prepare(model, Quantization(), (3, 8, 8)).train()
    x, upstream = torch.rand(8, 3, 8, 8), torch.randn(8, 16, 4, 4)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (network(x[rank::world]) * upstream[rank::world]).mean().backward()
        Ranks.current().average(p.grad for p in network.parameters())
        optimizer.step()
    if rank == 0:
        torch.save(network.state_dict(), f"{folder}/{world}.pt")


def test_statistics_are_those_of_all_ranks(tmp_path):
    on_each_rank(two_steps, tmp_path)
    two_steps(0, tmp_path, world=1)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)


# -- the command line ------------------------------------------------------------------------------


def test_mars_train_by_torchrun(tmp_path):
    images, _ = data()
    np.savez(tmp_path / "d.npz", x_train=images.pixels.numpy(), y_train=images.labels.numpy(),
             x_test=images.pixels.numpy(), y_test=images.labels.numpy())  # fmt: skip
    (tmp_path / "r.toml").write_text(
        f'name = "r"\nmodel = "{__name__}:small"\n'
        "[training]\nepochs = 2\nbatch = 8\n[quantization]\n[pruning]\nsparsity = 0.5\n"
        "kernels = 4\nchannels = 4\n"
    )
    mars = [sys.executable, "-c", "from tvm_mars.cli import main; raise SystemExit(main())"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    result = subprocess.run(
        [*torchrun, "--standalone", "--no-python", *mars, "train", str(tmp_path / "r.toml"),
         "--data", str(tmp_path / "d.npz"), "--runs", str(tmp_path)],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("% of the test images") == 1
    assert result.stdout.count("group-sets of pruned layers are zero") == 1
    assert result.stderr.count('"epoch": 2') == 1
    assert (tmp_path / "r" / "net.onnx").exists()
