"""`loralab demo`: the main job on the embedded default, from nothing to a report."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from loralab.cli.inputs import warm_model, writable_folder
from loralab.cli.output import Answer, Command
from loralab.cli.report import written_report
from loralab.errors import UserError
from loralab.training.progress import Progress

SPEC = "study.toml"


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Compare ten methods or more on a tiny model, with no download, and write a report.

    The study is written to the folder as study.toml first, so it can be read, changed and run
    again with `loralab study run`. After an interruption the same command goes on.
    """

    out: Path = Path("out/demo")
    """the study's folder"""
    quick: bool = False
    """fewer methods and learning rates: at most a minute"""
    workers: int | None = None
    """how many packs to train at once, each in a process of one thread; one per core by default"""

    def run(self) -> Answer:
        """Run study, curvature and report."""
        from loralab.study.run import run_study

        out = writable_folder(self.out)
        spec = out / SPEC
        wanted = packaged(self.quick)
        if not spec.exists():
            spec.write_text(wanted, encoding="utf-8")
        elif spec.read_text(encoding="utf-8") != wanted:
            raise UserError(
                f"{spec} is another study than this demo's; give another --out, "
                f"or run it with `loralab study run {spec} --out {out}`"
            )
        warm_model(tomllib.loads(wanted)["model"])
        with Progress() as progress:
            run_study(spec, out, progress, workers=self.workers)
            progress.finish()
            progress.say("writing the report")
        return written_report(out)


def packaged(quick: bool) -> str:
    """Return the text of the demo's study."""
    name = "demo_quick.toml" if quick else "demo.toml"
    return (files("loralab") / "data" / name).read_text(encoding="utf-8")
