"""Load and run programs that someone made up: run by test_program.py in a process of its own.

Each must give a result or a :class:`MarsError`, soon and without taking the machine's memory. What
does not is printed, one line each.
"""

from __future__ import annotations

import copy
import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from mars_runtime import Program, isa, run, run_region, simulate
from mars_runtime.errors import MarsError
from python_tests.small_networks import open_program, seal_program, small_program

MEMORY = 3 * 2**29  # beside what the interpreter has mapped already
SECONDS = 2.0

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 255, 256, 2**31 - 1, 2**32, 2**62, 10**30, -(10**30), 0.5,
    -0.0, 1e300, -1e300, math.nan, math.inf, "", "x", "float32", "mars", [], [0], [-1], [10**12],
    [1] * 70, [10**6, 10**6], {}, {"x": 1}, [[[[[]]]]],
)  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in some JSON."""
    if path:
        yield path
    if isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            yield from leaves(child, (*path, key))


def changed(index: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Give the index with one value replaced, or removed for ``Ellipsis``."""
    index = copy.deepcopy(index)
    at = index
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return index


def indexes(index: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield indexes with something wrong in them."""
    for path in leaves(index):
        if path[-1] == "network" or (path[0] == "arch" and len(path) == 1):
            continue
        for value in (..., *VALUES):
            yield f"{path} = {value!r}"[:120], json.dumps(changed(index, path, value)).encode()
    yield "extra key", json.dumps({**index, "x": 1}).encode()
    for text in (b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{}" * 2, b"NaN"):
        yield repr(text), text
    yield "deep list", b"[" * 100_000 + b"]" * 100_000
    yield "deep dict", b'{"regions":' * 100_000 + b"1" + b"}" * 100_000
    yield "long integer", b'{"regions":' + b"9" * 10_000 + b"}"
    # What would fit together if only the memory were there.
    big = changed(index, ("arch", "offchip_bytes"), 2**31)
    yield (
        "large off-chip",
        json.dumps(changed(big, ("regions", 0, "offchip_words"), 2**31 // 8)).encode(),
    )
    yield "large banks", json.dumps(changed(index, ("arch", "bank_bits"), 64 * 2**20)).encode()
    wide = {**index["arch"], "cores": 16, "top_clock_mhz": 1600, "weight_sram_bits": 2**31}
    yield "large SRAMs", json.dumps({**index, "arch": wide}).encode()


def codes(rng: np.random.Generator, code: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield streams with bits flipped, fields at their bounds, instructions shuffled."""
    instructions = isa.decode_all(code)
    for number in range(600):
        data = bytearray(code)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(data)))
            data[at] ^= 1 << int(rng.integers(8))
        yield f"flips {number}", bytes(data)
    for i, one in enumerate(instructions):
        for field in type(one).__attrs_attrs__:
            for value in {field.metadata["low"], field.metadata["high"]}:
                if field.name in ("wait", "signal") and value:
                    continue
                stream = [*instructions[:i], _with(one, field.name, value), *instructions[i + 1 :]]
                yield f"{i} {type(one).__name__}.{field.name} = {value}", isa.encode_all(stream)
    for number in range(100):
        order = rng.permutation(len(instructions) - 1)
        stream = [*(instructions[i] for i in order), instructions[-1]]
        yield f"shuffle {number}", isa.encode_all(stream)
    for number in range(100):
        yield f"noise {number}", rng.bytes(len(code))
        stream = [_random_instruction(rng) for _ in range(30)]
        yield f"random fields {number}", isa.encode_all([*stream, isa.Halt()])


def _with(instruction: Any, name: str, value: int) -> Any:
    fields = {f.name: getattr(instruction, f.name) for f in type(instruction).__attrs_attrs__}
    return type(instruction)(**{**fields, name: value})


def _random_instruction(rng: np.random.Generator) -> isa.Instruction:
    spec = isa.INSTRUCTIONS[int(rng.integers(len(isa.INSTRUCTIONS) - 1))]
    values = {}
    for field in spec.__attrs_attrs__[2:]:
        low, high = field.metadata["low"], field.metadata["high"]
        small = min(high, max(low, int(rng.integers(0, 20))))
        values[field.name] = small if rng.random() < 0.8 else int(rng.integers(low, high + 1))
    return spec(**values)


def images(rng: np.random.Generator, index: dict[str, Any], rest: bytes) -> Iterator[Any]:
    """Yield files whose index codes, descriptors and parameters are noise."""
    size = index["regions"][0]["image"]
    for number in range(200):
        data = bytearray(rest)
        for _ in range(int(rng.integers(1, 30))):
            data[len(rest) - size + int(rng.integers(min(size, 4000)))] = int(rng.integers(256))
        yield f"image {number}", bytes(data)


def attempt(data: bytes) -> None:
    """Load and run one program with arrays that it asks for."""
    program = Program.from_bytes(data)
    for number, region in enumerate(program.regions):
        simulate(region, program.arch)
        arrays = [
            np.zeros((1, *port.shape), port.quantize.dtype) + np.ones(1, port.quantize.dtype)
            for port in region.inputs
        ]
        run_region(program, number, arrays)
    named = {
        port.name: array for port, array in zip(program.regions[0].inputs, arrays, strict=False)
    }
    run(program, {name: named.get(name, arrays[0]) for name in program.inputs})


def main() -> None:
    """Try all; print what fails, and how many were tried."""
    part = sys.argv[1]
    rng = np.random.default_rng(0)
    index, rest = open_program(small_program().to_bytes())
    size = index["regions"][0]["code"]
    cases: Iterator[tuple[str, bytes]]
    if part == "index":
        cases = ((name, seal_program(text, rest)) for name, text in indexes(index))
    elif part == "code":
        # Streams of another length need an index that says so.
        cases = (
            (
                name,
                seal_program(changed(index, ("regions", 0, "code"), len(code)), code + rest[size:]),
            )
            for name, code in codes(rng, rest[:size])
        )
    else:
        cases = ((name, seal_program(index, data)) for name, data in images(rng, index, rest))
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    warnings.simplefilter("error")
    tried = refused = 0
    for name, data in cases:
        tried += 1
        start = time.process_time()
        try:
            attempt(data)
        except MarsError:
            refused += 1
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}"[:300])
        if time.process_time() - start > SECONDS:
            print(f"{name}: took {time.process_time() - start:.1f} s")
    print(f"tried {tried} refused {refused}")


if __name__ == "__main__":
    main()
