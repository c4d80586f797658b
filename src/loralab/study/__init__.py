"""Fair studies: a spec, its trials, their packs, a store and what was found."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralab.study.plan import StudyPlan
    from loralab.study.results import StudyResults
    from loralab.study.spec import StudySpec
    from loralab.training.progress import Progress


class Study:
    """A study in Python: `Study("study.toml").run().results()`.

    Args:
        spec: the path of a study.toml, a mapping laid out like one, or a `StudySpec`.
        out: the study's folder; out/<name> if not given.

    Raises:
        UserError: the spec is wrong.
    """

    def __init__(
        self, spec: "str | Path | Mapping[str, Any] | StudySpec", out: str | Path | None = None
    ) -> None:
        from loralab.study.parse import parse, read_spec, resolve_methods
        from loralab.study.spec import StudySpec

        if isinstance(spec, str | Path):
            self._source: Path | StudySpec = Path(spec)
            self.spec = read_spec(spec)
        else:
            self.spec = spec if isinstance(spec, StudySpec) else parse(spec, "study")
            self.spec = resolve_methods(self.spec, "study")
            self._source = self.spec
        stem = self._source.stem if isinstance(self._source, Path) else self.spec.name
        self.folder = Path(out) if out is not None else Path("out") / stem

    def plan(self, **options: Any) -> "StudyPlan":
        """Return trials, packs, expected memory and time; see `plan_study` for the options."""
        from loralab.study.plan import plan_study

        return plan_study(self._source, **options)

    def run(self, progress: "Progress | None" = None, **options: Any) -> "Study":
        """Run what is left of the study and return it; see `run_study` for the options."""
        from loralab.study.run import run_study

        run_study(self._source, self.folder, progress, **options)
        return self

    def results(self) -> "StudyResults":
        """Return what is finished."""
        from loralab.study.results import load_results

        return load_results(self.folder)
