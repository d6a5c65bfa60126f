"""Searching: reproducible, whoever measures; a database that survives; compilations that use it."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, simulate
from mars_runtime.errors import CapacityError, MarsError, OptionError
from python_tests.random_graphs import random_graph
from python_tests.small_networks import every_kind_of_layer, tiny_conv
from python_tests.test_tuner_bound import convs
from tvm_mars.cli import main
from tvm_mars.compiler import NamedGraph, build_region, pack
from tvm_mars.schedule import ScheduleError, plan
from tvm_mars.tuner import api, boosting
from tvm_mars.tuner.api import tune
from tvm_mars.tuner.boosting import ModelError
from tvm_mars.tuner.database import (
    RECORDS,
    Database,
    DatabaseError,
    arch_key,
    workload_key,
)
from tvm_mars.tuner.model import BoostedModel, features
from tvm_mars.tuner.outcome import outcomes
from tvm_mars.tuner.picture import FORMATS, draw, specification
from tvm_mars.tuner.runners import RunnerError
from tvm_mars.tuner.search import COST_MODELS, SearchOptions, search
from tvm_mars.tuner.space import Space
from tvm_mars.tuner.strategies import STRATEGIES, grid_points, make_strategy

MARS = PRESETS["mars"]


def small_space(overlap: str = "full") -> Space:
    return Space.of(every_kind_of_layer(), attrs.evolve(MARS, overlap=overlap))


def found(directory: Path) -> list[tuple[int, int, object]]:
    return [(one.trial, one.cycles, one.point) for one in Database(directory).records]


# -- search ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_trials_and_nothing_twice(strategy, tmp_path):
    space = small_space()
    options = SearchOptions(trials=40, batch=12, strategy=strategy, seed=3)
    for place in ("a", "b"):
        search(space, Database(tmp_path / place), options)
    first = found(tmp_path / "a")
    assert first == found(tmp_path / "b")
    assert len(first) == 40 == len({point for _, _, point in first})
    assert first[0][2] == space.default
    if strategy != "grid":
        search(space, Database(tmp_path / "c"), attrs.evolve(options, seed=4))
        assert found(tmp_path / "c") != first


def test_search_finds_what_is_better_than_the_default(tmp_path):
    space = small_space()
    best = search(space, Database(tmp_path), SearchOptions(trials=60, batch=12))
    assert best.cycles < 0.9 * space.time(space.default).cycles
    assert space.time(best.point).cycles == best.cycles


@pytest.mark.parametrize("objective", ["energy", "edp"])
def test_other_objectives(objective, tmp_path):
    space = small_space()
    best = search(space, Database(tmp_path), SearchOptions(trials=30, objective=objective))
    records = Database(tmp_path).records
    assert best.cost(objective) == min(one.cost(objective) for one in records)


def test_one_and_two_workers_come_to_the_same(tmp_path):
    space = small_space()
    for workers in (1, 2):
        options = SearchOptions(trials=40, batch=12, workers=workers)
        search(space, Database(tmp_path / str(workers)), options)
    assert found(tmp_path / "1") == found(tmp_path / "2")


def test_a_small_space_is_searched_whole_and_evolution_comes_within_one_percent(tmp_path):
    space = Space.of(tiny_conv(), MARS)
    options = SearchOptions(trials=5000, batch=256, strategy="grid")
    best = search(space, Database(tmp_path), options)
    assert 20 < len(Database(tmp_path).records) < 5000
    evolved = search(space, Database(tmp_path / "e"), SearchOptions(trials=40, batch=8))
    assert evolved.cycles <= 1.01 * best.cycles


def test_a_search_begins_with_the_best_of_earlier_records(tmp_path):
    """On another machine, whose refusals it has to learn of; nothing is measured twice."""
    graph, arch = every_kind_of_layer(), attrs.evolve(MARS, overlap="full")
    earlier = tune(graph, work_dir=tmp_path / "earlier", max_trials_global=60, arch=arch, seed=3)
    space = small_space()
    key = workload_key(graph, pack(graph, arch))
    (best, *_) = points = earlier.best_points(key, 8)
    assert len(set(points)) == 8
    assert earlier.best(key, arch_key(arch)).point == best
    few = {}
    for name, others in (("alone", None), ("after", earlier)):
        few[name] = tune(
            graph, work_dir=tmp_path / name, max_trials_global=24, arch=arch, earlier=others
        )
        trials = found(tmp_path / name)
        assert trials[0][2] == space.default
        assert len({point for _, _, point in trials}) == len(trials) == 24
    assert few["after"].best(key, arch_key(arch)).cycles <= earlier.best(key, arch_key(arch)).cycles
    assert few["after"].records[0].run != few["alone"].records[0].run
    smaller = attrs.evolve(arch, cores=2)
    tune(graph, work_dir=tmp_path / "other", max_trials_global=24, arch=smaller, earlier=earlier)
    measured = {point for _, _, point in found(tmp_path / "other")}
    assert measured & set(points)
    assert earlier.best_points("unknown", 8) == ()


def test_patience_ends_a_search(tmp_path):
    search(small_space(), Database(tmp_path), SearchOptions(trials=500, batch=8, patience=16))
    assert len(Database(tmp_path).records) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": 0},
        {"objective": "speed"},
        {"strategy": "luck"},
        {"workers": 0},
        {"runner": "cloud"},
    ],
)
def test_options_without_meaning_are_refused(changes):
    with pytest.raises(OptionError, match=f"option {next(iter(changes))}"):
        SearchOptions(**({"trials": 10} | changes))


def test_the_search_is_within_a_hundredth_of_the_best_of_all_schedules(tmp_path):
    """A dense layer of 16 group-sets; the default takes half as long again."""
    space = Space.of(convs([256, 16], 1, 1), attrs.evolve(MARS, overlap="full"))
    cycles = {}
    for point in grid_points(space):
        with contextlib.suppress(ScheduleError):
            schedule = space.realize(point)
            if schedule not in cycles:
                cycles[schedule] = space.time(point).cycles
    best = min(cycles.values())
    assert len(cycles) > 1000 and 1.2 * best < space.time(space.default).cycles
    for model in ("xgb", "none"):
        options = SearchOptions(trials=64, batch=16, cost_model=model)
        assert search(space, Database(tmp_path / model), options).cycles <= 1.01 * best


def test_the_model_learns_to_rank():
    """Fitted to half of some random points, it orders the other half better than chance."""
    space = small_space()
    strategy = make_strategy("random", space, seed=1, trials=1)
    timed = []
    for point in strategy.propose(600):
        if space.legal(point) is None:
            timed.append((point, space.time(point).cycles))
    assert len(timed) > 60
    half = len(timed) // 2
    model = BoostedModel(space, 0)
    assert not model.scores([timed[0][0]]).any()
    model.learn([p for p, _ in timed[:half]], [float(c) for _, c in timed[:half]])
    scores = model.scores([p for p, _ in timed[half:]])
    cycles = np.array([c for _, c in timed[half:]])
    better = cycles[:, None] < cycles
    assert (scores[:, None] > scores)[better].mean() > 0.65


def test_another_process_computes_the_same_ensemble():
    """Beside a TVM with Relay it is such a process that computes."""
    if "tvm.relay" in sys.modules:
        pytest.skip("XGBoost may crash this process")
    rng = np.random.default_rng(0)
    rows, worth = rng.random((50, 7)), rng.random(50)
    here = boosting.predict(boosting.fit(rows, worth, 3), rows[::-1])
    process = boosting.Elsewhere()
    ensemble = process.call(boosting._fit, rows=rows, worth=worth, seed=np.array(3))
    there = process.call(boosting._predict, ensemble=ensemble, rows=rows[::-1])
    process.close()
    assert here.std() > 0.1
    np.testing.assert_array_equal(here, there)


def test_a_lost_process_is_said_and_another_is_started(monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm.relay", None)
    monkeypatch.setattr(boosting, "_elsewhere", [])
    rows, worth = np.eye(4), np.arange(4.0)
    ensemble = boosting.fit(rows, worth, 0)
    (process,) = boosting._elsewhere
    process.process.kill()
    process.process.wait()
    with pytest.raises(ModelError, match="its process ended with code -9"):
        boosting.predict(ensemble, rows)
    assert len(boosting.predict(ensemble, rows)) == 4
    boosting._elsewhere[0].close()


def test_without_xgboost_the_remedy_is_said_and_none_works(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", without_xgboost)
    with pytest.raises(ModelError, match="pip install xgboost-cpu, or search with the cost model"):
        search(small_space(), Database(tmp_path), SearchOptions(trials=12))
    options = SearchOptions(trials=12, cost_model="none")
    assert search(small_space(), Database(tmp_path), options).cycles > 0


def without_xgboost(name, package=None, original=importlib.util.find_spec):
    return None if name == "xgboost" else original(name, package)


def test_features_have_one_width():
    space = small_space()
    widths = {
        len(features(space, p)) for p in make_strategy("random", space, seed=0, trials=1).propose(9)
    }
    assert len(widths) == 1


# -- database --------------------------------------------------------------------------------------


def test_a_torn_last_record_is_dropped_and_the_next_is_whole(tmp_path):
    search(small_space(), Database(tmp_path), SearchOptions(trials=12))
    whole = (tmp_path / RECORDS).read_bytes()
    (tmp_path / RECORDS).write_bytes(whole[:-20])
    database = Database(tmp_path)
    assert len(database.records) == 11
    database.add(attrs.evolve(database.records[0], trial=11))
    assert [one.trial for one in Database(tmp_path).records] == list(range(12))


@pytest.mark.parametrize("text", ["{}\n", "[1]\n", "nonsense\n", '{"workload": 1}\n'])
def test_other_damage_is_said(tmp_path, text):
    search(small_space(), Database(tmp_path), SearchOptions(trials=4))
    with (tmp_path / RECORDS).open("a") as file:
        file.write(text)
    with pytest.raises(DatabaseError, match=RECORDS):
        Database(tmp_path)


def test_records_from_before_halos_were_kept_have_them_moved_in_again(tmp_path):
    search(small_space(), Database(tmp_path), SearchOptions(trials=4))
    text = (tmp_path / RECORDS).read_text()
    assert all(choice.halo == "keep" for choice in Database(tmp_path).records[0].point.choices)
    (tmp_path / RECORDS).write_text(re.sub(r',\s*"halo":\s*"(keep|reload)"', "", text))
    for record in Database(tmp_path).records:
        assert {choice.halo for choice in record.point.choices} == {"reload"}


def test_workloads_differ_by_structure_and_zeros_not_by_weights():
    keys = set()
    for seed in range(40):
        graph = random_graph(seed)
        keys.add(workload_key(graph, pack(graph, MARS)))
    assert len(keys) == 40
    graph = every_kind_of_layer()
    other = every_kind_of_layer(seed=1)
    assert workload_key(graph, pack(graph, MARS)) == workload_key(other, pack(other, MARS))
    assert arch_key(MARS) == arch_key(attrs.evolve(MARS, name="mine"))
    assert arch_key(MARS) != arch_key(attrs.evolve(MARS, cores=2))


SEARCH = """
import os, sys
from python_tests.test_tuner import small_space
from tvm_mars.tuner import runners
from tvm_mars.tuner.database import Database
from tvm_mars.tuner.search import SearchOptions, search

