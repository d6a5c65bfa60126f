"""Quantization-aware training: its arithmetic, its gradients, and equal codes in every engine."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from mars_runtime.errors import CapacityError, OptionError, UnsupportedError  # noqa: E402
from tvm_mars.graph import Conv, evaluate, evaluate_values  # noqa: E402
from tvm_mars.qat import (  # noqa: E402
    IntegerNetwork,
    MarsNetwork,
    Quantization,
    calibrate,
    convert,
    export,
    prepare,
    to_graph,
)
from tvm_mars.qat.functions import (  # noqa: E402
    normalize_weight,
    quantize_activation,
    quantize_weight,
    round_bias,
)
from tvm_mars.qat.integer import layer_names  # noqa: E402
from tvm_mars.qat.models import Block, resnet20, vgg16  # noqa: E402

SHAPE = (3, 8, 8)


def conv_norm(given, channels, kernel=3, stride=1, **options):
    conv = nn.Conv2d(given, channels, kernel, stride, kernel // 2, bias=False, **options)
    return [conv, nn.BatchNorm2d(channels)]


def images(count=6, shape=SHAPE, seed=0):
    """Images on a grid that holds exact ties of eq. 5: 0.5 * 255 = 127.5, 0.5 * 15 = 7.5."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 72, (count, *shape), generator=generator)
    return codes.float() / 64


def trained(model, config=None, shape=SHAPE, steps=3, seed=0):
    """Prepare a model and let it drift for some steps, so that no number is special."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    network = prepare(model, config or Quantization(), shape).train()
    calibrate(network, images(16, shape))
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for step in range(steps):
        result = network(images(8, shape, seed=step))
        results = result if isinstance(result, tuple) else (result,)
        optimizer.zero_grad()
        sum(r.square().mean() for r in results).backward()
        optimizer.step()
    return network.eval()


class Functional(nn.Module):
    """Everything as functions and methods, with an identity and a projection shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = conv_norm(3, 16)
        self.a, self.bn1 = conv_norm(16, 16)
        self.b, self.bn2 = conv_norm(16, 32, 3, 2)
        self.p, self.bn3 = conv_norm(16, 32, 1, 2)
        self.out = nn.Linear(32 * 2 * 2, 5)

    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        y = self.bn1(self.a(x))
        y += x
        y = functional.relu(y, inplace=True)
        y = torch.relu(torch.add(self.bn2(self.b(y)), self.bn3(self.p(y))))
        y = functional.max_pool2d(y, 2)
        return self.out(y.view(y.size(0), -1))


