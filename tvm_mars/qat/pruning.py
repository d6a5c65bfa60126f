"""Group-set pruning: group lasso (eq. 1 to 4), and a schedule that reaches a wanted share.

The lasso makes the group-sets that matter least small; the schedule then removes the smallest for
good: a removed group-set is zero in the latent weights and in a mask that is part of the network's
state, so that no step, average, fold or conversion brings it back. Behind the ramp the mask is
frozen and the lasso is off: the network heals.

Source: Sie et al., TCAD 2022, eq. 1 to 4. The cubic ramp: Zhu and Gupta, arXiv 1710.01878.
"""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

import fnmatch
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from mars_runtime.arch import MarsArch
from mars_runtime.errors import CapacityError, OptionError, UnsupportedError

from ..validators import one_of
from .functions import per_kernel
from .layers import Sum, Term
from .network import MarsNetwork

__all__ = ["Pruner", "PruningPlan", "layer_adaptive", "prune", "ramp"]

_SMALLEST = 1e-30


def _share(_: object, attribute: Any, value: float) -> None:
    if not 0 <= value <= 1:
        raise OptionError(f"{value} is not within 0..1", where=attribute.name)


@attrs.frozen
class PruningPlan:
    """What is pruned, and when.

    Parameters
    ----------
    sparsity : float
        Share of zero group-sets at the end, over all layers that are pruned.
    kernels, channels : int
        alpha and N of eq. 3 and 4: what is zeroed together. 16 and 16 are a group-set of MARS.
    scope : str
        ``global``: the least important of the network go; ``layer``: the same share of each layer.
    lasso : str
        ``penalty`` adds eq. 4 to the loss; ``proximal`` shrinks norms after each step; ``none``.
    strength : float
        lambda_g of eq. 1.
    score : str
        Importance of a group-set: norm of its ``latent`` weights (the paper's), or ``folded``: of
        the weights that are deployed, gamma / deviation included.
    adaptive : bool
        Divide a group-set's importance by the root of the summed squares of its layer's that are
        not smaller (LAMP: Lee et al., arXiv 2010.07611): a wide layer has small weights
        everywhere, and plain norms would empty it before they touch a narrow one.
    cost : str
        ``none``; ``cycles``: lasso and score weigh a group-set by the cycles that it takes.
    begin, end : float
        Where the ramp begins and ends, as shares of the training; both 0: all at once, before the
        first step.
    updates : int
        Times that group-sets are removed within the ramp.
    keep : float
        Share of each layer's group-sets that stays at least (and one in any case).
    exclude : tuple of str
        Patterns of layers that are not pruned. The first and the last are not unless ``edges``;
        grouped convolutions never are.
    """

    sparsity: float = attrs.field(validator=_share)
    kernels: int = 16
    channels: int = 16
    scope: str = attrs.field(default="global", validator=one_of("global", "layer"))
    lasso: str = attrs.field(default="penalty", validator=one_of("penalty", "proximal", "none"))
    strength: float = 1e-4
    score: str = attrs.field(default="folded", validator=one_of("folded", "latent"))
    adaptive: bool = False
    cost: str = attrs.field(default="none", validator=one_of("none", "cycles"))
    begin: float = attrs.field(default=0.1, validator=_share)
    end: float = attrs.field(default=0.6, validator=_share)
    updates: int = 100
    keep: float = attrs.field(default=0.0, validator=_share)
    exclude: tuple[str, ...] = ()
    edges: bool = False

    def __attrs_post_init__(self) -> None:
        if self.begin > self.end:
            raise OptionError(f"{self.begin} comes after end, {self.end}", where="begin")


def ramp(plan: PruningPlan, progress: float) -> float:
    """Share of zero group-sets that is due, at a share of the training."""
    if progress < plan.begin:
        return 0.0
    if progress >= plan.end:
        return plan.sparsity
    done = (progress - plan.begin) / (plan.end - plan.begin)
    done = int(done * plan.updates) / plan.updates
    return float(plan.sparsity * (1 - (1 - done) ** 3))


