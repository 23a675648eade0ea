"""A study from its file to its page."""

from collections.abc import Callable
from pathlib import Path

from dat_lightning.core.errors import InputError
from dat_lightning.pages.drawing import require_matplotlib
from dat_lightning.studies.collection import Result, collect, previous_runs, write_results
from dat_lightning.studies.configurations import read_mapping
from dat_lightning.studies.execution import execute, is_done, state_of
from dat_lightning.studies.page import write_page
from dat_lightning.studies.planning import Plan, changed, plan
from dat_lightning.studies.study_file import read_study


def run_study(path: Path, out: Path, runs: Path, jobs: int, say: Callable[[str], None]) -> int:
    """Runs a study as far as it has not been run, and writes its results.

    Args:
        path: The YAML.
        out: Folder of the results.
        runs: Folder of the runs.
        jobs: Runs at a time.
        say: Gets a line for each event.

    Returns:
        The number of runs that failed, or wait for one that did.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If an argument or something in the file is wrong.
        OSError: If a folder cannot be written to.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}")
    require_matplotlib()
    todo = plan(read_study(path), runs)
    _make(out)
    _make(runs)
    for line in _changes(todo, out):
        say(line)
    outcomes = execute(todo, jobs, say)
    results: list[Result] = collect(todo, outcomes)
    written = [write_results(out, todo, results), *write_page(out, todo.study, results)]
    say(f"wrote {', '.join(file.as_posix() for file in written)}")
    return sum(not result.done for result in results)


def list_plan(path: Path, runs: Path) -> str:
    """Returns what a study has to run, a line for each task."""
    todo = plan(read_study(path), runs)
    lines = []
    for task in todo.tasks.values():
        state = "done" if is_done(task) else state_of(task).get("status") or ("begun" if task.folder.exists() else "")
        lines.append(f"{task.key}  {state or 'to do':8}  {task.name}")
    ended = sum(is_done(task) for task in todo.tasks.values())
    lines.append(f"{len(lines)} tasks, {ended} done; runs are in {runs.as_posix()}")
    return "\n".join(lines) + "\n"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made: {error.strerror or error}") from error


def _changes(todo: Plan, out: Path) -> list[str]:
    """Sentences about runs whose configuration is not that of the last call."""
    before = previous_runs(out)
    said: dict[str, str] = {}
    for member in todo.members:
        for what, key in (("training", member.training), ("test", member.test)):
            task, folder = todo.tasks[key], before.get((member.variant, member.seed, what))
            if folder is None or folder.name.removeprefix("test-") == key or is_done(task):
                continue
            try:
                differs = changed(read_mapping(folder / "config.yaml"), task.config)
            except (OSError, ValueError):
                differs = "its old folder is gone"
            said[key] = f"{task.name}: its configuration has changed, so it is run anew ({differs})"
    return list(said.values())
