"""Every error ROSE raises on purpose; each message names the field or module, the value, and the way out."""


class RoseError(Exception):
    """Base of all ROSE errors, for users who want to catch any of them."""


class RoseConfigError(RoseError, ValueError):
    """A field of `ROSEConfig` has a value that cannot work."""


class TargetModulesError(RoseError, ValueError):
    """The module selection leaves nothing to train, or asks for something that cannot be wrapped."""


class AdapterFileError(RoseError, ValueError):
    """The weights of a saved adapter are cut off, or are not ROSE's."""


class UnsupportedModelError(RoseError, TypeError):
    """The model, or what it returns, is of a kind that ROSE cannot train."""


class UnsupportedOptimizerError(RoseError, TypeError):
    """The optimizer, or the way it is called, does not let ROSE act on a step."""


class UnsupportedEngineError(RoseError, RuntimeError):
    """The training engine hides parameters or gradients that ROSE needs to see."""


class AlreadyAttachedError(RoseError, RuntimeError):
    """ROSE is already attached to this model."""


class RoseInactiveError(RoseError, RuntimeError):
    """Training goes on while ROSE, which the user believes to be on, has no effect."""


class RankMismatchError(RoseError, RuntimeError):
    """The ranks of one run have gone apart: other masks, other steps, or one that does not come to a reduction."""
