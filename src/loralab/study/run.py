"""Running a study, or going on with one."""

from pathlib import Path

from loralab.errors import UserError
from loralab.references import file_hash
from loralab.study.backend import Backend, beside, set_up
from loralab.study.environment import environment
from loralab.study.guards import check_at_least_one, only_one, readable_disk_errors
from loralab.study.parse import read_spec
from loralab.study.spec import StudySpec
from loralab.study.store import Store
from loralab.training.progress import Progress


def default_folder(path: str | Path) -> Path:
    """Return the folder of a study that is not told where to go: out/<name of the file>."""
    return Path("out") / Path(path).stem


def run_study(
    spec: str | Path | StudySpec,
    out: str | Path | None = None,
    progress: Progress | None = None,
    *,
    max_slots: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    checkpoint_every: int = 50,
    backend: Backend = Backend(),  # noqa: B008
) -> Path:
    """Run the study, or what is left of it, and return its folder.

    The grid is trained first, then widened where an optimum lies at its edge, then each family's
    winner is trained on fresh seeds and looks at the test split, once. A finished study
    runs nothing. A killed one goes on: packs keep their trials, the interrupted pack its steps.

    Args:
        spec: study.toml, or a checked spec.
        out: the study's folder; `default_folder` if not given.
        progress: an entered `Progress`; None shows nothing.
        max_slots: the most trials per pack; None measures how many fit.
        device: None takes CUDA if there is any.
        workers: how many packs to train at once, each in a process of one thread (on a GPU: of
            its own). None takes one per GPU, or one per core. One trains in this process, with
            the threads it has. Numbers depend on it only through which trials share a pack, that
            is by rounding; a study keeps its packs when it goes on with other workers.
        checkpoint_every: steps between checkpoints of a pack.

    Raises:
        UserError: a wrong spec, a folder with another study, a study that runs already, a budget
            too small, a worker that cannot start, no memory for one trial, no room or permission
            to write.
    """
    from loralab.study.crew import crew_for
    from loralab.study.engine import Engine
    from loralab.study.workers import Order

    check_at_least_one(max_slots=max_slots, workers=workers)
    source = Path.cwd() if isinstance(spec, StudySpec) else Path(spec).absolute().parent
    name = spec.name if isinstance(spec, StudySpec) else spec
    spec = spec if isinstance(spec, StudySpec) else read_spec(spec)
    folder = Path(out) if out is not None else default_folder(name)
    with (
        Store.create(folder, spec.store) as store,
        readable_disk_errors(folder),
        only_one(folder),
    ):
        begin(store, spec, source)
        if store.study()["finished"] is None:
            show = progress or Progress(quiet=True)
            bench = set_up(spec, source, device, backend)
            with crew_for(bench, Order(spec, source, backend), workers, device, show) as found:
                crew, room, sharing = found
                options = (max_slots, checkpoint_every, room, sharing)
                Engine(bench, store, folder, show, crew, *options).run()
    return folder


def begin(store: Store, spec: StudySpec, source: Path) -> None:
    """Record a new study, or that an unfinished one goes on and with which versions.

    Raises:
        UserError: the folder holds a study of another spec, or of other data of the same name.
    """
    now = environment() | {"data": file_hash(beside(spec.task, source))}
    if store.begin(spec.to_dict(), spec.hash, now):
        return
    study = store.study()
    old = study["environment"].get("data")  # older studies do not say
    if old and now["data"] and old != now["data"]:
        raise UserError(
            f"{store.place} holds a study of another {spec.task}; give the new study a folder of "
            "its own with --out, or restore the file"
        )
    if study["finished"] is None:
        old = study["environment"]
        changed = sorted(key for key in now if now[key] != old.get(key))
        store.add_event("resumed", changed=changed)
