"""The one exception class for mistakes a person can fix."""


class UserError(ValueError):
    """A setting, file or checkpoint that cannot be used as given.

    The command line prints its message without a traceback and exits with status 2. A message names the
    key, the value received, what is allowed and the fix.
    """