class TwoMaps(nn.Module):
    """A sum of two quantized maps, and two results."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        both = functional.relu(functional.relu(self.left(x)) + functional.relu(self.right(x)))
        return self.head(both), both.mean((2, 3))


def _sequences():
    seq = nn.Sequential
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return {
        "conv bn relu": lambda: seq(*conv_norm(3, 16), nn.ReLU(), *head, nn.Linear(16, 4)),
        "plain conv": lambda: seq(nn.Conv2d(3, 20, 3), nn.ReLU(), *head, nn.Linear(20, 4)),
        "no bias": lambda: seq(nn.Conv2d(3, 16, 3, bias=False), nn.ReLU()),
        "depthwise": lambda: seq(
            *conv_norm(3, 16), nn.ReLU6(), *conv_norm(16, 16, groups=16), nn.ReLU(), *head
        ),
        "grouped, dilated": lambda: seq(
            *conv_norm(3, 32),
            nn.ReLU(),
            nn.Conv2d(32, 24, 3, (2, 1), (2, 1), dilation=(2, 1), groups=4),
            nn.Hardtanh(0, 1),
        ),
        "one channel": lambda: seq(*conv_norm(3, 1), nn.ReLU(), *conv_norm(1, 1), nn.ReLU()),
        "pool before relu": lambda: seq(*conv_norm(3, 16), nn.MaxPool2d(3, 2, 1), nn.ReLU()),
        "average pools": lambda: seq(
            *conv_norm(3, 16),
            nn.ReLU(),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.AvgPool2d(2),
        ),
        "dense": lambda: seq(
            nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
            nn.Linear(16 * 9, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3),
        ),
        "blocks": lambda: seq(
            *conv_norm(3, 16), nn.ReLU(), Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1),
            *head, nn.Linear(32, 4),
        ),
        "functional": Functional,
        "two maps": TwoMaps,
    }  # fmt: skip


MODELS = _sequences()
WIDTHS = {
    "w8a8": Quantization(),
    "w8a4": Quantization(activation_bits=4),
    "w4a4": Quantization(weight_bits=4, activation_bits=4, input_bits=4),
    "w4a4, 8 at the edges": Quantization(
        weight_bits=4, activation_bits=4, first_weight_bits=8, last_weight_bits=8
    ),
    "mixed": Quantization(
        weight_bits=4,
        layers={"*1*": {"weight_bits": 8, "activation_bits": 4}, "*b*": {"activation_bits": 4}},
    ),
}


def assert_same_codes(network, shape=SHAPE, count=6):
    """Torch in training form, torch in integers and the reference give the same codes."""
    x = images(count, shape, seed=99)
    graph = to_graph(network)
    with torch.no_grad():
        values = network.evaluate_values(x)
        results = network(x)
    integer = convert(network)
    integer_codes = integer.evaluate_codes(x)
    quantized = {e.name: e.quantize.apply(x.numpy()) for e in graph.inputs}
    expected = evaluate_values(graph, quantized)
    for name, ours in layer_names(network).items():
        bits = graph.types[ours].bits
        scales = {out.value: out.dequantize.scale[0] for out in graph.outputs}
        scale = 2.0**-bits if bits <= 8 else scales[ours]
        codes = (values[name].double() / scale).numpy()
        np.testing.assert_array_equal(codes.reshape(expected[ours].shape), expected[ours], name)
        np.testing.assert_array_equal(integer_codes[ours].numpy(), expected[ours], name)
    reference = evaluate(graph, {"x0": x.numpy()})
    for given in (results, integer(x)):
        for one, other in zip(given if isinstance(given, tuple) else [given], reference,
                              strict=True):  # fmt: skip
            np.testing.assert_array_equal(one.numpy(), other)
    return graph, x.numpy(), reference


# -- arithmetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_eq5_rounds_half_to_even(bits):
    top = 2**bits - 1
    a = torch.arange(-(2**12), 2 * 2**12 + 1) / 2**12
    exact = [round(Fraction(min(max(float(v), 0), 1)) * top) for v in a]  # Python: half to even
    codes = quantize_activation(a, bits) * 2**bits
    assert codes.tolist() == exact
    assert any(Fraction(float(v)) * top % 1 == Fraction(1, 2) for v in a[2**12 : 2 * 2**12])


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_follow_eq6_to_8(bits):
    torch.manual_seed(0)
    weight, scale = torch.randn(20, 3, 3, 3), torch.rand(20) * 2
    bounded = np.tanh(weight.double().numpy())
    peaks = [np.abs(bounded[:16]).max()] * 16 + [np.abs(bounded[16:]).max()] * 4
    scaled = (
        bounded / np.reshape(peaks, (20, 1, 1, 1)) * scale.double().numpy()[:, None, None, None]
    )
    top = 2 ** (bits - 1) - 1
    steps = np.clip(scaled, -1, 1) * top
    codes = (quantize_weight(normalize_weight(weight, 16), scale, bits) * (top + 1)).numpy()
    unclear = np.abs(np.abs(steps % 1) - 0.5) < 1e-4
    assert unclear.mean() < 0.01
    np.testing.assert_array_equal(codes[~unclear], np.rint(steps)[~unclear])
    assert np.abs(codes).max() == top


def test_bias_is_rounded_half_to_even_within_int32():
    bias = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 2.0**40, -(2.0**40)])
    rounded = round_bias(bias, 1.0).tolist()
    assert rounded[:5] == [0, 2, 2, 0, -2]
    assert max(rounded) < 2**31 <= -min(rounded)


def test_gradients_are_those_of_batch_normalization():
    torch.manual_seed(0)
    network = prepare(nn.Sequential(*conv_norm(5, 16)), Quantization(), (5, 6, 6)).double().train()
    term = network.terms()[0]
    nn.init.uniform_(term.norm.weight, 0.1, 0.5)
    x = torch.rand(4, 5, 6, 6, dtype=torch.float64).mul(256).floor().div(256).requires_grad_()
    upstream = torch.randn(4, 16, 6, 6, dtype=torch.float64)
    layer = network.sums()[0]
    (layer.accumulate(x) * upstream).sum().backward()
    ours = [p.grad.clone() for p in (term.weight, term.norm.weight, term.norm.bias)] + [x.grad]

    weight = term.weight.detach().clone().requires_grad_()
    gamma, beta = (p.detach().clone().requires_grad_() for p in term.norm.parameters())
    y = functional.conv2d(x.detach(), normalize_weight(weight, 16), padding=1)
    normal = functional.batch_norm(y, None, None, gamma, beta, True, eps=term.norm.eps)
    (normal * upstream).sum().backward()
    for mine, theirs in zip(ours, (weight.grad, gamma.grad, beta.grad), strict=False):
        torch.testing.assert_close(mine, theirs)
    # To the input it goes by the weights that are deployed.
    variance, mean = torch.var_mean(y.detach(), (0, 2, 3), correction=0)
    scale = (gamma * torch.rsqrt(variance + term.norm.eps)).detach()
    deployed = quantize_weight(normalize_weight(weight, 16), scale, 8).detach()
    xs = x.detach().clone().requires_grad_()
    stand_in = functional.conv2d(xs, deployed, padding=1)
    centred = (y.detach() - mean[:, None, None]) * torch.rsqrt(variance + 1e-5)[:, None, None]
    g = upstream - upstream.mean((0, 2, 3), keepdim=True)
    g = g - centred * (upstream * centred).mean((0, 2, 3), keepdim=True)
    stand_in.backward(g)
    torch.testing.assert_close(ours[3], xs.grad)


def test_statistics_are_those_of_the_normalized_weights():
    torch.manual_seed(0)
    network = prepare(nn.Sequential(*conv_norm(3, 16)), Quantization(), SHAPE).train()
    x, term = images(8), network.terms()[0]
    before = term.norm.running_var.clone()
    network(x)
    codes = quantize_activation(x, 8)
    y = functional.conv2d(codes, term.normalized().detach(), padding=1)
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=1)
    torch.testing.assert_close(term.norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(term.norm.running_var, 0.9 * before + 0.1 * variance)


def test_frozen_statistics_stay():
    network = trained(MODELS["conv bn relu"]()).train()
    kept = network.eval()(images())
    network.train().freeze_statistics()
    assert torch.equal(network.eval()(images()), kept)
    before = copy.deepcopy(network.state_dict())
    network.train()(images()).sum().backward()
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_frozen_scales_do_not_follow_the_largest_weight():
    """Neither behind frozen statistics nor without a normalization."""
    network = trained(nn.Sequential(*conv_norm(3, 16), nn.ReLU(), nn.Conv2d(16, 8, 1)))
    network.freeze_statistics()
    before = [weight.clone() for layer in network.sums() for weight in layer.codes()[0]]
    with torch.no_grad():
        for term in network.terms():
            largest = term.weight.abs().argmax()
            term.weight.view(-1)[largest] *= -2
    after = [weight for layer in network.sums() for weight in layer.codes()[0]]
    for one, other in zip(before, after, strict=True):
        assert 1 <= (one != other).sum() <= 2
    assert_same_codes(network)
    network.freeze_statistics(False)
    assert (network.sums()[0].codes()[0][0] != after[0]).sum() > 20


# -- equal codes -----------------------------------------------------------------------------------


def assert_every_engine_agrees(network, folder, shape=SHAPE):
    """ONNX Runtime too, on the exported file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    graph, x, reference = assert_same_codes(network, shape)
    assert str(export(network, folder / "net.onnx")) == str(graph)
    session = onnxruntime.InferenceSession(folder / "net.onnx", providers=["CPUExecutionProvider"])
    for ours, theirs in zip(session.run(None, {"x0": x}), reference, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return graph


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", MODELS)
def test_every_engine_gives_the_same_codes(name, width, tmp_path):
    assert_every_engine_agrees(trained(MODELS[name](), WIDTHS[width]), tmp_path)


def test_residuals_are_quantized_once():
    graph = to_graph(trained(MODELS["blocks"]()))
    convs = [layer for layer in graph.layers if isinstance(layer, Conv)]
    assert len(convs) == 8  # stem, three blocks of two, the projection inside one of them, dense
    assert [len(layer.terms) for layer in convs] == [1, 1, 1, 1, 2, 1, 1, 1]
    assert [layer.residual is not None for layer in convs] == [0, 0, 1, 0, 0, 0, 1, 0]


def _gamma_zero(term):
    term.norm.weight[3] = 0
    term.norm.weight[7] = -0.0


def _all_gammas_zero(term):
    term.norm.weight.zero_()


def _gammas_below_zero(term):
    term.norm.weight.neg_()


def _variance_zero(term):
    """With a mean that keeps the bias within what float32 holds."""
    for channel, variance in ((5, 0), (1, 1e-30)):
        term.norm.running_var[channel] = variance
        term.norm.running_mean[channel] = 0


def _group_zero(term):
    """A group of 16 kernels, which share the largest magnitude of eq. 6."""
    term.weight[:16] = 0


def _bias_alone(term):
    term.weight.zero_()


def _kernel_and_variance_zero(term):
    """As training leaves a channel whose kernel has died."""
    term.weight[2] = 0
    term.norm.running_mean[2] = 0
    term.norm.running_var[2] = 0


EDGES = {
    "gamma = 0": _gamma_zero,
    "all gammas = 0": _all_gammas_zero,
    "gamma < 0": _gammas_below_zero,
    "var = 0": _variance_zero,
    "zero group": _group_zero,
    "bias only": _bias_alone,
    "kernel and var = 0": _kernel_and_variance_zero,
}
PLACES = {
    "convolution": lambda: [*conv_norm(3, 32), nn.ReLU(), *conv_norm(32, 20), nn.ReLU()],
    "depthwise": lambda: [*conv_norm(3, 32), nn.ReLU(), *conv_norm(32, 32, groups=32), nn.ReLU()],
    "grouped": lambda: [*conv_norm(3, 32), nn.ReLU(), *conv_norm(32, 24, groups=4), nn.ReLU()],
    "one channel": lambda: [*conv_norm(3, 1), nn.ReLU(), *conv_norm(1, 20), nn.ReLU()],
    "dense": lambda: [
        nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 24),
        nn.BatchNorm1d(24), nn.ReLU(),
    ],
    "without a normalization": lambda: [
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 20, 3), nn.ReLU(),
    ],
}  # fmt: skip
NEED_NO_NORM = ("zero group", "bias only")