def told(space, point, measure=runners.measure):
    measured = measure(space, point)
    if measured is not None:
        os.write(1, b"m")
    return measured

runners.measure = told
space = small_space()
os.write(1, b"ready\\n")
options = SearchOptions(trials=60, batch=4, cost_model=sys.argv[2])
search(space, Database(sys.argv[1]), options, resume=True)
"""


@pytest.mark.parametrize("cost_model", COST_MODELS)
def test_a_killed_search_loses_one_record_and_goes_on_to_the_same_result(
    tmp_path, kills, cost_model
):
    """It is killed at random moments (`--kills 50` for a hundred); a finished one begins anew."""
    options = SearchOptions(trials=60, batch=4, cost_model=cost_model)
    start = time.monotonic()
    search(small_space(), Database(tmp_path / "whole"), options)
    takes = time.monotonic() - start
    whole = found(tmp_path / "whole")
    rng = random.Random(7)
    killed = finished = lost = held = written = 0
    while killed < kills:
        directory = tmp_path / str(finished)
        with subprocess.Popen(
            [sys.executable, "-c", SEARCH, str(directory), cost_model], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 1.2 * takes))
            process.send_signal(signal.SIGKILL)
            measured = len(process.stdout.read())
        before, held = held, len(Database(directory).records)
        assert found(directory) == whole[:held]
        assert measured - 1 <= held - before <= measured
        lost += measured - (held - before)
        written += held > before
        if process.returncode == 0:
            assert held == 60
            finished, held = finished + 1, 0
        else:
            assert process.returncode == -signal.SIGKILL
            killed += 1
    print(
        f"{killed} kills, {written} of runs that wrote records, {lost} records lost; "
        f"{finished} searches finished between them"
    )
    search(small_space(), Database(tmp_path / str(finished)), options, resume=True)
    assert found(tmp_path / str(finished)) == whole


WITH_WORKERS = """
import multiprocessing, sys
from python_tests.test_tuner import small_space
from tvm_mars.tuner.database import Database
from tvm_mars.tuner.search import SearchOptions, search

