"""The exact engine: whole layers, lifted from a program, on the host's dot-product instructions."""

from __future__ import annotations

import bisect
import collections
import contextlib
import ctypes
import functools
import hashlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import layers, native
from .arch import MarsArch
from .cache import code_digest, kept
from .errors import OptionError
from .layers import Layers
from .lift import NotLifted, lift
from .plan import Plan, dot_products, map_bytes
from .program import Region

__all__ = ["Engine", "engine_of", "thread_count"]

Array: TypeAlias = npt.NDArray[Any]
_Piece: TypeAlias = tuple[slice, int]  # images that run together, and the size of their chunk

CHUNKS = (1, 4, 16)  # images that go through the layers together
CHUNK_BYTES = 32 * 2**20  # of maps, at most, unless one image has more
SHARED_WORK = 2**20  # dot products for each thread that shares layers: 0.25 ms of the best kernels


def thread_count() -> int:
    """Give how many threads to use: ``MARS_NUM_THREADS``, or the processors of this process.

    Raises
    ------
    OptionError
        If the variable is no positive number.
    """
    wanted = os.environ.get("MARS_NUM_THREADS", "")
    if not wanted:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if not wanted.isdigit() or not int(wanted):
        raise OptionError(f"{wanted!r} is no positive number", where="MARS_NUM_THREADS")
    return int(wanted)


# -- running ---------------------------------------------------------------------------------------


class _Runner:
    """A plan with memory of its own."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.arena = plan.arena()
        self.steps = plan.steps + plan.moving * self.arena.ctypes.data
        self.words = plan.words(self.arena)
        self.meeting = np.zeros(16, np.int64)
        self.meeting[8] = _yield_address()
        self.addresses = (self.steps.ctypes.data, self.meeting.ctypes.data)
        self.outputs = [plan.buffers[number].view(self.arena) for number in plan.layers.outputs]

    def run(self, inputs: Sequence[Array], pool: ThreadPoolExecutor | None) -> list[Array]:
        """Run images, at most the plan's; give the outputs' codes ``[N, C, H, W]``."""
        given = [_whole(array, self.plan.images) for array in inputs]
        self.point_to(given)
        self.meeting[0] = 0
        shares = range(1, self.plan.threads) if pool else ()
        others = [pool.submit(self._share, thread) for thread in shares] if pool else []
        self._share(0)
        for other in others:
            other.result()
        if self.words[-1]:
            for entry, array in zip(self.plan.layers.inputs, inputs, strict=True):
                entry.quantize.apply(array, f"input {entry.name}")  # says what is wrong
        return [_from_blocks(view[: len(inputs[0])]) for view in self.outputs]

    def point_to(self, given: Sequence[Array]) -> None:
        """Let the steps read these arrays, of the plan's number of images."""
        for number, array in enumerate(given):
            self.words[number] = array.ctypes.data

    def _share(self, thread: int) -> None:
        steps, meeting = self.addresses
        self.plan.library.run(steps, len(self.steps), thread, self.plan.threads, meeting)


def _whole(array: Array, images: int) -> Array:
    """Give an array without gaps, of so many images: the first one again where it has fewer."""
    if len(array) == images:
        return np.ascontiguousarray(array)
    padded = np.empty((images, *array.shape[1:]), array.dtype)
    padded[: len(array)], padded[len(array) :] = array, array[:1]
    return padded


@functools.cache
def _yield_address() -> int:
    """Give the address of what gives up the processor for a moment, or 0."""
    if sys.platform == "win32":
        return 0
    found = getattr(ctypes.CDLL(None), "sched_yield", None)
    return ctypes.cast(found, ctypes.c_void_p).value or 0 if found else 0


def _from_blocks(view: Array) -> Array:
    """Give a map's codes ``[N, 16 * blocks, H, W]``."""
    images, blocks, height, width, channels = view.shape
    return view.transpose(0, 1, 4, 2, 3).reshape(images, blocks * channels, height, width)


