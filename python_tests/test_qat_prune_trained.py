"""Pruning a dense network that is trained already: at once, by magnitude, then fine-tuning."""

from __future__ import annotations

import attrs
import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from mars_runtime.arch import MarsArch  # noqa: E402
from mars_runtime.errors import CapacityError, OptionError  # noqa: E402
from tvm_mars.graph import evaluate  # noqa: E402
from tvm_mars.pack import pack_conv  # noqa: E402
from tvm_mars.qat import (  # noqa: E402
    PruningPlan,
    Quantization,
    Trainer,
    calibrate,
    export,
    prepare,
    prune,
)
from tvm_mars.qat.data import Augmentation, Images  # noqa: E402
from tvm_mars.qat.recipe import Recipe, Training  # noqa: E402
from tvm_mars.qat.training import accuracy, load_run  # noqa: E402

SHARE = 0.6
SHAPE = (1, 8, 8)
DENSE = Recipe(
    "dense",
    f"{__name__}:digits_network",
    training=Training(epochs=4, batch=64, learning_rate=0.1),
    augmentation=Augmentation(shift=1, flip=False),
)
PRUNED = attrs.evolve(
    DENSE,
    name="pruned",
    init="dense",
    training=Training(epochs=4, batch=64, learning_rate=0.05, warmup=0.2, ema=0.9),
    quantization=Quantization(weight_bits=8, activation_bits=4),
    pruning=PruningPlan(SHARE, lasso="none", begin=0.0, end=0.0),
)


def digits_network(classes):
    """648 group-sets in the layers that are pruned: one is 0.15 points."""
    layers = []
    given = 1
    for channels, stride in [(32, 1), (64, 2), (128, 1), (64, 2)]:
        layers += [nn.Conv2d(given, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)]
        layers.append(nn.ReLU())
        given = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


@pytest.fixture(scope="module")
def data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy((digits.images * 15).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Images(pixels[360:], labels[360:]), Images(pixels[:360], labels[:360])


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Runs with the trained dense network."""
    folder = tmp_path_factory.mktemp("runs")
    trainer = Trainer(DENSE, *data, folder)
    trainer.run()
    assert trainer.history[-1]["test accuracy"] > 0.9
    return folder


def removed(terms):
    return [term for term in terms if not bool(term.mask.all())]


def violations(term, weight):
    """Count weights of removed group-sets that are not zero."""
    weight = weight if isinstance(weight, torch.Tensor) else torch.from_numpy(weight.copy())
    return int((weight != 0)[~term.spread(term.mask).bool()].sum())


def assert_stays_zero(network, terms, graph, model):
    """In latent weights, folded codes, the graph, what TVM imports, and the packed group-sets."""
    from python_tests.observing import lowered

    assert removed(terms)
    imported = lowered(model).graph
    convs = [layer for layer in graph.layers if layer.kind == "conv"]
    again = [layer for layer in imported.layers if layer.kind == "conv"]
    for layer, conv, other in zip(network.sums(), convs, again, strict=True):
        (term,) = layer.terms
        (codes,), _ = layer.codes()
        assert not violations(term, term.masked_weight().detach())
        for weight in (codes, conv.terms[0].weight, other.terms[0].weight):
            assert not violations(term, weight)
        packed = pack_conv(other, imported.types, MarsArch())
        assert packed.group_sets <= int(term.mask.sum())


def test_a_trained_network_is_pruned_at_once(data, runs, tmp_path):
    """With a loop of one's own, which knows nothing of masks."""
    pytest.importorskip("tvm")
    import tvm_mars
    from mars_runtime import run

    dense = load_run(runs / "dense")
    network = prepare(dense, PRUNED.quantization, SHAPE)
    pixels, labels = data[0].pixels.float() / 255, data[0].labels
    calibrate(network, pixels[:256])
    network.train()
    # An optimizer that moved every weight before, with momentum that lives on.
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    pruner = None
    for step in range(70):
        if step == 2:
            pruner = prune(network, SHARE)
        optimizer.zero_grad()
        batch = slice(64 * (step % 22), 64 * (step % 22) + 64)
        functional.cross_entropy(network(pixels[batch]), labels[batch]).backward()
        optimizer.step()
    assert pruner.total == 648 and abs(pruner.share() - SHARE) <= 0.001
    assert accuracy(network, data[1]) > accuracy(dense, data[1]) - 0.05
    network.eval()
    graph = export(network, tmp_path / "net.onnx")
    assert_stays_zero(network, pruner.terms, graph, onnx.load(tmp_path / "net.onnx"))
    x = data[1].pixels[:32].float() / 255
    compiled = tvm_mars.compile(tmp_path / "net.onnx")
    (result,) = run(compiled.program, {"x0": x.numpy()}).values()
    with torch.no_grad():
        np.testing.assert_array_equal(result, network(x).numpy())
    np.testing.assert_array_equal(result, evaluate(graph, {"x0": x.numpy()})[0])


RAMP = attrs.evolve(PRUNED, name="ramp", pruning=PruningPlan(SHARE, begin=0.1, end=0.6))


@pytest.mark.parametrize("recipe", [PRUNED, RAMP], ids=["at once", "ramp and lasso"])
def test_recipes_reach_the_share_and_keep_it(recipe, data, runs):
    """Zero violations after every step, in the moving average, and in what is written."""
    shares = []

    def watch(*_):
        shares.append(trainer.pruner.share())
        for term in trainer.pruner.terms:
            assert not violations(term, term.weight.detach())
        averaged = [t for t in trainer.evaluated().terms() if not bool(t.mask.all())]
        for term in averaged:
            (codes,), _ = next(s for s in trainer.evaluated().sums() if s.name == term.name).codes()
            assert not violations(term, codes)

    trainer = Trainer(recipe, *data, runs, progress=watch)
    network = trainer.run()
    assert shares == sorted(shares) and abs(shares[-1] - SHARE) <= 0.001
    healing = shares[int(recipe.pruning.end * len(shares)) + 1 :]
    assert set(healing) == {shares[-1]}
    assert trainer.history[-1]["zero group-sets"] == shares[-1]
    assert trainer.history[-1]["test accuracy"] > accuracy(load_run(runs / "dense"), data[1]) - 0.05
    graph = export(network, runs / "again.onnx")
    model = onnx.load(runs / recipe.name / "net.onnx")
    assert model == onnx.load(runs / "again.onnx")
    assert_stays_zero(network, network.terms()[1:4], graph, model)


def test_a_share_that_layers_cannot_reach():
    network = prepare(digits_network(10), Quantization(), SHAPE)
    with pytest.raises(CapacityError, match="keeps one"):
        prune(network, 1.0)
    pruner = prune(network, 1.0, scope="layer")  # each layer to its last group-set
    assert [int(term.mask.sum()) for term in pruner.terms] == [1, 1, 1]
    with pytest.raises(OptionError, match="comes after end"):
        PruningPlan(0.5, begin=0.7)


def test_pruning_again_removes_more_and_brings_nothing_back():
    torch.manual_seed(0)
    network = prepare(digits_network(10), Quantization(), SHAPE)
    prune(network, 0.5)
    first = [term.mask.clone() for term in network.terms()]
    assert prune(network, 0.5).share() == 0.5
    assert all(torch.equal(m, t.mask) for m, t in zip(first, network.terms(), strict=True))
    assert prune(network, 0.75).share() == 0.75
    assert all(not (t.mask & ~m).any() for m, t in zip(first, network.terms(), strict=True))
