"""The exceptions of greenloop, named after the border that was crossed.

GreenloopError
├── UsageError       something the user gave cannot be used: exit status 2
│   ├── ConfigError      a recipe or an option (names the key's path)
│   ├── ModelError       a model spec, its files or its tokenizer
│   ├── TaskError        a task set (names file, line and field)
│   └── RunError         a run folder, checkpoint or samples file
├── SandboxError     the sandbox cannot judge: refused, closed or broken
└── TrainingError    training cannot go on (non-finite loss); the state was saved first

The message is one sentence for the user that names the place and the remedy; `cli` prints it without a traceback.
"""


class GreenloopError(Exception):
    """The root of everything that greenloop raises on purpose."""


class UsageError(GreenloopError):
    """Something that the user gave cannot be used."""


class ConfigError(UsageError):
    """A recipe or an option is wrong; the message starts with the key's path."""


class ModelError(UsageError):
    """A model spec cannot be turned into a model and a tokenizer."""


class TaskError(UsageError):
    """A task set cannot be used; the message names file, line and field."""


class RunError(UsageError):
    """A run folder, a checkpoint or a samples file cannot be used."""


class SandboxError(GreenloopError):
    """The sandbox cannot judge: refused on this machine, closed or broken."""


class TrainingError(GreenloopError):
    """Training cannot go on; what was learned so far has been saved."""
