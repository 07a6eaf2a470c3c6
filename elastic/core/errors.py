"""The one tree of errors. Messages give the value seen, the limit, and the setting that changes it.

ElasticError
├── RetryableError          the job goes on, or the same call may succeed later
│   ├── ChannelClosed       the peer's socket reached end-of-file
│   ├── DecodingError       coded sums do not fit together; the step is computed again, uncoded
│   ├── ClusterError        Ray's control service (GCS) does not answer
│   └── StorageError        a disk or bucket refuses to be read or written
└── FatalError              the job stops; a checkpoint is written first where there is a state
    ├── ConfigError         the job file, the task, the data or the machine cannot do what is asked
    │   ├── DataError       a data file is missing, damaged or too small
    │   ├── TaskError       the model, optimizer or loss is refused, by name
    │   └── StoreError      shared memory is too small, or the store is held by another job
    ├── CheckpointError     a checkpoint is damaged or belongs to another model
    ├── RepositoryError     a model repository is damaged, or does not hold what is asked of it
    ├── NonFiniteError      the model's own gradient or loss is NaN or infinite
    ├── ProcessError        processes ended in a way that another start may not meet
    ├── CallbackError       a user's callback raised
    ├── PreemptedError      the node is taken away; the run goes on elsewhere
    └── ProtocolError       a rule of the step was broken: a bug of ours
"""


class ElasticError(Exception):
    """Root of every error raised on purpose by this project."""


class RetryableError(ElasticError):
    """The job goes on, or the same call may succeed later."""


class ChannelClosed(RetryableError):
    """The peer of a socket is gone."""


class DecodingError(RetryableError):
    """Coded sums do not fit together: nothing was updated, the step is computed again."""


class ClusterError(RetryableError):
    """Ray's control service (GCS) does not answer; what was asked may be done all the same."""


class StorageError(RetryableError):
    """A disk or bucket refuses to be read or written; nothing there is known to be wrong."""


class FatalError(ElasticError):
    """The job stops."""


class ConfigError(FatalError):
    """What is asked cannot be done; nothing has been started."""


class DataError(ConfigError):
    """A data file is missing, damaged or too small."""


class TaskError(ConfigError):
    """The model, optimizer or loss is refused, by name."""


class StoreError(ConfigError):
    """Shared memory is too small, or the store is held by another job."""


class CheckpointError(FatalError):
    """A checkpoint is damaged or belongs to another model."""


class RepositoryError(FatalError):
    """A model repository is damaged, or does not hold what is asked of it."""


class NonFiniteError(FatalError):
    """The model's own gradient or loss is NaN or infinite."""


class ProcessError(FatalError):
    """The job's processes ended in a way that another start may not meet."""


class CallbackError(FatalError):
    """A user's callback raised; what it raised is the cause. The job was stopped in good order."""


class PreemptedError(FatalError):
    """The node is taken away: the job was stopped in good order, and its run goes on elsewhere."""


class ProtocolError(FatalError):
    """A rule of the step was broken: a bug of ours."""
