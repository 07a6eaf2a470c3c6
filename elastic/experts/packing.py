"""What was trained and chosen as a model repository, for `elastic serve`.

Packs one seed; a repository that is there gets new versions of all, in one change. Never trains.
"""

from __future__ import annotations

from typing import Any

from elastic.core.errors import ConfigError, RepositoryError
from elastic.core.experts.repository import Repository, Trained
from elastic.core.trained import load_model
from elastic.experts.config import ExpertsConfig
from elastic.experts.evaluation import read_evaluation
from elastic.experts.jobs import ROUTER, Planned, plan
from elastic.experts.training import is_finished


def pack(config: ExpertsConfig, seed: int) -> Repository:
    """Write FOLDER/repository from the runs of one seed and the policy that `evaluate` chose.

    Raises:
        ConfigError: something is not trained or not evaluated yet.
        RepositoryError: what is there already is another repository.
    """
    selection = read_evaluation(config)["selection"]
    experts = {one: _trained(config, plan(config, one, seed)) for one in config.subset_names}
    router = _trained(config, plan(config, ROUTER, seed))
    path = config.root / "repository"
    if (path / "repository.json").exists():
        there, fields = Repository.open(path), _fields(config)
        sampling = {"sampling": fields.pop("sampling")} if "sampling" in fields else {}
        _check_same(there, fields)
        return there.replace_all(experts, router, selection=selection, **sampling)
    return Repository.create(path, experts, router, selection=selection, **_fields(config))


def _fields(config: ExpertsConfig) -> dict[str, Any]:
    dtype = "UINT8" if config.kind == "language" else "FP32"
    fields: dict[str, Any] = {
        "name": config.name,
        "task": config.kind,
        "input": {"shape": list(config.data.shape), "dtype": dtype},
    }
    if config.kind == "classifier":
        fields["num_classes"] = config.data.num_classes
    if config.kind == "flow":
        fields["sampling"] = {"num_steps": config.evaluation.num_steps}
    return fields


def _check_same(there: Repository, fields: dict[str, Any]) -> None:
    found = there.manifest.model_dump(mode="json")
    for name, value in fields.items():
        if found[name] != value:
            raise RepositoryError(
                f"{there.path}: its {name} is {found[name]}, now {value}; remove that folder, or"
                " name another in `folder`"
            )


def _trained(config: ExpertsConfig, planned: Planned) -> Trained:
    if not is_finished(planned):
        raise ConfigError(f"{planned.run}: is not trained yet")
    task: Any = planned.task()
    model = load_model(planned.run, task, averaged=config.ema_decay is not None)
    return Trained(task.spec(), model.state_dict())
