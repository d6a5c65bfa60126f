"""Training: recipes, data, exact resume, checkpoints that no crash tears."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import attrs
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mars_runtime.errors import InputError, OptionError  # noqa: E402
from tvm_mars.datasets import read_idx  # noqa: E402
from tvm_mars.graph import evaluate  # noqa: E402
from tvm_mars.qat import MarsNetwork, PruningPlan, Quantization, to_graph  # noqa: E402
from tvm_mars.qat.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from tvm_mars.qat.data import Augmentation, Images, augment, load_data  # noqa: E402
from tvm_mars.qat.models import plain  # noqa: E402
from tvm_mars.qat.recipe import (  # noqa: E402
    Distillation,
    Recipe,
    Training,
    load_recipe,
    recipe_names,
)
from tvm_mars.qat.training import Trainer, learning_rate, load_run  # noqa: E402

SMALL = Training(epochs=2, batch=8, learning_rate=0.05, warmup=0.5)


def small(_classes):
    """Build a network with dropout, so that its random numbers count too."""
    return nn.Sequential(*list(plain(4, width=4))[:-1], nn.Dropout(0.3), nn.Linear(16, 4))


MODEL = f"{__name__}:small"


@pytest.fixture(scope="module")
def data():
    """Four classes, told apart by where an image is bright."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 48)
    pixels = rng.integers(0, 60, (48, 3, 8, 8))
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
    images = Images(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels))
    return images, images.first(16)


