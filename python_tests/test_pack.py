"""Packing: every non-zero weight is stored once, nothing else is, in the order of the segments."""

from __future__ import annotations

import numpy as np
import pytest

from mars_runtime import PRESETS
from mars_runtime.packing import (
    group_set_bytes,
    pack_group_sets,
    pack_parameters,
    unpack_group_sets,
    unpack_parameters,
)
from python_tests.random_graphs import group_sets, random_graph
from tvm_mars.graph import Conv
from tvm_mars.pack import PackedConv, corrected_bias, pack_conv

MARS, DENSE = PRESETS["mars"], PRESETS["mars-dense"]


def convolutions(seeds):
    for seed in seeds:
        graph = random_graph(seed)
        for layer in graph.layers:
            if isinstance(layer, Conv):
                yield graph, layer


def unpacked(layer: Conv, packed: PackedConv, number: int, channels: int) -> np.ndarray:
    """Put a term's group-sets back into a dense weight ``[O, C, taps]``."""
    term = layer.terms[number]
    taps = term.kernel[0] * term.kernel[1]
    blocks = -(-channels // 16)
    dense = np.zeros((len(packed.blocks) * 16, blocks * 16, taps), np.int64)
    for out, block in enumerate(packed.blocks):
        for i in np.flatnonzero(block.terms == number):
            tap, given = block.taps[i], block.inputs[i]
            place = dense[out * 16 : out * 16 + 16, given * 16 : given * 16 + 16, tap]
            assert not place.any(), "stored twice"
            place[:] = block.weights[i]
    return dense


def spread(term) -> np.ndarray:
    """Write a grouped weight as the dense one ``[O, C, taps]``, channel by channel."""
    out, per_group = term.weight.shape[:2]
    dense = np.zeros((out, per_group * term.groups, term.kernel[0] * term.kernel[1]), np.int64)
    for kernel in range(out):
        base = kernel // (out // term.groups) * per_group
        dense[kernel, base : base + per_group] = term.weight[kernel].reshape(per_group, -1)
    return dense


def test_packed_weights_are_the_layers(first_seed):
    for graph, layer in convolutions(range(first_seed, first_seed + 60)):
        packed = pack_conv(layer, graph.types, MARS)
        for number, term in enumerate(layer.terms):
            dense = spread(term)
            found = unpacked(layer, packed, number, dense.shape[1])
            np.testing.assert_array_equal(found[: dense.shape[0], : dense.shape[1]], dense)
            assert not found[dense.shape[0] :].any() and not found[:, dense.shape[1] :].any()
        count = sum(int(np.count_nonzero(group_sets(term))) for term in layer.terms)
        assert packed.group_sets == count
        assert all(block.weights.any(axis=(1, 2)).all() for block in packed.blocks)


def test_segments_are_contiguous(first_seed):
    """A segment's term, tap base and block base never come back within a block."""
    for graph, layer in convolutions(range(first_seed, first_seed + 30)):
        for block in pack_conv(layer, graph.types, MARS).blocks:
            keys = [tuple(key) for key in block.segment_keys().tolist()]
            runs = [key for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
            assert len(runs) == len(set(runs))


def test_without_zero_skipping_all_group_sets_are_stored(first_seed):
    for graph, layer in convolutions(range(first_seed, first_seed + 20)):
        packed = pack_conv(layer, graph.types, DENSE)
        assert packed.group_sets == packed.dense_group_sets
        assert pack_conv(layer, graph.types, MARS).dense_group_sets == packed.dense_group_sets
        plain = [t for t in layer.terms if t.groups == 1]
        if len(plain) == len(layer.terms):
            assert packed.group_sets == sum(group_sets(term).size for term in layer.terms)


def test_bias_makes_up_for_zero_points():
    """Correct with stored codes: one pixel, every tap inside, worked out in Python integers."""
    for graph, layer in convolutions(range(20)):
        bias = corrected_bias(layer, graph.types)
        for channel in (0, len(bias) - 1):
            expected = int(layer.bias[channel])
            for term in layer.terms:
                zero = graph.types[term.input].zero_point
                expected -= zero * sum(map(int, term.weight[channel].ravel())) << term.shift
            if layer.residual:
                expected -= graph.types[layer.residual.input].zero_point << layer.residual.shift
            assert int(bias[channel]) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_group_sets_round_trip_at_every_value(bits):
    limit = 2 ** (bits - 1)
    rng = np.random.default_rng(bits)
    weights = rng.integers(-limit, limit, (40, 16, 16)).astype(np.int8)
    weights[0], weights[1] = -limit, limit - 1
    data = pack_group_sets(weights, bits)
    assert data.shape == (40, group_set_bytes(bits)) == (40, 32 * bits)
    np.testing.assert_array_equal(unpack_group_sets(data, bits), weights.transpose(0, 2, 1))


def test_layout_is_input_quad_output_lane():
    """[input / 4][output 16][input 4]: output 3, input 6 lies at 1 * 64 + 3 * 4 + 2."""
    weights = np.zeros((1, 16, 16), np.int8)
    weights[0, 3, 6] = -7
    assert np.flatnonzero(pack_group_sets(weights, 8)).tolist() == [78]
    four = pack_group_sets(weights, 4)[0]
    assert np.flatnonzero(four).tolist() == [39] and four[39] == 9  # -7 in the low nibble


@pytest.mark.parametrize("with_multiplier", [False, True])
def test_parameters_round_trip_at_their_bounds(with_multiplier):
    bias = np.array([[-(2**31), 2**31 - 1, *range(14)]])
    multiplier = bias[:, ::-1] if with_multiplier else None
    shift = np.array([[62, *range(15)]]) if with_multiplier else None
    (record,) = pack_parameters(bias, multiplier, shift)
    assert len(record) == (144 if with_multiplier else 64)
    found = unpack_parameters(record)
    np.testing.assert_array_equal(found[0], bias[0])
    if with_multiplier:
        np.testing.assert_array_equal(found[1], multiplier[0])
        np.testing.assert_array_equal(found[2], shift[0])
    else:
        assert found[1].size == found[2].size == 0