@pytest.mark.parametrize("width", ["w8a8", "w4a4"])
@pytest.mark.parametrize(
    ("place", "edge"),
    [
        (place, edge)
        for place in PLACES
        for edge in EDGES
        if place != "without a normalization" or edge in NEED_NO_NORM
    ],
)
def test_folded_edge_cases(place, edge, width, tmp_path):
    """Equal codes in every engine, and gradients that are numbers."""
    network = trained(nn.Sequential(*PLACES[place]()), WIDTHS[width])
    term = network.terms()[-1]
    with torch.no_grad():
        EDGES[edge](term)
    graph = assert_every_engine_agrees(network, tmp_path)
    layer = graph.layers[-1]
    weight = layer.terms[0].weight
    if edge == "gamma = 0":
        assert not weight[3].any() and not weight[7].any() and weight[0].any()
    elif edge == "zero group":
        assert not weight[:16].any() and weight[16:].any()
    elif edge == "kernel and var = 0":
        assert not weight[2].any()
    elif edge == "var = 0":  # the largest weight of the kernel, if it has any, is clamped to 1
        assert np.abs(weight[5]).max() in (0, 2 ** (term.bits - 1) - 1)
    elif edge in ("bias only", "all gammas = 0"):
        assert not weight.any() and layer.bias.any()
    network.train()
    if edge == "zero group":  # the middle of the range, where eq. 5 passes gradients
        with torch.no_grad():
            beta = term.bias if term.norm is None else term.norm.bias
            beta.fill_(0.5 * float(term.spans[1]))
    out = network(images())
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    if edge == "zero group":  # tanh(0) = 0: it may come back, as nothing masks it
        assert term.weight.grad[:16].any()


