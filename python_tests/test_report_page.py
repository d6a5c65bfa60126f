"""The page of ``mars report``: HTML that needs nothing, whose figures are the profile's."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, MarsArch, Program, load_arch
from mars_runtime.errors import MarsError
from mars_runtime.program import HostReason
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.timeline import Event
from python_tests.test_imports import BLOCK
from tvm_mars import networks, zoo
from tvm_mars.cli import main
from tvm_mars.compiler import NamedGraph, build
from tvm_mars.graph import Conv, ConvTerm, Graph, Input, MapType, Output, Requant
from tvm_mars.report import Profile, profile_program
from tvm_mars.report.charts import Placed
from tvm_mars.report.drawings import picture, route
from tvm_mars.report.observe import Stay, observe
from tvm_mars.report.page import joined, report_page

html5lib = pytest.importorskip("html5lib")
pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")

SVG = "{http://www.w3.org/2000/svg}"
NETWORKS = ("digits", "resnet20-w8a8")


def compiled(graph: Graph, arch: MarsArch = PRESETS["mars"], count: int = 1) -> Program:
    return build([NamedGraph.of(graph)] * count, arch)


@attrs.frozen
class Page:
    """A page with what it was made of."""

    graph: Graph
    program: Program
    profile: Profile
    text: str
    root: Any

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.root.find(".//script[@id='data']").text)
        return found

    def rows(self, table: str) -> list[dict[str, Any]]:
        content = self.data["tables"][table]
        return [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]

    def cells(self, table: str) -> dict[str, list[float]]:
        """Give the numbers of a table of the page, by its rows' heads."""
        return {
            row.find("th").text: [float(one.get("value")) for one in row.iter("data")]
            for row in self.root.find(f".//table[@id='{table}']").iter("tr")
            if row.find("td") is not None
        }


def parse(text: str) -> Any:
    """Parse HTML5, any error of which is an exception."""
    builder = html5lib.getTreeBuilder("etree")
    parser = html5lib.HTMLParser(builder, strict=True, namespaceHTMLElements=False)
    return parser.parse(text)


def page_of(program: Program, graph: Graph | None = None, **options: Any) -> Page:
    text = report_page(program, "net", **options)
    profile = profile_program(program, **options)
    return Page(graph, program, profile, text, parse(text))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=NETWORKS)
def page(request: pytest.FixtureRequest) -> Page:
    graph = zoo.load(request.param)
    program = compiled(graph)
    return page_of(Program.from_bytes(program.to_bytes()), graph)


# -- the document ----------------------------------------------------------------------------------


