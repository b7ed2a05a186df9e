"""FTD, flat trajectory distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, positive
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import small
from distillens.distillers._trajectory import MTT_ROWS, Matching, Rows, quick, row
from distillens.nets.convnet import ConvNet

# The paper's columns by images a class; for CIFAR-10 at 10 lr_img is the script's (the paper's is 10).
ROWS: Rows = {
    "cifar10": {
        1: {**MTT_ROWS["cifar10"][1], "gsam_alpha": 0.3, "ema_decay": 0.9999},
        10: {"gsam_alpha": 0.3, "ema_decay": 0.9995},
        50: {**MTT_ROWS["cifar10"][50], "lr_start": 0.01, "gsam_alpha": 1.0, "ema_decay": 0.999},
    },
    "cifar100": {
        1: {**MTT_ROWS["cifar100"][1], "syn_steps": 40, "gsam_alpha": 1.0, "ema_decay": 0.9995},
        10: {**MTT_ROWS["cifar100"][10], "max_start_epoch": 40, "gsam_alpha": 1.0, "ema_decay": 0.9995},
        50: {**MTT_ROWS["cifar100"][50], "batch_syn": 1000, "gsam_alpha": 1.0, "ema_decay": 0.999},
    },
    "tiny": {
        1: {**MTT_ROWS["tiny"][1], "syn_steps": 30, "gsam_alpha": 1.0, "ema_decay": 0.999},
        10: {**MTT_ROWS["tiny"][10], "batch_syn": 500, "gsam_alpha": 1.0, "ema_decay": 0.999},
    },
}


@dataclass(frozen=True)
class FTD(Matching):
    """MTT with experts that were led to flat minima, and with the distilled images averaged over the steps.

    Experts follow GSAM with an adaptive radius ``rho``: errors in the weights grow less along a flat way. The set is
    the running average S <- d S + (1 - d) s of the images s that are optimised, d = ``ema_decay``.

    Source: Du et al. 2023, algorithms 1 and 2; ``buffer/buffer_FTD.py``, ``distill/EMA.py``. Where we differ: the averaged
    images are the set, and are judged on fresh networks (their code judges them on a network that was already trained
    on the raw ones).
    """

    paper: ClassVar[str] = "Du et al. 2023"

    rho: float = 0.01
    gsam_alpha: float = 0.3
    ema_decay: float = 0.999
    mode: Literal["graph", "adjoint"] = "adjoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("ftd", rho=self.rho)
        at_least(0, "ftd", gsam_alpha=self.gsam_alpha, ema_decay=self.ema_decay)
        if self.ema_decay >= 1:
            raise UserError("ftd: ema_decay must be below 1", got=f"{self.ema_decay!r}")

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> FTD:
        """The authors' columns by data and images a class; on digits' scale a short version."""
        net = ConvNet.defaults(like)
        if small(like):
            return cls(ema_decay=0.8, mode="graph", net=net, **quick(ipc))
        return cls(net=net, **row(like, ipc, ROWS))

    @property
    def way(self) -> Literal["graph", "adjoint"]:
        """As set."""
        return self.mode

    @property
    def expert_recipe(self) -> Recipe:
        """GSAM on top of plain SGD."""
        return self.plain_experts.but(rho=self.rho, gsam_alpha=self.gsam_alpha)

    def start(self, problem: Problem) -> State:
        """The initial images, which are their own average, and step size."""
        state = self.begun(problem)
        return State({**state.tensors, "average": state.tensors["images"].clone()}, state.values)

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One stretch of one expert is matched; the average follows."""
        key = problem.key.fold("step", i)
        stretch = self.stretch(problem, key, 0, self.max_start_epoch)
        rate = float(state.values["rate"])
        found = self.matched(problem, key, stretch, rate, [state.tensors["images"]])
        state, log = self.after(state, found)
        average = self.ema_decay * state.tensors["average"] + (1 - self.ema_decay) * state.tensors["images"]
        return State({**state.tensors, "average": average}, state.values), log

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The averaged images, with the learned step size."""
        return self.set_of(problem, state.tensors["average"], state)
