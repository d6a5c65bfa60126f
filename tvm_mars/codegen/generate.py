"""From a graph, its packing and its schedule to a region: instructions and off-chip image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import attrs
import numpy as np

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.errors import CapacityError
from mars_runtime.maps import RAW_BITS, WORD_BYTES, MapType
from mars_runtime.packing import group_set_bytes
from mars_runtime.program import InputPort, LayerInfo, OutputPort, Region
from mars_runtime.timing import RAW_WORDS

from ..graph import Add, Conv, Graph, Pool, layer_macs
from ..pack import PackedConv
from ..schedule import LayerSchedule, Load, Place, Schedule, Step, scheduled_steps
from ..schedule.plan import Window, input_windows
from .emitter import Emitter, Span
from .image import Image, LoadImage

__all__ = ["generate"]


@attrs.frozen
class _Source:
    """Where a tile's input lies in a bank: the map or the staged part of it."""

    place: Place
    type: MapType
    block: int
    blocks: int
    height: int
    width: int
    origin: tuple[int, int]

    @property
    def span(self) -> Span:
        """Words that it occupies."""
        size = self.type.planes * self.blocks * self.height * self.width
        return (("bank", self.place.bank), self.place.base, self.place.base + size)


class _Generator:
    def __init__(
        self,
        graph: Graph,
        arch: MarsArch,
        packed: Mapping[str, PackedConv],
        schedule: Schedule,
        with_weights: bool,
    ) -> None:
        self.graph, self.arch, self.packed, self.schedule = graph, arch, packed, schedule
        self.types = graph.types
        self.out = Emitter()
        self.image = Image()
        self.steps = scheduled_steps(graph, schedule)
        self.loads: dict[str, list[LoadImage]] = {
            entry.layer: [
                self.image.add_load(packed[entry.layer], load, with_weights) for load in entry.loads
            ]
            for entry in schedule.layers
        }
        self.image_bytes = self.image.table_bytes + self.image.weight_bytes
        self.next_word = -(-self.image_bytes // WORD_BYTES)
        self.addresses: dict[str, int] = {}
        self.rings: dict[object, int] = {}
        self.settings: dict[tuple[int, object], object] = {}
        self.staged: dict[Place, tuple[str, Window]] = {}

    def region(
        self, input_names: Sequence[str], output_names: Sequence[str], network: str
    ) -> Region:
        for entry in self.graph.inputs:
            self._address(entry.name)
        for number, (step, schedule) in enumerate(
            zip(self.steps, self.schedule.layers, strict=True)
        ):
            self.out.layer = number
            self._layer(step, schedule)
        outputs = tuple(
            OutputPort(
                name,
                self.types[out.value],
                tuple(out.shape),
                self._address(out.value),
                out.dequantize,
            )
            for name, out in zip(output_names, self.graph.outputs, strict=True)
        )
        inputs = tuple(
            InputPort(
                name, entry.type, tuple(entry.shape), self._address(entry.name), entry.quantize
            )
            for name, entry in zip(input_names, self.graph.inputs, strict=True)
        )
        if self.next_word * WORD_BYTES > self.arch.offchip_bytes:
            raise CapacityError(
                "weights and maps do not fit off-chip memory",
                op="network",
                need=self.next_word * WORD_BYTES,
                have=self.arch.offchip_bytes,
                unit="bytes",
                hint="raise offchip_bytes",
            )
        self.out.emit(isa.Halt(), (("controller", 0),))
        instructions, layer_of = self.out.finish()
        return Region(
            inputs,
            outputs,
            self._layer_table(layer_of),
            isa.encode_all(instructions),
            b"".join([*self.image.tables, *self.image.weights]),
            self.image_bytes,
            self.next_word,
            network,
        )

    def _layer_table(self, layer_of: Sequence[int]) -> tuple[LayerInfo, ...]:
        ends = np.searchsorted(layer_of, np.arange(len(self.steps)), side="right")
        table = []
        start = 0
        for step, end in zip(self.steps, ends, strict=True):
            layer = step.layer
            packed = self.packed.get(layer.name)
            table.append(
                LayerInfo(
                    layer.name if not step.pool else f"{layer.name}+{step.pool.name}",
                    layer.kind,
                    start,
                    int(end),
                    layer_macs(layer, self.types),
                    packed.group_sets if packed else 0,
                    packed.dense_group_sets if packed else 0,
                )
            )
            start = int(end)
        return tuple(table)

    # -- memory ----------------------------------------------------------------------------------

    def _address(self, value: str) -> int:
        """Give the first off-chip word of a value's map, allotting it on first use."""
        if value not in self.addresses:
            self.addresses[value] = self._allot(self.types[value].words)
        return self.addresses[value]

    def _allot(self, words: int) -> int:
        at = self.next_word
        self.next_word += words
        return at

    def _ring(self, memory: object, length: int, sram_bits: int) -> int:
        """Give the next bytes of an SRAM, from the start again when the end is reached."""
        at = self.rings.get(memory, 0)
        if at + length > sram_bits // 8:
            at = 0
        self.rings[memory] = at + length
        return at

    def _move(
        self,
        direction: int,
        value: str,
        window: Window,
        place: Place,
        block: int,
        blocks: int,
        staged_blocks: int | None = None,
    ) -> None:
        """Move a window of some channel blocks of a map, all nibble planes.

        In the bank lie these blocks alone, or ``staged_blocks`` of the map from block 0 on.
        """
        kind = self.types[value]
        # A pixel of accumulators is a row of eight words instead of planes.
        depth = RAW_WORDS if kind.bits == RAW_BITS else 1
        planes = kind.planes // depth
        plane = window.height * window.width * depth
        offchip_plane = kind.height * kind.width * depth
        at = self._address(value) + (window.y * kind.width + window.x) * depth
        stored, skipped = (blocks, 0) if staged_blocks is None else (staged_blocks, block)
        runs = [(p * stored + skipped, p * kind.blocks + block, blocks) for p in range(planes)]
        if blocks == kind.blocks:
            runs = [(0, 0, planes * blocks)]  # the planes of a whole map follow each other
        for in_bank, first, count in runs:
            base = place.base + in_bank * plane
            bank_span: Span = (("bank", place.bank), base, base + count * plane)
            address = at + first * offchip_plane
            end = address + (count - 1) * offchip_plane + (window.height - 1) * kind.width * depth
            offchip_span: Span = ("offchip", address, end + window.width * depth)
            inward = direction == isa.MOVE_IN
            self.out.emit(
                isa.Move(
                    direction=direction,
                    bank=place.bank,
                    base=base,
                    pitch=window.width * depth,
                    plane=plane,
                    address=address,
                    offchip_pitch=kind.width * depth,
                    offchip_plane=offchip_plane,
                    words=window.width * depth,
                    rows=window.height,
                    planes=count,
                ),
                (("dma", 0),),
                reads=[offchip_span if inward else bank_span],
                writes=[bank_span if inward else offchip_span],
            )

    # -- a layer ---------------------------------------------------------------------------------

    def _layer(self, step: Step, schedule: LayerSchedule) -> None:
        self.staged.clear()
        if isinstance(step.layer, Conv):
            self._conv_layer(step, step.layer, schedule)
        else:
            self._apw_layer(step, step.layer, schedule)
        if schedule.copy_out:
            kind = self.types[step.output]
            whole = Window(0, 0, kind.height, kind.width, (0, 0))
            self._move(isa.MOVE_OUT, step.output, whole, schedule.place, 0, kind.blocks)

    def _sources(
        self,
        step: Step,
        schedule: LayerSchedule,
        tile: tuple[int, int, int, int],
        block: int,
        blocks: int | None,
    ) -> list[_Source]:
        """Move a tile's staged inputs in, and say where each input lies."""
        sources = []
        windows = input_windows(step, self.types, tile)
        for name, window, place, staged in zip(
            step.layer.inputs, windows, schedule.inputs, schedule.staged, strict=True
        ):
            kind = self.types[name]
            if not staged:
                origin = (window.origin[0] + window.y, window.origin[1] + window.x)
                sources.append(
                    _Source(place, kind, 0, kind.blocks, kind.height, kind.width, origin)
                )
                continue
            count = kind.blocks if blocks is None else blocks
            # A residual in the output's place is overwritten; anything else may still lie there.
            shared = schedule.output_staged and place == schedule.place
            if shared or self.staged.get(place) != (name, window) or blocks is not None:
                self._move(isa.MOVE_IN, name, window, place, block, count)
                self.staged[place] = (name, window)
            sources.append(
                _Source(place, kind, block, count, window.height, window.width, window.origin)
            )
        return sources

    def _set(self, cores: Sequence[int], key: object, setting: isa.Instruction) -> None:
        """Emit a register setting for the cores that do not have it already."""
        changed = [core for core in cores if self.settings.get((core, key)) != setting]
        if not changed:
            return
        for core in changed:
            self.settings[core, key] = setting
        instruction = attrs.evolve(setting, cores=_mask(changed))  # type: ignore[call-arg]
        self.out.emit(instruction, tuple(("compute", core) for core in changed))

    def _sas(
        self,
        cores: Sequence[int],
        context: int,
        source: _Source,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        kernel_width: int = 1,
        shift: int = 0,
    ) -> None:
        setting = isa.Sas(
            context=context,
            bank=source.place.bank,
            base=source.place.base,
            block=source.block,
            blocks=source.blocks,
            height=source.height,
            width=source.width,
            wide=int(source.type.bits == 8),
            zero=source.type.zero_point,
            shift=shift,
            stride_y=stride[0],
            stride_x=stride[1],
            dilation_y=dilation[0],
            dilation_x=dilation[1],
            origin_y=source.origin[0],
            origin_x=source.origin[1],
            kernel_width=kernel_width,
        )
        self._set(cores, ("sas", context), setting)

    def _apw(self, cores: Sequence[int], setting: isa.Apw, residual: isa.Residual | None) -> None:
        """Set the APW and its residual; an APW setting clears the residual."""
        key = ("apw", setting, residual)
        stale = [core for core in cores if self.settings.get((core, "apw")) != key]
        if not stale:
            return
        for core in stale:
            self.settings[core, "apw"] = key
        lanes = tuple(("compute", core) for core in stale)
        self.out.emit(attrs.evolve(setting, cores=_mask(stale)), lanes)
        if residual:
            self.out.emit(attrs.evolve(residual, cores=_mask(stale)), lanes)

    def _target(
        self, step: Step, schedule: LayerSchedule, tile: Sequence[int], block: int, blocks: int
    ) -> tuple[dict[str, int], tuple[int, int], Span]:
        """Give the output's place as APW fields, the tile's position in it, and its words."""
        kind = self.types[step.output]
        if schedule.output_staged:
            height, width, at = tile[2], tile[3], (0, 0)
        else:
            height, width, at = kind.height, kind.width, (tile[0], tile[1])
            block, blocks = 0, kind.blocks
        place = schedule.place
        size = kind.planes * blocks * height * width
        fields = {
            "bank": place.bank,
            "base": place.base,
            "block": block,
            "blocks": blocks,
            "height": height,
            "width": width,
            "wide": int(kind.bits == 8),
        }
        return fields, at, (("bank", place.bank), place.base, place.base + size)

    # -- convolution -----------------------------------------------------------------------------

    def _conv_layer(self, step: Step, layer: Conv, schedule: LayerSchedule) -> None:
        tiles = list(schedule.tiles(self.types[step.output]))
        partial_base = 0
        if schedule.partial == "bank":
            assert schedule.partial_place is not None
            partial_base = schedule.partial_place.base
        partial_words = self._partial_words(step, schedule)
        if schedule.partial == "offchip":
            partial_base = self._allot(partial_words * len(tiles))
        if schedule.order == "loads":
            for number in range(len(schedule.loads)):
                self._load(schedule, number)
                for i, tile in enumerate(tiles):
                    base = partial_base + (
                        i * partial_words if schedule.partial == "offchip" else 0
                    )
                    self._conv_tile(step, layer, schedule, tile, number, base)
            return
        for i, tile in enumerate(tiles):
            base = partial_base + (i * partial_words if schedule.partial == "offchip" else 0)
            for number in range(len(schedule.loads)):
                self._load(schedule, number)
                self._conv_tile(step, layer, schedule, tile, number, base)

    def _partial_words(self, step: Step, schedule: LayerSchedule) -> int:
        ph, pw = step.pooling
        return self.arch.cores * RAW_WORDS * schedule.tile[0] * ph * schedule.tile[1] * pw

    def _load(self, schedule: LayerSchedule, number: int) -> None:
        """Fetch a load's tables and weights and fill the arrays, the two hops in chunks."""
        arch, weight_bits = self.arch, self.packed[schedule.layer].weight_bits
        cores = self.loads[schedule.layer][number].cores
        filling = [core for core, part in cores.items() if part.group_sets]
        if filling:
            lanes = tuple(("load", core) for core in filling)
            self.out.emit(isa.Prepare(cores=_mask(filling)), lanes)
        # Tables lie at the same addresses on every core, so that one CONV serves them all.
        self.index_at = self._ring(
            isa.MEMORY_INDEX, max(part.index_bytes for part in cores.values()), arch.index_sram_bits
        )
        self.parameters_at = self._ring(
            isa.MEMORY_PARAMETER,
            max(part.parameter_bytes for part in cores.values()),
            arch.parameter_sram_bits,
        )
        for core, part in cores.items():
            self._fetch(core, isa.MEMORY_INDEX, part.index, part.index_bytes, self.index_at)
            self._fetch(
                core,
                isa.MEMORY_PARAMETER,
                part.parameters,
                part.parameter_bytes,
                self.parameters_at,
            )
        size = group_set_bytes(weight_bits)
        chunk = min(schedule.fetch_chunk, arch.weight_sram_bits // 8 // size)
        most = max((cores[core].group_sets for core in filling), default=0)
        for start in range(0, most, chunk):
            for core in filling:
                count = min(chunk, cores[core].group_sets - start)
                if count <= 0:
                    continue
                source = self.image.table_bytes + cores[core].weights + start * size
                at = self._ring((isa.MEMORY_WEIGHT, core), count * size, arch.weight_sram_bits)
                self._fetch(core, isa.MEMORY_WEIGHT, source, count * size, at)
                self.out.emit(
                    isa.Fill(
                        core=core,
                        source=at,
                        slot=start,
                        count=count,
                        weight_bits=int(weight_bits == 8),
                    ),
                    (("load", core),),
                    reads=[(("sram", isa.MEMORY_WEIGHT, core), at, at + count * size)],
                    writes=[(("slots", core), start, start + count)],
                )

    def _fetch(self, core: int, memory: int, source: int, length: int, at: int) -> None:
        self.out.emit(
            isa.Fetch(core=core, memory=memory, source=source, destination=at, length=length),
            (("dma", 0),),
            writes=[(("sram", memory, core), at, at + length)],
        )

    def _conv_tile(
        self,
        step: Step,
        layer: Conv,
        schedule: LayerSchedule,
        tile: tuple[int, int, int, int],
        number: int,
        partial_base: int,
    ) -> None:
        load = schedule.loads[number]
        sources = self._sources(step, schedule, tile, 0, None)
        shares = list(schedule.shares(tile, self.arch.cores))
        for share in shares:
            cores = [core for core in share.cores if load.cores[core]]
            if cores:
                slack = shares[0].height - share.height
                base = partial_base + self._row_words(step, tile) * slack * share.cores[0]
                self._conv_share(
                    step,
                    layer,
                    schedule,
                    tile,
                    number,
                    base,
                    sources,
                    share.first,
                    share.height,
                    cores,
                )
        if schedule.output_staged:
            self._move_finished(step, schedule, tile, load, number)

    def _row_words(self, step: Step, tile: Sequence[int]) -> int:
        """Words of the partial sums of one written row of a tile, per core."""
        return RAW_WORDS * math.prod(step.pooling) * tile[3]

    def _conv_share(
        self,
        step: Step,
        layer: Conv,
        schedule: LayerSchedule,
        tile: tuple[int, int, int, int],
        number: int,
        partial_base: int,
        sources: Sequence[_Source],
        first: int,
        height: int,
        cores: Sequence[int],
    ) -> None:
        """Emit what some cores do of a tile: rows from ``first`` on."""
        load, image = schedule.loads[number], self.loads[schedule.layer][number]
        skipped = first * step.pooling[0]
        for context, (term, source) in enumerate(zip(layer.terms, sources, strict=False)):
            origin = (source.origin[0] + skipped * term.stride[0], source.origin[1])
            self._sas(
                cores,
                context,
                attrs.evolve(source, origin=origin),
                term.stride,
                term.dilation,
                term.kernel[1],
                term.shift,
            )
        kind = self.types[step.output]
        target, (y, x), out_span = self._target(step, schedule, tile, 0, kind.blocks)
        residual = self._residual(step, layer, schedule, tile, sources, skipped)
        self._apw(cores, self._conv_apw(step, layer, target), residual)
        partial = schedule.partial_place or Place(0, 0)
        reads: list[Span] = [source.span for source in sources]
        writes: list[Span] = [out_span]
        shared: list[Span] = []
        if load.splits:
            memory = "offchip" if schedule.partial == "offchip" else ("bank", partial.bank)
            words = self._partial_words(step, schedule)
            # Where tiles or shares differ in size, a core's partial sums lie in another's place.
            alike = kind.height % (schedule.tile[0] * schedule.row_groups) == 0
            alike = alike and kind.width % schedule.tile[1] == 0
            (writes if alike else shared).append((memory, partial_base, partial_base + words))
        for core in cores:
            part = image.cores[core]
            reads += [
                (
                    ("sram", isa.MEMORY_INDEX, core),
                    self.index_at,
                    self.index_at + part.index_bytes,
                ),
                (
                    ("sram", isa.MEMORY_PARAMETER, core),
                    self.parameters_at,
                    self.parameters_at + part.parameter_bytes,
                ),
                (("slots", core), 0, part.group_sets),
            ]
        self.out.emit(
            isa.Conv(
                cores=_mask(cores),
                descriptor=self.index_at,
                codes=self.index_at + image.descriptor_bytes,
                parameters=self.parameters_at,
                y=y + first,
                x=x,
                height=height,
                width=tile[3],
                partial=int(load.splits and schedule.partial == "offchip"),
                partial_bank=partial.bank if load.splits else 0,
                partial_base=partial_base if load.splits else 0,
            ),
            tuple(("compute", core) for core in cores),
            reads,
            writes,
            shared,
        )

    def _move_finished(
        self, step: Step, schedule: LayerSchedule, tile: Sequence[int], load: Load, number: int
    ) -> None:
        """Move out what is finished: the whole tile after its last load, or this load's blocks."""
        kind = self.types[step.output]
        window = Window(tile[0], tile[1], tile[2], tile[3], (0, 0))
        if schedule.order == "tiles" or len(schedule.loads) == 1:
            if number == len(schedule.loads) - 1:
                self._move(isa.MOVE_OUT, step.output, window, schedule.place, 0, kind.blocks)
            return
        finished = sorted(piece.block for pieces in load.cores for piece in pieces if piece.last)
        for first, count in _runs(finished):
            self._move(isa.MOVE_OUT, step.output, window, schedule.place, first, count, kind.blocks)

    def _conv_apw(self, step: Step, layer: Conv, target: Mapping[str, int]) -> isa.Apw:
        requant = layer.requant
        ph, pw = step.pooling
        if requant is None:
            return isa.Apw(mode=isa.MODE_RAW, **target)
        native = requant.native
        return isa.Apw(
            mode=isa.MODE_SHIFT if native else isa.MODE_MULTIPLIER,
            shift=int(requant.shift[0]) if native else 0,
            zero=requant.zero_point,
            low=requant.low,
            high=requant.high,
            pool_height=ph,
            pool_width=pw,
            **target,
        )

    def _residual(
        self,
        step: Step,
        layer: Conv,
        schedule: LayerSchedule,
        tile: Sequence[int],
        sources: Sequence[_Source],
        skipped: int,
    ) -> isa.Residual | None:
        if layer.residual is None:
            return None
        source = sources[-1]
        staged = schedule.staged[-1]
        ph, pw = step.pooling
        return isa.Residual(
            bank=source.place.bank,
            base=source.place.base,
            blocks=source.blocks,
            height=source.height,
            width=source.width,
            wide=int(source.type.bits == 8),
            shift=layer.residual.shift,
            y=skipped + (0 if staged else tile[0] * ph),
            x=0 if staged else tile[1] * pw,
        )

    # -- pools and additions ---------------------------------------------------------------------

    def _apw_layer(self, step: Step, layer: Pool | Add, schedule: LayerSchedule) -> None:
        kind = self.types[step.output]
        for block in range(0, kind.blocks, schedule.block_tile):
            blocks = min(schedule.block_tile, kind.blocks - block)
            for tile in schedule.tiles(kind):
                self._apw_tile(step, layer, schedule, tile, block, blocks)

    def _apw_tile(
        self,
        step: Step,
        layer: Pool | Add,
        schedule: LayerSchedule,
        tile: tuple[int, int, int, int],
        block: int,
        blocks: int,
    ) -> None:
        sources = self._sources(step, schedule, tile, block, blocks)
        cores = tuple(range(min(self.arch.cores, blocks)))
        for context, source in enumerate(sources):
            if isinstance(layer, Pool):
                self._sas(cores, context, source, layer.stride)
            else:
                self._sas(cores, context, source)
        target, (y, x), out_span = self._target(step, schedule, tile, block, blocks)
        requant = layer.requant
        fields = dict(target)
        if requant is not None:
            fields |= {
                "shift": int(requant.shift[0]),
                "zero": requant.zero_point,
                "low": requant.low,
                "high": requant.high,
            }
        self._apw(cores, isa.Apw(**fields), None)
        shape = {
            "cores": _mask(cores),
            "block": block,
            "blocks": blocks,
            "y": y,
            "x": x,
            "height": tile[2],
            "width": tile[3],
        }
        multiplier = int(requant.multiplier[0]) if requant is not None else 0
        instruction: isa.Instruction
        if isinstance(layer, Pool):
            instruction = isa.Pool(
                mode=isa.POOL_AVERAGE if layer.mode == "avg" else isa.POOL_MAX,
                count_padding=int(layer.count_include_pad),
                kernel_height=layer.kernel[0],
                kernel_width=layer.kernel[1],
                multiplier=multiplier,
                **shape,
            )
        else:
            factors = [operand.multiplier for operand in layer.operands]
            instruction = isa.Add(
                operands=len(factors) - 1,
                multiplier_a=factors[0],
                multiplier_b=factors[1] if len(factors) > 1 else 0,
                multiplier=multiplier,
                **shape,
            )
        self.out.emit(
            instruction,
            tuple(("compute", core) for core in cores),
            [source.span for source in sources],
            [out_span],
        )
        if schedule.output_staged:
            window = Window(tile[0], tile[1], tile[2], tile[3], (0, 0))
            self._move(isa.MOVE_OUT, step.output, window, schedule.place, block, blocks)


def _mask(cores: Iterable[int]) -> int:
    return sum(1 << core for core in cores)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Give consecutive numbers as (first, count)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def generate(
    graph: Graph,
    arch: MarsArch,
    packed: Mapping[str, PackedConv],
    schedule: Schedule,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    network: str = "",
    with_weights: bool = True,
) -> Region:
    """Generate a region's instructions and off-chip image.

    Parameters
    ----------
    input_names, output_names : sequences of str
        The model's names of the region's ports.
    network : str
        Description of the network that the region carries along.
    with_weights : bool
        Without, the region has a timeline but cannot run.

    Raises
    ------
    CapacityError
        If the image and the spilled maps exceed off-chip memory.
    """
    generator = _Generator(graph, arch, packed, schedule, with_weights)
    return generator.region(input_names, output_names, network)
