"""Errors a user can mend. They end the run with exit status 2 and one message."""


class UserError(ValueError):
    """What is wrong, what was got, what was wanted, and the fix, in one message."""


def first_line(error: BaseException) -> str:
    """Of what an error of another library says, its name where it says nothing; 300 characters at most."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
