"""What pruning cost in training, as ``benchmarks/pruning.py`` measured and wrote it.

It takes hours, so that its figures are kept: the page on training and ``mars reproduce fig12`` show
these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import attrs
import cattrs

from mars_runtime import PRESETS
from mars_runtime.program import write_atomically

__all__ = ["FILE", "PruningStudy", "Trial", "read_study", "write_study"]

FILE = Path(__file__).with_name("pruning_study.json")
MARS = PRESETS["mars"]


@attrs.frozen(kw_only=True)
class Trial:
    """A trained network; shares are of 1.

    Parameters
    ----------
    channels : int
        N of eq. 4: input channels that are pruned together, of 16 kernels.
    cost : str
        What a group-set's norm is divided by: ``none``, or ``cycles`` for their root.
    asked, pruned : float
        Share of blocks of 16 x N weights at a tap that were to be pruned; that were.
    accuracy : float
        On the test images.
    zero : float
        Share of zero group-sets, of 16 x 16, in the layers that were pruned.
    cycles : int
        Core cycles of one image on ``mars`` with the default schedule.
    """

    channels: int
    cost: str
    asked: float
    pruned: float
    accuracy: float
    zero: float
    cycles: int

    @property
    def fps(self) -> float:
        """Images per second, one at a time."""
        return MARS.core_clock_mhz * 1e6 / self.cycles


@attrs.frozen(kw_only=True)
class PruningStudy:
    """All trials, and how they came about.

    Parameters
    ----------
    benchmark : str
        The file that measures.
    network, data : str
        What was trained, and on what.
    weight_bits, activation_bits, seed : int
        Of all trials.
    dense_epochs, epochs : int
        Of the float network that all begin with; of each trial from there.
    dense_accuracy : float
        Of the float network.
    versions : mapping of str to str
        Of the packages that trained and measured.
    """

    benchmark: str
    network: str
    data: str
    weight_bits: int
    activation_bits: int
    seed: int
    dense_epochs: int
    epochs: int
    dense_accuracy: float
    versions: Mapping[str, str]
    trials: tuple[Trial, ...]

    def by_channels(self, asked: float = 0.75) -> tuple[Trial, ...]:
        """Give the trials that differ in N alone (Fig. 12)."""
        return tuple(
            trial for trial in self.trials if trial.cost == "none" and trial.asked == asked
        )

    def trial(self, channels: int, asked: float, cost: str = "none") -> Trial:
        """Give one."""
        wanted = (channels, asked, cost)
        return next(t for t in self.trials if (t.channels, t.asked, t.cost) == wanted)


def read_study(path: Path = FILE) -> PruningStudy:
    """Read what was measured."""
    text = path.read_text(encoding="utf-8")
    study: PruningStudy = cattrs.structure(json.loads(text), PruningStudy)
    return study


def write_study(study: PruningStudy, path: Path = FILE) -> None:
    """Write what was measured."""
    write_atomically(path, f"{json.dumps(attrs.asdict(study), indent=1)}\n".encode())
