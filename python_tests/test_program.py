"""The program file: what was written is read; anything else is refused by a typed error, soon."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, Program, load_cached, run, run_region, simulate
from mars_runtime.errors import InputError, ProgramError
from mars_runtime.program import HostReason
from python_tests.random_graphs import random_graph, random_inputs
from python_tests.small_networks import (
    every_kind_of_layer,
    open_program,
    seal_program,
    small_program,
)
from tvm_mars.compiler import NamedGraph, build
from tvm_mars.graph import evaluate

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data() -> bytes:
    return small_program().to_bytes()


def test_program_round_trips_in_bytes_and_in_a_file(data, tmp_path):
    program = Program.from_bytes(data)
    assert program == small_program()
    assert program.to_bytes() == data
    path = tmp_path / "net.mars"
    path.write_bytes(b"something else")
    program.save(path)
    assert path.read_bytes() == data
    assert Program.load(path) == program
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


def test_random_programs_round_trip(first_seed):
    for seed in range(first_seed, first_seed + 20):
        program = build([NamedGraph.of(random_graph(seed))], PRESETS["mars"])
        assert Program.from_bytes(program.to_bytes()) == program


def test_failed_save_leaves_the_old_file(data, tmp_path, monkeypatch):
    path = tmp_path / "net.mars"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        Program.from_bytes(data).save(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_whole_program_gives_the_reference_by_name(data):
    graph = every_kind_of_layer()
    inputs = random_inputs(graph, 1, images=3)
    (expected,) = evaluate(graph, inputs)
    np.testing.assert_array_equal(run(Program.from_bytes(data), inputs)["y0"], expected)


def test_empty_and_large_batches(data, monkeypatch):
    program, graph = Program.from_bytes(data), every_kind_of_layer()
    inputs = random_inputs(graph, 2, images=7)
    whole = run(program, inputs)["y0"]
    monkeypatch.setattr(sys.modules["mars_runtime.run"], "_BATCH_BYTES", 1)
    np.testing.assert_array_equal(run(program, inputs)["y0"], whole)
    assert run(program, {"x0": inputs["x0"][:0]})["y0"].shape == (0, 20, 2, 2)


# -- damage ----------------------------------------------------------------------------------------


def refused(data: bytes | memoryview) -> ProgramError:
    start = time.process_time()
    with pytest.raises(ProgramError) as caught:
        Program.from_bytes(data)
    assert time.process_time() - start < 1  # of this process: others may be busy
    return caught.value


def test_truncation_anywhere_is_refused(data):
    for length in {*range(0, len(data), 64), *range(130), len(data) - 1}:
        refused(data[:length])
    refused(data + b"\0")


def test_two_thousand_flipped_bits_are_refused(data):
    rng = np.random.default_rng(7)
    flips = {int(bit) for bit in rng.integers(0, 8 * len(data), 1500)}
    flips |= {int(bit) for bit in rng.integers(0, 8 * 600, 600)} | set(range(512))
    assert len(flips) >= 2000
    damaged = bytearray(data)
    for bit in flips:
        damaged[bit // 8] ^= 1 << bit % 8
        refused(memoryview(damaged))
        damaged[bit // 8] ^= 1 << bit % 8
    assert bytes(damaged) == data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "fewer than a header"),
        (b"\x7fELF" + bytes(200), "not a MARS program"),
        (bytes(64), "not a MARS program"),
    ],
)
def test_foreign_files_are_refused(content, message, tmp_path):
    path = tmp_path / "other.mars"
    path.write_bytes(content)
    with pytest.raises(ProgramError, match=message) as caught:
        Program.load(path)
    assert "other.mars" in str(caught.value)


def test_missing_file_is_a_program_error(tmp_path):
    with pytest.raises(ProgramError, match=r"absent\.mars.*No such file"):
        Program.load(tmp_path / "absent.mars")


def test_another_version_is_named(data):
    with pytest.raises(ProgramError, match="format version 2"):
        Program.from_bytes(data[:8] + b"\2" + data[9:])


def test_hostile_files_are_sealed_as_the_runtime_seals(data):
    index, rest = open_program(data)
    assert Program.from_bytes(seal_program(index, rest)) == Program.from_bytes(data)


@pytest.mark.parametrize(("part", "least"), [("index", 4000), ("code", 2000), ("image", 200)])
def test_well_formed_but_hostile_programs_end_in_a_typed_error(part, least):
    """Thousands of programs with a good checksum, in a process whose memory is limited."""
    done = subprocess.run(
        [sys.executable, "-m", "python_tests.hostile", part],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    *failures, summary = done.stdout.splitlines() or [""]
    assert done.returncode == 0, done.stderr[-2000:]
    assert not failures, "\n".join(failures[:20])
    _, tried, _, refusals = summary.split()
    assert int(tried) >= least and int(refusals) > int(tried) // 2


def test_program_without_weights_cannot_be_written():
    region = attrs.evolve(small_program().regions[0], image=b"")
    with pytest.raises(ProgramError, match="no weights"):
        attrs.evolve(small_program(), regions=(region,)).to_bytes()


# -- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "missing"),
        (lambda x: {"x0": x, "x1": x}, "unknown"),
        (lambda x: {"x0": x[:, :, :4]}, r"input x0: shape \(2, 32, 4, 12\)"),
        (lambda x: {"x0": x[0]}, "input x0: shape"),
        (lambda x: {"x0": x.astype(np.float64)}, "float64, expected float32"),
        (lambda x: {"x0": np.where(x == x.max(), np.nan, x)}, "holds NaN"),
    ],
)
def test_wrong_arrays_are_refused(data, change, message):
    x = random_inputs(every_kind_of_layer(), 0)["x0"]
    with pytest.raises(InputError, match=message):
        run(Program.from_bytes(data), change(x))


def test_infinite_values_saturate(data):
    program, graph = Program.from_bytes(data), every_kind_of_layer()
    x = random_inputs(graph, 0)["x0"].copy()
    x[0, 0, 0, 0], x[0, 1, 0, 0] = np.inf, -np.inf
    np.testing.assert_array_equal(run(program, {"x0": x})["y0"], evaluate(graph, {"x0": x})[0])


def test_program_that_needs_the_cpu_says_which_operators(data):
    program = attrs.evolve(Program.from_bytes(data), host_operators=("softmax", "topk"))
    with pytest.raises(ProgramError, match="softmax, topk"):
        run(program, {})


def test_reasons_for_the_cpu_travel_and_change_no_other_program(data):
    program = Program.from_bytes(data)
    assert b"host_reasons" not in data and program.host_reasons == ()
    reason = HostReason("conv2d", "groups: 3, and the limit is <2>")
    given = attrs.evolve(program, host_operators=("nn.conv2d",), host_reasons=(reason,))
    assert Program.from_bytes(given.to_bytes()) == given


# -- cache -----------------------------------------------------------------------------------------


def test_cache_gives_one_program_for_equal_bytes_and_stays_bounded(data, monkeypatch):
    first = load_cached(data)
    assert load_cached(bytearray(data)) is first
    assert load_cached(memoryview(data)) is first
    damaged = bytearray(data)
    damaged[-1] ^= 1  # the header, and so the digest, is that of the good program
    with pytest.raises(ProgramError, match="checksum"):
        load_cached(damaged)
    monkeypatch.setattr("mars_runtime.program._CACHE_SIZE", 2)
    others = [attrs.evolve(first, host_operators=(str(number),)).to_bytes() for number in range(3)]
    for other in others:
        load_cached(other)
    assert load_cached(data) is not first and load_cached(data) == first


def test_timeline_does_not_need_weights(data):
    program = Program.from_bytes(data)
    bare = attrs.evolve(program.regions[0])
    assert simulate(bare, program.arch) == simulate(program.regions[0], program.arch)


# -- determinism -----------------------------------------------------------------------------------

DIGEST = """
import hashlib
from mars_runtime import PRESETS
from python_tests.random_graphs import random_graph
from python_tests.small_networks import small_program
from tvm_mars.compiler import NamedGraph, build
digest = hashlib.sha256(small_program().to_bytes())
for seed in range(12):
    digest.update(build([NamedGraph.of(random_graph(seed))], PRESETS["mars"]).to_bytes())
print(digest.hexdigest())
"""


def test_bytes_do_not_depend_on_the_hash_seed():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(digests) == 1 and len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


def test_region_takes_arrays_in_order_of_its_ports(data):
    program = Program.from_bytes(data)
    x = random_inputs(every_kind_of_layer(), 3)["x0"]
    np.testing.assert_array_equal(run_region(program, 0, [x])[0], run(program, {"x0": x})["y0"])
    with pytest.raises(InputError, match="0 arrays for 1 inputs"):
        run_region(program, 0, [])
