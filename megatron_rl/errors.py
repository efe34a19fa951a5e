"""The one error a user is meant to see: one line that says what was found, what was expected and
what to do.
"""


class UserError(Exception):
    """A mistake in the user's input (config, data, checkpoint, launch).

    The command line prints the message as one line on stderr and exits with code 2, without a
    traceback. Write it as "found; expected; remedy".
    """
