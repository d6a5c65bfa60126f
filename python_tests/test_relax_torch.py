"""Exported PyTorch programs, float and with PT2E's quantize and dequantize operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

import tvm_mars  # noqa: E402

RANGES = {"uint8": (0, 255), "int8": (-128, 127)}


def requantize(x: Any, scale: float, zero: int, low: int = 0, high: int = 255) -> Any:
    """Quantize and dequantize as PT2E writes it."""
    ops = torch.ops.quantized_decomposed
    codes = ops.quantize_per_tensor(x, scale, zero, low, high, torch.uint8)
    return ops.dequantize_per_tensor(codes, scale, zero, low, high, torch.uint8)


class Quantized(torch.nn.Module):
    """Convolutions (per tensor, per channel), an addition, a pool, 4-bit codes, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        import torch.ao.quantization.fx._decomposed  # registers the operators

        torch.manual_seed(0)
        self.register_buffer("w0", torch.randint(-127, 128, (32, 3, 3, 3), dtype=torch.int8))
        self.register_buffer("b0", torch.randn(32))
        self.register_buffer("w1", torch.randint(-127, 128, (32, 32, 3, 3), dtype=torch.int8))
        self.register_buffer("s1", torch.rand(32) * 1e-3 + 1e-3)
        self.register_buffer("z1", torch.zeros(32, dtype=torch.int64))
        self.register_buffer("w2", torch.randint(-127, 128, (10, 512), dtype=torch.int8))
        self.register_buffer("b2", torch.randn(10))

    def forward(self, x: Any) -> Any:
        ops = torch.ops.quantized_decomposed
        conv = torch.nn.functional.conv2d
        x = requantize(x, 0.02, 128)
        w = ops.dequantize_per_tensor(self.w0, 0.01, 0, -127, 127, torch.int8)
        x = requantize(torch.relu(conv(x, w, self.b0, padding=1)), 0.1, 0)
        w = ops.dequantize_per_channel(self.w1, self.s1, self.z1, 0, -127, 127, torch.int8)
        y = requantize(conv(x, w, padding=1), 0.3, 120)
        x = requantize(torch.relu(x + y), 0.2, 0)
        x = torch.nn.functional.max_pool2d(x, 2)
        x = requantize(x, 1.7, 0, 0, 15)  # no ties on the grid of 0.2
        w = ops.dequantize_per_tensor(self.w2, 0.005, 0, -127, 127, torch.int8)
        return torch.nn.functional.linear(torch.flatten(x, 1), w, self.b2)


def run(model: Any, x: Any) -> tuple[Any, Any, Any]:
    compiled = tvm_mars.compile(torch.export.export(model.eval(), (x,)))
    (name,) = compiled.input_names
    (ours,) = compiled.run({name: x.numpy()}).values()
    return compiled, ours, model(x).detach().numpy()


def test_a_quantized_program_goes_to_mars() -> None:
    compiled, ours, theirs = run(Quantized(), torch.rand(4, 3, 8, 8) * 5 - 2.5)
    kinds = [decision.op for decision in compiled.report.offloaded]
    assert kinds.count("conv2d") == 2 and "max_pool2d" in kinds and "matmul" in kinds
    assert "add" in kinds and not compiled.report.rejected and not compiled.report.host_operators
    # A code near a tie may fall to the other side; it must not grow.
    assert np.abs(ours - theirs).max() <= 0.02 * np.abs(theirs).max()


def test_a_float_program_stays_on_the_cpu() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    compiled, ours, theirs = run(model, torch.rand(2, 3, 8, 8))
    assert compiled.program is None
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
