"""`loralab study plan | run | status`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from loralab.cli.inputs import warm_model, writable_folder
from loralab.cli.output import Answer, Command
from loralab.training.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Print trials, packs, expected memory and time before anything runs."""

    spec: Positional[Path]
    """study.toml"""
    max_slots: int | None = None
    """the most trials per pack; measured by default"""
    workers: int | None = None
    """how many packs at once; one per core or per GPU by default"""

    def run(self) -> Answer:
        """Return the plan."""
        from loralab.study.parse import read_spec
        from loralab.study.plan import plan_study

        warm_model(read_spec(self.spec).model)
        plan = plan_study(self.spec, max_slots=self.max_slots, workers=self.workers)
        return Answer(plan.to_dict(), plan.text())


@dataclass(frozen=True, kw_only=True)
class Run(Command):
    """Run a study, or go on with it where it was interrupted. A finished one runs nothing."""

    spec: Positional[Path]
    """study.toml"""
    out: Path | None = None
    """the study's folder; out/NAME_OF_THE_FILE by default"""
    max_slots: int | None = None
    """the most trials per pack; measured by default"""
    device: str | None = None
    """cpu, cuda, cuda:1; every GPU by default if there are any"""
    workers: int | None = None
    """how many packs to train at once, each in a process of one thread; one per core or per GPU
    by default; 1 trains in this process, with the threads it has"""

    def run(self) -> Answer:
        """Run what is left and return the status."""
        from loralab.study.parse import read_spec
        from loralab.study.run import default_folder, run_study
        from loralab.study.status import study_status

        spec = read_spec(self.spec)
        out = writable_folder(self.out or default_folder(self.spec))
        warm_model(spec.model)
        with Progress() as progress:
            folder = run_study(
                self.spec,
                out,
                progress,
                max_slots=self.max_slots,
                device=self.device,
                workers=self.workers,
            )
        status = study_status(folder)
        text = f"{status.text()}\n\nloralab report {folder}"
        return Answer({"folder": folder, **status.to_dict()}, text)


@dataclass(frozen=True, kw_only=True)
class Status(Command):
    """Say how far a study is, while it runs or after."""

    folder: Positional[Path]
    """the study's folder"""

    def run(self) -> Answer:
        """Return the status."""
        from loralab.study.status import study_status

        status = study_status(self.folder)
        return Answer(status.to_dict(), status.text())
