"""Networks that Brevitas trained and its QCDQ export wrote."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional kernels that are not installed
    pytest.importorskip("brevitas")

import brevitas.nn as qnn  # noqa: E402
from brevitas import quant  # noqa: E402
from brevitas.export import export_onnx_qcdq  # noqa: E402
from torch import nn  # noqa: E402

from python_tests.observing import lowered  # noqa: E402
from python_tests.test_port import assert_codes, assert_whole  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of PyTorch's exporter
]

SHAPE = (3, 12, 12)


class Residual(nn.Module):
    """Quantized layers in Brevitas's way: codes that are added share one quantizer."""

    def __init__(self, weights: Any, inputs: Any, maps: Any, bits: tuple[int, int], bias: Any):
        super().__init__()
        weight_bits, map_bits = bits
        kinds = {"weight_quant": weights, "weight_bit_width": weight_bits}
        biased = {"bias": True, "bias_quant": bias, **kinds}
        activation = {"act_quant": maps, "bit_width": map_bits, "return_quant_tensor": True}
        self.entry = qnn.QuantIdentity(act_quant=inputs, return_quant_tensor=True)
        self.stem = qnn.QuantConv2d(3, 16, 3, padding=1, bias=False, **kinds)
        self.norm0, self.relu0 = nn.BatchNorm2d(16), qnn.QuantReLU(**activation)
        self.depthwise = qnn.QuantConv2d(16, 16, 3, padding=1, groups=16, **biased)
        self.relu1 = qnn.QuantReLU(**activation)
        self.conv = qnn.QuantConv2d(16, 16, 3, padding=1, bias=False, **kinds)
        self.norm2 = nn.BatchNorm2d(16)
        self.both = qnn.QuantIdentity(act_quant=inputs, bit_width=8, return_quant_tensor=True)
        self.relu2 = qnn.QuantReLU(**activation)
        self.pool = nn.MaxPool2d(2)
        self.out = qnn.QuantLinear(16 * 36, 10, **biased)

    def forward(self, x: Any) -> Any:
        x = self.relu0(self.norm0(self.stem(self.entry(x))))
        y = self.norm2(self.conv(self.relu1(self.depthwise(x))))
        x = self.pool(self.relu2(self.both(y) + self.both(x)))
        return self.out(torch.flatten(x, 1))


# Weights, entering and inner maps, their bits, biases.
SCHEMES = {
    "w8a8 per tensor": (
        quant.Int8WeightPerTensorFloat, quant.Int8ActPerTensorFloat,
        quant.Uint8ActPerTensorFloat, (8, 8), None,
    ),
    "w4a4 per channel": (
        quant.Int8WeightPerChannelFloat, quant.Int8ActPerTensorFloat,
        quant.Uint8ActPerTensorFloat, (4, 4), None,
    ),
    "w4a8 powers of two": (
        quant.Int8WeightPerTensorFixedPoint, quant.Int8ActPerTensorFixedPoint,
        quant.Uint8ActPerTensorFixedPoint, (4, 8), quant.Int32Bias,
    ),
    "zero points": (
        quant.ShiftedUint8WeightPerTensorFloat, quant.ShiftedUint8ActPerTensorFloat,
        quant.ShiftedUint8ActPerTensorFloat, (8, 8), quant.Int8Bias,
    ),
}  # fmt: skip


def exported(scheme: str, path: Path) -> onnx.ModelProto:
    torch.manual_seed(0)
    model = Residual(*SCHEMES[scheme])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, *SHAPE)).square().mean().backward()
        optimizer.step()
    options = {"dynamo": False, "opset_version": 17, "dynamic_axes": {"image": {0: "N"}}}
    names = {"input_names": ["image"], "output_names": ["scores"]}
    export_onnx_qcdq(model.eval(), torch.randn(1, *SHAPE), str(path), **options, **names)
    return onnx.load(path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_brevitas(scheme: str, tmp_path: Path) -> None:
    model = exported(scheme, tmp_path / "net.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("BatchNormalization") == 2 and ("Clip" in kinds) == (scheme != "zero points")
    assert_whole(model, ["add", "conv2d", "conv2d", "conv2d", "matmul", "max_pool2d"])
    generator = torch.Generator().manual_seed(1)
    assert_codes(model, {"image": torch.randn(8, *SHAPE, generator=generator).numpy()}, 4)
    weight_bits, map_bits = SCHEMES[scheme][3]
    graph = lowered(model).graph
    terms = [term for layer in graph.layers if layer.kind == "conv" for term in layer.terms]
    assert {term.weight_bits for term in terms} == {weight_bits}
    assert graph.types[graph.layers[0].name].bits == map_bits