class Engine:
    """Lifted layers, ready to run on this processor.

    Parameters
    ----------
    network : Layers
    variant : str
        One of :func:`mars_runtime.native.variants`.
    """

    def __init__(self, network: Layers, variant: str) -> None:
        self.network, self.variant = network, variant
        size = sum(map(map_bytes, network.maps))
        self.largest = max((n for n in CHUNKS if n * size <= CHUNK_BYTES), default=CHUNKS[0])
        self.work = sum(dot_products(layer, network.maps[layer.out]) for layer in network.layers)
        self._plans: dict[tuple[int, int], Plan] = {}
        self._idle: dict[tuple[int, int], queue.SimpleQueue[_Runner]] = {}
        self._lock = threading.Lock()

    def run(
        self,
        inputs: Sequence[Array],
        take: Callable[[slice, Sequence[Array]], None],
        threads: int,
    ) -> None:
        """Run a batch, some images at a time.

        Parameters
        ----------
        inputs : sequence of arrays
            For each input a batch of as many values as its map has channels and pixels.
        take : callable
            Told the codes of each output ``[n, 16 * blocks, H, W]``, uint8 or int32, for some of
            the images; several threads call it.
        threads : int
            Threads that share the work: whole chunks each, or each layer if there is but one.

        Raises
        ------
        InputError
            If an array has another dtype, or a value is NaN or out of range.
        """
        for entry, array in zip(self.network.inputs, inputs, strict=True):
            entry.quantize.check_type(array, f"input {entry.name}")
        pieces = self._pieces(len(inputs[0]))
        if len(pieces) == 1:
            self._run_piece(pieces[0], inputs, take, threads)
            return
        left: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        for piece in pieces:
            left.put(piece)

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._run_piece(left.get_nowait(), inputs, take, 1)

        helpers = min(threads, len(pieces)) - 1
        others = [_threads(threads).submit(work) for _ in range(helpers)]
        work()
        for other in others:
            other.result()

    def _pieces(self, images: int) -> list[_Piece]:
        """Cut a batch into images that run together, and the size of their chunk."""
        found = []
        for at in range(0, images, self.largest):
            count = min(images - at, self.largest)
            found.append((slice(at, at + count), CHUNKS[bisect.bisect_left(CHUNKS, count)]))
        return found

    def _run_piece(
        self,
        piece: _Piece,
        inputs: Sequence[Array],
        take: Callable[[slice, Sequence[Array]], None],
        threads: int,
    ) -> None:
        """Run some images that go through the layers together."""
        part, chunk = piece
        sharing = self._sharing(chunk, threads)
        idle = self._idle_runners(chunk, sharing)
        try:
            runner = idle.get_nowait()
        except queue.Empty:
            runner = _Runner(self._plans[chunk, sharing])
        pool = _threads(threads) if sharing > 1 else None
        take(part, runner.run([array[part] for array in inputs], pool))
        idle.put(runner)  # but one that failed

    def _sharing(self, chunk: int, threads: int) -> int:
        """Give how many threads share the layers of one chunk: none waits longer than it works."""
        return max(1, min(threads, chunk * self.work // SHARED_WORK))

    def _idle_runners(self, chunk: int, threads: int) -> queue.SimpleQueue[_Runner]:
        """Give the runners of a plan that nobody uses."""
        key = (chunk, threads)
        with self._lock:
            if key not in self._plans:
                self._plans[key] = Plan(self.network, self.variant, chunk, threads)
                self._idle[key] = queue.SimpleQueue()
            return self._idle[key]


@functools.lru_cache(maxsize=4)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, count - 1), thread_name_prefix="mars")


# -- engines of regions ----------------------------------------------------------------------------


_KEPT = 16
_Entry: TypeAlias = tuple[Region, MarsArch, Engine | None]
_engines: collections.OrderedDict[tuple[int, str], _Entry] = collections.OrderedDict()
_engines_lock = threading.Lock()


def engine_of(region: Region, arch: MarsArch) -> Engine | None:
    """Give a region's engine, or None if it is no sequence of whole layers.

    Its kernels are those that ``MARS_KERNELS`` names, else the best that the processor executes.
    The last 16 engines are kept, by the region's identity.

    Raises
    ------
    MachineError
        If the machine cannot execute the region.
    OptionError
        If the processor does not execute the kernels that are asked for.
    """
    key = (id(region), _variant())
    with _engines_lock:
        found = _engines.get(key)
        if found and found[0] is region and (found[1] is arch or found[1] == arch):
            _engines.move_to_end(key)
            return found[2]
    network = _lifted(region, arch)
    engine = None if network is None else Engine(network, key[1])
    with _engines_lock:
        _engines[key] = (region, arch, engine)
        while len(_engines) > _KEPT:
            _engines.popitem(last=False)
    return engine


def _variant() -> str:
    able = native.variants()
    wanted = os.environ.get("MARS_KERNELS") or able[0]
    if wanted not in able:
        raise OptionError(
            f"{wanted!r} is not what this processor executes",
            where="MARS_KERNELS",
            hint=f"one of {', '.join(able)}",
        )
    return wanted


def _lifted(region: Region, arch: MarsArch) -> Layers | None:
    """Lift a region, or read what was lifted from the cache."""
    digest = hashlib.sha256(region.code)
    digest.update(region.image)
    about = (region.inputs, region.outputs, region.layers, region.offchip_words, arch)
    digest.update(repr((code_digest(), len(region.code), about)).encode())

    def made() -> bytes:
        try:
            return layers.dump(lift(region, arch))
        except NotLifted:
            return b""

    content = kept(f"{digest.hexdigest()}.layers", made)
    return layers.load(content) if content else None
