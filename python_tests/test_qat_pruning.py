"""Group-set pruning: shares that are reached, zeros that stay."""

from __future__ import annotations

import copy

import attrs
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mars_runtime.arch import MarsArch  # noqa: E402
from mars_runtime.errors import CapacityError, OptionError, UnsupportedError  # noqa: E402
from tvm_mars.graph import Conv  # noqa: E402
from tvm_mars.qat import (  # noqa: E402
    Pruner,
    PruningPlan,
    Quantization,
    calibrate,
    prepare,
    to_graph,
)
from tvm_mars.qat.models import resnet20  # noqa: E402
from tvm_mars.qat.pruning import layer_adaptive, ramp  # noqa: E402
from tvm_mars.report import compression  # noqa: E402

SHAPE = (3, 8, 8)


def network(method="mars", seed=0, **options):
    torch.manual_seed(seed)
    layers = []
    given = 3
    for channels in (16, 32, 40, 48):
        layers += [nn.Conv2d(given, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        layers.append(nn.ReLU())
        given = channels
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    made = prepare(model, Quantization(method=method, **options), SHAPE)
    calibrate(made, torch.rand(8, *SHAPE))
    return made


def train(made, pruner, steps, *, average=None):
    """Momentum and weight decay as in real training; gives the share after each step."""
    optimizer = torch.optim.SGD(made.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    shares = []
    made.train()
    for step in range(steps):
        pruner.before_step(step / steps)
        loss = made(torch.rand(4, *SHAPE)).square().mean() + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.after_step(0.05)
        shares.append(pruner.share())
        for term in pruner.terms:
            assert not term.weight[~term.spread(term.mask).bool()].any()
    return shares


def zero_share_of_codes(made, names):
    """Count zero blocks of 16 kernels x 16 channels x 1 tap on the exported integers."""
    zero = total = 0
    convs = [layer for layer in to_graph(made).layers if isinstance(layer, Conv)]
    for layer, ours in zip(convs, made.sums(), strict=True):
        for term, source in zip(layer.terms, ours.terms, strict=True):
            if source.name not in names:
                continue
            weight = term.weight
            for f in range(0, weight.shape[0], 16):
                for c in range(0, weight.shape[1], 16):
                    block = weight[f : f + 16, c : c + 16]
                    total += block.shape[2] * block.shape[3]
                    zero += int((~block.any(axis=(0, 1))).sum())
    return zero, total


@pytest.mark.parametrize("lasso", ["penalty", "proximal", "none"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_wanted_share_is_reached_and_kept(scope, lasso):
    made = network()
    plan = PruningPlan(0.7, scope=scope, lasso=lasso, begin=0.2, end=0.6, strength=1e-2)
    pruner = Pruner(made, plan)
    assert [term.name for term in pruner.terms] == ["3", "6", "9"]
    shares = train(made, pruner, 20)
    assert shares[3] == 0 and shares == sorted(shares)
    assert abs(shares[12] - 0.7) <= (0.5 if scope == "global" else 1.5) / pruner.total
    assert shares[-1] == shares[12]
    made.eval()
    zero, total = zero_share_of_codes(made, {"3", "6", "9"})
    assert total == pruner.total and zero / total >= shares[-1]
    masked = [int((~term.mask).sum()) for term in pruner.terms]
    rows = compression(to_graph(made)).layers[1:4]
    assert all(
        row.dense_group_sets - row.group_sets >= count
        for row, count in zip(rows, masked, strict=True)
    )


def test_pruned_group_sets_survive_state_average_and_conversion():
    made = network()
    pruner = Pruner(made, PruningPlan(0.5, begin=0, end=0.1))
    train(made, pruner, 5)
    state = made.state_dict()
    again = network(seed=1)
    again_pruner = Pruner(again, pruner.plan)
    again.load_state_dict(state)
    assert again_pruner.share() == pruner.share()
    average = copy.deepcopy(made)
    dense = network(seed=2)
    values = average.state_dict()
    for key, value in dense.state_dict().items():
        if value.is_floating_point():
            values[key].lerp_(value, 0.5)  # whatever an average mixes in, the mask stays
    average.load_state_dict(values)
    average.eval()
    zero, total = zero_share_of_codes(average, {"3", "6", "9"})
    assert zero / total >= pruner.share() >= 0.49


def test_the_least_important_go_first():
    made = network()
    term = made.terms()[2]
    with torch.no_grad():
        term.weight[:16, :16, 1, 1] *= 1e-3
        term.weight[32:, 16:, 0, 2] *= 1e-3
    pruner = Pruner(made, PruningPlan(0.5, exclude=("3", "9")))
    pruner.prune_to(2 / pruner.total)
    assert pruner.total == 3 * 2 * 9
    gone = (~term.mask).nonzero().tolist()
    assert gone == [[0, 0, 4], [2, 1, 2]]


@pytest.mark.parametrize(("kernels", "channels"), [(16, 1), (16, 4), (8, 16), (16, 32), (1, 1)])
def test_other_group_sizes(kernels, channels):
    made = network()
    pruner = Pruner(made, PruningPlan(0.6, kernels=kernels, channels=channels))
    pruner.prune_to(0.6)
    total = sum(-(-f // kernels) * -(-c // channels) * 9 for f, c in [(32, 16), (40, 32), (48, 40)])
    assert pruner.total == total and abs(pruner.share() - 0.6) < 1 / total
    for term in pruner.terms:
        weight = term.masked_weight()
        norms = term.group_set_norms()
        for f, c, tap in [(0, 0, 0), (norms.shape[0] - 1, norms.shape[1] - 1, 8)]:
            block = weight[f * kernels :, c * channels :, tap // 3, tap % 3]
            expected = block[:kernels, :channels].norm()
            torch.testing.assert_close(norms[f, c, tap], expected)


def test_penalty_is_eq4():
    made = network()
    pruner = Pruner(made, PruningPlan(0.5, strength=0.3))
    expected = 0.0
    for term in pruner.terms:
        weight = term.weight.detach().numpy()
        for f in range(0, len(weight), 16):
            for c in range(0, weight.shape[1], 16):
                block = weight[f : f + 16, c : c + 16]
                expected += np.sqrt(np.square(block).sum((0, 1))).sum()
    assert pruner.penalty().item() == pytest.approx(0.3 / 2 * expected, rel=1e-5)
    pruner.prune_to(0.5)
    pruner.penalty().backward()
    assert all(term.weight.grad.isfinite().all() for term in pruner.terms)


def test_proximal_steps_shrink_norms_and_stop_behind_the_ramp():
    made = network()
    plan = PruningPlan(0.0, lasso="proximal", strength=0.2, end=0.5)
    pruner = Pruner(made, plan)
    before = [term.group_set_norms() for term in pruner.terms]
    pruner.before_step(0.1)
    pruner.after_step(0.1)
    for norms, term in zip(before, pruner.terms, strict=True):
        torch.testing.assert_close(term.group_set_norms(), (norms - 0.01).clamp_min(0))
    after = [term.weight.clone() for term in pruner.terms]
    pruner.before_step(0.5)
    pruner.after_step(0.1)
    assert all(torch.equal(w, t.weight) for w, t in zip(after, pruner.terms, strict=True))


def test_every_layer_keeps_one_group_set():
    made = network()
    with torch.no_grad():
        made.terms()[1].weight.mul_(1e-6)
    pruner = Pruner(made, PruningPlan(0.9, score="latent"))
    pruner.prune_to(0.9)
    assert [bool(term.mask.any()) for term in pruner.terms] == [True] * 3
    assert int(pruner.terms[0].mask.sum()) == 1
    with pytest.raises(CapacityError, match="keeps one"):
        Pruner(network(), PruningPlan(1.0))


def test_the_cost_aware_variant_prunes_where_cycles_are():
    torch.manual_seed(0)

    def cycles(cost):
        made = prepare(resnet20(10), Quantization(), (3, 32, 32))
        calibrate(made, torch.rand(4, 3, 32, 32))
        pruner = Pruner(made, PruningPlan(0.6, cost=cost))
        pruner.prune_to(0.6)
        made.eval()
        return compression(to_graph(made), MarsArch()), pruner

    (plain, first), (aware, second) = cycles("none"), cycles("cycles")
    assert first.share() == second.share()
    assert aware.cycles < 0.8 * plain.cycles


def test_float_networks_are_pruned_too():
    made = network("float")
    pruner = Pruner(made, PruningPlan(0.5, begin=0, end=0.5))
    train(made, pruner, 4)
    assert pruner.share() == pytest.approx(0.5, abs=0.5 / pruner.total)
    with pytest.raises(UnsupportedError, match="prepare it"):
        Pruner(nn.Linear(3, 3), PruningPlan(0.5))


def test_ramp_is_cubic_with_a_warm_up():
    plan = PruningPlan(0.8, begin=0.2, end=0.7, updates=1000)
    assert [ramp(plan, p) for p in (0, 0.19, 0.7, 1)] == [0, 0, 0.8, 0.8]
    assert ramp(plan, 0.45) == pytest.approx(0.8 * (1 - 0.5**3))
    few = attrs.evolve(plan, updates=2)
    assert len({ramp(few, i / 100) for i in range(101)}) == 3


def test_grouped_and_edge_layers_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.ReLU(),
        nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1),
    )  # fmt: skip
    made = prepare(model, Quantization(), SHAPE)
    assert [t.name for t in Pruner(made, PruningPlan(0.2)).terms] == ["4"]
    assert [t.name for t in Pruner(made, PruningPlan(0.2, edges=True)).terms] == ["0", "4", "6"]
    with pytest.raises(UnsupportedError, match="no layer"):
        Pruner(made, PruningPlan(0.2, exclude=("4",)))
    with pytest.raises(OptionError):
        PruningPlan(1.2)


def test_report_is_readable():
    made = network(activation_bits=4)
    pruner = Pruner(made, PruningPlan(0.5, scope="layer"))
    pruner.prune_to(0.5)
    made.eval()
    report = compression(to_graph(made))
    lines = str(report).splitlines()
    assert lines[0].split()[:2] == ["layer", "weights"]
    assert len(lines) == 1 + len(report.layers) + 2 and max(map(len, lines)) <= 80
    second = report.layers[1]  # 16 -> 32 channels, 3x3: 2 blocks x 1 x 9 taps, half of them kept
    assert (second.dense_group_sets, second.group_sets) == (18, 9)
    assert second.index_bits == 9 * 16 and second.stored_bits(report.arch) == 9 * 2048
    assert second.cycles == 9 * 64 * 1 / 4 and second.dense_cycles == 2 * second.cycles


def test_adaptive_scores_are_lamps():
    norms = torch.tensor([[[3.0], [0.0]], [[1.0], [2.0]]])
    expected = torch.tensor([[[1.0], [0.0]], [[(1 / 14) ** 0.5], [(4 / 13) ** 0.5]]])
    torch.testing.assert_close(layer_adaptive(norms), expected)
    # A layer's scale does not count.
    torch.testing.assert_close(layer_adaptive(norms * 7), expected)


def test_adaptive_pruning_does_not_empty_a_layer_of_small_weights():
    def shares(adaptive, scale):
        torch.manual_seed(0)
        model = nn.Sequential(
            *[
                part
                for given, channels in [(3, 32), (32, 64), (64, 64), (64, 64)]
                for part in (nn.Conv2d(given, channels, 3, padding=1), nn.ReLU())
            ],
            nn.Flatten(),
            nn.Linear(64 * 64, 10),
        )
        model[4].weight.data *= scale
        network = prepare(model, Quantization(method="float"), (3, 8, 8))
        pruner = Pruner(network, PruningPlan(sparsity=0.4, score="latent", adaptive=adaptive))
        pruner.prune_to(0.4)
        return [1 - float(term.mask.float().mean()) for term in pruner.terms]

    assert shares(False, scale=0.01)[1] > 0.95
    assert shares(True, scale=0.01) == shares(True, scale=1.0)
    assert shares(True, scale=0.01)[1] < 0.6
