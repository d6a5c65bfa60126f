"""From a graph, its packing and its schedule to a region: instructions and off-chip image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import attrs

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.errors import CapacityError
from mars_runtime.maps import RAW_BITS, WORD_BYTES, MapType
from mars_runtime.program import InputPort, LayerInfo, OutputPort, Region
from mars_runtime.stopwatch import Stopwatch
from mars_runtime.timeline import Timeline
from mars_runtime.timing import RAW_WORDS, DecodedLoad

from ..graph import Add, Conv, Graph, Pool, layer_macs
from ..pack import PackedConv
from ..schedule import LayerSchedule, Load, Place, Schedule, Step, scheduled_steps
from ..schedule.border import skipped_taps
from ..schedule.plan import Window, input_windows
from ..schedule.types import Part
from .emitter import CONTROLLER, DMA, Emitter, Span, compute_lanes
from .image import Content, Image, LoadImage, decoded_load
from .loading import Loader, Tile, Turn, turns

__all__ = ["generate", "time_schedule"]


# A register's setting without its cores: instruction and fields.
_Setting: TypeAlias = tuple[type[isa.Sas] | type[isa.Apw] | type[isa.Residual], dict[str, int]]


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


@attrs.frozen
class _Needs:
    """What computing a part of a convolution's tile sets and touches, whatever the load."""

    settings: list[tuple[object, list[_Setting]]]  # by register
    position: tuple[int, int]  # in the written map
    reads: list[Span]
    writes: Span