def test_a_constant_channel_has_variance_zero_in_training():
    network = trained(MODELS["conv bn relu"](), steps=0).train()
    network(torch.zeros(4, *SHAPE)).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    network.eval()
    assert_same_codes(network)


def test_float32_is_exact_to_its_bound_and_float64_beyond(tmp_path):
    """Accumulators above 2**24: integers in torch stay right, the export refuses by name."""
    torch.manual_seed(0)
    shape = (640, 5, 5)
    network = prepare(nn.Sequential(nn.Conv2d(640, 16, 3, padding=1), nn.ReLU()),
                      Quantization(), shape).eval()  # fmt: skip
    term = network.terms()[0]
    with torch.no_grad():
        term.weight.copy_(torch.randn_like(term.weight) * 2)
        term.gamma.fill_(1)
    graph = to_graph(network)
    x = torch.rand(2, *shape)
    expected = evaluate(graph, {"x0": x.numpy()})[0]
    np.testing.assert_array_equal(convert(network)(x).numpy(), expected)
    with pytest.raises(CapacityError, match=r"conv0.*float32"):
        export(network, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


class Reused(nn.Module):
    """Pools, a ReLU and a dropout that are called twice: they hold no weights."""

    def __init__(self):
        super().__init__()
        (self.a, self.n0), (self.b, self.n1) = conv_norm(3, 16), conv_norm(16, 16)
        self.c, self.n2 = conv_norm(16, 16)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 1, 1)
        self.average, self.drop = nn.AvgPool2d(3, 1, 1), nn.Dropout(0.1)
        self.out = nn.Linear(16 * 64, 4)

    def forward(self, x):
        x = self.pool(self.relu(self.n0(self.a(x))))
        y = self.pool(self.relu(self.n1(self.b(self.drop(x)))))
        z = self.average(self.relu(self.n2(self.c(self.average(self.drop(y))))))
        return self.out(torch.flatten(self.relu(x + z), 1))


