"""From a graph, its packing and its schedule to a region: instructions and off-chip image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.errors import CapacityError
from mars_runtime.maps import RAW_BITS, WORD_BYTES, MapType
from mars_runtime.program import InputPort, LayerInfo, OutputPort, Region
from mars_runtime.stopwatch import Loads, Stopwatch
from mars_runtime.timeline import Timeline
from mars_runtime.timing import RAW_WORDS

from ..graph import Add, Conv, Graph, Pool, layer_macs
from ..pack import PackedConv
from ..schedule import LayerSchedule, Load, Place, Schedule, Step, scheduled_steps
from ..schedule.types import Share
from ..schedule.windows import Window, input_windows
from .computing import (
    APW,
    ConvWork,
    Group,
    Settings,
    Source,
    Sums,
    conv_work,
    mask,
    nothing_held,
    sas,
    set_register,
    target_fields,
    tile_code,
    tile_sources,
    without_loads,
)
from .emitter import CONTROLLER, DMA, Emitter, Span, compute_lanes
from .image import Content, Image, LoadImage, decoded_load
from .loading import Loader, Tile, Turn, turns

__all__ = ["generate", "time_schedule"]


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
        self.held = nothing_held(arch.cores)
        # What was moved in last: a value, its first block, the window.
        self.staged: dict[Place, tuple[str, int, Window | None]] = {}
        self.works: dict[tuple[int, Tile], ConvWork] = {}  # by layer and tile
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
        rows: tuple[int, int, int] | None = None,
    ) -> None:
        """Move a window of some channel blocks of a map, all nibble planes.

        In the bank lie these blocks alone, or ``staged_blocks`` of the map from block 0 on. Not all
        of the window moves if ``rows`` are told, as :meth:`Window.missing` has them.
        """
        kind = self.types[value]
        # A pixel of accumulators is a row of eight words instead of planes.
        depth = RAW_WORDS if kind.bits == RAW_BITS else 1
        planes = kind.planes // depth
        row = window.width * depth
        plane = window.height * row
        offchip_plane = kind.height * kind.width * depth
        first_row, stored_row, height = rows or (window.y, 0, window.height)
        at = self._address(value) + (first_row * kind.width + window.x) * depth
        stored, skipped = (blocks, 0) if staged_blocks is None else (staged_blocks, block)
        runs = [(p * stored + skipped, p * kind.blocks + block, blocks) for p in range(planes)]
        if blocks == kind.blocks:
            runs = [(0, 0, planes * blocks)]  # the planes of a whole map follow each other
        for in_bank, first, count in runs:
            base = place.base + in_bank * plane + stored_row * row
            end = base + (count - 1) * plane + height * row
            bank_span: Span = (("bank", place.bank), base, end)
            address = at + first * offchip_plane
            end = address + (count - 1) * offchip_plane + (height - 1) * kind.width * depth + row
            offchip_span: Span = ("offchip", address, end)
            inward = direction == isa.MOVE_IN
            self.out.emit(
                isa.Move(
                    direction=direction,
                    bank=place.bank,
                    base=base,
                    pitch=row,
                    plane=plane,
                    address=address,
                    offchip_pitch=kind.width * depth,
                    offchip_plane=offchip_plane,
                    words=row,
                    rows=height,
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
            for at, (i, tile) in enumerate(turn.tiles):
                self._conv_tile(step, layer, schedule, (number, at), i, tile)
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

    def _stage(
        self,
        step: Step,
        schedule: LayerSchedule,
        windows: Sequence[Window],
        sources: Sequence[Source],
    ) -> None:
        """Move in what of a tile's staged inputs does not lie there."""
        for name, window, source, staged in zip(
            step.layer.inputs, windows, sources, schedule.staged, strict=True
        ):
            if not staged:
                continue
            place = source.place
            # A residual in the output's place is there until each of its blocks is written over,
            # which is when nothing reads that any more.
            before, block, moved = self.staged.get(place, ("", 0, None))
            held = moved if (before, block) == (name, source.block) else None
            for rows in window.missing(held):
                self._move(isa.MOVE_IN, name, window, place, source.block, source.blocks, rows=rows)
            self.staged[place] = (name, source.block, window)

    def _set(self, cores: Sequence[int], register: int, settings: Settings) -> None:
        """Emit the settings of a register for the cores that do not have them already."""
        self.held, instructions = set_register(self.held, cores, register, settings)
        for instruction in instructions:
            self.out.emit(instruction, compute_lanes(instruction.cores))

    # -- convolution -----------------------------------------------------------------------------

    def _partial_words(self, step: Step, schedule: LayerSchedule) -> int:
        ph, pw = step.pooling
        return self.arch.cores * RAW_WORDS * schedule.tile[0] * ph * schedule.tile[1] * pw

    def _conv_tile(
        self,
        step: Step,
        layer: Conv,
        schedule: LayerSchedule,
        at: tuple[int, int],
        place: int,
        tile: tuple[int, int, int, int],
    ) -> None:
        turn = at[0]
        load = self._load(turn)
        work = self._work(schedule, tile)
        self._stage(step, schedule, work.windows, work.sources)
        self.loader.ahead(*at)  # behind the maps that this turn waits for
        partial_base = self.partial_base
        if schedule.partial == "offchip":
            partial_base += place * self._partial_words(step, schedule)
        sums = Sums(
            int(schedule.partial == "offchip"),
            schedule.partial_place.bank if schedule.partial_place else 0,
            partial_base,
            RAW_WORDS * math.prod(step.pooling),
            schedule.chained,
        )
        loaded = self.loader.loaded[turn]
        groups = tuple([_groups(schedule, load, share) for share, _ in work.shares])
        code = tile_code(work, loaded.tables, groups, sums, self.held)
        self.held = code.held
        self.loader.computes([core for its in groups for group in its for core in group.cores])
        decoded: Loads | None = None
        if self.image.content == "sizes":
            decoded = decoded_load(self.packed[step.layer.name], load)
        start = self.out.row(code.computes, decoded)
        memory = "offchip" if sums.partial else ("bank", sums.bank)
        span: Span = (memory, partial_base, partial_base + self._partial_words(step, schedule))
        shared = bool(load.cut_cores) and not self._alike(schedule, self.types[step.output])
        # Without shared sums each CONV touches what the first of its cores does, unless a sum is
        # cut on some cores alone.
        repeats = not shared and len(load.cut_cores) in (0, len(load.active))
        for first, last, group in code.by_group if repeats else code.convs:
            lanes = compute_lanes(mask(group.cores))
            cut = [span] if group.splits else []
            self.out.follow(
                start + first,
                lanes,
                loaded.before(group.cores),
                work.reads,
                [work.writes] if shared else [work.writes, *cut],
                cut if shared else (),
                start + last,
            )
            loaded.readers[lanes] = start + last
        if schedule.output_staged:
            self._move_finished(step, schedule, tile, load)

    def _work(self, schedule: LayerSchedule, tile: Tile) -> ConvWork:
        """Give what computing a tile needs, which every load meets again."""
        key = self.out.layer, tile
        found = self.works.get(key)
        if found is None:
            found = self.works[key] = conv_work(
                self.graph, self.arch, without_loads(schedule), tile
            )
        return found

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
        windows = input_windows(step, self.types, tile, schedule.kept)
        sources = tile_sources(step, schedule, self.types, windows, block, blocks)
        self._stage(step, schedule, windows, sources)
        cores = tuple(range(min(self.arch.cores, blocks)))
        for context, source in enumerate(sources):
            stride = layer.stride if isinstance(layer, Pool) else (1, 1)
            self._set(cores, context, (sas(context, source, stride=stride),))
        target, (y, x), out_span = target_fields(step, schedule, self.types, tile, block, blocks)
        requant = layer.requant
        fields = dict(target)
        if requant is not None:
            fields |= {
                "shift": int(requant.shift[0]),
                "zero": requant.zero_point,
                "low": requant.low,
                "high": requant.high,
            }
        self._set(cores, APW, (isa.Apw(**fields),))
        core_mask = mask(cores)
        shape = {
            "cores": core_mask,
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
            compute_lanes(core_mask),
            reads=[source.span for source in sources],
            writes=[out_span],
        )
        if schedule.output_staged:
            window = Window(tile[0], tile[1], tile[2], tile[3], (0, 0))
            self._move(isa.MOVE_OUT, step.output, window, schedule.place, block, blocks)


def _groups(schedule: LayerSchedule, load: Load, share: Share) -> tuple[Group, ...]:
    """Give which cores compute a share of a tile with one CONV."""
    cores = tuple([core for core in share.cores if load.cores[core]])
    apart = schedule.apart or schedule.chained
    each = [(core,) for core in cores] if apart else [cores] if cores else []
    return tuple([Group(one, not load.cut_cores.isdisjoint(one)) for one in each])


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