def test_it_fetches_nothing(page: Page) -> None:
    links = set()
    for element in page.root.iter():
        assert element.tag not in ("link", "img", "iframe", "object", "embed", "base"), element.tag
        for name in ("src", "srcset", "poster", "action", "data"):
            assert element.get(name) is None, (element.tag, name)
        links |= {element.get("href")} if element.get("href") else set()
    outside = {link for link in links if not link.startswith("#")}
    assert outside == {"https://arxiv.org/abs/2010.12861"}  # a link, followed by who clicks it
    (style,) = (element.text for element in page.root.iter("style"))
    assert "@import" not in style and "url(" not in style
    policies = [
        element.get("content")
        for element in page.root.iter("meta")
        if element.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none';")
    assert "http" not in policies[0] and "connect-src" not in policies[0]


def test_it_is_a_few_megabytes_at_most(page: Page) -> None:
    assert len(page.text.encode()) < 2 * 2**20


def test_it_can_be_read_by_ear_and_used_by_key(page: Page) -> None:
    ids = [element.get("id") for element in page.root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert page.root.get("lang") == "en" and len(list(page.root.iter("h1"))) == 1
    for element in page.root.iter():
        if element.get("aria-labelledby"):
            assert element.get("aria-labelledby") in ids
        if str(element.get("href")).startswith("#"):
            assert element.get("href")[1:] in ids
        if element.tag == "label" and element.get("for"):
            assert element.get("for") in ids
        if element.get("role") in ("img", "region", "group"):
            assert element.get("aria-label")
        if element.tag == "button":
            assert "".join(element.itertext()).strip() or element.get("aria-label")
        if element.tag == "table":
            assert element.find("caption") is not None
            assert all(head.get("scope") for head in element.iter("th"))
    labelled = {e.get("for") for e in page.root.iter("label")}
    within = {e.get("id") for label in page.root.iter("label") for e in label.iter()}
    for control in (*page.root.iter("select"), *page.root.iter("input")):
        assert control.get("id") in labelled | within


def test_headings_step_by_one(page: Page) -> None:
    levels = [int(e.tag[1]) for e in page.root.iter() if re.fullmatch("h[1-6]", str(e.tag))]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


# -- its figures -----------------------------------------------------------------------------------


def test_the_time_table_is_the_profile(page: Page) -> None:
    profile, cells = page.profile, page.cells("time-table")
    causes = [cause for cause, cycles in profile.stalls.items() if cycles]
    for layer in profile.layers:
        stalls = [layer.stalls[cause] / layer.core_cycles for cause in causes]
        assert cells[layer.name] == pytest.approx(
            [layer.cycles, layer.dense_cycles, layer.speedup, layer.utilisation, *stalls]
        )
    assert cells["all"][:4] == pytest.approx(
        [profile.cycles, profile.dense_cycles, profile.speedup, profile.utilisation]
    )
    assert len(cells) == len(profile.layers) + 1


def test_the_work_table_is_the_profile(page: Page) -> None:
    profile, cells = page.profile, page.cells("work-table")
    dense = {layer.name: layer for layer in profile.dense_layers}
    for layer in profile.layers:
        counted = [
            value
            for one, other in ((layer, dense[layer.name]),)
            for value in (
                one.counters.map_reads,
                other.counters.map_reads,
                one.counters.map_writes,
                other.counters.map_writes,
                one.counters.macro_accesses,
                other.counters.macro_accesses,
                one.counters.offchip_bits / 8192,
                other.counters.offchip_bits / 8192,
                one.energy.total / 1e6,
                other.energy.total / 1e6,
            )
        ]
        assert cells[layer.name][-10:] == pytest.approx(counted)
    assert cells["all"][-2] == pytest.approx(profile.energy.total / 1e6)
    assert cells["all"][:2] == [
        sum(layer.group_sets for layer in profile.layers),
        sum(layer.dense_group_sets for layer in profile.layers),
    ]


def test_the_dense_layers_make_the_baseline(page: Page) -> None:
    assert sum(layer.cycles for layer in page.profile.dense_layers) == page.profile.dense_cycles
    assert all(x.group_sets == x.dense_group_sets for x in page.profile.dense_layers)


def test_the_totals_are_the_profiles(page: Page) -> None:
    (totals,) = (e for e in page.root.iter("dl") if e.get("class") == "cards")
    values = {e.find("dt").text: e.find("dd/b").text for e in totals.iter("div")}
    profile = page.profile
    assert values["FPS"] == f"{profile.fps:,.1f}"
    assert values["FPS, dense baseline"] == f"{profile.dense_fps:,.1f}"
    assert values["speed-up"] == f"{profile.speedup:.2f}x"
    assert values["GOPS, the paper's way"] == f"{profile.paper_gops:,.1f}"
    assert values["TOPS/W, everything"] == f"{profile.tops_per_watt:.2f}"


def test_the_charts_add_up_to_the_profile(page: Page) -> None:
    for layer in page.profile.layers:
        parts = [row for row in page.rows("parts") if row["layer"] == layer.name]
        assert sum(row["value"] for row in parts) == layer.core_cycles
        assert sum(row["share"] for row in parts) == pytest.approx(1)
        energy = [row["value"] for row in page.rows("energy") if row["layer"] == layer.name]
        assert sum(energy) == pytest.approx(layer.energy.total / 1e6)
    latency = [row for row in page.rows("comparison") if row["metric"] == "latency"]
    both = {
        machine: sum(row["value"] for row in latency if row["machine"] == machine)
        for machine in ("this program", "dense baseline")
    }
    assert list(both.values()) == [page.profile.cycles, page.profile.dense_cycles]


def test_no_layer_is_above_the_roof(page: Page) -> None:
    arch = page.program.arch
    bandwidth = arch.offchip_bits_per_cycle / 8
    points = [row for row in page.rows("layers") if row["counted"] == "executed"]
    assert points
    for point in points:
        roof = min(arch.macs_per_cycle, point["intensity"] * bandwidth)
        assert 0 < point["speed"] <= roof


def test_the_timeline_has_every_lane_to_its_end(page: Page) -> None:
    events = page.rows("events")
    lanes = {event["lane"] for event in events}
    assert {"layers", "dma", "core 0 load", "core 3 compute", "bank 1 core 2"} <= lanes
    assert max(event["end"] for event in events) == page.profile.cycles == page.data["cycles"]
    layers = [event for event in events if event["lane"] == "layers"]
    assert [e["end"] - e["start"] for e in layers] == [x.cycles for x in page.profile.layers]


def test_the_sizes_make_the_file(page: Page) -> None:
    sizes = {name: values[0] for name, values in page.cells("size-table").items()}
    assert sizes.pop("file") == len(page.program.to_bytes()) == sum(sizes.values())
    # Of 8 bits; every load is filled once, on each core that computes with it.
    (region,) = page.program.regions
    filled = sum(one.group_sets for one in observe(region, page.program.arch).fillings)
    assert sizes["weights"] == 256 * filled
    assert sizes["instructions"] == sum(len(region.code) for region in page.program.regions)


def test_the_machine_is_there_with_its_assumptions(page: Page) -> None:
    rows = list(page.root.find(".//table[@id='machine']").iter("tr"))[1:]
    marked = {row.find("th").text for row in rows if row.get("class") == "assumed"}
    assert marked == {info.name for info in page.program.arch.describe() if info.assumed}
    assert len(rows) == len(page.program.arch.describe())


# -- group-sets ------------------------------------------------------------------------------------


def test_the_observed_group_sets_are_those_of_the_weights(page: Page) -> None:
    """Counted on the weights themselves, and on the pictures of the page."""
    (region,) = page.program.regions
    maps = {one.layer.split("+")[0]: one for one in observe(region, page.program.arch).maps}
    convolutions = [layer for layer in page.graph.layers if isinstance(layer, Conv)]
    assert maps.keys() == {layer.name for layer in convolutions}
    for layer in convolutions:
        expected = {
            (int(block), term, int(tap), int(source))
            for term, one in enumerate(layer.terms)
            for block, source, tap in np.argwhere(blocks_that_are_not_zero(one.weight))
        }
        assert maps[layer.name].stored == expected
    for figure in page.root.iter("figure"):
        if figure.get("data-layer"):
            one = maps[figure.get("data-layer").split("+")[0]]
            paths = {path.get("class"): path.get("d") for path in figure.iter(f"{SVG}path")}
            assert len(cells_of(paths["stored"])) == len(one.stored)
            assert len(cells_of(paths["zero"])) == len(one.dense) - len(one.stored)
            assert not cells_of(paths["stored"]) & cells_of(paths["zero"])


def blocks_that_are_not_zero(weight: Any) -> Any:
    """Give for each block of outputs, of inputs, and tap whether a weight is not zero."""
    outputs, inputs = (-(-size // 16) for size in weight.shape[:2])
    padded = np.zeros((outputs * 16, inputs * 16, weight.shape[2] * weight.shape[3]))
    padded[: weight.shape[0], : weight.shape[1]] = weight.reshape(*weight.shape[:2], -1)
    return padded.reshape(outputs, 16, inputs, 16, -1).any(axis=(1, 3))


def cells_of(path: str) -> set[tuple[int, int]]:
    """Give the cells that a path of rectangles one cell high fills."""
    rectangles = re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path)
    assert "".join("M{} {}h{}v1h-{}z".format(*one) for one in rectangles) == path
    cells = [(int(x) + step, int(y)) for x, y, width, _ in rectangles for step in range(int(width))]
    assert len(cells) == len(set(cells))
    return set(cells)


def test_depthwise_group_sets_are_the_diagonal() -> None:
    program = compiled(networks.mobilenet_v1(0.5))
    one = observe(program.regions[0], program.arch).maps[1]
    assert {(block, source) for block, _, _, source in one.dense} == {
        (block, block) for block in range(one.out_blocks)
    }
    drawn = picture(one)
    assert len(cells_of(drawn.zero + drawn.stored)) == 9 * one.out_blocks


# -- memories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["none", "prefetch", "full"])
def test_stays_lie_in_the_banks_and_never_on_each_other(overlap: str) -> None:
    arch = load_arch("mars", {"overlap": overlap})
    for graph in (networks.resnet20(0.3), networks.mobilenet_v2(0.5)):
        (region,) = compiled(graph, arch).regions
        found = observe(region, arch)
        assert found.stays and {stay.bank for stay in found.stays} == {0, 1}
        for stay in found.stays:
            assert 0 <= stay.base < stay.base + stay.words <= arch.bank_words
            assert 0 <= stay.start <= stay.end <= found.timeline.cycles
        for number, one in enumerate(found.stays):
            for other in found.stays[:number]:
                assert not meet(one, other), (one, other)
        assert all(0 < filling.group_sets <= filling.slots for filling in found.fillings)
        stored = sum(layer.group_sets for layer in region.layers)
        assert sum(filling.group_sets for filling in found.fillings) >= stored


def meet(one: Stay, other: Stay) -> bool:
    """Whether two stays share a word at a time."""
    words = one.base < other.base + other.words and other.base < one.base + one.words
    return one.bank == other.bank and words and one.start < other.end and other.start < one.end


def test_partial_sums_are_shown_where_a_block_does_not_fit() -> None:
    """64 inputs, 9 taps: a kernel block of 36 group-sets on a machine that holds 8 of them."""
    kind = MapType(64, 8, 8, 8)
    weight = np.ones((16, 64, 3, 3), np.int64)
    term = ConvTerm("x0", weight, padding=(1, 1, 1, 1))
    layer = Conv("conv0", [term], np.zeros(16), Requant.eq5(8, 15))
    graph = Graph(
        [Input("x0", kind, kind.shape, Quantize())],
        [layer],
        [Output("conv0", (16, 8, 8), Dequantize())],
    )
    arch = load_arch("mars", {"weight_groups_per_partition": "8"})
    (region,) = compiled(graph, arch).regions
    partial = [stay for stay in observe(region, arch).stays if stay.what == "partial sums"]
    assert partial and {stay.words % 8 for stay in partial} == {0}


def test_watching_changes_no_time(page: Page) -> None:
    (region,) = page.program.regions
    assert observe(region, page.program.arch).timeline.cycles == page.profile.cycles


# -- other programs --------------------------------------------------------------------------------


def test_names_and_reasons_are_text() -> None:
    program = compiled(zoo.load_digits())
    reason = HostReason("conv2d", "groups <b>3</b> & </script>")
    hosted = attrs.evolve(
        program, host_operators=("nn.conv2d", "<i>softmax</i>"), host_reasons=(reason,)
    )
    text = report_page(hosted, "<script>alert(1)</script>", baseline=False)
    root = parse(text)
    assert "".join(root.find(".//h1").itertext()).startswith("<script>alert(1)</script>")
    assert len(list(root.iter("script"))) == 3 and not list(root.iter("i"))
    (row,) = list(root.find(".//table[@id='host']").iter("tr"))[1:]
    assert [cell.text for cell in row] == [reason.operator, reason.reason]


def test_without_a_baseline_nothing_is_compared() -> None:
    page = page_of(compiled(zoo.load_digits()), baseline=False)
    assert "comparison" not in page.data["charts"] and "comparison" not in page.data["tables"]
    assert page.root.find(".//select[@id='metric']") is None
    first = page.profile.layers[0]
    assert page.cells("time-table")[first.name][:2] == [first.cycles, first.utilisation]


def test_regions_follow_each_other() -> None:
    page = page_of(compiled(zoo.load_digits(), count=2))
    layers = [event for event in page.rows("events") if event["lane"] == "layers"]
    assert [event["name"][:2] for event in layers] == ["0:"] * 8 + ["1:"] * 8
    assert layers[8]["start"] == page.profile.cycles // 2
    fillings = page.rows("fillings")
    numbers = [filling["number"] for filling in fillings]
    assert numbers == sorted(numbers) and len(set(numbers)) == max(numbers) + 1
    assert len(page.cells("time-table")) == 17


def test_a_region_without_layers_is_one_row() -> None:
    program = compiled(zoo.load_digits())
    region = attrs.evolve(program.regions[0], layers=())
    page = page_of(attrs.evolve(program, regions=(region,)))
    assert list(page.cells("time-table")) == ["region", "all"]


# -- pieces ----------------------------------------------------------------------------------------


def test_edges_of_a_lane_never_run_beside_each_other() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        pairs = [tuple(sorted(rng.choice(12, 2, replace=False).tolist())) for _ in range(14)]
        found = route(pairs)
        assert {(edge.start, edge.stop) for edge in found} == set(pairs)
        for edge in found:
            assert (edge.lane == 0) == (edge.stop == edge.start + 1)
            for other in found:
                if edge != other and edge.lane and edge.lane == other.lane:
                    assert edge.stop <= other.start or other.stop <= edge.start


def test_joined_events_cover_what_they_join() -> None:
    events = [
        Placed(Event("dma", "FETCH weight", 0, i, 10 * i, 10 * i + 3 + i % 4), 0, "conv0")
        for i in range(200)
    ] + [
        Placed(Event("core 0 load", "FILL", 0, i, 25 * i, 25 * i + 5), 0, f"conv{i // 20}")
        for i in range(60)
    ]
    assert joined(events, 1000) == events
    few = joined(events, 20)
    assert 4 <= len(few) <= 20  # a lane of one layer, and one of three
    assert {placed.layer for placed in few} == {"conv0", "conv1", "conv2"}
    for placed in events:
        event = placed.value
        assert any(
            one.layer == placed.layer
            and one.value.lane == event.lane
            and one.value.start <= event.start <= event.end <= one.value.end
            for one in few
        )


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "net.mars"
    compiled(zoo.load_digits()).save(path)
    yield path


def test_the_command_writes_a_page(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = saved.with_suffix(".html")
    assert main(["report", str(saved), "-o", str(page), "--no-baseline"]) == 0
    assert "net" in "".join(parse(page.read_text(encoding="utf-8")).find(".//title").itertext())
    assert f"wrote {page}" in capsys.readouterr().err
    assert main(["report", str(saved), "-o", str(page), "--no-baseline", "--title", "Digits"]) == 0
    assert "<h1>Digits " in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["jinja2", "vl_convert"])
def test_without_its_libraries_it_says_what_to_install(
    name: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MarsError, match=f"needs {name}.*tvm-mars\\[report\\]"):
        report_page(Program.load(saved), "net")
    page = saved.with_suffix(".html")
    assert main(["report", str(saved), "-o", str(page)]) == 1
    assert "pip install 'tvm-mars[report]'" in capsys.readouterr().err
    assert not page.exists()


def test_the_page_needs_no_framework() -> None:
    """Neither TVM nor PyTorch is imported for it."""
    script = BLOCK.format(blocked=["tvm", "tvm_ffi", "torch", "onnx"], modules=["tvm_mars"]) + (
        "from mars_runtime import PRESETS\n"
        "from tvm_mars.compiler import NamedGraph, build\n"
        "from tvm_mars.report.page import report_page\n"
        "from tvm_mars.zoo import load_digits\n"
        "program = build([NamedGraph.of(load_digits())], PRESETS['mars'])\n"
        "assert '<h1>' in report_page(program, 'digits', baseline=False)\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=120)