def test_modules_without_weights_may_be_shared(tmp_path):
    torch.manual_seed(0)
    model = Reused().eval()
    network = prepare(model, Quantization(method="float"), SHAPE)
    x = images().clamp(0, 1)
    torch.testing.assert_close(network(x), model(x))
    assert_every_engine_agrees(trained(model.train(), WIDTHS["w8a4"]), tmp_path)


@pytest.mark.parametrize("build", [resnet20, vgg16])
def test_zoo_networks(build):
    model = build(10)
    network = prepare(model, Quantization(activation_bits=4), (3, 32, 32)).eval()
    calibrate(network, images(2, (3, 32, 32)))
    x = images(1, (3, 32, 32), seed=5)
    with torch.no_grad():
        np.testing.assert_array_equal(
            convert(network)(x).numpy(), evaluate(to_graph(network), {"x0": x.numpy()})[0]
        )


# -- other methods, ranges -------------------------------------------------------------------------


CLAMPING = ("grouped, dilated", "depthwise")  # ReLU6 and Hardtanh become ReLUs


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CLAMPING])
def test_float_is_the_network_itself(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    network = prepare(model, Quantization(method="float"), SHAPE)
    x = images().clamp(0, 1)
    for ours, theirs in zip(_many(network(x)), _many(model(x)), strict=True):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape))


