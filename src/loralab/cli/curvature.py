"""`loralab curvature`: Hessian eigenvalues of a method's blocks at initialisation."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loralab.cli.errors import report
from loralab.cli.inputs import open_model, writable_file
from loralab.cli.output import Answer, Command, plain, table
from loralab.cli.train import default_device, setting
from loralab.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Curvature(Command):
    """Measure the largest and smallest Hessian eigenvalue of each adapter block at the start."""

    model: str
    """`tiny`, a local folder or a Hugging Face id"""
    data: str
    """a task's name, a data file, or a Hugging Face data set"""
    method: str
    """a name of the catalogue"""
    blocks: str = "all"
    """all (one per layer), whole (one for all), or suffixes of layer names: q_proj,v_proj"""
    way: Literal["exact", "closed_form", "gauss_newton"] = "exact"
    """exact: Lanczos; closed_form: one backward, for B = 0; gauss_newton: for other pairs"""
    rank: int = 8
    """r"""
    alpha: float | None = None
    """numerator of the scale; the method's own rule by default"""
    seed: int = 0
    """of the initialisation"""
    targets: tuple[str, ...] = ("all-linear",)
    """layers to adapt"""
    set: tuple[str, ...] = ()
    """hyper-parameters of the method as NAME=VALUE"""
    items: int = 16
    """training items the loss is over"""
    rtol: float = 1e-2
    """error bound relative to the larger eigenvalue"""
    out: Path | None = None
    """also write the result to this JSON file"""

    def run(self) -> Answer:
        """Measure and return one row per block."""
        from loralab.curvature import curvature
        from loralab.methods import get
        from loralab.references import parse
        from loralab.tasks import load_task

        get(self.method)
        if self.items < 1:
            raise UserError(f"--items must be at least 1, not {self.items}")
        if not 0 < self.rtol < 1:  # told before the model is opened
            raise UserError(f"--rtol must be above 0 and below 1, not {self.rtol}")
        if self.out is not None:
            writable_file(self.out)
        # Fused attention has no second derivative on most devices.
        attention = {} if "attn" in parse(self.model)[1] else {"attn": "eager"}
        model, processor = open_model(self.model, device=default_device(), **attention)
        task = load_task(self.data, processor, model)
        batch = task.batch("train", list(range(min(self.items, task.size("train")))))
        found = curvature(
            model,
            self.method,
            [batch],
            way=self.way,
            blocks=self.blocks,
            losses=task.losses,
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets[0] if len(self.targets) == 1 else self.targets,
            seed=self.seed,
            rtol=self.rtol,
            **dict(map(setting, self.set)),
        )
        data = {"model": self.model, "data": self.data, **found.to_dict()}
        rows = [[b.name, b.lambda_max, b.lambda_min, b.n_products] for b in found.blocks]
        lines = [
            table(["block", "lambda max", "lambda min", "products"], rows),
            "",
            f"median lambda max {found.lambda_max:.4g}, min {found.lambda_min:.4g}",
            f"way: {data['way_in_words']}",
            f"loss: {found.loss}; {found.seconds:.1f} s",
        ]
        answer = Answer(data, "\n".join(lines))
        if self.out is None:
            return answer
        try:
            self.out.write_text(json.dumps(plain(data), indent=1) + "\n", encoding="utf-8")
        except OSError as error:  # the numbers are still shown
            error.filename = error.filename or str(self.out)
            return dataclasses.replace(answer, code=report(error))
        return answer
