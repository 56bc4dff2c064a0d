"""The one exception for what a user can put right."""


class UserError(Exception):
    """Bad input: the message is one line that names the field or file, what was expected and what was found.

    The command line prints `error: <message>` and exits with code 2; nobody sees a traceback for a mistake of their own."""