def _many(result):
    return result if isinstance(result, tuple) else (result,)


def test_dorefa_quantizes_but_is_not_converted():
    network = trained(MODELS["blocks"](), Quantization(method="dorefa", activation_bits=4))
    values = network.evaluate_values(images())
    maps = values[network.layers[1].name]
    assert torch.allclose(maps * 15, (maps * 15).round(), atol=1e-4) and maps.unique().numel() > 4
    with pytest.raises(UnsupportedError, match="dorefa"):
        to_graph(network)


def test_calibration_keeps_what_a_trained_network_computes():
    torch.manual_seed(0)
    model = nn.Sequential(*conv_norm(3, 32), nn.ReLU(), Block(32, 32, 1), Block(32, 64, 2),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))  # fmt: skip
    x = torch.rand(64, *SHAPE)
    for _ in range(40):
        model.train()(x)  # moving averages
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(3)  # far beyond 0..1
    model.train()(x)
    network = prepare(model, Quantization(), SHAPE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(x)
    model.eval()
    calibrate(network, x)
    network.eval()
    ours, theirs = network(x).flatten(), model(x).flatten()
    assert 0.8 < ours.std() / theirs.std() < 1.2
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.9


@pytest.mark.parametrize("weight_scaling", ["fitted", "paper"])
def test_weights_of_four_bits_reach_their_codes(weight_scaling, tmp_path):
    """A convolution that adds little to a map of a large range."""
    torch.manual_seed(0)
    model = nn.Sequential(*conv_norm(3, 32), nn.ReLU(), Block(32, 32, 1), nn.Conv2d(32, 8, 1))
    nn.init.constant_(model[1].weight, 3)
    last = [module for module in model[3].modules() if isinstance(module, nn.BatchNorm2d)][-1]
    nn.init.constant_(last.weight, 0.05)
    for _ in range(40):
        model.train()(torch.rand(32, *SHAPE))
    network = prepare(model.eval(), WIDTHS["w4a4"], SHAPE)
    calibrate(network, torch.rand(64, *SHAPE), weight_scaling=weight_scaling)
    weights, _ = network.sums()[2].codes()
    (exponent,) = [int(term.exponent) for term in network.sums()[2].terms]
    if weight_scaling == "paper":
        assert exponent == 0 and not weights[0].any()
    else:
        assert exponent < -3 and (weights[0] != 0).float().mean() > 0.6
        assert weights[0].abs().max() == 7
    assert_every_engine_agrees(network.eval(), tmp_path)


def test_an_unknown_weight_scaling_is_refused():
    network = prepare(MODELS["blocks"](), Quantization(), SHAPE)
    with pytest.raises(OptionError, match=r"weight_scaling.*'fitted', 'paper'"):
        calibrate(network, images(), weight_scaling="auto")


def test_preparing_leaves_the_model_alone():
    model = MODELS["blocks"]()
    before = copy.deepcopy(model.state_dict())
    trained(model)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert all(".weight" in k or ".bias" in k for k in changed)  # which trained() itself sets
    assert not any("running" in k for k in changed)


# -- torchao ---------------------------------------------------------------------------------------


def test_quantize_of_torchao():
    torchao = pytest.importorskip("torchao")
    from tvm_mars.qat import MarsQATConfig, whole_model

    torch.manual_seed(0)
    model = MODELS["blocks"]()
    held = model
    torchao.quantize_(model, MarsQATConfig(step="prepare", weight_bits=4), filter_fn=whole_model)
    assert held is model and isinstance(model, MarsNetwork) and model.training
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images()).sum().backward()
    optimizer.step()
    state = copy.deepcopy(model.eval()).state_dict()
    expected = model(images())
    torchao.quantize_(model, MarsQATConfig(step="convert"), filter_fn=whole_model)
    assert isinstance(model, IntegerNetwork)
    assert torch.equal(model(images()), expected)
    assert not list(model.parameters()) and state