class Pruner:
    """Prunes a network while it is trained.

    Parameters
    ----------
    network : MarsNetwork
        Any method; ``float`` for a network in float32.
    plan : PruningPlan
    arch : MarsArch
        The machine whose cycles count under ``cost="cycles"``.

    Raises
    ------
    CapacityError
        If the share cannot be reached with what must stay.
    """

    def __init__(self, network: nn.Module, plan: PruningPlan, arch: MarsArch | None = None) -> None:
        if not isinstance(network, MarsNetwork):
            raise UnsupportedError(
                f"a {type(network).__name__} cannot be pruned",
                where="pruning",
                hint="prepare it; method='float' quantizes nothing",
            )
        self.plan = plan
        self.terms = _pruned_terms(network, plan)
        for term in self.terms:
            if term.block != (plan.kernels, plan.channels):
                term.set_block(plan.kernels, plan.channels)
        self.total: int = sum(term.mask.numel() for term in self.terms)
        self._stays = [max(1, round(plan.keep * t.mask.numel())) for t in self.terms]
        self._costs = _cycle_shares(network, self.terms, arch or MarsArch(), plan)
        self._active, self._due = True, 0.0
        need, have = round(plan.sparsity * self.total), self.total - sum(self._stays)
        if plan.scope == "global" and need > have:
            raise CapacityError(
                "cannot zero that many group-sets",
                op="pruning",
                need=need,
                have=have,
                hint="lower sparsity or keep; every layer keeps one",
            )

    def share(self) -> float:
        """Share of group-sets that are pruned."""
        alive = sum(int(term.mask.sum()) for term in self.terms)
        return 1 - alive / self.total

    def before_step(self, progress: float) -> None:
        """Remove what is due at a share of the training."""
        self._active = progress < self.plan.end
        due = ramp(self.plan, progress)
        if due != self._due:
            self.prune_to(due)
            self._due = due

    @torch.no_grad()
    def prune_to(self, share: float) -> None:
        """Remove the least important group-sets until the share is zero; none comes back.

        What must stay does, whatever the share: each layer's most important at least.
        """
        if self.plan.scope == "layer":
            for i, term in enumerate(self.terms):
                self._remove([i], round(share * term.mask.numel()))
        else:
            self._remove(list(range(len(self.terms))), round(share * self.total))

    def _remove(self, which: list[int], wanted: int) -> None:
        terms = [self.terms[i] for i in which]
        alive = sum(int(term.mask.sum()) for term in terms)
        count = wanted - (sum(term.mask.numel() for term in terms) - alive)
        scores = [self._removable(i) for i in which]
        count = min(count, sum(int(part.isfinite().sum()) for part in scores))
        if count <= 0:
            return
        order = torch.cat(scores).argsort(stable=True)[:count]
        chosen = torch.zeros(sum(map(len, scores)), dtype=torch.bool, device=order.device)
        chosen[order] = True
        for term, part in zip(terms, chosen.split([len(s) for s in scores]), strict=True):
            term.mask &= ~part.view(term.mask.shape)
            term.weight.mul_(term.spread(term.mask))

    def _removable(self, i: int) -> Tensor:
        """Scores of a layer's group-sets; infinite of those that are gone or must stay."""
        term = self.terms[i]
        scores = self._scores(term).div_(self._costs[i] ** 0.5).flatten()
        scores[~term.mask.flatten()] = torch.inf
        stay = min(self._stays[i], int(term.mask.sum()))
        best = torch.where(scores.isinf(), -1.0, scores).topk(stay).indices
        scores[best] = torch.inf
        return scores

    def _scores(self, term: Term) -> Tensor:
        norms = self._norms(term)
        return layer_adaptive(norms) if self.plan.adaptive else norms

    def _norms(self, term: Term) -> Tensor:
        if self.plan.score == "latent" or term.method != "mars":
            return term.group_set_norms()
        normalized = term.normalized()
        scale, _ = term.scale()
        return term.group_set_norms(normalized * per_kernel(scale, normalized))

    def penalty(self) -> Tensor | float:
        """The lasso's term of the loss: ``lambda_g / 2`` times the (weighted) sum of norms."""
        if self.plan.lasso != "penalty" or not self._active or not self.plan.strength:
            return 0.0
        sums = [
            term.group_set_norms().sum() * cost
            for term, cost in zip(self.terms, self._costs, strict=True)
        ]
        return torch.stack(sums).sum() * (self.plan.strength / 2)

    @torch.no_grad()
    def after_step(self, learning_rate: float) -> None:
        """Keep removed group-sets at zero; shrink the others by the proximal operator."""
        shrink = self.plan.lasso == "proximal" and self._active
        for term, cost in zip(self.terms, self._costs, strict=True):
            mask = term.weight_mask()
            if mask is not None:
                term.weight.mul_(mask)
            if shrink:
                norms = term.group_set_norms()
                less = learning_rate * self.plan.strength / 2 * cost
                term.weight.mul_(term.spread((1 - less / norms.clamp_min(less)).clamp_min(0)))


