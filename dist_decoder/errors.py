"""Every error that a user can cause, in one tree.

A message says what is wrong, where (dataset, subject, session, shard, key) and what to do.
Code on the way up adds the place with ``exc.add_note(...)``.
"""

FAILURE_FILE_VARIABLE = "DIST_DECODER_FAILURE_FILE"
"""Environment variable by which a launcher learns which rank failed first."""


class DistDecoderError(Exception):
    """Base of all errors raised on purpose. Commands print it without a traceback."""

    exit_code = 2


class ConfigError(DistDecoderError):
    """A configuration file or override is wrong."""


class DataError(DistDecoderError):
    """A raw file, store, or shard does not hold what it should."""


class FormatError(DataError):
    """A file of ours is truncated, of another version, or fails its checksum."""


class SplitError(DataError):
    """A split leaks: an image is in train and test."""


class RunError(DistDecoderError):
    """A run folder is in use, incomplete, or belongs to another configuration."""


class CheckpointError(RunError):
    """A checkpoint is missing, incomplete, or does not fit the model."""


class SupersededError(RunError):
    """A newer attempt of the same run has begun: this one must not write any more."""


class StorageError(DistDecoderError):
    """A location cannot be read or written."""


class TrainingError(DistDecoderError):
    """Training cannot go on (non-finite loss, dead rank)."""


class NonFiniteError(TrainingError):
    """A loss or gradient is not finite, once or too often: starting again would not help."""

    exit_code = 65


class LateRankError(TrainingError):
    """A rank died, hangs, or lost its connection: the same command goes on."""

    exit_code = 69


class OutOfMemory(TrainingError):
    """A rank needs more memory than there is."""

    exit_code = 71


class StoppedError(DistDecoderError):
    """Training was asked to stop by a signal, saved a checkpoint, and can be started again."""

    exit_code = 75


class LaunchError(DistDecoderError):
    """A rank failed or a job could not be started."""