def test_config_survives_torchao_serialization():
    pytest.importorskip("torchao")
    from torchao.core import config as torchao_config

    from tvm_mars.qat import MarsQATConfig

    config = MarsQATConfig(weight_bits=4, layers={"layer1.*": {"weight_bits": 8}})
    torchao_config.ALLOWED_AO_MODULES.add("tvm_mars.qat.ao")
    text = torchao_config.config_to_dict(config)
    assert torchao_config.config_from_dict(text) == config


def test_the_default_filter_is_refused():
    torchao = pytest.importorskip("torchao")
    from tvm_mars.qat import MarsQATConfig, whole_model

    with pytest.raises(UnsupportedError, match="filter_fn=whole_model"):
        torchao.quantize_(MODELS["blocks"](), MarsQATConfig())
    with pytest.raises(UnsupportedError, match="step='prepare'"):
        torchao.quantize_(MODELS["blocks"](), MarsQATConfig(step="convert"), filter_fn=whole_model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_bits": 5},
        {"method": "lsq"},
        {"group": 0},
        {"layers": {"*": {"bits": 4}}},
        {"layers": {"*": {"weight_bits": 16}}},
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(OptionError):
        Quantization(**wrong)


# -- what is not taken -----------------------------------------------------------------------------


class Refused(nn.Module):
    """Convolutions that a given function combines."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.combine = forward

    def forward(self, x):
        return self.combine(self, x)


REFUSED = {
    "shares its weights with b": lambda m, x: m.b(m.b(m.a(x).relu()).relu()),
    "reads a, which has no ReLU": lambda m, x: m.b(m.a(x)),
    "directly behind one convolution": lambda m, x: m.norm(m.a(x).relu()),
    "no operation that MARS takes": lambda m, x: torch.sigmoid(m.a(x)),
    "before and after its ReLU": lambda m, x: (y := m.a(x)).relu() + y,
    "cannot be traced": lambda m, x: m.a(x).relu() if x.sum() > 0 else x,
    "does not flatten each image": lambda m, x: m.a(x).relu().view(-1, 4),
    "does not add two different maps": lambda m, x: m.a(x) + 1,
    "more than convolutions and one map": lambda m, x: (
        m.b(y := m.a(x).relu()) + y + functional.max_pool2d(y, 1)
    ),
    "averages over": lambda m, x: m.a(x).relu().mean(1),
    "adapts to": lambda m, x: functional.adaptive_avg_pool2d(m.a(x).relu(), 2),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_taken_is_refused_by_name(message):
    with pytest.raises(UnsupportedError, match=message):
        prepare(Refused(REFUSED[message]), Quantization(), SHAPE)


def test_tied_parameters_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    with pytest.raises(UnsupportedError, match="shares its weights with 0"):
        prepare(model, Quantization(), SHAPE)


def test_an_unknown_input_shape_is_asked_for():
    network = prepare(MODELS["conv bn relu"](), Quantization())
    with pytest.raises(UnsupportedError, match="input_shape"):
        to_graph(network)
    network.eval()(images())
    assert to_graph(network).inputs[0].shape == SHAPE


# -- through TVM onto MARS -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["functional", "blocks", "average pools"])
def test_exported_networks_run_on_mars(name, tmp_path):
    pytest.importorskip("tvm")
    import tvm_mars
    from mars_runtime import run

    network = trained(MODELS[name](), WIDTHS["w8a4"])
    export(network, tmp_path / "net.onnx")
    compiled = tvm_mars.compile(tmp_path / "net.onnx", target="mars")
    assert compiled.program is not None
    x = images(seed=99)
    (result,) = run(compiled.program, {"x0": x.numpy()}).values()
    with torch.no_grad():
        np.testing.assert_array_equal(result, network(x).numpy())
