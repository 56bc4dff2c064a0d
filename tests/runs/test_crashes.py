"""Kill -9: a run, or a family, goes on from what any of its file-system events leaves, and ends as
if nothing had happened."""

import contextlib
import os

import crash_images
import pytest
import small_runs

from effreason import loop
from effreason.cli import family as families
from effreason.runs.session import open_session

pytestmark = pytest.mark.usefixtures("cheap")

# Short, with all that a run writes: two checkpoints, of which one is kept, and three evaluations.
CHANGES = {"run.steps": 4, "checkpoint.every": 2, "checkpoint.keep": 1, "evaluation.every": 2,
           "evaluation.problems": 4, "rollout.prompts_per_step": 2, "rollout.slots": 8}

# Each image costs a run: of so many the first is tried, EFFREASON_CRASH_EVERY=1 tries all.
EVERY = int(os.environ.get("EFFREASON_CRASH_EVERY", "10"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_runs.write_world(tmp_path_factory.mktemp("world"), train=8, test=4, first=100)


class Runs:
    """Trains again and again in one directory, with everything open."""

    def __init__(self, world, directory, **changes):
        self.directory = directory
        self._configs = [small_runs.config(world, directory, **changes, **{"run.resume": resume})
                         for resume in (False, True)]
        self._session = open_session(self._configs[0])

    def __enter__(self):
        self.session = self._session.__enter__()
        return self

    def __exit__(self, *error):
        self._session.__exit__(*error)

    def train(self):
        """Begins, or goes on if there is a run: as the command in the last line, or a script."""
        resume = (self.directory / "config.yaml").exists()
        with contextlib.redirect_stdout(None):
            self.run(self._configs[resume])

    def run(self, config):
        loop.train(config, self.session)

    def record(self):
        """Trains once; the images before each event, and what is left at the end."""
        with crash_images.recording(self.directory) as recorder:
            self.train()
        return recorder, crash_images.lasting(crash_images.read_tree(self.directory))

    def check(self, images, expected):
        """Goes on from each image."""
        wrong = {}
        for name, tree in images:
            crash_images.write_tree(self.directory, tree)
            try:
                self.train()
            except Exception as error:
                wrong[name] = error
                continue
            found = crash_images.lasting(crash_images.read_tree(self.directory))
            if found != expected:
                wrong[name] = [path for path in {**expected, **found}
                               if found.get(path, "") != expected.get(path, "")]
        assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


class Families(Runs):
    """The same for a family."""

    def run(self, config):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(families, "open_session", lambda _: contextlib.nullcontext(self.session))
            families.train(config, [0.3], ["dpo"], [0.5])


@pytest.mark.slow
def test_a_run_killed_before_any_of_its_file_system_events_goes_on(world, tmp_path):
    with Runs(world, tmp_path / "run", **CHANGES) as runs:
        recorder, expected = runs.record()
        print(f"{recorder.events} events, {len(recorder.images)} images")
        assert recorder.events > 150
        runs.check(recorder.images[::EVERY], expected)


@pytest.mark.slow
def test_a_family_killed_before_any_of_its_file_system_events_goes_on(world, tmp_path):
    changes = CHANGES | {"run.steps": 2, "checkpoint.every": 1, "evaluation.every": 0}
    with Families(world, tmp_path / "family", **changes) as runs:
        recorder, expected = runs.record()
        print(f"{recorder.events} events, {len(recorder.images)} images")
        runs.check(recorder.images[::EVERY], expected)
