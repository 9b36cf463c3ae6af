"""Where a training of voxceleb_trainer stood: its epoch and the optimizer's moments, so that a run can go on as it would there.

    SAVE_PATH/model/model000000010.model = {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch": 10}

Files of before have weights alone, and the epoch in their name. The learning rate needs no state here: it is a function of the
step, and epoch E begins at step E * steps_per_epoch. Moments are numbered there in the order of the parameters, network before
loss, which is the order of their names in the weights.

    epoch, notes = continue_from(path, task, optimizer)
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from spknet.checkpoints.portable import read
from spknet.checkpoints.voxceleb_trainer import split, their_name


def is_of_run(path: str | Path, run_dir: str | Path | None) -> bool:
    """Whether a file is one that voxceleb_trainer itself left in a folder it was to save in."""
    path = Path(path)
    return run_dir is not None and path.parent == Path(run_dir) / "model" and _number(path) is not None


def continue_from(path: str | Path, task, optimizer: torch.optim.Optimizer) -> tuple[int, list[str]]:
    """(epochs done, what a user should know); fills the optimizer's moments where the file has them and they fit.

    task: has `model` and `loss`, which have the file's weights already.
    """
    state = read(path)
    said = state.get("epoch") if "model_state_dict" in state or "model" in state else None
    epoch = said if isinstance(said, int) else _number(Path(path)) or 0
    begun = f"going on after epoch {epoch} of {path}"
    moments = _moments(state, task)
    if moments is None:
        return epoch, [f"{begun}; it holds no moments of the optimizer that fit, which begin anew"]
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    wanted = {"exp_avg", "exp_avg_sq"} if "betas" in optimizer.param_groups[0] else {"momentum_buffer"}
    for parameter, values in moments.items():
        if parameter in trained and wanted <= values.keys():
            optimizer.state[parameter] = values
    return epoch, [begun if optimizer.state else f"{begun}; its optimizer is another one, whose moments begin anew"]


def _number(path: Path) -> int | None:
    match = re.fullmatch(r"model(\d+)\.model", path.name)
    return int(match[1]) if match else None


def _moments(state: dict, task) -> dict[torch.nn.Parameter, dict] | None:
    """The optimizer's values of each parameter; None where there are none or one does not have its parameter's shape."""
    theirs = state.get("optimizer_state_dict")
    values = theirs.get("state") if isinstance(theirs, dict) else None
    if not values:
        return None
    parameters = {
        (part, their_name(module, name)): parameter
        for part, module in enumerate((task.model, task.loss))
        for name, parameter in module.named_parameters()
    }
    names = [(part, name) for part, weights in enumerate(split(state)) for name in weights]
    ordered = [name for name in names if name in parameters]
    found = {}
    for number, name in enumerate(ordered):
        parameter, entry = parameters[name], dict(values.get(number) or {})
        for key, value in entry.items():
            if key == "step":
                entry[key] = torch.as_tensor(float(value))
                continue
            value = value.mT if name[1] == "W" else value
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                return None
            entry[key] = value.to(parameter)
        found[parameter] = entry
    return found if len(ordered) == len(parameters) else None
