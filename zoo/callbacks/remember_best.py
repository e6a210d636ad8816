"""The best checkpoints of a run that is continued, in another folder or after a move."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo._lightning import NAMESPACE, rank_zero_warn
from zoo.checkpoints import moved

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.callbacks import ModelCheckpoint
else:
    from pytorch_lightning.callbacks import ModelCheckpoint

State = dict[str, Any]


def remember_best(trainer: Any, checkpoint: State) -> None:
    """Mends the states of ModelCheckpoints in a checkpoint that is about to be restored. All processes have to call it.

    Lightning's ModelCheckpoint forgets its scores in another folder, so that the first validation is the best, and
    keeps a relative path that leads nowhere after a move. Here paths are looked for where they lie from the checkpoint
    that is continued, then where they were. A best checkpoint that is gone is forgotten, with a warning. What lies in
    the folder of the run before is left there, whatever is better now.

    A ModelCheckpoint with other intervals than before is the same one if it has the same ``monitor`` and ``mode``.
    """
    there = checkpoint.get("provenance", {}).get("cwd", "")
    found: dict[str, State] = {}
    for saver in trainer.checkpoint_callbacks if trainer.is_global_zero else ():
        before = _state_of(saver, checkpoint["callbacks"]) if isinstance(saver, ModelCheckpoint) else None
        if before is not None:
            found[saver.state_key] = mended(before, saver, Path(trainer.ckpt_path), there)
    # Other processes may not see the disk of the first, and all have to agree on what the best is.
    checkpoint["callbacks"].update(trainer.strategy.broadcast(found))


def mended(state: State, saver: Any, continued: Path, there: str = "") -> State:
    """The state of a ModelCheckpoint with paths that are right here, and without checkpoints that are gone.

    Args:
        state: As it was saved.
        saver: The ModelCheckpoint that is to have it.
        continued: The checkpoint it was in, where it lies now.
        there: The working directory it was saved from.
    """
    places = {path: moved(path, state.get("dirpath"), continued, there) for path in _paths(state)}
    scores = {str(places[path]): score for path, score in state["best_k_models"].items() if places[path] is not None}
    best = places.get(state["best_model_path"])
    new = state | {"dirpath": saver.dirpath, "best_model_path": "" if best is None else str(best)}
    new |= {"best_k_models": {}, "best_model_score": None, "kth_best_model_path": "", "kth_value": saver.kth_value}
    new["last_model_path"] = ""  # this run has none yet
    if saver.monitor is None:
        return new
    if state["best_model_path"] and best is None:
        instead = "the best of the others counts" if scores else "the best from now on counts"
        rank_zero_warn(f"the best checkpoint before, {state['best_model_path']}, is gone: {instead}")
    while len(scores) > saver.save_top_k != -1:
        del scores[_extreme(scores, "min" if saver.mode == "max" else "max")]
    if scores:
        best_path = _extreme(scores, saver.mode)
        new |= {"best_k_models": scores, "best_model_path": best_path, "best_model_score": scores[best_path]}
        if len(scores) == saver.save_top_k or saver.save_top_k == -1:
            worst_path = _extreme(scores, "min" if saver.mode == "max" else "max")
            new |= {"kth_best_model_path": worst_path, "kth_value": scores[worst_path]}
    return new


def _extreme(scores: Mapping[str, Any], mode: str) -> str:
    return (max if mode == "max" else min)(scores, key=lambda path: float(scores[path]))


def _state_of(saver: Any, states: Mapping[str, State]) -> State | None:
    """The saver's own state, or that of one with other intervals and the same metric, if there is a single one."""
    if saver.state_key in states:
        return states[saver.state_key]
    name = f"{type(saver).__qualname__}{{"
    alike = [state for key, state in states.items() if key.startswith(name) and f"'mode': '{saver.mode}'" in key]
    alike = [state for state in alike if state.get("monitor") == saver.monitor]
    return alike[0] if len(alike) == 1 else None


def _paths(state: State) -> set[str]:
    return {path for path in (state["best_model_path"], *state["best_k_models"]) if path}