def told(record, best):
    if record.trial == 10:
        print(*(one.pid for one in multiprocessing.active_children()), flush=True)
        sys.stdin.readline()

if __name__ == "__main__":
    options = SearchOptions(trials=60, batch=4, workers=2)
    search(small_space(), Database(sys.argv[1]), options, on_trial=told)
"""


def test_a_killed_search_leaves_no_workers(tmp_path):
    script = tmp_path / "search.py"  # which workers import
    script.write_text(WITH_WORKERS)
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "tuned")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)
        assert len(workers) == 2
        process.stdout.read()  # which ends when no worker holds it any more
    assert len(Database(tmp_path / "tuned").records) == 11


def test_an_error_in_a_worker_process_arrives():
    error = CapacityError("too much", op="conv3", need=3, have=2, hint="less")
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived)) == (CapacityError, str(error))
    assert (arrived.where, arrived.need, arrived.have) == ("conv3", 3, 2)


def test_without_ray_the_remedy_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunnerError, match=r"Ray is not installed \(pip install 'tvm-mars\[ray\]'"):
        tune(tiny_conv(), work_dir=tmp_path, max_trials_global=4, runner="ray")


@pytest.mark.parametrize(
    "given", [{"ray_address": "auto"}, {"runner": "ray", "trial_timeout": 0.0}, {"runner": "cloud"}]
)
def test_options_of_the_runner_without_meaning_are_refused(given, tmp_path):
    with pytest.raises(OptionError, match=f"option {list(given)[-1]}"):
        tune(tiny_conv(), work_dir=tmp_path, max_trials_global=4, **given)


UNGUARDED = """
import sys
from mars_runtime import PRESETS
from tvm_mars.tuner.database import Database
from tvm_mars.tuner.search import SearchOptions, search
from tvm_mars.tuner.space import Space
from tvm_mars.zoo import load_digits

