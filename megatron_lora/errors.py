"""Errors a user can mend. They end the run with exit status 2 and one message."""


class UserError(ValueError):
    """What is wrong, what was got, what was wanted, and the fix, in one message."""
