"""The benchmarks of the guards: what faults do is told as it is, and the tables are whole. Times are never asserted."""

import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a script and returns the cells of its table, without the head."""

    def run(script: ModuleType, *options: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *options])
        script.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[1:]]

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)  # so that it comes first: a process in which autograd has threads cannot be forked
def test_faults_are_done_to_both_and_told(table):
    import faults

    names = ["resume_middle", "kill", "damaged_byte", "not_finite", "evaluation", "hostile"]
    found = table(faults, "--only", *names, "--kills", "1")
    assert [cells[0] for cells in found] == [faults.FAULTS[name][0] for name in names]
    middle, kill, byte, nan, evaluation, hostile = (cells[1:] for cells in found)
    assert middle[0].startswith("weights differ, another order of samples; ")
    assert middle[1] == "equal bit for bit; 0 of 40 samples seen twice, 0 never"
    assert kill[1].startswith("0 of 1 corrupt")
    assert byte == ["continues from step 8, with the wrong weights", "continues from step 4, the one before"]
    assert nan[0] == "status 0; checkpoint of step 14, weights NaN"
    assert nan[1].startswith("status 1, NonFiniteLossError: the loss is nan at step 7 ")
    assert nan[1].endswith("; checkpoint of step 7, weights finite")
    assert evaluation == ["34 counted, mean 15.529", "33 counted, mean 16.000"]
    assert hostile[0] == "its code was run; status 0"
    assert hostile[1].startswith("nothing was run; status 1, ValueError: ")
    assert list(Path().iterdir()) == [], "runs leave nothing behind"


@pytest.mark.slow
@pytest.mark.timeout(600)  # so that it comes first: a process in which autograd has threads cannot be forked
def test_faults_of_continuing_are_done_to_both_and_told(table):
    import faults

    names = ["plateau", "best_new_folder", "best_moved", "settings_lr", "settings_groups", "state"]
    found = table(faults, "--only", *names)
    assert [cells[0] for cells in found] == [faults.FAULTS[name][0] for name in names]
    plateau, folder, moved, rate, groups, state = (cells[1:] for cells in found)
    assert plateau == ["goes on with epoch 2 of 4 that were done", "goes on with epoch 4 of 4 that were done"]
    assert folder == ["the best is epoch 2", "the best is epoch 1"]
    assert moved[1] == "the best is epoch 1"
    assert rate == ["learning rate 0.001 (decay 0.01)", "learning rate 0.002 (decay 0.01)"]
    assert groups[0].startswith("status 1, ValueError: loaded state dict has a different number of parameter groups")
    assert groups[1] == "learning rate 0.001 (decay 0.01), 0.001 (decay 0)"
    assert state[0].startswith("nothing is said; continued: ")
    assert state[1].startswith("at the first save: callback Dated: state['when'] is a datetime.datetime")


def test_signals_are_sent_and_counted(table):
    import faults

    ((_, stock, guarded),) = table(faults, "--only", "signal_usr1_rank1", "--signals", "1")
    assert stock.startswith("0 of 1 clean")
    assert guarded.startswith("1 of 1 clean")


def test_processes_that_hang_are_ended():
    from faults import told
    from runs import run

    ended = run(lambda: time.sleep(100), processes=2, deadline=0.1)
    assert [one.status for one in ended] == [None, None]
    assert told(*ended).startswith("hangs, killed after ")


def test_the_overhead_is_the_guards(table, monkeypatch):
    import guards_overhead

    steps = []

    class Guard(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            steps.append(type(pl_module).__name__)

    monkeypatch.setattr(guards_overhead, "guard", lambda trainer: trainer.callbacks.append(Guard()))
    found = table(guards_overhead, "--rounds", "1", "--seconds", "0.01", "--only", "layers", "digits")
    assert [cells[1] for cells in found] == 2 * ["without", "with all guards", "without, again"]
    # Of three fits of each network one has it: 17 and 5 steps, 3 to warm up, and the last.
    assert steps == 21 * ["Tiny"] + 9 * ["ViTClassifier"]
