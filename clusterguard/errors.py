"""Every error that clusterguard raises on purpose. Each message says what to do next.

```
ClusterGuardError
├── ConfigurationError (ValueError)        an option, or a combination of options, that cannot work
├── InputError (ValueError)                images, labels or targets of the wrong shape, dtype or range
├── UnsupportedBackboneError (TypeError)   no classifier to replace, or an output that is no (B, D) tensor
├── NotCalibratedError (RuntimeError)      thresholds are needed and none have been fitted
├── TooFewCalibrationExamplesError (ValueError)  a class has too few examples for the rate asked for
├── TrainingDivergedError (RuntimeError)   the loss became NaN or infinite; the last good weights are kept
├── TrainingStoppedError (RuntimeError)    training was asked to stop; the checkpoint is written
├── PersistenceError (RuntimeError)        a saved file is missing, damaged, foreign, too new or does not fit
└── MissingDependencyError (ImportError)   an optional package is needed for this call
```
"""


class ClusterGuardError(Exception):
    """Base class of all errors that clusterguard raises on purpose. Catch it to catch them all."""


class ConfigurationError(ClusterGuardError, ValueError):
    """An option, or a combination of options, that cannot work."""


class InputError(ClusterGuardError, ValueError):
    """Images, labels or targets of the wrong shape, dtype or range."""


class UnsupportedBackboneError(ClusterGuardError, TypeError):
    """A backbone without a classifier that can be replaced, or whose output is not a (B, D) tensor."""


class NotCalibratedError(ClusterGuardError, RuntimeError):
    """Thresholds are needed and none have been fitted."""


class TooFewCalibrationExamplesError(ClusterGuardError, ValueError):
    """A class has too few correctly classified examples for the false-positive rate asked for."""


class TrainingDivergedError(ClusterGuardError, RuntimeError):
    """The training loss became NaN or infinite. The guard holds the last good weights."""


class TrainingStoppedError(ClusterGuardError, RuntimeError):
    """Training was asked to stop and has written its checkpoint. The same call continues from it."""


class PersistenceError(ClusterGuardError, RuntimeError):
    """A guard, graph, checkpoint or suite state that is missing, damaged, foreign or too new, or that does not fit."""


class MissingDependencyError(ClusterGuardError, ImportError):
    """An optional package is needed for this call and is not installed."""


def in_one_line(error: BaseException, *, length: int = 400) -> str:
    r"""The text of another library's error, shortened to one line for the end of a message of clusterguard.

    Args:
        error: error whose text may have many lines, or none.
        length: number of characters after which the text is cut off.

    Example:
        >>> in_one_line(KeyError("weight")), in_one_line(ValueError("first\n  second")), in_one_line(EOFError())
        ("KeyError: 'weight'", 'ValueError: first second', 'EOFError')
    """
    text = " ".join("".join(character if character.isprintable() else " " for character in str(error)).split())
    text = text if len(text) <= length else f"{text[:length].rstrip()} …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
