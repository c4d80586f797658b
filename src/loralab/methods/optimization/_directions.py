"""SD-LoRA's schedule (arXiv 2501.13198, algorithm 1): at a task's end B_t A_t is normalised to
B_t A_t / ‖B_t A_t‖_F, a frozen direction whose magnitude is still trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from loralab.errors import UserError
from loralab.methods.expansion._phases import forget
from loralab.methods.optimization._pairs import product_norm
from loralab.recipe import Recipe, Schedule, SiteState
from loralab.training.adamw import per_slot

OLD = frozenset({"A_old", "B_old"})  # the directions of earlier tasks, which are not trained


@dataclass(frozen=True)
class NextDirection(Schedule):
    """Freeze the present direction and begin another one.

    Args:
        restart_magnitudes: all of them, old and new, begin each further task at 1 (algorithm 1,
            line 1). False goes on with α_t ‖B_t A_t‖_F, which leaves the function as it is.
    """

    singles_out: ClassVar[frozenset[str]] = OLD | {"alpha", "alpha_old"}
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B", "alpha"})
    changes: ClassVar[frozenset[str]] = OLD

    restart_magnitudes: bool = True

    def objection(self, recipe: Recipe) -> tuple[str, str] | None:
        if self.restart_magnitudes or not recipe.form.shared:
            return None
        return "form", "the norms that magnitudes would take over differ (magnitudes='site' can)"

    @torch.no_grad()
    def next_task(self, sites: Sequence[SiteState], count: int) -> None:
        """Normalise the direction of task `count` - 1 into its place among the old ones."""
        n_old = sites[0].t["alpha_old"].shape[-1] if "alpha_old" in sites[0].t else 0
        if count > n_old:
            raise UserError(
                f"SD-LoRA was made for n_tasks = {n_old + 1} and cannot begin task {count + 1}; "
                "set n_tasks to the length of the sequence"
            )
        for site in sites:
            A, B = site.t["A"], site.t["B"]
            r, norm = A.shape[-2], product_norm(B, A)
            here = slice((count - 1) * r, count * r)
            direction = B / per_slot(norm.clamp_min(torch.finfo(B.dtype).tiny), B)
            site.fixed["A_old"][..., here, :] = A
            site.fixed["B_old"][..., here] = direction
            if self.restart_magnitudes:
                for name in {"alpha", "alpha_old"} & site.t.keys():  # common ones: the first site's
                    site.t[name].fill_(1.0)
            else:
                site.t["alpha_old"][..., count - 1] = site.t["alpha"][..., 0] * norm
                site.t["alpha"].fill_(1.0)
            B.zero_()
            for slot, values in enumerate(A):
                generator = site.generator(slot, "A", count)
                draw = torch.rand(values.shape, generator=generator, dtype=torch.float64)
                values.copy_((2 * draw - 1) * site.site.d_in**-0.5)
            forget(site)
