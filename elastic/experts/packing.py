"""What was trained and chosen as a model repository, for `elastic serve`.

Packs one seed; a repository that is there gets new versions of what has changed. Never trains.
"""

from __future__ import annotations

from typing import Any

from elastic.core.errors import ConfigError
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
        return _update(Repository.open(path), experts, router, selection)
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


def _update(
    repository: Repository, experts: dict[str, Trained], router: Trained, selection: dict[str, Any]
) -> Repository:
    for name, expert in experts.items():
        repository = repository.replace_expert(name, expert.weights, spec=expert.spec)
    repository = repository.replace_router(router.weights, spec=router.spec)
    return repository.replace_selection(selection)


def _trained(config: ExpertsConfig, planned: Planned) -> Trained:
    if not is_finished(planned):
        raise ConfigError(f"{planned.run}: is not trained yet")
    task: Any = planned.task()
    model = load_model(planned.run, task, averaged=config.ema_decay is not None)
    return Trained(task.spec(), model.state_dict())
