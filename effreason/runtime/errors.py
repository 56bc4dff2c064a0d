"""What the command line turns into one line and an exit code."""


class UserError(Exception):
    """Bad input: the message is one line that names the field or file, what was expected and what was found.

    The command line prints `error: <message>` and exits with code 2; there is no traceback for a user's mistake."""


class Interrupted(Exception):
    """The run was told to stop by a signal, and has saved what it had.

    The command line prints the message, which says how to resume, and exits with code 128 + signum."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.message = message