space = Space.of(load_digits(), PRESETS["mars"])
search(space, Database(sys.argv[1]), SearchOptions(trials=20, workers=2))
"""


def test_a_script_that_its_workers_run_again_is_said(tmp_path):
    script = tmp_path / "search.py"
    script.write_text(UNGUARDED)
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "tuned")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert ended.returncode == 1
    assert "RunnerError: runner local: a worker process was lost" in ended.stderr
    assert "outside of if __name__ == '__main__'" in ended.stderr


def test_a_lost_worker_process_is_said(tmp_path):
    def kill(record, best):
        if record.trial == 10:
            multiprocessing.active_children()[0].kill()

    options = SearchOptions(trials=60, batch=12, workers=2)
    with pytest.raises(RunnerError, match=r"a worker process was lost .*--resume goes on"):
        search(small_space(), Database(tmp_path), options, on_trial=kill)
    assert 11 <= len(Database(tmp_path).records) < 60
    search(small_space(), Database(tmp_path), options, resume=True)
    assert len(found(tmp_path)) == 60


# -- what was found --------------------------------------------------------------------------------


def two_searches(directory: Path) -> tuple[Space, Database]:
    space = small_space()
    for seed in (0, 1):
        options = SearchOptions(trials=24, batch=8, seed=seed)
        search(space, Database(directory), options, name="<net>")
    return space, Database(directory)


def test_outcomes_are_the_schedules_of_the_machine(tmp_path):
    space, database = two_searches(tmp_path)
    (outcome,) = outcomes(database)
    assert outcome.network == "<net>" and outcome.records == 48 and len(outcome.runs) == 2
    for record, field in ((outcome.default, "default_cycles"), (outcome.best, "best_cycles")):
        timeline = space.time(record.point)
        names = [part for layer in timeline.layers for part in layer.name.split("+")]
        cycles = {layer.name.split("+")[0]: layer.cycles for layer in timeline.layers}
        assert sorted(names) == sorted(layer.name for layer in outcome.layers)
        for layer in outcome.layers:
            assert getattr(layer, field) == cycles.get(layer.name, 0)
        assert sum(record.layer_cycles) == record.cycles == timeline.cycles
    assert [layer.name for layer in outcome.layers] == [layer.name for layer in space.graph.layers]
    again = [
        attrs.evolve(choice, **{name: now for name, (_, now) in layer.changes.items()})
        for choice, layer in zip(space.default.choices, outcome.layers, strict=True)
    ]
    assert tuple(again) == outcome.best.point.choices != space.default.choices
    first, second = (run.best_costs for run in outcome.runs)
    assert len(first) == len(second) == 24
    assert min(first[-1], second[-1]) == outcome.best.cycles
    assert sorted(first, reverse=True) == list(first) and first[0] == outcome.default.cycles


def test_a_picture_shows_searches_layers_and_decisions(tmp_path, capsys):
    pytest.importorskip("vl_convert")
    _, database = two_searches(tmp_path / "tuned")
    (outcome,) = outcomes(database)
    for kind in FORMATS:
        path = tmp_path / f"tuned.{kind}"
        assert main(["tune", "-D", str(tmp_path / "tuned"), "--show", "-o", str(path)]) == 0
        assert f"wrote {path}" in capsys.readouterr().err
    assert (tmp_path / "tuned.png").read_bytes().startswith(b"\x89PNG")
    texts = [
        "".join(element.itertext())
        for element in ElementTree.parse(tmp_path / "tuned.svg").iter()
        if element.tag.endswith("}text")
    ]
    assert f"default {outcome.default.cycles:,} core cycles" in " ".join(texts)
    assert "<net>" in texts and "default" in texts and "best" in texts
    for layer in outcome.layers:
        assert layer.name in texts
        assert set(layer.changes) <= set(texts)
    for number, run in enumerate(outcome.runs, 1):
        assert f"{number}: {run.name}" in texts
    page = (tmp_path / "tuned.html").read_text(encoding="utf-8")
    assert not re.search(r"<script[^>]+src=|<link", page)
    (drawn,) = specification([outcome])["vconcat"]
    bars = drawn["vconcat"][1]["hconcat"][0]["data"]["values"]
    assert sum(bar["cycles"] for bar in bars if bar["schedule"] == "best") == outcome.best.cycles


def test_a_picture_of_what_is_no_better_has_no_decisions(tmp_path):
    search(small_space(), Database(tmp_path), SearchOptions(trials=1))
    (drawn,) = specification(list(outcomes(Database(tmp_path))))["vconcat"]
    assert len(drawn["vconcat"][1]["hconcat"]) == 1


def test_pictures_that_cannot_be_drawn_are_refused(tmp_path, capsys, monkeypatch):
    search(small_space(), Database(tmp_path / "tuned"), SearchOptions(trials=1))
    asked = ["tune", "-D", str(tmp_path / "tuned"), "--show", "-o"]
    assert main([*asked, "tuned.pdf"]) == 2
    assert "does not end in .html, .png, .svg" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert main([*asked, str(tmp_path / "tuned.svg")]) == 1
    assert "pip install 'tvm-mars[report]'" in capsys.readouterr().err
    with pytest.raises(MarsError, match="vl_convert"):
        draw(Database(tmp_path / "tuned"), "svg")
    with pytest.raises(OptionError, match="pdf"):
        draw(Database(tmp_path / "tuned"), "pdf")
    assert not (tmp_path / "tuned.svg").exists()


# -- compilations ----------------------------------------------------------------------------------


def test_compilations_use_what_was_tuned_for_their_workload_and_machine(tmp_path):
    graph, arch = every_kind_of_layer(), attrs.evolve(MARS, overlap="full")
    database = tune(graph, work_dir=tmp_path, max_trials_global=40, arch=arch)
    named = NamedGraph.of(graph)
    default = build_region(named, arch)
    best = database.best(workload_key(graph, pack(graph, arch)), arch_key(arch))
    assert best is not None
    with Database(tmp_path):
        tuned = build_region(named, arch)
        assert simulate(tuned, arch).cycles == best.cycles < simulate(default, arch).cycles
        assert build_region(named, MARS).code == build_region(named, MARS, scheduler=plan).code
    assert build_region(named, arch) == default


def test_every_region_of_a_model_is_tuned(tmp_path):
    pytest.importorskip("tvm")
    from tvm_mars.onnx_export import to_onnx

    graph = random_graph(6, native=True, paper=True)
    shape = {entry.name: (1, *entry.shape) for entry in graph.inputs}
    trials = []
    database = tune(
        to_onnx(graph), shape=shape, work_dir=tmp_path, max_trials_global=24, on_trial=trials.append
    )
    assert trials and trials[-1].done == trials[-1].trials == len(database.records)


def test_regions_that_are_alike_are_tuned_once(tmp_path, monkeypatch):
    graphs = [every_kind_of_layer(), every_kind_of_layer(seed=1), tiny_conv()]
    monkeypatch.setattr(api, "regions_of", lambda *_: graphs)
    seen = []
    database = tune(None, work_dir=tmp_path, max_trials_global=16, on_trial=seen.append)
    assert len(database.workloads) == 2 == seen[-1].regions
    assert len(database.records) == 16 and {trial.trials for trial in seen} == {8}


def test_command_line(tmp_path, capsys, caplog):
    """Tune the digits network, show it, compile with it: the program is the faster one."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("tvm")
    from mars_runtime import Program
    from tvm_mars.onnx_export import to_onnx
    from tvm_mars.zoo import load_digits

    model, work = str(tmp_path / "net.onnx"), str(tmp_path / "tuned")
    onnx.save(to_onnx(load_digits()), model)
    shape = ["--input-shapes", "x0:[1,1,16,16]"]  # TVM with Relay compiles for one batch
    full = ["--set", "overlap=full"]
    assert main(["tune", model, "-D", work, "--trials", "16", *shape, *full]) == 0
    tuned = capsys.readouterr().out
    assert main(["tune", "-D", work, "--show"]) == 0
    shown = capsys.readouterr().out
    assert shown == tuned and "16 records" in shown and "best at trial" in shown
    cycles = {}
    for name, options in (("default", []), ("tuned", ["--tuned", work])):
        program = str(tmp_path / f"{name}.mars")
        assert main(["compile", model, "--program", program, *shape, *full, *options]) == 0
        loaded = Program.load(program)
        cycles[name] = simulate(loaded.regions[0], loaded.arch).cycles
    assert cycles["tuned"] < cycles["default"]
    (best,) = {min(one.cycles for one in Database(work).records)}
    assert cycles["tuned"] == best
    assert not caplog.records
    capsys.readouterr()
    assert main(["compile", model, "--program", program, *shape, "--tuned", work]) == 0
    assert "no tuning records of a region with 9 layers on machine mars" in caplog.text
    for nothing in (tmp_path / "no", tmp_path):
        asked = ["--tuned", str(nothing)]
        assert main(["compile", model, "--program", program, *shape, *asked]) == 1
        assert "mars tune and tvmc-mars tune write them" in capsys.readouterr().err
        assert main(["tune", "-D", str(nothing), "--show"]) == 1
    assert main(["tune", model, *shape, "-D", model]) == 1
    assert "is a file (records are a directory" in capsys.readouterr().err
    assert main(["tune", "-D", work]) == 2
