"""Every error the program raises on purpose.

Each carries one line that names the thing and says what to do; the command line prints that line and leaves
with the code in the middle column. Anything else that escapes is a bug and keeps its traceback.

    Glm4Error                      1
    ├── OptionError                2   a flag, a YAML key, an environment variable, or its value
    ├── CheckpointError            3   a model folder that cannot be loaded as it is
    │   └── ConfigError            3   its config.json, or another JSON file in it
    ├── PromptError                4   a prompt, a message, or a file of them
    ├── MemoryPlanError            5   a model or a request that cannot fit
    ├── DeviceError                6   a device or number format that is not there
    ├── OutputError                7   a result that cannot be written
    ├── DownloadError              8   a hub that cannot be reached or sent the wrong bytes
    └── EngineError                9   a request that failed while the model ran
        └── LostRankError          9   … and none can run any more, since the ranks that share it are out of step

Ctrl-C leaves with 130, as shells expect.
"""


class Glm4Error(Exception):
    """Base of all expected errors; `str(error)` is one line for the user."""

    exit_code = 1


class OptionError(Glm4Error):
    """A flag, a YAML key, an environment variable, or the value given to one."""

    exit_code = 2


class CheckpointError(Glm4Error):
    """A model folder that cannot be loaded as it is; the message names the file and the tensor."""

    exit_code = 3


class ConfigError(CheckpointError):
    """A JSON file of the model folder that is missing, malformed, or says something unsupported."""


class PromptError(Glm4Error):
    """A prompt, a message, or a file of prompts that cannot be answered."""

    exit_code = 4


class MemoryPlanError(Glm4Error):
    """A model or a request that cannot fit; the message names the smallest change that does."""

    exit_code = 5


class DeviceError(Glm4Error):
    """A device or a number format that is not available; the message lists those that are."""

    exit_code = 6


class OutputError(Glm4Error):
    """A result that cannot be written where it was asked for."""

    exit_code = 7


class DownloadError(Glm4Error):
    """A hub that cannot be reached, refuses, or sends bytes that do not match their size or hash."""

    exit_code = 8


class EngineError(Glm4Error):
    """A request that failed while the model ran."""

    exit_code = 9


class LostRankError(EngineError):
    """A rank that shares the model is gone, hangs or failed: the model has to be loaded again."""


INTERRUPTED = 130
