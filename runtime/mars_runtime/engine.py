"""The exact engine: whole layers, lifted from a program, on the host's dot-product instructions."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import hashlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
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
from .maps import WORD_CHANNELS
from .plan import Plan, dot_products, map_bytes
from .program import Region

__all__ = ["Engine", "engine_of", "thread_count"]

Array: TypeAlias = npt.NDArray[Any]

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
        self.meeting = np.zeros(16, np.int64)
        self.meeting[8] = _yield_address()
        buffers, network = plan.buffers, plan.layers
        self.inputs = [buffers[number].view(self.arena) for number in network.inputs]
        self.outputs = [buffers[number].view(self.arena) for number in network.outputs]
        for view in self.inputs:
            view[:] = 0  # of which channels that are absent stay so

    def run(self, codes: Sequence[Array], pool: ThreadPoolExecutor | None) -> list[Array]:
        """Run images ``[N, C, H, W]``, at most the plan's; give the outputs' codes likewise."""
        for view, given in zip(self.inputs, codes, strict=True):
            _to_blocks(given, view)
        self.meeting[0] = 0
        shares = range(1, self.plan.threads) if pool else ()
        others = [pool.submit(self._share, thread) for thread in shares] if pool else []
        self._share(0)
        for other in others:
            other.result()
        return [_from_blocks(view[: len(codes[0])]) for view in self.outputs]

    def _share(self, thread: int) -> None:
        self.plan.library.run(
            self.steps.ctypes.data,
            len(self.steps),
            thread,
            self.plan.threads,
            self.meeting.ctypes.data,
        )


@functools.cache
def _yield_address() -> int:
    """Give the address of what gives up the processor for a moment, or 0."""
    if sys.platform == "win32":
        return 0
    found = getattr(ctypes.CDLL(None), "sched_yield", None)
    return ctypes.cast(found, ctypes.c_void_p).value or 0 if found else 0


def _to_blocks(codes: Array, view: Array) -> None:
    """Place codes ``[N, C, H, W]`` in a map's blocks; absent channels hold code 0 already."""
    images, channels, height, width = codes.shape
    for first in range(0, channels, WORD_CHANNELS):
        part = codes[:, first : first + WORD_CHANNELS]
        block = view[:images, first // WORD_CHANNELS, ..., : part.shape[1]]
        if height * width < part.shape[1]:
            block[:] = part.transpose(0, 2, 3, 1)
            continue
        for channel in range(part.shape[1]):  # long rows are what NumPy copies fast
            block[..., channel] = part[:, channel]


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
        images: int,
        give: Callable[[slice], Sequence[Array]],
        take: Callable[[slice, Sequence[Array]], None],
        threads: int,
    ) -> None:
        """Run a batch, some images at a time.

        Parameters
        ----------
        give : callable
            Gives the stored codes of some images, for each input ``[n, C, H, W]`` of uint8.
        take : callable
            Told the codes of each output ``[n, 16 * blocks, H, W]``, uint8 or int32. Both are
            called by several threads.
        threads : int
            Threads that share the work: whole chunks each, or each layer if there is but one.
        """
        pieces = list(self._pieces(images))
        alone = len(pieces) == 1
        left: queue.SimpleQueue[tuple[slice, int]] = queue.SimpleQueue()
        for piece in pieces:
            left.put(piece)

        def work() -> None:
            while True:
                try:
                    part, chunk = left.get_nowait()
                except queue.Empty:
                    return
                sharing = self._sharing(chunk, threads) if alone else 1
                with self._runner(chunk, sharing) as runner:
                    pool = _threads(threads) if sharing > 1 else None
                    take(part, runner.run(give(part), pool))

        helpers = min(threads, len(pieces)) - 1
        others = [_threads(threads).submit(work) for _ in range(helpers)]
        work()
        for other in others:
            other.result()

    def _pieces(self, images: int) -> Iterator[tuple[slice, int]]:
        """Cut a batch into images that run together, and the size of their chunk."""
        for at in range(0, images, self.largest):
            part = slice(at, min(images, at + self.largest))
            yield part, next(size for size in CHUNKS if size >= part.stop - at)

    def _sharing(self, chunk: int, threads: int) -> int:
        """Give how many threads share the layers of one chunk: none waits longer than it works."""
        return max(1, min(threads, chunk * self.work // SHARED_WORK))

    @contextlib.contextmanager
    def _runner(self, chunk: int, threads: int) -> Iterator[_Runner]:
        """Lend a runner that nobody uses."""
        with self._lock:
            key = (chunk, threads)
            if key not in self._plans:
                self._plans[key] = Plan(self.network, self.variant, chunk, threads)
                self._idle[key] = queue.SimpleQueue()
        try:
            runner = self._idle[key].get_nowait()
        except queue.Empty:
            runner = _Runner(self._plans[key])
        yield runner
        self._idle[key].put(runner)


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
        if found is not None and found[0] is region and found[1] == arch:
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
