"""The error a user can cause; the command line prints its one line and exits with 2."""


class UserError(ValueError):
    """Bad input: the message names the value received and the values allowed."""