class _Generator:
    def __init__(
        self,
        graph: Graph,
        arch: MarsArch,
        packed: Mapping[str, PackedConv],
        schedule: Schedule,
        content: Content,
    ) -> None:
        self.graph, self.arch, self.packed, self.schedule = graph, arch, packed, schedule
        self.types = graph.types
        self.out = Emitter()
        self.image = Image(content)
        self.steps = scheduled_steps(graph, schedule)
        self.loads: dict[str, list[LoadImage]] = {
            entry.layer: [self.image.add_load(packed[entry.layer], load) for load in entry.loads]
            for entry in schedule.layers
        }
        self.image_bytes = self.image.table_bytes + self.image.weight_bytes
        self.turns = list(turns(self.steps, schedule.layers, self.types))
        self.loader = Loader(arch, packed, self.turns, self.loads, self.image.table_bytes, self.out)
        self.next_word = -(-self.image_bytes // WORD_BYTES)
        self.addresses: dict[str, int] = {}
        self.settings: dict[tuple[int, object], Sequence[_Setting]] = {}  # by core and register
        self.staged: dict[Place, tuple[str, Window]] = {}
        # By layer and tile; and part of it. Every load meets them again.
        self.windows: dict[tuple[int, Tile], tuple[Window, ...]] = {}
        self.needs: dict[tuple[int, Tile, Part], _Needs] = {}
        self.partial_base = 0

    def emit(self) -> None:
        """Emit everything."""
        for entry in self.graph.inputs:
            self._address(entry.name)
        for number, turn in enumerate(self.turns):
            self._turn(number, turn)
        for out in self.graph.outputs:
            self._address(out.value)
        if self.next_word * WORD_BYTES > self.arch.offchip_bytes:
            raise CapacityError(
                "weights and maps do not fit off-chip memory",
                op="network",
                need=self.next_word * WORD_BYTES,
                have=self.arch.offchip_bytes,
                unit="bytes",
                hint="raise offchip_bytes",
            )
        self.out.emit(isa.Halt(), CONTROLLER)

    def timeline(self) -> Timeline:
        """Time what was emitted."""
        queue = self.out.queue()
        layers = self._layer_table(queue.stops)
        return Stopwatch(self.arch, layers, self.image_bytes, self.next_word).time(queue)

    def region(
        self, input_names: Sequence[str], output_names: Sequence[str], network: str
    ) -> Region:
        """Give what was emitted as a region."""
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
        instructions, stops = self.out.finish()
        return Region(
            inputs,
            outputs,
            self._layer_table(stops),
            isa.encode_all(instructions),
            b"".join([*self.image.tables, *self.image.weights]),
            self.image_bytes,
            self.next_word,
            network,
        )

    def _layer_table(self, stops: Sequence[int]) -> tuple[LayerInfo, ...]:
        table = []
        start = 0
        for step, end in zip(self.steps, stops, strict=True):
            layer = step.layer
            packed = self.packed.get(layer.name)
            table.append(
                LayerInfo(
                    layer.name if not step.pool else f"{layer.name}+{step.pool.name}",
                    layer.kind,
                    start,
                    end,
                    layer_macs(layer, self.types),
                    packed.group_sets if packed else 0,
                    packed.dense_group_sets if packed else 0,
                )
            )
            start = end
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
                DMA,
                reads=[offchip_span if inward else bank_span],
                writes=[bank_span if inward else offchip_span],
            )

    # -- a layer ---------------------------------------------------------------------------------

    def _turn(self, number: int, turn: Turn) -> None:
        """Emit the loads that are due, then what a turn computes."""
        if turn.layer != self.out.layer or not number:
            self.staged.clear()
            self.partial_base = self._allot_partial(turn)
        self.out.layer = turn.layer
        self.loader.own(number)
        step, layer, schedule = turn.step, turn.step.layer, turn.schedule
        if isinstance(layer, Conv):
            for i, tile in turn.tiles:
                self._conv_tile(step, layer, schedule, number, i, tile)
        else:
            self.loader.ahead(number)
            self._apw_layer(step, layer, schedule)
        self.loader.after(number)
        if turn.last and schedule.copy_out:
            kind = self.types[step.output]
            whole = Window(0, 0, kind.height, kind.width, (0, 0))
            self._move(isa.MOVE_OUT, step.output, whole, schedule.place, 0, kind.blocks)

    def _allot_partial(self, turn: Turn) -> int:
        """Give the first word of a layer's partial sums."""
        schedule = turn.schedule
        if schedule.partial == "bank":
            assert schedule.partial_place is not None
            return schedule.partial_place.base
        if schedule.partial == "offchip":
            count = len(list(schedule.tiles(self.types[turn.step.output])))
            return self._allot(self._partial_words(turn.step, schedule) * count)
        return 0

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
        windows = self.windows.get((self.out.layer, tile))
        if windows is None:
            windows = input_windows(step, self.types, tile)
            self.windows[self.out.layer, tile] = windows
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

    def _set(
        self,
        cores: Sequence[int],
        register: object,
        settings: Sequence[_Setting],
    ) -> None:
        """Emit the settings of a register for the cores that do not have them already."""
        changed = [core for core in cores if self.settings.get((core, register)) != settings]
        if not changed:
            return
        kept = min(_kept(self.settings.get((core, register), ()), settings) for core in changed)
        for core in changed:
            self.settings[core, register] = settings
        mask = _mask(changed)
        for kind, fields in settings[kept:]:
            self.out.emit(kind(cores=mask, **fields), compute_lanes(mask))

    def _sas(
        self,
        context: int,
        source: _Source,
        at: tuple[int, int] = (0, 0),
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        kernel_width: int = 1,
        shift: int = 0,
        skip: int = 0,
    ) -> tuple[object, list[_Setting]]:
        """Give an input context for a part of a tile, from the pixel ``at`` on."""
        fields = {
            "context": context,
            "bank": source.place.bank,
            "base": source.place.base,
            "block": source.block,
            "blocks": source.blocks,
            "height": source.height,
            "width": source.width,
            "wide": int(source.type.bits == 8),
            "zero": source.type.zero_point,
            "shift": shift,
            "stride_y": stride[0],
            "stride_x": stride[1],
            "dilation_y": dilation[0],
            "dilation_x": dilation[1],
            "origin_y": source.origin[0] + at[0] * stride[0],
            "origin_x": source.origin[1] + at[1] * stride[1],
            "kernel_width": kernel_width,
            "skip": skip,
        }
        return context, [(isa.Sas, fields)]

    def _apw(
        self, fields: dict[str, int], residual: dict[str, int] | None = None
    ) -> tuple[object, list[_Setting]]:
        """Give the APW with its residual; an APW setting clears the residual."""
        settings: list[_Setting] = [(isa.Apw, fields)]
        if residual is not None:
            settings.append((isa.Residual, residual))
        return "apw", settings

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

    def _partial_words(self, step: Step, schedule: LayerSchedule) -> int:
        ph, pw = step.pooling
        return self.arch.cores * RAW_WORDS * schedule.tile[0] * ph * schedule.tile[1] * pw

    def _conv_tile(
        self,
        step: Step,
        layer: Conv,
        schedule: LayerSchedule,
        turn: int,
        place: int,
        tile: tuple[int, int, int, int],
    ) -> None:
        load = self._load(turn)
        sources = self._sources(step, schedule, tile, 0, None)
        self.loader.ahead(turn)  # behind the maps that this turn waits for
        partial_base = self.partial_base
        if schedule.partial == "offchip":
            partial_base += place * self._partial_words(step, schedule)
        words = RAW_WORDS * math.prod(step.pooling)  # of a written pixel's partial sums
        shares = list(schedule.shares(tile, self.arch.cores))
        chained = schedule.chained
        for share in shares:
            cores = [core for core in share.cores if load.cores[core]]
            if not cores:
                continue
            # All cores of a chain pass their sums on in one place, that of the last core.
            region, held = (
                (self.arch.cores - 1, 1) if chained else (share.cores[0], len(share.cores))
            )
            before = shares[0].height * tile[3] * region
            for part in schedule.parts(tile, share):
                needs = self._part_needs(step, layer, schedule, tile, sources, part)
                for register, settings in needs.settings:
                    self._set(cores, register, settings)
                for group in [[core] for core in cores] if schedule.apart or chained else [cores]:
                    lower = part.pixels * (group[0] if chained else share.cores[0])
                    offset = words * (before - lower)
                    self._conv(step, schedule, turn, part, needs, (partial_base, offset), group)
                before += part.pixels * held
        if schedule.output_staged:
            self._move_finished(step, schedule, tile, load)

    def _part_needs(
        self,
        step: Step,
        layer: Conv,
        schedule: LayerSchedule,
        tile: Tile,
        sources: Sequence[_Source],
        part: Part,
    ) -> _Needs:
        """Give what computing a part of a tile sets and touches, made once for all loads."""
        key = (self.out.layer, tile, part)
        if key in self.needs:
            return self.needs[key]
        ph, pw = step.pooling
        at = part.y * ph, part.x * pw
        rows = (tile[0] * ph + at[0], part.height * ph)
        columns = (tile[1] * pw + at[1], part.width * pw)
        settings = [
            self._sas(
                context,
                source,
                at,
                term.stride,
                term.dilation,
                term.kernel[1],
                term.shift,
                skipped_taps(self.arch, term, source.type, rows, columns),
            )
            for context, (term, source) in enumerate(zip(layer.terms, sources, strict=False))
        ]
        blocks = self.types[step.output].blocks
        target, (y, x), writes = self._target(step, schedule, tile, 0, blocks)
        residual = self._residual(step, layer, schedule, tile, sources, at)
        settings.append(self._apw(self._conv_apw(step, layer, target), residual))
        reads = [source.span for source in sources]
        found = _Needs(settings, (y + part.y, x + part.x), reads, writes)
        self.needs[key] = found
        return found

    def _conv(
        self,
        step: Step,
        schedule: LayerSchedule,
        turn: int,
        part: Part,
        needs: _Needs,
        partial_at: tuple[int, int],
        cores: Sequence[int],
    ) -> None:
        """Emit what some cores compute of a tile, whose partial sums begin at a base and offset."""
        loaded, load = self.loader.loaded[turn], self._load(turn)
        splits = not load.cut_cores.isdisjoint(cores)
        bank = schedule.partial_place.bank if splits and schedule.partial_place else 0
        writes: list[Span] = [needs.writes]
        shared: list[Span] = []
        if splits:
            memory = "offchip" if schedule.partial == "offchip" else ("bank", bank)
            words = self._partial_words(step, schedule)
            span: Span = (memory, partial_at[0], partial_at[0] + words)
            (writes if self._alike(schedule, self.types[step.output]) else shared).append(span)
        mask = _mask(cores)
        self.loader.computes(cores)
        decoded: Mapping[int, DecodedLoad] | None = None
        if self.image.content == "sizes":
            decoded = decoded_load(self.packed[step.layer.name], load)
        y, x = needs.position
        lanes = compute_lanes(mask)
        loaded.readers[lanes] = self.out.emit(
            isa.Conv(
                cores=mask,
                descriptor=loaded.index,
                codes=loaded.index + loaded.image.parts.descriptor_bytes,
                parameters=loaded.parameters,
                slot=loaded.slot,
                y=y,
                x=x,
                height=part.height,
                width=part.width,
                partial=int(splits and schedule.partial == "offchip"),
                partial_bank=bank,
                partial_base=sum(partial_at) if splits else 0,
            ),
            lanes,
            loaded.before(cores),
            needs.reads,
            writes,
            shared,
            decoded,
        )

    @staticmethod
    def _alike(schedule: LayerSchedule, kind: MapType) -> bool:
        """Tell whether a core's partial sums lie in a place of its own, in every tile.

        They do not where tiles, shares or parts differ in size, nor along a chain.
        """
        (height, width), groups = schedule.tile, schedule.row_groups
        cut = schedule.row_cuts or schedule.column_cuts
        return (
            kind.height % (height * groups) == kind.width % width == 0
            and (not cut or (height, width) == (kind.height, kind.width))
            and not schedule.chained
        )

    def _load(self, turn: int) -> Load:
        number = self.turns[turn].load
        assert number is not None
        return self.turns[turn].schedule.loads[number]

    def _move_finished(
        self, step: Step, schedule: LayerSchedule, tile: Sequence[int], load: Load
    ) -> None:
        """Move out what is finished: the whole tile after its last load, or this load's blocks."""
        kind = self.types[step.output]
        window = Window(tile[0], tile[1], tile[2], tile[3], (0, 0))
        if schedule.order == "tiles" or len(schedule.loads) == 1:
            if load is schedule.loads[-1]:
                self._move(isa.MOVE_OUT, step.output, window, schedule.place, 0, kind.blocks)
            return
        finished = sorted(piece.block for pieces in load.cores for piece in pieces if piece.last)
        for first, count in _runs(finished):
            self._move(isa.MOVE_OUT, step.output, window, schedule.place, first, count, kind.blocks)

    def _conv_apw(self, step: Step, layer: Conv, target: Mapping[str, int]) -> dict[str, int]:
        requant = layer.requant
        ph, pw = step.pooling
        if requant is None:
            return {"mode": isa.MODE_RAW, **target}
        native = requant.native
        return {
            "mode": isa.MODE_SHIFT if native else isa.MODE_MULTIPLIER,
            "shift": int(requant.shift[0]) if native else 0,
            "zero": requant.zero_point,
            "low": requant.low,
            "high": requant.high,
            "pool_height": ph,
            "pool_width": pw,
            **target,
        }

    def _residual(
        self,
        step: Step,
        layer: Conv,
        schedule: LayerSchedule,
        tile: Sequence[int],
        sources: Sequence[_Source],
        at: tuple[int, int],
    ) -> dict[str, int] | None:
        if layer.residual is None:
            return None
        source = sources[-1]
        staged = schedule.staged[-1]
        ph, pw = step.pooling
        return {
            "bank": source.place.bank,
            "base": source.place.base,
            "blocks": source.blocks,
            "height": source.height,
            "width": source.width,
            "wide": int(source.type.bits == 8),
            "shift": layer.residual.shift,
            "y": at[0] + (0 if staged else tile[0] * ph),
            "x": at[1] + (0 if staged else tile[1] * pw),
        }

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
            stride = layer.stride if isinstance(layer, Pool) else (1, 1)
            self._set(cores, *self._sas(context, source, stride=stride))
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
        self._set(cores, *self._apw(fields))
        mask = _mask(cores)
        shape = {
            "cores": mask,
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
            compute_lanes(mask),
            reads=[source.span for source in sources],
            writes=[out_span],
        )
        if schedule.output_staged:
            window = Window(tile[0], tile[1], tile[2], tile[3], (0, 0))
            self._move(isa.MOVE_OUT, step.output, window, schedule.place, block, blocks)


def _mask(cores: Iterable[int]) -> int:
    return sum(1 << core for core in cores)


def _kept(before: Sequence[_Setting], settings: Sequence[_Setting]) -> int:
    """Give how many settings of a register stand as they are, the later ones set anew or added."""
    if len(before) > len(settings):
        return 0  # what was added is cleared by the first
    pairs = zip(before, settings, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


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
    generator = _Generator(graph, arch, packed, schedule, "all" if with_weights else "tables")
    generator.emit()
    return generator.region(input_names, output_names, network)


def time_schedule(
    graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv], schedule: Schedule
) -> Timeline:
    """Give the timeline of a schedule without building its program.

    It is the one that the machine would report for the program of :func:`generate`: the same
    instructions through the same costs and rules, without image, encoding and codes.

    Raises
    ------
    CapacityError
        If the image and the spilled maps exceed off-chip memory.
    ScheduleError
        If the schedule asks for what the machine cannot hold.
    """
    generator = _Generator(graph, arch, packed, schedule, "sizes")
    generator.emit()
    return generator.timeline()