def everything(name="all"):
    """A recipe with every feature on."""
    return Recipe(
        name,
        MODEL,
        init="dense",
        training=attrs.evolve(SMALL, ema=0.9, label_smoothing=0.1, amp="bf16", gradient_clip=1.0,
                              freeze_statistics=0.7),
        augmentation=Augmentation(shift=1, cutout=2),
        quantization=Quantization(weight_bits=4),
        pruning=PruningPlan(0.5, kernels=4, channels=4, updates=5),
        distillation=Distillation("dense"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Runs with a finished dense one."""
    folder = tmp_path_factory.mktemp("runs")
    Trainer(Recipe("dense", MODEL, training=SMALL), *data, folder).run()
    return folder


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        elif isinstance(value, dict):
            same(value, other[key])
        else:
            assert value == other[key], key


def test_training_learns(data, tmp_path):
    recipe = Recipe("t", "plain", training=attrs.evolve(SMALL, epochs=8),
                    augmentation=Augmentation(0, flip=False))  # fmt: skip
    trainer = Trainer(recipe, *data, tmp_path)
    trainer.run()
    losses = [entry["loss"] for entry in trainer.history]
    assert losses[-1] < 0.5 * losses[0] and trainer.history[-1]["test accuracy"] > 0.8
    written = json.loads((tmp_path / "t" / "history.json").read_text())
    assert written["epochs"] == trainer.history and written["recipe"]["name"] == "t"


def test_quantized_training_ends_in_a_checked_export(data, runs):
    onnxruntime = pytest.importorskip("onnxruntime")
    trainer = Trainer(everything("export"), *data, runs)
    network = trainer.run()
    assert isinstance(network, MarsNetwork) and trainer.finished
    assert trainer.pruner.share() == pytest.approx(0.5, abs=0.51 / trainer.pruner.total)
    x = data[1].pixels.float().div(255)
    again = load_run(runs / "export")
    with torch.no_grad():
        expected = again(x).numpy()
        np.testing.assert_array_equal(network(x).numpy(), expected)
    np.testing.assert_array_equal(evaluate(to_graph(again), {"x0": x.numpy()})[0], expected)
    session = onnxruntime.InferenceSession(
        runs / "export" / "net.onnx", providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {"x0": x.numpy()})[0], expected)
    assert trainer.history[-1]["test accuracy"] == float(
        (torch.from_numpy(expected).argmax(1) == data[1].labels).double().mean()
    )


@pytest.mark.parametrize("stops", [[1], [6], range(1, 12)], ids=["1", "6", "every"])
def test_resume_is_bit_identical(stops, data, runs):
    whole = Trainer(everything("whole"), *data, runs)
    whole.run()
    assert whole.steps == 12
    name = f"parts{len(stops)}-{stops[0]}"
    for stop in [*stops, None]:
        parts = Trainer(everything(name), *data, runs)
        parts.run(stop_after=stop)
        assert parts.step == (stop or whole.steps)
    one, other = whole.state(), parts.state()
    one.pop("recipe"), other.pop("recipe")
    same(one, other)
    same(load_run(runs / "whole").state_dict(), load_run(runs / name).state_dict())


def test_a_signal_leaves_a_checkpoint(data, tmp_path):
    def progress(step, *_):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = Recipe("t", "plain", training=SMALL)
    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(recipe, *data, tmp_path, progress=progress)
    trainer.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.step == 3 and not trainer.finished
    assert load_checkpoint(tmp_path / "t" / "last.pt")["step"] == 3
    assert not (tmp_path / "t" / "final.pt").exists()
    with pytest.raises(OptionError, match="not been trained to its end"):
        load_run(tmp_path / "t")


def test_another_recipe_does_not_continue_a_run(data, tmp_path):
    recipe = Recipe("t", "plain", training=SMALL)
    Trainer(recipe, *data, tmp_path).run(stop_after=1)
    changed = attrs.evolve(recipe, training=attrs.evolve(SMALL, epochs=3))
    with pytest.raises(OptionError, match="differs in training"):
        Trainer(changed, *data, tmp_path).run()


def test_the_moving_average_is_one(data, tmp_path):
    recipe = Recipe("t", "plain", training=attrs.evolve(SMALL, ema=0.8))
    trainer = Trainer(recipe, *data, tmp_path)
    key = "0.weight"
    expected = trainer.model.state_dict()[key].double().clone()
    for step in range(1, 5):
        trainer.model.train()
        trainer.train_step()
        share = 1 - min(0.8, (1 + step) / (10 + step))
        expected += share * (trainer.model.state_dict()[key].double() - expected)
    torch.testing.assert_close(trainer.evaluated().state_dict()[key].double(), expected, rtol=1e-5,
                               atol=1e-7)  # fmt: skip


def test_tensorboard_gets_each_epoch(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = Trainer(Recipe("t", "plain", training=SMALL), *data, tmp_path,
                      tensorboard=tmp_path / "log")  # fmt: skip
    trainer.run()
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([entry["loss"] for entry in trainer.history])


def test_schedules():
    training = Training(epochs=10, learning_rate=1.0, warmup=1, schedule="linear")
    rates = [learning_rate(training, step, 4) for step in range(40)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8] and rates[4] == 1
    assert rates[22] == pytest.approx(0.5) and 0 < rates[39] < 0.05
    cosine = attrs.evolve(training, schedule="cosine")
    assert learning_rate(cosine, 22, 4) == pytest.approx(0.5)
    paper = attrs.evolve(training, schedule="step", step_epochs=4, warmup=0)
    assert [learning_rate(paper, s, 4) for s in (0, 15, 16, 39)] == pytest.approx([1, 1, 0.1, 0.01])


# -- the command line ------------------------------------------------------------------------------


def test_mars_train(data, tmp_path):
    from click.testing import CliRunner

    from tvm_mars.cli.training import train_command

    images = data[0]
    np.savez(tmp_path / "d.npz", x_train=images.pixels.numpy(), y_train=images.labels.numpy(),
             x_test=images.pixels.numpy(), y_test=images.labels.numpy())  # fmt: skip
    (tmp_path / "r.toml").write_text('name = "r"\nmodel = "plain"\n[training]\nepochs = 3\n')
    runs = str(tmp_path / "runs")
    arguments = [str(tmp_path / "r.toml"), "--data", str(tmp_path / "d.npz"), "--runs", runs]
    result = CliRunner().invoke(train_command, [*arguments, "--set", "training.batch=16"])
    assert result.exit_code == 0 and "% of the test images" in result.stdout
    assert len(json.loads((tmp_path / "runs/r/history.json").read_text())["epochs"]) == 3
    wrong = CliRunner().invoke(train_command, [*arguments, "--set", "training.bach=16"])
    assert wrong.exit_code == 1 and "batch?" in wrong.stderr
    assert CliRunner().invoke(train_command, []).exit_code == 2
    assert CliRunner().invoke(train_command, ["--list"]).stdout.split() == recipe_names()


# -- checkpoints -----------------------------------------------------------------------------------

# Children are forked off a process that has imported everything, and killed at random moments.
_KILLER = """
import os, random, signal, sys, time
import torch
from tvm_mars.qat.checkpoint import load_checkpoint, save_checkpoint

path, random_ = sys.argv[1], random.Random(int(sys.argv[2]))
torch.set_num_threads(1)
begun = time.monotonic()
save_checkpoint(path, {"step": 0, "x": torch.full((300_000,), 0)})
spent = time.monotonic() - begun
reached = set()
for _ in range(25):
    child = os.fork()
    if not child:
        step = load_checkpoint(path)["step"]
        while True:
            step += 1
            save_checkpoint(path, {"step": step, "x": torch.full((300_000,), step)})
    time.sleep(random_.uniform(0, 0.02 + 6 * spent))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = load_checkpoint(path)
    assert torch.equal(state["x"], torch.full((300_000,), state["step"]))
    reached.add(state["step"])
print(len(reached))
"""


def test_kill_9_during_a_save_leaves_a_loadable_checkpoint(tmp_path, first_seed):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'runtime'}"}
    result = subprocess.run(
        [sys.executable, "-c", _KILLER, str(tmp_path / "c.pt"), str(first_seed)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 3  # it did save in between


def test_checkpoints_hold_plain_values_only(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"x": Recipe("a", "b")}, path)
    with pytest.raises(InputError, match="no checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"x": torch.ones(3), "n": [1, "two", 3.0]})
    assert load_checkpoint(path)["n"] == [1, "two", 3.0]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="no checkpoint"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="No such file"):
        load_checkpoint(tmp_path / "none.pt")


# -- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    for other in (recipe.init, recipe.distillation and recipe.distillation.teacher):
        assert not other or other in recipe_names()


def test_recipes_say_what_is_wrong(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        'name = "r"\nmodel = "plain"\n[training]\nepochs = 3\n[pruning]\nsparsity = 1\n'
    )
    recipe = load_recipe(path, {"training.batch": "16", "training.schedule": "linear", "seed": "7"})
    assert recipe.training == Training(epochs=3, batch=16, schedule="linear") and recipe.seed == 7
    assert recipe.pruning == PruningPlan(1.0)
    for changes, message in [
        ({"training.epoch": "3"}, "epochs"),
        ({"training.epochs": "three"}, "no int"),
        ({"training.schedule": "cosinus"}, "'cosine'"),
        ({"trainig.epochs": "3"}, "training"),
        ({"seed.x": "1"}, "no int"),
    ]:
        with pytest.raises(OptionError, match=message):
            load_recipe(path, changes)
    with pytest.raises(OptionError, match="resnet20-dense"):
        load_recipe("resnet20-dens")
    with pytest.raises(OptionError, match="No such file"):
        load_recipe(tmp_path / "none.toml")
    path.write_text('name = "r"')
    with pytest.raises(OptionError, match="lacks model"):
        load_recipe(path)


# -- data ------------------------------------------------------------------------------------------


def _arrays(channels=3, size=32):
    rng = np.random.default_rng(0)
    shape = (channels, size, size)
    return [
        (rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n).astype(np.uint8))
        for n in (20, 4)
    ]


def _check(loaded, arrays):
    for images, (pixels, labels) in zip(loaded, arrays, strict=True):
        np.testing.assert_array_equal(images.pixels.numpy(), pixels)
        np.testing.assert_array_equal(images.labels.numpy(), labels)


@pytest.mark.parametrize("last", [True, False])
def test_npz(last, tmp_path):
    arrays = _arrays()
    (xt, yt), (xe, ye) = arrays
    if last:
        xt, xe = xt.transpose(0, 2, 3, 1), xe.transpose(0, 2, 3, 1)
    np.savez(tmp_path / "d.npz", x_train=xt, y_train=yt[:, None], x_test=xe, y_test=ye)
    _check(load_data(tmp_path / "d.npz"), arrays)
    np.savez(tmp_path / "e.npz", x_train=xt.astype(float), y_train=yt, x_test=xe, y_test=ye)
    with pytest.raises(InputError, match="float64"):
        load_data(tmp_path / "e.npz")
    np.savez(tmp_path / "f.npz", x_train=xt)
    with pytest.raises(InputError, match="lacks y_train, x_test"):
        load_data(tmp_path / "f.npz")


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(classes, archive, tmp_path):
    arrays = _arrays()
    folder = tmp_path / "cifar-binary"
    folder.mkdir()

    def records(pixels, labels):
        coarse = [np.full((len(labels), 1), 77, np.uint8)] if classes == 100 else []
        return np.hstack([*coarse, labels[:, None], pixels.reshape(len(labels), -1)]).tobytes()

    (xt, yt), (xe, ye) = arrays
    if classes == 10:
        for i in range(5):
            part = slice(4 * i, 4 * i + 4)
            (folder / f"data_batch_{i + 1}.bin").write_bytes(records(xt[part], yt[part]))
        (folder / "test_batch.bin").write_bytes(records(xe, ye))
    else:
        (folder / "train.bin").write_bytes(records(xt, yt))
        (folder / "test.bin").write_bytes(records(xe, ye))
    source = folder
    if archive:
        source = tmp_path / "c.tar.gz"
        with tarfile.open(source, "w:gz") as file:
            file.add(folder, "cifar-binary")
    _check(load_data(source), arrays)


def test_idx(tmp_path):
    arrays = _arrays(1, 28)
    for kind, (pixels, labels) in zip(("train", "t10k"), arrays, strict=True):
        sizes = np.array([len(labels), 28, 28], ">u4").tobytes()
        image_file = b"\0\0\x08\x03" + sizes + pixels.tobytes()
        (tmp_path / f"{kind}-images-idx3-ubyte.gz").write_bytes(gzip.compress(image_file))
        label_file = b"\0\0\x08\x01" + sizes[:4] + labels.tobytes()
        (tmp_path / f"{kind}-labels-idx1-ubyte").write_bytes(label_file)
    _check(load_data(tmp_path), arrays)
    for wrong in (b"", b"\0\0\x09\x01\0\0\0\0", label_file[:-1], b"\0\0\x08\x03\0\0"):
        with pytest.raises(InputError):
            read_idx(wrong)


def test_unknown_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no data set"):
        load_data(tmp_path)
    with pytest.raises(InputError, match="holds no data set"):
        load_data(tmp_path / "none.npz")
    with tarfile.open(tmp_path / "python.tar.gz", "w:gz") as file:
        entry = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        file.addfile(entry, io.BytesIO())
    with pytest.raises(InputError, match="binary"):
        load_data(tmp_path / "python.tar.gz")


def test_augmentation_moves_each_image_on_its_own():
    batch = torch.arange(2 * 8 * 8.0).view(1, 2, 8, 8).repeat(64, 1, 1, 1) + 1
    generator = torch.Generator().manual_seed(0)
    result = augment(batch, Augmentation(shift=2), generator)
    found = set()
    for image in result:
        matches = [
            (dy, dx, flip)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            for flip in (False, True)
            if torch.equal(image, _moved(batch[0], dy, dx, flip))
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 25
    cut = augment(torch.ones(16, 1, 8, 8), Augmentation(0, flip=False, cutout=4), generator)
    grey = (cut == 0.5).sum((1, 2, 3))
    assert set(cut.unique().tolist()) == {0.5, 1.0} and grey.max() <= 16 and grey.min() >= 1
    assert torch.equal(augment(batch, Augmentation(0, flip=False), generator), batch)


def _moved(image, dy, dx, flip):
    height, width = image.shape[1:]
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            sy, sx = y + dy, (width - 1 - x if flip else x) + dx
            if 0 <= sy < height and 0 <= sx < width:
                out[:, y, x] = image[:, sy, sx]
    return out


# -- verification ----------------------------------------------------------------------------------


def test_all_engines_agree_at_every_boundary(data, runs):
    pytest.importorskip("onnxruntime")
    from tvm_mars.qat.verify import verify

    Trainer(everything("agree"), *data, runs).run()
    network = load_run(runs / "agree")
    report = verify(network, data[1], batch=8)
    assert report.images == 16 and len(report.differing) == 4
    shapes = [kind.shape for name, kind in to_graph(network).types.items() if name != "x0"]
    assert report.codes == 16 * sum(int(np.prod(shape)) for shape in shapes)
    assert not any(report.differing.values())
    assert len(set(report.right.values())) == 1 and "differing codes: none" in str(report)
    wrong = verify(_one_code_off(network), data[1].first(4))
    assert wrong.differing["MARS"] == wrong.differing["PyTorch, integers"] == {"conv2": 1}


def _one_code_off(network):
    """A network whose integers no longer are what it computes."""

    class Off(MarsNetwork):
        def evaluate_values(self, *images):
            values = super().evaluate_values(*images)
            name = self.layers[3].name
            values[name] = values[name].clone()
            values[name][0, 0, 0, 0] += 2.0**-8  # and nothing reads it: later layers are done
            return values

    network.__class__ = Off
    return network