def layer_adaptive(norms: Tensor) -> Tensor:
    """Divide each norm by the root of the summed squares of those that are not smaller (LAMP)."""
    squares = norms.flatten().square()
    order = squares.argsort(descending=True, stable=True)
    scores = torch.zeros_like(squares)
    scores[order] = squares[order] / squares[order].cumsum(0).clamp_min(_SMALLEST)
    return scores.sqrt().view_as(norms)


def prune(network: nn.Module, sparsity: float, **options: Any) -> Pruner:
    """Remove the least important group-sets of a trained network, all at once.

    Masks are part of the network's state: whatever loop trains it then, what is removed stays zero.
    Some epochs at a tenth of the learning rate let the network heal.

    Parameters
    ----------
    network : MarsNetwork
        Made of the trained one by :func:`tvm_mars.qat.prepare`, and calibrated.
    sparsity : float
        Share of zero group-sets, over all layers that are pruned.
    **options
        Other fields of :class:`PruningPlan`; by default importance is the norm of the weights that
        are deployed.

    Returns
    -------
    Pruner
        Says the share.

    Raises
    ------
    CapacityError
        If the share cannot be reached with what must stay.

    Examples
    --------
    >>> import torch
    >>> from tvm_mars.qat import Quantization, calibrate, prepare, prune
    >>> from tvm_mars.qat.models import plain
    >>> network = prepare(plain(10), Quantization(activation_bits=4), (3, 32, 32))
    >>> calibrate(network, torch.rand(16, 3, 32, 32))
    >>> round(prune(network, 0.75).share(), 2)
    0.75
    """
    plan = PruningPlan(sparsity, lasso="none", begin=0.0, end=0.0, **options)
    pruner = Pruner(network, plan)
    pruner.before_step(0.0)
    return pruner


def _pruned_terms(network: MarsNetwork, plan: PruningPlan) -> list[Term]:
    """Terms that the plan prunes."""
    inputs = {layer.name for layer in network.layers if not layer.inputs}
    found = []
    for layer in network.sums():
        edge = layer.bits is None or bool(inputs & set(layer.inputs))
        for term in layer.terms:
            grouped = term.geometry is not None and term.geometry.groups > 1
            excluded = any(fnmatch.fnmatchcase(term.name, p) for p in plan.exclude)
            if not (grouped or excluded or (edge and not plan.edges)):
                found.append(term)
    if not found:
        raise UnsupportedError("leaves no layer to prune", where="pruning")
    return found


def _cycle_shares(
    network: MarsNetwork, terms: list[Term], arch: MarsArch, plan: PruningPlan
) -> list[float]:
    """Cycles of one group-set of each layer over their mean: filling it, and one visit a pixel."""
    if plan.cost == "none":
        return [1.0] * len(terms)
    bits = {layer.name: layer.bits for layer in network.layers if hasattr(layer, "bits")}
    for layer in network.layers:
        if layer.name not in bits:  # pools and dropout pass codes
            bits[layer.name] = bits[layer.inputs[0]]
    cycles = []
    for layer in network.sums():
        cycles += [
            _cycles(layer, term, bits[source], arch)
            for term, source in _pairs(layer)
            if term in terms
        ]
    sizes = [term.mask.numel() for term in terms]
    mean = sum(c * n for c, n in zip(cycles, sizes, strict=True)) / sum(sizes)
    return [c / mean for c in cycles]


def _pairs(layer: Sum) -> list[tuple[Term, str]]:
    return list(zip(layer.terms, layer.inputs, strict=False))


def _cycles(layer: Sum, term: Term, input_bits: int, arch: MarsArch) -> float:
    if layer.shape is None:
        raise UnsupportedError(
            "has no known size", where=layer.name, hint="give input_shape when preparing"
        )
    pixels = layer.shape[1] * layer.shape[2]
    fill = arch.group_set_weights * term.bits / arch.macro_write_bits
    return pixels * arch.accesses(input_bits) + fill
